"""
Draw return and cost of evaluations during training, with the limit.

    python -m sb3_algd.zoo plot_costs -a algd sac_lag -e Safexp-PointButton1-v0 -f logs -o costs.png
"""

import argparse
import importlib
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import rl_zoo3
from huggingface_sb3 import EnvironmentName
from stable_baselines3.common.save_util import load_from_zip_file

from sb3_algd.plotting import Curve, label_of, plot_learning_curves
from sb3_algd.zoo import ALGO


def read_evaluations(path: Path, constraint: int = 0) -> Curve:
    """
    :param path: An ``evaluations.npz`` that :class:`~sb3_algd.common.callbacks.CostEvalCallback` has left.
    :param constraint: Which cost, where there are several.
    :return: Steps, and mean and standard deviation of return and cost.
    :raises ValueError: If it has no costs, or no such one.
    """
    with np.load(path) as stored:
        if "costs" not in stored:
            raise ValueError(f"{path} holds no costs: only runs of algorithms with a cost limit leave them.")
        returns, costs = stored["results"], stored["costs"]
        n_constraints = costs.shape[2] if costs.ndim == 3 else 1
        if not 0 <= constraint < n_constraints:
            raise ValueError(f"{path} has {n_constraints} cost(s), counted from 0, and none of number {constraint}.")
        if costs.ndim == 3:
            costs = costs[:, :, constraint]
        curve = {"step": stored["timesteps"].astype(float)}
    for name, values in (("return", returns), ("cost", costs)):
        curve[f"{name}_mean"], curve[f"{name}_std"] = values.mean(axis=1), values.std(axis=1)
    return curve


def read_cost_limit(run: Path, constraint: int = 0) -> tuple[float | None, bool]:
    """
    :param run: Folder of a run.
    :param constraint: Which limit, where there are several.
    :return: The limit of the model that was trained, None if there is no model, and whether it is a discounted sum.
    """
    for path in sorted(run.glob("*.zip")):
        data, _, _ = load_from_zip_file(path, device="cpu")
        if data is not None and "cost_limit" in data:
            return float(np.atleast_1d(data["cost_limit"])[constraint]), bool(data.get("cost_limit_discounted", False))
    return None, False


def collect(folder: Path, env_id: str) -> list[Path]:
    """:param folder: Log folder of an algorithm. :param env_id: The task. :return: Folders of its runs that were evaluated."""
    return [path.parent for path in sorted(folder.glob(f"{EnvironmentName(env_id)}_[0-9]*/evaluations.npz"))]


def no_run(env_id: str, folders: Iterable[Path]) -> SystemExit:
    """:param env_id: A task. :param folders: Where no run of it was evaluated. :return: What to do, to be raised."""
    places = ", ".join(map(str, folders))
    return SystemExit(f"No evaluated run on {env_id} in {places}: name the log folder with -f and the algorithm with -a.")


def plot_costs() -> None:
    """Draw the figure that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-a", "--algos", help="Algorithms to include", nargs="+", choices=list(rl_zoo3.ALGOS), default=[ALGO])
    parser.add_argument("-e", "--env", help="Environment ID", required=True)
    parser.add_argument("-f", "--exp-folders", help="Folders to include", nargs="+", type=Path, default=[Path("logs")])
    parser.add_argument("-l", "--labels", help="Label for each algorithm in each folder", nargs="+", default=None)
    parser.add_argument("-o", "--output", help="The picture; its ending chooses the format", type=Path, default=None)
    parser.add_argument("--cost-limit", help="The limit that is drawn, by default that of the trained models", type=float)
    parser.add_argument("--constraint", help="Which cost, where there are several", type=int, default=0)
    args = parser.parse_args()
    names = {folder / algo: label_of(algo) for folder in args.exp_folders for algo in args.algos}
    labels = args.labels or [f"{name}, {path.parent}" if len(args.exp_folders) > 1 else name for path, name in names.items()]
    if len(labels) != len(names):
        parser.error(f"{len(labels)} labels for {len(names)} curves: give one label per folder, and per algorithm in it.")
    runs = {label: collect(path, args.env) for label, path in zip(labels, names, strict=True)}
    found = [run for label in runs for run in runs[label]]
    if not found:
        raise no_run(args.env, names)
    for path, label in zip(names, labels, strict=True):
        if not runs[label]:
            print(f"{label}: not drawn, because there is no evaluated run on {args.env} in {path}")
    curves = {label: [read_evaluations(run / "evaluations.npz", args.constraint) for run in runs[label]] for label in runs}
    limit, discounted = read_cost_limit(found[0], args.constraint)
    limit = limit if args.cost_limit is None else args.cost_limit
    for label, seeds in curves.items():
        ends = [curve["step"][-1] for curve in seeds]
        if len(set(ends)) > 1:
            print(f"{label}: drawn up to step {min(ends):.0f}, where its shortest run ends; the longest: {max(ends):.0f}")
    output = args.output or Path(f"{EnvironmentName(args.env)}.png")
    plot_learning_curves({label: seeds for label, seeds in curves.items() if seeds}, output, args.env, limit, discounted)
    print(f"Drawn from {len(found)} run(s): {output}")


def all_plots() -> None:
    """
    Run the Zoo's ``all_plots``, which would draw nothing and print zeros where there are no runs.

    :raises SystemExit: If a task has no evaluated run
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-a", "--algos", nargs="+", default=[])
    parser.add_argument("-e", "--env", nargs="+", default=[])
    parser.add_argument("-f", "--exp-folders", nargs="+", type=Path, default=[])
    given = parser.parse_known_args()[0]
    if not {"-h", "--help"} & set(sys.argv):
        paths = [folder / algo.lower() for folder in given.exp_folders for algo in given.algos]
        for env in given.env:
            # As the Zoo looks for them
            if not any(env in run.parent.name for path in paths for run in path.glob("*/evaluations.npz")):
                raise no_run(env, paths)
    importlib.import_module("rl_zoo3.plots").all_plots()


if __name__ == "__main__":
    plot_costs()
