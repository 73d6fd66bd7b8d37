"""Costs of steps and episodes: how they are read from ``info``, and the one place where they are summed up."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

#: Where a step's cost is found: a key of ``info``, or a function of it that gives a number or one number per constraint
CostKey = str | Callable[[dict[str, Any]], Any]

#: How many recent episodes the multiplier is updated from, more where there are more environments
RECENT_EPISODES = 10


def read_cost(info: dict[str, Any], cost_key: CostKey) -> np.ndarray | None:
    """
    Cost of one step of one environment.

    :param info: The environment's ``info``.
    :param cost_key: Key of ``info``, or a function of it.
    :return: float32 array of shape (n_costs,), None if the environment reports no cost.
    :raises ValueError: If the cost is no number and no sequence of numbers.
    """
    cost = cost_key(info) if callable(cost_key) else info.get(cost_key)
    if cost is None:
        return None
    try:
        array = np.asarray(cost)
        # NumPy would read numbers in texts
        if array.dtype.kind not in "US":
            return array.astype(np.float32).reshape(-1)
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"The environment reported a cost that is no number and no sequence of numbers: {cost!r}. Nothing of it was stored; "
        f"the model can still be saved. Fix the environment's cost, or give cost_key=<function of info> (it is {cost_key!r})."
    )


def read_costs(infos: Sequence[dict[str, Any]], cost_key: CostKey, n_constraints: int) -> tuple[np.ndarray, bool]:
    """
    Costs of one step of each environment.

    :param infos: One ``info`` per environment.
    :param cost_key: Key of ``info``, or a function of it.
    :param n_constraints: Number of costs expected per step.
    :return: Costs of shape (n_envs, n_constraints), 0 where an environment reports none, and whether any reports one.
    :raises ValueError: If the number of costs is not ``n_constraints``, or one is not finite.
    """
    costs = np.zeros((len(infos), n_constraints), dtype=np.float32)
    reported = False
    for row, info in zip(costs, infos, strict=True):
        cost = read_cost(info, cost_key)
        if cost is None:
            continue
        reported = True
        if cost.size != n_constraints:
            raise ValueError(
                f"The environment reports {cost.size} cost(s) per step but there are {n_constraints} cost limit(s): "
                "give cost_limit one number per cost, or pick the costs that count with cost_key=<function of info>."
            )
        row[:] = cost
    if not np.isfinite(costs).all():
        raise ValueError(
            f"The environment reported a non-finite cost: {costs.tolist()}. Nothing of it was stored; the model can still be "
            f"saved. Fix the environment's cost ({cost_key!r})."
        )
    return costs, reported


class EpisodeCostTracker:
    """
    Sums up the costs of episodes, as plain and as discounted sums.

    :param n_envs: Number of environments.
    :param n_constraints: Number of constraints n_c.
    :param cost_gamma: Discount factor of the discounted sums.
    :param window: How many episodes of all environments together are remembered, None for all.
    """

    def __init__(self, n_envs: int, n_constraints: int, cost_gamma: float, window: int | None = None) -> None:
        self.n_constraints = n_constraints
        self.cost_gamma = cost_gamma
        #: Cost of each remembered episode, arrays of shape (n_c,)
        self.episode_costs: deque[np.ndarray] = deque(maxlen=window)
        #: The same as discounted sums
        self.discounted_costs: deque[np.ndarray] = deque(maxlen=window)
        self.total_cost = np.zeros(n_constraints)
        self.total_steps = 0
        #: Steps of each episode that ended with the newest step
        self.newest_lengths: list[int] = []
        #: Plain and discounted costs of the last episodes, whatever ``window`` is
        self._recent: deque[tuple[np.ndarray, np.ndarray]] = deque()
        self.start_episodes(n_envs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"newest_lengths": [], "_steps": np.zeros(len(state["_running"]), dtype=np.int64), **state})

    def start_episodes(self, n_envs: int) -> None:
        """
        Forget the running episodes: the environments were reset.

        :param n_envs: Number of environments.
        """
        self._running = np.zeros((n_envs, self.n_constraints))
        self._running_discounted = np.zeros((n_envs, self.n_constraints))
        self._discount = np.ones((n_envs, 1))
        self._steps = np.zeros(n_envs, dtype=np.int64)
        self._recent = deque(self._recent, maxlen=max(RECENT_EPISODES, n_envs))

    def widen(self, n_constraints: int) -> None:
        """
        Make room for more costs per step, as long as every cost was 0.

        :param n_constraints: Number of costs per step from now on.
        """
        assert not self.total_cost.any()
        self.n_constraints = n_constraints
        self.total_cost = np.zeros(n_constraints)
        self._running = np.zeros((len(self._running), n_constraints))
        self._running_discounted = np.zeros_like(self._running)
        for episodes in (self.episode_costs, self.discounted_costs):
            zeros = [np.zeros(n_constraints) for _ in episodes]
            episodes.clear()
            episodes.extend(zeros)
        pairs = [(np.zeros(n_constraints), np.zeros(n_constraints)) for _ in self._recent]
        self._recent.clear()
        self._recent.extend(pairs)

    def update(self, costs: np.ndarray, dones: np.ndarray) -> None:
        """
        Count one step of all environments.

        :param costs: Costs of the step, shape (n_envs, n_c).
        :param dones: Whether the episodes ended with this step, shape (n_envs,).
        """
        self.newest_lengths = []
        for index, (cost, done) in enumerate(zip(costs, dones, strict=True)):
            self.add(index, cost, done)

    def add(self, index: int, cost: np.ndarray, done: bool) -> None:
        """
        Count one step of one environment.

        :param index: Which environment.
        :param cost: Cost of the step, shape (n_c,).
        :param done: Whether the episode ended with this step.
        """
        self.total_cost += cost
        self.total_steps += 1
        self._running[index] += cost
        self._running_discounted[index] += self._discount[index] * cost
        self._discount[index] *= self.cost_gamma
        self._steps[index] += 1
        if done:
            self.newest_lengths.append(int(self._steps[index]))
            self._steps[index] = 0
            episode = self._running[index].copy(), self._running_discounted[index].copy()
            self.episode_costs.append(episode[0])
            self.discounted_costs.append(episode[1])
            self._recent.append(episode)
            self._running[index] = 0.0
            self._running_discounted[index] = 0.0
            self._discount[index] = 1.0

    def recent_costs(self, discounted: bool) -> np.ndarray:
        """
        Costs of the last episodes.

        :param discounted: Whether the discounted sums count.
        :return: Shape (n, n_c), without rows before an episode has ended.
        """
        return np.array([episode[int(discounted)] for episode in self._recent]).reshape(-1, self.n_constraints)

    @property
    def cost_rate(self) -> np.ndarray:
        """Mean cost per step over the whole training so far, shape (n_c,)."""
        return self.total_cost / max(self.total_steps, 1)
