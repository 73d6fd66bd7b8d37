"""
Replay buffers that store costs: a twin of each replay buffer of Stable-Baselines3.

Costs are vectors of ``n_constraints`` numbers per step, read from the environment's ``info``, kept in their own units
(VecNormalize scales rewards, never costs).
"""

import copy
import warnings
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, TensorDict
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_algd.common.episode_costs import CostKey, read_costs
from sb3_algd.common.guards import check_finite

SelfStorage = TypeVar("SelfStorage", bound="CostStorage")


class CostReplayBufferSamples(NamedTuple):
    """A batch of transitions with their costs; the first six fields are those of SB3's samples."""

    #: ``(batch, *obs_shape)``, or a dictionary of such tensors
    observations: th.Tensor | TensorDict
    #: (batch, action_dim), in [-1, 1]
    actions: th.Tensor
    next_observations: th.Tensor | TensorDict
    #: (batch, 1), 1 where the reward critics must not bootstrap: at terminations and where the reward is cut
    reward_dones: th.Tensor
    #: (batch, 1), the n-step sum if n_steps > 1
    rewards: th.Tensor
    #: (batch, 1) discount of the reward bootstrap, None for one-step transitions
    discounts: th.Tensor | None
    #: (batch, n_constraints), the n-step sum if n_steps > 1
    costs: th.Tensor
    #: (batch, 1), 1 where the episode terminated: no critic must bootstrap
    terminations: th.Tensor
    #: (batch, 1) discount of the cost bootstrap, None for one-step transitions
    cost_discounts: th.Tensor | None


class CostStorage(ReplayBuffer):
    """
    What every buffer with costs shares, mixed into one of SB3's replay buffers.

    :param args: Arguments of the SB3 buffer.
    :param n_constraints: Number of costs per step.
    :param cost_key: Key of ``info`` that holds the cost, or a function of ``info`` (which is not pickled with the buffer).
    :param reward_cut_key: Key of ``info`` whose truth cuts the reward bootstrap, and only that, at a step that does not end
        the episode (the paper's code does so with ``"goal_met"``). None for never.
    :param kwargs: Keyword arguments of the SB3 buffer.
    """

    #: Names of arrays that change in rows other than the one that is added
    rewritten_arrays: ClassVar[tuple[str, ...]] = ()
    #: Names of attributes that follow the model's arguments, also in a buffer that was loaded from a file
    model_settings: ClassVar[tuple[str, ...]] = ("cost_key", "reward_cut_key")
    #: Infos of a step that is about to be added, and what read_costs() has found there
    _read: tuple[Any, tuple[np.ndarray, bool]] | None = None

    def __init__(
        self,
        *args: Any,
        n_constraints: int = 1,
        cost_key: CostKey = "cost",
        reward_cut_key: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.n_constraints = n_constraints
        self.cost_key: CostKey | None = cost_key
        self.reward_cut_key = reward_cut_key
        #: Whether the environment has ever reported a cost
        self.cost_reported = False
        #: Number of rows ever stored, overwritten ones too
        self.n_added = 0
        #: (n_constraints,) lowest costs ever stored, 0 where none was negative
        self.lowest_costs = np.zeros(n_constraints, dtype=np.float32)
        self.costs = np.zeros((self.buffer_size, self.n_envs, n_constraints), dtype=np.float32)
        self.reward_cuts = np.zeros((self.buffer_size, self.n_envs), dtype=np.float32)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_read", None)
        if callable(self.cost_key):
            # A lambda cannot be pickled, and its user has it anyway: the model that loads the buffer gives it its own
            state["cost_key"] = None
        return state

    def __deepcopy__(self: SelfStorage, memo: dict[int, Any]) -> SelfStorage:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        # HER's has a method for it
        getattr(copied, "__setstate__", copied.__dict__.update)(copy.deepcopy(self.__getstate__(), memo))
        # What a file cannot keep, a copy can
        copied.cost_key = self.cost_key
        return copied

    def adopt_settings(self, other: "CostStorage") -> None:
        """
        Take over what belongs to the model and not to the stored transitions.

        :param other: The buffer that this one takes the place of, made with the model's arguments.
        :raises ValueError: If the buffers are of different kinds.
        """
        if type(self) is not type(other) or self.n_constraints != other.n_constraints:
            raise ValueError(
                f"The replay buffer is a {type(self).__name__} with {self.n_constraints} cost(s) per step, but the model "
                f"has a {type(other).__name__} with {other.n_constraints}: load one that was saved by a model with the same "
                "n_steps, replay_buffer_class and number of constraints."
            )
        for name in self.model_settings:
            setattr(self, name, getattr(other, name))
        # Files of version 0.1.0 have neither
        self.cost_reported = getattr(self, "cost_reported", True)
        self.lowest_costs = getattr(self, "lowest_costs", np.minimum(self.costs.min(axis=(0, 1)), 0.0))

    def read_costs(self, infos: list[dict[str, Any]]) -> tuple[np.ndarray, bool]:
        """
        Costs of a step that is about to be added. A ``cost_key`` function is called once for it, whoever else asks.

        :param infos: Infos of the step
        :return: Costs of shape (n_envs, n_constraints), and whether any environment reports one
        :raises ValueError: If a cost is not finite, or their number is wrong
        """
        if self.cost_key is None:
            raise ValueError(
                "This replay buffer comes from a file, and its cost_key was a function, which is not stored: "
                "set its attribute cost_key before adding to it."
            )
        if self._read is None or self._read[0] is not infos:
            self._read = infos, read_costs(infos, self.cost_key, self.n_constraints)
        return self._read[1]

    def add(
        self,
        obs: Any,
        next_obs: Any,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """
        Store one step of each environment.

        :param obs: Observations
        :param next_obs: Next observations, the true last one at the end of an episode
        :param action: Actions in [-1, 1]
        :param reward: Rewards
        :param done: Whether episodes ended
        :param infos: Infos, which hold the costs
        :raises ValueError: If the next observation, reward or cost is not finite, or the number of costs is wrong; nothing is
            stored. (The observation was a next one, or the model has checked it after a reset.)
        """
        costs, reported = self.read_costs(infos)
        self._read = None
        check_finite("observation", next_obs)
        check_finite("reward", np.asarray(reward))
        self.cost_reported |= reported
        self.costs[self.pos] = costs
        self.lowest_costs = np.minimum(self.lowest_costs, costs.min(axis=0))
        if self.reward_cut_key is not None:
            self.reward_cuts[self.pos] = [bool(info.get(self.reward_cut_key, False)) for info in infos]
        super().add(obs, next_obs, action, reward, done, infos)
        self.n_added += 1

    @property
    def newest_costs(self) -> np.ndarray:
        """Costs of the newest step, shape (n_envs, n_constraints)."""
        return self.costs[(self.pos - 1) % self.buffer_size]

    def end_episodes(self) -> None:
        """Let the running episodes end with the newest transition, as at a time limit: a reset is about to follow."""
        if self.n_added == 0:
            return
        newest = (self.pos - 1) % self.buffer_size
        running = self.dones[newest] == 0
        self.dones[newest, running] = 1
        # Without it the end counts as a true one, as that of a time limit does then
        self.timeouts[newest, running] = float(self.handle_timeout_termination)

    def _lookup(self, stored: Any, rows: np.ndarray, envs: np.ndarray, env: VecNormalize | None) -> th.Tensor | TensorDict:
        """Normalised observations at the given rows and environments, as tensors."""
        if isinstance(stored, dict):
            chosen = self._normalize_obs({key: array[rows, envs] for key, array in stored.items()}, env)
            assert isinstance(chosen, dict)
            return {key: self.to_torch(array) for key, array in chosen.items()}
        normalized = self._normalize_obs(stored[rows, envs], env)
        assert isinstance(normalized, np.ndarray)
        return self.to_torch(normalized)

    def _terminations(self, rows: np.ndarray, envs: np.ndarray) -> np.ndarray:
        """1 where an episode ended by true termination, 0 elsewhere and at time limits."""
        return self.dones[rows, envs] * (1.0 - self.timeouts[rows, envs])

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> CostReplayBufferSamples:  # type: ignore[override]
        envs = np.random.randint(0, high=self.n_envs, size=(len(batch_inds),))
        if self.optimize_memory_usage:
            next_observations = self._lookup(self.observations, (batch_inds + 1) % self.buffer_size, envs, env)
        else:
            next_observations = self._lookup(self.next_observations, batch_inds, envs, env)
        terminated = self._terminations(batch_inds, envs)
        return CostReplayBufferSamples(
            observations=self._lookup(self.observations, batch_inds, envs, env),
            actions=self.to_torch(self.actions[batch_inds, envs]),
            next_observations=next_observations,
            reward_dones=self.to_torch(np.maximum(terminated, self.reward_cuts[batch_inds, envs])).unsqueeze(1),
            rewards=self.to_torch(self._normalize_reward(self.rewards[batch_inds, envs], env)).unsqueeze(1),
            discounts=None,
            costs=self.to_torch(self.costs[batch_inds, envs]),
            terminations=self.to_torch(terminated).unsqueeze(1),
            cost_discounts=None,
        )


class CostReplayBuffer(CostStorage):
    """:class:`~stable_baselines3.common.buffers.ReplayBuffer` with costs."""


class CostDictReplayBuffer(CostStorage, DictReplayBuffer):  # type: ignore[misc]
    """:class:`~stable_baselines3.common.buffers.DictReplayBuffer` with costs."""


class CostNStepReplayBuffer(CostStorage, NStepReplayBuffer):
    """
    :class:`~stable_baselines3.common.buffers.NStepReplayBuffer` with costs: n-step sums of rewards, discounted by ``gamma``,
    and of costs, discounted by ``cost_gamma``.

    :param args: Arguments of the SB3 buffer.
    :param n_steps: Number of steps summed up.
    :param gamma: Discount factor of rewards.
    :param cost_gamma: Discount factor of costs.
    :param kwargs: See :class:`CostStorage`.
    """

    model_settings = (*CostStorage.model_settings, "n_steps", "gamma", "cost_gamma")

    def __init__(self, *args: Any, n_steps: int = 3, gamma: float = 0.99, cost_gamma: float = 0.99, **kwargs: Any) -> None:
        super().__init__(*args, n_steps=n_steps, gamma=gamma, **kwargs)
        self.cost_gamma = cost_gamma

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> CostReplayBufferSamples:  # type: ignore[override]
        envs = np.random.randint(0, self.n_envs, size=batch_inds.shape)
        offsets = np.arange(self.n_steps)
        rows = (batch_inds[:, None] + offsets) % self.buffer_size  # (batch, n_steps)
        columns = envs[:, None]

        # A sum stops where an episode ends, and at the newest transition: what follows it in memory is older
        stops = np.logical_or(self.dones[rows, columns], self.timeouts[rows, columns])
        stops |= rows == (self.pos - 1) % self.buffer_size
        cuts = self.reward_cuts[rows, columns].astype(bool)
        cost_last = self._first_true(stops)
        reward_last = self._first_true(stops | cuts)
        cost_mask = offsets <= cost_last[:, None]
        reward_mask = offsets <= reward_last[:, None]

        rewards = self._normalize_reward(self.rewards[rows, columns], env) * reward_mask * self.gamma**offsets
        costs = self.costs[rows, columns] * (cost_mask * self.cost_gamma**offsets)[..., None]
        last_rows = (batch_inds + cost_last) % self.buffer_size
        terminated = self._terminations(last_rows, envs)
        # Where a cut ended the reward sum it does not bootstrap, so both critics can look at the same next observation
        was_cut = cuts[np.arange(len(rows)), reward_last]
        dones = np.maximum(terminated, was_cut)
        return CostReplayBufferSamples(
            observations=self._lookup(self.observations, batch_inds, envs, env),
            actions=self.to_torch(self.actions[batch_inds, envs]),
            next_observations=self._lookup(self.next_observations, last_rows, envs, env),
            reward_dones=self._column(dones),
            rewards=self._column(rewards.sum(axis=1)),
            discounts=self._column(self.gamma ** (reward_last + 1.0)),
            costs=self.to_torch(costs.sum(axis=1).astype(np.float32)),
            terminations=self._column(terminated),
            cost_discounts=self._column(self.cost_gamma ** (cost_last + 1.0)),
        )

    def _first_true(self, flags: np.ndarray) -> np.ndarray:
        """Index of the first True in each row of (batch, n_steps), the last index where there is none."""
        return np.where(flags.any(axis=1), flags.argmax(axis=1), self.n_steps - 1)

    def _column(self, values: np.ndarray) -> th.Tensor:
        return self.to_torch(values.astype(np.float32)).unsqueeze(1)


class CostHerReplayBuffer(CostStorage, HerReplayBuffer):  # type: ignore[misc]
    """
    :class:`~stable_baselines3.her.HerReplayBuffer` with costs.

    A relabelled transition keeps the cost that was paid: costs must not depend on the goal. It is not cut (see
    ``reward_cut_key``): its old goal may have been met, nothing is known of its new one.
    """

    rewritten_arrays = ("ep_length",)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        # It comes with the model, see SB3's HerReplayBuffer
        del state["env"]
        return state

    def end_episodes(self) -> None:
        """Let the running episodes end with the newest transition, so that they can be sampled."""
        with warnings.catch_warnings():
            # Here it is meant
            warnings.filterwarnings("ignore", "The last trajectory in the replay buffer will be truncated")
            self.truncate_last_trajectory()

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> CostReplayBufferSamples:  # type: ignore[override]
        """
        Sample real transitions and transitions with new goals.

        :param batch_size: Number of elements to sample
        :param env: Associated VecEnv to normalize the observations/rewards when sampling
        :return: Samples
        """
        self._drawn: list[tuple[np.ndarray, np.ndarray]] = []
        data = HerReplayBuffer.sample(self, batch_size, env)
        # SB3 draws the real transitions, then the relabelled ones, and joins them in this order
        rows, envs = (np.concatenate(indices) for indices in zip(*self._drawn, strict=True))
        n_real = len(self._drawn[0][0])
        del self._drawn
        cuts = self.to_torch(self.reward_cuts[rows, envs]).unsqueeze(1)
        cuts[n_real:] = 0
        return CostReplayBufferSamples(
            observations=data.observations,
            actions=data.actions,
            next_observations=data.next_observations,
            reward_dones=th.maximum(data.dones, cuts),
            rewards=data.rewards,
            discounts=None,
            costs=self.to_torch(self.costs[rows, envs]),
            terminations=data.dones,
            cost_discounts=None,
        )

    def _get_real_samples(
        self, batch_indices: np.ndarray, env_indices: np.ndarray, env: VecNormalize | None = None
    ) -> DictReplayBufferSamples:
        self._drawn.append((batch_indices, env_indices))
        return super()._get_real_samples(batch_indices, env_indices, env)

    def _get_virtual_samples(
        self, batch_indices: np.ndarray, env_indices: np.ndarray, env: VecNormalize | None = None
    ) -> DictReplayBufferSamples:
        self._drawn.append((batch_indices, env_indices))
        return super()._get_virtual_samples(batch_indices, env_indices, env)


#: SB3's buffers and their twins
_COST_TWINS: dict[type[ReplayBuffer], type[CostStorage]] = {
    ReplayBuffer: CostReplayBuffer,
    DictReplayBuffer: CostDictReplayBuffer,
    NStepReplayBuffer: CostNStepReplayBuffer,
    HerReplayBuffer: CostHerReplayBuffer,
}


def cost_buffer_class(buffer_class: type[ReplayBuffer]) -> type[CostStorage]:
    """
    The buffer with costs that stands in for a replay buffer class.

    :param buffer_class: One of SB3's replay buffer classes, or a class with costs.
    :return: Its twin with costs, or the class itself if it has costs already.
    :raises ValueError: If the class is unknown: it would lose the costs.
    """
    if issubclass(buffer_class, CostStorage):
        return buffer_class
    if buffer_class not in _COST_TWINS:
        raise ValueError(
            f"The replay buffer class {buffer_class.__name__} does not store costs. Use one of "
            f"{[known.__name__ for known in (*_COST_TWINS, *_COST_TWINS.values())]}, or a subclass of one with costs."
        )
    return _COST_TWINS[buffer_class]
