"""Evaluation that counts costs beside rewards."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.evaluation import evaluate_policy as sb3_evaluate_policy
from stable_baselines3.common.type_aliases import PolicyPredictor
from stable_baselines3.common.vec_env import VecEnv

from sb3_algd.buffers import CostKey, read_costs
from sb3_algd.guards import explain_environment_errors, warn_user


class CostCounter:
    """
    Callback of SB3's ``evaluate_policy`` that sums up each episode's costs.

    :param cost_key: Key of ``info``, or a function of it.
    :param cost_gamma: Discount factor of the sums, 1 for plain sums.
    :param callback: The user's own callback, called as well.
    """

    def __init__(self, cost_key: CostKey, cost_gamma: float, callback: Callable[..., None] | None) -> None:
        self.cost_key = cost_key
        self.cost_gamma = cost_gamma
        self.callback = callback
        self.n_constraints: int | None = None
        #: Costs of finished episodes, each of shape (n_constraints,)
        self.episode_costs: list[np.ndarray] = []
        #: Whether any step reported a cost
        self.reported = False
        self._running: dict[int, np.ndarray] = {}
        self._discount: dict[int, float] = {}

    def __call__(self, locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
        """Count one step of one environment, see SB3's ``evaluate_policy`` for the arguments."""
        env_index, info = locals_["i"], locals_["info"]
        if self.n_constraints is None:
            cost = self.cost_key(info) if callable(self.cost_key) else info.get(self.cost_key, 0.0)
            self.n_constraints = np.size(cost)
        costs, reported = read_costs([info], self.cost_key, self.n_constraints)
        self.reported |= reported
        step_cost = costs[0].astype(np.float64)
        discount = self._discount.get(env_index, 1.0)
        self._running[env_index] = self._running.get(env_index, 0.0) + discount * step_cost
        self._discount[env_index] = discount * self.cost_gamma
        if self.callback is not None:
            self.callback(locals_, globals_)
        # A Monitor knows when an episode really ended (SB3 counts episodes by the same rule)
        if locals_["done"] and ("episode" in info or not locals_["is_monitor_wrapped"]):
            self.episode_costs.append(self._running.pop(env_index))
            self._discount.pop(env_index)


def evaluate_policy(
    model: PolicyPredictor,
    env: gym.Env | VecEnv,
    n_eval_episodes: int = 10,
    deterministic: bool = True,
    render: bool = False,
    callback: Callable[[dict[str, Any], dict[str, Any]], None] | None = None,
    reward_threshold: float | None = None,
    return_episode_rewards: bool = False,
    warn: bool = True,
    cost_key: CostKey | None = None,
    cost_gamma: float = 1.0,
) -> tuple[Any, ...]:
    """
    SB3's :func:`~stable_baselines3.common.evaluation.evaluate_policy` with the costs of the same episodes.

    In an environment with a fixed start and no randomness all deterministic episodes are alike:
    evaluate with ``deterministic=False`` too.

    :param model: The RL agent you want to evaluate.
    :param env: The gym environment or ``VecEnv`` environment.
    :param n_eval_episodes: Number of episode to evaluate the agent
    :param deterministic: Whether to use deterministic or stochastic actions
    :param render: Whether to render the environment or not
    :param callback: callback function to perform additional checks,
        called ``n_envs`` times after each step. Gets locals() and globals() passed as parameters.
    :param reward_threshold: Minimum expected reward per episode,
        this will raise an error if the performance is not met
    :param return_episode_rewards: If True, a list of rewards, a list of episode lengths and an array of costs
        of shape (n_eval_episodes, n_constraints) are returned instead of means.
    :param warn: If True (default), warns user about lack of a Monitor wrapper in the
        evaluation environment.
    :param cost_key: Key of ``info`` that holds a step's cost, or a function of ``info``. None for the model's own
        (``"cost"`` where it has none). An environment that reports no cost there gives a warning, and costs of 0.
    :param cost_gamma: Discount factor of an episode's cost: 1 (default) for the plain sum,
        the algorithm's ``cost_gamma`` where the limit is stated as a discounted sum.
    :return: Mean and standard deviation of the return, mean and standard deviation of the cost per episode
        (floats for one constraint, arrays of shape (n_constraints,) for several);
        lists and an array if ``return_episode_rewards`` is True.
    :raises ValueError: If a cost is not finite, the number of costs changes, or ``step`` returns six values.
    :raises RuntimeError: If the process of an environment died.
    """
    if cost_key is None:
        cost_key = getattr(model, "cost_key", "cost")
    counter = CostCounter(cost_key, cost_gamma, callback)
    with explain_environment_errors():
        rewards, lengths = sb3_evaluate_policy(
            model,
            env,
            n_eval_episodes,
            deterministic,
            render,
            counter,
            return_episode_rewards=True,
            warn=warn,
        )
    if warn and not counter.reported:
        warn_user(
            f"The environment reported no cost (info[{cost_key!r}]) in the evaluation, so all costs are 0: "
            "name the right key with cost_key=..."
        )
    costs = np.stack(counter.episode_costs)
    assert len(costs) == len(rewards)  # type: ignore[arg-type]
    mean_reward, std_reward = float(np.mean(rewards)), float(np.std(rewards))
    if reward_threshold is not None:
        assert mean_reward > reward_threshold, f"Mean reward below threshold: {mean_reward:.2f} < {reward_threshold:.2f}"
    if return_episode_rewards:
        return rewards, lengths, costs
    mean_cost, std_cost = costs.mean(axis=0), costs.std(axis=0)
    if costs.shape[1] == 1:
        return mean_reward, std_reward, float(mean_cost[0]), float(std_cost[0])
    return mean_reward, std_reward, mean_cost, std_cost
