"""Limits, and the budgets that follow from them."""

import gymnasium as gym
import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize

from sb3_algd.common.constraint import budget_per_unit_cost, check_cost_limit, declared_by_env
from sb3_algd.envs.toy import TwoModesEnv


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
