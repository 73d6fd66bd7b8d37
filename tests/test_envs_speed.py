"""The paper's MuJoCo tasks: their sizes, rewards, costs and limits."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import sb3_algd  # noqa: F401

LIMITS = {"Ant": 103.115, "HalfCheetah": 151.989, "Hopper": 82.748, "Humanoid": 20.140}
SIZES = {"Ant": (27, 8), "HalfCheetah": (17, 6), "Hopper": (11, 3), "Humanoid": (45, 17)}


@pytest.mark.parametrize("walker", LIMITS)
def test_sizes_and_limits(walker: str) -> None:
    env: Any = gym.make(f"{walker}Speed-v0")
    obs, _ = env.reset(seed=0)
    assert (len(obs), *env.action_space.shape) == SIZES[walker]
    assert env.observation_space.shape == obs.shape
    assert (env.unwrapped.cost_limit, env.unwrapped.cost_limit_discounted) == (LIMITS[walker], True)
    assert env.spec.max_episode_steps == 1000


@pytest.mark.parametrize("walker", LIMITS)
def test_the_cost_is_the_speed_and_the_rest_is_gymnasium_s(walker: str) -> None:
    env: Any = gym.make(f"{walker}Speed-v0")
    weightless: dict[str, Any] = {"contact_cost_weight": 0.0} if walker in ("Ant", "Humanoid") else {}
    original: Any = gym.make(f"{walker}-v5", **weightless)
    obs, _ = env.reset(seed=5)
    full_obs, _ = original.reset(seed=5)
    env.action_space.seed(0)
    position = env.unwrapped.data.qpos[0]
    for _ in range(15):
        np.testing.assert_array_equal(obs, full_obs[: len(obs)])
        action = env.action_space.sample()
        obs, reward, terminated, _, info = env.step(action)
        full_obs, full_reward, full_terminated, _, _ = original.step(action)
        assert (reward, terminated) == (full_reward, full_terminated)
        velocity = [info["x_velocity"], info.get("y_velocity", 0.0)]
        assert info["cost"] == pytest.approx(np.linalg.norm(velocity), abs=1e-12)
        if walker in ("HalfCheetah", "Hopper"):
            moved = (env.unwrapped.data.qpos[0] - position) / env.unwrapped.dt
            assert info["cost"] == pytest.approx(abs(moved), abs=1e-9)
        position = env.unwrapped.data.qpos[0]
        if terminated:
            break


def test_backwards_costs_as_much_as_forwards() -> None:
    env: Any = gym.make("HalfCheetahSpeed-v0")
    env.reset(seed=0)
    costs = []
    for speed in (3.0, -3.0):
        env.unwrapped.set_state(env.unwrapped.init_qpos, np.r_[speed, np.zeros(8)])
        costs.append(env.step(np.zeros(6, dtype=np.float32))[-1]["cost"])
    assert costs == pytest.approx([3.0, 3.0], rel=0.2)
    assert min(costs) > 0


def test_options_reach_the_environment() -> None:
    env: Any = gym.make("AntSpeed-v0", cost_limit=7.0, reset_noise_scale=0.0)
    first, _ = env.reset(seed=0)
    second, _ = env.reset(seed=1)
    np.testing.assert_array_equal(first, second)
    assert env.unwrapped.cost_limit == 7.0
