"""Runs with any seed, and learning curves that survive a kill while they are written."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sb3_algd import ALGD
from sb3_algd.common.recorder import LearningCurveRecorder, evaluation_seed, make_envs
from sb3_algd.train import main


def make_model(**kwargs: Any) -> ALGD:
    # No updates: what is learned does not matter here
    return ALGD("MlpPolicy", "TwoModes-v0", learning_starts=10_000, buffer_size=300, device="cpu", **kwargs)


def make_recorder(path: Path, **kwargs: Any) -> LearningCurveRecorder:
    defaults: dict[str, Any] = dict(eval_freq=100, n_episodes=1)
    return LearningCurveRecorder(path, lambda n: make_envs("TwoModes-v0", n), **{**defaults, **kwargs})


@pytest.mark.parametrize("seed", [0, 4294, 4295, 12345, 2**31 - 1])
def test_every_seed_of_a_run_gives_one_for_its_evaluations(seed: int) -> None:
    for step in (0, 10_000_000):
        # NumPy's generators take 32 bits, and environments count on from the first one's
        assert 0 <= evaluation_seed(seed, step) < 2**32 - 10_000
        np.random.seed(evaluation_seed(seed, step))


def test_seeds_of_runs_that_are_published_stay() -> None:
    assert [evaluation_seed(seed, 2000) for seed in range(3)] == [1_002_000, 2_002_000, 3_002_000]


@pytest.mark.parametrize("seed", [4295, 12345])
def test_a_learning_curve_is_recorded_with_any_seed(tmp_path: Path, seed: int) -> None:
    make_model(seed=seed).learn(100, callback=make_recorder(tmp_path / "curve.csv", seed=seed))
    with (tmp_path / "curve.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["100"]


def test_training_from_the_command_line_takes_any_seed(tmp_path: Path) -> None:
    main(["--env", "TwoModes-v0", "--steps", "105", "--seed", "12345", "--device", "cpu", "--out", str(tmp_path)])
    names = {path.name for path in (tmp_path / "TwoModes-v0_1").iterdir()}
    assert {"learning_curve.csv", "learning_curve.png", "model.zip"} <= names


def test_a_kill_while_a_row_is_written_leaves_the_rows_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = make_recorder(tmp_path / "curve.csv")
    writeheader = csv.DictWriter.writeheader

    def killed(self: csv.DictWriter) -> Any:
        if len(recorder.rows) == 2:
            raise KeyboardInterrupt
        return writeheader(self)

    monkeypatch.setattr(csv.DictWriter, "writeheader", killed)
    with pytest.raises(KeyboardInterrupt):
        make_model().learn(200, callback=recorder)
    with recorder.partial_path.open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["100"]


def test_a_learning_curve_counts_the_models_own_costs(tmp_path: Path) -> None:
    recorder = make_recorder(tmp_path / "curve.csv")
    make_model(cost_key=lambda info: 3.0).learn(100, callback=recorder)
    assert [(row["cost_mean"], row["cost_det"], row["train_cost"]) for row in recorder.rows] == [(300.0, 300.0, 300.0)]
