"""What an off-policy algorithm needs to know of costs: limit and budget, buffers that store costs, guarded rollouts, logs."""

import io
import pathlib
from collections import deque
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, RolloutReturn
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_algd.common.arguments import CheckedAlgorithm
from sb3_algd.common.buffers import CostNStepReplayBuffer, CostStorage, cost_buffer_class
from sb3_algd.common.callbacks import with_progress_bar
from sb3_algd.common.constraint import (
    ConstraintSetting,
    HorizonCheck,
    budget_per_unit_cost,
    declared_constraint,
    settle_cost_limit,
    settle_episode_length,
    warn_of_changes,
)
from sb3_algd.common.episode_costs import EpisodeCostTracker
from sb3_algd.common.guards import NormalizationBackup, check_finite, explain_environment_errors, warn_user
from sb3_algd.common.memory import SWITCH, keep_freed_memory

SelfCostAware = TypeVar("SelfCostAware", bound="CostAwareAlgorithm")


class CostAwareAlgorithm(CheckedAlgorithm):
    """
    An off-policy algorithm that knows what its episodes cost and what they may cost.

    :param args: Arguments of SB3's ``OffPolicyAlgorithm``
    :param cost_limit: see :class:`~sb3_algd.ALGD`, as all that follow
    :param cost_limit_discounted: see there
    :param cost_limit_gamma: see there
    :param episode_length: see there
    :param cost_gamma: see there
    :param cost_key: see there
    :param use_policy_at_warmup: see there
    :param kwargs: Keyword arguments of SB3's ``OffPolicyAlgorithm``
    """

    replay_buffer: CostStorage | None
    #: Number of constraints n_c
    n_constraints: int
    #: What the limits allow in the unit of the cost critics, shape (n_constraints,)
    cost_budget: np.ndarray

    cost_limit = ConstraintSetting()
    cost_limit_discounted = ConstraintSetting()
    episode_length = ConstraintSetting()
    cost_limit_gamma = ConstraintSetting()
    cost_gamma = ConstraintSetting()
    cost_key = ConstraintSetting()

    def __init__(
        self,
        *args: Any,
        cost_limit: Any,
        cost_limit_discounted: bool | None,
        cost_limit_gamma: float,
        episode_length: int | None,
        cost_gamma: float,
        cost_key: Any,
        use_policy_at_warmup: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **{"sde_support": False, "support_multi_env": True, **kwargs})
        self.cost_limit = cost_limit
        self.cost_limit_discounted = cost_limit_discounted
        self.cost_limit_gamma = cost_limit_gamma
        self.episode_length = episode_length
        self.cost_gamma = cost_gamma
        self.cost_key = cost_key
        self.use_policy_at_warmup = use_policy_at_warmup
        #: What the environment declares of its constraint
        self._declared: dict[str, list[Any]] | None = None
        #: Limit, unit and horizon as they were settled, to tell at loading what is given anew
        self._settled: dict[str, Any] = {}
        self._cost_tracker: EpisodeCostTracker | None = None
        self._steps_without_episode = 0
        self._warned_of_no_cost = False
        self._warned_of_no_episode = False
        #: While the horizon is not the user's
        self._horizon_check: HorizonCheck | None = None
        self._normalization_backup = NormalizationBackup(None)

    # --- the constraint ---------------------------------------------------------------------------------------------------

    def _setup_constraint(self) -> None:
        """Settle limit, horizon and budget, from the arguments or from what the environment declares."""
        # At loading: what is as it was saved was not given anew
        self._warned_of_no_cost = False
        loaded = {name: value for name, value in self._settled.items() if np.array_equal(getattr(self, name), value)}
        self._settle_constraint()
        self._compare_constraint(loaded)
        if self.verbose >= 1:
            unit = f"discounted with {self.cost_limit_gamma:g}" if self.cost_limit_discounted else "plain sum"
            print(
                f"Cost limit per episode ({unit}): {self.cost_limit.tolist()}, horizon: {self.episode_length} steps, "
                f"budget of the cost critics: {', '.join(f'{budget:g}' for budget in self.cost_budget)}"
            )

    def _settle_constraint(self) -> None:
        own_costs = self.cost_key != "cost"
        limits, discounted = settle_cost_limit(self.cost_limit, self.cost_limit_discounted, self.env, own_costs)
        before = len(self._settled.get("cost_limit", limits))
        if before != len(limits):
            raise ValueError(
                f"cost_limit has {len(limits)} value(s), {limits.tolist()}, but the model was trained with {before} "
                "constraint(s), which its cost critics are made for: give one limit per constraint, or train a new model."
            )
        if self.episode_length != self._settled.get("episode_length", self.episode_length):
            self._horizon_check = None
        elif self.episode_length is None:
            self._horizon_check = HorizonCheck()
        # Of a plain sum it is 1. Where both discounts are the same, the budget does not depend on the horizon
        self._limit_gamma = self.cost_limit_gamma if discounted else 1.0
        episode_length = settle_episode_length(self.episode_length, self.env, warn=self.cost_gamma != self._limit_gamma)
        # Computed in any case: it also checks horizon and discount factors
        factor, in_limit = (budget_per_unit_cost(episode_length, gamma) for gamma in (self.cost_gamma, self.cost_limit_gamma))
        self._settled = {"cost_limit": limits, "cost_limit_discounted": discounted, "episode_length": episode_length}
        self.__dict__.update(self._settled)
        self.n_constraints = len(limits)
        self._budget_factor = factor / in_limit if discounted else factor
        self.cost_budget = limits * self._budget_factor
        if self._cost_tracker is not None:
            self._cost_tracker.cost_gamma = self.cost_limit_gamma
        buffer = getattr(self, "replay_buffer", None)  # the user may have deleted it
        if buffer is not None:
            if buffer.cost_key != self.cost_key:  # that nothing is found under it has to be said anew
                buffer.cost_reported = self._warned_of_no_cost = False
            buffer.cost_key = self.cost_key
            if isinstance(buffer, CostNStepReplayBuffer):
                buffer.cost_gamma = self.cost_gamma

    def _compare_constraint(self, in_force: dict[str, Any]) -> None:
        """Warn if the environment declares another constraint than before, where the model keeps the values in force."""
        if self.env is None:
            return
        declared = declared_constraint(self.env)
        if self._declared is not None:
            warn_of_changes(declared, self._declared, in_force)
        self._declared = declared

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Change the environment, see SB3. Limit and horizon stay, with a warning where the environment declares others.

        :param env: The environment for learning a policy
        :param force_reset: Force call to ``reset()`` before training to avoid unexpected behavior.
        """
        super().set_env(env, force_reset)
        self._compare_constraint(self._settled)

    def _recent_cost(self) -> np.ndarray | None:
        """Mean cost of the last episodes, in the budget's unit, shape (n_constraints,), None before one has ended."""
        costs = None if self._cost_tracker is None else self._cost_tracker.recent_costs(self.cost_limit_discounted)
        return None if costs is None or len(costs) == 0 else self._budget_factor * costs.mean(axis=0)

    @property
    def ep_cost_buffer(self) -> deque[np.ndarray]:
        """Costs of recent training episodes, arrays of shape (n_constraints,), as ``ep_info_buffer`` for rewards."""
        assert self._cost_tracker is not None, "No episode was run yet: call learn() first"
        return self._cost_tracker.episode_costs

    # --- the replay buffer ------------------------------------------------------------------------------------------------

    def _make_replay_buffer(self) -> CostStorage:
        if self.replay_buffer_class is not None:
            requested_class = self.replay_buffer_class
        elif isinstance(self.observation_space, spaces.Dict):
            requested_class = DictReplayBuffer
            if self.n_steps > 1:
                # An AssertionError as from SB3's algorithms
                raise AssertionError("N-step returns are not supported for Dict observation spaces: use n_steps=1.")
        else:
            requested_class = NStepReplayBuffer if self.n_steps > 1 else ReplayBuffer
        buffer_class = cost_buffer_class(requested_class)
        kwargs: dict[str, Any] = {"n_constraints": self.n_constraints, "cost_key": self.cost_key}
        if issubclass(buffer_class, CostNStepReplayBuffer):
            kwargs.update(gamma=self.gamma, cost_gamma=self.cost_gamma)
            if self.replay_buffer_class is None:
                kwargs["n_steps"] = self.n_steps
        if issubclass(buffer_class, HerReplayBuffer):
            assert self.env is not None, "You must pass an environment when using `HerReplayBuffer`"
            kwargs["env"] = self.env
        return buffer_class(
            self.buffer_size,
            self.observation_space,
            self.action_space,
            # In CPU memory: train() moves whole batches to the device
            device="cpu",
            n_envs=self.n_envs,
            optimize_memory_usage=self.optimize_memory_usage,
            **{**kwargs, **self.replay_buffer_kwargs},
        )

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer from a pickle file. What it does with new transitions follows the model, not the file.

        :param path: Path to the pickled replay buffer.
        :param truncate_last_traj: See SB3, for goal-conditioned buffers.
        :raises ValueError: If the buffer has no costs, another number of them, or is of another kind; the present one stays.
        """
        # The user may have deleted it to make room
        present = getattr(self, "replay_buffer", None)
        try:
            super().load_replay_buffer(path, truncate_last_traj)
            loaded = self.replay_buffer
        finally:
            self.replay_buffer = present
        if not isinstance(loaded, CostStorage):
            raise ValueError(
                f"The replay buffer in {path} holds no costs ({type(loaded).__name__}), but the model has "
                f"{self.n_constraints} constraint(s): load one that was saved by a model with constraints."
            )
        loaded.adopt_settings(self._make_replay_buffer() if present is None else present)
        self.replay_buffer = loaded

    # --- rollouts ---------------------------------------------------------------------------------------------------------

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        environments_reset = reset_num_timesteps or self._last_obs is None
        if self.replay_buffer is not None:
            # SB3 gives a loaded one the model's device, but train() moves whole batches there
            self.replay_buffer.device = th.device("cpu")
            if environments_reset:
                # Or n-step sums would run on into the episodes that start now
                self.replay_buffer.end_episodes()
        if self._cost_tracker is None or reset_num_timesteps:
            self._cost_tracker = EpisodeCostTracker(
                self.n_envs, self.n_constraints, self.cost_limit_gamma, self._stats_window_size
            )
        elif environments_reset:
            self._cost_tracker.start_episodes(self.n_envs)
        if self.device.type == "cpu" and keep_freed_memory() and self.verbose >= 1:
            print(f"Freed memory is kept in this process, up to 512 MiB, for faster updates ({SWITCH}=0 switches it off)")
        self._normalization_backup = NormalizationBackup(self._vec_normalize_env)
        if progress_bar:
            callback = with_progress_bar(callback)
        arguments = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name)
        if environments_reset:
            assert self._last_obs is not None
            self._check_reset_observation(self._last_obs)
        return arguments

    def _check_reset_observation(self, obs: np.ndarray | dict[str, np.ndarray]) -> None:
        """
        Look at the first observations of episodes before the policy acts on them. (The others are next observations as well,
        which the replay buffer looks at.)

        :param obs: From the environments, of which some were reset
        :raises ValueError: If it is not finite
        """
        # Normalising clips, which hides infinity
        original = obs if self._vec_normalize_env is None else self._vec_normalize_env.old_obs
        try:
            check_finite("observation", original)
        except ValueError:
            self._normalization_backup.restore()
            self._last_obs = None  # the next learn() starts from a reset
            raise

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> RolloutReturn:
        """
        Collect experiences and store them into the replay buffer, see SB3.

        :param args: See SB3
        :param kwargs: See SB3
        :return: Number of steps and episodes, and whether to go on
        :raises ValueError: If the environment's ``step`` returns six values, or what it returns is not finite
        :raises RuntimeError: If the process of an environment died
        """
        stored = False
        try:
            with explain_environment_errors():
                rollout = super().collect_rollouts(*args, **kwargs)
            stored = rollout.continue_training
            return rollout
        except (ValueError, gym.error.Error):
            self._normalization_backup.restore()
            raise
        finally:
            if not stored:
                # An error, or a callback that stops: the environments took a step that is not in the replay buffer. What comes
                # next would look as if it followed on the step before: the next learn() starts from a reset
                self._last_obs = None

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        self._normalization_backup = NormalizationBackup(self._vec_normalize_env)
        return super()._sample_action(0 if self.use_policy_at_warmup else learning_starts, action_noise, n_envs)

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: Any,
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        assert isinstance(replay_buffer, CostStorage)
        assert self._cost_tracker is not None
        # The buffer has read them: a cost_key function is called once a step
        self._cost_tracker.update(replay_buffer.newest_costs, dones)
        self._steps_without_episode = 0 if dones.any() else self._steps_without_episode + self.n_envs
        if dones.any():
            self._check_reset_observation(new_obs)
            self._warn_no_cost()
            check = self._horizon_check
            if check is not None and check.update(infos, self.episode_length, self.cost_gamma, self._limit_gamma):
                self._horizon_check = None

    def _warn_no_cost(self) -> None:
        """Warn once if the environment should have reported a cost by now."""
        assert self.replay_buffer is not None
        # Once a cost was seen there is nothing to warn of, also where later episodes report none
        said, self._warned_of_no_cost = self._warned_of_no_cost, True
        if not said and not self.replay_buffer.cost_reported:
            warn_user(
                f"The environment reported no cost (info[{self.cost_key!r}]) so far: a missing cost is treated as 0, so the "
                "constraint never binds. Name the right key with cost_key=..., or use an algorithm without constraints."
            )

    def learn(
        self: SelfCostAware,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfCostAware:
        """
        Return a trained model.

        :param total_timesteps: The total number of samples (env steps) to train on
        :param callback: callback(s) called at every step with state of the algorithm.
        :param log_interval: The number of episodes before logging.
        :param tb_log_name: the name of the run for TensorBoard logging, that of the algorithm if None
        :param reset_num_timesteps: whether or not to reset the current timestep number (used in logging)
        :param progress_bar: Display a progress bar using tqdm and rich.
        :return: the trained model
        """
        # Given as 1e6 more often than not
        name = tb_log_name or type(self).__name__
        super().learn(int(total_timesteps), callback, log_interval, name, reset_num_timesteps, progress_bar)
        self._after_training()
        return self

    def _after_training(self) -> None:
        if self._cost_tracker is not None and self._cost_tracker.total_steps > 0:
            self._warn_no_cost()

    def dump_logs(self) -> None:
        """
        Write log data.
        """
        tracker = self._cost_tracker
        assert tracker is not None
        if len(tracker.episode_costs) > 0:
            self._record_each("rollout/ep_cost_mean", np.mean(tracker.episode_costs, axis=0))
            if self.cost_limit_discounted:
                self._record_each("rollout/ep_cost_discounted_mean", np.mean(tracker.discounted_costs, axis=0))
            costs = np.stack(tracker.discounted_costs if self.cost_limit_discounted else tracker.episode_costs)
            self._record_each("rollout/violation_rate", np.mean(costs > self.cost_limit, axis=0))
        self._record_each("rollout/cumulative_cost", tracker.total_cost)
        self._record_each("rollout/cost_rate", tracker.cost_rate)
        self._record_each("rollout/cost_limit", self.cost_limit)
        self.logger.record("rollout/horizon", self.episode_length)
        super().dump_logs()

    def _record_each(self, key: str, values: np.ndarray) -> None:
        """Record a value, or each of several under a numbered key."""
        for index, value in enumerate(values):
            self.logger.record(key if len(values) == 1 else f"{key}_{index}", float(value))

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_normalization_backup"]
