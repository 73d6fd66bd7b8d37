"""Callbacks: evaluation with costs, a progress bar with costs, the remaining time, and a limit in wall-clock time."""

import time
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback, EvalCallback, ProgressBarCallback
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import safe_mean
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
    - ``eval/feasible`` is 1 if the mean costs of this evaluation are within all limits, else 0.
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
    :param max_cost: The largest cost that an episode can have, for these bounds where few episodes have a cost. If None, ten
        times the limit, or twice the largest cost of the evaluation where that is more
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
        max_cost: Any = None,
        **kwargs: Any,
    ) -> None:
        if confidence is not None and not 0.0 < confidence < 1.0:
            raise ValueError(f"confidence must be between 0 and 1, got {confidence}.")
        if n_eval_episodes < 1:
            raise ValueError(f"n_eval_episodes must be at least 1, got {n_eval_episodes}.")
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
        self.max_cost = max_cost
        self._new_best_callback = callback_on_new_best
        self.evaluations_costs: list[np.ndarray] = []
        #: By how much the best model so far exceeds its limits, 0 if it is feasible
        self.best_violation = np.inf
        self._best_reward = self.best_mean_reward

    def _init_callback(self) -> None:
        # The last evaluation may have left it out
        self.callback_on_new_best = self._new_best_callback
        super()._init_callback()
        if not hasattr(self.model, "cost_limit"):
            raise ValueError(
                "CostEvalCallback needs a model with cost limits, as ALGD and SACLag have; "
                f"{type(self.model).__name__} has none: use EvalCallback."
            )

    def _on_step(self) -> bool:
        if self.eval_freq <= 0 or self.n_calls % self.eval_freq != 0:
            return True
        self._improved = False
        self._counter = CostCounter(
            self.model.cost_key, cost_discount(self.model), super()._log_success_callback, self.model.n_constraints
        )
        self._best_reward = self.best_mean_reward
        # SB3 would print rewards alone, and a new best mean reward where it fell because the cost did
        verbose, self.verbose = self.verbose, 0
        try:
            continue_training = super()._on_step()
        finally:
            self.verbose = verbose
        self._settle_best()
        costs = np.stack(self._counter.episode_costs)
        if self.verbose >= 1:
            self._print_outcome(costs)
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
            max_cost = self.max_cost
            if max_cost is None:
                # Without one a model whose episodes have no cost could never be feasible
                max_cost = np.maximum(10.0 * limits, 2.0 * np.max(self._counter.episode_costs, axis=0))
            costs = constraint_verdict(self._counter.episode_costs, limits, self.confidence, max_cost).upper
            for i, cost in enumerate(costs):
                self.logger.record("eval/upper_ep_cost" if len(costs) == 1 else f"eval/upper_ep_cost_{i}", float(cost))
        excess = relative_excess(costs, limits)
        self._violation = float(np.sum(np.maximum(excess, 0.0)))
        self.logger.record("eval/feasible", int(self._violation == 0.0))
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
            self._improved = True
        self.best_mean_reward = self._threshold = self._best_reward

    def _print_outcome(self, costs: np.ndarray) -> None:
        limits = np.asarray(self.model.cost_limit)
        mean, std = (", ".join(f"{value:.2f}" for value in values) for values in (costs.mean(axis=0), costs.std(axis=0)))
        unit = "discounted cost" if self.model.cost_limit_discounted else "cost"
        verdict = "within the limit" if self._violation == 0.0 else "OVER the limit"
        print(
            f"Evaluation at step {self.num_timesteps}: return {self.last_mean_reward:.2f}, {unit} {mean} +/- {std}, "
            f"limit {', '.join(f'{limit:g}' for limit in limits)}: {verdict}"
        )
        if len(self._is_success_buffer) > 0:
            print(f"Success rate: {100 * np.mean(self._is_success_buffer):.2f}%")
        if self._improved and self._violation == 0.0:
            print("New best feasible model")
        elif self._improved:
            print("New best model: none was within the limit so far, and this one exceeds it least")


class CostProgressBarCallback(ProgressBarCallback):
    """SB3's progress bar, with return and cost of recent training episodes."""

    model: "ConstrainedOffPolicyAlgorithm"

    def _on_rollout_end(self) -> None:
        if self.model.ep_info_buffer and len(self.model.ep_cost_buffer) > 0:
            cost = np.mean(self.model.ep_cost_buffer, axis=0)
            returns = safe_mean([episode["r"] for episode in self.model.ep_info_buffer])
            self.pbar.set_description(f"return {returns:.2f}, cost {', '.join(f'{c:.2f}' for c in cost)}", refresh=False)


def with_progress_bar(callback: MaybeCallback) -> list[BaseCallback]:
    """
    :param callback: What was given to ``learn()``.
    :return: The same and a progress bar that shows costs.
    """
    if callback is None:
        return [CostProgressBarCallback()]
    if isinstance(callback, list):
        return [*callback, CostProgressBarCallback()]
    given = callback if isinstance(callback, BaseCallback) else ConvertCallback(callback)
    return [given, CostProgressBarCallback()]


class RemainingTimeCallback(BaseCallback):
    """
    Print once how long the rest of the training will take.

    :param steps: Environment steps with updates after which this is told.
    """

    def __init__(self, steps: int = 1_000) -> None:
        super().__init__()
        self.steps = steps

    def _on_training_start(self) -> None:
        self._first_step: int | None = None
        self._told = False

    def _on_step(self) -> bool:
        # Steps before the first update are faster than those to come
        if self._told or self.num_timesteps <= getattr(self.model, "learning_starts", 0):
            return True
        if self._first_step is None:
            self._first_step, self._started = self.num_timesteps, time.monotonic()
        done = self.num_timesteps - self._first_step
        if done >= self.steps:
            self._told = True
            seconds = time.monotonic() - self._started
            left = self.locals["total_timesteps"] - self.num_timesteps
            print(
                f"{done} steps with updates took {duration(seconds)}. The remaining {left} steps will take about "
                f"{duration(seconds * left / done)}."
            )
        return True


def duration(seconds: float) -> str:
    """:param seconds: A time. :return: The time in a unit for people."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


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
