"""
Do runs: some at a time on this machine, or on the workers of a Dask cluster.

A run is one process with one thread. It is never repeated once it is finished, and goes on from its last checkpoint where an
interruption has left one.
"""

import contextlib
import fcntl
import importlib
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_algd import __version__
from sb3_algd.common.recorder import Row, describe
from sb3_algd.compare.settings import Run, cost_gamma
from sb3_algd.train import train

#: Exit code of a run that another process is doing
SKIPPED = 75
#: How long the lock of a worker that has died may outlive it
LOCK_SECONDS = 60.0
#: Random generators are those of the process, so a worker with several threads must not do several runs at once
_ONE_RUN = threading.Lock()


def do(run: Run, on_row: Callable[[BaseAlgorithm, Row], None] | None = None, **kwargs: Any) -> None:
    """
    Do a run, from start to end.

    :param run: The run.
    :param on_row: Called with the model and each new row of its learning curve. None to print the row.
    :param kwargs: Arguments of the algorithm that take the place of those in the settings
    """
    settings = run.settings
    model_class, policy, _ = run.algorithm
    for package in run.packages:
        importlib.import_module(package)

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
        cost_gamma=cost_gamma(model_class, settings.task),
        on_row=on_row or show,
        model_path=run.folder / f"seed{run.seed}.zip" if run.save else None,
        log_folder=run.folder / f"seed{run.seed}_log" if run.log else None,
        episodes_path=run.episodes if run.keep_episodes else None,
        checkpoint=run.checkpoint,
        checkpoint_every=settings.checkpoint_every,
    )


def do_alone(run: Run, patience: float = 0.0) -> bool:
    """
    Do a run, unless it is finished or another process is doing it.

    :param run: The run.
    :param patience: Seconds to wait for the other process.
    :return: Whether the run is finished.
    """
    deadline = time.monotonic() + patience
    # Two commands that were given at the same time must not write to one file
    with (run.folder / f".seed{run.seed}.lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(0.1)
            except OSError:
                # A shared folder without locks; a checkpoint of its own notices a second run
                break
        if not run.csv.exists():
            th.set_num_threads(1)
            do(run)
        return True


def _in_process(run: Run) -> None:
    sys.exit(0 if do_alone(run) else SKIPPED)


def _on_worker(run: Run, version: str) -> bool:
    if version != __version__:
        raise RuntimeError(f"The worker has sb3_algd {__version__}, the command {version}: install the same on both.")
    with _ONE_RUN:
        return do_alone(run, LOCK_SECONDS)


def do_missing(runs: list[Run], jobs: int, scheduler: str | None = None) -> int:
    """
    Do the runs that are not finished yet.

    :param runs: The runs.
    :param jobs: How many processes at a time on this machine.
    :param scheduler: Address of a Dask scheduler, whose workers do the runs instead. None for this machine
    :return: How many runs are not done in the end, because they failed or another process is doing them.
    """
    missing = [run for run in runs if not run.csv.exists()]
    for run in runs:
        if run not in missing:
            # Of a run that was killed when it had just finished; to do it again must not mean to go on from its end
            shutil.rmtree(run.checkpoint, ignore_errors=True)
    print(f"{len(runs)} runs, {len(runs) - len(missing)} finished before, {len(missing)} to do", flush=True)
    return run_all(missing, jobs) if scheduler is None else run_on_cluster(missing, scheduler)


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
                process: BaseProcess = context.Process(target=_in_process, args=(run,))
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


def run_on_cluster(runs: list[Run], scheduler: str) -> int:
    """
    Let the workers of a Dask cluster do the runs. The run of a worker that dies is given to another one.

    :param runs: The runs; their folders must be the same ones for all workers.
    :param scheduler: Address of the scheduler.
    :return: How many of them are not done, because they failed or another process is doing them.
    """
    if not runs:
        return 0
    try:
        from distributed import Client, as_completed
    except ImportError:
        raise SystemExit('--scheduler needs Dask: pip install "sb3_algd[cluster]"') from None
    try:
        client = Client(scheduler)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--scheduler {scheduler}: {' '.join(str(error).split())}") from None
    undone = 0
    with contextlib.closing(client):
        threads = client.nthreads()
        if any(n > 1 for n in threads.values()):
            raise SystemExit("A run needs a process of its own: start the workers with dask worker --nthreads 1.")
        print(f"{len(threads)} workers at {scheduler}", flush=True)
        submitted = {
            client.submit(_on_worker, replace(run, folder=run.folder.resolve()), __version__, pure=False): run for run in runs
        }
        for future in as_completed(submitted):
            label, failure = submitted[future].label, future.exception()
            undone += int(failure is not None or not future.result())
            if failure is not None:
                print(f"{label}: FAILED, {type(failure).__name__}: {' '.join(str(failure).split())}", flush=True)
            else:
                print(
                    f"{label}: {'finished' if future.result() else 'another process is doing this run, skipped'}", flush=True
                )
    return undone
