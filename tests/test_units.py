"""Units that are measured in training, and that rewards and costs of any scale are learned alike in them."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th

from sb3_algd import ALGD, SACLag
from sb3_algd.common.units import EnergyUnits, ReturnScale
from tests.conftest import SMALL, Algorithm, CostlyEnv, make_model_of


class ScaledEnv(CostlyEnv):
    """Reward and cost are functions of the action, in a unit of their own."""

    def __init__(self, reward: float, cost: float) -> None:
        super().__init__()
        self.reward, self.cost = reward, cost

    def step(self, action: np.ndarray) -> Any:
        obs, *_ = super().step(action)
        reward, cost = float(action.sum() + obs[0]), float(np.square(action).sum())
        return obs, self.reward * reward, False, False, {"cost": self.cost * cost}


@pytest.mark.parametrize("n_envs", [1, 3])
def test_the_scale_of_returns_is_that_of_a_plain_loop(n_envs: int) -> None:
    generator = np.random.default_rng(0)
    discounts = [0.9, 0.5, 1.0]
    rewards, costs = generator.normal(size=(50, n_envs)), generator.uniform(size=(50, n_envs, 2))
    dones = generator.uniform(size=(50, n_envs)) < 0.2
    scale = ReturnScale(n_envs, np.array(discounts))
    for step in range(50):
        scale.update(rewards[step], costs[step], dones[step])

    sums: list[list[float]] = [[], [], []]
    for env in range(n_envs):
        running = [0.0, 0.0, 0.0]
        for step in range(50):
            for index, value in enumerate([rewards[step, env], *costs[step, env]]):
                running[index] = discounts[index] * running[index] + value
                sums[index].append(running[index] ** 2)
            if dones[step, env]:
                running = [0.0, 0.0, 0.0]
    assert scale.value == pytest.approx([np.sqrt(np.mean(each)) for each in sums])


def test_what_is_always_zero_has_the_scale_1_and_a_reset_ends_episodes() -> None:
    scale = ReturnScale(1, np.array([0.5, 1.0]))
    assert scale.value.tolist() == [1.0, 1.0]
    scale.update(np.array([3.0]), np.array([[0.0]]), np.array([False]))
    assert scale.value.tolist() == [3.0, 1.0]
    scale.start_episodes(2)
    scale.update(np.array([3.0, 3.0]), np.zeros((2, 1)), np.array([False, False]))
    assert scale.value.tolist() == [3.0, 1.0]


def test_slopes_follow_from_plain_variances() -> None:
    generator = th.Generator().manual_seed(0)
    units = EnergyUnits(2)
    means = np.zeros(4)
    for update in range(1, 4):
        actions = th.randn(5, 8, 3, generator=generator)
        values, risk = th.randn(5, 8, generator=generator), update * th.randn(5, 8, 2, generator=generator)
        columns = [actions.numpy(), values.numpy(), risk[..., 0].numpy(), risk[..., 1].numpy()]
        means += [column.var(axis=0, ddof=1).mean() for column in columns]
        moments = units.measure(actions, values, risk)
        # At first a plain mean of all measurements
        np.testing.assert_allclose(moments, means / update, rtol=1e-5)
        units.keep(moments)
    np.testing.assert_allclose(units.slopes(units.moments), np.sqrt(means[1:] / means[0]), rtol=1e-5)
    # Later a running one
    units.n_measured.fill_(10_000)
    units.keep(units.moments)
    assert units.moment_weight.item() == pytest.approx(0.005)


def test_the_slope_of_a_linear_function_is_its_slope() -> None:
    units, actions = EnergyUnits(1), th.randn(6, 1000, 1)
    moments = units.measure(actions, 3.0 * actions[..., 0], -0.2 * actions)
    np.testing.assert_allclose(units.slopes(moments), [3.0, 0.2], rtol=1e-4)


@pytest.mark.parametrize(
    ("algorithm", "special", "penalty"),
    [
        (ALGD, dict(diffusion="ve"), "expectation"),
        (ALGD, dict(diffusion="ddpm"), "pointwise"),
        (SACLag, {}, "expectation"),
    ],
)
def test_rewards_and_costs_of_any_scale_are_learned_alike(algorithm: Algorithm, special: dict[str, Any], penalty: str) -> None:
    def trained(reward: float, cost: float) -> tuple[dict[str, np.ndarray], float]:
        model = make_model_of(
            algorithm,
            gym.wrappers.TimeLimit(ScaledEnv(reward, cost), 10),
            policy_kwargs={**SMALL, **special},
            cost_limit=20.0 * cost,
            penalty=penalty,
            constraint_start=0.3,
            multiplier_kwargs=dict(init_value=0.5),
        )
        model.learn(80)
        assert model._n_updates == 60
        state = {name: value.numpy().copy() for name, value in model.policy.state_dict().items()}
        return state, float(model.lagrange_multiplier.value)

    start = make_model_of(algorithm, policy_kwargs={**SMALL, **special}).policy.state_dict()
    expected, multiplier = trained(1.0, 1.0)
    moved = max(np.abs(expected[name] - start[name].numpy()).max() for name in expected if name.startswith("actor."))
    assert moved > 0.01 and multiplier != 0.5
    for scales in ((100.0, 1.0), (0.01, 1.0), (1.0, 1000.0)):
        state, again = trained(*scales)
        assert again == pytest.approx(multiplier, rel=1e-4), scales
        for name, value in expected.items():
            np.testing.assert_allclose(state[name], value, atol=0.02 * moved, err_msg=f"{scales} {name}")


def test_another_scale_changes_no_value(algorithm: Algorithm) -> None:
    model = make_model_of(algorithm, gym.wrappers.TimeLimit(ScaledEnv(1.0, 1.0), 10)).learn(40)
    obs, actions = th.randn(9, 3), th.rand(9, 2)

    def values() -> list[th.Tensor]:
        with th.no_grad():
            units, policy = model.units.returns, model.policy
            rewards = [critic(obs, actions) * units[0] for critic in (policy.critic, policy.critic_target)]
            costs = [critic(obs, actions) * units[1:] for critic in (policy.cost_critic, policy.cost_critic_target)]
        return [*rewards, *costs]

    before, scale = values(), model.units.returns.clone()
    assert model._return_scale is not None
    model._return_scale._squares *= np.array([9.0, 0.25])
    model._set_return_units()
    th.testing.assert_close(model.units.returns / scale, th.tensor([3.0, 0.5]), rtol=0.1, atol=0.0)
    for value, expected in zip(values(), before, strict=True):
        th.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
