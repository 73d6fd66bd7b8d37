"""
Train several algorithms on a task with several seeds, and leave one figure and one table.

    sb3-algd compare --env TwoModes-v0 --algos algd sac_lag sac --seeds 3 --steps 2000

A run is one process with one thread; --jobs of them run at a time. Give the same command again after an interruption: a
finished run is never repeated, and ALGD and SACLag go on from their last checkpoints. With --scheduler, the workers of a Dask
cluster do the runs; they need the same folder at the same place.
"""

import argparse
import importlib
import importlib.util
import inspect
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.preprocessing import is_image_space

from sb3_algd import ALGD, SACLag
from sb3_algd.common.cost_aware_algorithm import CostAwareAlgorithm
from sb3_algd.compare.engine import do_missing
from sb3_algd.compare.report import write_report
from sb3_algd.compare.settings import (
    TUNED,
    Run,
    Settings,
    declared_limit,
    limit_is_discounted,
    merged,
    parse_overrides,
    prepare_folder,
)
from sb3_algd.train import at_least, refuse_arguments, refuse_device

#: Class and arguments of each algorithm
ALGORITHMS: dict[str, tuple[type[BaseAlgorithm], dict[str, Any]]] = {
    "algd": (ALGD, {}),
    "sac_lag": (SACLag, {}),
    "sac": (SAC, TUNED),
}
if importlib.util.find_spec("sb3_contrib") is not None:
    from sb3_contrib import TQC

    ALGORITHMS["tqc"] = (TQC, TUNED)
#: How many points a learning curve has by default
N_EVALUATIONS = 20
#: How many episodes, at least, there are between two checkpoints by default: each one cuts an episode off
CHECKPOINT_EPISODES = 10


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """:param arguments: Those of the command line if None. :return: What they say."""
    parser = argparse.ArgumentParser(
        prog="sb3-algd compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", required=True, help="Gymnasium id of the task")
    parser.add_argument("--algos", nargs="+", default=["algd", "sac_lag", "sac"], choices=list(ALGORITHMS))
    parser.add_argument("--seeds", type=at_least(1), default=3, help="how many seeds, from 0 on")
    parser.add_argument("--steps", type=at_least(1), default=20_000, help="environment steps of a run")
    parser.add_argument("--jobs", type=at_least(1), default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("-o", "--out", type=Path, default=Path("comparisons"), help="where results go")
    parser.add_argument("--cost-limit", type=at_least(0.0), help="the limit, by default the one that the task declares")
    parser.add_argument("--episodes", type=at_least(1), default=20, help="stochastic episodes of an evaluation")
    parser.add_argument("--eval-every", type=at_least(1), help="environment steps between evaluations")
    parser.add_argument(
        "--checkpoint-every", type=at_least(1), help="environment steps between checkpoints, much longer than an episode"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="[ALGO.]KEY=VALUE",
        help="arguments as YAML, of all algorithms or of one: batch_size=64 algd.rho=0",
    )
    parser.add_argument("--gym-packages", nargs="+", default=[], help="modules that register the task when they are imported")
    parser.add_argument("--scheduler", metavar="tcp://HOST:8786", help="Dask scheduler whose workers do the runs")
    return parser.parse_args(arguments)


def policy_of(space: spaces.Space) -> str:
    """:param space: Space of the observations. :return: Name of the policy, the same for every algorithm."""
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if is_image_space(space) else "MlpPolicy"


def overrides_of(pairs: list[str], algos: Sequence[str]) -> dict[str, dict[str, Any]]:
    """
    :param pairs: What is given with ``--set``.
    :param algos: The algorithms of the comparison.
    :return: For each of them the arguments.
    :raises SystemExit: If one is no argument of its algorithm.
    """
    given = parse_overrides(pairs)
    for_all = {key: value for key, value in given.items() if key not in algos}
    overrides = {name: merged(for_all, given.get(name, {})) for name in algos}
    for name, arguments in overrides.items():
        if "cost_limit" in arguments:
            raise SystemExit("--set cost_limit: the limit is the same for all, give it with --cost-limit.")
        unknown = arguments.keys() - inspect.signature(ALGORITHMS[name][0]).parameters.keys()
        if unknown:
            raise SystemExit(f"--set: {name} has no argument {', '.join(sorted(unknown))}.")
    return overrides


def prepare(args: argparse.Namespace, limit: float, command: list[str]) -> dict[str, list[Run]]:
    """
    Make the folders of the runs, or see that what is there fits.

    :param args: The options.
    :param limit: The cost limit.
    :param command: The words of the command after ``python``.
    :return: For each algorithm its runs.
    """
    env = gym.make(args.env)
    policy, episode = policy_of(env.observation_space), gym.spec(args.env).max_episode_steps or 1
    env.close()
    eval_every = args.eval_every or min(max(args.steps // N_EVALUATIONS, episode), args.steps)
    # At evaluations, where no training cost is left to be recorded
    checkpoint_every = args.checkpoint_every or max(args.steps // 5, CHECKPOINT_EPISODES * episode)
    checkpoint_every = -(-checkpoint_every // eval_every) * eval_every
    overrides = overrides_of(args.set, args.algos)
    all_settings: dict[str, Settings] = {}
    for name in dict.fromkeys(args.algos):
        model_class, kwargs = ALGORITHMS[name]
        constrained = issubclass(model_class, CostAwareAlgorithm)
        given = {"cost_limit": args.cost_limit} if constrained and args.cost_limit is not None else {}
        all_settings[name] = Settings(
            task=args.env,
            algorithm=name,
            steps=args.steps,
            eval_every=eval_every,
            n_episodes=args.episodes,
            n_deterministic=1,
            n_envs=1,
            device=args.device,
            kwargs=merged({**kwargs, **given}, overrides[name]),
            checkpoint_every=checkpoint_every if constrained else None,
        )
        refuse_arguments(model_class, policy, args.env, all_settings[name].kwargs, args.device)
    runs: dict[str, list[Run]] = {}
    # No folder is made before all of them can start
    for name, settings in all_settings.items():
        model_class, kwargs = ALGORITHMS[name]
        folder = folder_of(args) / name
        prepare_folder(folder, settings, list(range(args.seeds)), command, limit)
        runs[name] = [
            Run(
                settings,
                seed,
                folder,
                (model_class, policy, kwargs),
                save=True,
                keep_episodes=True,
                packages=tuple(args.gym_packages),
            )
            for seed in range(args.seeds)
        ]
    return runs


def folder_of(args: argparse.Namespace) -> Path:
    """:param args: The options. :return: Folder of the task."""
    return Path(args.out, re.sub(r"[/:]", "_", args.env))


def main(arguments: Sequence[str] | None = None) -> int:
    """:param arguments: Those of the command line if None. :return: 0 if all runs are done."""
    args = parse_arguments(arguments)
    if importlib.util.find_spec("matplotlib") is None:
        # Asked now, not after hours of training
        raise SystemExit("The figure needs matplotlib. Install with: pip install matplotlib")
    refuse_device(args.device)
    if args.gym_packages:
        # Where a script would find them
        sys.path.insert(0, os.getcwd())
    for package in args.gym_packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise SystemExit(f"--gym-packages {package}: {error}") from None
    limit = declared_limit(args.env, args.cost_limit)
    if limit is None:
        raise SystemExit(f"{args.env} declares no cost limit: give one with --cost-limit.")
    command = ["-m", "sb3_algd.cli", "compare", *(sys.argv[1:] if arguments is None else arguments)]
    by_algorithm = prepare(args, limit, command)
    # So that a polite kill ends the children too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Seed by seed, so that an interrupted comparison has something to say about every algorithm
    runs = [run for of_one_seed in zip(*by_algorithm.values(), strict=True) for run in of_one_seed]
    try:
        undone = do_missing(runs, args.jobs, args.scheduler)
    except KeyboardInterrupt:
        raise SystemExit("Interrupted. The same command goes on.") from None
    if not any(run.csv.exists() for run in runs):
        raise SystemExit("No run is finished.")
    discounted = limit_is_discounted(args.env)
    print(f"\n{write_report(args.env, by_algorithm, limit, discounted, folder_of(args))}")
    print(f"\nLeft in {folder_of(args)}: comparison.png, .svg and .md; for each algorithm its learning curves and models")
    return 1 if undone else 0


if __name__ == "__main__":
    sys.exit(main())
