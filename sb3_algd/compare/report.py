"""One figure and one table of the runs on a task."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sb3_algd.common.verdict import OVER, UNDECIDED, WITHIN, constraint_verdict
from sb3_algd.compare.settings import Run
from sb3_algd.plotting import label_of, plot_learning_curves, plot_return_against_cost, read_curve

COLUMNS = ("algorithm", "seeds", "return", "cost (95 % interval)", "limit", "verdict", "each seed")
#: Of each figure one for screens and one for print
FORMATS = ("png", "svg")


def read_episodes(run: Run) -> np.ndarray:
    """:param run: A finished run. :return: Return and cost of the episodes of its last evaluation, shape (n_episodes, 2)."""
    return np.atleast_2d(np.loadtxt(run.episodes, delimiter=",", skiprows=1))


def table_row(name: str, runs: Sequence[Run], limit: float) -> tuple[str, ...]:
    """
    :param name: Name of the algorithm.
    :param runs: Its finished runs, one at least.
    :param limit: The cost limit.
    :return: The cells below :data:`COLUMNS`.
    """
    episodes = [read_episodes(run) for run in runs]
    returns = [values[:, 0].mean() for values in episodes]
    verdict = constraint_verdict(np.concatenate([values[:, 1] for values in episodes]), limit)
    each = [constraint_verdict(values[:, 1], limit).outcome for values in episodes]
    counts = ((each.count(outcome), outcome.removesuffix(" the limit")) for outcome in (WITHIN, OVER, UNDECIDED))
    return (
        label_of(name),
        ", ".join(str(run.seed) for run in runs),
        f"{np.mean(returns):.2f}" + (f" ± {np.std(returns):.2f}" if len(returns) > 1 else ""),
        f"{verdict.mean.item():.2f} ({verdict.lower.item():.2f} to {verdict.upper.item():.2f})",
        f"{limit:g}",
        verdict.outcome,
        ", ".join(f"{count} {outcome}" for count, outcome in counts if count > 0),
    )


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """:param rows: Rows below :data:`COLUMNS`. :return: A Markdown table whose columns are aligned."""
    cells = [COLUMNS, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in cells]
    lines.insert(1, f"| {' | '.join('-' * width for width in widths)} |")
    return "\n".join(lines)


def write_report(task: str, runs: Mapping[str, Sequence[Run]], limit: float, discounted: bool, folder: Path) -> str:
    """
    Draw ``comparison`` and ``plane``, each as ``.png`` and ``.svg``, and write ``comparison.md``.

    :param task: The task.
    :param runs: For each algorithm its runs; those that are not finished are left out.
    :param limit: The cost limit.
    :param discounted: Whether costs are discounted sums.
    :param folder: Where the files go.
    :return: The table.
    """
    finished = {name: [run for run in of_one if run.csv.exists()] for name, of_one in runs.items()}
    finished = {name: of_one for name, of_one in finished.items() if of_one}
    text = table([table_row(name, of_one, limit) for name, of_one in finished.items()])
    n_episodes = next(iter(finished.values()))[0].settings.n_episodes
    unit = "discounted cost" if discounted else "cost"
    note = (
        f"Return and {unit} per episode of the trained models: {n_episodes} stochastic episodes of each seed. The return is "
        "the mean over seeds ± their standard deviation. The verdict is about all episodes of an algorithm."
    )
    (folder / "comparison.md").write_text(f"# {task}\n\n{text}\n\n{note}\n", encoding="utf-8")
    curves = {name: [read_curve(run.csv) for run in of_one] for name, of_one in finished.items()}
    ends = {name: [tuple(read_episodes(run).mean(axis=0).tolist()) for run in of_one] for name, of_one in finished.items()}
    for ending in FORMATS:
        plot_learning_curves(curves, folder / f"comparison.{ending}", task, limit, discounted)
        plot_return_against_cost(ends, folder / f"plane.{ending}", task, limit, discounted)
    return text
