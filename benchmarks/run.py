"""
Train every combination of tasks, algorithms and seeds, and leave one learning curve for each.

    python benchmarks/run.py --tasks Safexp-PointButton1-v0 --algorithms algd-ve algd-ddpm --seeds 0 1 2 --steps 20000

A run is one process with one thread; ``--jobs`` of them run at a time. A run that has left its CSV is never repeated, so the
same command can be given again until everything is done. One that was interrupted goes on from its last checkpoint with
``--checkpoint-every``, for runs of hours, and starts afresh without.

An experiment is an algorithm with other arguments and a name of its own:

    python benchmarks/run.py --algorithms algd-ve --name algd-ve-plain --set rho=0 policy_kwargs.denoising_steps=10 ...
"""

import argparse
import contextlib
import fcntl
import inspect
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
import yaml
from baselines import ConstrainedSAC
from sb3_contrib import TQC
from stable_baselines3 import SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure

from sb3_algd import ALGD
from sb3_algd.checkpoint import MANIFEST, ResumableCheckpointCallback, read_manifest, resume
from sb3_algd.diffusion import PROCESSES
from sb3_algd.policies import DiffusionPolicy
from sb3_algd.recorder import LearningCurveRecorder, Row, describe, make_envs

RESULTS = Path(__file__).parent / "results"
#: Exit code of a run that another process is doing
SKIPPED = 75

#: The better of two settings for every baseline, and what ALGD and its relatives have by default
TUNED = {"learning_rate": 1e-3, "tau": 0.02}
#: Class, policy and arguments of each algorithm, on top of its own defaults
ALGORITHMS: dict[str, tuple[type[BaseAlgorithm], str, dict[str, Any]]] = {
    "algd-ve": (ALGD, "DiffusionPolicy", {"policy_kwargs": {"diffusion": "ve"}}),
    # Its policy soon is nearly deterministic: with 100 random steps it got stuck before it had seen anything
    "algd-ddpm": (ALGD, "DiffusionPolicy", {"policy_kwargs": {"diffusion": "ddpm"}, "learning_starts": 2000}),
    "algd-ve-plain": (ALGD, "DiffusionPolicy", {"policy_kwargs": {"diffusion": "ve"}, "rho": 0}),
    "sac-augmented": (ConstrainedSAC, "GaussianPolicy", {}),
    "sac-lagrangian": (ConstrainedSAC, "GaussianPolicy", {"rho": 0}),
    # Without any constraint, what SB3's users have today; docs/results.md has the runs that these arguments were chosen by
    "sac": (SAC, "MlpPolicy", TUNED),
    "tqc": (TQC, "MlpPolicy", TUNED),
}


@dataclass(frozen=True)
class Settings:
    """What the runs in one results folder have in common."""

    task: str
    algorithm: str
    steps: int
    eval_every: int
    n_episodes: int
    n_deterministic: int
    n_envs: int
    device: str
    kwargs: dict[str, Any]
    #: Storing a checkpoint ends the running episodes, so it is part of what a run does
    checkpoint_every: int | None = None


@dataclass(frozen=True)
class Run:
    """One run: its settings, its seed and where its results go."""

    settings: Settings
    seed: int
    folder: Path
    log: bool
    save: bool

    @property
    def csv(self) -> Path:
        """The learning curve, which exists once the run is finished."""
        return self.folder / f"seed{self.seed}.csv"

    @property
    def checkpoint(self) -> Path:
        """Where an interrupted run goes on from."""
        return self.folder / f"seed{self.seed}_checkpoint"

    @property
    def label(self) -> str:
        """How the run is called in messages."""
        return f"{self.folder.parent.name}/{self.folder.name}/seed{self.seed}"


def cost_gamma(settings: Settings) -> float | None:
    """
    :param settings: Settings of a run.
    :return: Discount factor of the costs that are recorded; None to go by the model, which knows its limit's unit.
    """
    if issubclass(ALGORITHMS[settings.algorithm][0], ALGD):
        return None
    env = gym.make(settings.task)
    discounted = getattr(env.unwrapped, "cost_limit_discounted", False)
    env.close()
    return inspect.signature(ALGD).parameters["cost_gamma"].default if discounted else 1.0


class ModelSaver(BaseCallback):
    """
    Save the model when training has ended. It goes before the recorder, whose CSV says that there is nothing left to do.

    :param path: The file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self.model.save(self.path)


def make_recorder(run: Run, on_row: Callable[[Row], None]) -> LearningCurveRecorder:
    """:param run: The run. :param on_row: Called with each new row. :return: What writes its learning curve."""
    settings = run.settings
    return LearningCurveRecorder(
        run.csv,
        lambda n_envs: make_envs(settings.task, n_envs),
        eval_freq=settings.eval_every,
        n_episodes=settings.n_episodes,
        n_deterministic=settings.n_deterministic,
        seed=run.seed,
        cost_gamma=cost_gamma(settings),
        on_row=on_row,
    )


def train(run: Run) -> None:
    """:param run: The run to do, from start to end, in a process of its own."""
    # Two commands that were given at the same time must not write to one file
    lock = (run.folder / f".seed{run.seed}.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(SKIPPED)
    if run.csv.exists():
        return
    th.set_num_threads(1)
    settings = run.settings
    algorithm, policy, _ = ALGORITHMS[settings.algorithm]
    env = make_envs(settings.task, settings.n_envs, seed=run.seed)
    recorder = make_recorder(run, lambda row: print(f"{run.label}: {describe(row)}", flush=True))
    callbacks: list[BaseCallback] = [recorder]
    if run.save:
        callbacks.insert(0, ModelSaver(run.folder / f"seed{run.seed}.zip"))
    if settings.checkpoint_every is not None:
        callbacks.append(ResumableCheckpointCallback(settings.checkpoint_every, run.checkpoint))
    model: BaseAlgorithm
    if (run.checkpoint / MANIFEST).exists():
        assert issubclass(algorithm, ALGD)
        print(f"{run.label}: goes on from step {read_manifest(run.checkpoint)['num_timesteps']}", flush=True)
        model = resume(run.checkpoint, env, callbacks, device=settings.device, model_class=algorithm)
    else:
        model = algorithm(policy, env, seed=run.seed, device=settings.device, **settings.kwargs)
        if run.log:
            model.set_logger(configure(str(run.folder / f"seed{run.seed}_log"), ["csv"]))
        model.learn(settings.steps, callback=callbacks)
    env.close()
    shutil.rmtree(run.checkpoint, ignore_errors=True)


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
                process: BaseProcess = context.Process(target=train, args=(run,))
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


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """
    :param pairs: ``key=value`` each, the value in YAML, the key with dots for nested arguments.
    :return: The arguments, nested.
    """
    overrides: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator:
            raise SystemExit(f"--set {pair}: write key=value, for instance --set rho=0")
        *parents, last = key.split(".")
        target = overrides
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise SystemExit(f"--set {pair}: {parent} is {target} already, it has no {last}")
        # YAML takes 3e-4 for a string, because it has no dot
        parsed = yaml.safe_load(value)
        if isinstance(parsed, str):
            with contextlib.suppress(ValueError):
                parsed = float(parsed)
        target[last] = parsed
    return overrides


def merged(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """
    :param base: Arguments, maybe nested.
    :param overrides: Arguments that win.
    :return: Both together; the inputs stay as they are.
    """
    result = dict(base)
    for key, value in overrides.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if nested else value
    return result


def declared_limit(task: str, kwargs: dict[str, Any]) -> float | None:
    """
    :param task: Id of the task; one that does not exist ends the program before any run starts.
    :param kwargs: Arguments of the algorithm.
    :return: The cost limit that is in force, None if the task declares none.
    """
    try:
        env = gym.make(task)
    except gym.error.Error as error:
        raise SystemExit(f"Cannot make the task {task}: {error}") from error
    limit = kwargs.get("cost_limit")
    if limit is None:
        limit = getattr(env.unwrapped, "cost_limit", None)
    env.close()
    return None if limit is None else float(np.asarray(limit).item())


def defaults_in_force(algorithm: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    :param algorithm: A key of ``ALGORITHMS``.
    :param kwargs: Its arguments.
    :return: The arguments, also those of its policy and of the diffusion, that are left to their defaults, which may change
        from version to version.
    """
    model_class, alias, _ = ALGORITHMS[algorithm]
    policy_class = model_class.policy_aliases[alias]
    policy: dict[str, Any] = {}
    for base in policy_class.__mro__:
        policy = {**_simple_defaults(base), **policy}
        # Only what it hands on reaches the class that it extends
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in inspect.signature(base).parameters.values()):
            break
    if issubclass(policy_class, DiffusionPolicy):
        diffusion = kwargs.get("policy_kwargs", {}).get("diffusion", policy["diffusion"])
        # The policy gives it its own number of steps
        policy["diffusion_kwargs"] = _left_out(_simple_defaults(PROCESSES[diffusion]), policy)
    return _left_out({**_simple_defaults(model_class), "policy_kwargs": policy}, kwargs)


def _simple_defaults(made: type) -> dict[str, Any]:
    """:param made: A class. :return: The defaults of its arguments, those that YAML can hold and that matter to results."""
    parameters = inspect.signature(made).parameters.values()
    return {
        parameter.name: parameter.default
        for parameter in parameters
        if isinstance(parameter.default, (bool, int, float, str))
        and parameter.name not in ("verbose", "device", "_init_setup_model")
    }


def _left_out(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """:param defaults: All defaults, maybe nested. :param given: Arguments. :return: The defaults that are in force."""
    return {
        key: _left_out(default, given.get(key) or {}) if isinstance(default, dict) else default
        for key, default in defaults.items()
        if isinstance(default, dict) or key not in given
    }


def _flat(described: dict[str, Any]) -> dict[str, Any]:
    """Settings with all arguments in one place: it does not matter which of them are defaults today."""
    others = {key: value for key, value in described.items() if key not in ("kwargs", "defaults")}
    return {**others, **merged(described["defaults"], described["kwargs"])}


def prepare_folder(folder: Path, settings: Settings) -> None:
    """
    Write down what the runs in a folder have in common; runs with other settings must not be mixed with them.

    :param folder: The results folder of one task and one algorithm.
    :param settings: The settings of the runs.
    """
    path = folder / "settings.yaml"
    described = {
        **vars(settings),
        "defaults": defaults_in_force(settings.algorithm, settings.kwargs),
        "cost_limit": declared_limit(settings.task, settings.kwargs),
    }
    if path.exists():
        stored, now = _flat(yaml.safe_load(path.read_text())), _flat(described)
        # Of both: an argument that is given there only has a default now that is not listed
        keys = sorted((stored.keys() | now.keys()) - {"command"})
        differing = [key for key in keys if stored.get(key) != now.get(key)]
        if differing:
            changes = ", ".join(f"{key}: {stored.get(key)} there, {now.get(key)} now" for key in differing)
            raise SystemExit(
                f"{folder} holds runs with other settings ({changes}). Give this experiment another --name or --out."
            )
        return
    left = sorted(path.name for pattern in ("seed*.csv", "seed*_checkpoint") for path in folder.glob(pattern))
    if left:
        raise SystemExit(
            f"{folder} has {', '.join(left)}, but no settings.yaml to say what was run: move them away, or give another --out."
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**described, "command": " ".join(["python", *sys.argv])}, sort_keys=False))


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
            if not issubclass(ALGORITHMS[algorithm][0], ALGD):
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
            prepare_folder(folder, settings)
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
