"""
Keep two limits at once on a real task: PointButton1's own cost, and the number of steps in which the robot is fast.

    python -m benchmarks.two_constraints --seed 0

Leaves ``seed<k>.csv``: return and both costs of stochastic episodes, and both multipliers, while training.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from benchmarks.settings import RESULTS
from sb3_algd import ALGD, evaluate_policy
from sb3_algd.common.random_state import preserved_random_state
from sb3_algd.common.recorder import seeded_evaluation
from sb3_algd.envs import CostFromCallable

TASK = "Safexp-PointButton1-v0"
NAMES = ("contact", "speed")
#: Per episode of 400 steps, plain sums. The task's own limit, and at most 100 steps above the speed: without the second limit
#: more than half of them are
LIMITS = [10.0, 100.0]
FAST = 1.2
#: Where the observation has the velocity in the plane, in m/s
VELOCITY = slice(3, 5)
COLUMNS = ("step", "return_mean", *(f"cost_{name}" for name in NAMES), *(f"multiplier_{name}" for name in NAMES))


def both_costs(obs: np.ndarray, action: np.ndarray, next_obs: np.ndarray, info: dict[str, Any]) -> list[float]:
    """
    :param obs: Observation before the step.
    :param action: Action.
    :param next_obs: Observation after it.
    :param info: Of the step.
    :return: The task's own cost, and 1 where the robot is faster than allowed.
    """
    return [info["cost"], float(np.linalg.norm(next_obs[VELOCITY]) > FAST)]


def make_env(seed: int) -> VecEnv:
    """:param seed: Seed. :return: The task with both costs and their limits."""
    return make_vec_env(lambda: CostFromCallable(gym.make(TASK), both_costs, LIMITS), seed=seed)


class Curve(BaseCallback):
    """
    Writes a row each ``every`` steps.

    :param path: The CSV file.
    :param seed: Seed of the run.
    :param every: Environment steps between evaluations.
    :param n_episodes: Stochastic episodes of an evaluation.
    """

    def __init__(self, path: Path, seed: int, every: int, n_episodes: int) -> None:
        super().__init__()
        self.path, self.seed, self.every, self.n_episodes = path, seed, every, n_episodes

    def _on_training_start(self) -> None:
        with preserved_random_state(self.model.device):
            self.env = make_env(self.seed)

    def _on_step(self) -> bool:
        if self.num_timesteps % self.every:
            return True
        assert isinstance(self.model, ALGD)
        with seeded_evaluation(self.model, self.env, self.seed, self.num_timesteps):
            value, _, costs, _ = evaluate_policy(self.model, self.env, self.n_episodes)
        row = [self.num_timesteps, value, *costs, *self.model.lagrange_multiplier.value.tolist()]
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([f"{number:.6g}" for number in row])
        print(", ".join(f"{name} {number:.4g}" for name, number in zip(COLUMNS, row, strict=True)), flush=True)
        return True


def main(arguments: list[str] | None = None) -> None:
    """:param arguments: Those of the command line if None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--eval-every", type=int, default=2500, help="environment steps between evaluations")
    parser.add_argument("--episodes", type=int, default=20, help="stochastic episodes of an evaluation")
    parser.add_argument("--out", type=Path, default=RESULTS / "two-constraints", help="where the curve goes")
    args = parser.parse_args(arguments)
    th.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"seed{args.seed}.csv"
    path.write_text(",".join(COLUMNS) + "\n")
    model = ALGD("DiffusionPolicy", make_env(args.seed), seed=args.seed)
    model.learn(args.steps, Curve(path, args.seed, args.eval_every, args.episodes))


if __name__ == "__main__":
    main()
