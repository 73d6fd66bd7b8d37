"""The faster steps and resets give bit-identical results to the package's own."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import sb3_algd  # noqa: F401
from sb3_algd.envs.safety.adapter import load

load()
from safety_gymnasium.builder import Builder  # noqa: E402

# Every agent, every kind of task, and every kind of object with a lookup of its own.
TASKS = [
    "SafetyPointButton1-v0",
    "SafetyCarButton2-v0",
    "SafetyPointGoal2-v0",
    "SafetyDoggoGoal1-v0",
    "SafetyPointPush2-v0",
    "SafetyAntPush1-v0",
    "SafetyRacecarCircle2-v0",
    "SafetyCarRun0-v0",
]


def towards(obs_dict: dict[str, np.ndarray], space: gym.spaces.Box, rng: np.random.Generator) -> np.ndarray:
    """An action that drives a Point or Car towards its target, so that it touches objects. Random for other agents."""
    noise = rng.uniform(space.low, space.high)
    lidar = obs_dict.get("goal_lidar")
    if lidar is None or space.shape != (2,):
        return noise
    angle = (int(lidar.argmax()) + 0.5) / len(lidar) * 2 * np.pi
    turn = np.sin(angle)
    action = np.array([0.8, turn]) if "ballquat_rear" not in obs_dict else np.array([0.7 - turn, 0.7 + turn])
    return np.clip(0.9 * action + 0.1 * noise, space.low, space.high)


def plain_builder(env_id: str) -> Any:
    """The package's own environment, with its own task class and asset loading."""
    agent = next(agent for agent in ("Point", "Car", "Doggo", "Racecar", "Ant") if env_id.startswith(f"Safety{agent}"))
    return Builder(env_id, config={"agent_name": agent})


def split(env: Any, obs: np.ndarray) -> dict[str, np.ndarray]:
    return gym.spaces.unflatten(env.obs_space_dict, obs)


@pytest.mark.parametrize("env_id", TASKS)
def test_same_bits_as_the_plain_package(env_id: str) -> None:
    plain, quick = plain_builder(env_id), gym.make(env_id).unwrapped
    rng = np.random.default_rng(0)
    steps = 60 if env_id.startswith(("SafetyAnt", "SafetyRacecar")) else 100
    for seed in (1, 2):
        obs, _ = plain.reset(seed=seed)
        quick_obs, _ = quick.reset(seed=seed)
        np.testing.assert_array_equal(quick_obs, obs)
        for _ in range(steps):
            action = towards(split(plain, obs), plain.action_space, rng)
            obs, reward, cost, terminated, truncated, info = plain.step(action)
            quick_obs, quick_reward, quick_terminated, quick_truncated, quick_info = quick.step(action)
            np.testing.assert_array_equal(quick_obs, obs)
            assert quick_obs.dtype == obs.dtype
            assert (quick_reward, quick_terminated, quick_truncated) == (reward, terminated, truncated)
            assert quick_info == {"goal_met": False, **info, "cost": cost}
            if terminated or truncated:
                break


def test_targets_are_reached_and_costs_incurred_with_the_same_bits() -> None:
    """Random rollouts touch few objects. This one presses buttons, hits gremlins and drives through hazards."""
    env_id = "SafetyPointButton2-v0"
    plain, quick = plain_builder(env_id), gym.make(env_id).unwrapped
    rng = np.random.default_rng(0)
    pressed, kinds = 0, set()
    for seed in range(2):
        obs, _ = plain.reset(seed=seed)
        quick.reset(seed=seed)
        for _ in range(400):
            action = towards(split(plain, obs), plain.action_space, rng)
            obs, reward, cost, *_, info = plain.step(action)
            quick_obs, quick_reward, _, _, quick_info = quick.step(action)
            np.testing.assert_array_equal(quick_obs, obs)
            assert (quick_reward, quick_info) == (reward, {"goal_met": False, **info, "cost": cost})
            pressed += quick_info["goal_met"]
            kinds |= {key for key, value in info.items() if value and key.startswith("cost_")}
    assert pressed >= 2
    assert kinds == {"cost_buttons", "cost_hazards", "cost_gremlins", "cost_sum"}


def test_the_sky_is_drawn_as_the_package_does_but_not_simulated() -> None:
    options: dict[str, Any] = {"render_mode": "rgb_array", "camera_name": "fixedfar", "width": 200, "height": 120}
    plain = Builder("SafetyPointGoal1-v0", config={"agent_name": "Point"}, **options)
    quick: Any = gym.make("SafetyPointGoal1-v0", **options)
    for seed in (0, 1):  # The viewer of the first world also shows the second.
        plain.reset(seed=seed)
        quick.reset(seed=seed)
        np.testing.assert_array_equal(quick.render(), plain.render())
        assert plain.task.model.ntexdata > 1e8 > 1e6 > quick.unwrapped.task.model.ntexdata
    quick.close()
    for viewer in plain.task._viewers.values():
        viewer.close()


def test_an_unstable_simulation_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log of such events to the working directory.
    env: Any = gym.make("SafetyPointGoal1-v0").unwrapped
    env.reset(seed=0)
    env.task.data.qvel[0] = np.nan
    with pytest.raises(ValueError, match="unstable"):
        env.task.obs()


def test_a_package_that_works_by_itself_is_simulated_by_its_own_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(load(), "adapted_by")
    for env_id in ("SafetyPointGoal1-v0", "Safexp-PointButton1-v0"):
        genuine: Any = gym.make(env_id)
        bases = [base.__name__ for base in type(genuine.unwrapped.task).__mro__]
        assert not [name for name in bases if name.startswith("Fast")]
        with monkeypatch.context() as patch:
            patch.setattr(load(), "adapted_by", "sb3_algd.envs.safety.adapter", raising=False)
            quick: Any = gym.make(env_id)
        assert "FastMixin" in [base.__name__ for base in type(quick.unwrapped.task).__mro__]
        np.testing.assert_array_equal(genuine.reset(seed=1)[0], quick.reset(seed=1)[0])
        np.testing.assert_array_equal(genuine.step(np.ones(2))[0], quick.step(np.ones(2))[0])
