"""
What is allowed, and what has been paid: cost limits, the budget of the cost critics, and the costs of training episodes.
"""

from collections import deque
from typing import Any, ClassVar

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from sb3_algd.guards import warn_user

# What Safety-Gymnasium's benchmarks use where nothing else is said
FALLBACK_COST_LIMIT = 25.0
FALLBACK_EPISODE_LENGTH = 1000


def budget_per_unit_cost(horizon: int, cost_gamma: float) -> float:
    """
    Discounted cost-to-go of an episode whose undiscounted cost is 1, spread evenly over its steps.

    A cost critic estimates a discounted sum, a cost limit is usually stated as a plain sum over an episode:
    this is the factor between the two, :math:`(1 - \\gamma_c^T) / ((1 - \\gamma_c) T)`, and 1 if
    :math:`\\gamma_c = 1`.

    :param horizon: Length T of an episode, in steps.
    :param cost_gamma: Discount factor of the cost critics, in (0, 1].
    :return: The factor that turns a cost per episode into a discounted cost-to-go.
    """
    if horizon < 1:
        raise ValueError(f"The episode length must be at least 1 step, got {horizon}.")
    if not 0.0 < cost_gamma <= 1.0:
        raise ValueError(f"cost_gamma must be in (0, 1], got {cost_gamma}.")
    if cost_gamma == 1.0:
        return 1.0
    return (1.0 - cost_gamma**horizon) / ((1.0 - cost_gamma) * horizon)


def check_cost_limit(cost_limit: object) -> np.ndarray:
    """
    Validate a cost limit and give it its canonical form.

    :param cost_limit: A number, or one number per constraint.
    :return: The limits as a float64 array of shape (n_c,).
    :raises ValueError: If a limit is not a number, negative or not finite, or if there is none.
    """
    try:
        limits = np.atleast_1d(np.asarray(cost_limit, dtype=np.float64))
    except (TypeError, ValueError):
        limits = np.empty(0)
    if limits.ndim != 1 or limits.size == 0:
        raise ValueError(f"cost_limit must be a number or a flat sequence with one number per constraint, got {cost_limit!r}.")
    if not np.all(np.isfinite(limits)) or np.any(limits < 0):
        raise ValueError(
            f"cost_limit must be finite and >= 0, got {cost_limit!r}: it is the cost allowed per episode "
            "(use 0 to forbid any cost, or a very large number to leave a cost unconstrained)."
        )
    return limits


def declared_by_env(env: VecEnv, name: str) -> Any:
    """
    Value of an attribute that the environments declare, read through any VecEnv and wrapper.

    :param env: The vectorized environment.
    :param name: Name of the attribute.
    :return: The value, None if there is none.
    :raises ValueError: If the environments disagree.
    """
    if not env.has_attr(name):
        return None
    values = env.get_attr(name)
    if any(not np.array_equal(value, values[0]) for value in values[1:]):
        raise ValueError(f"The environments declare different values of `{name}`: {values}. Give the value to ALGD instead.")
    return values[0]


def settle_cost_limit(cost_limit: Any, discounted: bool | None, env: VecEnv | None) -> tuple[np.ndarray, bool]:
    """
    The cost limits that are in force: those given, else those that the environment declares, else Safety-Gymnasium's 25.

    :param cost_limit: The limit that was given, None for none.
    :param discounted: Whether the limit is a discounted sum, None for what the environment says of its own limit.
    :param env: The environment, which may declare ``cost_limit`` and ``cost_limit_discounted``.
    :return: Limits of shape (n_c,), and whether they are discounted sums.
    :raises ValueError: If the limit makes no sense or does not fit the environment's number of constraints.
    """
    declared = None if env is None else declared_by_env(env, "cost_limit")
    if cost_limit is None and declared is not None:
        assert env is not None
        if discounted is None:
            discounted = bool(declared_by_env(env, "cost_limit_discounted"))
        return check_cost_limit(declared), discounted
    if cost_limit is None:
        warn_user(
            "No cost_limit was given and the environment declares none (attribute `cost_limit`): "
            f"a limit of {FALLBACK_COST_LIMIT:g} per episode is used, as in Safety-Gymnasium. Give cost_limit to ALGD."
        )
        return check_cost_limit(FALLBACK_COST_LIMIT), bool(discounted)
    limits = check_cost_limit(cost_limit)
    if declared is not None and np.size(declared) != len(limits):
        raise ValueError(
            f"cost_limit has {len(limits)} value(s), {limits.tolist()}, but the environment has "
            f"{np.size(declared)} constraint(s) (it declares {declared}): give one limit per constraint."
        )
    return limits, bool(discounted)


def settle_episode_length(episode_length: int | None, env: VecEnv | None, warn: bool) -> int:
    """
    The horizon that is in force: the one given, else the environment's time limit, else 1000.

    :param episode_length: The length that was given, None for none.
    :param env: The environment, which may be wrapped in Gymnasium's ``TimeLimit``.
    :param warn: Whether to warn if there is neither.
    :return: Number of steps T.
    """
    if episode_length is None and env is not None:
        # The attribute of Gymnasium's TimeLimit wrapper
        episode_length = declared_by_env(env, "_max_episode_steps")
    if episode_length is None:
        episode_length = FALLBACK_EPISODE_LENGTH
        if warn:
            warn_user(
                "No episode_length was given and the environment has no time limit: "
                f"{FALLBACK_EPISODE_LENGTH} steps are assumed to turn the cost limit into a budget. Give episode_length."
            )
    return episode_length


class DeclaredConstraint:
    """
    What an environment says of its constraint, to notice when a model gets an environment that says something else.

    :param env: The environment, None if there is none.
    """

    #: Argument of ALGD: attribute of the environment
    _ATTRIBUTES: ClassVar = {"cost_limit": "cost_limit", "episode_length": "_max_episode_steps"}

    def __init__(self, env: VecEnv | None) -> None:
        self.values: dict[str, list[Any]] = {}
        for argument, attribute in self._ATTRIBUTES.items():
            values = env.get_attr(attribute) if env is not None and env.has_attr(attribute) else []
            # Where they differ, the user has said what counts
            if values and all(np.array_equal(value, values[0]) for value in values):
                self.values[argument] = np.ravel(values[0]).tolist()

    def warn_of_changes(self, before: "DeclaredConstraint", in_force: dict[str, Any]) -> None:
        """
        Warn where this environment declares another constraint than the one before, and the model keeps its own.

        :param before: What the model's environment declared before.
        :param in_force: What the model goes by, for each argument that it took over from its environment.
        """
        for argument, value in in_force.items():
            declared, kept = self.values.get(argument), np.ravel(value).tolist()
            if declared is not None and declared not in (before.values.get(argument), kept):
                warn_user(
                    f"The environment declares {argument} = {declared}, but the model keeps its own, {kept}. "
                    f"To go by the environment's, save the model and load it with {argument}=...: "
                    f"ALGD.load(path, env=env, {argument}={declared[0] if len(declared) == 1 else declared})."
                )


class EpisodeCostTracker:
    """
    Sums up the costs of the training episodes.

    :param n_envs: Number of environments.
    :param n_constraints: Number of constraints n_c.
    :param cost_gamma: Discount factor of the discounted sums.
    :param window: How many episodes are remembered.
    """

    def __init__(self, n_envs: int, n_constraints: int, cost_gamma: float, window: int) -> None:
        self.n_constraints = n_constraints
        self.cost_gamma = cost_gamma
        #: Cost of each recent episode, arrays of shape (n_c,)
        self.episode_costs: deque[np.ndarray] = deque(maxlen=window)
        #: The same as discounted sums
        self.discounted_costs: deque[np.ndarray] = deque(maxlen=window)
        self.total_cost = np.zeros(n_constraints)
        self.total_steps = 0
        self.start_episodes(n_envs)

    def start_episodes(self, n_envs: int) -> None:
        """
        Forget the running episodes: the environments were reset.

        :param n_envs: Number of environments.
        """
        self._running = np.zeros((n_envs, self.n_constraints))
        self._running_discounted = np.zeros((n_envs, self.n_constraints))
        self._discount = np.ones((n_envs, 1))

    def update(self, costs: np.ndarray, dones: np.ndarray) -> None:
        """
        Count one step.

        :param costs: Costs of the step, shape (n_envs, n_c).
        :param dones: Whether the episodes ended with this step, shape (n_envs,).
        """
        self.total_cost += costs.sum(axis=0)
        self.total_steps += len(costs)
        self._running += costs
        self._running_discounted += self._discount * costs
        self._discount *= self.cost_gamma
        for index in np.flatnonzero(dones):
            self.episode_costs.append(self._running[index].copy())
            self.discounted_costs.append(self._running_discounted[index].copy())
            self._running[index] = 0.0
            self._running_discounted[index] = 0.0
            self._discount[index] = 1.0

    @property
    def cost_rate(self) -> np.ndarray:
        """Mean cost per step over the whole training so far, shape (n_c,)."""
        return self.total_cost / max(self.total_steps, 1)
