"""
Draw the figures and write the tables of what ``benchmarks.run`` has left.

    python -m benchmarks.plot [--tasks ...] [--algorithms ...] [--out docs/img] [--page docs/results.md]

For each task a figure of the algorithms and one of the experiments (runs with a ``--name`` of their own), those with
several seeds if there are such. On standard output, for either of them, one Markdown table of the last quarter of the
evaluations and one of the ends of the runs. With ``--page`` these tables also replace those of a Markdown page, each under
its marker ``<!-- table: <heading> -->``; a table that has no marker there is named. One more table compares ALGD on all
tasks with the best of the others that keep the limit on average, and one has what ``benchmarks.calibration`` has left.

Statistics over seeds and evaluations, with a 95 % bootstrap interval: the interquartile mean of returns, and the mean of
costs, which the limit is about. Whole seeds are drawn, because the evaluations of one seed are alike; with three seeds the
interval is little more than the range of the seeds. With fewer than four values the interquartile mean is the mean. The
cost of a training episode is a mean over the spans between evaluations, in each of which as many steps are made: where
episodes end early, those of spans with many of them count for less.
"""

import argparse
import math
import re
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import yaml
from scipy.stats import bootstrap, trim_mean  # type: ignore[import-untyped]

import sb3_algd.envs  # noqa: F401  registers the tasks
from benchmarks.calibration import FILE, read_lines
from benchmarks.settings import ALGORITHMS, RESULTS
from sb3_algd.plotting import MAX_CURVES, Curve, plot_learning_curves, plot_return_against_cost, read_curve

#: The curves of one algorithm's runs, by their seeds in ascending order
Runs = dict[int, Curve]

#: Share of the evaluations, the last ones, that the statistics are over
LAST = 0.25
N_RESAMPLES = 10_000
#: Of each figure one for screens and one for print
FORMATS = ("png", "svg")
#: In the tables only, where a figure would have too many curves
LEFT_OUT = ("algd-ve-plain",)
#: How the names of the navigation tasks begin, whose episodes never end early
NAVIGATION = ("Safexp-", "SafetyPoint", "SafetyCar")
STATISTICS = (
    "| algorithm | seeds | return, IQM | cost, mean | limit | evaluations within the limit "
    "| cost of a training episode | cost of the whole training |"
)
#: Tasks that have another table of where ALGD stands
OWN_TABLE = ("TwoModes-v0",)
#: ALGD's types and settings, a column for each
VARIANTS = ("algd-ve", "algd-pointwise", "algd-ddpm")
STANDING = f"| task | limit | {' | '.join(VARIANTS)} | best other with the constraint | best without it |"
#: What ALGD is compared with in its last two columns
OTHERS = (("algd-ve-plain", "sac-pointwise", "sac-lagrangian"), ("sac", "tqc"))
CALIBRATION = (
    "| task | algorithm | seeds | budget | expected by the cost critics, each seed | risk in the energy, each seed "
    "| paid ± standard error, each seed |"
)
ENDS = "| algorithm | steps | return / cost, each seed | deterministic return / cost, each seed |"


def collect(results: Path, tasks: list[str], algorithms: list[str]) -> dict[str, dict[str, Runs]]:
    """
    :param results: The results folder.
    :param tasks: The tasks to take, all if empty.
    :param algorithms: The algorithms or experiments to take, all if empty.
    :return: For each task and algorithm its finished runs.
    """
    found: dict[str, dict[str, Runs]] = {}
    seeds = {path: int(path.stem.removeprefix("seed")) for path in results.glob("*/*/seed*.csv")}
    for path in sorted(seeds, key=lambda path: (path.parent, seeds[path])):
        task, algorithm = path.parts[-3:-1]
        if (not tasks or task in tasks) and (not algorithms or algorithm in algorithms):
            found.setdefault(task, {}).setdefault(algorithm, {})[seeds[path]] = read_curve(path)
    return found


def last_quarter(runs: Runs, column: str) -> np.ndarray:
    """
    :param runs: The runs of one algorithm.
    :param column: A column.
    :return: Its last values, shape (seeds, evaluations).
    """
    values = np.stack([curve[column] for curve in runs.values()])
    return values[:, -math.ceil(LAST * values.shape[1]) :]


def with_interval(values: np.ndarray, trimmed: float) -> str:
    """
    :param values: Shape (seeds, evaluations).
    :param trimmed: Share of the values that is left out at either end, 0.25 for the interquartile mean.
    :return: Mean of the others, and its interval if there are several seeds.
    """
    mean = f"{trim_mean(values.ravel(), trimmed):.1f}"
    if len(values) == 1:
        return mean

    def statistic(seeds: np.ndarray, axis: int) -> np.ndarray:
        drawn = values[np.moveaxis(seeds, axis, -1)]
        return np.asarray(trim_mean(drawn.reshape(*drawn.shape[:-2], -1), trimmed, axis=-1))

    low, high = bootstrap(
        (np.arange(len(values)),), statistic, n_resamples=N_RESAMPLES, vectorized=True, method="percentile", rng=0
    ).confidence_interval
    return f"{mean} [{low:.1f}, {high:.1f}]"


def training_cost(runs: Runs) -> float:
    """
    :param runs: The runs of one algorithm.
    :return: Mean cost of a training episode, first over those that ended between two evaluations, then over these spans and
        the seeds; not a number if no episode ended in one of them.
    """
    return float(np.mean([curve["train_cost"] for curve in runs.values()]))


def total_training_cost(task: str, runs: Runs, settings: dict[str, Any]) -> str:
    """
    :param task: The task.
    :param runs: Its runs with one algorithm.
    :param settings: Their settings.
    :return: Mean over the seeds of the sum of all costs during training, where the curves tell it: in tasks whose costs are
        plain sums over episodes of fixed length.
    """
    spec = gym.spec(task)
    discounted = settings["kwargs"].get("cost_limit_discounted", False)
    if not task.startswith(NAVIGATION) or discounted or spec.max_episode_steps is None:
        return ""
    n_episodes = settings["steps"] / spec.max_episode_steps
    return f"{n_episodes * training_cost(runs):,.0f}"


def statistics_row(task: str, algorithm: str, runs: Runs, settings: dict[str, Any]) -> str:
    """
    :param task: The task.
    :param algorithm: The algorithm or experiment.
    :param runs: Its runs.
    :param settings: Their settings.
    :return: A row of the table of statistics.
    """
    costs, limit = last_quarter(runs, "cost_mean"), settings["cost_limit"]
    cells = [
        algorithm,
        ", ".join(map(str, runs)),
        with_interval(last_quarter(runs, "return_mean"), 0.25),
        with_interval(costs, 0.0),
        "" if limit is None else f"{limit:g}",
        "" if limit is None else f"{np.sum(costs <= limit)} of {costs.size}",
        f"{training_cost(runs):.1f}",
        total_training_cost(task, runs, settings),
    ]
    return f"| {' | '.join(cells)} |"


def standing(runs: Runs, limit: float) -> str:
    """
    :param runs: The runs of one algorithm.
    :param limit: The cost limit.
    :return: Return / cost of the last quarter, and with how many seeds the latter is within the limit.
    """
    costs = last_quarter(runs, "cost_mean")
    value = trim_mean(last_quarter(runs, "return_mean").ravel(), 0.25)
    return f"{value:.1f} / {costs.mean():.1f} ({np.sum(costs.mean(axis=1) <= limit)} of {len(costs)})"


def standing_row(task: str, algorithms: dict[str, Runs], limit: float) -> str:
    """
    :param task: The task.
    :param algorithms: For each algorithm its runs.
    :param limit: The cost limit.
    :return: A row of the table that compares ALGD with the best of the others that are within the limit on average.
    """
    cells = [task, f"{limit:g}"]
    cells += [standing(algorithms[name], limit) if name in algorithms else "" for name in VARIANTS]
    for group in OTHERS:
        run = [name for name in group if name in algorithms]
        within = [name for name in run if last_quarter(algorithms[name], "cost_mean").mean() <= limit]
        values = {name: trim_mean(last_quarter(algorithms[name], "return_mean").ravel(), 0.25) for name in within}
        best = max(values, key=lambda name: values[name], default=None)
        cells.append(f"{best}: {standing(algorithms[best], limit)}" if best else "none within it" if run else "")
    return f"| {' | '.join(cells)} |"


def ends_row(algorithm: str, runs: Runs) -> str:
    """
    :param algorithm: The algorithm or experiment.
    :param runs: Its runs.
    :return: A row of the table of the ends of the runs.
    """

    curves = list(runs.values())

    def ends(kind: str) -> str:
        return ", ".join(f"{curve[f'return_{kind}'][-1]:.1f} / {curve[f'cost_{kind}'][-1]:.1f}" for curve in curves)

    cells = [algorithm, f"{curves[0]['step'][-1]:,.0f}", ends("mean"), ends("det")]
    return f"| {' | '.join(cells)} |"


def table(header: str, rows: list[str]) -> str:
    """:param header: Names of the columns. :param rows: The rows. :return: The Markdown table."""
    return "\n".join([header, "|" + " --- |" * (header.count("|") - 1), *rows])


def calibration_table(results: Path, algorithms: dict[str, list[str]]) -> str | None:
    """
    :param results: The results folder.
    :param algorithms: For each task its algorithms and experiments.
    :return: The table of what ``benchmarks.calibration`` has left, None if there is nothing.
    """
    rows = []
    for task, names in algorithms.items():
        for name in names:
            lines = read_lines(results / task / name / FILE)
            if lines:
                cells = [task, name, ", ".join(f"{line['seed']:g}" for line in lines), f"{lines[0]['budget']:.2f}"]
                cells += [", ".join(f"{line[key]:.2f}" for line in lines) for key in ("expected", "risk")]
                cells.append(", ".join(f"{line['paid']:.2f} ± {line['paid_error']:.2f}" for line in lines))
                rows.append(f"| {' | '.join(cells)} |")
    return table(CALIBRATION, rows) if rows else None


def read_settings(results: Path, task: str, algorithms: dict[str, Runs]) -> dict[str, dict[str, Any]]:
    """
    Read the settings of the runs, and end the program where these are not what the settings say.

    :param results: The results folder.
    :param task: The task.
    :param algorithms: For each algorithm or experiment its runs.
    :return: For each of them the settings.
    """
    settings = {name: yaml.safe_load((results / task / name / "settings.yaml").read_text()) for name in algorithms}
    for name, runs in algorithms.items():
        if len({tuple(curve["step"]) for curve in runs.values()}) > 1:
            sys.exit(f"{task}/{name}: its seeds were not evaluated at the same steps, so there are no statistics over them.")
        for seed, curve in runs.items():
            if curve["step"][-1] < settings[name]["steps"]:
                end, steps = curve["step"][-1], settings[name]["steps"]
                sys.exit(f"{task}/{name}: seed {seed} ends at step {end:.0f}, its settings say {steps}.")
    return settings


def kinds(algorithms: dict[str, Runs]) -> dict[str, list[str]]:
    """:param algorithms: The runs of a task. :return: Names of algorithms, and of experiments, in the order of tables."""
    found = {
        "algorithms": [name for name in ALGORITHMS if name in algorithms],
        "experiments": sorted(algorithms.keys() - ALGORITHMS.keys()),
    }
    return {kind: names for kind, names in found.items() if names}


def make_tables(task: str, algorithms: dict[str, Runs], settings: dict[str, dict[str, Any]]) -> dict[str, str]:
    """
    :param task: The task.
    :param algorithms: For each algorithm or experiment its runs.
    :param settings: Their settings.
    :return: The tables of the task, by their headings.
    """
    tables = {}
    for kind, names in kinds(algorithms).items():
        rows = [statistics_row(task, name, algorithms[name], settings[name]) for name in names]
        tables[f"{task}, {kind}, last quarter"] = table(STATISTICS, rows)
        tables[f"{task}, {kind}, ends"] = table(ENDS, [ends_row(name, algorithms[name]) for name in names])
    return tables


def draw(task: str, algorithms: dict[str, Runs], settings: dict[str, dict[str, Any]], out: Path) -> None:
    """
    Draw the figures of one task.

    :param task: The task.
    :param algorithms: For each algorithm or experiment its runs.
    :param settings: Their settings.
    :param out: The folder of the figures.
    """
    discounted = bool(gym.make(task).get_wrapper_attr("cost_limit_discounted"))
    for kind, names in kinds(algorithms).items():
        if kind == "experiments":
            # A single run among averages says little and hides much; it is in the tables
            names = [name for name in names if len(algorithms[name]) > 1] or names
        elif len(names) > MAX_CURVES:
            names = [name for name in names if name not in LEFT_OUT]
        parts = [names[start : start + MAX_CURVES] for start in range(0, len(names), MAX_CURVES)]
        for number, part in enumerate(parts, start=1):
            suffix = "" if kind == "algorithms" else "-experiments" if number == 1 else f"-experiments-{number}"
            # Experiments may differ in their limit; then no single line can be drawn
            limits = {settings[name]["cost_limit"] for name in part} - ({None} if kind == "algorithms" else set())
            limit = limits.pop() if len(limits) == 1 else None
            curves = {name: list(algorithms[name].values()) for name in part}
            points = {name: ends_of_runs(algorithms[name]) for name in part}
            for ending in FORMATS:
                plot_learning_curves(curves, out / f"{task}{suffix}.{ending}", task, limit, discounted)
                if kind == "algorithms":
                    plot_return_against_cost(points, out / f"{task}-plane.{ending}", task, limit, discounted)


def ends_of_runs(runs: Runs) -> list[tuple[float, float]]:
    """:param runs: The runs of one algorithm. :return: Return and cost of each, means over the last quarter of evaluations."""
    means = [last_quarter(runs, column).mean(axis=1).tolist() for column in ("return_mean", "cost_mean")]
    return list(zip(*means, strict=True))


def fill_page(page: Path, tables: dict[str, str]) -> None:
    """
    Replace the tables of a page. If one is missing the program ends, and the page stays as it is.

    :param page: A Markdown page with markers ``<!-- table: <heading> -->``, each with its table (or nothing yet) below.
    :param tables: The tables, by their headings.
    """
    text = page.read_text().rstrip("\n") + "\n"
    wanted = set(re.findall(r"<!-- table: (.*) -->", text))
    unknown = wanted - tables.keys()
    if unknown:
        sys.exit(f"{page} wants tables that there are no runs for: {sorted(unknown)}. There are {sorted(tables)}.")
    page.write_text(re.sub(r"(<!-- table: (.*) -->\n)(?:\n*(?:\|.*\n)+)?", lambda m: f"{m[1]}\n{tables[m[2]]}\n", text))
    if tables.keys() - wanted:
        print(f"Not on {page}: {', '.join(sorted(tables.keys() - wanted))}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """:param arguments: Those of the command line if None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tasks", nargs="+", default=[], help="all if left out")
    parser.add_argument("--algorithms", nargs="+", default=[], help="algorithms or experiments, all if left out")
    parser.add_argument("--out", type=Path, default=Path("docs/img"), help="where the figures go")
    parser.add_argument("--page", type=Path, help="Markdown page whose tables are replaced")
    args = parser.parse_args(arguments)
    if args.page and args.algorithms:
        parser.error("--page takes whole tables, with --algorithms they would lose rows: leave one of them out")
    found = collect(args.results, args.tasks, args.algorithms)
    if not found:
        sys.exit(f"No finished runs in {args.results}: make some with python -m benchmarks.run")
    settings = {task: read_settings(args.results, task, algorithms) for task, algorithms in found.items()}
    tables: dict[str, str] = {}
    for task, algorithms in found.items():
        tables |= make_tables(task, algorithms, settings[task])
    rows = []
    for task, algorithms in found.items():
        known = [name for name in ALGORITHMS if name in algorithms]
        limit = settings[task][known[0]]["cost_limit"] if known and task not in OWN_TABLE else None
        if limit is not None:
            rows.append(standing_row(task, algorithms, limit))
    if rows:
        tables["where ALGD stands"] = table(STANDING, rows)
    calibration = calibration_table(args.results, {task: list(algorithms) for task, algorithms in found.items()})
    if calibration is not None:
        tables["what the cost critics expect"] = calibration
    for heading, text in tables.items():
        print(f"{heading}\n\n{text}\n")
    # Before the figures: a page that is refused must not have new ones
    if args.page:
        fill_page(args.page, tables)
    args.out.mkdir(parents=True, exist_ok=True)
    for task, algorithms in found.items():
        draw(task, algorithms, settings[task], args.out)


if __name__ == "__main__":
    main()
