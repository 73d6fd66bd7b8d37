"""The benchmark runner: grids of runs that can be interrupted, and what is drawn from them."""

import csv
import dataclasses
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import plot
import pytest
import run
import toy
import yaml

from sb3_algd import ALGD
from sb3_algd.plotting import read_curve
from sb3_algd.recorder import COLUMNS

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SMALL = ["--tasks", "TwoModes-v0", "--episodes", "2", "--jobs", "2"]
#: Networks of this size make no sense, but are quick
TINY = ["--name", "tiny", "--set", "policy_kwargs.net_arch=[8]", "batch_size=8"]


def command(out: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(BENCHMARKS / "run.py"), *SMALL, "--out", str(out), *arguments]


def call(out: Path, *arguments: str) -> str:
    done = subprocess.run(command(out, *arguments), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_grid_is_done_once(tmp_path: Path) -> None:
    arguments = ["--algorithms", "algd-ve", "--seeds", "0", "1", "--steps", "40", "--eval-every", "20", *TINY]
    output = call(tmp_path, *arguments)
    assert "2 runs, 0 finished before, 2 to do" in output
    folder = tmp_path / "TwoModes-v0" / "tiny"
    curves = {path.name: path.read_text() for path in folder.glob("*.csv")}
    assert sorted(curves) == ["seed0.csv", "seed1.csv"]
    assert curves["seed0.csv"] != curves["seed1.csv"]
    for text in curves.values():
        assert [line.split(",")[0] for line in text.splitlines()] == ["step", "20", "40"]
    settings = yaml.safe_load((folder / "settings.yaml").read_text())
    assert settings["cost_limit"] == 64.0
    assert settings["kwargs"] == {"policy_kwargs": {"diffusion": "ve", "net_arch": [8]}, "batch_size": 8}

    # A default that changes later would otherwise go unnoticed
    defaults = settings["defaults"]
    assert defaults["rho"] == 1.0
    assert "batch_size" not in defaults
    assert defaults["policy_kwargs"]["denoising_steps"] == 5
    assert defaults["policy_kwargs"]["diffusion_kwargs"] == {"sigma_min": 0.01, "sigma_max": 1.0}
    assert "diffusion" not in defaults["policy_kwargs"]

    # Only the seed that is new is done
    (folder / "seed1.csv").unlink()
    assert "2 runs, 1 finished before, 1 to do" in call(tmp_path, *arguments)
    # The column of the seconds is never the same
    redone = (folder / "seed1.csv").read_text().splitlines()
    assert [row.rpartition(",")[0] for row in redone] == [row.rpartition(",")[0] for row in curves["seed1.csv"].splitlines()]
    assert (folder / "seed0.csv").read_text() == curves["seed0.csv"]


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

    # A table without a marker is named; blank lines do not hide an old table, nor does the end of the page hide a marker
    for text in (f"{MARKER}\n\n\n| old |\n| --- |\n", MARKER):
        page.write_text(text)
        plot.main(draw_arguments(small_results))
        assert f"Not on {page}: TwoModes-v0, experiments, last quarter" in capsys.readouterr().err
        assert page.read_text() == "\n".join([MARKER, "", *tables[3:], ""])


def test_algd_is_compared_with_the_best_that_keeps_the_limit() -> None:
    def runs(value: float, *costs: float) -> plot.Runs:
        return {
            seed: {"return_mean": np.full(4, value), "cost_mean": np.array([99.0, 99.0, 99.0, cost])}
            for seed, cost in enumerate(costs)
        }

    algorithms = {"algd-ve": runs(5.0, 9.0, 12.0), "sac-augmented": runs(7.0, 5.0, 5.0), "sac-lagrangian": runs(6.0, 0.0, 0.0)}
    row = plot.standing_row("x", {**algorithms, "algd-ve-plain": runs(8.0, 21.0, 0.0)}, 10)
    assert row == "| x | 10 | 5.0 / 10.5 (1 of 2) |  | sac-augmented: 7.0 / 5.0 (2 of 2) |  |"
    row = plot.standing_row("x", {"algd-ddpm": runs(1.0, 2.0), "sac": runs(3.0, 11.0), "tqc": runs(4.0, 12.0)}, 10)
    assert row == "| x | 10 |  | 1.0 / 2.0 (1 of 1) |  | none within it |"


def test_a_page_that_is_refused_changes_nothing(small_results: Path) -> None:
    # A marker that nothing answers would leave an old table standing
    page = small_results / "page.md"
    text = MARKER.replace("ends", "end")
    page.write_text(text)
    with pytest.raises(SystemExit, match="TwoModes-v0, experiments, end'"):
        plot.main(draw_arguments(small_results))
    assert page.read_text() == text
    assert not (small_results / "img").exists()


def test_a_page_takes_all_algorithms(small_results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plot.main([*draw_arguments(small_results), "--algorithms", "tiny"])
    assert "would lose rows" in capsys.readouterr().err


def test_a_run_that_is_shorter_than_its_settings_say_is_refused(small_results: Path) -> None:
    (small_results / "TwoModes-v0" / "tiny" / "settings.yaml").write_text("{steps: 60, cost_limit: 64.0, kwargs: {}}")
    with pytest.raises(SystemExit, match="seed 0 ends at step 40, its settings say 60"):
        plot.main(draw_arguments(small_results))


def test_a_killed_run_starts_afresh(tmp_path: Path) -> None:
    arguments = ["--algorithms", "algd-ve", "--seeds", "0", "--steps", "4000", "--eval-every", "20", *TINY]
    folder = tmp_path / "TwoModes-v0" / "tiny"
    partial = folder / "seed0.csv.partial"
    process = subprocess.Popen(command(tmp_path, *arguments), start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (partial.exists() and partial.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    assert not (folder / "seed0.csv").exists()

    # Other settings than those of the runs that are there: refused, before anything is trained
    arguments[5] = "40"
    refused = subprocess.run(command(tmp_path, *arguments), capture_output=True, text=True, timeout=300)
    assert refused.returncode != 0
    assert "steps: 4000 there, 40 now" in refused.stderr

    (folder / "settings.yaml").unlink()
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
        command(tmp_path / "killed", *arguments), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algorithms", "sac", "--checkpoint-every", "4000"], "no checkpoints for sac"),
        (["--checkpoint-every", "3000"], "multiple"),
        (["--checkpoint-every", "4000", "--log"], "--log"),
    ],
)
def test_checkpoints_that_cannot_be_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def toy_settings(**kwargs: Any) -> run.Settings:
    return run.Settings("TwoModes-v0", "algd-ve", 10, 10, 1, 1, 1, "cpu", kwargs)


def test_settings_are_the_same_if_a_default_becomes_an_argument(tmp_path: Path) -> None:
    run.prepare_folder(tmp_path, toy_settings())
    run.prepare_folder(tmp_path, toy_settings(rho=1.0))
    with pytest.raises(SystemExit, match=r"rho: 1.0 there, 2.0 now"):
        run.prepare_folder(tmp_path, toy_settings(rho=2.0))


def test_another_default_of_the_policy_is_a_difference(tmp_path: Path) -> None:
    run.prepare_folder(tmp_path, toy_settings())
    path = tmp_path / "settings.yaml"
    path.write_text(path.read_text().replace("sigma_max: 1.0", "sigma_max: 2.0"))
    with pytest.raises(SystemExit, match=r"policy_kwargs: .*'sigma_max': 2.0.* there, .*'sigma_max': 1.0.* now"):
        run.prepare_folder(tmp_path, toy_settings())
    run.prepare_folder(tmp_path, toy_settings(policy_kwargs={"diffusion_kwargs": {"sigma_max": 2.0}}))


def test_another_device_is_a_difference(tmp_path: Path) -> None:
    run.prepare_folder(tmp_path, toy_settings())
    with pytest.raises(SystemExit, match="device: cpu there, cuda now"):
        run.prepare_folder(tmp_path, dataclasses.replace(toy_settings(), device="cuda"))


def test_an_argument_that_only_the_stored_runs_have_is_a_difference(tmp_path: Path) -> None:
    # The default of this one is None, which is not among the defaults that are stored
    run.prepare_folder(tmp_path, toy_settings(replay_buffer_kwargs={"reward_cut_key": "goal_met"}))
    with pytest.raises(SystemExit, match=r"replay_buffer_kwargs: .*goal_met.* there, None now"):
        run.prepare_folder(tmp_path, toy_settings())


@pytest.mark.parametrize("path", sorted(run.RESULTS.glob("*/*/settings.yaml")), ids=lambda path: path.parent.name)
def test_the_command_of_a_committed_result_is_the_one_that_makes_it(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(given: Any, *args: Any) -> int:
        assert not given, "there is no CSV for a seed of the command"
        return 0

    monkeypatch.setattr(run, "run_all", missing)
    monkeypatch.setattr(toy, "train", missing)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    _, script, *arguments = shlex.split(yaml.safe_load(path.read_text())["command"])
    # Ends the program if it has other settings than the stored runs
    assert {"benchmarks/run.py": run, "benchmarks/toy.py": toy}[script].main(arguments) == 0
    output = capsys.readouterr().out
    n_seeds = len(list(path.parent.glob("seed*.csv")))
    if script == "benchmarks/run.py":
        assert f"{n_seeds} runs, {n_seeds} finished before" in output
    else:
        assert output.count(f"| {path.parent.name} |") == n_seeds


def test_a_failing_run_does_not_stop_the_others(tmp_path: Path) -> None:
    broken = ["--name", "broken", "--set", "batch_size=8", "rho=-1"]
    done = subprocess.run(
        command(tmp_path, "--algorithms", "algd-ve", "--seeds", "0", "1", "--steps", "10", *broken, "--jobs", "1"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert done.stdout.count("FAILED") == 2
    assert "rho" in done.stderr


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (["rho=0"], {"rho": 0}),
        (["learning_rate=3e-4"], {"learning_rate": 3e-4}),
        (["multiplier_space=projected"], {"multiplier_space": "projected"}),
        (["cost_limit=null", "tau=0.01"], {"cost_limit": None, "tau": 0.01}),
        (["policy_kwargs.a=1", "policy_kwargs.net_arch.pi=[8, 8]"], {"policy_kwargs": {"a": 1, "net_arch": {"pi": [8, 8]}}}),
    ],
)
def test_overrides_are_yaml(pairs: list[str], expected: dict[str, Any]) -> None:
    assert run.parse_overrides(pairs) == expected


def test_an_override_without_a_value_is_refused() -> None:
    with pytest.raises(SystemExit, match="key=value"):
        run.parse_overrides(["rho"])


def test_an_override_inside_of_a_value_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"--set a\.b=1: a is None already"):
        run.parse_overrides(["a=null", "a.b=1"])


def test_overrides_that_are_given_one_by_one_all_count() -> None:
    assert run.parse_arguments(["--name", "x", "--algorithms", "sac", "--set", "a=1", "--set", "b=2"]).set == ["a=1", "b=2"]


@pytest.mark.parametrize("left", ["seed0.csv", "seed0_checkpoint"])
def test_runs_without_settings_are_not_taken_for_others(tmp_path: Path, left: str) -> None:
    (tmp_path / left).touch()
    with pytest.raises(SystemExit, match=f"{left}, but no settings.yaml"):
        run.prepare_folder(tmp_path, toy_settings())


def test_a_checkpoint_of_a_finished_run_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "TwoModes-v0" / "algd-ve"
    arguments = ["--tasks", "TwoModes-v0", "--algorithms", "algd-ve", "--seeds", "0", "--out", str(tmp_path)]
    (folder / "seed0_checkpoint").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"no settings\.yaml"):
        run.main(arguments)
    (folder / "seed0_checkpoint").rmdir()
    run.prepare_folder(
        folder,
        dataclasses.replace(toy_settings(policy_kwargs={"diffusion": "ve"}), steps=20_000, eval_every=2000, n_episodes=20),
    )
    (folder / "seed0.csv").touch()
    (folder / "seed0_checkpoint").mkdir()
    assert run.main(arguments) == 0
    assert not (folder / "seed0_checkpoint").exists()


def test_a_run_of_another_process_is_not_reported_as_finished(tmp_path: Path) -> None:
    folder = tmp_path / "TwoModes-v0" / "tiny"
    folder.mkdir(parents=True)
    with (folder / ".seed0.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        arguments = ["--algorithms", "algd-ve", "--seeds", "0", "--steps", "20", *TINY]
        skipped = subprocess.run(command(tmp_path, *arguments), capture_output=True, text=True, timeout=300)
    assert skipped.returncode == 1
    assert "another process is doing this run" in skipped.stdout
    assert "finished in" not in skipped.stdout


def test_overrides_win_and_leave_the_defaults_alone() -> None:
    base = {"a": 1, "nested": {"x": 1, "y": 2}}
    assert run.merged(base, {"nested": {"x": 3}, "b": 4}) == {"a": 1, "nested": {"x": 3, "y": 2}, "b": 4}
    assert base == {"a": 1, "nested": {"x": 1, "y": 2}}


@pytest.mark.parametrize("arguments", [["--set", "rho=0"], ["--name", "x"]])
def test_an_experiment_needs_a_name_and_one_algorithm(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.parse_arguments(arguments)
    assert "--name" in capsys.readouterr().err


def test_an_experiment_cannot_have_the_name_of_an_algorithm(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.parse_arguments(["--algorithms", "sac", "--name", "algd-ve"])
    assert "--name algd-ve is an algorithm's own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("algorithm", "task", "expected"),
    [("sac", "HopperSpeed-v0", 0.99), ("sac", "TwoModes-v0", 1.0), ("sac-lagrangian", "HopperSpeed-v0", None)],
)
def test_costs_are_recorded_in_the_unit_of_the_tasks_limit(algorithm: str, task: str, expected: float | None) -> None:
    settings = run.Settings(task, algorithm, 1, 1, 1, 1, 1, "cpu", {})
    assert run.cost_gamma(settings) == expected


def test_an_unknown_task_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="NoSuchTask"):
        run.main(["--tasks", "NoSuchTask-v0", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


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


def test_one_seed_has_no_interval() -> None:
    assert plot.with_interval(np.array([[1.0, 2.0, 3.0, 40.0]]), 0.25) == "2.5"


def test_the_training_cost_is_summed_up_only_where_the_curve_tells_it() -> None:
    # Its costs are discounted sums over episodes that may end early
    assert plot.total_training_cost("HopperSpeed-v0", {0: make_curve([1], [5])}, {"steps": 2000, "kwargs": {}}) == ""


def test_a_run_is_finished_when_its_model_is_saved(tmp_path: Path) -> None:
    arguments = ["--algorithms", "algd-ve", "--seeds", "0", "--steps", "20", "--eval-every", "20", "--save", *TINY]
    folder = tmp_path / "TwoModes-v0" / "tiny"
    folder.mkdir(parents=True)
    model = folder / "seed0.zip"
    model.symlink_to("/dev/full")
    failed = subprocess.run(command(tmp_path, *arguments), capture_output=True, text=True, timeout=300)
    assert failed.returncode == 1
    assert "No space left on device" in failed.stderr
    assert not (folder / "seed0.csv").exists()

    model.unlink()
    assert "1 to do" in call(tmp_path, *arguments)
    assert (folder / "seed0.csv").exists()
    assert ALGD.load(model).num_timesteps == 20
