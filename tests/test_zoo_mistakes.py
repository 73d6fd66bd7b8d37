"""Mistakes on the command line: one line that says what to do, and nothing is left behind."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rl_zoo3")

from tests.conftest import run_cli

ENV = "TwoModes-v0"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--env", "Nowhere-v0"], "Nowhere-v0 not found in gym registry"),
        (
            ["--env", ENV, "-params", "learning_rate:x"],
            r"^-params learning_rate:x: write key:value .* \(name 'x' is not defined",
        ),
        (["--env", ENV, "-params", "cost_limt:3"], "^ALGD has no argument 'cost_limt'"),
        (["--env", ENV, "-params", "learning_rate:'x'"], "^`learning_rate` must be a number, or 'lin_3e-4'"),
        (["--env", ENV, "-params", "actor_learning_rate:'3e-4'"], "^`actor_learning_rate` must be a number, or"),
        (["--env", ENV, "-conf", "nofile.yml"], "^--conf-file nofile.yml: there is no such file. Those .* algd.yml, "),
        (["--env", "Pendulum-v1"], "^Pendulum-v1 declares no cost limit: give one with -params cost_limit:10"),
        (["--env", ENV, "-params", "rho:-1"], "^`rho` must be"),
        (["--env", ENV, "--device", "nowhere"], "There is no device 'nowhere'"),
        ([], "Name the task with --env"),
        (["--env", ENV, "-params", "rho:1", "batch_size=3"], "^-params batch_size=3: write key:value"),
        (["--env", ENV, "--n-eval-envs", "0"], "^--n-eval-envs must be at least 1, got 0"),
        (["--env", ENV, "--eval-episodes", "0"], "^--eval-episodes must be at least 1, got 0"),
        (["--env", ENV, "-tb", "/proc/x"], "^/proc/x.*: No such file or directory"),
        (["--env", ENV, "--env-kwargs", "foo:1"], "^TwoModesEnv has no argument 'foo'"),
        (["--env", ENV, "-n", "0"], "`n_timesteps` must be at least 1"),
        (["--env", ENV, "-n", "-5"], "`n_timesteps` must be .*, got -5"),
    ],
)
def test_a_mistake_ends_in_one_line_and_leaves_nothing(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message) as error:
        run_cli("train", "-n", 10, *options, "-f", tmp_path / "logs" / "mine")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command, message",
    [
        (["enjoy"], "Name the task with --env"),
        (["enjoy", "--env", ENV, "--device", "cuda"], "--device cuda: PyTorch finds no CUDA device here"),
        (["enjoy", "--env", ENV, "--env-kwargs", "foo:1"], "^TwoModesEnv has no argument 'foo'"),
        (["enjoy", "--env", ENV, "--load-best"], f"^The agent of {ENV} .* is one model alone: leave out --load-best"),
        (["enjoy", "--onnx", "nofile.onnx"], "^nofile.onnx: No such file or directory. Write an agent to a file with:"),
        (["record_video", "--env", ENV, "-n", 3, "-o", "/proc/x"], "^/proc/x: No such file or directory"),
        (["record_video", "--env", "Safexp-PointButton1-v0"], r"is a policy alone \(.*policy.safetensors\)"),
        (["record_video", "--env", "Nowhere-v0"], f"agent that comes with the package is taken: {ENV}.$"),
    ],
)
def test_mistakes_of_those_who_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sb3_algd.train.th.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match=message):
        run_cli(*command)
    assert not list(tmp_path.iterdir())


def test_an_error_while_playing_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr("sb3_algd.envs.toy.TwoModesEnv.step", broken)
    with pytest.raises(TypeError, match="a bug"):
        run_cli("enjoy", "--env", ENV, "-n", 5, "--no-render", "--device", "cpu")


@pytest.mark.parametrize(
    "options, message",
    [
        (["-o", "/proc/x/costs.png"], "^/proc/x.*: No such file or directory"),
        (["-o", "costs.foo"], "^Format 'foo' is not supported"),
        (["--constraint", 3], r"has 1 cost\(s\), counted from 0, and none of number 3"),
        (["-a", "sac"], "holds no costs: only runs of algorithms with a cost limit"),
    ],
)
def test_mistakes_of_those_who_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    stored: dict[str, dict[str, Any]] = {"algd": {"costs": [[1.0]]}, "sac": {}}
    for name, costs in stored.items():
        folder = tmp_path / name / f"{ENV}_1"
        folder.mkdir(parents=True)
        np.savez(folder / "evaluations.npz", timesteps=[10], results=[[5.0]], **costs)
    with pytest.raises(SystemExit, match=message) as error:
        run_cli("plot_costs", "-e", ENV, "-f", tmp_path, *options)
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"algd", "sac"}


def test_an_algorithm_without_runs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "algd" / f"{ENV}_1"
    run.mkdir(parents=True)
    np.savez(run / "evaluations.npz", timesteps=[10, 20], results=[[5.0], [6.0]], costs=[[1.0], [2.0]])
    run_cli("plot_costs", "-a", "algd", "sac_lag", "-e", ENV, "-f", tmp_path, "-o", tmp_path / "costs.png")
    assert f"not drawn, because there is no evaluated run on {ENV} in {tmp_path / 'sac_lag'}" in capsys.readouterr().out
    assert (tmp_path / "costs.png").stat().st_size > 0


def test_all_plots_without_runs_ends_with_a_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"^No evaluated run on {ENV} in {tmp_path}/algd, {tmp_path}/sac: name the log"):
        run_cli("all_plots", "-a", "algd", "SAC", "-e", ENV, "-f", tmp_path, "--no-display")


@pytest.mark.parametrize("options", [["--max-cost", "-3"], ["--nonsense"], ["--env"]])
def test_what_the_command_line_cannot_be_is_one_line(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_cli("enjoy", "--env", ENV, "--no-render", *options)
    message = capsys.readouterr().err
    assert message.startswith("sb3-algd enjoy: ") and message.endswith("--help tells its options.\n")
    assert message.count("\n") == 1


@pytest.mark.parametrize(("name", "shipped"), [("algd", True), ("sac_lag", False)])
def test_enjoy_names_the_way_out_where_there_is_no_agent(name: str, shipped: bool, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="Name the log folder") as caught:
        run_cli("enjoy", "--algo", name, "--env", ENV, "-f", tmp_path, "--no-render")
    _, shown, agents = str(caught.value).partition("Without -f an agent that comes with the package is taken: ")
    assert "\n" not in str(caught.value)
    assert (bool(shown) and ENV in agents) == shipped


def test_what_the_hub_does_not_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError("No such\nrepository")

    monkeypatch.setattr("huggingface_sb3.load_from_hub", refused)
    with pytest.raises(SystemExit, match=r"^No such repository$"):
        run_cli("load_from_hub", "--env", ENV, "-f", tmp_path / "logs")
    assert not list(tmp_path.iterdir())
