"""Callbacks: evaluation with costs, and the time limit."""

import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import SAC
from stable_baselines3.common.callbacks import BaseCallback, StopTrainingOnNoModelImprovement
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor

from sb3_algd import ALGD
from sb3_algd.common.callbacks import (
    CostEvalCallback,
    CostProgressBarCallback,
    RemainingTimeCallback,
    StopTrainingOnTimeLimit,
)

Outcome = tuple[float, float | list[float]]


class ScriptedEnv(gym.Env):
    """
    Two steps an episode, whose reward and cost (both paid at the second step) are given beforehand, whatever the policy does.

    :param outcomes: (reward, cost) of each episode; the last one stays.
    """

    def __init__(self, outcomes: Sequence[Outcome] = ((0.0, 0.0),)) -> None:
        self.observation_space = gym.spaces.Box(-1, 1, (1,))
        self.action_space = gym.spaces.Box(-1, 1, (1,))
        self.outcomes = list(outcomes)
        self.episode = 0
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        reward, cost = self.outcomes[min(self.episode, len(self.outcomes) - 1)]
        paid = float(self.steps == 2)
        # Counted at the end, because a vectorised environment is reset more often than it is played
        self.episode += self.steps == 2
        return np.zeros(1, np.float32), reward * paid, self.steps == 2, False, {"cost": np.asarray(cost) * paid}


def test_an_evaluation_has_an_episode() -> None:
    with pytest.raises(ValueError, match="n_eval_episodes must be at least 1, got 0"):
        CostEvalCallback(ScriptedEnv(), n_eval_episodes=0)


def make_model(cost_limit: float | list[float] = 10.0, **kwargs: Any) -> ALGD:
    costs = [0.0] * np.size(cost_limit)
    return ALGD(
        "DiffusionPolicy",
        Monitor(ScriptedEnv([(0.0, costs)])),
        buffer_size=100,
        learning_starts=1000,
        episode_length=2,
        cost_limit=cost_limit,
        policy_kwargs={"net_arch": [4]},
        device="cpu",
        **kwargs,
    )


class History(BaseCallback):
    """Remembers what the parent held after each evaluation, or at each new best model."""

    parent: CostEvalCallback

    def __init__(self) -> None:
        super().__init__()
        self.best: list[tuple[int, float, float]] = []

    def changes(self) -> list[int]:
        """Steps at which there was another best model than before."""
        before = [(), *(best for _, *best in self.best)]
        return [step for (step, *best), last in zip(self.best, before, strict=False) if best != last]

    def _on_step(self) -> bool:
        self.best.append((self.num_timesteps, self.parent.best_mean_reward, self.parent.best_violation))
        return True


def evaluate(outcomes: Sequence[Outcome], model: ALGD, n_eval_episodes: int = 1, **kwargs: Any) -> CostEvalCallback:
    """Evaluate at each step, as often as the outcomes last."""
    callback = CostEvalCallback(
        Monitor(ScriptedEnv(outcomes)), n_eval_episodes=n_eval_episodes, eval_freq=1, verbose=0, warn=False, **kwargs
    )
    model.learn(len(outcomes) // n_eval_episodes, callback=callback)
    return callback


@pytest.mark.parametrize(
    ("outcomes", "new_best", "final_reward"),
    [
        # Feasible from the start: the highest reward, as in SB3
        ([(1, 0), (3, 9), (2, 0)], [1, 2], 3),
        # A higher reward that breaks the limit is no improvement
        ([(1, 10), (100, 10.5)], [1], 1),
        # The first feasible model beats every infeasible one
        ([(50, 20), (1, 5), (40, 11)], [1, 2], 1),
        # While none is feasible, the least infeasible one, whatever its reward
        ([(50, 20), (60, 30), (1, 15), (70, 16)], [1, 3], 1),
        # As infeasible, but with a higher reward
        ([(50, 20), (60, 20), (55, 20)], [1, 2], 60),
        # The new best happens to have the same reward
        ([(5, 20), (5, 0), (6, 20), (7, 10)], [1, 2, 4], 7),
    ],
)
def test_best_model_is_the_best_feasible_one(
    outcomes: list[Outcome], new_best: list[int], final_reward: float, tmp_path: Path
) -> None:
    at_best, at_each = History(), History()
    callback = evaluate(
        outcomes,
        make_model(cost_limit=10.0),
        callback_on_new_best=at_best,
        callback_after_eval=at_each,
        best_model_save_path=str(tmp_path),
    )
    assert at_each.changes() == new_best
    # What stops at a good model must not see an infeasible one
    feasible = [step for step in new_best if np.max(outcomes[step - 1][1]) <= 10.0]
    assert [(step, reward) for step, reward, _ in at_best.best] == [(step, outcomes[step - 1][0]) for step in feasible]
    # What stays is what the last new best was, and nobody ever saw an infinite best reward
    assert callback.best_mean_reward == final_reward
    expected = [outcomes[max(best for best in new_best if best <= step) - 1][0] for step in range(1, len(outcomes) + 1)]
    assert [reward for _, reward, _ in at_each.best] == expected
    assert ALGD.load(tmp_path / "best_model").num_timesteps == new_best[-1]


def test_feasible_is_a_matter_of_the_mean_cost() -> None:
    at_best = History()
    # Two episodes each: mean cost 0, 11 and 10
    outcomes: list[Outcome] = [(1, 0), (1, 0), (5, 2), (5, 20), (3, 20), (3, 0)]
    callback = evaluate(outcomes, make_model(cost_limit=10.0), n_eval_episodes=2, callback_on_new_best=at_best)
    assert [step for step, _, _ in at_best.best] == [1, 3]
    assert callback.best_mean_reward == 3.0


def test_vector_constraints_are_judged_together() -> None:
    at_best, at_each = History(), History()
    # The excess counts as a share of its limit: 50 over 100 is less than 2 over 1
    outcomes: list[Outcome] = [(1, [100, 3]), (2, [150, 1]), (3, [100, 1]), (4, [100, 2])]
    model = make_model(cost_limit=[100.0, 1.0])
    callback = evaluate(outcomes, model, callback_on_new_best=at_best, callback_after_eval=at_each)
    assert at_each.changes() == [1, 2, 3]
    assert [step for step, _, _ in at_best.best] == [3]
    assert callback.best_violation == 0.0


def test_a_zero_limit_does_not_divide_by_zero() -> None:
    callback = evaluate([(1, 2), (1, 0.5), (1, 0)], make_model(cost_limit=0.0))
    assert callback.best_violation == 0.0
    assert callback.best_mean_reward == 1.0


def read_log(folder: Path, key: str) -> list[float]:
    with (folder / "progress.csv").open() as file:
        return [float(row[key]) for row in csv.DictReader(file) if row.get(key)]


def test_costs_are_stored_and_logged(tmp_path: Path) -> None:
    model = make_model()
    model.set_logger(configure(str(tmp_path), ["csv"]))
    evaluate([(1, 4), (2, 8), (3, 1), (5, 3)], model, n_eval_episodes=2, log_path=str(tmp_path))
    with np.load(tmp_path / "evaluations.npz") as stored:
        np.testing.assert_array_equal(stored["timesteps"], [1, 2])
        np.testing.assert_array_equal(stored["results"], [[1, 2], [3, 5]])
        np.testing.assert_array_equal(stored["ep_lengths"], [[2, 2], [2, 2]])
        np.testing.assert_array_equal(stored["costs"], [[4, 8], [1, 3]])
    assert read_log(tmp_path, "eval/mean_ep_cost") == [6, 2]
    assert read_log(tmp_path, "eval/mean_reward") == [1.5, 4]


def test_several_constraints_are_stored_and_logged_each(tmp_path: Path) -> None:
    outcomes: list[Outcome] = [(1, [4, 5]), (2, [8, 7])]
    model = make_model(cost_limit=[1.0, 1.0])
    model.set_logger(configure(str(tmp_path), ["csv"]))
    evaluate(outcomes, model, n_eval_episodes=2, log_path=str(tmp_path))
    assert read_log(tmp_path, "eval/mean_ep_cost_0") == [6]
    assert read_log(tmp_path, "eval/mean_ep_cost_1") == [6]
    with np.load(tmp_path / "evaluations.npz") as stored:
        np.testing.assert_array_equal(stored["costs"], [[[4, 5], [8, 7]]])


def test_costs_are_in_the_unit_of_the_limit(tmp_path: Path) -> None:
    # The cost is paid at the second step, so one factor of discount
    model = make_model(cost_limit=10.0, cost_limit_discounted=True, cost_limit_gamma=0.5)
    callback = evaluate([(1, 18)], model, log_path=str(tmp_path))
    with np.load(tmp_path / "evaluations.npz") as stored:
        np.testing.assert_array_equal(stored["costs"], [[9]])
    assert callback.best_violation == 0.0


def test_evaluation_keeps_to_its_frequency() -> None:
    at_each = History()
    callback = CostEvalCallback(
        Monitor(ScriptedEnv()), callback_after_eval=at_each, n_eval_episodes=1, eval_freq=3, verbose=0, warn=False
    )
    make_model().learn(7, callback=callback)
    assert [step for step, _, _ in at_each.best] == [3, 6]


def test_sb3s_no_improvement_callback_works_with_infeasible_evaluations() -> None:
    # The rewards grow, but break the limit: no improvement, so the third evaluation without one stops training
    outcomes: list[Outcome] = [(1, 0), (2, 99), (3, 99), (4, 99), (5, 99), (6, 99)]
    model = make_model()
    evaluate(outcomes, model, callback_after_eval=StopTrainingOnNoModelImprovement(max_no_improvement_evals=2))
    assert model.num_timesteps == 4


def test_a_model_without_limits_is_refused() -> None:
    model = SAC("MlpPolicy", Monitor(ScriptedEnv()), buffer_size=10, device="cpu")
    with pytest.raises(ValueError, match="SAC has none"):
        model.learn(1, callback=CostEvalCallback(Monitor(ScriptedEnv())))


def test_time_limit_stops_training(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    model = make_model()
    model.learn(50, callback=StopTrainingOnTimeLimit(5, verbose=1))
    assert model.num_timesteps == 5
    assert "after 5 seconds" in capsys.readouterr().out


def test_time_limit_starts_again_with_each_learn() -> None:
    model = make_model()
    callback = StopTrainingOnTimeLimit(1000)
    model.learn(3, callback=callback)
    first_start = callback._started
    model.learn(3, callback=callback, reset_num_timesteps=False)
    assert model.num_timesteps == 6
    assert callback._started > first_start


def test_what_an_evaluation_prints(capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(cost_limit=10.0)
    outcomes = [(50.0, 20.0), (60.0, 30.0), (1.0, 5.0), (40.0, 11.0)]
    callback = CostEvalCallback(Monitor(ScriptedEnv(outcomes)), n_eval_episodes=1, eval_freq=1, verbose=1, warn=False)
    model.learn(len(outcomes), callback=callback)
    told = [line for line in capsys.readouterr().out.splitlines() if "valuation" in line or "best" in line]
    assert told == [
        "Evaluation at step 1: return 50.00, cost 20.00 +/- 0.00, limit 10: OVER the limit",
        "New best model: none was within the limit so far, and this one exceeds it least",
        "Evaluation at step 2: return 60.00, cost 30.00 +/- 0.00, limit 10: OVER the limit",
        "Evaluation at step 3: return 1.00, cost 5.00 +/- 0.00, limit 10: within the limit",
        "New best feasible model",
        "Evaluation at step 4: return 40.00, cost 11.00 +/- 0.00, limit 10: OVER the limit",
    ]
    assert callback.verbose == 1


def test_the_remaining_time_is_told_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(0, 1000, 90))
    monkeypatch.setattr("sb3_algd.common.callbacks.time.monotonic", lambda: next(seconds))
    model = make_model()
    model.learning_starts = 4
    model.batch_size = 4
    model.learn(40, callback=RemainingTimeCallback(10))
    told = [line for line in capsys.readouterr().out.splitlines() if "remaining" in line]
    assert told == ["10 steps with updates took 90 seconds. The remaining 25 steps will take about 3.8 minutes."]


@pytest.mark.parametrize("given", [None, "callback", "list", "function"])
def test_the_progress_bar_shows_costs(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(CostProgressBarCallback, "_on_training_end", lambda self: shown.append(self.pbar.desc))
    other = StopTrainingOnTimeLimit(1000)
    callback: Any = {None: None, "callback": other, "list": [other], "function": lambda locals_, globals_: True}[given]
    model = make_model().learn(120, callback=callback, progress_bar=True)
    (line,) = shown
    assert line.startswith("return ")
    assert f"cost {np.mean(model.ep_cost_buffer):.2f}" in line
    assert (other.n_calls == 120) == (given in ("callback", "list"))
