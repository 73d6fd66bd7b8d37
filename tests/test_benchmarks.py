"""What the published numbers rest on: that each is from the runs that it says, with the settings that it says."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import sb3_algd
from benchmarks import agents, plot, run, settings, toy, two_constraints
from sb3_algd import ALGD, SACLag
from sb3_algd.common.recorder import COLUMNS
from sb3_algd.compare import engine
from sb3_algd.plotting import read_curve

ROOT = Path(__file__).parents[1]
SMALL = ["--tasks", "TwoModes-v0", "--episodes", "2", "--jobs", "2"]
#: Networks of this size make no sense, but are quick
TINY = ["--name", "tiny", "--set", "policy_kwargs.net_arch=[8]", "batch_size=8"]


def command(out: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.run", *SMALL, "--out", str(out), *arguments]


def call(out: Path, *arguments: str) -> str:
    done = subprocess.run(command(out, *arguments), capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_grid_is_done_once_and_says_what_it_was(tmp_path: Path) -> None:
    arguments = ["--algorithms", "algd-ve", "--seeds", "0", "1", "--steps", "40", "--eval-every", "20", *TINY, "--save"]
    assert "2 runs, 0 finished before, 2 to do" in call(tmp_path, *arguments)
    folder = tmp_path / "TwoModes-v0" / "tiny"
    curves = {path.name: path.read_text() for path in folder.glob("*.csv")}
    assert sorted(curves) == ["seed0.csv", "seed1.csv"]
    assert curves["seed0.csv"] != curves["seed1.csv"]
    for text in curves.values():
        assert [line.split(",")[0] for line in text.splitlines()] == ["step", "20", "40"]
    assert ALGD.load(folder / "seed1.zip").num_timesteps == 40
    stored = yaml.safe_load((folder / "settings.yaml").read_text())
    assert shlex.split(stored.pop("command")) == ["python", *command(tmp_path, *arguments)[1:]]
    assert stored == dict(
        version=sb3_algd.__version__,
        task="TwoModes-v0",
        algorithm="algd-ve",
        steps=40,
        eval_every=20,
        n_episodes=2,
        n_deterministic=1,
        n_envs=1,
        device="cpu",
        kwargs={"policy_kwargs": {"diffusion": "ve", "net_arch": [8]}, "batch_size": 8},
        checkpoint_every=None,
        cost_limit=64.0,
    )

    # Only the seed that is new is done
    (folder / "seed1.csv").unlink()
    assert "2 runs, 1 finished before, 1 to do" in call(tmp_path, *arguments)
    # The column of the seconds is never the same
    redone = (folder / "seed1.csv").read_text().splitlines()
    assert [row.rpartition(",")[0] for row in redone] == [row.rpartition(",")[0] for row in curves["seed1.csv"].splitlines()]
    assert (folder / "seed0.csv").read_text() == curves["seed0.csv"]


def test_a_killed_run_starts_afresh(tmp_path: Path) -> None:
    arguments = ["--algorithms", "algd-ve", "--seeds", "0", "--steps", "4000", "--eval-every", "20", *TINY]
    folder = tmp_path / "TwoModes-v0" / "tiny"
    partial = folder / "seed0.csv.partial"
    process = subprocess.Popen(command(tmp_path, *arguments), cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (partial.exists() and partial.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    assert not (folder / "seed0.csv").exists()

    (folder / "settings.yaml").unlink()
    arguments[5] = "40"
    assert "1 runs, 0 finished before, 1 to do" in call(tmp_path, *arguments)
    assert (folder / "seed0.csv").read_text().count("\n") == 3
    assert not partial.exists()


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    arguments = ["--algorithms", "sac-lagrangian", "--seeds", "0", "--steps", "480", "--eval-every", "80", *TINY]
    arguments += ["learning_starts=20", "--checkpoint-every", "160"]
    call(tmp_path / "whole", *arguments)

    folder = tmp_path / "killed" / "TwoModes-v0" / "tiny"
    partial, manifest = folder / "seed0.csv.partial", folder / "seed0_checkpoint" / "checkpoint.json"
    process = subprocess.Popen(
        command(tmp_path / "killed", *arguments),
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    # One row later than the checkpoint, which the run has to make again
    while not (manifest.exists() and partial.read_text().count("\n") >= 4):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    assert not (folder / "seed0.csv").exists()

    assert "goes on from step" in call(tmp_path / "killed", *arguments)
    curve, whole = (
        read_curve(path / "TwoModes-v0" / "tiny" / "seed0.csv") for path in (tmp_path / "killed", tmp_path / "whole")
    )
    assert curve["step"].tolist() == [80, 160, 240, 320, 400, 480]
    for column in curve.keys() - {"seconds"}:
        np.testing.assert_array_equal(curve[column], whole[column], column)
    assert (np.diff(curve["seconds"]) > 0).all()
    assert not manifest.parent.exists()


def test_the_sacs_with_a_constraint_differ_in_the_penalty_only() -> None:
    models = {}
    for name in ("sac-pointwise", "sac-lagrangian"):
        model_class, policy, kwargs = settings.ALGORITHMS[name]
        assert model_class is SACLag
        models[name] = SACLag(policy, "TwoModes-v0", device="cpu", **kwargs)
    assert [model.penalty for model in models.values()] == ["pointwise", "expectation"]
    # As ALGD's default, with which they are compared
    assert ALGD("MlpPolicy", "TwoModes-v0", device="cpu").penalty == "expectation"


def test_two_limits_on_a_real_task(tmp_path: Path) -> None:
    two_constraints.main(["--steps", "410", "--eval-every", "205", "--episodes", "1", "--out", str(tmp_path)])
    curve = read_curve(tmp_path / "seed0.csv")
    assert curve["step"].tolist() == [205.0, 410.0]
    # Both are counts of steps
    assert all(
        0.0 <= cost <= 400.0 and cost == round(cost) for name in two_constraints.NAMES for cost in curve[f"cost_{name}"]
    )
    # A standstill is not fast, a metre and a half per second is
    obs = np.zeros(76)
    assert two_constraints.both_costs(obs, obs[:2], obs, {"cost": 1.0}) == [1.0, 0.0]
    obs[two_constraints.VELOCITY] = [0.9, -1.2]
    assert two_constraints.both_costs(obs, obs[:2], obs, {"cost": 0.0}) == [0.0, 1.0]


# --- committed results --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(settings.RESULTS.glob("*/*/settings.yaml")), ids=lambda path: path.parent.name)
def test_the_command_of_a_committed_result_is_the_one_that_makes_it(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(given: Any, *args: Any) -> int:
        assert not given, "there is no CSV for a seed of the command"
        return 0

    monkeypatch.setattr(engine, "run_all", missing)
    monkeypatch.setattr(toy, "train", missing)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    _, _, module, *arguments = shlex.split(yaml.safe_load(path.read_text())["command"])
    # Ends the program if it has other settings than the stored runs
    status = {"benchmarks.run": run, "benchmarks.toy": toy}[module].main(arguments)
    # The toy's says whether all of its runs have passed
    assert status == 0 or module == "benchmarks.toy"
    output = capsys.readouterr().out
    n_seeds = len(list(path.parent.glob("seed*.csv")))
    if module == "benchmarks.run":
        assert f"{n_seeds} runs, {n_seeds} finished before" in output
    else:
        assert output.count(f"| {path.parent.name} |") == n_seeds


@pytest.mark.parametrize("path", sorted(settings.RESULTS.glob("*/*/settings.yaml")), ids=lambda path: path.parent.name)
def test_the_arguments_of_a_committed_result_are_arguments_of_today(path: Path) -> None:
    stored = yaml.safe_load(path.read_text())
    model_class, policy, _ = settings.ALGORITHMS[stored["algorithm"]]
    kwargs = {**stored["kwargs"]}
    if isinstance(kwargs.get("actor_learning_rate"), str):
        # A schedule, in the notation of the Zoo
        del kwargs["actor_learning_rate"]
    model_class(policy, "TwoModes-v0", device="cpu", **{**kwargs, "buffer_size": 100})


# --- tables ----------------------------------------------------------------------------------------------------------


def make_curve(returns: list[float], costs: list[float]) -> dict[str, np.ndarray]:
    steps = 2000.0 * np.arange(1, len(returns) + 1)
    return {"step": steps, "return_mean": np.array(returns), "cost_mean": np.array(costs), "train_cost": np.array(costs)}


def test_statistics_are_of_the_last_quarter() -> None:
    # The outlier and what came before do not count
    runs = {0: make_curve([99, 99, 99, 99, 99, 1, 2], [0] * 7), 3: make_curve([99, 99, 99, 99, 99, 3, 1000], [20] * 7)}
    assert plot.last_quarter(runs, "return_mean").tolist() == [[1, 2], [3, 1000]]
    text = plot.with_interval(plot.last_quarter(runs, "return_mean"), 0.25)
    # Of 1, 2, 3 and 1000 the middle two; then those of a seed drawn twice
    assert text == "2.5 [1.5, 501.5]"
    row = plot.statistics_row("Safexp-PointButton1-v0", "x", runs, {"cost_limit": 10, "steps": 14_000, "kwargs": {}})
    assert row.startswith("| x | 0, 3 | 2.5 [1.5, 501.5] |")
    assert "| 2 of 4 | 10.0 | 350 |" in row


def test_one_seed_has_no_interval() -> None:
    assert plot.with_interval(np.array([[1.0, 2.0, 3.0, 40.0]]), 0.25) == "2.5"


def test_the_training_cost_is_summed_up_only_where_the_curve_tells_it() -> None:
    # Its costs are discounted sums over episodes that may end early
    assert plot.total_training_cost("HopperSpeed-v0", {0: make_curve([1], [5])}, {"steps": 2000, "kwargs": {}}) == ""


def test_algd_is_compared_with_the_best_that_keeps_the_limit() -> None:
    def runs(value: float, *costs: float) -> plot.Runs:
        return {
            seed: {"return_mean": np.full(4, value), "cost_mean": np.array([99.0, 99.0, 99.0, cost])}
            for seed, cost in enumerate(costs)
        }

    algorithms = {"algd-ve": runs(5.0, 9.0, 12.0), "sac-pointwise": runs(7.0, 5.0, 5.0), "sac-lagrangian": runs(6.0, 0.0, 0.0)}
    row = plot.standing_row("x", {**algorithms, "algd-ve-plain": runs(8.0, 21.0, 0.0)}, 10)
    assert row == "| x | 10 | 5.0 / 10.5 (1 of 2) |  |  | sac-pointwise: 7.0 / 5.0 (2 of 2) |  |"
    row = plot.standing_row("x", {"algd-ddpm": runs(1.0, 2.0), "sac": runs(3.0, 11.0), "tqc": runs(4.0, 12.0)}, 10)
    assert row == "| x | 10 |  |  | 1.0 / 2.0 (1 of 1) |  | none within it |"


@pytest.fixture
def small_results(tmp_path: Path) -> Path:
    """Two runs of one experiment, at the steps 20 and 40."""
    folder = tmp_path / "TwoModes-v0" / "tiny"
    folder.mkdir(parents=True)
    for seed in (0, 1):
        rows = [dict.fromkeys(COLUMNS, 7.5) | {"step": step} for step in (20, 40)]
        with (folder / f"seed{seed}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    (folder / "settings.yaml").write_text("{steps: 40, cost_limit: 64.0, kwargs: {}}")
    return tmp_path


MARKER = "<!-- table: TwoModes-v0, experiments, ends -->"
OTHER_MARKER = "<!-- table: TwoModes-v0, experiments, last quarter -->"


def draw_arguments(results: Path) -> list[str]:
    return ["--results", str(results), "--out", str(results / "img"), "--page", str(results / "page.md")]


def test_a_page_gets_figures_and_tables(small_results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = small_results / "page.md"
    page.write_text(f"{OTHER_MARKER}\n\nBefore\n\n{MARKER}\n\n| old |\n| --- |\n| 1 |\n\nAfter | all\n")
    plot.main(draw_arguments(small_results))
    printed = capsys.readouterr()
    assert printed.err == ""
    tables = [line for line in printed.out.splitlines() if line.startswith("|")]
    assert tables[2].startswith("| tiny | 0, 1 | 7.5 [7.5, 7.5] |")
    assert tables[5].startswith("| tiny | 40 | 7.5 / 7.5, 7.5 / 7.5 |")
    for table in (tables[:3], tables[3:]):
        assert len({line.count("|") for line in table}) == 1
    assert (small_results / "img" / "TwoModes-v0-experiments.png").stat().st_size > 10_000
    assert page.read_text() == "\n".join(
        [OTHER_MARKER, "", *tables[:3], "", "Before", "", MARKER, "", *tables[3:], "", "After | all", ""]
    )


def test_a_page_that_is_refused_changes_nothing(small_results: Path) -> None:
    # A marker that nothing answers would leave an old table standing
    page = small_results / "page.md"
    text = MARKER.replace("ends", "end")
    page.write_text(text)
    with pytest.raises(SystemExit, match="TwoModes-v0, experiments, end'"):
        plot.main(draw_arguments(small_results))
    assert page.read_text() == text
    assert not (small_results / "img").exists()


def test_the_tables_of_the_results_are_those_of_the_committed_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "draw", lambda *args: None)
    published = (ROOT / "docs" / "results.md").read_text()
    page = tmp_path / "results.md"
    page.write_text(published)
    plot.main(["--results", str(ROOT / "benchmarks" / "results"), "--out", str(tmp_path), "--page", str(page)])
    assert page.read_text() == published


def test_a_run_that_is_shorter_than_its_settings_say_is_refused(small_results: Path) -> None:
    (small_results / "TwoModes-v0" / "tiny" / "settings.yaml").write_text("{steps: 60, cost_limit: 64.0, kwargs: {}}")
    with pytest.raises(SystemExit, match="seed 0 ends at step 40, its settings say 60"):
        plot.main(draw_arguments(small_results))


def test_seeds_are_in_order_and_at_the_same_steps(tmp_path: Path) -> None:
    folder = tmp_path / "TwoModes-v0" / "x"
    folder.mkdir(parents=True)
    for seed, last in ((10, 2), (2, 2), (3, 3)):
        (folder / f"seed{seed}.csv").write_text(f"step,return_mean\n1,{seed}\n{last},{seed}\n")
    (folder / "settings.yaml").write_text("steps: 2")
    found = plot.collect(tmp_path, [], [])["TwoModes-v0"]
    assert list(found["x"]) == [2, 3, 10]
    with pytest.raises(SystemExit, match=r"TwoModes-v0/x: .*same steps"):
        plot.read_settings(tmp_path, "TwoModes-v0", found)


def test_only_agents_within_their_limit_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "N_EPISODES", 20)
    small: dict[str, Any] = dict(policy_kwargs={"net_arch": [4]}, buffer_size=10, device="cpu")
    for seed, limit in enumerate((1000.0, 0.0)):
        path = tmp_path / "TwoModes-v0" / "algd-ve" / f"seed{seed}.zip"
        ALGD("DiffusionPolicy", "TwoModes-v0", cost_limit=limit, seed=seed, **small).save(path)
        monkeypatch.setattr(sys, "argv", ["", str(path), "--out", str(tmp_path)])
        agents.main()
        assert json.loads((tmp_path / "algd" / "TwoModes-v0_1" / "config.json").read_text())["results"]["seed"] == 0
    rows = [
        line for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("| TwoModes-v0 | 0, 0, 0.5 |")
    ]
    assert len(rows) == 1 and "within the limit" in rows[0]


def test_an_agent_that_is_a_whole_model_has_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "N_EPISODES", 20)
    model = ALGD("DiffusionPolicy", "TwoModes-v0", seed=3, policy_kwargs={"net_arch": [4]}, buffer_size=10, device="cpu")
    model.save(tmp_path / "algd" / "TwoModes-v0_1" / "TwoModes-v0.zip")
    monkeypatch.setattr(sys, "argv", ["", "--out", str(tmp_path)])
    for _ in range(2):
        agents.main()
        rows = (tmp_path / "README.md").read_text().splitlines()
        assert rows[-1].startswith("| TwoModes-v0 | 0, 3, 0.5 |") and rows[-2].startswith("| ---")
