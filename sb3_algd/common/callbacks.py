"""Callbacks: evaluation with costs, and a limit in wall-clock time."""

import time
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_algd.common.evaluation import CostCounter, cost_discount
from sb3_algd.common.verdict import constraint_verdict

if TYPE_CHECKING:
    from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm


def relative_excess(costs: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """
    By which share costs exceed their limits: constraints may have different units, and this can be added up.

    :param costs: Mean costs, shape (n_constraints,).
    :param limits: Their limits, same shape.
    :return: Same shape, negative within a limit; the plain difference where a limit is 0.
    """
    return (costs - limits) / np.where(limits > 0, limits, 1.0)


class CostEvalCallback(EvalCallback):
    """
    :class:`~stable_baselines3.common.callbacks.EvalCallback` that counts costs too.

    - ``eval/mean_ep_cost`` is logged, in the unit of the model's limit (a discounted sum where the limit is one),
      and one such key per constraint where there are several.
    - ``evaluations.npz`` has the array ``costs`` of shape (n_evaluations, n_eval_episodes), with a last axis for the
      constraints where there are several.
    - The best model is the *feasible* one with the highest mean reward; as long as no evaluation was feasible, it is the
      one that exceeds its limits least. ``best_mean_reward`` is the mean reward of that model, so it falls when the first
      feasible model takes the place of an infeasible one.

    - ``callback_on_new_best`` is called for feasible models only, so ``StopTrainingOnRewardThreshold`` never stops at a model
      that violates its limits.

    Actions are stochastic by default, unlike SB3's: that is the policy whose cost is limited, see
    :func:`~sb3_algd.common.evaluation.evaluate_policy`.

    :param eval_env: See ``EvalCallback``, as all that follow
    :param callback_on_new_best: Called when there is a new best feasible model
    :param callback_after_eval: Called after every evaluation
    :param n_eval_episodes: The number of episodes to test the agent
    :param eval_freq: Evaluate the agent every ``eval_freq`` call of the callback
    :param log_path: Folder of ``evaluations.npz``
    :param best_model_save_path: Folder of ``best_model.zip``
    :param deterministic: Whether the evaluation uses deterministic actions
    :param confidence: If given, a model counts as feasible only if the upper bound of its expected cost with this confidence
        is within its limits, see :func:`~sb3_algd.common.verdict.constraint_verdict`. The bound takes the place of the mean
        also where models that exceed their limits are compared. It needs more than the default number of episodes
    :param kwargs: Further keyword arguments of ``EvalCallback``
    """

    model: "ConstrainedOffPolicyAlgorithm"

    def __init__(
        self,
        eval_env: gym.Env | VecEnv,
        callback_on_new_best: BaseCallback | None = None,
        callback_after_eval: BaseCallback | None = None,
        n_eval_episodes: int = 5,
        eval_freq: int = 10000,
        log_path: str | None = None,
        best_model_save_path: str | None = None,
        deterministic: bool = False,
        confidence: float | None = None,
        **kwargs: Any,
    ) -> None:
        if confidence is not None and not 0.0 < confidence < 1.0:
            raise ValueError(f"confidence must be between 0 and 1, got {confidence}.")
        super().__init__(
            eval_env,
            callback_on_new_best,
            callback_after_eval,
            n_eval_episodes,
            eval_freq,
            log_path,
            best_model_save_path,
            deterministic,
            **kwargs,
        )
        self.confidence = confidence
        self._new_best_callback = callback_on_new_best
        self.evaluations_costs: list[np.ndarray] = []
        #: By how much the best model so far exceeds its limits, 0 if it is feasible
        self.best_violation = np.inf
        self._best_reward = self.best_mean_reward

    def _init_callback(self) -> None:
        super()._init_callback()
        if not hasattr(self.model, "cost_limit"):
            raise ValueError(
                "CostEvalCallback needs a model with cost limits, as ALGD and SACLag have; "
                f"{type(self.model).__name__} has none: use EvalCallback."
            )

    def _on_step(self) -> bool:
        if self.eval_freq <= 0 or self.n_calls % self.eval_freq != 0:
            return True
        self._counter = CostCounter(
            self.model.cost_key, cost_discount(self.model), super()._log_success_callback, self.model.n_constraints
        )
        self._best_reward = self.best_mean_reward
        continue_training = super()._on_step()
        self._settle_best()
        costs = np.stack(self._counter.episode_costs)
        if self.log_path is not None:
            self.evaluations_costs.append(costs[:, 0] if costs.shape[1] == 1 else costs)
            with np.load(f"{self.log_path}.npz") as stored:
                evaluations = dict(stored)
            np.savez(self.log_path, **evaluations, costs=self.evaluations_costs)
        return continue_training

    def _log_success_callback(self, locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
        """
        What SB3 calls at each step of an evaluation.

        With the last episode, before SB3 compares and logs, it has set what both need.

        :param locals_: Local variables of ``evaluate_policy``
        :param globals_: Its global variables
        """
        n_finished = len(self._counter.episode_costs)
        self._counter(locals_, globals_)
        if len(self._counter.episode_costs) == n_finished:
            return
        costs = np.mean(self._counter.episode_costs, axis=0)
        for i, cost in enumerate(costs):
            self.logger.record("eval/mean_ep_cost" if len(costs) == 1 else f"eval/mean_ep_cost_{i}", float(cost))
        limits = np.asarray(self.model.cost_limit)
        finished = len(self._counter.episode_costs) == self.n_eval_episodes
        if self.confidence is not None and finished:
            costs = constraint_verdict(self._counter.episode_costs, limits, self.confidence).upper
            for i, cost in enumerate(costs):
                self.logger.record("eval/upper_ep_cost" if len(costs) == 1 else f"eval/upper_ep_cost_{i}", float(cost))
        excess = relative_excess(costs, limits)
        self._violation = float(np.sum(np.maximum(excess, 0.0)))
        # What it does with a good model, stopping for instance, must not happen with an infeasible one
        self.callback_on_new_best = self._new_best_callback if self._violation == 0.0 else None
        # SB3 takes the model for the best one if its mean reward exceeds this
        if self._violation == self.best_violation:
            self._threshold = self._best_reward
        else:
            self._threshold = -np.inf if self._violation < self.best_violation else np.inf
        self.best_mean_reward = self._threshold

    def _on_event(self) -> bool:
        # What runs after an evaluation may read the best reward
        self._settle_best()
        return super()._on_event()

    def _settle_best(self) -> None:
        """Undo what was set for SB3's comparison, or take over its outcome."""
        if self.best_mean_reward != self._threshold:
            self._best_reward, self.best_violation = self.best_mean_reward, self._violation
        self.best_mean_reward = self._threshold = self._best_reward


class StopTrainingOnTimeLimit(BaseCallback):
    """
    Stop the training once it has taken a certain time.

    :param seconds: Wall-clock time from the start of ``learn()``.
    :param verbose: Verbosity level: 0 for no output, 1 for indicating when the time was up
    """

    def __init__(self, seconds: float, verbose: int = 0) -> None:
        super().__init__(verbose)
        self.seconds = seconds

    def _on_training_start(self) -> None:
        self._started = time.monotonic()

    def _on_step(self) -> bool:
        continue_training = time.monotonic() - self._started < self.seconds
        if self.verbose >= 1 and not continue_training:
            print(f"Stopping training after {self.seconds:.0f} seconds and {self.num_timesteps} steps")
        return continue_training
