"""Wrappers for environments that do not report their cost in ``info["cost"]``."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import gymnasium as gym
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.utils import RecordConstructorArgs

CostFunction = Callable[[Any, Any, Any, dict[str, Any]], Any]
CostLimit = float | Sequence[float]


class SixTupleEnvironment(Protocol):
    """The interface that :class:`SixTupleEnv` wraps. ``render``, ``close`` and ``metadata`` are optional."""

    @property
    def action_space(self) -> gym.Space[Any]:
        """The space of the actions of ``step``."""

    @property
    def observation_space(self) -> gym.Space[Any]:
        """The space of the observations of ``reset`` and ``step``."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode and return (obs, info)."""

    def step(self, action: Any) -> tuple[Any, float, Any, bool, bool, dict[str, Any]]:
        """Take a step and return (obs, reward, cost, terminated, truncated, info)."""


class SixTupleEnv(gym.Env[Any, Any]):
    """
    Wraps an environment whose ``step`` returns six values, like Safety-Gymnasium's, into a Gymnasium environment.

    :param env: The environment inside. Its ``step`` returns (obs, reward, cost, terminated, truncated, info).
    :param cost_limit: The limit on the sum of an episode's costs, one number or one per constraint. ALGD reads it from the
        attribute ``cost_limit``. With None the attribute is missing, and ALGD needs the limit as an argument.
    :param cost_limit_discounted: Whether the limit is on the discounted sum.
    """

    def __init__(
        self, env: SixTupleEnvironment, cost_limit: CostLimit | None = None, cost_limit_discounted: bool = False
    ) -> None:
        self.env = env
        self.action_space = env.action_space
        self.observation_space = env.observation_space
        self.metadata = dict(getattr(env, "metadata", None) or self.metadata)
        self.render_mode = getattr(env, "render_mode", None)
        self._needs_reset = True
        if cost_limit is not None:
            self.cost_limit = cost_limit
            self.cost_limit_discounted = cost_limit_discounted

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """
        :param seed: Passed to the environment inside.
        :param options: Passed to the environment inside.
        :return: The first observation and the info of the environment inside.
        """
        super().reset(seed=seed)
        result = self.env.reset(seed=seed, options=options)
        self._needs_reset = False
        return result

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """
        :param action: An element of the action space. If the space is a Box, the shape and finiteness are checked.
        :return: (obs, reward, terminated, truncated, info). ``info["cost"]`` is the cost of the step: a float, or an array
            of shape (n_constraints,) if the environment inside returns one.
        :raises ResetNeeded: Before the first ``reset``.
        :raises ValueError: If the action has the wrong shape or is not finite, or if the environment inside does not
            return six values.
        """
        if self._needs_reset:
            raise ResetNeeded("This environment has not been reset: call reset() before the first step().")
        if isinstance(self.action_space, gym.spaces.Box):
            action = checked_action(action, self.action_space)
        result = cast(tuple[Any, ...], self.env.step(action))
        if len(result) != 6:
            raise ValueError(
                f"step() of {type(self.env).__name__} returned {len(result)} values, not the six (obs, reward, cost, "
                "terminated, truncated, info). An environment that returns five is not to be wrapped in SixTupleEnv."
            )
        obs, reward, cost, terminated, truncated, info = result
        info["cost"] = as_cost(cost)
        return obs, float(reward), bool(terminated), bool(truncated), info

    def render(self) -> Any:
        """:return: The result of the environment inside. For ``"rgb_array"`` an image of shape (height, width, 3)."""
        return cast(Any, self.env).render()

    def close(self) -> None:
        """Close the environment inside, if it has a ``close``."""
        getattr(self.env, "close", lambda: None)()


class CostFromCallable(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """
    Computes ``info["cost"]`` from the transitions of an environment that does not report a cost.

    :param env: The environment.
    :param cost_function: Called with (obs, action, next_obs, info) at every step, where ``info`` is the environment's.
        It returns the cost of the step: a number, or an array of shape (n_constraints,).
    :param cost_limit: The limit on the sum of an episode's costs, one number or one per constraint. None declares no limit.
    :param cost_limit_discounted: Whether the limit is on the discounted sum.
    """

    def __init__(
        self,
        env: gym.Env[Any, Any],
        cost_function: CostFunction,
        cost_limit: CostLimit | None = None,
        cost_limit_discounted: bool = False,
    ) -> None:
        RecordConstructorArgs.__init__(
            self, cost_function=cost_function, cost_limit=cost_limit, cost_limit_discounted=cost_limit_discounted
        )
        super().__init__(env)
        self._cost_function = cost_function
        self._last_obs: Any = None
        if cost_limit is not None:
            self.cost_limit = cost_limit
            self.cost_limit_discounted = cost_limit_discounted

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """
        :param seed: Passed on.
        :param options: Passed on.
        :return: The first observation and info.
        """
        self._last_obs, info = self.env.reset(seed=seed, options=options)
        return self._last_obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """
        :param action: Passed on.
        :return: The result of the environment, with ``info["cost"]``.
        :raises ResetNeeded: Before the first ``reset``.
        :raises ValueError: If the function does not return a finite number or a flat array of finite numbers.
        """
        if self._last_obs is None:
            raise ResetNeeded("This environment has not been reset: call reset() before the first step().")
        obs, reward, terminated, truncated, info = self.env.step(action)
        cost = as_cost(self._cost_function(self._last_obs, action, obs, info))
        if np.ndim(cost) > 1 or not np.isfinite(cost).all():
            raise ValueError(f"The cost function returned {cost!r}: it has to return a finite number or a flat array of them.")
        info["cost"] = cost
        self._last_obs = obs
        return obs, reward, terminated, truncated, info


class EpisodeCost(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """
    Adds the cost of the episode so far as ``info["episode_cost"]``.

    SB3's ``Monitor`` writes the value of the last step into its file:
    ``Monitor(EpisodeCost(env), "monitor.csv", info_keywords=("episode_cost",))``.

    :param env: The environment.
    :param cost_key: The key of ``info`` with the cost of the step. A missing cost counts as 0.
    """

    def __init__(self, env: gym.Env[Any, Any], cost_key: str = "cost") -> None:
        RecordConstructorArgs.__init__(self, cost_key=cost_key)
        super().__init__(env)
        self.cost_key = cost_key
        self._cost = np.zeros(())

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """
        :param seed: Passed on.
        :param options: Passed on.
        :return: The first observation and info.
        """
        self._cost = np.zeros(())
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """
        :param action: Passed on.
        :return: The result of the environment, with ``info["episode_cost"]``: a number, or a list for several costs.
        """
        obs, reward, terminated, truncated, info = self.env.step(action)
        self._cost = self._cost + as_cost(info.get(self.cost_key, 0.0))
        # The Monitor writes the value to its CSV file as it is. It rounds the return to six digits, and so do we.
        info["episode_cost"] = np.round(self._cost, 6).tolist()
        return obs, reward, terminated, truncated, info


def as_cost(value: Any) -> float | np.ndarray:
    """
    :param value: A cost: a number, or an array of any type.
    :return: The cost as a float or a float64 array.
    """
    return float(value) if np.ndim(value) == 0 else np.asarray(value, dtype=np.float64)


def checked_action(action: Any, space: gym.spaces.Box) -> np.ndarray:
    """
    :param action: The action given to ``step``.
    :param space: The action space.
    :return: The action as an array of the space's shape and type.
    :raises ValueError: If the action has another shape than the space, or contains NaN or infinity.
    """
    array = np.asarray(action, dtype=space.dtype)
    if array.shape != space.shape:
        raise ValueError(f"The action has shape {array.shape}, but this environment takes actions of shape {space.shape}.")
    if not np.isfinite(array).all():
        raise ValueError(f"The action {array} holds NaN or infinity, from which a simulation cannot go on.")
    return array
