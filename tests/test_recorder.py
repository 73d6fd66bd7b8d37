"""Learning curves: what they hold, and that recording them changes nothing."""

import csv
import random
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_algd import ALGD
from sb3_algd.common.checkpoint import ResumableCheckpointCallback, resume
from sb3_algd.common.random_state import preserved_random_state
from sb3_algd.common.recorder import COLUMNS, LearningCurveRecorder


class NoisyCostEnv(gym.Env):
    """Five steps an episode; the cost of step t is t, the reward depends on the action and on chance."""

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(-1, 1, (2,))
        self.action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def observe(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, 2).astype(np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        reward = float(action[0]) + self.np_random.normal()
        return self.observe(), reward, False, self.steps == 5, {"cost": float(self.steps)}


def make_envs(n_envs: int) -> VecEnv:
    return make_vec_env(NoisyCostEnv, n_envs)


def make_model(n_envs: int = 1, **kwargs: Any) -> ALGD:
    env = make_vec_env(NoisyCostEnv, n_envs, seed=3)
    arguments: dict[str, Any] = {"cost_limit": 10.0, "episode_length": 5, "learning_starts": 10, "batch_size": 8, **kwargs}
    return ALGD("DiffusionPolicy", env, policy_kwargs={"net_arch": [8]}, buffer_size=100, seed=3, device="cpu", **arguments)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames is not None
        assert tuple(reader.fieldnames) == COLUMNS
        return list(reader)


def record(model: Any, path: Path, steps: int, **kwargs: Any) -> list[dict[str, str]]:
    options = {"eval_freq": 10, "n_episodes": 4, "seed": 3, **kwargs}
    model.learn(steps, callback=LearningCurveRecorder(path, make_envs, **options))
    return read_rows(path)


def test_rows_hold_what_was_measured(tmp_path: Path) -> None:
    model = make_model()
    rows = record(model, tmp_path / "curve.csv", 25)
    # One more row for the end, which is no multiple of the frequency
    assert [row["step"] for row in rows] == ["10", "20", "25"]
    for row in rows:
        assert float(row["cost_mean"]) == 15.0
        assert float(row["cost_std"]) == 0.0
        assert float(row["cost_det"]) == 15.0
        assert float(row["train_cost"]) == 15.0
        assert float(row["return_std"]) > 0.0
        assert float(row["seconds"]) > 0.0
    assert float(rows[-1]["multiplier"]) == pytest.approx(model.lagrange_multiplier.value.item(), rel=1e-5)
    assert not list(tmp_path.glob("*.partial"))


def test_training_cost_is_that_of_the_episodes_since_the_row_before(tmp_path: Path) -> None:
    class GrowingCostEnv(NoisyCostEnv):
        """Each step of the n-th episode costs n."""

        episode = 0

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            observation, reward, terminated, truncated, _ = super().step(action)
            self.episode += self.steps == 1
            return observation, reward, terminated, truncated, {"cost": float(self.episode)}

    env = make_vec_env(GrowingCostEnv)
    model = SAC("MlpPolicy", env, buffer_size=100, learning_starts=1000, device="cpu")
    # Two episodes of five steps between evaluations
    assert [float(row["train_cost"]) for row in record(model, tmp_path / "curve.csv", 20)] == [5 * 1.5, 5 * 3.5]


def test_costs_are_in_the_unit_of_the_limit(tmp_path: Path) -> None:
    model = make_model(cost_limit_discounted=True, cost_limit_gamma=0.5)
    discounted = 1 + 2 / 2 + 3 / 4 + 4 / 8 + 5 / 16
    for row in record(model, tmp_path / "curve.csv", 10):
        assert float(row["cost_mean"]) == discounted
        assert float(row["train_cost"]) == discounted


@pytest.mark.parametrize("n_envs", [1, 2])
def test_recording_does_not_change_training(n_envs: int, tmp_path: Path) -> None:
    recorded = make_model(n_envs)
    record(recorded, tmp_path / "curve.csv", 40)
    alone = make_model(n_envs)
    alone.learn(40)
    for one, other in zip(recorded.policy.parameters(), alone.policy.parameters(), strict=True):
        assert th.equal(one, other)


def test_evaluations_are_reproducible_and_differ_from_each_other(tmp_path: Path) -> None:
    columns = ("return_mean", "return_std", "return_det")
    # No updates, so rows differ only by what happens in the episodes
    first, again, other = (
        [
            [row[column] for column in columns]
            for row in record(make_model(learning_starts=1000), tmp_path / "curve.csv", 20, seed=seed)
        ]
        for seed in (3, 3, 4)
    )
    assert first == again
    assert first[0] != first[1]
    assert first != other


def test_an_interrupted_run_leaves_its_rows_under_another_name(tmp_path: Path) -> None:
    path = tmp_path / "curve.csv"

    def interrupt(row: dict[str, float]) -> None:
        if row["step"] == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(make_model(), path, 40, on_row=interrupt)
    assert not path.exists()
    assert [row["step"] for row in read_rows(tmp_path / "curve.csv.partial")] == ["10", "20"]
    # The next attempt starts afresh
    assert [row["step"] for row in record(make_model(), path, 10)] == ["10"]


def test_a_resumed_run_is_evaluated_at_the_same_steps(tmp_path: Path) -> None:
    # Stored before the first evaluation, when nothing in the recorder has changed yet
    callbacks = [LearningCurveRecorder(tmp_path / "a.csv", make_envs, 30, 2), ResumableCheckpointCallback(15, tmp_path / "c")]
    make_model().learn(20, callback=callbacks)
    (tmp_path / "a.csv").unlink()
    recorder = LearningCurveRecorder(tmp_path / "a.csv", make_envs, 30, 2)
    resume(tmp_path / "c", make_vec_env(NoisyCostEnv, 1, seed=3), [recorder], total_timesteps=70)
    assert [int(row["step"]) for row in read_rows(tmp_path / "a.csv")][-3:] == [30, 60, 70]


def test_a_second_run_starts_a_new_curve(tmp_path: Path) -> None:
    recorder = LearningCurveRecorder(tmp_path / "curve.csv", make_envs, 10, 2)
    for _ in range(2):
        make_model().learn(20, callback=recorder)
        assert [row["step"] for row in read_rows(tmp_path / "curve.csv")] == ["10", "20"]


def test_an_algorithm_without_constraint_can_be_recorded(tmp_path: Path) -> None:
    model = SAC("MlpPolicy", make_vec_env(NoisyCostEnv), buffer_size=100, learning_starts=1000, device="cpu")
    (row,) = record(model, tmp_path / "curve.csv", 10)
    assert row["multiplier"] == "nan"
    assert float(row["cost_mean"]) == 15.0


def test_no_finished_training_episode_is_not_a_number(tmp_path: Path) -> None:
    (row,) = record(make_model(), tmp_path / "curve.csv", 3)
    assert row["train_cost"] == "nan"


def test_several_constraints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="several constraints"):
        record(make_model(cost_limit=[1.0, 2.0]), tmp_path / "curve.csv", 3)


def test_every_random_generator_is_kept() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), th.rand(1).item()

    random.seed(0), np.random.seed(0), th.manual_seed(0)
    expected = draw()
    random.seed(0), np.random.seed(0), th.manual_seed(0)
    with preserved_random_state(th.device("cpu")):
        assert draw() == expected
    assert draw() == expected


def test_a_function_that_reads_costs_is_called_once_a_step(tmp_path: Path) -> None:
    seen = []

    def count(info: dict[str, Any]) -> float:
        seen.append(info["cost"])
        return info["cost"]

    with_key, without = (tmp_path / name for name in ("with.csv", "without.csv"))
    recorder = LearningCurveRecorder(with_key, make_envs, eval_freq=100, n_episodes=1)
    recorder._play = lambda *args, **kwargs: ([0.0], np.zeros(1))  # type: ignore[method-assign]
    make_model(n_envs=2, cost_key=count).learn(20, callback=recorder)
    assert seen == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0, 5.0, 5.0] * 2
    make_model(n_envs=2).learn(20, callback=LearningCurveRecorder(without, make_envs, eval_freq=100, n_episodes=1))
    assert read_rows(with_key)[0]["train_cost"] == read_rows(without)[0]["train_cost"] == "15"
