"""Learning-curve figures."""

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from sb3_algd.common.recorder import COLUMNS
from sb3_algd.plotting import (
    Curve,
    interquartile_mean,
    label_of,
    mean_curve,
    plot_learning_curves,
    plot_return_against_cost,
    read_curve,
)


def make_curve(steps: list[int], level: float) -> Curve:
    curve = {column: np.full(len(steps), level) for column in COLUMNS}
    curve["step"] = np.array(steps, dtype=float)
    return curve


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were written."""
    figures: list[Figure] = []
    write = Figure.savefig

    def remember(figure: Figure, *args: object, **kwargs: object) -> None:
        figures.append(figure)
        write(figure, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures


def test_a_curve_is_read_by_column(tmp_path: Path) -> None:
    path = tmp_path / "curve.csv"
    path.write_text("step,return_mean,train_cost\n1000,2.5,nan\n2000,3.5,7\n")
    curve = read_curve(path)
    np.testing.assert_array_equal(curve["step"], [1000, 2000])
    np.testing.assert_array_equal(curve["return_mean"], [2.5, 3.5])
    np.testing.assert_array_equal(curve["train_cost"], [np.nan, 7])


def test_one_row_is_a_curve_too(tmp_path: Path) -> None:
    path = tmp_path / "curve.csv"
    path.write_text("step,return_mean\n1000,2.5\n")
    np.testing.assert_array_equal(read_curve(path)["return_mean"], [2.5])


def test_an_empty_curve_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "curve.csv"
    path.write_text("step,return_mean\n")
    with pytest.raises(ValueError, match="no rows yet"):
        read_curve(path)


def test_mean_over_seeds_is_taken_where_all_were_evaluated() -> None:
    steps, mean, (low, high) = mean_curve([make_curve([10, 20, 30], 1.0), make_curve([10, 30, 40], 3.0)], "cost_mean")
    np.testing.assert_array_equal(steps, [10, 30])
    np.testing.assert_array_equal(mean, [2.0, 2.0])
    np.testing.assert_array_equal(low, [1.0, 1.0])
    np.testing.assert_array_equal(high, [3.0, 3.0])


def test_the_interquartile_mean_leaves_out_what_is_far_off() -> None:
    assert interquartile_mean(np.array([[1.0], [2.0], [3.0], [100.0]])) == [2.5]
    assert interquartile_mean(np.array([[1.0], [2.0], [9.0]])) == [4.0]


def test_mean_interval_and_limit_are_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    path = tmp_path / "figure.png"
    curves = {"one": [make_curve([10, 20], 4.0), make_curve([10, 20], 6.0)], "two": [make_curve([10, 20], 30.0)]}
    plot_learning_curves(curves, path, "title", cost_limit=10.123)
    above, below = drawn[0].axes
    for axes in (above, below):
        heights = [np.asarray(line.get_ydata()).tolist() for line in axes.get_lines()]
        assert [5.0, 5.0] in heights
        assert [30.0, 30.0] in heights
        band = np.asarray(axes.collections[0].get_paths()[0].vertices)
        assert (band[:, 1].min(), band[:, 1].max()) == (4.0, 6.0)
    # The limit only below, where the costs are
    assert [10.123, 10.123] in [np.asarray(line.get_ydata()).tolist() for line in below.get_lines()]
    assert [text.get_text() for text in below.texts] == ["limit\n10.1"]
    assert not above.texts
    assert above.get_title(loc="left") == "title, 1 to 2 seeds"
    assert imread(path).std() > 0.05


def test_an_algorithm_has_its_name_and_color_in_every_figure(tmp_path: Path, drawn: list[Figure]) -> None:
    one, two = [make_curve([10, 20], 1.0)], [make_curve([10, 20], 2.0)]
    plot_learning_curves({"algd-ve": one, "sac-lagrangian": two}, tmp_path / "both.png")
    plot_learning_curves({"new": one, "newer": one, "sac-lagrangian": two}, tmp_path / "few.png")
    both, few = ({line.get_label(): line.get_color() for line in figure.axes[0].lines} for figure in drawn)
    assert list(both) == ["ALGD (VE)", "SAC-Lagrangian"]
    assert both["SAC-Lagrangian"] == few["SAC-Lagrangian"]
    assert len(set(few.values())) == 3


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_runs_are_points_in_the_plane(ending: str, tmp_path: Path, drawn: list[Figure]) -> None:
    path = tmp_path / f"plane.{ending}"
    plot_return_against_cost({"algd": [(5.0, 1.0), (6.0, 2.0)], "sac": [(9.0, 30.0)]}, path, "title", 10.0, discounted=True)
    (axes,) = drawn[0].axes
    assert [np.asarray(point.get_xydata()).tolist() for point in axes.get_lines()[:2]] == [
        [[1.0, 5.0], [2.0, 6.0]],
        [[30.0, 9.0]],
    ]
    assert np.asarray(axes.get_lines()[2].get_xdata()).tolist() == [10.0, 10.0]
    assert axes.get_xlabel() == "discounted cost per episode"
    assert path.stat().st_size > 1000


def test_what_is_far_above_the_limit_is_cut_and_said(tmp_path: Path, drawn: list[Figure]) -> None:
    for level in (20.0, 200.0):
        plot_learning_curves({"one": [make_curve([10, 20], level)] * 2}, tmp_path / "figure.png", cost_limit=10.0)
    titles = [figure.axes[1].get_title(loc="right") for figure in drawn]
    assert titles[0] == ""
    assert titles[1] == "cut at 40, 4 limits; the highest is 200"
    assert drawn[1].axes[1].get_ylim() == (0.0, 40.0)


def test_too_many_curves_are_refused(tmp_path: Path) -> None:
    curves = {str(i): [make_curve([10, 20], 1.0)] for i in range(7)}
    with pytest.raises(ValueError, match="draw 6 at most"):
        plot_learning_curves(curves, tmp_path / "figure.png")


def test_the_limit_is_visible_above_low_costs(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_learning_curves({"one": [make_curve([10, 20], 0.1)]}, tmp_path / "figure.png", cost_limit=25.0)
    low, high = drawn[0].axes[1].get_ylim()
    assert low == 0.0
    assert high > 25.0


def test_a_single_curve_shows_the_deterministic_episode(tmp_path: Path, drawn: list[Figure]) -> None:
    curve = make_curve([10, 20], 3.0)
    curve["return_det"] = np.array([7.0, 8.0])
    plot_learning_curves({"one": [curve]}, tmp_path / "figure.png")
    heights = [np.asarray(line.get_ydata()).tolist() for line in drawn[0].axes[0].get_lines()]
    assert [7.0, 8.0] in heights
    assert len(drawn[0].axes[0].collections) == 1, "the band of one standard deviation"


def test_without_matplotlib_the_error_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_learning_curves({"one": [make_curve([10], 1.0)]}, tmp_path / "figure.png")


@pytest.mark.parametrize(
    "name, label",
    [
        ("algd-ve", "ALGD (VE)"),
        ("algd-ve-rho0.1", "ALGD (VE), rho=0.1"),
        ("algd-ve-rho0.1-float32", "ALGD (VE), rho=0.1, float32"),
        ("algd-ve-plain-rho1", "ALGD (VE), plain Lagrangian, rho=1"),
        ("sac-lagrangian-30k", "SAC-Lagrangian, 30k"),
        ("mine", "mine"),
    ],
)
def test_experiments_are_called_after_their_algorithm(name: str, label: str) -> None:
    assert label_of(name) == label


def test_seeds_without_a_common_step_are_refused() -> None:
    curves = [{"step": np.array([100.0]), "return_mean": np.zeros(1)}, {"step": np.array([90.0]), "return_mean": np.zeros(1)}]
    with pytest.raises(ValueError, match="no step at which all seeds"):
        mean_curve(curves, "return_mean")
