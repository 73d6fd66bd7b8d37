"""What any algorithm under a cost limit does beside its update: limit, unit, budget, costs of episodes, buffers, warnings."""

import pickle
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_algd import ALGD
from sb3_algd.common.constraint import budget_per_unit_cost
from sb3_algd.common.episode_costs import EpisodeCostTracker
from tests.conftest import PAPER


class PaidEnv(gym.Env):
    """
    Every step pays the same reward and the same cost; the observation is the number of the step.

    :param cost: Cost of a step, in ``info["cost"]``; twice as much is in ``info["double"]``.
    :param declared: Attributes of the environment, ``cost_limit`` for instance.
    """

    observation_space = spaces.Box(-1.0, 1.0, shape=(7,), dtype=np.float32)
    action_space = spaces.Box(-1.0, 1.0, shape=(1,), dtype=np.float32)

    def __init__(self, cost: float = 1.0, **declared: Any) -> None:
        self.cost = cost
        self.reward = 1.0
        vars(self).update(declared)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(7, dtype=np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        self.steps += 1
        obs = np.full(7, min(self.steps / 100, 1.0), dtype=np.float32)
        return obs, self.reward, False, False, {"cost": self.cost, "double": 2 * self.cost}


def make_env(cost: float = 1.0, steps: int = 10, **declared: Any) -> gym.Env:
    return gym.wrappers.TimeLimit(PaidEnv(cost, **declared), steps)


def make_model(env: Any = None, **kwargs: Any) -> ALGD:
    defaults: dict[str, Any] = dict(
        policy_kwargs=dict(net_arch=[8, 8]),
        learning_starts=10,
        batch_size=8,
        buffer_size=200,
        seed=0,
        device="cpu",
        cost_limit=20.0,
        cost_gamma=0.99,
    )
    return ALGD("MlpPolicy", make_env() if env is None else env, **{**defaults, **kwargs})


def logged(model: ALGD) -> dict[str, Any]:
    """:return: Everything that the model will record from now on, also after it was dumped."""
    values: dict[str, Any] = {}
    logger = configure(None, [])
    record = logger.record

    def keep(key: str, value: Any, *args: Any, **kwargs: Any) -> None:
        values[key] = value
        record(key, value, *args, **kwargs)

    logger.record = keep  # type: ignore[method-assign]
    model.set_logger(logger)
    return values


def double(info: dict[str, Any]) -> float:
    return info["double"]


def value_of(model: ALGD) -> float:
    return float(model.lagrange_multiplier.value)


# --- the costs of episodes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stats_window_size", [100, 3])
def test_the_multiplier_is_updated_from_the_episodes_of_every_environment(stats_window_size: int) -> None:
    # All episodes end in the same step, those without a cost last
    costs = [10.0] * 11 + [0.0] * 5
    env = DummyVecEnv([lambda cost=cost: make_env(cost) for cost in costs])  # type: ignore[misc]
    model = make_model(env, cost_limit=20.0, learning_starts=160, stats_window_size=stats_window_size)
    values = logged(model)
    before = value_of(model)
    model.learn(16 * 12)
    expected = np.mean(costs) * 10 * budget_per_unit_cost(10, 0.99)
    assert values["train/episode_cost"] == pytest.approx(expected)
    assert value_of(model) > before


def test_the_last_ten_episodes_count() -> None:
    tracker = EpisodeCostTracker(2, 1, cost_gamma=0.5, window=1)
    assert tracker.recent_costs(discounted=False).shape == (0, 1)
    for episode in range(1, 13):
        # Two steps each; the other environment's only episode ends with the last one
        tracker.update(np.array([[episode], [10.0]]), np.array([False, False]))
        tracker.update(np.array([[episode], [10.0]]), np.array([True, episode == 12]))
    plain = [8, 10, 12, 14, 16, 18, 20, 22, 24, 240]
    assert tracker.recent_costs(discounted=False).ravel().tolist() == plain
    discounted = [0.75 * cost for cost in plain[:-1]] + [10 * (2 - 0.5**23)]
    assert tracker.recent_costs(discounted=True).ravel() == pytest.approx(discounted)
    # What is logged is another matter
    assert len(tracker.episode_costs) == 1
    tracker.start_episodes(3)
    assert tracker.recent_costs(discounted=False).ravel().tolist() == plain


def test_one_episode_of_every_environment_counts_where_there_are_many() -> None:
    tracker = EpisodeCostTracker(16, 1, cost_gamma=0.5, window=1)
    tracker.update(np.arange(16.0)[:, None], np.ones(16, dtype=bool))
    assert tracker.recent_costs(discounted=False).ravel().tolist() == list(range(16))


def test_a_cost_function_is_called_once_a_step() -> None:
    calls: list[float] = []

    def cost_key(info: dict[str, Any]) -> float:
        calls.append(info["cost"])
        return info["cost"]

    model = make_model(DummyVecEnv([make_env, make_env]), cost_key=cost_key)
    model.learn(30)
    assert model.num_timesteps == len(calls) == 30
    assert [cost.item() for cost in model.ep_cost_buffer] == [10.0, 10.0]


def test_short_trainings_without_an_end_of_an_episode_add_up() -> None:
    model = make_model(PaidEnv(), episode_length=10)
    model.learn(12)
    with pytest.warns(UserWarning, match="No episode has ended in 2[0-9] steps"):
        model.learn(12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(24)


def test_no_warning_where_episodes_end_in_every_training() -> None:
    model = make_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            model.learn(12)


def test_an_observation_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(learning_starts=1000)
    checked: list[np.ndarray] = []
    isfinite = np.isfinite

    def watched(value: Any, *args: Any, **kwargs: Any) -> Any:
        if np.shape(value)[-1:] == (7,):
            checked.append(np.array(value))
        return isfinite(value, *args, **kwargs)

    monkeypatch.setattr(np, "isfinite", watched)
    model.learn(30)
    # 30 next observations; the first ones of 3 episodes, and of the one that would come next
    assert len(checked) == 30 + 4
    # None was left out
    assert sorted(round(float(obs[0, 0]), 2) for obs in checked) == sorted([*np.arange(1, 11) / 100] * 3 + [0.0] * 4)


# --- limit, unit and budget ------------------------------------------------------------------------------------------

DISCOUNTED: dict[str, Any] = dict(cost_limit=15.0, cost_limit_discounted=True)


def test_a_limit_is_in_the_unit_that_the_environment_declares() -> None:
    with pytest.warns(UserWarning, match="discounted sum, the unit in which the environment declares"):
        model = make_model(make_env(steps=1000, **DISCOUNTED), cost_limit=15)
    assert model.cost_limit_discounted is True
    assert model.cost_budget.tolist() == [15.0] and model._budget.tolist() == [15.0]


@pytest.mark.parametrize("discounted, budget", [(True, 15.0), (False, 15.0 * budget_per_unit_cost(1000, 0.99))])
def test_whoever_names_the_unit_gets_it_without_a_warning(discounted: bool, budget: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = make_model(make_env(steps=1000, **DISCOUNTED), cost_limit=15, cost_limit_discounted=discounted)
    assert model.cost_limit_discounted is discounted
    assert model.cost_budget == pytest.approx(budget)


def test_a_limit_is_a_plain_sum_where_the_environment_declares_no_unit() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = make_model(make_env(cost_limit=3.0), cost_limit=15)
    assert model.cost_limit_discounted is False
    assert model.cost_budget == pytest.approx(15 * budget_per_unit_cost(10, 0.99))


def test_own_costs_may_have_more_limits_than_the_environment_declares() -> None:
    with pytest.raises(ValueError, match=r"the environment has 1 constraint.* say with cost_key=<function of info> which"):
        make_model(make_env(cost_limit=3.0), cost_limit=[3.0, 5.0])
    both = make_model(make_env(cost_limit=3.0), cost_limit=[3.0, 5.0], cost_key=lambda info: [info["cost"], info["double"]])
    model = both.learn(20)
    assert model.n_constraints == 2
    assert np.mean(model.ep_cost_buffer, axis=0).tolist() == [10.0, 20.0]


def test_another_unit_of_a_new_environment_is_noticed() -> None:
    model = make_model(make_env(cost_limit=15.0, cost_limit_discounted=False), cost_limit=None)
    with pytest.warns(UserWarning, match=r"declares cost_limit_discounted = \[True\], but the model keeps its own, \[False\]"):
        model.set_env(make_env(**DISCOUNTED))
    assert model.cost_limit_discounted is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_env(make_env(**DISCOUNTED))


def test_budget_energy_and_log_follow_a_new_limit() -> None:
    # A limit acts on the plain Lagrangian also where it is kept
    model = make_model(rho=0.0, constraint_start=0.0, multiplier_kwargs=dict(init_value=1.0))
    model.learn(20)
    obs, actions = th.zeros(4, 7), th.tensor([0.5, -0.5]).reshape(2, 1, 1).expand(2, 4, 1)
    energy = model._energy(obs, actions)[0]
    values = logged(model)
    model.cost_limit = 40.0
    assert model.cost_budget == pytest.approx(40 * budget_per_unit_cost(10, 0.99))
    assert (model._energy(obs, actions)[0] < energy).all()
    model.learn(5, reset_num_timesteps=False)
    assert values["train/cost_budget"] == pytest.approx(model.cost_budget.item())
    model.dump_logs()
    assert values["rollout/cost_limit"] == 40.0
    model.cost_limit_discounted = True
    assert model.cost_budget.tolist() == model._budget.tolist() == [40.0]
    model.cost_limit_discounted = False
    model.episode_length = 100
    assert model._budget.item() == pytest.approx(40 * budget_per_unit_cost(100, 0.99))


def test_everything_follows_a_new_discount(tmp_path: Path) -> None:
    model = make_model(cost_limit_discounted=True, n_steps=2)
    model.learn(20)
    model.save(tmp_path / "model")
    loaded = ALGD.load(tmp_path / "model", make_env(), cost_gamma=0.5, cost_limit_gamma=0.25)
    model.cost_gamma, model.cost_limit_gamma = 0.5, 0.25
    for changed in (loaded, model):
        changed.learn(20, reset_num_timesteps=False)
        assert changed._cost_tracker is not None
        assert changed._cost_tracker.discounted_costs[-1] == pytest.approx((1 - 0.25**10) / 0.75)
        assert changed._return_scale is not None and changed._return_scale.discounts.tolist() == [0.99, 0.5]
        buffer: Any = changed.replay_buffer
        assert set(buffer.sample(50).cost_discounts.flatten().tolist()) <= {0.5, 0.25}


def test_costs_are_read_with_a_new_key() -> None:
    model = make_model()
    model.cost_key = "double"
    model.learn(20)
    assert [cost.item() for cost in model.ep_cost_buffer] == [20.0, 20.0]
    assert model.replay_buffer is not None
    assert model.replay_buffer.costs.max() == 2.0


def test_the_energy_follows_a_new_rho() -> None:
    model = make_model(**{**PAPER, "rho": 0.0}, multiplier_kwargs=dict(init_value=0.7))
    model.learn(1)  # the constraint acts
    obs, actions = th.zeros(4, 7), th.full((1, 4, 1), 0.5)
    energy, _, risk, _ = model._energy(obs, actions)
    model.rho = 2.0
    violation, multiplier = risk[..., 0] - model._budget, model.lagrange_multiplier.value
    expected = energy - multiplier * violation + ((multiplier + 2 * violation).clamp_min(0) ** 2 - multiplier**2) / 4
    np.testing.assert_allclose(model._energy(obs, actions)[0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "name, value",
    [
        ("cost_limit", -1.0),
        ("cost_limit", [1.0, 2.0]),
        ("episode_length", 0),
        ("episode_length", 2.5),
        ("cost_gamma", 1.5),
        ("cost_limit_gamma", 0.0),
        ("rho", -1.0),
        ("rho", [1.0, 2.0]),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_and_nothing_changes(name: str, value: Any) -> None:
    model = make_model()
    before, budget, rho = getattr(model, name), model.cost_budget, model._rho
    with pytest.raises(ValueError):
        setattr(model, name, value)
    assert np.array_equal(getattr(model, name), before)
    assert np.array_equal(model.cost_budget, budget) and th.equal(model._rho, rho)


def test_no_number_of_a_limit_can_be_changed_on_its_own() -> None:
    limits = np.array([20.0])
    model = make_model(cost_limit=limits)
    limits[0] = 1.0
    assert model.cost_limit.tolist() == [20.0]
    with pytest.raises(ValueError, match="read-only"):
        model.cost_limit[0] = 1.0


# --- replay buffers --------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_the_replay_buffer_does_not_need_the_cost_function(tmp_path: Path) -> None:
    model = make_model(cost_key=lambda info: info["double"])
    model.learn(25, callback=CheckpointCallback(10, str(tmp_path), "m", save_replay_buffer=True))
    assert model.num_timesteps == 25

    loaded = ALGD.load(tmp_path / "m_20_steps", make_env())
    loaded.load_replay_buffer(tmp_path / "m_replay_buffer_20_steps.pkl")
    assert loaded.replay_buffer is not None
    # SB3 calls callbacks before it stores a step
    assert loaded.replay_buffer.n_added == 19 and loaded.replay_buffer.costs.sum() == 2.0 * 19
    loaded.learn(10, reset_num_timesteps=False)
    assert loaded.replay_buffer.costs.sum() == 2.0 * 29


def test_a_buffer_on_its_own_says_that_its_cost_function_is_missing(tmp_path: Path) -> None:
    model = make_model(cost_key=double)
    model.learn(10)
    buffer = pickle.loads(pickle.dumps(model.replay_buffer))
    step = np.zeros((1, 7)), np.zeros((1, 7)), np.zeros((1, 1)), np.zeros(1), np.zeros(1), [{"double": 3.0}]
    with pytest.raises(ValueError, match="set its attribute cost_key"):
        buffer.add(*step)
    buffer.cost_key = double
    buffer.add(*step)
    assert buffer.newest_costs.tolist() == [[3.0]]


def test_a_loaded_replay_buffer_follows_the_model(tmp_path: Path) -> None:
    saved = make_model(cost_key="absent", n_steps=2, gamma=0.9, cost_gamma=0.9)
    with pytest.warns(UserWarning, match="reported no cost"):
        saved.learn(20)
    saved.save_replay_buffer(tmp_path / "buffer")

    model = make_model(cost_key="double", n_steps=3, gamma=0.5, cost_gamma=0.25)
    model.load_replay_buffer(tmp_path / "buffer")
    model.learn(20)
    buffer: Any = model.replay_buffer
    assert buffer.n_added == 40
    # What was stored stays; new rows agree with the log
    assert [cost.item() for cost in model.ep_cost_buffer] == [20.0, 20.0]
    assert buffer.costs[:20].sum() == 0.0 and buffer.costs[20:40].sum() == 40.0
    batch = buffer.sample(200)
    assert set(batch.discounts.flatten().tolist()) == {0.5, 0.25, 0.125}
    assert set(batch.cost_discounts.flatten().tolist()) == {0.25, 0.0625, 0.015625}
    assert batch.costs.max().item() == pytest.approx(2 * (1 + 0.25 + 0.0625))


def test_a_replay_buffer_of_another_kind_is_refused(tmp_path: Path) -> None:
    make_model().save_replay_buffer(tmp_path / "one_step")
    with (tmp_path / "none.pkl").open("wb") as file:
        pickle.dump({}, file)
    model = make_model(n_steps=3)
    present = model.replay_buffer
    with pytest.raises(ValueError, match="same n_steps"):
        model.load_replay_buffer(tmp_path / "one_step")
    with pytest.raises(AssertionError):
        model.load_replay_buffer(tmp_path / "none.pkl")
    assert model.replay_buffer is present


# --- divergence ------------------------------------------------------------------------------------------------------


def test_a_divergence_does_not_undo_parameters_that_were_set() -> None:
    env = make_env()
    # Units of its own would make of it a reward like any other
    model = make_model(env, normalize=False)
    model.learn(30)
    other = make_model(seed=1, normalize=False)
    other.learn(30)
    good = {name: value.clone() for name, value in other.policy.state_dict().items()}
    model.set_parameters(other.get_parameters())
    env.unwrapped.reward = 1e30  # type: ignore[attr-defined]
    with pytest.raises(FloatingPointError, match="set back to what it was after update 20"):
        model.learn(30, reset_num_timesteps=False)
    restored = model.policy.state_dict()
    assert all(th.equal(restored[name], value) for name, value in good.items())
    assert value_of(model) == value_of(other)
