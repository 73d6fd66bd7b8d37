"""
Measure how fast the environments are, against the bare package where there is one.

    python -m benchmarks.envs [--ids ...] [--steps 2000] [--out benchmarks/results/environments.csv]

Single environments are timed in CPU seconds, so that other programs do not count; two workers in seconds on the clock, for
which the machine should have nothing else to do. The environments that are compared take turns. Prints a Markdown table and
writes the same as CSV.
"""

import argparse
import csv
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

import sb3_algd  # noqa: F401
from sb3_algd.envs.safety.adapter import load

IDS = [
    *("SafetyPointGoal1-v0", "SafetyPointButton1-v0", "SafetyPointPush1-v0", "SafetyPointCircle1-v0", "SafetyPointRun0-v0"),
    *("SafetyCarGoal2-v0", "SafetyDoggoGoal1-v0", "SafetyRacecarGoal1-v0", "SafetyAntGoal1-v0"),
    *("SafetyHopperVelocity-v1", "SafetyHumanoidVelocity-v1"),
    *("Safexp-PointButton1-v0", "Safexp-CarButton1-v0", "Safexp-PointPush1-v0"),
    *("AntSpeed-v0", "HumanoidSpeed-v0"),
]
COLUMNS = {
    "id": "id",
    "bare": "bare package, steps/s",
    "adapter": "adapter alone, % of a bare step",
    "ours": "ours, steps/s",
    "bare_reset": "bare reset, ms",
    "our_reset": "our reset, ms",
    "two_workers": "two workers, steps/s",
}
CHUNK = 100
"""Steps in a turn."""


class Runner:
    """
    Steps an environment with random actions, and keeps the time.

    :param env: Anything with `reset`, `step` and `action_space`; `step` may return five or six values.
    """

    def __init__(self, env: Any) -> None:
        self.env = env
        self.step_times: list[float] = []
        self.reset_times: list[float] = []
        env.action_space.seed(0)
        self.actions = [env.action_space.sample() for _ in range(CHUNK)]
        self.reset()

    def reset(self) -> None:
        """Start an episode, the n-th in the same layout as that of the environments that this one is compared with."""
        start = time.process_time()
        self.env.reset(seed=len(self.reset_times))
        self.reset_times.append(time.process_time() - start)

    def turn(self) -> None:
        """Take :data:`CHUNK` steps, over several episodes if they end."""
        spent = 0.0
        for action in self.actions:
            start = time.process_time()
            result = self.env.step(action)
            spent += time.process_time() - start
            if result[-3] or result[-2]:
                self.reset()
        self.step_times.append(spent / CHUNK)
        self.reset()

    def rate(self) -> float:
        """:return: Steps per second, the median over the turns."""
        return float(1 / np.median(self.step_times))


def bare_environment(env_id: str) -> Callable[[], Any] | None:
    """
    :param env_id: One of our ids.
    :return: Makes what the package itself steps for it, with six values; None where it has no such task.
    """
    if not env_id.startswith("Safety"):
        return None
    load()
    if "Velocity" in env_id:
        walker = gym.make(env_id).unwrapped.env  # type: ignore[attr-defined]
        return type(walker)
    from safety_gymnasium.builder import Builder

    agent = gym.spec(env_id).kwargs["agent"]
    return lambda: Builder(env_id, config={"agent_name": agent})


def measure(env_id: str, steps: int) -> dict[str, str]:
    """
    :param env_id: The environment.
    :param steps: About how many steps to take with each variant.
    :return: A row of the table.
    """
    runners = {"ours": Runner(gym.make(env_id))}
    make_bare = bare_environment(env_id)
    if make_bare is not None:
        runners["bare"] = Runner(make_bare())
    for _ in range(max(1, steps // CHUNK)):
        for runner in runners.values():
            runner.turn()

    row = dict.fromkeys(COLUMNS, "")
    row |= {"id": env_id, "ours": f"{runners['ours'].rate():.0f}"}
    row["our_reset"] = f"{1e3 * np.median(runners['ours'].reset_times):.1f}"
    if make_bare is not None:
        row["bare"] = f"{runners['bare'].rate():.0f}"
        row["adapter"] = f"{100 * adapter_time(env_id) * runners['bare'].rate():.1f}"
        row["bare_reset"] = f"{1e3 * np.median(runners['bare'].reset_times):.1f}"
    row["two_workers"] = f"{two_workers(env_id, steps):.0f}"
    return row


def adapter_time(env_id: str) -> float:
    """
    :param env_id: One of our ids for an environment of the package.
    :return: CPU seconds that all layers around the package's `step` take together, for a step that itself takes none.
    """
    env = gym.make(env_id, max_episode_steps=10**9)
    obs, _ = env.reset(seed=0)
    env.unwrapped.env.step = lambda action: (obs, 0.0, 0.0, False, False, {})  # type: ignore[attr-defined]
    action = env.action_space.sample()
    times = []
    for _ in range(20):
        start = time.process_time()
        for _ in range(1000):
            env.step(action)
        times.append((time.process_time() - start) / 1000)
    return float(np.median(times))


def two_workers(env_id: str, steps: int) -> float:
    """
    :param env_id: The environment.
    :param steps: How many steps to take, both workers together.
    :return: Steps per second on the clock, resets included.
    """
    venv = make_vec_env(env_id, n_envs=2, seed=0, vec_env_cls=SubprocVecEnv)
    venv.reset()
    actions = [np.stack([venv.action_space.sample() for _ in range(2)]) for _ in range(CHUNK)]
    for action in actions:
        venv.step(action)
    start = time.perf_counter()
    for i in range(steps // 2):
        venv.step(actions[i % CHUNK])
    rate = steps / (time.perf_counter() - start)
    venv.close()
    return rate


def main() -> None:
    """Measure, print, write."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--ids", nargs="+", default=IDS, metavar="ID", help="environments to measure")
    parser.add_argument("--steps", type=int, default=2000, help="steps to take with each variant")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "environments.csv")
    options = parser.parse_args()

    warnings.simplefilter("ignore")
    rows = []
    print("| " + " | ".join(COLUMNS.values()) + " |")
    print("| " + " | ".join("---" for _ in COLUMNS) + " |")
    for env_id in options.ids:
        rows.append(measure(env_id, options.steps))
        print("| " + " | ".join(rows[-1].values()) + " |", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
