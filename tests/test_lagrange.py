"""The energy, the risk and the multiplier, held against their formulas."""

import math
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_algd.common.lagrange import EnergyTerms, EpisodeController, LagrangeMultiplier, augmented_lagrangian, estimate_risk

RISK = th.linspace(-3.0, 5.0, 33, dtype=th.float64)
BUDGET = th.tensor([1.2], dtype=th.float64)


def penalty(risk: th.Tensor, multiplier: float, rho: float) -> th.Tensor:
    """Energy of actions of value 0, for one constraint."""
    lagrangian, coefficient = (th.tensor([number], dtype=th.float64) for number in (multiplier, rho))
    return augmented_lagrangian(th.zeros_like(risk), risk.unsqueeze(-1), lagrangian, BUDGET, coefficient)


@pytest.mark.parametrize("rho", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("multiplier", [0.0, 0.7, 3.0])
def test_energy_equals_the_papers_formula(multiplier: float, rho: float) -> None:
    squares = (multiplier + rho * (RISK - BUDGET)).clamp_min(0.0).square() - multiplier**2
    th.testing.assert_close(penalty(RISK, multiplier, rho), squares / (2.0 * rho))


def test_energy_tends_to_the_plain_lagrangian_as_rho_vanishes() -> None:
    risk = RISK.clone().requires_grad_()
    plain = penalty(risk, 0.7, 0.0)
    (plain_grad,) = th.autograd.grad(plain.sum(), risk)
    th.testing.assert_close(plain.detach(), 0.7 * (RISK - BUDGET))
    th.testing.assert_close(plain_grad, th.full_like(RISK, 0.7))
    gaps = []
    for rho in (1e-1, 1e-2, 1e-3, 1e-4):
        augmented = penalty(risk, 0.7, rho)
        (grad,) = th.autograd.grad(augmented.sum(), risk)
        gaps.append(max((augmented - plain).abs().max().item(), (grad - plain_grad).abs().max().item()))
    # The gap is rho/2 (risk - h)^2 in value and rho |risk - h| in slope: ten times smaller each time
    np.testing.assert_allclose(np.array(gaps[1:]) / np.array(gaps[:-1]), 0.1, rtol=1e-6)


def test_small_rho_is_exact_in_single_precision() -> None:
    risk = th.tensor([[5.0]])
    energy = augmented_lagrangian(th.zeros(1), risk, th.tensor([0.7]), th.tensor([1.2]), th.tensor([1e-6]))
    assert energy.item() == pytest.approx(0.7 * 3.8 + 0.5e-6 * 3.8**2, rel=1e-6)


@pytest.mark.parametrize("rho", [0.5, 2.0])
def test_slope_and_curvature(rho: float) -> None:
    multiplier = 0.7
    risk = RISK.clone().requires_grad_()
    (slope,) = th.autograd.grad(penalty(risk, multiplier, rho).sum(), risk, create_graph=True)
    th.testing.assert_close(slope.detach(), (multiplier + rho * (RISK - BUDGET)).clamp_min(0.0))
    (curvature,) = th.autograd.grad(slope.sum(), risk)
    active = multiplier + rho * (RISK - BUDGET) > 0.0
    assert active.any() and not active.all()
    th.testing.assert_close(curvature, th.where(active, rho, 0.0).to(th.float64))


def test_feasible_without_multiplier_is_the_negative_value() -> None:
    values = th.randn(7, 5)
    risk = BUDGET.float() - th.rand(7, 5, 1)
    energy = augmented_lagrangian(values, risk, th.zeros(1), BUDGET.float(), th.ones(1))
    assert th.equal(energy, -values)


def test_constraints_add_up() -> None:
    values, risk = th.randn(4, dtype=th.float64), th.randn(4, 3, dtype=th.float64)
    multiplier, budget = th.tensor([0.1, 0.0, 2.0], dtype=th.float64), th.tensor([0.3, -1.0, 0.5], dtype=th.float64)
    # The second constraint has no quadratic term
    rho, zero = th.tensor([0.8, 0.0, 2.5], dtype=th.float64), th.zeros(4, dtype=th.float64)
    together = augmented_lagrangian(values, risk, multiplier, budget, rho)
    apart = sum(
        augmented_lagrangian(zero, risk[:, i : i + 1], *(each[i : i + 1] for each in (multiplier, budget, rho)))
        for i in range(3)
    )
    th.testing.assert_close(together, apart - values)


def test_risk_is_mean_plus_unbiased_std() -> None:
    costs = th.tensor([[[1.0]], [[2.0]], [[6.0]]])  # 3 members, one state, one constraint
    assert estimate_risk(costs, coef=2.0).item() == pytest.approx(3.0 + 2.0 * math.sqrt(7.0))
    assert estimate_risk(costs, coef=0.0).item() == pytest.approx(3.0)
    assert estimate_risk(costs[:1], coef=2.0).item() == 1.0


def test_gradient_of_risk_is_finite_where_the_members_agree() -> None:
    costs = th.ones(4, 2, 1, requires_grad=True)
    risk = estimate_risk(costs, coef=1.0)
    risk.sum().backward()
    assert costs.grad is not None and th.isfinite(costs.grad).all()
    th.testing.assert_close(risk.detach(), th.ones(2, 1), atol=1e-5, rtol=0.0)


def test_the_papers_multiplier_follows_the_violation() -> None:
    multiplier = LagrangeMultiplier(2, learning_rate=0.01)
    before = multiplier.value.clone()
    multiplier.update(th.tensor([0.5, -0.5]))
    assert multiplier.value[0] > before[0] and multiplier.value[1] < before[1]


def test_the_papers_multiplier_starts_at_its_value_and_steps_in_log_space() -> None:
    multiplier = LagrangeMultiplier(learning_rate=3e-4)
    assert multiplier.value.item() == pytest.approx(0.6931)
    assert multiplier.parameter.item() == pytest.approx(-0.3666, abs=1e-4)
    multiplier.update(th.tensor([2.0]))
    # Adam's first step has the size of its learning rate
    assert multiplier.value.item() == pytest.approx(0.6931 * math.exp(3e-4), rel=1e-6)


def test_the_papers_multiplier_stays_in_its_bounds() -> None:
    multiplier = LagrangeMultiplier(1, learning_rate=0.5, max_value=2.0)
    for _ in range(20):
        multiplier.update(th.tensor([1.0]))
    assert multiplier.value.item() == pytest.approx(2.0, rel=1e-6)
    for _ in range(100):
        multiplier.update(th.tensor([-1.0]))
    assert 0.0 < multiplier.value.item() < 0.5


LIMIT, NO_RHO = np.array([10.0]), np.zeros(1)


def episodes(*costs: float) -> np.ndarray:
    return np.array(costs).reshape(-1, 1)


@pytest.mark.parametrize(("cost", "step"), [(15.0, 0.05), (12.0, 0.02), (10.0, 0.0), (5.0, -0.05), (1e6, 0.1), (0.0, -0.1)])
def test_a_step_of_the_controller_is_the_relative_violation(cost: float, step: float) -> None:
    controller = EpisodeController(init_value=1.0, learning_rate=0.1)
    controller.update(episodes(cost), LIMIT, NO_RHO)
    assert controller.value.item() == pytest.approx(1.0 + step)


@pytest.mark.parametrize(("steps", "factor"), [(1, 1.0), (400, 1.0), (500, 1.25), (1000, 2.5), (100_000, 2.5)])
def test_a_long_episode_counts_as_more(steps: int, factor: float) -> None:
    controller = EpisodeController(init_value=1.0, learning_rate=0.1)
    controller.update(episodes(15.0), LIMIT, np.array([2.0]), steps)
    # The proportional part does not add up
    assert controller.integral.item() == pytest.approx(1.0 + 0.05 * factor)
    assert controller.value.item() == pytest.approx(2.0 + 0.05 * factor)


def test_the_controller_does_not_depend_on_the_unit_of_the_costs() -> None:
    values = []
    for unit in (1.0, 1e-3, 1e4):
        controller = EpisodeController()
        for cost in (5.0, 30.0, 12.0, 16.0, 11.0):
            controller.update(unit * episodes(cost, 9.0), unit * LIMIT, np.array([0.3]))
        values.append(controller.value.item())
    assert values[0] > 0.0 and values == pytest.approx([values[0]] * 3)


def test_the_proportional_part_acts_at_once_and_goes_with_the_violation() -> None:
    controller = EpisodeController(init_value=1.0, learning_rate=0.1)
    controller.update(episodes(15.0), LIMIT, np.array([2.0]))
    assert controller.value.item() == pytest.approx(1.05 + 2.0 * 0.5)
    controller.update(episodes(10.0), LIMIT, np.array([2.0]))
    assert controller.value.item() == pytest.approx(1.05)


def test_the_integral_stops_at_its_bounds() -> None:
    controller = EpisodeController(learning_rate=0.5, max_value=2.0)
    for _ in range(20):
        controller.update(episodes(1e3), LIMIT, NO_RHO)
    assert controller.value.item() == 2.0
    # Without a wound-up integral it comes down at the first episode without costs
    controller.update(episodes(0.0), LIMIT, NO_RHO)
    assert controller.value.item() == 1.5
    for _ in range(20):
        controller.update(episodes(0.0), LIMIT, NO_RHO)
    assert controller.value.item() == 0.0


def test_the_controller_steers_an_upper_bound_of_the_cost() -> None:
    # Mean 10 at a limit of 10: within it on average, but not for sure
    sure, unsure = (EpisodeController(init_value=1.0, learning_rate=0.1, confidence=each) for each in (0.0, 1.0))
    for controller in (sure, unsure):
        controller.update(episodes(2.0, 18.0), LIMIT, NO_RHO)
    assert sure.value.item() == pytest.approx(1.0)
    assert unsure.value.item() == pytest.approx(1.0 + 0.1 * 0.8)  # a standard error of 8


def test_constraints_have_controllers_apart_and_a_limit_of_zero_works() -> None:
    controller = EpisodeController(2, init_value=[1.0, 1.0], learning_rate=0.1)
    controller.update(np.array([[1.0, 0.0]]), np.array([0.0, 5.0]), np.zeros(2))
    assert controller.value.tolist() == pytest.approx([1.1, 0.9])
    controller.update(np.array([[0.0, 0.0]]), np.array([0.0, 5.0]), np.zeros(2))
    assert controller.value.tolist() == pytest.approx([1.1, 0.8])


def test_multipliers_of_a_file_become_the_controllers() -> None:
    paper = LagrangeMultiplier(2, init_value=[0.5, 1.5])
    controller = EpisodeController(2)
    controller.load_state_dict(paper.state_dict())
    assert controller.value.tolist() == pytest.approx([0.5, 1.5])
    again = EpisodeController(2)
    again.load_state_dict(controller.state_dict())
    assert again.integral.tolist() == pytest.approx([0.5, 1.5])
    with pytest.raises(ValueError, match=r"`max_value` must be at least 1\.5, the saved multiplier, got 1"):
        EpisodeController(2, max_value=1.0).load_state_dict(controller.state_dict())


@pytest.mark.parametrize("multiplier_class", [LagrangeMultiplier, EpisodeController])
@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(init_value=-1.0), "`init_value` must be finite and >= 0"),
        (dict(init_value=5.0, max_value=2.0), "`init_value` must be at most `max_value`, 2"),
    ],
)
def test_multipliers_refuse_nonsense(multiplier_class: Any, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multiplier_class(1, **kwargs)


def terms(rho: float, weight: float = 1.0) -> EnergyTerms:
    return EnergyTerms(*(th.tensor(each) for each in ([0.7], [1.2], [rho], [2.0, 4.0], weight)))


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_gradients_of_the_energy_in_units_of_its_own(rho: float) -> None:
    value, risk = th.randn(50, requires_grad=True), (4.0 * th.randn(50, 1)).requires_grad_()
    energy = terms(rho, 0.3).energy(value, risk)
    by_value, by_risk = th.autograd.grad(energy.sum(), [value, risk])
    value_gradient, risk_gradient = terms(rho, 0.3).gradients(risk.detach())
    th.testing.assert_close(value_gradient.expand(50), by_value)
    th.testing.assert_close(risk_gradient, by_risk)
    plain = augmented_lagrangian(value / 2.0, risk / 4.0, th.tensor([0.7]), th.tensor([0.3]), th.tensor([rho]))
    th.testing.assert_close(energy, 0.3 * plain)
