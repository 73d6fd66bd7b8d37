"""Evaluation that counts costs beside rewards."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.evaluation import evaluate_policy as sb3_evaluate_policy
from stable_baselines3.common.type_aliases import PolicyPredictor
from stable_baselines3.common.vec_env import VecEnv

from sb3_algd.common.episode_costs import CostKey, EpisodeCostTracker, read_cost, read_costs
from sb3_algd.common.guards import explain_environment_errors, warn_user
from sb3_algd.common.verdict import OVER, WITHIN, constraint_verdict


def cost_discount(model: Any) -> float:
    """
    :param model: Any SB3 model.
    :return: The discount factor with which costs are summed up in the unit of the model's limit: 1 unless the limit is a
        discounted sum.
    """
    return model.cost_limit_gamma if getattr(model, "cost_limit_discounted", False) else 1.0


class CostCounter:
    """
    Callback of SB3's ``evaluate_policy`` that sums up each episode's costs.

    :param cost_key: Key of ``info``, or a function of it.
    :param cost_gamma: Discount factor of the sums, 1 for plain sums.
    :param callback: The user's own callback, called as well.
    :param n_constraints: Number of costs per step. None for as many as the first step that reports any has.
    """

    def __init__(
        self,
        cost_key: CostKey,
        cost_gamma: float,
        callback: Callable[..., None] | None = None,
        n_constraints: int | None = None,
    ) -> None:
        self.cost_key = cost_key
        self.cost_gamma = cost_gamma
        self.callback = callback
        self.n_constraints = n_constraints
        #: Whether any step reported a cost
        self.reported = False
        self._tracker: EpisodeCostTracker | None = None

    @property
    def episode_costs(self) -> list[np.ndarray]:
        """Costs of finished episodes, each of shape (n_constraints,)."""
        return [] if self._tracker is None else list(self._tracker.discounted_costs)

    def __call__(self, locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
        """Count one step of one environment, see SB3's ``evaluate_policy`` for the arguments."""
        info, actions = locals_["info"], locals_["actions"]
        if not np.isfinite(actions).all():
            # Before the environment is blamed for what it made of it
            raise FloatingPointError(
                f"The policy's action became {actions.tolist()} in an evaluation: look at the model's weights, and at the "
                "observations if they are finite."
            )
        if self.n_constraints is None:
            cost = read_cost(info, self.cost_key)
            if cost is not None:
                self.n_constraints = cost.size
                if self._tracker is not None:
                    self._tracker.widen(cost.size)
        costs, reported = read_costs([info], self.cost_key, self.n_constraints or 1)
        self.reported |= reported
        if self._tracker is None:
            self._tracker = EpisodeCostTracker(locals_["n_envs"], self.n_constraints or 1, self.cost_gamma)
        # A Monitor knows when an episode really ended (SB3 counts episodes by the same rule)
        ended = locals_["done"] and ("episode" in info or not locals_["is_monitor_wrapped"])
        if self.callback is not None:
            self.callback(locals_, globals_)
        self._tracker.add(locals_["i"], costs[0], ended)


def evaluate_policy(
    model: PolicyPredictor,
    env: gym.Env | VecEnv,
    n_eval_episodes: int = 10,
    deterministic: bool = False,
    render: bool = False,
    callback: Callable[[dict[str, Any], dict[str, Any]], None] | None = None,
    reward_threshold: float | None = None,
    return_episode_rewards: bool = False,
    warn: bool = True,
    cost_key: CostKey | None = None,
    cost_gamma: float | None = None,
) -> tuple[Any, ...]:
    """
    SB3's :func:`~stable_baselines3.common.evaluation.evaluate_policy` with the costs of the same episodes.

    Actions are stochastic by default, unlike SB3's: the policy whose cost is limited is the stochastic one that acts in
    training. Deterministic actions are another policy, and may cost more. (In an environment with a fixed start and no
    randomness all deterministic episodes are alike.)

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
    :param cost_gamma: Discount factor of an episode's cost, 1 for the plain sum. None for the unit of the model's limit
        (the plain sum where it has none).
    :return: Mean and standard deviation of the return, mean and standard deviation of the cost per episode
        (floats for one constraint, arrays of shape (n_constraints,) for several);
        lists and an array if ``return_episode_rewards`` is True.
    :raises ValueError: If a cost is not finite, the number of costs changes, or ``step`` returns six values.
    :raises RuntimeError: If the process of an environment died.
    :raises FloatingPointError: If an action is not finite.
    """
    # Costs that the caller has chosen may be others than the model's, and of another number
    n_constraints = getattr(model, "n_constraints", None) if cost_key is None else None
    if cost_key is None:
        cost_key = getattr(model, "cost_key", "cost")
    if cost_gamma is None:
        cost_gamma = cost_discount(model)
    counter = CostCounter(cost_key, cost_gamma, callback, n_constraints)
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


def describe_evaluation(name: str, model: Any, env: VecEnv, n_eval_episodes: int = 20, deterministic: bool = False) -> str:
    """
    Evaluate a model, and say whether it keeps its limits, as far as these episodes can tell.

    :param name: What the line begins with.
    :param model: A model with cost limits.
    :param env: Environments for the evaluation.
    :param n_eval_episodes: Number of episodes.
    :param deterministic: Whether actions are deterministic.
    :return: A line with return, cost and limit, and one more cost and limit for each further constraint.
    """
    returns, _, costs = evaluate_policy(model, env, n_eval_episodes, deterministic, return_episode_rewards=True, warn=False)
    unit = "discounted cost" if model.cost_limit_discounted else "cost"
    episodes = f"{n_eval_episodes} {'deterministic' if deterministic else 'stochastic'} episode{'s' * (n_eval_episodes > 1)}"
    verdict = constraint_verdict(costs, model.cost_limit)
    parts = []
    for i, (outcome, limit) in enumerate(zip(verdict.each, verdict.limit, strict=True)):
        interval = f" ({verdict.interval(i)})"
        if n_eval_episodes == 1:
            # One episode decides nothing: how it compares is all there is to say
            interval, outcome = "", WITHIN if verdict.mean[i] <= limit else OVER
        outcome = outcome.replace("over", "OVER")
        parts.append(f"{unit} {verdict.mean[i]:.2f} +/- {verdict.std[i]:.2f}{interval}, limit {limit:g}: {outcome}")
    return f"{name}, {episodes}: return {np.mean(returns):.2f} +/- {np.std(returns):.2f}, {'; '.join(parts)}"
