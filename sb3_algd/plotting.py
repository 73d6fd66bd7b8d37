"""Figures of learning curves: return above, cost below with the limit drawn."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = dict[str, np.ndarray]

#: Okabe and Ito's colours, which colour-blind readers can tell apart; the red of the limit is not among them
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#7F6A3F")
#: More curves than colours are told apart by their lines
LINES = ("-", "--", ":")
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


def mean_curve(curves: Sequence[Curve], column: str) -> tuple[np.ndarray, np.ndarray]:
    """
    :param curves: Curves of several seeds.
    :param column: The column that is averaged.
    :return: The steps at which every seed was evaluated, and the mean over the seeds there.
    """
    steps = curves[0]["step"]
    for curve in curves[1:]:
        steps = np.intersect1d(steps, curve["step"])
    values = [curve[column][np.isin(curve["step"], steps)] for curve in curves]
    return steps, np.mean(values, axis=0)


def plot_learning_curves(
    curves: Mapping[str, Sequence[Curve]],
    path: str | Path,
    title: str = "",
    cost_limit: float | None = None,
    family: Iterable[str] = (),
) -> None:
    """
    Draw return and cost of the episodes with stochastic actions against environment steps.

    With several seeds each is a thin line and their mean a thick one; a single curve has a band of one standard deviation
    over its episodes, and the deterministic episode as a dotted line where it was measured.

    :param curves: For each label the curves of its seeds.
    :param path: The picture to write; its ending chooses the format.
    :param title: What stands above.
    :param cost_limit: Drawn into the lower panel, in the unit of the costs.
    :param family: All labels of a family of figures, each of which has the same color and line in every one of them.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError as error:
        raise ImportError("Figures need matplotlib. Install it with: pip install matplotlib") from error

    places = {label: index for index, label in enumerate(dict.fromkeys([*family, *curves]))}
    alone = len(curves) == 1 and all(len(seeds) == 1 for seeds in curves.values())
    with rc_context(STYLE):
        # Not through pyplot, which would need a display or choose a window for one
        figure = Figure(figsize=(7, 6), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        for axes, quantity in ((above, "return"), (below, "cost")):
            for label, seeds in curves.items():
                index = places[label]
                color, line = COLORS[index % len(COLORS)], LINES[index // len(COLORS) % len(LINES)]
                if alone:
                    _draw_one(axes, seeds[0], quantity, color)
                else:
                    _draw_seeds(axes, seeds, quantity, color, line, label)
            axes.set_ylabel(f"{quantity} per episode")
            axes.set_xlim(left=0)
        if cost_limit is not None:
            _draw_limit(below, cost_limit)
        below.set_ylim(bottom=0)
        below.set_xlabel("environment steps")
        below.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        # Over the panels, where it hides no line
        labels = above.get_legend_handles_labels()[1]
        # As many columns as fit side by side: about 84 characters and the lines' samples
        n_columns = min(max(84 // (max(map(len, labels), default=0) + 8), 1), 3)
        legend = above.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=n_columns, borderaxespad=0.2, fontsize=9)
        n_rows = -(-len(legend.get_texts()) // n_columns)
        above.set_title(title, loc="left", pad=10 + 14 * n_rows, fontsize=12, fontweight="bold")
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
    for curve in curves:
        axes.plot(curve["step"], curve[f"{quantity}_mean"], color=color, linewidth=0.8, alpha=0.5, linestyle=line, marker="")
    steps, mean = mean_curve(curves, f"{quantity}_mean")
    label = f"{label} ({len(curves)} seed{'s' * (len(curves) > 1)})"
    axes.plot(steps, mean, color=color, linewidth=2.2, linestyle=line, label=label)


def _draw_limit(axes: "Axes", limit: float) -> None:
    top = max(axes.get_ylim()[1], 1.25 * limit, limit + 1)
    axes.set_ylim(top=top)
    axes.axhspan(limit, top, color=LIMIT_COLOR, alpha=0.05, linewidth=0)
    axes.axhline(limit, color=LIMIT_COLOR, linewidth=1.3, linestyle="--", marker="")
    # Beside the panel, where it hides no line
    axes.annotate(
        f"limit\n{limit:g}",
        xy=(1.0, limit),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        verticalalignment="center",
        color=LIMIT_COLOR,
        fontsize=9,
        fontweight="bold",
    )
