"""
Show on a task with a known answer that ALGD finds the constrained optimum, and both ways to reach it.

    python -m benchmarks.toy

``TwoModes-v0``, both diffusion types, three seeds, one run after the other in this process with one thread. Each leaves its
learning curve, ``seed<k>.csv``, and the share of its actions at each of the two modes, ``modes_seed<k>.csv``. A run that has
left its curve is not repeated. Prints a Markdown table of the ends of the runs.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm

from benchmarks.settings import ALGORITHMS, RESULTS
from sb3_algd.common.random_state import preserved_random_state
from sb3_algd.common.recorder import Row, describe
from sb3_algd.compare.engine import do
from sb3_algd.compare.settings import Run, Settings, prepare_folder
from sb3_algd.envs.toy import TwoModesEnv
from sb3_algd.plotting import read_curve

TASK = "TwoModes-v0"
#: Actions that mode shares are counted over
N_ACTIONS = 2000
#: How far from the optimal return, as a share of it, and how often at the rarer mode
TOLERANCE, RARER_MODE = 0.1, 0.2

HEADER = "| type | seed | steps | return | optimum | cost | limit | left mode | right mode | rarer mode, 2nd half | passed |"

COMMON: dict[str, Any] = dict(
    # Small networks and quick targets for a small task, whose next target is drawn afresh: a short horizon will do
    learning_rate=3e-3,
    batch_size=64,
    gamma=0.5,
    cost_gamma=0.5,
    learning_starts=200,
    policy_delay=1,
    # The runs have some twenty episodes: the multiplier has to move faster than in a long training
    rho=0.2,
    multiplier_kwargs=dict(learning_rate=0.15, confidence=2.0),
)
#: Arguments of ALGD for each type
ARGUMENTS: dict[str, dict[str, Any]] = {
    "algd-ve": {
        **COMMON,
        # The reward has the same slope up to the edge of the box: at temperature 1 the Boltzmann distribution would be as wide
        # as the box. A steep score needs smaller steps, whose size is the noise's variance. It is learned in the states that
        # the chain asks for it
        "score_kwargs": {"pairing": "before", "temperature": 0.015},
        "policy_kwargs": {"diffusion": "ve", "net_arch": [64, 64], "diffusion_kwargs": {"sigma_max": 0.2}},
    },
    "algd-ddpm": {
        **COMMON,
        # The chain has hardly any noise of its own. The guidance loss then moves the border between the two modes until one of
        # them is gone, since samples near the border are worse than the others; the score has no such preference. A weight of
        # 0, not a small one: Adam makes whole steps of the noise head, which only the guidance loss has gradients for
        "guidance_coef": 0.0,
        "score_coef": 1.0,
        "score_kwargs": {"pairing": "before", "temperature": 1.0},
        # It follows the multiplier faster than the mean of ten episodes does: with larger steps its cost swings
        "multiplier_kwargs": {"learning_rate": 0.08, "confidence": 0.5},
        # Without guidance only the push along the score moves samples: it has to take them all the way, 10 * 0.2
        "policy_kwargs": {
            "diffusion": "ddpm",
            "net_arch": [64, 64],
            "denoising_steps": 10,
            "diffusion_kwargs": {"guidance_scale": 0.2},
        },
    },
}

#: Environment steps of a run of each type
STEPS = {"algd-ve": 3000, "algd-ddpm": 2000}


def mode_shares(model: BaseAlgorithm) -> tuple[float, float]:
    """
    :param model: A model of the task.
    :return: Shares of its stochastic actions at the left and at the right mode. Leaves the random generators as they were.
    """
    env = gym.make(TASK).unwrapped
    assert isinstance(env, TwoModesEnv)
    targets = np.linspace(-0.5, 0.5, N_ACTIONS, dtype=np.float32)[:, None]
    with preserved_random_state(model.device):
        th.manual_seed(model.num_timesteps)
        actions, _ = model.predict(targets, deterministic=False)
    return env.mode_shares(targets, actions)


def train(run: Run) -> None:
    """:param run: The run to do, from start to end."""
    modes = [("step", "left", "right")]

    def on_row(model: BaseAlgorithm, row: Row) -> None:
        left, right = mode_shares(model)
        modes.append((f"{row['step']:.0f}", f"{left:.4g}", f"{right:.4g}"))
        with (run.folder / f"modes_seed{run.seed}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(modes)
        print(f"{run.label}: {describe(row)}, modes {left:.2f} and {right:.2f}", flush=True)

    do(run, on_row)


def table_row(run: Run) -> tuple[str, bool]:
    """
    :param run: A finished run.
    :return: Its row of the table, and whether it passed: close to the optimal return, within the limit, at both modes.
    """
    env = gym.make(TASK).unwrapped
    assert isinstance(env, TwoModesEnv)
    curve, modes = read_curve(run.csv), read_curve(run.folder / f"modes_seed{run.seed}.csv")
    value, cost = curve["return_mean"][-1], curve["cost_mean"][-1]
    rarer = np.minimum(modes["left"], modes["right"])
    near = abs(value - env.optimal_return) <= TOLERANCE * env.optimal_return
    passed = bool(near and cost <= env.cost_limit and rarer[-1] >= RARER_MODE)
    cells = [
        run.settings.algorithm,
        str(run.seed),
        f"{curve['step'][-1]:,.0f}",
        f"{value:.1f}",
        f"{env.optimal_return:g}",
        f"{cost:.1f}",
        f"{env.cost_limit:g}",
        f"{modes['left'][-1]:.2f}",
        f"{modes['right'][-1]:.2f}",
        f"{rarer[len(rarer) // 2 :].min():.2f}",
        "yes" if passed else "no",
    ]
    return f"| {' | '.join(cells)} |", passed


def main(arguments: list[str] | None = None) -> int:
    """:param arguments: Those of the command line if None. :return: 0 if all runs passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=list(ARGUMENTS), choices=list(ARGUMENTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help=f"environment steps of a run, by default {STEPS}")
    parser.add_argument("--eval-every", type=int, default=250, help="environment steps between evaluations")
    parser.add_argument("--episodes", type=int, default=20, help="stochastic episodes of an evaluation")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results go")
    args = parser.parse_args(arguments)
    th.set_num_threads(1)
    runs = []
    for algorithm in args.algorithms:
        settings = Settings(
            task=TASK,
            algorithm=algorithm,
            steps=args.steps or STEPS[algorithm],
            eval_every=args.eval_every,
            n_episodes=args.episodes,
            n_deterministic=1,
            n_envs=1,
            device="cpu",
            kwargs=ARGUMENTS[algorithm],
        )
        folder = args.out / TASK / algorithm
        command = ["-m", "benchmarks.toy", *(sys.argv[1:] if arguments is None else arguments)]
        prepare_folder(folder, settings, args.seeds, command)
        runs += [Run(settings, seed, folder, ALGORITHMS[algorithm]) for seed in args.seeds]
    # Seed by seed, so that an interrupted grid has something to say about both types
    for run in sorted(runs, key=lambda run: run.seed):
        if not run.csv.exists():
            train(run)
    rows = [table_row(run) for run in runs]
    print("\n".join([HEADER, "|" + " --- |" * (HEADER.count("|") - 1), *(row for row, _ in rows)]))
    return 0 if all(passed for _, passed in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
