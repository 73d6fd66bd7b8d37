"""``python -m sb3_algd.train``, the program behind ``make train``."""

from pathlib import Path

import pytest

from sb3_algd import ALGD, train
from sb3_algd.plotting import read_curve

SHORT = ["--env", "TwoModes-v0", "--steps", "120", "--eval-every", "60"]


def test_it_leaves_model_curve_and_picture_and_prints_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.main([*SHORT, "--out", str(tmp_path)])
    folder = tmp_path / "TwoModes-v0_1"
    assert sorted(path.name for path in folder.iterdir()) == ["learning_curve.csv", "learning_curve.png", "model.zip"]
    assert read_curve(folder / "learning_curve.csv")["step"].tolist() == [60, 120]
    assert ALGD.load(folder / "model").num_timesteps == 120
    output = capsys.readouterr().out
    assert "limit 64" in output
    stochastic, deterministic = (line for line in output.splitlines() if line.endswith("the limit"))
    for line, name in ((stochastic, "20 stochastic episodes"), (deterministic, "1 deterministic episode ")):
        assert line.startswith(name)
        cost = float(line.split("±")[1].split()[1])
        assert line.endswith("within the limit" if cost <= 64 else "OVER the limit")


def test_a_second_run_keeps_the_first(tmp_path: Path) -> None:
    first, second = train.new_folder(tmp_path, "Task-v0"), train.new_folder(tmp_path, "Task-v0")
    assert first != second
    assert first.is_dir()
    assert second.is_dir()


def test_the_time_limit_ends_training(tmp_path: Path) -> None:
    args = train.parse_arguments([*SHORT, "--minutes", "0"])
    assert train.train_as_asked(args, tmp_path).num_timesteps == 1
    assert read_curve(tmp_path / "learning_curve.csv")["step"].tolist() == [1]


def test_an_interrupted_run_keeps_what_was_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(train.StopTrainingOnTimeLimit, "_on_step", interrupt)
    train.train_as_asked(train.parse_arguments(SHORT), tmp_path)
    assert (tmp_path / "model.zip").exists()
    assert read_curve(tmp_path / "learning_curve.csv")["step"].tolist() == [1]


def test_what_is_missing_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else object())
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        train.main([*SHORT, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--env", "Nowhere-v0"], "--env Nowhere-v0: Environment `Nowhere` doesn't exist"),
        (["--device", "nowhere"], "There is no device 'nowhere'"),
        (["--device", "cuda"], "--device cuda: PyTorch finds no CUDA device here"),
    ],
)
def test_a_mistake_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(train.th.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=message) as error:
        train.main([*SHORT, *arguments, "--out", str(tmp_path)])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option, value", [("--steps", "-5"), ("--steps", "1e3"), ("--minutes", "nan"), ("--eval-every", "0"), ("--seed", "-1")]
)
def test_numbers_that_make_no_sense_are_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train.parse_arguments([option, value])
    assert f"argument {option}: " in capsys.readouterr().err


def test_a_training_that_cannot_start_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(train, "train_as_asked", broken)
    with pytest.raises(RuntimeError, match="no room"):
        train.main([*SHORT, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
