"""Evaluation with costs."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy as sb3_evaluate_policy
from stable_baselines3.common.monitor import Monitor

from sb3_algd import evaluate_policy


class CountingEnv(gym.Env):
    """Episodes of 1, 2, 3, ... steps; step t pays reward 1 and costs (t, 1)."""

    observation_space = spaces.Box(0.0, 100.0, shape=(1,), dtype=np.float32)
    action_space = spaces.Box(-1.0, 1.0, shape=(1,), dtype=np.float32)

    def __init__(self, n_costs: int = 1) -> None:
        self.n_costs = n_costs
        self.episode = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        self.episode += 1
        self.t = 0
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        cost = float(self.t) if self.n_costs == 1 else [float(self.t), 1.0]
        return np.full(1, self.t, dtype=np.float32), 1.0, self.t >= self.episode, False, {"cost": cost}


class ZeroPolicy:
    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, None]:
        return np.zeros((len(observation), 1), dtype=np.float32), None


@pytest.mark.parametrize("monitor", [False, True])
def test_costs_of_each_episode(monitor: bool) -> None:
    env: gym.Env = Monitor(CountingEnv()) if monitor else CountingEnv()
    rewards, lengths, costs = evaluate_policy(ZeroPolicy(), env, 4, return_episode_rewards=True, warn=False)
    assert rewards == [1.0, 2.0, 3.0, 4.0] and lengths == [1, 2, 3, 4]
    assert costs.tolist() == [[1.0], [3.0], [6.0], [10.0]]


def test_means_and_deviations() -> None:
    mean_reward, std_reward, mean_cost, std_cost = evaluate_policy(ZeroPolicy(), Monitor(CountingEnv()), 3)
    assert (mean_reward, mean_cost) == (2.0, pytest.approx(10 / 3))
    assert std_reward == pytest.approx(np.std([1, 2, 3])) and std_cost == pytest.approx(np.std([1, 3, 6]))


def test_vector_costs_and_several_environments() -> None:
    env = make_vec_env(lambda: CountingEnv(n_costs=2), n_envs=2)
    rewards, _, costs = evaluate_policy(ZeroPolicy(), env, 5, return_episode_rewards=True)
    assert costs.shape == (5, 2)
    # The second cost counts the steps, as the rewards do: rows belong together
    np.testing.assert_allclose(costs[:, 1], rewards)
    np.testing.assert_allclose(costs[:, 0], [length * (length + 1) / 2 for length in rewards])
    _, _, mean_cost, std_cost = evaluate_policy(ZeroPolicy(), env, 4)
    assert mean_cost.shape == std_cost.shape == (2,)


def test_discounted_sums_other_keys_and_missing_costs() -> None:
    _, _, costs = evaluate_policy(ZeroPolicy(), Monitor(CountingEnv()), 3, return_episode_rewards=True, cost_gamma=0.5)
    np.testing.assert_allclose(costs[:, 0], [1, 1 + 0.5 * 2, 1 + 0.5 * 2 + 0.25 * 3])
    _, _, costs = evaluate_policy(
        ZeroPolicy(), Monitor(CountingEnv()), 2, return_episode_rewards=True, cost_key=lambda info: 2 * info["cost"]
    )
    assert costs.tolist() == [[2.0], [6.0]]
    with pytest.warns(UserWarning, match="reported no cost"):
        _, _, costs = evaluate_policy(ZeroPolicy(), Monitor(CountingEnv()), 2, return_episode_rewards=True, cost_key="nothing")
    assert costs.tolist() == [[0.0], [0.0]]


def test_same_rewards_as_sb3_and_callback_and_threshold() -> None:
    seen: list[int] = []
    rewards, lengths, _ = evaluate_policy(
        ZeroPolicy(),
        Monitor(CountingEnv()),
        3,
        return_episode_rewards=True,
        callback=lambda locals_, _: seen.append(locals_["i"]),
    )
    expected = sb3_evaluate_policy(ZeroPolicy(), Monitor(CountingEnv()), 3, return_episode_rewards=True)
    assert (rewards, lengths) == expected
    assert seen == [0] * 6
    with pytest.raises(AssertionError, match="below threshold"):
        evaluate_policy(ZeroPolicy(), Monitor(CountingEnv()), 3, reward_threshold=5.0)


def test_an_action_that_is_not_finite_is_the_policys_fault() -> None:
    class Spoilt(ZeroPolicy):
        def predict(self, *args: Any, **kwargs: Any) -> tuple[np.ndarray, None]:
            return np.full((1, 1), np.nan, dtype=np.float32), None

    with pytest.raises(FloatingPointError, match=r"The policy's action became \[\[nan\]\].*weights"):
        evaluate_policy(Spoilt(), CountingEnv(), 1, warn=False)
