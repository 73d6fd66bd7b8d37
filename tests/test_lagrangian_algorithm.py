"""When the constraint acts, what moves its multipliers, the energy in its units, and what is recorded of the cost critics."""

import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import obs_as_tensor

from sb3_algd import ALGD
from sb3_algd.common import lagrangian_algorithm
from sb3_algd.common.constraint import budget_per_unit_cost
from sb3_algd.common.lagrange import EpisodeController
from sb3_algd.common.units import ReturnScale
from tests.conftest import SMALL, Algorithm, AnySpaceEnv, CostlyBitFlipping, make_env, make_model, make_model_of, same, weights


class Watch(BaseCallback):
    """Notes at each step whether the constraint acts; stops at a step if it is told to."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.stop_at = stop_at
        self.acts: list[bool] = []

    def _on_step(self) -> bool:
        self.acts.append(self.model._constraint_acts)  # type: ignore[attr-defined]
        return self.num_timesteps != self.stop_at


# --- when the constraint acts ----------------------------------------------------------------------------------------


def test_nothing_of_the_constraint_acts_before_its_start(algorithm: Algorithm) -> None:
    learned = []
    for limit in (0.01, 50.0):
        model = make_model_of(algorithm, cost_limit=limit, constraint_start=0.9, penalty="pointwise", rho=1.0)
        model.learn(60, callback=Watch(stop_at=50))
        assert model._n_updates == 29
        learned.append(weights(model))
        assert model.lagrange_multiplier.value.item() == 0.0
    assert same(*learned)


def test_the_constraint_starts_at_its_share_of_the_training_and_does_not_stop(tmp_path: Path) -> None:
    model, watch = make_model(constraint_start=0.5), Watch()
    model.learn(40, callback=watch)
    # A callback sees a step before it is stored
    assert watch.acts == [False] * 20 + [True] * 20
    assert model.units.acts.item() == 1.0
    again = Watch()
    model.learn(40, callback=again)
    assert all(again.acts)
    model.save(tmp_path / "model")
    loaded = ALGD.load(tmp_path / "model", make_env())
    assert loaded._constraint_acts and loaded.units.acts.item() == 1.0


def test_a_start_that_was_not_reached_counts_in_the_next_training(tmp_path: Path) -> None:
    model = make_model(constraint_start=0.5)
    model.learn(40, callback=Watch(stop_at=10))
    assert not model._constraint_acts
    model.save(tmp_path / "model")
    loaded, watch = ALGD.load(tmp_path / "model", make_env()), Watch()
    assert loaded.units.acts.item() == 0.0
    # 10 steps and 30 more: the half of them is step 20
    loaded.learn(30, callback=watch, reset_num_timesteps=False)
    assert watch.acts == [False] * 10 + [True] * 20


def test_where_it_starts_at_once_it_acts_in_the_first_update() -> None:
    model, watch = make_model(constraint_start=0.0), Watch()
    model.learn(10, callback=watch)
    assert watch.acts == [False] + [True] * 9


# --- what moves the multiplier ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient_steps", [1, 4])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_the_controller_steps_once_per_finished_episode(
    n_envs: int, gradient_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[np.ndarray, list[float]]] = []
    update = EpisodeController.update

    def noted(self: EpisodeController, costs: np.ndarray, limit: np.ndarray, rho: np.ndarray, steps: int) -> None:
        seen.append((costs, rho.tolist()))
        # Those of the episode that has ended
        assert steps == 20
        update(self, costs, limit, rho, steps)

    monkeypatch.setattr(EpisodeController, "update", noted)
    env = make_vec_env(make_env, n_envs=n_envs)
    model = make_model(env, constraint_start=0.0, gradient_steps=gradient_steps, rho=0.3, cost_limit=1.0)
    model.learn(60 * n_envs)
    assert len(seen) == 3 * n_envs
    assert all(rho == [0.3] for _, rho in seen)
    # The newest episodes are among those that count
    assert [len(costs) for costs, _ in seen] == [n_envs * (index // n_envs + 1) for index in range(3 * n_envs)]
    np.testing.assert_array_equal(seen[-1][0], np.array(model.ep_cost_buffer))
    assert model.lagrange_multiplier.value.item() > 0.0


def test_several_constraints_have_multipliers_of_their_own() -> None:
    kwargs: dict[str, Any] = dict(rho=[0.0, 0.5], multiplier_kwargs=dict(init_value=[0.5, 0.5], learning_rate=0.1))
    model = make_model(make_env(2), cost_limit=[1e-3, 1e3], constraint_start=0.0, **kwargs)
    model.learn(40)
    # Two episodes, of which each violates the first limit by as much as counts, and the second one not at all
    assert model.lagrange_multiplier.value[0].item() == pytest.approx(0.7)
    assert model.lagrange_multiplier.value[1].item() == 0.0
    assert model._rho.tolist() == [0.0, 0.0]


def test_a_limit_of_zero_can_be_trained_with(algorithm: Algorithm) -> None:
    model = make_model_of(algorithm, cost_limit=0.0, constraint_start=0.0, rho=0.1)
    model.learn(60)
    assert all(value.isfinite().all() for value in weights(model).values())
    assert model.cost_budget.tolist() == [0.0] and model.lagrange_multiplier.value.item() > 0.1


# --- the budget ------------------------------------------------------------------------------------------------------


def test_a_discounted_limit_has_a_discount_of_its_own() -> None:
    discounted = make_model(cost_limit=3.0, cost_limit_discounted=True, cost_limit_gamma=0.9, cost_gamma=0.5)
    # In both units the cost is spread evenly over the 20 steps
    per_step = 3.0 / sum(0.9**step for step in range(20))
    assert discounted.cost_budget == pytest.approx(per_step * sum(0.5**step for step in range(20)))
    discounted.learn(20)
    step_costs = discounted.replay_buffer.costs[:20, 0, 0]  # type: ignore[union-attr]
    in_the_limits_unit = sum(0.9**step * cost for step, cost in enumerate(step_costs))
    assert discounted._cost_tracker is not None
    assert discounted._cost_tracker.recent_costs(discounted=True).ravel() == pytest.approx([in_the_limits_unit])
    recent = discounted._recent_cost()
    assert recent is not None
    assert recent / in_the_limits_unit == pytest.approx(discounted.cost_budget / 3.0)


def test_a_plain_limit_does_not_know_the_discount_of_another_unit() -> None:
    for cost_limit_gamma in (0.3, 0.99):
        model = make_model(cost_limit=3.0, cost_limit_gamma=cost_limit_gamma, cost_gamma=0.5)
        assert model.cost_budget == pytest.approx(3.0 * budget_per_unit_cost(20, 0.5))


# --- the energy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", ["expectation", "pointwise"])
@pytest.mark.parametrize("n_costs", [1, 2])
def test_the_energy_is_the_plain_one_in_its_units(n_costs: int, penalty: str, algorithm: Algorithm) -> None:
    values = np.array([0.7, 0.4][:n_costs])
    limit = [0.5, 9.0][:n_costs]
    kwargs: dict[str, Any] = dict(penalty=penalty, rho=0.3, multiplier_kwargs=dict(init_value=values), constraint_start=0.0)
    model = make_model_of(algorithm, make_env(n_costs), cost_limit=limit, **kwargs)
    model.learn(30)
    multipliers = model.lagrange_multiplier.value.numpy()
    obs, actions = th.randn(6, 3), th.rand(4, 6, 2) * 2 - 1
    energy, gradient, risk, moments = model._energy(obs, actions)

    inputs = actions.clone().requires_grad_()
    reward_slope, *cost_slopes = (moments[1:] / moments[0]).sqrt().tolist()
    rows = [inputs[index] for index in range(4)]
    value = th.stack([model.critic(obs, row).amin(dim=0).squeeze(1) for row in rows])
    costs = th.stack([model.cost_critic(obs, row) for row in rows])
    plain_risk = costs.mean(dim=1) + model.cost_risk_coef * costs.std(dim=1)
    plain = -value / reward_slope
    for index in range(n_costs):
        budget = model.cost_budget[index] / model.units.returns[1 + index].item()
        violation = (plain_risk[..., index] - budget) / cost_slopes[index]
        multiplier = float(multipliers[index])
        if penalty == "expectation":
            plain = plain + multiplier * violation
        else:
            plain = plain + ((multiplier + 0.3 * violation).clamp_min(0).square() - multiplier**2) / 0.6
    plain = plain / (1 + multipliers.sum())
    np.testing.assert_allclose(energy, plain.detach(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(gradient, th.autograd.grad(plain.sum(), inputs)[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(risk, plain_risk.detach() * model.units.returns[1:], rtol=1e-4, atol=1e-5)


# --- expected and paid costs -----------------------------------------------------------------------------------------


class CostOf(gym.Wrapper):
    """Every other step costs 1."""

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.steps = getattr(self, "steps", 0) + 1
        return obs, float(reward), terminated, truncated, {**info, "cost": float(self.steps % 2)}


def images() -> gym.Env:
    return CostOf(FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=False))


def goals() -> gym.Env:
    return gym.wrappers.TimeLimit(CostlyBitFlipping(n_bits=3, continuous=True, max_steps=5), 5)


def dictionaries() -> gym.Env:
    return gym.wrappers.TimeLimit(CostOf(SimpleMultiObsEnv(discrete_actions=False, random_start=False)), 12)


FLAT = spaces.Box(-1.0, 1.0, (3,))
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "flat": (lambda: gym.wrappers.TimeLimit(AnySpaceEnv(FLAT), 12), {}),
    "wrapped around": (lambda: gym.wrappers.TimeLimit(AnySpaceEnv(FLAT), 12), dict(buffer_size=25)),
    "n-step": (lambda: gym.wrappers.TimeLimit(AnySpaceEnv(FLAT), 12), dict(n_steps=3)),
    "dictionary": (dictionaries, dict(policy="MultiInputPolicy")),
    "image": (images, dict(policy="CnnPolicy")),
    "goals": (goals, dict(policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer)),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_recorded_bias_is_what_is_expected_less_what_was_paid(kind: str) -> None:
    env, kwargs = KINDS[kind]
    extractor = {"image": dict(features_dim=8), "dictionary": dict(cnn_output_dim=8)}.get(kind, {})
    policy_kwargs = dict(**SMALL, features_extractor_kwargs=extractor, n_cost_critics=2)
    given: dict[str, Any] = dict(buffer_size=60, episode_length=12, cost_gamma=0.5, policy_kwargs=policy_kwargs)
    model = make_model(env(), **{**given, **kwargs})
    model.learn(30)
    logger = configure(None, [])
    model.set_logger(logger)
    model._record_calibration()

    buffer: Any = model.replay_buffer
    # 12 steps of the horizon, and the 4 after them in which all that matters with a discount of 0.5 was paid
    rows = [(buffer.pos - 16 + index) % buffer.buffer_size for index in range(16)]
    expected, paid = [], []
    for index in range(12):
        discount, total = 1.0, 0.0
        for row in rows[index:]:
            total += discount * buffer.costs[row, 0, 0]
            discount *= 0.5
            if buffer.dones[row, 0]:
                break
        paid.append(total)
        row, stored = rows[index], buffer.observations
        obs: Any = {key: value[row] for key, value in stored.items()} if isinstance(stored, dict) else stored[row]
        with th.no_grad():
            costs = model.cost_critic(obs_as_tensor(obs, model.device), th.as_tensor(buffer.actions[row]))
        expected.append(costs.mean().item() * model.units.returns[1].item())
    bias = np.mean(expected) - np.mean(paid)
    assert np.mean(paid) > 0.0
    assert logger.name_to_value["train/cost_bias"] == pytest.approx(bias, rel=1e-3, abs=1e-5)


def test_no_bias_is_recorded_before_there_are_enough_steps() -> None:
    model = make_model(cost_gamma=0.5)
    model.learn(23)
    model._record_calibration()
    assert "train/cost_bias" not in model.logger.name_to_value


def test_critics_that_are_fooled_while_the_multiplier_rises_are_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(constraint_start=0.0)
    model.learn(30)
    pair = [np.array([0.1]), np.array([50.0])]
    monkeypatch.setattr(lagrangian_algorithm, "expected_and_paid", lambda *args: tuple(pair))

    def record(multiplier: float) -> int:
        model.lagrange_multiplier.value.fill_(multiplier)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model._record_calibration()
        return sum("The cost critics expect" in str(warning.message) for warning in caught)

    pair[0] /= model.units.returns[1].item()
    assert [record(each) for each in (0.1, 0.2, 0.3)] == [0, 0, 0]
    # It stands still, and all begins anew
    assert [record(each) for each in (0.3, 0.4, 0.5)] == [0, 0, 0]
    assert [record(each) for each in (0.6, 0.7, 0.8)] == [1, 0, 0]
    # What is paid is as expected
    pair[1][:] = 0.15
    assert [record(each) for each in (0.9, 1.0, 1.1, 1.2)] == [0, 0, 0, 0]


def test_parameters_alone_bring_the_constraint_and_the_unit_of_the_critics(algorithm: Algorithm, tmp_path: Path) -> None:
    model = make_model_of(algorithm, multiplier_kwargs=dict(init_value=0.5)).learn(60)
    model.save(tmp_path / "model")
    other = make_model_of(algorithm, seed=1)
    other.set_parameters(str(tmp_path / "model"))
    assert other._constraint_acts and other.units.acts.item() == 1.0
    assert other.lagrange_multiplier.value.item() == model.lagrange_multiplier.value.item() > 0.0
    # Another scale is measured, and what the critics say stays the same
    observations, actions = th.zeros(4, 3), th.zeros(4, 2)
    said = other.critic(observations, actions) * other.units.returns[0]
    other._return_scale = ReturnScale(1, np.array([0.99, 0.95]))
    other._return_scale.update(np.array([1e3]), np.array([[1e2]]), np.array([0]))
    other._set_return_units()
    assert other.units.returns.tolist() == pytest.approx([1e3, 1e2])
    th.testing.assert_close(other.critic(observations, actions) * other.units.returns[0], said)


def test_a_training_that_ends_before_the_constraint_acts_says_so(algorithm: Algorithm) -> None:
    model = make_model_of(algorithm, constraint_start=0.9)
    with pytest.warns(UserWarning, match="before the constraint began to act"):
        model.learn(100, callback=lambda locals_, globals_: model.num_timesteps < 30)


def test_a_limit_may_be_as_large_as_a_number_can_be(algorithm: Algorithm) -> None:
    assert make_model_of(algorithm, cost_limit=1e30, constraint_start=0.0).learn(40).lagrange_multiplier.value.item() == 0.0
