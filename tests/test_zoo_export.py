"""The commands for exported agents: ``export``, and ``enjoy --onnx``."""

import shutil
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("rl_zoo3")

from sb3_algd import ALGD
from sb3_algd.export import export_onnx, load_policy
from sb3_algd_runtime import Agent
from tests.conftest import make_model_of, run_cli

ENV = "TwoModes-v0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs of a short training run with normalised observations, and what is exported of it."""
    folder = tmp_path_factory.mktemp("export")
    tiny = ["learning_starts:60", "batch_size:16", "policy_kwargs:dict(net_arch=[8], denoising_steps=2)", "normalize:True"]
    options = ["--env", ENV, "-n", 150, "--eval-freq", -1, "--seed", 1, "--device", "cpu", "-f", folder / "logs"]
    run_cli("train", *options, "-params", *tiny)
    options = ["--env", ENV, "-f", folder / "logs", "-o", folder / "agent.onnx"]
    run_cli("export", *options, "--policy-folder", folder / "policy", "--eval-episodes", 2)
    return folder


def report(capsys: pytest.CaptureFixture[str], *options: object) -> list[str]:
    capsys.readouterr()
    run_cli("enjoy", *options, "-n", 300, "--no-render", "--device", "cpu")
    out = capsys.readouterr().out
    return out[out.index("\n3 episodes\n") :].splitlines()


def test_an_exported_agent_is_played_as_its_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--env", ENV, "-f", folder / "logs"]
    file = ["--onnx", folder / "agent.onnx"]
    expected = report(capsys, *model, "--deterministic")
    assert "limit 64: " in expected[3]
    assert report(capsys, *file, "--deterministic") == expected
    # With the environment of the training, and without what it normalises
    assert report(capsys, *file, *model, "--deterministic") == expected
    stochastic = report(capsys, *file)
    assert stochastic != expected
    assert report(capsys, *file) == stochastic != report(capsys, *file, "--seed", 5)


def test_both_files_hold_what_was_measured_and_act_alike(folder: Path) -> None:
    agent, policy = Agent.load(folder / "agent.onnx"), load_policy(folder / "policy")
    assert agent.metadata["normalized"] == ["observation"]
    assert policy.config["normalization"]["statistics"].keys() == {"observation"}
    for described in (agent.metadata, policy.config):
        assert described["task"] == ENV and described["results"]["n_episodes"] == 2
        assert described["results"]["verdict"].startswith("undecided")
    observations = np.linspace(-0.5, 0.5, 7, dtype=np.float32)[:, None]
    expected, _ = policy.predict(observations, deterministic=True)
    np.testing.assert_allclose(agent.act(observations, deterministic=True), expected, atol=1e-5)
    assert np.ptp(expected) > 0.0


def test_a_policy_that_comes_with_the_package_is_played(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sb3_algd.zoo.commandline.TRAINED_AGENTS", tmp_path)
    shutil.copytree(folder / "policy", tmp_path / "algd" / f"{ENV}_1")
    expected = report(capsys, "--env", ENV, "-f", folder / "logs", "--deterministic")
    assert report(capsys, "--env", ENV, "--deterministic") == expected
    (tmp_path / "algd" / f"{ENV}_1" / "policy.safetensors").write_bytes(b"damaged")
    with pytest.raises(SystemExit, match="is damaged"):
        run_cli("enjoy", "--env", ENV, "--no-render")


def test_best_of_several(folder: Path, tmp_path: Path) -> None:
    run_cli("export", "--env", ENV, "-f", folder / "logs", "-o", tmp_path / "best.onnx", "--n-candidates", 4)
    assert Agent.load(tmp_path / "best.onnx").noise_shape == (4, 2, 2)
    run_cli("export", "--env", ENV, "-f", folder / "logs", "-o", tmp_path / "fixed.onnx", "--deterministic")
    assert Agent.load(tmp_path / "fixed.onnx").noise_shape is None


@pytest.mark.parametrize(
    "command, message",
    [
        (["export", "--env", ENV, "-o", "nowhere/agent.onnx"], "name a file in a folder that is there"),
        (["export", "--env", ENV, "-o", "."], "name a file in a folder that is there"),
        (["export", "--env", ENV, "--n-candidates", 0], "n_candidates must be a whole number"),
        (["export", "--env", ENV, "--n-candidates", 2, "--policy-folder", "p"], "leave out --n-candidates"),
        (["export", "--env", "Nowhere-v0", "-f", "."], "Name the log folder"),
        (["export", "--env", "Safexp-PointButton2-v0"], "is a policy alone .* Train one with: sb3-algd train"),
        (["export", "--env", ENV, "--env-kwargs", "foo:1"], "^TwoModesEnv has no argument 'foo'"),
        (["export", "--env", ENV, "--env-kwargs", "foo"], "^--env-kwargs foo: write key:value"),
        (["enjoy", "--onnx", "missing.onnx"], "No such file"),
        (["enjoy", "--onnx", "damaged.onnx"], r"damaged\.onnx is not a complete ONNX file"),
        (["enjoy", "--onnx", "{agent}", "--env", "Nowhere-v0"], "--env Nowhere-v0: Environment `Nowhere` doesn't exist"),
        (["enjoy", "--onnx", "{agent}", "--env", "Pendulum-v1"], r"this environment has \{'observation': \(3,\)\}"),
    ],
)
def test_mistakes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[object], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("damaged.onnx").write_bytes((folder / "agent.onnx").read_bytes()[:1000])
    with pytest.raises(SystemExit, match=message) as error:
        run_cli(*(str(folder / "agent.onnx") if part == "{agent}" else part for part in command))
    assert "\n" not in str(error.value) or "Name the log folder" in message
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.onnx"]


def test_a_negative_number_of_episodes_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_cli("export", "--env", ENV, "--eval-episodes", "-3")
    assert "argument --eval-episodes: must be at least 0, got -3" in capsys.readouterr().err


def test_a_file_without_task_or_with_a_cost_function(tmp_path: Path) -> None:
    model = make_model_of(ALGD, gym.make(ENV), cost_limit=None, cost_key=lambda info: info["cost"])
    export_onnx(model, tmp_path / "function.onnx")
    with pytest.raises(SystemExit, match=r"read costs with a function \(cost_key\)"):
        run_cli("enjoy", "--onnx", tmp_path / "function.onnx", "--no-render")
    export_onnx(make_model_of(ALGD), tmp_path / "nameless.onnx")
    with pytest.raises(SystemExit, match="does not name its task: give --env"):
        run_cli("enjoy", "--onnx", tmp_path / "nameless.onnx", "--no-render")
