"""
Figures in one style: learning curves with return above and cost below, and the plane of return against cost.

Several seeds are drawn as their interquartile mean with a 95 % bootstrap interval over seeds, as in the tables of the results
(with three seeds the mean and little more than their range). No figure has more than six curves (:data:`MAX_CURVES`).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = dict[str, np.ndarray]

#: Okabe and Ito's colours and a brown, which colour-blind readers can tell apart; the red of the limit is not among them
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#7F6A3F")
#: What an algorithm is called in figures, by its name in the benchmarks and on the command line
LABELS = {
    "algd": "ALGD",
    "algd-ve": "ALGD (VE)",
    "algd-pointwise": "ALGD (VE, ancestral), pointwise",
    "algd-ddpm": "ALGD (DDPM)",
    "algd-ve-plain": "ALGD (VE), plain Lagrangian",
    "sac_lag": "SAC-Lagrangian",
    "sac-lagrangian": "SAC-Lagrangian",
    "sac-pointwise": "SAC-Lagrangian, pointwise",
    "sac": "SAC, no constraint",
    "tqc": "TQC, no constraint",
}
#: Their colours, the same in every figure
ALGORITHM_COLORS = {
    "ALGD": COLORS[0],
    "ALGD (VE)": COLORS[0],
    "ALGD (VE, ancestral), pointwise": "#000000",
    "ALGD (DDPM)": COLORS[1],
    "SAC-Lagrangian": COLORS[2],
    "SACLag": COLORS[2],
    "SAC-Lagrangian, pointwise": COLORS[3],
    "SAC, no constraint": COLORS[4],
    "SAC": COLORS[4],
    "TQC, no constraint": COLORS[5],
}
#: More than this and nobody can tell them apart
MAX_CURVES = 6
#: The cost axis ends at so many limits, where curves go further: what matters is near the limit
CLIP = 4.0
N_RESAMPLES = 2_000
#: More curves than colours are told apart by their lines
LINES = ("-", "--", ":")
MARKERS = ("o", "s", "^", "D", "v", "P")
LIMIT_COLOR = "#B2182B"
INK = "#333333"
STYLE: Any = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    # A short run has few points, and a single one would be no line at all
    "lines.marker": "o",
    "lines.markersize": 3,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "xtick.color": "#666666",
    "ytick.color": "#666666",
    "legend.frameon": False,
}


def read_curve(path: str | Path) -> Curve:
    """
    :param path: A CSV file that :class:`~sb3_algd.common.recorder.LearningCurveRecorder` has left.
    :return: Its columns.
    """
    table = np.atleast_1d(np.genfromtxt(path, delimiter=",", names=True))
    if table.dtype.names is None or table.size == 0:
        raise ValueError(f"{path} holds no learning curve: it has no rows yet.")
    return {name: table[name] for name in table.dtype.names}


def label_of(name: str) -> str:
    """
    :param name: Name of an algorithm, or of an experiment, which is the algorithm's name with something behind it.
    :return: What figures call it, for instance "ALGD (VE), rho=0.1" for "algd-ve-rho0.1".
    """
    base = max((known for known in LABELS if name == known or name.startswith(f"{known}-")), key=len, default=None)
    if base is None:
        return name
    rest = re.sub(r"\brho([0-9.]+)", r"rho=\1", name[len(base) + 1 :]).replace("-", ", ")
    return f"{LABELS[base]}, {rest}" if rest else LABELS[base]


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """
    :param values: Shape (n, ...).
    :return: Mean over the first axis without the lowest and the highest quarter; with fewer than four values their mean.
    """
    cut = len(values) // 4
    mean: np.ndarray = np.sort(values, axis=0)[cut : len(values) - cut].mean(axis=0)
    return mean


def mean_curve(curves: Sequence[Curve], column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    :param curves: Curves of several seeds.
    :param column: The column that is averaged.
    :return: The steps at which every seed was evaluated, the interquartile mean over the seeds there, and the lower and upper
        end of its 95 % bootstrap interval, shape (2, steps); all the same with one seed.
    :raises ValueError: If there is no such step.
    """
    steps = curves[0]["step"]
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve["step"])
    if len(steps) == 0:
        raise ValueError("There is no step at which all seeds of a curve were evaluated: draw them one by one.")
    values = np.stack([curve[column][np.isin(curve["step"], steps)] for curve in curves])
    drawn = np.random.default_rng(0).integers(len(values), size=(len(values), N_RESAMPLES))
    interval = np.percentile(interquartile_mean(values[drawn]), [2.5, 97.5], axis=0)
    return steps, interquartile_mean(values), interval


def _new_figure(width: float, height: float) -> "Figure":
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError("Figures need matplotlib. Install it with: pip install matplotlib") from error
    # Not through pyplot, which would need a display or choose a window for one
    return matplotlib.figure.Figure(figsize=(width, height), layout="constrained")


def _colors(labels: Iterable[str]) -> dict[str, str]:
    """Each algorithm's own colour, and for others those that are left."""
    labels = list(labels)
    taken = {ALGORITHM_COLORS[label] for label in labels if label in ALGORITHM_COLORS}
    left = iter([*(color for color in COLORS if color not in taken), *COLORS])
    return {label: ALGORITHM_COLORS.get(label) or next(left) for label in labels}


def _check_number(labels: Iterable[str]) -> None:
    n_curves = len(list(labels))
    if n_curves > MAX_CURVES:
        raise ValueError(f"{n_curves} curves in one figure cannot be told apart: draw {MAX_CURVES} at most.")


def _seeds(runs: Mapping[str, Sequence[Any]]) -> str:
    """How many seeds there are, for the title."""
    numbers = sorted({len(seeds) for seeds in runs.values()})
    if numbers == [1]:
        return ", 1 seed"
    return f", {numbers[0]} seeds" if len(numbers) == 1 else f", {numbers[0]} to {numbers[-1]} seeds"


def _title(axes: "Axes", title: str) -> None:
    """Title and legend over a panel, where they hide nothing."""
    labels = axes.get_legend_handles_labels()[1]
    # As many columns as fit side by side: about 84 characters and the lines' samples
    n_columns = min(max(84 // (max(map(len, labels), default=0) + 8), 1), 3)
    legend = axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=n_columns, borderaxespad=0.2, fontsize=9)
    n_rows = -(-len(legend.get_texts()) // n_columns)
    axes.set_title(title, loc="left", pad=10 + 14 * n_rows, fontsize=12, fontweight="bold")


def plot_learning_curves(
    curves: Mapping[str, Sequence[Curve]],
    path: str | Path,
    title: str = "",
    cost_limit: float | None = None,
    discounted: bool = False,
) -> None:
    """
    Draw return and cost of the episodes with stochastic actions against environment steps.

    Several seeds are their interquartile mean with its interval. A single curve has a band of one standard deviation over its
    episodes, and the deterministic episode as a dotted line where it was measured. The cost axis is cut where it is far above
    the limit, and says so.

    :param curves: For each algorithm the curves of its seeds, :data:`MAX_CURVES` algorithms at most.
    :param path: The picture to write; its ending chooses the format (.png, .svg, .pdf).
    :param title: What stands above.
    :param cost_limit: Drawn into the lower panel, in the unit of the costs.
    :param discounted: Whether costs are discounted sums.
    :raises ValueError: If there are too many curves.
    """
    _check_number(curves)
    figure = _new_figure(7, 6)
    from matplotlib import rc_context
    from matplotlib.ticker import FuncFormatter

    colors = _colors(label_of(name) for name in curves)
    alone = len(curves) == 1 and all(len(seeds) == 1 for seeds in curves.values())
    with rc_context(STYLE):
        above, below = figure.subplots(2, 1, sharex=True)
        for axes, quantity in ((above, "return"), (below, "cost")):
            for index, (name, seeds) in enumerate(curves.items()):
                label = label_of(name)
                if alone:
                    _draw_one(axes, seeds[0], quantity, colors[label])
                else:
                    _draw_seeds(axes, seeds, quantity, colors[label], LINES[index % len(LINES)], label)
            axes.set_xlim(left=0)
        above.set_ylabel("return per episode")
        below.set_ylabel(f"{'discounted ' if discounted else ''}cost per episode")
        if cost_limit is not None:
            _draw_limit(below, cost_limit)
        below.set_ylim(bottom=0)
        below.set_xlabel("environment steps")
        below.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        _title(above, title if alone else f"{title}{_seeds(curves)}")
        figure.savefig(path, dpi=150)


def plot_return_against_cost(
    runs: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path,
    title: str = "",
    cost_limit: float | None = None,
    discounted: bool = False,
) -> None:
    """
    Draw the plane of return against cost: one point per run, and the limit as a line. Best is high and left of the line.

    :param runs: For each algorithm (return, cost) of its runs, :data:`MAX_CURVES` algorithms at most.
    :param path: The picture to write; its ending chooses the format (.png, .svg, .pdf).
    :param title: What stands above.
    :param cost_limit: The limit, in the unit of the costs.
    :param discounted: Whether costs are discounted sums.
    :raises ValueError: If there are too many algorithms.
    """
    _check_number(runs)
    figure = _new_figure(7, 4.5)
    from matplotlib import rc_context

    with rc_context(STYLE):
        axes = figure.subplots()
        colors = _colors(label_of(name) for name in runs)
        for index, (name, points) in enumerate(runs.items()):
            returns, costs = np.asarray(points, dtype=float).T
            label = label_of(name)
            axes.plot(
                costs,
                returns,
                linestyle="",
                marker=MARKERS[index],
                markersize=8,
                markeredgecolor="white",
                color=colors[label],
                label=label,
            )
        axes.set_xlabel(f"{'discounted ' if discounted else ''}cost per episode")
        axes.set_ylabel("return per episode")
        axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
        if cost_limit is not None:
            right = max(axes.get_xlim()[1], 1.25 * cost_limit, cost_limit + 1)
            axes.set_xlim(right=right)
            axes.axvspan(cost_limit, right, color=LIMIT_COLOR, alpha=0.05, linewidth=0)
            axes.axvline(cost_limit, color=LIMIT_COLOR, linewidth=1.3, linestyle="--", marker="")
            axes.annotate(
                f" limit {cost_limit:.3g}",
                xy=(cost_limit, 0.02),
                xycoords=("data", "axes fraction"),
                color=LIMIT_COLOR,
                fontsize=9,
                fontweight="bold",
            )
        _title(axes, f"{title}{_seeds(runs)}")
        figure.savefig(path, dpi=150)


def _draw_one(axes: "Axes", curve: Curve, quantity: str, color: str) -> None:
    steps, mean, std = curve["step"], curve[f"{quantity}_mean"], curve[f"{quantity}_std"]
    both = f"{quantity}_det" in curve
    name = "stochastic actions" if both else "episodes"
    axes.plot(steps, mean, color=color, linewidth=2, label=f"{name} (mean and standard deviation)")
    axes.fill_between(steps, mean - std, mean + std, color=color, alpha=0.18, linewidth=0)
    if both:
        axes.plot(steps, curve[f"{quantity}_det"], color=INK, linewidth=1.2, linestyle=":", label="deterministic actions")


def _draw_seeds(axes: "Axes", curves: Sequence[Curve], quantity: str, color: str, line: str, label: str) -> None:
    steps, mean, (low, high) = mean_curve(curves, f"{quantity}_mean")
    axes.plot(steps, mean, color=color, linewidth=2.0, linestyle=line, label=label)
    axes.fill_between(steps, low, high, color=color, alpha=0.13, linewidth=0)


def _draw_limit(axes: "Axes", limit: float) -> None:
    top = max(axes.get_ylim()[1], 1.25 * limit, limit + 1)
    clip = CLIP * limit
    if limit > 0 and top > clip:
        axes.set_title(
            f"cut at {clip:.3g}, {CLIP:g} limits; the highest is {axes.dataLim.ymax:.3g}", loc="right", fontsize=8, pad=3
        )
        top = clip
    axes.set_ylim(top=top)
    axes.axhspan(limit, top, color=LIMIT_COLOR, alpha=0.05, linewidth=0)
    axes.axhline(limit, color=LIMIT_COLOR, linewidth=1.3, linestyle="--", marker="")
    # Beside the panel, where it hides no line
    axes.annotate(
        f"limit\n{limit:.3g}",
        xy=(1.0, limit),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        verticalalignment="center",
        color=LIMIT_COLOR,
        fontsize=9,
        fontweight="bold",
    )
