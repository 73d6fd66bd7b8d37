"""
Train every combination of tasks, algorithms and seeds, and leave one learning curve for each.

    python -m benchmarks.run --tasks Safexp-PointButton1-v0 --algorithms algd-ve algd-ddpm --seeds 0 1 2 --steps 20000

A run is one process with one thread; ``--jobs`` of them run at a time. A run that has left its CSV is never repeated, so the
same command can be given again until everything is done. One that was interrupted goes on from its last checkpoint with
``--checkpoint-every``, for runs of hours, and starts afresh without.

An experiment is an algorithm with other arguments and a name of its own:

    python -m benchmarks.run --algorithms algd-ve --name algd-ve-plain --set rho=0 policy_kwargs.denoising_steps=10 ...
"""

import argparse
import fcntl
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm

from benchmarks.settings import ALGORITHMS, RESULTS, Run, Settings, cost_gamma, merged, parse_overrides, prepare_folder
from sb3_algd.common.cost_aware_algorithm import CostAwareAlgorithm
from sb3_algd.common.recorder import Row, describe
from sb3_algd.train import train

#: Exit code of a run that another process is doing
SKIPPED = 75


def do(run: Run, on_row: Callable[[BaseAlgorithm, Row], None] | None = None, **kwargs: Any) -> None:
    """
    Do a run, from start to end.

    :param run: The run.
    :param on_row: Called with the model and each new row of its learning curve. None to print the row.
    :param kwargs: Arguments of the algorithm that take the place of those in the settings
    """
    settings = run.settings
    model_class, policy, _ = ALGORITHMS[settings.algorithm]

    def show(model: BaseAlgorithm, row: Row) -> None:
        print(f"{run.label}: {describe(row)}", flush=True)

    train(
        model_class,
        policy,
        settings.task,
        run.csv,
        settings.steps,
        {**settings.kwargs, **kwargs},
        seed=run.seed,
        device=settings.device,
        n_envs=settings.n_envs,
        eval_every=settings.eval_every,
        n_episodes=settings.n_episodes,
        n_deterministic=settings.n_deterministic,
        cost_gamma=cost_gamma(settings),
        on_row=on_row or show,
        model_path=run.folder / f"seed{run.seed}.zip" if run.save else None,
        log_folder=run.folder / f"seed{run.seed}_log" if run.log else None,
        checkpoint=run.checkpoint,
        checkpoint_every=settings.checkpoint_every,
    )


def do_alone(run: Run) -> None:
    """:param run: The run to do in this process, unless another one is doing it."""
    # Two commands that were given at the same time must not write to one file
    lock = (run.folder / f".seed{run.seed}.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(SKIPPED)
    if not run.csv.exists():
        th.set_num_threads(1)
        do(run)


def run_all(runs: list[Run], jobs: int) -> int:
    """
    Do the runs, some at a time.

    :param runs: The runs.
    :param jobs: How many processes at a time.
    :return: How many of them are not done, because they failed or another process is doing them.
    """
    # Inherited by the processes, whose libraries read it when they are imported
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))
    context = multiprocessing.get_context("spawn")
    waiting, undone = list(runs), 0
    active: dict[int, tuple[BaseProcess, Run, float]] = {}
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.pop(0)
                process: BaseProcess = context.Process(target=do_alone, args=(run,))
                process.start()
                active[process.sentinel] = (process, run, time.monotonic())
                print(f"{run.label}: started, {len(waiting)} waiting", flush=True)
            for sentinel in wait(list(active)):
                assert isinstance(sentinel, int)
                process, run, started = active.pop(sentinel)
                process.join()
                if process.exitcode == 0:
                    print(f"{run.label}: finished in {time.monotonic() - started:.0f} s", flush=True)
                    continue
                undone += 1
                if process.exitcode == SKIPPED:
                    print(f"{run.label}: another process is doing this run, skipped", flush=True)
                else:
                    print(f"{run.label}: FAILED with exit code {process.exitcode}, see the error above", flush=True)
    finally:
        for process, _, _ in active.values():
            process.terminate()
    return undone


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
    runs = [Run(settings, seed, folder, args.log, args.save) for seed in args.seeds for settings, folder in combinations]
    missing = [run for run in runs if not run.csv.exists()]
    for run in runs:
        if run not in missing:
            # Of a run that was killed when it had just finished; to do it again must not mean to go on from its end
            shutil.rmtree(run.checkpoint, ignore_errors=True)
    print(f"{len(runs)} runs, {len(runs) - len(missing)} finished before, {len(missing)} to do", flush=True)
    return 1 if run_all(missing, args.jobs) else 0


if __name__ == "__main__":
    sys.exit(main())
