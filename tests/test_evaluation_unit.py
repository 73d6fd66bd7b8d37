"""Which policy is evaluated, in which unit its costs are, and what a callback does with an infeasible model."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.env_util import make_vec_env

from sb3_algd import ALGD, evaluate_policy
from sb3_algd.common.callbacks import CostEvalCallback
from sb3_algd.common.checkpoint import ResumableCheckpointCallback
from sb3_algd.common.evaluation import CostCounter


class PricedEnv(gym.Env):
    """
    A cost, of 1 if no other is given, and a reward of 2 at each step, for ever.

    :param cost: A step's cost
    :param free_steps: How many steps of an episode come without a cost in ``info``
    """

    observation_space = spaces.Box(-1.0, 1.0, shape=(2,), dtype=np.float32)
    action_space = spaces.Box(-1.0, 1.0, shape=(1,), dtype=np.float32)

    def __init__(self, cost: Any = 1.0, free_steps: int = 0) -> None:
        self.cost, self.free_steps = cost, free_steps

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, dtype=np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        self.steps += 1
        info = {"cost": self.cost, "two": [1.0, 2.0]} if self.steps > self.free_steps else {}
        return np.zeros(2, dtype=np.float32), 2.0, False, False, info


def make_env(steps: int = 10, **kwargs: Any) -> Any:
    return make_vec_env(lambda: gym.wrappers.TimeLimit(PricedEnv(**kwargs), steps), n_envs=1)


def make_model(env: Any = None, **kwargs: Any) -> ALGD:
    defaults: dict[str, Any] = dict(
        policy_kwargs=dict(net_arch=[8, 8]), learning_starts=10_000, buffer_size=200, seed=0, device="cpu", cost_limit=5.0
    )
    return ALGD("MlpPolicy", make_env() if env is None else env, **{**defaults, **kwargs})


class ActionRecorder:
    """A model that notes how it is asked for actions."""

    def __init__(self) -> None:
        self.asked: set[bool] = set()

    def predict(self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> Any:
        self.asked.add(deterministic)
        return np.zeros((len(observation), 1), dtype=np.float32), state


# --- unit and policy -------------------------------------------------------------------------------------------------


def test_costs_are_in_the_unit_of_the_limit() -> None:
    model = make_model(cost_limit=15.0, cost_limit_discounted=True)
    env = make_env(steps=1000)
    expected = (1 - 0.99**1000) / 0.01
    assert evaluate_policy(model, env, 1)[2] == pytest.approx(expected)
    assert evaluate_policy(model, env, 1, cost_gamma=1.0)[2] == pytest.approx(1000)
    model.cost_limit_discounted = False
    assert evaluate_policy(model, env, 1)[2] == pytest.approx(1000)


def test_the_policy_whose_cost_is_limited_is_evaluated() -> None:
    recorder = ActionRecorder()
    mean_reward, _, mean_cost, _ = evaluate_policy(recorder, make_env(), 2)
    assert recorder.asked == {False}
    # Without a limit there is no unit: plain sums
    assert (mean_reward, mean_cost) == (20.0, 10.0)
    evaluate_policy(recorder, make_env(), 1, deterministic=True)
    assert recorder.asked == {False, True}


def test_the_callback_evaluates_the_same_policy_in_the_same_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(cost_limit=15.0, cost_limit_discounted=True)
    asked: list[bool] = []
    env = make_env()
    predict = model.predict

    def watched(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["deterministic"])
        return predict(*args, **kwargs)

    monkeypatch.setattr(model, "predict", watched)
    callback = CostEvalCallback(env, n_eval_episodes=2, eval_freq=10, log_path=str(tmp_path), verbose=0)
    model.learn(10, callback=callback)
    assert asked == [False] * 20
    assert np.load(tmp_path / "evaluations.npz")["costs"] == pytest.approx((1 - 0.99**10) / 0.01)


# --- number of costs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost, n_constraints", [([1.0, 3.0], 2), (4.0, 1)])
def test_what_training_accepts_can_be_evaluated(tmp_path: Path, cost: Any, n_constraints: int) -> None:
    """Steps without a cost come first, so the number of costs cannot be told from them."""
    env = make_env(cost=cost, free_steps=4)
    model = make_model(env, cost_limit=[50.0] * n_constraints)
    eval_env = make_env(cost=cost, free_steps=4)
    callback = CostEvalCallback(eval_env, n_eval_episodes=2, eval_freq=10, log_path=str(tmp_path), verbose=0)
    model.learn(20, callback=callback)
    expected = 6 * np.ravel(cost)
    np.testing.assert_allclose(model.ep_cost_buffer, [expected] * 2)
    assert np.load(tmp_path / "evaluations.npz")["costs"].shape == ((2, 2, 2) if n_constraints == 2 else (2, 2))
    np.testing.assert_allclose(evaluate_policy(model, eval_env, 2)[2], expected if n_constraints == 2 else expected[0])


def test_the_number_of_costs_is_told_by_the_first_step_that_has_some() -> None:
    # A whole episode passes before
    env = make_env(cost=[1.0, 3.0], free_steps=4)
    costs = evaluate_policy(ActionRecorder(), env, 3, return_episode_rewards=True)[2]
    np.testing.assert_allclose(costs, [[6.0, 18.0]] * 3)
    counter = CostCounter("cost", 1.0, None)
    locals_: dict[str, Any] = {"i": 0, "n_envs": 1, "is_monitor_wrapped": False, "actions": np.zeros((1, 1))}
    for info, done in (({}, True), ({}, False), ({"cost": [1.0, 2.0]}, True)):
        counter({**locals_, "info": info, "done": done}, {})
    np.testing.assert_allclose(counter.episode_costs, [[0.0, 0.0], [1.0, 2.0]])


def test_costs_of_the_callers_choice_may_be_others_than_the_models() -> None:
    model = make_model()
    assert model.n_constraints == 1
    np.testing.assert_allclose(evaluate_policy(model, make_env(), 1, cost_key="two")[2], [10.0, 20.0])


def test_training_refuses_a_number_of_costs_that_is_not_that_of_the_limits() -> None:
    with pytest.raises(ValueError, match=r"2 cost\(s\) per step but there are 1 cost limit"):
        make_model(make_env(cost=[1.0, 2.0])).learn(5)


# --- infeasible models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost_limit, steps", [(5.0, 30), (15.0, 10)])
def test_training_stops_at_a_feasible_model_only(cost_limit: float, steps: int) -> None:
    # The return is 20 and the cost is 10
    model = make_model(cost_limit=cost_limit)
    stop = StopTrainingOnRewardThreshold(reward_threshold=15.0)
    model.learn(30, callback=CostEvalCallback(make_env(), stop, eval_freq=10, n_eval_episodes=1, verbose=0))
    assert model.num_timesteps == steps


class Limits(BaseCallback):
    """Notes the limit at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.limits: list[float] = []

    def _on_step(self) -> bool:
        self.limits.append(np.asarray(self.model.cost_limit).item())  # type: ignore[attr-defined]
        return True


class NewLimit(BaseCallback):
    """Sets a limit before the evaluation of a step."""

    def __init__(self, limits: dict[int, float]) -> None:
        super().__init__()
        self.limits = limits

    def _on_step(self) -> bool:
        if self.num_timesteps in self.limits:
            self.model.cost_limit = self.limits[self.num_timesteps]  # type: ignore[attr-defined]
        return True


def test_the_callback_for_a_new_best_is_called_as_soon_as_one_is_feasible() -> None:
    """The same model is infeasible, feasible, then as good as the best."""
    seen = Limits()
    model = make_model(cost_limit=5.0)
    evaluation = CostEvalCallback(make_env(), seen, eval_freq=10, n_eval_episodes=1, verbose=0)
    model.learn(40, callback=CallbackList([NewLimit({20: 15.0, 30: 12.0}), evaluation]))
    assert seen.limits == [15.0]
    assert evaluation.best_mean_reward == 20.0 and evaluation.best_violation == 0.0


def test_no_improvement_counts_evaluations_without_a_better_feasible_model() -> None:
    stop = StopTrainingOnNoModelImprovement(max_no_improvement_evals=1, min_evals=0)
    model = make_model(cost_limit=5.0)
    evaluation = CostEvalCallback(make_env(), None, stop, eval_freq=10, n_eval_episodes=1, verbose=0)
    model.learn(100, callback=evaluation)
    assert model.num_timesteps == 30


@pytest.mark.parametrize("cost_limit", [5.0, 15.0])
def test_a_checkpoint_holds_the_callback_for_a_new_best_once(tmp_path: Path, cost_limit: float) -> None:
    model = make_model(cost_limit=cost_limit)
    checkpoint = ResumableCheckpointCallback(20, tmp_path)
    evaluation = CostEvalCallback(make_env(), Limits(), eval_freq=10, n_eval_episodes=1, verbose=0)
    model.learn(20, callback=CallbackList([evaluation, checkpoint]))
    assert sorted(checkpoint._others()) == ["CostEvalCallback_0", "Limits_0"]
