"""
Draw the figures and write the tables of what ``benchmarks/run.py`` has left.

    python benchmarks/plot.py [--tasks ...] [--algorithms ...] [--out docs/img]

For each task a figure of the algorithms and one of the experiments (runs with a ``--name`` of their own), those with
several seeds if there are such; on standard output one Markdown table of the last quarter of the evaluations and one of the
ends of the runs.

Statistics over seeds and evaluations, with a 95 % bootstrap interval: the interquartile mean of returns, and the mean of
costs, which the limit is about. Whole seeds are drawn, because the evaluations of one seed are alike; with three seeds the
interval is little more than the range of the seeds. With fewer than four values the interquartile mean is the mean.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import yaml
from run import ALGORITHMS, RESULTS
from scipy.stats import bootstrap, trim_mean  # type: ignore[import-untyped]

import sb3_algd.envs  # noqa: F401  registers the tasks
from sb3_algd.plotting import Curve, plot_learning_curves, read_curve

#: Share of the evaluations, the last ones, that the statistics are over
LAST = 0.25
N_RESAMPLES = 10_000
#: How the names of the navigation tasks begin, whose episodes never end early
NAVIGATION = ("Safexp-", "SafetyPoint", "SafetyCar")
STATISTICS = (
    "| task | algorithm | seeds | return, IQM | cost, mean | limit | evaluations within the limit "
    "| cost of a training episode | cost of the whole training |"
)
ENDS = "| task | algorithm | steps | return / cost, each seed | deterministic return / cost, each seed |"


def collect(results: Path, tasks: list[str], algorithms: list[str]) -> dict[str, dict[str, list[Curve]]]:
    """
    :param results: The results folder.
    :param tasks: The tasks to take, all if empty.
    :param algorithms: The algorithms or experiments to take, all if empty.
    :return: For each task and algorithm the curves of its finished runs.
    """
    found: dict[str, dict[str, list[Curve]]] = {}
    for path in sorted(results.glob("*/*/seed*.csv")):
        task, algorithm = path.parts[-3:-1]
        if (not tasks or task in tasks) and (not algorithms or algorithm in algorithms):
            found.setdefault(task, {}).setdefault(algorithm, []).append(read_curve(path))
    return found


def last_quarter(curves: list[Curve], column: str) -> np.ndarray:
    """
    :param curves: The runs of one algorithm.
    :param column: A column.
    :return: Its last values, shape (seeds, evaluations).
    """
    n_last = math.ceil(LAST * min(len(curve[column]) for curve in curves))
    return np.stack([curve[column][-n_last:] for curve in curves])


def with_interval(values: np.ndarray, trimmed: float) -> str:
    """
    :param values: Shape (seeds, evaluations).
    :param trimmed: Share of the values that is left out at either end, 0.25 for the interquartile mean.
    :return: Mean of the others, and its interval if there are several seeds.
    """
    mean = f"{trim_mean(values.ravel(), trimmed):.1f}"
    if len(values) == 1:
        return mean
    low, high = bootstrap(
        (np.arange(len(values)),),
        lambda seeds: trim_mean(values[seeds].ravel(), trimmed),
        n_resamples=N_RESAMPLES,
        vectorized=False,
        method="percentile",
        rng=0,
    ).confidence_interval
    return f"{mean} [{low:.1f}, {high:.1f}]"


def total_training_cost(task: str, curves: list[Curve], settings: dict[str, Any]) -> str:
    """
    :param task: The task.
    :param curves: Its runs with one algorithm.
    :param settings: Their settings.
    :return: Mean over the seeds of the sum of all costs during training, where the curves tell it: in tasks whose costs are
        plain sums over episodes of fixed length.
    """
    spec = gym.spec(task)
    discounted = settings["kwargs"].get("cost_limit_discounted", False)
    if not task.startswith(NAVIGATION) or discounted or spec.max_episode_steps is None:
        return ""
    n_episodes = settings["steps"] / spec.max_episode_steps
    return f"{n_episodes * np.mean([np.nanmean(curve['train_cost']) for curve in curves]):,.0f}"


def statistics_row(task: str, algorithm: str, curves: list[Curve], settings: dict[str, Any]) -> str:
    """
    :param task: The task.
    :param algorithm: The algorithm or experiment.
    :param curves: Its runs.
    :param settings: Their settings.
    :return: A row of the table of statistics.
    """
    costs, limit = last_quarter(curves, "cost_mean"), settings["cost_limit"]
    cells = [
        task,
        algorithm,
        str(len(curves)),
        with_interval(last_quarter(curves, "return_mean"), 0.25),
        with_interval(costs, 0.0),
        "" if limit is None else f"{limit:g}",
        "" if limit is None else f"{np.sum(costs <= limit)} of {costs.size}",
        f"{np.mean([np.nanmean(curve['train_cost']) for curve in curves]):.1f}",
        total_training_cost(task, curves, settings),
    ]
    return f"| {' | '.join(cells)} |"


def ends_row(task: str, algorithm: str, curves: list[Curve]) -> str:
    """
    :param task: The task.
    :param algorithm: The algorithm or experiment.
    :param curves: Its runs.
    :return: A row of the table of the ends of the runs.
    """

    def ends(kind: str) -> str:
        return ", ".join(f"{curve[f'return_{kind}'][-1]:.1f} / {curve[f'cost_{kind}'][-1]:.1f}" for curve in curves)

    steps = sorted({int(curve["step"][-1]) for curve in curves})
    cells = [task, algorithm, " to ".join(f"{step:,}" for step in sorted({steps[0], steps[-1]})), ends("mean"), ends("det")]
    return f"| {' | '.join(cells)} |"


def print_table(header: str, rows: list[str]) -> None:
    """:param header: Names of the columns. :param rows: The rows."""
    print("\n".join([header, "|" + " --- |" * (header.count("|") - 1), *rows]))


def main() -> None:
    """Draw the figures and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tasks", nargs="+", default=[], help="all if left out")
    parser.add_argument("--algorithms", nargs="+", default=[], help="algorithms or experiments, all if left out")
    parser.add_argument("--out", type=Path, default=Path("docs/img"), help="where the figures go")
    args = parser.parse_args()
    found = collect(args.results, args.tasks, args.algorithms)
    if not found:
        sys.exit(f"No finished runs in {args.results}: make some with benchmarks/run.py")
    args.out.mkdir(parents=True, exist_ok=True)
    statistics, ends = [], []
    for task, algorithms in found.items():
        limits = {}
        # In the order of ALGORITHMS, experiments after them
        ordered = [*filter(algorithms.__contains__, ALGORITHMS), *sorted(algorithms.keys() - ALGORITHMS.keys())]
        for algorithm in ordered:
            settings = yaml.safe_load((args.results / task / algorithm / "settings.yaml").read_text())
            limits[algorithm] = settings["cost_limit"]
            statistics.append(statistics_row(task, algorithm, algorithms[algorithm], settings))
            ends.append(ends_row(task, algorithm, algorithms[algorithm]))
        experiments = [name for name in ordered if name not in ALGORITHMS]
        # A single run among averages says little and hides much; it is in the tables
        several = [name for name in experiments if len(algorithms[name]) > 1]
        for kind, chosen in (
            ("", [name for name in ordered if name in ALGORITHMS]),
            ("-experiments", several or experiments),
        ):
            # Experiments may differ in their limit; then no single line can be drawn
            limit = limits[chosen[0]] if len({limits[name] for name in chosen}) == 1 else None
            if chosen:
                curves = {name: algorithms[name] for name in chosen}
                plot_learning_curves(curves, args.out / f"{task}{kind}.png", task, limit)
    print(f"Last {LAST:.0%} of the evaluations, stochastic actions: interquartile mean or mean [95 % interval]\n")
    print_table(STATISTICS, statistics)
    print("\nLast evaluation\n")
    print_table(ENDS, ends)


if __name__ == "__main__":
    main()
