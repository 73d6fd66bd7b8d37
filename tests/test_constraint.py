"""Limits, and the budgets that follow from them."""

import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize

from sb3_algd import ALGD
from sb3_algd.common.constraint import budget_per_unit_cost, check_cost_limit, declared_by_env
from sb3_algd.envs.toy import TwoModesEnv
from tests.conftest import Algorithm, CostlyEnv, make_env, make_model, make_model_of


def test_budget_of_the_papers_setting() -> None:
    assert 10.0 * budget_per_unit_cost(400, 0.99) == pytest.approx(2.4551, abs=5e-5)


def test_budget_is_the_discounted_cost_of_an_evenly_spent_limit() -> None:
    horizon, gamma = 37, 0.9
    evenly = sum(gamma**t / horizon for t in range(horizon))
    assert budget_per_unit_cost(horizon, gamma) == pytest.approx(evenly)
    assert budget_per_unit_cost(horizon, 1.0) == 1.0
    assert budget_per_unit_cost(horizon, 1.0 - 1e-9) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("horizon, gamma", [(0, 0.99), (10, 0.0), (10, 1.1)])
def test_budget_refuses_nonsense(horizon: int, gamma: float) -> None:
    with pytest.raises(ValueError, match=r"`episode_length` must be|`cost_gamma` must be"):
        budget_per_unit_cost(horizon, gamma)


def test_cost_limit_forms() -> None:
    assert check_cost_limit(10).tolist() == [10.0]
    assert check_cost_limit((1, 2.5)).tolist() == [1.0, 2.5]
    for bad in (-1.0, [1.0, -2.0], float("nan"), float("inf"), [], [[1.0]]):
        with pytest.raises(ValueError, match="`cost_limit` must be"):
            check_cost_limit(bad)


def make_toy(cost_limit: float = 25.0) -> gym.Env:
    return gym.wrappers.TimeLimit(TwoModesEnv(cost_limit), 100)


@pytest.mark.parametrize("vec_env_class", [DummyVecEnv, SubprocVecEnv])
def test_declarations_are_read_through_vec_envs_and_wrappers(vec_env_class: type) -> None:
    env = VecFrameStack(VecNormalize(make_vec_env(make_toy, n_envs=2, vec_env_cls=vec_env_class)), 2)
    try:
        assert declared_by_env(env, "cost_limit") == 25.0
        assert declared_by_env(env, "cost_limit_discounted") is False
        assert declared_by_env(env, "_max_episode_steps") == 100
        assert declared_by_env(env, "no_such_attribute") is None
    finally:
        env.close()


def test_disagreeing_environments_are_refused() -> None:
    env = DummyVecEnv([lambda: make_toy(10.0), lambda: make_toy(20.0)])
    with pytest.raises(ValueError, match="different values of `cost_limit`"):
        declared_by_env(env, "cost_limit")


def limited_env(cost_limit: float, steps: int = 20) -> gym.Env:
    env = make_env(steps=steps)
    env.unwrapped.cost_limit = cost_limit  # type: ignore[attr-defined]
    return env


def test_another_declared_constraint_is_noticed(tmp_path: Path) -> None:
    model = make_model(limited_env(7.0), cost_limit=None)
    model.save(tmp_path / "model")

    with pytest.warns(
        UserWarning, match=r"declares cost_limit = \[9.0\], but the model keeps its own, \[7.0\].*cost_limit=9.0"
    ) as record:
        loaded = ALGD.load(tmp_path / "model", env=limited_env(9.0))
    assert len(record) == 1 and record[0].filename == __file__
    assert np.asarray(loaded.cost_limit).tolist() == [7.0]
    with pytest.warns(UserWarning, match=r"declares episode_length = \[30\], but the model keeps its own, \[20\]") as record:
        model.set_env(limited_env(7.0, steps=30))
    assert len(record) == 1 and record[0].filename == __file__

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_env(limited_env(7.0, steps=30))  # has been said
        ALGD.load(tmp_path / "model", env=limited_env(7.0))
        ALGD.load(tmp_path / "model")
        # What is given counts, and needs no warning
        loaded = ALGD.load(tmp_path / "model", env=limited_env(9.0, steps=30), cost_limit=8.0, episode_length=30)
        assert np.asarray(loaded.cost_limit).tolist() == [8.0] and loaded.episode_length == 30
        # A limit of one's own stays one's own
        make_model(limited_env(7.0), cost_limit=5.0).save(tmp_path / "own")
        ALGD.load(tmp_path / "own", env=limited_env(7.0))


# --- the horizon -----------------------------------------------------------------------------------------------------


class EndsByItself(CostlyEnv):
    """
    Cuts its episodes off itself, where no ``TimeLimit`` can tell.

    :param lengths: Of the episodes, in turn
    """

    def __init__(self, lengths: list[int], terminated: bool = False) -> None:
        super().__init__()
        self.lengths, self.terminated = lengths, terminated

    def reset(self, **kwargs: Any) -> Any:
        self.left = self.lengths[0]
        self.lengths = [*self.lengths[1:], self.lengths[0]]
        return super().reset(**kwargs)

    def step(self, action: np.ndarray) -> Any:
        obs, reward, _, _, info = super().step(action)
        self.left -= 1
        return obs, reward, self.terminated and self.left == 0, self.left == 0, info


@pytest.mark.parametrize(
    "kwargs, ratio", [(dict(cost_gamma=0.99), 0.11), (dict(cost_gamma=0.95, cost_limit_discounted=True), 0.28)]
)
def test_episodes_that_are_shorter_than_the_assumed_horizon_are_noticed(
    algorithm: Algorithm, kwargs: dict[str, Any], ratio: float
) -> None:
    message = rf"ends its episodes after 20 steps, but a horizon of 1000 .* is {ratio} times .*Give episode_length=20"
    env = make_vec_env(lambda: EndsByItself([20]), n_envs=1)
    with pytest.warns(UserWarning, match="1000 steps are assumed"):
        model = make_model_of(algorithm, env, learning_starts=1000, **kwargs)
    with pytest.warns(UserWarning, match=message) as caught:
        model.learn(100)
    assert sum("horizon" in str(warning.message) for warning in caught) == 1
    before = model.cost_budget.copy()
    model.episode_length = 20
    assert before / model.cost_budget == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize(
    "lengths, terminated, kwargs",
    [
        ([20, 21], False, {}),
        ([20], True, {}),
        ([20], False, dict(episode_length=50)),
        ([20], False, dict(cost_limit_discounted=True, cost_gamma=0.99)),
        ([20], False, dict(cost_gamma=1.0)),
    ],
)
def test_a_horizon_that_is_given_or_that_nothing_contradicts_is_left_alone(
    lengths: list[int], terminated: bool, kwargs: dict[str, Any]
) -> None:
    env = make_vec_env(lambda: EndsByItself(lengths, terminated), n_envs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No episode_length was given")
        model = make_model(env, learning_starts=1000, **kwargs)
        warnings.simplefilter("error")
        model.learn(130)
