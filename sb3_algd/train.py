"""
The first ten minutes: train ALGD on a safety task, and leave the model, its learning curve and a picture of it.

    python -m sb3_algd.train
    python -m sb3_algd.train --env SafetyPointGoal1-v0 --steps 100000 --minutes 600
"""

import argparse
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.utils import get_latest_run_id

from sb3_algd import ALGD, evaluate_policy
from sb3_algd.common.callbacks import StopTrainingOnTimeLimit
from sb3_algd.common.recorder import LearningCurveRecorder, describe, evaluation_seed, make_envs
from sb3_algd.plotting import plot_learning_curves, read_curve

# The networks are small: more threads than this wait for each other longer than they compute
MAX_THREADS = 4
N_FINAL_EPISODES = 20


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """:param arguments: Those of the command line if None. :return: What they say."""
    parser = argparse.ArgumentParser(
        prog="python -m sb3_algd.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env", default="Safexp-PointButton1-v0", help="Gymnasium id of the task")
    parser.add_argument("--diffusion", default="ve", choices=["ve", "ddpm"], help="type of the diffusion policy")
    parser.add_argument("--steps", type=int, default=8000, help="environment steps, unless time is up before")
    parser.add_argument("--minutes", type=float, default=8.5, help="time for training")
    parser.add_argument("--eval-every", type=int, default=1000, help="environment steps between two points of the curve")
    parser.add_argument("--seed", type=int, default=0)
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


def train(args: argparse.Namespace, folder: Path) -> ALGD:
    """
    Train until steps or time are used up; Ctrl-C ends training early and keeps what was learned.

    :param args: The options.
    :param folder: Where the model and the learning curve go.
    :return: The trained model.
    """
    env = make_envs(args.env, seed=args.seed)
    model = ALGD(
        "DiffusionPolicy",
        env,
        # The DDPM type soon is nearly deterministic: with 100 random steps it can get stuck before it has seen anything
        learning_starts=2000 if args.diffusion == "ddpm" else 100,
        policy_kwargs={"diffusion": args.diffusion},
        seed=args.seed,
        device=args.device,
    )
    recorder = LearningCurveRecorder(
        folder / "learning_curve.csv",
        lambda n_envs: make_envs(args.env, n_envs),
        eval_freq=args.eval_every,
        n_episodes=5,
        seed=args.seed,
        on_row=lambda row: print(describe(row), flush=True),
    )
    time_limit = StopTrainingOnTimeLimit(60 * args.minutes, verbose=1)
    try:
        model.learn(args.steps, callback=CallbackList([recorder, time_limit]), progress_bar=True)
    except KeyboardInterrupt:
        print("Interrupted: keeping what was learned so far")
        recorder.on_training_end()
    model.save(folder / "model")
    env.close()
    return model


def report(model: ALGD, env_id: str, seed: int) -> None:
    """
    Print return and cost of the trained model beside its limit.

    :param model: The model.
    :param env_id: The task.
    :param seed: Seed of the run.
    """
    limit = np.asarray(model.cost_limit).item()
    unit = "discounted cost" if model.cost_limit_discounted else "cost"
    print(f"\n{'':32}{'return':>16}{unit:>18}   limit {limit:g}")
    for deterministic, n_episodes in ((False, N_FINAL_EPISODES), (True, 1)):
        env = make_envs(env_id, n_episodes, seed=evaluation_seed(seed))
        mean_return, std_return, mean_cost, std_cost = evaluate_policy(model, env, n_episodes, deterministic, warn=False)
        env.close()
        name = f"{n_episodes} {'deterministic' if deterministic else 'stochastic'} episode{'s' * (n_episodes > 1)}"
        verdict = "within the limit" if mean_cost <= limit else "OVER the limit"
        print(f"{name:32}{mean_return:8.2f} ± {std_return:5.2f}{mean_cost:10.2f} ± {std_cost:5.2f}   {verdict}")


def main(arguments: Sequence[str] | None = None) -> None:
    """:param arguments: Those of the command line if None."""
    args = parse_arguments(arguments)
    # Asked now, not after minutes of training
    missing = [package for package in ("matplotlib", "rich", "tqdm") if importlib.util.find_spec(package) is None]
    if missing:
        raise SystemExit(f"This program also needs {' and '.join(missing)}. Install with: pip install {' '.join(missing)}")
    started = time.monotonic()
    th.set_num_threads(min(th.get_num_threads(), MAX_THREADS))
    folder = new_folder(args.out, args.env)
    print(f"Training ALGD on {args.env}: {args.steps} steps or {args.minutes:g} minutes, whichever comes first")
    model = train(args, folder)
    curve = read_curve(folder / "learning_curve.csv")
    title = f"ALGD ({args.diffusion}) on {args.env}, seed {args.seed}"
    plot_learning_curves({"ALGD": [curve]}, folder / "learning_curve.png", title, np.asarray(model.cost_limit).item())
    report(model, args.env, args.seed)
    print(
        f"\nAll in {(time.monotonic() - started) / 60:.1f} minutes. Left in {folder}: model.zip, learning_curve.csv and .png"
    )


if __name__ == "__main__":
    main()
