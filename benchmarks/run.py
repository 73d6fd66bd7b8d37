"""
Train every combination of tasks, algorithms and seeds, and leave one learning curve for each.

    python -m benchmarks.run --tasks Safexp-PointButton1-v0 --algorithms algd-ve algd-ddpm --seeds 0 1 2 --steps 20000

The same runs as those of ``sb3-algd compare``, with the tasks, algorithms and settings of the published results. A run is one
process with one thread; ``--jobs`` of them run at a time. A run that has left its CSV is never repeated, so the same command
can be given again until everything is done. One that was interrupted goes on from its last checkpoint with
``--checkpoint-every``, for runs of hours, and starts afresh without.

An experiment is an algorithm with other arguments and a name of its own:

    python -m benchmarks.run --algorithms algd-ve --name algd-ve-plain --set rho=0 policy_kwargs.denoising_steps=10 ...
"""

import argparse
import os
import signal
import sys
from pathlib import Path

from benchmarks.settings import ALGORITHMS, RESULTS
from sb3_algd.common.cost_aware_algorithm import CostAwareAlgorithm
from sb3_algd.compare.engine import do_missing
from sb3_algd.compare.settings import Run, Settings, merged, parse_overrides, prepare_folder


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """:param arguments: Those of the command line if None. :return: What they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["Safexp-PointButton1-v0"], help="Gymnasium ids")
    parser.add_argument("--algorithms", nargs="+", default=["algd-ve", "algd-ddpm"], choices=list(ALGORITHMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20_000, help="environment steps of a run")
    parser.add_argument("--eval-every", type=int, default=2000, help="environment steps between evaluations")
    parser.add_argument("--episodes", type=int, default=20, help="stochastic episodes of an evaluation")
    parser.add_argument(
        "--deterministic-episodes", type=int, default=1, help="take more than one where the layout changes with the episode"
    )
    parser.add_argument("--envs", type=int, default=1, help="training environments")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--scheduler", metavar="tcp://HOST:8786", help="Dask scheduler whose workers do the runs")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="arguments of the algorithm, as YAML"
    )
    parser.add_argument("--name", help="results folder of an experiment, needed with --set")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where results go")
    parser.add_argument(
        "--checkpoint-every",
        type=int,
        help="environment steps between checkpoints, much longer than an episode; none if left out",
    )
    parser.add_argument("--log", action="store_true", help="keep everything that the algorithm logs, in seed<k>_log/")
    parser.add_argument("--save", action="store_true", help="keep the trained models of the runs to be done, as seed<k>.zip")
    args = parser.parse_args(arguments)
    if args.checkpoint_every is not None:
        if args.log:
            parser.error("--log and --checkpoint-every do not go together: a log does not go on where it was interrupted")
        if args.checkpoint_every % args.eval_every != 0:
            parser.error(
                "--checkpoint-every must be a multiple of --eval-every, where no training cost is left to be recorded"
            )
        for algorithm in args.algorithms:
            if not issubclass(ALGORITHMS[algorithm][0], CostAwareAlgorithm):
                parser.error(f"--checkpoint-every: there are no checkpoints for {algorithm}, start it in a command of its own")
    if args.set and not args.name:
        parser.error("--set changes the algorithm: name the experiment with --name")
    if args.name and len(args.algorithms) != 1:
        parser.error("--name stands for one algorithm: choose it with --algorithms")
    if args.name in ALGORITHMS:
        parser.error(f"--name {args.name} is an algorithm's own: give this experiment another one")
    return args


def main(arguments: list[str] | None = None) -> int:
    """:param arguments: Those of the command line if None. :return: The exit status."""
    args = parse_arguments(arguments)
    command = ["-m", "benchmarks.run", *(sys.argv[1:] if arguments is None else arguments)]
    # So that a polite kill ends the children too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    overrides = parse_overrides(args.set)
    combinations = []
    for task in args.tasks:
        for algorithm in args.algorithms:
            settings = Settings(
                task=task,
                algorithm=algorithm,
                steps=args.steps,
                eval_every=args.eval_every,
                n_episodes=args.episodes,
                n_deterministic=args.deterministic_episodes,
                n_envs=args.envs,
                device=args.device,
                kwargs=merged(ALGORITHMS[algorithm][2], overrides),
                checkpoint_every=args.checkpoint_every,
            )
            folder = args.out / task / (args.name or algorithm)
            prepare_folder(folder, settings, args.seeds, command)
            combinations.append((settings, folder))
    # Seed by seed, so that an interrupted grid has something to say about every algorithm
    runs = [
        Run(settings, seed, folder, ALGORITHMS[settings.algorithm], args.log, args.save)
        for seed in args.seeds
        for settings, folder in combinations
    ]
    return 1 if do_missing(runs, args.jobs, args.scheduler) else 0


if __name__ == "__main__":
    sys.exit(main())
