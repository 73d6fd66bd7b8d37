"""
The first ten minutes: train ALGD on a safety task, and leave the model, its learning curve and a picture of it.

    python -m sb3_algd.train
    python -m sb3_algd.train --env SafetyPointGoal1-v0 --steps 100000 --minutes 600

:func:`train` is one training run with its learning curve; the benchmarks are made of it too.
"""

import argparse
import contextlib
import copy
import importlib.util
import os
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import get_latest_run_id

from sb3_algd import ALGD, SACLag
from sb3_algd.algd.diffusion import PROCESSES
from sb3_algd.common.callbacks import StopTrainingOnTimeLimit
from sb3_algd.common.checkpoint import ResumableCheckpointCallback, resume
from sb3_algd.common.checkpoint_files import MANIFEST, read_manifest
from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm
from sb3_algd.common.cost_aware_algorithm import CostAwareAlgorithm
from sb3_algd.common.evaluation import describe_evaluation
from sb3_algd.common.mistakes import one_line, told_in_one_line
from sb3_algd.common.recorder import LearningCurveRecorder, Row, describe, evaluation_seed, make_envs
from sb3_algd.plotting import plot_learning_curves, read_curve

N_FINAL_EPISODES = 50
#: Episodes of an evaluation while training
N_EPISODES = 20
#: A model counts as feasible where its cost is within the limit by so many standard errors: 95 %, one-sided
CONFIDENCE = 1.645
#: File of the best feasible model
BEST = "best_model.zip"
#: Class and policy of each algorithm
ALGORITHMS: dict[str, tuple[type[CostAwareAlgorithm], str]] = {
    "algd": (ALGD, "DiffusionPolicy"),
    "sac_lag": (SACLag, "MlpPolicy"),
}


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


def train(
    model_class: type[BaseAlgorithm],
    policy: str,
    task: str,
    curve: Path,
    steps: int,
    model_kwargs: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    device: str = "auto",
    n_envs: int = 1,
    eval_every: int = 2000,
    n_episodes: int = 20,
    n_deterministic: int = 1,
    cost_gamma: float | None = None,
    on_row: Callable[[BaseAlgorithm, Row], None] | None = None,
    minutes: float | None = None,
    model_path: Path | None = None,
    log_folder: Path | None = None,
    episodes_path: Path | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int | None = None,
    progress_bar: bool = False,
    keep_interrupted: bool = False,
) -> BaseAlgorithm:
    """
    One training run with its learning curve, of any of SB3's algorithms.

    :param model_class: The algorithm
    :param policy: Name of its policy
    :param task: Gymnasium id
    :param curve: CSV file of the learning curve, which is there when training has ended
    :param steps: Environment steps
    :param model_kwargs: Further arguments of the algorithm
    :param seed: Seed of the model, the environments and the evaluations
    :param device: Device of the model
    :param n_envs: Number of training environments
    :param eval_every: Environment steps between two points of the curve
    :param n_episodes: Stochastic episodes of an evaluation
    :param n_deterministic: Deterministic episodes of an evaluation
    :param cost_gamma: Discount factor of evaluated costs. None for the unit of the model's limit
    :param on_row: Called with the model and each new row of the curve
    :param minutes: Time after which training ends in any case. None for no such limit
    :param model_path: Where the model is saved when training has ended. None for nowhere
    :param log_folder: Where everything that the algorithm logs is kept, as CSV. None for nowhere
    :param episodes_path: Where return and cost of each episode of the last evaluation are kept, as CSV. None for nowhere
    :param checkpoint: Folder of a checkpoint. If an interrupted run has left one there this run goes on from it; it is removed
        at the end
    :param checkpoint_every: Environment steps between checkpoints. None for none
    :param progress_bar: Whether a progress bar is shown
    :param keep_interrupted: Whether Ctrl-C ends training early and keeps what was learned, instead of ending the program
    :return: The trained model
    """
    env = make_envs(task, n_envs, seed=seed)
    callbacks: list[BaseCallback] = [] if model_path is None else [ModelSaver(model_path)]
    recorder = LearningCurveRecorder(
        curve,
        lambda n: make_envs(task, n),
        eval_freq=eval_every,
        n_episodes=n_episodes,
        n_deterministic=n_deterministic,
        seed=seed,
        cost_gamma=cost_gamma,
        on_row=None if on_row is None else lambda row: on_row(recorder.model, row),
        episodes_path=episodes_path,
    )
    callbacks.append(recorder)
    if minutes is not None:
        callbacks.append(StopTrainingOnTimeLimit(60 * minutes, verbose=1))
    if checkpoint is not None and checkpoint_every is not None:
        callbacks.append(ResumableCheckpointCallback(checkpoint_every, checkpoint))
    model: BaseAlgorithm
    if checkpoint is not None and (checkpoint / MANIFEST).exists():
        print(f"{curve}: goes on from step {read_manifest(checkpoint)['num_timesteps']}", flush=True)
        assert issubclass(model_class, ConstrainedOffPolicyAlgorithm)
        model = resume(checkpoint, env, callbacks, progress_bar=progress_bar, device=device, model_class=model_class)
    else:
        model = model_class(policy, env, seed=seed, device=device, **(model_kwargs or {}))
        if log_folder is not None:
            model.set_logger(configure(str(log_folder), ["csv"]))
        try:
            model.learn(steps, callback=CallbackList(callbacks), progress_bar=progress_bar)
        except KeyboardInterrupt:
            if not keep_interrupted:
                raise
            print("Interrupted: keeping what was learned so far")
            for callback in callbacks:
                callback.on_training_end()
    env.close()
    if checkpoint is not None:
        shutil.rmtree(checkpoint, ignore_errors=True)
    return model


def at_least(lowest: float) -> Callable[[str], float]:
    """:param lowest: A number, whole if only whole ones are allowed. :return: Reads one from the command line."""

    def read(text: str) -> float:
        value = type(lowest)(text)
        if not lowest <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be at least {lowest:g}, got {text}")
        return value

    # argparse names it where a text is no number
    read.__name__ = "whole number" if isinstance(lowest, int) else "number"
    return read


def refuse_device(device: str) -> None:
    """
    Refuse a device that is not there, in whose place Stable-Baselines3 would take the CPU without a word.

    :param device: Name of a device
    :raises SystemExit: If it is not there
    """
    try:
        kind = "auto" if device == "auto" else th.device(device).type
    except RuntimeError:
        raise SystemExit(f"There is no device {device!r}: give auto, cpu or cuda.") from None
    if kind == "cuda" and not th.cuda.is_available():
        raise SystemExit(f"--device {device}: PyTorch finds no CUDA device here. Leave the option out to train on the CPU.")


def refuse_arguments(
    model_class: type[BaseAlgorithm], policy: str, task: str, model_kwargs: dict[str, Any], device: str = "auto"
) -> None:
    """
    Build a model without training it, so that a mistake is told before anything starts.

    :param model_class: The algorithm
    :param policy: Name of its policy
    :param task: Gymnasium id
    :param model_kwargs: Further arguments of the algorithm
    :param device: Device of the model
    :raises SystemExit: If there can be no such model
    """
    with told_in_one_line(f"{model_class.__name__} on {task}"), warnings.catch_warnings():
        # The run itself warns
        warnings.simplefilter("ignore")
        with contextlib.closing(make_envs(task, 1)) as env:
            # SAC writes into its policy_kwargs
            model_class(policy, env, seed=0, device=device, **copy.deepcopy(model_kwargs))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """:param arguments: Those of the command line if None. :return: What they say."""
    parser = argparse.ArgumentParser(
        prog="python -m sb3_algd.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", default="Safexp-PointButton1-v0", help="Gymnasium id of the task")
    parser.add_argument("--algo", default="algd", choices=list(ALGORITHMS), help="the algorithm")
    parser.add_argument("--diffusion", default="ve", choices=list(PROCESSES), help="type of ALGD's policy")
    parser.add_argument("--steps", type=at_least(1), default=20_000, help="environment steps, unless time is up before")
    parser.add_argument("--minutes", type=at_least(0.0), default=8.5, help="time for training")
    parser.add_argument(
        "--eval-every", type=at_least(1), default=1000, help="environment steps between two points of the curve"
    )
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="the results go into a new folder in here")
    return parser.parse_args(arguments)


def new_folder(parent: Path, env_id: str) -> Path:
    """
    :param parent: Where the results of all runs are.
    :param env_id: The task.
    :return: A new folder with the next free number.
    """
    folder = parent / f"{env_id}_{get_latest_run_id(str(parent), env_id) + 1}"
    folder.mkdir(parents=True)
    return folder


def model_kwargs_of(args: argparse.Namespace) -> dict[str, Any]:
    """:param args: The options. :return: Arguments of the algorithm."""
    if args.algo != "algd":
        return {}
    # The DDPM type soon is nearly deterministic: with 100 random steps it can get stuck before it has seen anything
    return {"policy_kwargs": {"diffusion": args.diffusion}, "learning_starts": 2000 if args.diffusion == "ddpm" else 100}


def train_as_asked(args: argparse.Namespace, folder: Path) -> CostAwareAlgorithm:
    """
    Train until steps or time are used up; Ctrl-C ends training early and keeps what was learned.

    :param args: The options.
    :param folder: Where the model and the learning curve go.
    :return: The trained model.
    """
    model_class, policy = ALGORITHMS[args.algo]
    keep_best = BestFeasible(folder / BEST)

    def on_row(model: BaseAlgorithm, row: Row) -> None:
        print(describe(row), flush=True)
        keep_best(model, row)

    model = train(
        model_class,
        policy,
        args.env,
        folder / "learning_curve.csv",
        args.steps,
        model_kwargs_of(args),
        seed=args.seed,
        device=args.device,
        eval_every=args.eval_every,
        n_episodes=N_EPISODES,
        on_row=on_row,
        minutes=args.minutes,
        model_path=folder / "model.zip",
        progress_bar=True,
        keep_interrupted=True,
    )
    assert isinstance(model, CostAwareAlgorithm)
    return model


class BestFeasible:
    """
    Keeps the model of the evaluation with the highest return among those that are within the limit with 95 % confidence: the
    best of many evaluations is a lucky one.

    :param path: The file of the model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best_return = -np.inf

    def __call__(self, model: BaseAlgorithm, row: Row) -> None:
        """:param model: The model. :param row: Its evaluation."""
        assert isinstance(model, CostAwareAlgorithm)
        bound = row["cost_mean"] + CONFIDENCE * row["cost_std"] / np.sqrt(N_EPISODES)
        if bound <= np.asarray(model.cost_limit).item() and row["return_mean"] > self.best_return:
            self.best_return = row["return_mean"]
            model.save(self.path)


def report(model: CostAwareAlgorithm, env_id: str, seed: int, best: Path) -> None:
    """
    Print return and cost of the trained model, and of the best feasible one, beside the limit.

    :param model: The model.
    :param env_id: The task.
    :param seed: Seed of the run.
    :param best: File of the best feasible model, which may be missing.
    """
    models: dict[str, tuple[Any, tuple[bool, ...]]] = {"Last model": (model, (False, True))}
    if best.is_file():
        models["Best feasible model"] = (type(model).load(best, device=model.device, buffer_size=1), (False,))
    print()
    for name, (candidate, kinds) in models.items():
        for deterministic in kinds:
            n_episodes = 1 if deterministic else N_FINAL_EPISODES
            env = make_envs(env_id, n_episodes, seed=evaluation_seed(seed))
            print(describe_evaluation(name, candidate, env, n_episodes, deterministic))
            env.close()
    if not best.is_file():
        print("No evaluation was within the limit with 95 % confidence: there is no best feasible model.")


def main(arguments: Sequence[str] | None = None) -> None:
    """:param arguments: Those of the command line if None."""
    args = parse_arguments(arguments)
    # Asked now, not after minutes of training
    missing = [package for package in ("matplotlib", "rich", "tqdm") if importlib.util.find_spec(package) is None]
    if missing:
        raise SystemExit(f"This program also needs {' and '.join(missing)}. Install with: pip install {' '.join(missing)}")
    refuse_device(args.device)
    try:
        gym.spec(args.env)
    except (gym.error.Error, ImportError, ValueError) as error:
        raise SystemExit(f"--env {args.env}: {one_line(error)}") from None
    refuse_arguments(*ALGORITHMS[args.algo], args.env, model_kwargs_of(args), args.device)
    started = time.monotonic()
    # The networks are small. A second thread gains a third on an idle machine; beside another busy process, threads that wait
    # for each other bring training to a halt
    if "OMP_NUM_THREADS" not in os.environ:
        th.set_num_threads(1)
    with told_in_one_line(f"--out {args.out}", "Name a folder that can be written to."):
        folder = new_folder(args.out, args.env)
    name = ALGORITHMS[args.algo][0].__name__
    print(f"Training {name} on {args.env}: {args.steps} steps or {args.minutes:g} minutes, whichever comes first")
    try:
        model = train_as_asked(args, folder)
    finally:
        # Where nothing was left
        with contextlib.suppress(OSError):
            folder.rmdir()
    curve = read_curve(folder / "learning_curve.csv")
    described = f"{name} ({args.diffusion.upper()})" if args.algo == "algd" else name
    title = f"{described} on {args.env}, seed {args.seed}"
    limit = np.asarray(model.cost_limit).item()
    plot_learning_curves({described: [curve]}, folder / "learning_curve.png", title, limit, bool(model.cost_limit_discounted))
    report(model, args.env, args.seed, folder / BEST)
    print(
        f"\nAll in {(time.monotonic() - started) / 60:.1f} minutes. Left in {folder}: model.zip, {BEST} (if there is one),"
        " learning_curve.csv and .png"
    )


if __name__ == "__main__":
    main()
