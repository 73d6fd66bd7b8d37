"""The wrappers for costs, and the errors of the environments for bad input."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.vec_env import DummyVecEnv

import sb3_algd  # noqa: F401
from sb3_algd.envs import CostFromCallable, SixTupleEnv
from sb3_algd.envs.safety.adapter import load


class Drifter:
    """An environment with six values. The action moves x. The costs are (x < 0, |x|), or only |x| without ``vector``."""

    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    observation_space = gym.spaces.Box(-10, 10, (1,), np.float32)

    def __init__(self, vector: bool = False) -> None:
        self.vector = vector
        self.closed = False
        self.seen: tuple[Any, Any] | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        self.seen = seed, options
        self.x = np.zeros(1, np.float32)
        return self.x, {"fresh": True}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, Any, Any, Any, dict[str, Any]]:
        self.x = np.clip(self.x + action, -10, 10).astype(np.float32)
        left, far = self.x[0] < 0, abs(self.x[0])
        cost: Any = [left, far] if self.vector else far
        return self.x, np.float32(1.5), cost, np.bool_(far > 3), False, {"x": float(self.x[0])}

    def render(self) -> str:
        return "drawn"

    def close(self) -> None:
        self.closed = True


def test_six_values_become_five() -> None:
    inside = Drifter()
    env = SixTupleEnv(inside, cost_limit=3.0, cost_limit_discounted=True)
    obs, info = env.reset(seed=4, options={"a": 1})
    assert inside.seen == (4, {"a": 1})
    assert (obs, info) == (np.zeros(1), {"fresh": True})
    obs, reward, terminated, truncated, info = env.step(np.array([-0.5], np.float32))
    assert (obs, reward, terminated, truncated, info) == (-0.5, 1.5, False, False, {"x": -0.5, "cost": 0.5})
    assert [type(value) for value in (reward, terminated, truncated, info["cost"])] == [float, bool, bool, float]
    assert (env.cost_limit, env.cost_limit_discounted, env.render()) == (3.0, True, "drawn")
    env.close()
    assert inside.closed
    check_env(SixTupleEnv(Drifter()), warn=False)


def test_several_costs_stay_a_vector() -> None:
    env = SixTupleEnv(Drifter(vector=True), cost_limit=[1.0, 2.0])
    env.reset()
    info = env.step(np.array([-0.25], np.float32))[-1]
    np.testing.assert_array_equal(info["cost"], [1.0, 0.25])
    assert info["cost"].dtype == np.float64
    assert DummyVecEnv([lambda: env]).get_attr("cost_limit") == [[1.0, 2.0]]


def test_no_limit_is_declared_where_none_is_given() -> None:
    assert not hasattr(SixTupleEnv(Drifter()), "cost_limit")
    assert not hasattr(CostFromCallable(gym.make("Pendulum-v1"), lambda *_: 0.0), "cost_limit")


def test_five_values_are_refused() -> None:
    env = SixTupleEnv(gym.make("Pendulum-v1"))  # type: ignore[arg-type]
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"returned 5 values.*not to be wrapped"):
        env.step(np.zeros(1, np.float32))


def test_the_package_s_own_environment_can_be_wrapped() -> None:
    """An environment that a user gets from Safety-Gymnasium itself, here its Builder, works without our ids."""
    load()
    from safety_gymnasium.builder import Builder

    env = SixTupleEnv(Builder("SafetyPointGoal1-v0", config={"agent_name": "Point"}), cost_limit=25)
    ours = gym.make("SafetyPointGoal1-v0")
    np.testing.assert_array_equal(env.reset(seed=3)[0], ours.reset(seed=3)[0])
    action = np.array([1.0, 0.5])
    np.testing.assert_array_equal(env.step(action)[0], ours.step(action)[0])
    assert env.step(action)[-1]["cost"] == 0.0


def test_a_cost_is_computed_from_the_whole_transition() -> None:
    seen: list[tuple[Any, ...]] = []

    def cost(obs: Any, action: Any, next_obs: Any, info: dict[str, Any]) -> np.float32:
        seen.append((obs, action, next_obs, dict(info)))
        return np.float32(abs(next_obs[2] - obs[2]))

    env = CostFromCallable(gym.make("Pendulum-v1"), cost, cost_limit=5)
    first, _ = env.reset(seed=0)
    action = np.array([1.0], np.float32)
    second, *_, info = env.step(action)
    third, *_ = env.step(action)
    for (obs, act, next_obs, told), (before, after) in zip(seen, [(first, second), (second, third)], strict=True):
        np.testing.assert_array_equal(np.r_[obs, act, next_obs], np.r_[before, action, after])
        assert told == {}
    assert info["cost"] == pytest.approx(abs(second[2] - first[2]))
    assert type(info["cost"]) is float
    assert DummyVecEnv([lambda: env]).get_attr("cost_limit") == [5]
    check_env(CostFromCallable(gym.make("Pendulum-v1"), cost), warn=False)


@pytest.mark.parametrize("bad", [np.nan, np.inf, np.zeros((2, 2)), [0.0, np.nan]])
def test_a_cost_that_is_none_is_refused(bad: Any) -> None:
    env = CostFromCallable(gym.make("Pendulum-v1"), lambda *_: bad)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="finite number or a flat array"):
        env.step(np.zeros(1, np.float32))


def test_an_environment_with_a_computed_cost_can_be_made_again_from_its_spec() -> None:
    env = CostFromCallable(gym.make("Pendulum-v1"), lambda *_: 2.0, cost_limit=9.0)
    assert env.spec is not None
    again = gym.make(env.spec)
    again.reset(seed=0)
    assert again.step(np.zeros(1, np.float32))[-1]["cost"] == 2.0
    assert again.get_wrapper_attr("cost_limit") == 9.0


BAD_INPUT_IDS = ["SafetyPointGoal1-v0", "SafetyHopperVelocity-v1", "Safexp-CarButton2-v0", "AntSpeed-v0"]


@pytest.mark.parametrize("env_id", BAD_INPUT_IDS)
def test_bad_input(env_id: str) -> None:
    env: Any = gym.make(env_id)
    action = env.action_space.sample()
    for bare in (env, env.unwrapped):
        with pytest.raises(ResetNeeded, match="reset"):
            bare.step(action)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=rf"shape \(1,\).*shape \({len(action)},\)"):
        env.unwrapped.step(action[:1])
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or infinity"):
            env.unwrapped.step(np.full_like(action, value))
    # The refused actions have not changed the state.
    twin: Any = gym.make(env_id)
    twin.reset(seed=0)
    np.testing.assert_array_equal(env.step(action)[0], twin.step(action)[0])


def test_stepping_before_reset_is_refused_by_the_wrappers() -> None:
    with pytest.raises(ResetNeeded, match="call reset"):
        SixTupleEnv(Drifter()).step(np.zeros(1, np.float32))
    with pytest.raises(ResetNeeded, match="call reset"):
        CostFromCallable(gym.make("Pendulum-v1"), lambda *_: 0.0).step(np.zeros(1, np.float32))


def test_an_action_may_be_a_list_or_of_another_type() -> None:
    envs: list[Any] = [gym.make("SafetyPointGoal1-v0") for _ in range(3)]
    for env in envs:
        env.reset(seed=0)
    results = [
        env.unwrapped.step(action)[0]
        for env, action in zip(envs, ([1, 0], np.array([1, 0], np.float32), np.array([1, 0])), strict=True)
    ]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
