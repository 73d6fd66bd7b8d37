"""
Draw the figures and write the table of what ``benchmarks/run.py`` has left.

    python benchmarks/plot.py [--tasks ...] [--algorithms ...] [--out docs/img]

One figure per task, and on standard output one Markdown table.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sb3_algd.plotting import Curve, plot_learning_curves, read_curve

RESULTS = Path(__file__).parent / "results"
#: Share of the evaluations, the last ones, over which the table averages
LAST = 0.25
HEADER = (
    "| task | algorithm | seeds | steps | return, last quarter | cost, last quarter | limit | return, end | cost, end "
    "| deterministic return / cost, end | training cost | steps / s |"
)


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


def over_seeds(values: list[float]) -> str:
    """:param values: One per seed. :return: Their mean, and the lowest and highest."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{np.mean(values):.1f} [{min(values):.1f}, {max(values):.1f}]"


def table_row(task: str, algorithm: str, curves: list[Curve], limit: float | None) -> str:
    """
    :param task: The task.
    :param algorithm: The algorithm.
    :param curves: Its runs.
    :param limit: The cost limit.
    :return: A row of the Markdown table.
    """

    def last(column: str) -> str:
        return over_seeds([float(np.mean(curve[column][-max(1, round(LAST * len(curve[column]))) :])) for curve in curves])

    def end(column: str) -> str:
        return over_seeds([float(curve[column][-1]) for curve in curves])

    steps = sorted({int(curve["step"][-1]) for curve in curves})
    cells = [
        task,
        algorithm,
        str(len(curves)),
        " to ".join(f"{step:,}" for step in sorted({steps[0], steps[-1]})),
        last("return_mean"),
        last("cost_mean"),
        "" if limit is None else f"{limit:g}",
        end("return_mean"),
        end("cost_mean"),
        f"{end('return_det')} / {end('cost_det')}",
        over_seeds([float(np.nanmean(curve["train_cost"])) for curve in curves]),
        over_seeds([float(curve["step"][-1] / curve["seconds"][-1]) for curve in curves]),
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Draw the figures and print the table."""
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
    print(HEADER)
    print("|" + " --- |" * (HEADER.count("|") - 1))
    for task, algorithms in found.items():
        limits = []
        for algorithm, curves in algorithms.items():
            settings: dict[str, Any] = yaml.safe_load((args.results / task / algorithm / "settings.yaml").read_text())
            limits.append(settings["cost_limit"])
            print(table_row(task, algorithm, curves, limits[-1]))
        # Experiments may differ in their limit; then no single line can be drawn
        limit = limits[0] if len(set(limits)) == 1 else None
        plot_learning_curves(algorithms, args.out / f"{task}.png", task, limit)
    print("\nMean over the seeds [lowest, highest]; stochastic actions unless it says deterministic.")


if __name__ == "__main__":
    main()
