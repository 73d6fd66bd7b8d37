"""Replays trajectories that were recorded on the genuine stack: Python 3.10, gymnasium 0.28.1, mujoco 2.3.3.

The cost has to be equal at every step, and the episode has to end at the same step. :data:`EXPECTED` has the tolerances of
observations and rewards for each recording, if needed for each channel, with the reasons.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import pytest

import sb3_algd  # noqa: F401

DATA = Path(__file__).parent / "data"
OFFICIAL = "safety_gymnasium_1.0.0_official"
COSTS = "safety_gymnasium_1.0.0_official_costs"
MUJOCO_MAJOR = int(mujoco.__version__.split(".")[0])


@dataclass(frozen=True)
class Within:
    """
    Absolute tolerances up to some step.

    :param step: The last step of these tolerances. The reset is step 0.
    :param obs: The tolerance of all channels not in ``channels``.
    :param reward: The tolerance of the reward.
    :param channels: The tolerances of single channels. Infinity means that a channel cannot be compared.
    """

    step: int
    obs: float
    reward: float
    channels: dict[str, float] = field(default_factory=dict)


# Gliding and turning with no contact except the floor. The remaining difference is rounding in the constraint solver, whose
# stopping rule changed between MuJoCo 2.3 and 3. It is largest in the accelerometer, a difference of velocities.
SMOOTH = [
    Within(10, obs=1e-12, reward=1e-10, channels={"accelerometer": 1e-9, "gyro": 1e-11}),
    Within(40, obs=1e-8, reward=1e-8, channels={"accelerometer": 1e-6, "gyro": 1e-6}),
]
# Driving straight is unstable: the servo that should hold the heading turns the Point away, a million times more in each
# step, until it saturates in the third. A difference in the last bit, 1e-13 rad/s after one step, lets the turn begin a
# little earlier or later. After that the two Points drive side by side. Their distance depends on the last bits: they are
# equal in Run, nearly equal in Button1, and differ by a tenth in Circle1.
VEERING = {"accelerometer": 0.5, "gyro": 0.1, "velocimeter": 5e-3}
# The caster wheel starts exactly at the edge of its contact, and the two versions are on different sides of it. One car gets a
# jolt at the reset, and after that the two cars drive on slightly different paths.
CASTER = {
    "accelerometer": np.inf,
    "gyro": 5.0,
    "velocimeter": 1.0,
    "ballangvel_rear": 15.0,
    "ballquat_rear": 1.0,
    "magnetometer": 0.3,
}

EXPECTED: dict[tuple[str, str], list[Within]] = {
    (OFFICIAL, "SafetyPointButton1-v0"): SMOOTH,
    (OFFICIAL, "SafetyPointCircle1-v0"): SMOOTH,
    (OFFICIAL, "SafetyPointGoal1-v0"): SMOOTH,
    (OFFICIAL, "SafetyPointGoal2-v0"): SMOOTH,
    (OFFICIAL, "SafetyPointPush1-v0"): SMOOTH,
    (OFFICIAL, "SafetyPointRun0-v0"): SMOOTH,
    # The gremlins are boxes of 0.8 mg. A soft constraint pulls them, and the solvers satisfy it with different accuracy.
    (OFFICIAL, "SafetyCarButton2-v0"): [Within(40, obs=1e-11, reward=1e-12, channels={"gremlins_lidar": 3e-3})],
    (OFFICIAL, "SafetyCarCircle1-v0"): [Within(40, obs=1e-11, reward=1e-12)],
    (OFFICIAL, "SafetyCarGoal2-v0"): [
        Within(0, obs=1e-11, reward=0.0, channels={"accelerometer": np.inf}),
        Within(40, obs=0.8, reward=0.05, channels=CASTER),
    ],
    # Four feet hit the floor and slip. Each impact multiplies the difference, the one in step 24 by 1e5.
    (OFFICIAL, "SafetyDoggoGoal1-v0"): [Within(10, obs=1e-11, reward=1e-12), Within(40, obs=1e-3, reward=1e-5)],
    # A chaotic gait: solver rounding of 1e-7 grows tenfold every few steps.
    (OFFICIAL, "SafetyHalfCheetahVelocity-v1"): [Within(10, obs=1e-5, reward=1e-5), Within(40, obs=0.2, reward=0.02)],
    # It lands on its foot at step 8 and falls at step 17.
    (OFFICIAL, "SafetyHopperVelocity-v1"): [Within(7, obs=1e-5, reward=1e-5), Within(17, obs=0.3, reward=0.03)],
    # From the first contact on, at step 1 here and at step 3 below, the Ant's feet are pushed into the floor. There the
    # constraint solver of MuJoCo 3 differs. A few steps later the two move differently, so only the cost is compared.
    (OFFICIAL, "SafetyAntCircle1-v0"): [
        Within(0, obs=1e-12, reward=0.0),
        Within(4, obs=1e-3, reward=1e-4, channels={"accelerometer": 0.1, "agent_qvel": 1e-2, "gyro": 1e-2}),
    ],
    (OFFICIAL, "SafetyAntVelocity-v1"): [Within(0, obs=1e-12, reward=0.0), Within(2, obs=1e-4, reward=1e-4)],
    (COSTS, "SafetyCarGoal2-v0"): [
        Within(0, obs=1e-11, reward=0.0, channels={"accelerometer": np.inf}),
        Within(18, obs=0.2, reward=0.02, channels=CASTER),
    ],
    # It runs into a gremlin at step 22.
    (COSTS, "SafetyPointButton1-v0"): [
        Within(21, obs=1e-8, reward=1e-8, channels={"accelerometer": 1e-6, "gyro": 1e-6, "gremlins_lidar": 1e-2}),
        Within(26, obs=0.3, reward=0.01, channels={"accelerometer": 5.0, "gyro": 0.5}),
    ],
    (COSTS, "SafetyPointCircle1-v0"): [Within(45, obs=1e-2, reward=5e-4, channels=VEERING)],
    (COSTS, "SafetyPointGoal1-v0"): [Within(38, obs=1e-3, reward=1e-5, channels=VEERING)],
    # Then it pushes a vase.
    (COSTS, "SafetyPointGoal2-v0"): [
        Within(26, obs=1e-3, reward=1e-5, channels=VEERING),
        Within(35, obs=5e-3, reward=1e-3, channels={**VEERING, "vases_lidar": 0.05}),
    ],
    # It pushes the box from step 3 on, and each impact reaches the accelerometer in a different substep.
    (COSTS, "SafetyPointPush2-v0"): [
        Within(0, obs=1e-12, reward=0.0),
        Within(34, obs=0.03, reward=5e-3, channels={"accelerometer": np.inf, "gyro": 3.0, "velocimeter": 0.2}),
    ],
    # The reward is a difference of potentials of about 60000, whose rounding it inherits.
    (COSTS, "SafetyPointRun0-v0"): [Within(32, obs=1e-11, reward=1e-10)],
}

# An Ant's episode ends when its torso falls over. At that time its path has long left the recording (see above). MuJoCo 4
# also integrates a free body with another Runge-Kutta rule than MuJoCo 3.
ENDS_ELSEWHERE = {(OFFICIAL, "SafetyAntVelocity-v1")}
if MUJOCO_MAJOR >= 4:
    ENDS_ELSEWHERE.add((OFFICIAL, "SafetyAntCircle1-v0"))

RECORDINGS = sorted(EXPECTED)


def channels(env: gym.Env, size: int) -> dict[str, slice]:
    """The slice of each channel in the flat observation. Environments without channels get one slice, "state"."""
    task = getattr(env.unwrapped, "task", None)
    if task is None:
        return {"state": slice(0, size)}
    spans, start = {}, 0
    for name, space in task.obs_info.obs_space_dict.items():
        spans[name] = slice(start, start + int(np.prod(space.shape)))
        start = spans[name].stop
    return spans


def test_every_recording_is_replayed() -> None:
    found = {(file, key.rsplit("/", 1)[0]) for file in (OFFICIAL, COSTS) for key in np.load(DATA / f"{file}.npz")}
    assert found == set(EXPECTED)


@pytest.mark.parametrize(("file", "env_id"), RECORDINGS)
def test_replay(file: str, env_id: str) -> None:
    with np.load(DATA / f"{file}.npz") as data:
        recorded = {key.rsplit("/", 1)[1]: data[key] for key in data if key.startswith(env_id + "/")}
    env = gym.make(env_id)
    reward: Any = 0.0
    obs, _ = env.reset(seed=int(recorded.get("seed", 7)))
    spans = channels(env, len(obs))
    assert sum(span.stop - span.start for span in spans.values()) == recorded["obs"].shape[1] == len(obs)
    expected = EXPECTED[file, env_id]

    def compare(step: int) -> None:
        band = next((band for band in expected if step <= band.step), None)
        if band is None:
            return
        error = np.abs(obs - recorded["obs"][step])
        for name, span in spans.items():
            tolerance = band.channels.get(name, band.obs)
            assert error[span].max() <= tolerance, f"step {step}, {name}: off by {error[span].max():.1e}"
        if step > 0:
            assert reward == pytest.approx(recorded["rewards"][step - 1], rel=0, abs=band.reward), f"step {step}"

    compare(0)
    last = len(recorded["actions"])
    for step, action in enumerate(recorded["actions"], start=1):
        obs, reward, terminated, truncated, info = env.step(action)
        compare(step)
        assert info["cost"] == recorded["costs"][step - 1], f"step {step}"
        if (file, env_id) in ENDS_ELSEWHERE:
            if terminated:
                assert step > 10, "it has to survive as long as the recording can be followed"
                last = step
                break
        elif "terminated" in recorded:
            assert terminated == recorded["terminated"][step - 1], f"step {step}"
            assert truncated == recorded["truncated"][step - 1], f"step {step}"
    assert expected[-1].step <= last <= len(recorded["actions"])
    env.close()
