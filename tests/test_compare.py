"""Runs side by side: what is asked for is done once, on this machine and on a cluster, and reported with verdicts."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.base_class import BaseAlgorithm

import sb3_algd
from sb3_algd import SACLag
from sb3_algd.compare import __main__ as compare
from sb3_algd.compare import engine, report, settings
from sb3_algd.plotting import read_curve

ROOT = Path(__file__).parents[1]
#: Networks of this size make no sense, but are quick
TINY = ["policy_kwargs.net_arch=[8]", "batch_size=8", "learning_starts=20"]


def command(out: Path, *arguments: str, seeds: int = 1, algos: tuple[str, ...] = ("sac_lag",)) -> list[str]:
    tiny = [f"{name}.{pair}" for name in algos for pair in TINY]
    options = ["--env", "TwoModes-v0", "--episodes", "2", "--seeds", str(seeds), "-o", str(out), "--jobs", "2"]
    return [*options, "--algos", *algos, "--set", *tiny, *arguments]


# --- the command -----------------------------------------------------------------------------------------------------


def test_algorithms_side_by_side(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = command(tmp_path, "--steps", "120", "--eval-every", "60", seeds=2, algos=("sac_lag", "sac"))
    assert compare.main(arguments) == 0
    printed = capfd.readouterr().out
    assert "4 runs, 0 finished before, 4 to do" in printed
    folder = tmp_path / "TwoModes-v0"
    for name in ("sac_lag", "sac"):
        for seed in (0, 1):
            assert read_curve(folder / name / f"seed{seed}.csv")["step"].tolist() == [60, 120]
    assert SACLag.load(folder / "sac_lag" / "seed1.zip").num_timesteps == 120
    assert SAC.load(folder / "sac" / "seed0.zip").learning_rate == 1e-3
    assert (folder / "comparison.png").stat().st_size > 10_000
    assert "</svg>" in (folder / "comparison.svg").read_text() and "</svg>" in (folder / "plane.svg").read_text()
    written = (folder / "comparison.md").read_text()
    table = printed[printed.index("| algorithm") :].split("\n\n")[0]
    assert table in written
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["SAC-Lagrangian", "SAC, no constraint"]
    # What the last row of the curve says, and a verdict on it
    rows = [read_curve(folder / "sac" / f"seed{seed}.csv") for seed in (0, 1)]
    mean_return, mean_cost = (np.mean([row[column][-1] for row in rows]) for column in ("return_mean", "cost_mean"))
    cells = [cell.strip() for cell in table.splitlines()[-1].split("|")[1:-1]]
    assert cells[1] == "0, 1"
    assert cells[2].startswith(f"{mean_return:.2f} ± ")
    assert cells[3].startswith(f"{mean_cost:.2f} (")
    assert cells[4] == "64"

    # Once more: nothing to do, the same table
    assert compare.main(arguments) == 0
    printed = capfd.readouterr().out
    assert "4 runs, 4 finished before, 0 to do" in printed
    assert table in printed


def test_a_run_that_failed_is_told_and_the_others_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = ("--set", "sac.gamma=none of them")
    arguments = command(tmp_path, "--steps", "60", *broken, algos=("sac_lag", "sac"))
    assert compare.main(arguments) == 1
    printed = capfd.readouterr().out
    assert "TwoModes-v0/sac/seed0: FAILED with exit code 1" in printed
    assert "| SAC-Lagrangian |" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--env", "Nowhere-v0"], "Cannot make the task Nowhere-v0: Environment `Nowhere` doesn't exist."),
        (["--env", "Pendulum-v1"], "Pendulum-v1 declares no cost limit: give one with --cost-limit"),
        (["--gym-packages", "not_there"], "--gym-packages not_there: No module named 'not_there'"),
        (["--set", "rho=0"], "--set: sac has no argument rho"),
        (["--set", "sac.rho=0"], "--set: sac has no argument rho"),
        (["--set", "batch_size=0"], "ALGD on TwoModes-v0: .*batch_size"),
        (["--set", "sac.buffer_size=none"], "SAC on TwoModes-v0: "),
        (["--out", "/proc/x"], "The results folder cannot be made: /proc/.*: No such file or directory. Give another --out."),
        (["--out", "/dev/null"], "The results folder cannot be made: /dev/null/.*: Not a directory. Give another --out."),
        (["--set", "algd.cost_limit=1"], "the limit is the same for all, give it with --cost-limit"),
        (["--device", "nowhere"], "There is no device 'nowhere'"),
        (["--scheduler", "nonsense://x"], "--scheduler nonsense://x: unknown address scheme"),
    ],
)
def test_a_mistake_ends_in_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=message) as error:
        compare.main(["--env", "TwoModes-v0", "-o", str(tmp_path), *options])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("seed*"))


def test_a_negative_limit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        compare.main(command(tmp_path, "--cost-limit", "-1"))
    assert "argument --cost-limit: must be at least 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("left", [None, "seed0.csv", "seed0.csv.partial", "seed0_checkpoint", "lock"])
def test_settings_without_any_result_are_overwritten(left: str | None, tmp_path: Path) -> None:
    described = settings.Settings("TwoModes-v0", "sac_lag", 10, 5, 2, 1, 1, "cpu", {"rho": 0.0})
    settings.prepare_folder(tmp_path, described, [0], ["first"], 1.0)
    other = replace(described, steps=20)
    with ExitStack() as stack:
        lock = stack.enter_context((tmp_path / ".seed0.lock").open("w"))
        if left == "lock":
            fcntl.flock(lock, fcntl.LOCK_EX)
        elif left is not None:
            (tmp_path / left).touch()
        if left is not None:
            with pytest.raises(SystemExit, match=r"holds runs with other settings .steps: 10 there, 20 now"):
                settings.prepare_folder(tmp_path, other, [0], ["second"], 1.0)
            return
        settings.prepare_folder(tmp_path, other, [0], ["second"], 1.0)
    assert "steps: 20" in (tmp_path / "settings.yaml").read_text()


def test_a_task_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own_task.py").write_text(
        "import gymnasium as gym\n"
        "from sb3_algd.envs.wrappers import CostFromCallable\n"
        "def make():\n"
        "    env = gym.make('Pendulum-v1').unwrapped\n"
        "    return CostFromCallable(env, lambda obs, action, next_obs, info: abs(float(action[0])), cost_limit=7.5)\n"
        "gym.register('Own-v0', make, max_episode_steps=30)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    options = ["--env", "Own-v0", "--gym-packages", "own_task", "--steps", "60"]
    assert compare.main(command(Path("out"), *options)) == 0
    assert "| 7.5 " in capfd.readouterr().out
    assert SACLag.load(tmp_path / "out" / "Own-v0" / "sac_lag" / "seed0.zip").cost_limit == 7.5


@pytest.mark.parametrize(
    ("space", "policy"),
    [
        (spaces.Box(-1, 1, (3,)), "MlpPolicy"),
        (spaces.Box(0, 255, (3, 36, 36), np.uint8), "CnnPolicy"),
        (spaces.Dict({"a": spaces.Box(-1, 1, (3,))}), "MultiInputPolicy"),
    ],
)
def test_the_policy_fits_the_observations(space: spaces.Space, policy: str) -> None:
    assert compare.policy_of(space) == policy


def test_arguments_are_for_all_algorithms_or_for_one() -> None:
    overrides = compare.overrides_of(["gamma=0.5", "algd.gamma=0.9", "algd.score_kwargs.n_samples=2"], ["algd", "sac"])
    assert overrides == {"algd": {"gamma": 0.9, "score_kwargs": {"n_samples": 2}}, "sac": {"gamma": 0.5}}


def test_checkpoints_are_at_evaluations_and_episodes_apart(tmp_path: Path) -> None:
    def checkpoints(*options: str) -> int | None:
        args = compare.parse_arguments(["--env", "TwoModes-v0", "-o", str(tmp_path / "-".join(options)), *options])
        return compare.prepare(args, 64.0, [])["algd"][0].settings.checkpoint_every

    # Episodes have 100 steps
    assert checkpoints("--steps", "2000") == 1000
    assert checkpoints("--steps", "20000") == 4000
    assert checkpoints("--steps", "20000", "--eval-every", "1500") == 4500
    args = compare.parse_arguments(["--env", "TwoModes-v0", "-o", str(tmp_path), "--algos", "sac"])
    assert compare.prepare(args, 64.0, [])["sac"][0].settings.checkpoint_every is None


def test_a_row_of_the_table(tmp_path: Path) -> None:
    given = settings.Settings("TwoModes-v0", "sac", 1, 1, 1, 1, 1, "cpu", {})
    runs = [settings.Run(given, seed, tmp_path, (SAC, "MlpPolicy", {})) for seed in (0, 1)]
    for run, (value, cost) in zip(runs, ((1.0, 0.0), (3.0, 100.0)), strict=True):
        run.episodes.write_text("return,cost\n" + "".join(f"{value},{cost + i % 5}\n" for i in range(20)))
    row = report.table_row("sac", runs, 10.0)
    assert row[:3] == ("SAC, no constraint", "0, 1", "2.00 ± 1.00")
    assert row[3].startswith("52.00 (")
    assert row[4:] == ("10", "over the limit", "1 within, 1 over")


# --- one run at a time -----------------------------------------------------------------------------------------------


def make_run(folder: Path) -> settings.Run:
    given = settings.Settings("TwoModes-v0", "sac", 1, 1, 1, 1, 1, "cpu", {})
    return settings.Run(given, 0, folder, (SAC, "MlpPolicy", {}))


def test_a_run_that_another_process_does_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    done: list[settings.Run] = []
    monkeypatch.setattr(engine, "do", done.append)
    program = (
        "import fcntl, sys, time\n"
        "lock = open(sys.argv[1], 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / ".seed0.lock")], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        assert not engine.do_alone(run)
        assert done == []
    finally:
        other.kill()
        other.communicate()
    assert engine.do_alone(run, patience=30.0)
    assert done == [run]


def test_a_worker_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=rf"The worker has sb3_algd {sb3_algd.__version__}, the command 9\.9"):
        engine._on_worker(make_run(tmp_path), "9.9")


# --- a cluster -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, dict[int, subprocess.Popen[bytes]]]]:
    """Address of a scheduler, and its two workers by process."""
    file = tmp_path / "scheduler.json"
    place = tmp_path / "workers"
    place.mkdir()
    options = ["--scheduler-file", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with ExitStack() as stack:

        def start(name: str, *arguments: str) -> subprocess.Popen[bytes]:
            log = stack.enter_context((tmp_path / f"{name}.log").open("w"))
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", "dask", *arguments], cwd=place, env=environment, stdout=log, stderr=log
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        start("scheduler", "scheduler", *options, "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        workers = {}
        for name in ("one", "other"):
            # Without a nanny, which would start a worker again that was killed
            process = start(name, "worker", *options, "--nthreads", "1", "--no-nanny", "--no-dashboard")
            workers[process.pid] = process
        wait_for(lambda: file.exists() and file.read_text().rstrip().endswith("}"))
        address = json.loads(file.read_text())["address"]
        with Client(address) as client:
            client.wait_for_workers(2, timeout=120)
        yield address, workers


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_run_of_a_killed_worker_goes_on_on_the_other(
    tmp_path: Path, cluster: tuple[str, dict[int, subprocess.Popen[bytes]]], capfd: pytest.CaptureFixture[str]
) -> None:
    address, workers = cluster
    short = ("--steps", "480", "--eval-every", "80", "--checkpoint-every", "160")
    assert compare.main(command(tmp_path / "whole", *short, seeds=2)) == 0
    whole = tmp_path / "whole" / "TwoModes-v0" / "sac_lag"
    folder = tmp_path / "cluster" / "TwoModes-v0" / "sac_lag"
    shutil.copytree(whole, folder)
    # The first of its three runs is finished before, the other two are for the workers
    for left in folder.glob("*seed1*"):
        left.unlink()
    arguments = command(tmp_path / "cluster", *short, "--scheduler", address, seeds=3)
    process = subprocess.Popen([sys.executable, "-m", "sb3_algd.cli", "compare", *arguments], cwd=ROOT)
    checkpoint = folder / "seed1_checkpoint"
    wait_for((checkpoint / "checkpoint.json").exists)
    killed = json.loads((checkpoint / "checkpoint.lock").read_text())["process"]
    os.kill(workers[killed].pid, signal.SIGKILL)
    assert not (folder / "seed1.csv").exists()
    assert process.wait(timeout=120) == 0

    printed = capfd.readouterr().out
    assert "3 runs, 1 finished before, 2 to do" in printed
    assert "2 workers at tcp://" in printed
    names = dict(zip(workers, ("one", "other"), strict=True))
    (other,) = workers.keys() - {killed}
    assert workers[other].poll() is None
    assert f"{folder / 'seed1.csv'}: goes on from step 160" in (tmp_path / f"{names[other]}.log").read_text()
    assert (folder / "seed0.csv").read_text() == (whole / "seed0.csv").read_text()
    curve, expected = (read_curve(path / "seed1.csv") for path in (folder, whole))
    for column in curve.keys() - {"seconds"}:
        np.testing.assert_array_equal(curve[column], expected[column], column)
    assert (folder / "episodes_seed1.csv").read_text() == (whole / "episodes_seed1.csv").read_text()
    # Finished runs are not repeated
    curves = {path: path.read_text() for path in folder.glob("seed*.csv")}
    assert len(curves) == 3
    assert compare.main(arguments) == 0
    assert "3 runs, 3 finished before, 0 to do" in capfd.readouterr().out
    assert {path: path.read_text() for path in folder.glob("seed*.csv")} == curves


@pytest.mark.parametrize(
    ("model_class", "task", "expected"),
    [(SAC, "HopperSpeed-v0", 0.99), (SAC, "TwoModes-v0", 1.0), (SACLag, "HopperSpeed-v0", None)],
)
def test_costs_are_recorded_in_the_unit_of_the_tasks_limit(
    model_class: type[BaseAlgorithm], task: str, expected: float | None
) -> None:
    assert settings.cost_gamma(model_class, task) == expected


# --- settings --------------------------------------------------------------------------------------------------------


def prepare(folder: Path, seeds: tuple[int, ...] = (0,), changed: dict[str, Any] | None = None, **kwargs: Any) -> None:
    given = settings.Settings("TwoModes-v0", "algd-ve", 10, 10, 1, 1, 1, "cpu", kwargs)
    settings.prepare_folder(folder, replace(given, **(changed or {})), list(seeds), ["-m", "benchmarks.run"])


@pytest.mark.parametrize(
    ("changed", "kwargs", "message"),
    [
        ({"device": "cuda"}, {"rho": 1}, "device: cpu there, cuda now"),
        ({"steps": 40}, {"rho": 1}, "steps: 10 there, 40 now"),
        ({}, {"rho": 2}, "rho: 1 there, 2 now"),
        ({}, {}, "rho: 1 there, None now"),
        ({}, {"rho": 1, "score_kwargs": {"n_samples": 2}}, r"score_kwargs: None there, \{'n_samples': 2\} now"),
    ],
)
def test_runs_with_other_settings_are_refused(
    tmp_path: Path, changed: dict[str, Any], kwargs: dict[str, Any], message: str
) -> None:
    prepare(tmp_path, rho=1)
    (tmp_path / "seed0.csv").touch()
    prepare(tmp_path, rho=1)
    with pytest.raises(SystemExit, match=message):
        prepare(tmp_path, changed=changed, **kwargs)


def test_nothing_is_added_to_the_runs_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(tmp_path)
    (tmp_path / "seed0.csv").touch()
    monkeypatch.setattr(settings, "__version__", "9.9")
    prepare(tmp_path)
    with pytest.raises(SystemExit, match=rf"version: {sb3_algd.__version__} there, 9\.9 now"):
        prepare(tmp_path, seeds=(0, 1))


@pytest.mark.parametrize("left", ["seed0.csv", "seed0_checkpoint"])
def test_runs_without_settings_are_not_taken_for_others(tmp_path: Path, left: str) -> None:
    (tmp_path / left).touch()
    with pytest.raises(SystemExit, match=f"{left}, but no settings.yaml"):
        prepare(tmp_path)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (["rho=0"], {"rho": 0}),
        (["learning_rate=3e-4"], {"learning_rate": 3e-4}),
        (["multiplier_kwargs.space=log", "tau=0.01"], {"multiplier_kwargs": {"space": "log"}, "tau": 0.01}),
        (
            ["policy_kwargs.a=null", "policy_kwargs.net_arch.pi=[8, 8]"],
            {"policy_kwargs": {"a": None, "net_arch": {"pi": [8, 8]}}},
        ),
    ],
)
def test_overrides_are_yaml(pairs: list[str], expected: dict[str, Any]) -> None:
    assert settings.parse_overrides(pairs) == expected


def test_overrides_win_and_leave_the_defaults_alone() -> None:
    base = {"a": 1, "nested": {"x": 1, "y": 2}}
    assert settings.merged(base, {"nested": {"x": 3}, "b": 4}) == {"a": 1, "nested": {"x": 3, "y": 2}, "b": 4}
    assert base == {"a": 1, "nested": {"x": 1, "y": 2}}
