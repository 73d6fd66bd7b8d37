"""``python -m sb3_algd.train``, the program behind ``make train``."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_algd import ALGD, SACLag, train
from sb3_algd.common.recorder import Row
from sb3_algd.plotting import read_curve

SHORT = ["--env", "TwoModes-v0", "--steps", "120", "--eval-every", "60"]


def test_it_leaves_model_curve_and_picture_and_prints_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main([*SHORT, "--out", str(tmp_path)])
    folder = tmp_path / "TwoModes-v0_1"
    left = {path.name for path in folder.iterdir()} - {train.BEST}
    assert left == {"learning_curve.csv", "learning_curve.png", "model.zip"}
    assert read_curve(folder / "learning_curve.csv")["step"].tolist() == [60, 120]
    assert ALGD.load(folder / "model").num_timesteps == 120
    output = capsys.readouterr().out
    stochastic, deterministic = (line for line in output.splitlines() if line.startswith("Last model"))
    for line, name in (
        (stochastic, f"{train.N_FINAL_EPISODES} stochastic episodes"),
        (deterministic, "1 deterministic episode:"),
    ):
        assert line.startswith(f"Last model, {name}")
        found = re.search(r", cost ([\d.]+) \+/- [\d.]+(?: \(95% confidence: ([\d.]+) to ([\d.]+)\))?", line)
        assert found is not None
        mean, lower, upper = found.groups()
        if name.startswith("1 "):
            # Of one episode there is no interval
            assert lower is None
            lower = upper = mean
        assert float(lower) <= float(mean) <= float(upper)
        outcome = "within the limit" if float(upper) <= 64 else "OVER the limit" if float(lower) > 64 else "undecided"
        assert line.endswith(f"limit 64: {outcome}")


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ([(1.0, 65.0, 0.0)], None),
        ([(9.0, 65.0, 0.0), (1.0, 64.0, 0.0), (2.0, 3.0, 0.0), (1.5, 0.0, 0.0)], 2),
        # 20 episodes with a standard deviation of 10: 1.645 standard errors are 3.7
        ([(9.0, 61.0, 10.0), (1.0, 60.0, 10.0)], 1),
    ],
)
def test_the_best_feasible_model_is_kept(rows: list[tuple[float, float, float]], kept: int | None, tmp_path: Path) -> None:
    model = ALGD("DiffusionPolicy", "TwoModes-v0", policy_kwargs={"net_arch": [4]}, buffer_size=10)
    keep = train.BestFeasible(tmp_path / train.BEST)
    for index, (mean_return, mean_cost, cost_std) in enumerate(rows):
        model.num_timesteps = index
        keep(model, {"return_mean": mean_return, "cost_mean": mean_cost, "cost_std": cost_std})
    assert keep.path.is_file() == (kept is not None)
    if kept is not None:
        assert ALGD.load(keep.path).num_timesteps == kept


def test_a_second_run_keeps_the_first(tmp_path: Path) -> None:
    first, second = train.new_folder(tmp_path, "Task-v0"), train.new_folder(tmp_path, "Task-v0")
    assert first != second
    assert first.is_dir()
    assert second.is_dir()


def test_the_time_limit_ends_training(tmp_path: Path) -> None:
    args = train.parse_arguments([*SHORT, "--minutes", "0"])
    assert train.train_as_asked(args, tmp_path).num_timesteps == 1
    assert read_curve(tmp_path / "learning_curve.csv")["step"].tolist() == [1]


def interrupt(*_: object) -> bool:
    raise KeyboardInterrupt


def test_an_interrupted_run_keeps_what_was_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.StopTrainingOnTimeLimit, "_on_step", interrupt)
    train.train_as_asked(train.parse_arguments(SHORT), tmp_path)
    assert (tmp_path / "model.zip").exists()
    assert read_curve(tmp_path / "learning_curve.csv")["step"].tolist() == [1]


def test_sac_lagrangian_is_trained_by_the_same_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main([*SHORT, "--algo", "sac_lag", "--seed", "12345", "--out", str(tmp_path)])
    folder = tmp_path / "TwoModes-v0_1"
    assert SACLag.load(folder / "model").num_timesteps == 120
    assert "Training SACLag on TwoModes-v0" in capsys.readouterr().out


# --- the run that the program and the benchmarks are made of ---------------------------------------------------------


def run(folder: Path, model_class: type[BaseAlgorithm] = ALGD, **kwargs: Any) -> BaseAlgorithm:
    # SAC writes into its policy_kwargs
    small: dict[str, Any] = dict(policy_kwargs=dict(net_arch=[8]), batch_size=8, learning_starts=20)
    options = {"eval_every": 40, "n_episodes": 1, "device": "cpu", **kwargs}
    return train.train(model_class, "MlpPolicy", "TwoModes-v0", folder / "curve.csv", 120, small, **options)


def test_any_algorithm_leaves_its_curve_its_log_and_its_model(tmp_path: Path) -> None:
    rows: list[tuple[int, float]] = []

    def on_row(model: BaseAlgorithm, row: Row) -> None:
        # What is there when training has ended says that nothing is left to do
        assert not (tmp_path / "curve.csv").exists() and not (tmp_path / "model.zip").exists()
        rows.append((model.num_timesteps, row["step"]))

    model = run(tmp_path, SAC, n_envs=2, seed=3, on_row=on_row, log_folder=tmp_path / "log", model_path=tmp_path / "model.zip")
    assert rows == [(40, 40), (80, 80), (120, 120)]
    assert (model.n_envs, model.seed) == (2, 3)
    assert SAC.load(tmp_path / "model").num_timesteps == 120
    assert (tmp_path / "log" / "progress.csv").exists()
    curve = read_curve(tmp_path / "curve.csv")
    assert np.isnan(curve["multiplier"]).all() and np.isfinite(curve["cost_mean"]).all()


def test_the_curve_is_there_only_if_the_model_is(tmp_path: Path) -> None:
    model_path = tmp_path / "model.zip"
    model_path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, model_path=model_path)
    assert not (tmp_path / "curve.csv").exists()


def test_ctrl_c_ends_the_program_where_nothing_is_to_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.StopTrainingOnTimeLimit, "_on_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, minutes=1.0)
    assert not (tmp_path / "curve.csv").exists()


@pytest.mark.parametrize("model_class", [ALGD, SACLag])
def test_a_run_goes_on_from_its_checkpoint(
    model_class: type[BaseAlgorithm], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole", model_class, checkpoint=tmp_path / "other", checkpoint_every=40)

    def interrupt_at_the_second(model: BaseAlgorithm, row: Row) -> None:
        if row["step"] == 80:
            raise KeyboardInterrupt

    options: dict[str, Any] = dict(checkpoint=tmp_path / "checkpoint", checkpoint_every=40)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, model_class, on_row=interrupt_at_the_second, **options)
    assert (tmp_path / "checkpoint").exists()
    resumed = run(tmp_path, model_class, **options)
    assert type(resumed) is model_class
    assert not (tmp_path / "checkpoint").exists()
    assert read_curve(tmp_path / "curve.csv")["step"].tolist() == [40, 80, 120]
    expected = whole.policy.state_dict()
    assert all(th.equal(value, expected[name]) for name, value in resumed.policy.state_dict().items())


def test_what_is_missing_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else object())
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        train.main([*SHORT, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--env", "Nowhere-v0"], "--env Nowhere-v0: Environment `Nowhere` doesn't exist"),
        (["--env", "CartPole-v1"], "ALGD on CartPole-v1: .*Discrete"),
        (["--out", "/proc/x"], "--out /proc/x: /proc/x.*No such file or directory. Name a folder that can be written to."),
        (["--device", "nowhere"], "There is no device 'nowhere'"),
        (["--device", "cuda"], "--device cuda: PyTorch finds no CUDA device here"),
    ],
)
def test_a_mistake_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(train.th.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=message) as error:
        train.main([*SHORT, "--out", str(tmp_path), *arguments])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option, value", [("--steps", "-5"), ("--steps", "1e3"), ("--minutes", "nan"), ("--eval-every", "0"), ("--seed", "-1")]
)
def test_numbers_that_make_no_sense_are_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train.parse_arguments([option, value])
    assert f"argument {option}: " in capsys.readouterr().err


def test_a_task_that_cannot_be_made_is_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_its_packages(*_: object) -> None:
        raise ImportError("The safety tasks need:\n pip install x")

    monkeypatch.setattr(train, "make_envs", without_its_packages)
    with pytest.raises(SystemExit, match="ALGD on TwoModes-v0: The safety tasks need: pip install x"):
        train.main([*SHORT, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_training_that_cannot_start_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(train, "train_as_asked", broken)
    with pytest.raises(RuntimeError, match="no room"):
        train.main([*SHORT, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given, expected", [(None, [1]), ("2", [])])
def test_it_has_one_thread_unless_it_is_given_more(
    given: str | None, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    chosen: list[int] = []
    monkeypatch.setattr(train.th, "set_num_threads", chosen.append)
    monkeypatch.setattr(train, "train_as_asked", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train.main([*SHORT, "--out", str(tmp_path)])
    assert chosen == expected
