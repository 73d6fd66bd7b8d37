"""Turns environments that tell their cost in another way, or not at all, into ones that tell it in ``info["cost"]``."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import gymnasium as gym
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.utils import RecordConstructorArgs

CostFunction = Callable[[Any, Any, Any, dict[str, Any]], Any]
CostLimit = float | Sequence[float]


class SixTupleEnvironment(Protocol):
    """What :class:`SixTupleEnv` needs of the environment inside. It may also have ``render``, ``close``, ``metadata``."""

    @property
    def action_space(self) -> gym.Space[Any]:
        """The actions that ``step`` takes."""

    @property
    def observation_space(self) -> gym.Space[Any]:
        """The observations that ``reset`` and ``step`` return."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode and return (obs, info)."""

    def step(self, action: Any) -> tuple[Any, float, Any, bool, bool, dict[str, Any]]:
        """Take a step and return (obs, reward, cost, terminated, truncated, info)."""


class SixTupleEnv(gym.Env[Any, Any]):
    """
    A Gymnasium environment made of one whose ``step`` returns six values, in the manner of Safety-Gymnasium.

    :param env: The environment inside; its ``step`` returns (obs, reward, cost, terminated, truncated, info).
    :param cost_limit: What an episode's costs may sum to, one number or one per constraint. ALGD reads it from the
        attribute of that name. With None there is no such attribute, and ALGD has to be told.
    :param cost_limit_discounted: Whether the limit is one on the discounted sum.
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
        :param action: An element of the action space. If that is a Box, shape and finiteness are checked.
        :return: (obs, reward, terminated, truncated, info). ``info["cost"]`` is this step's cost, a float, or an array
            of shape (n_constraints,) where the environment inside gives one.
        :raises ResetNeeded: Before the first ``reset``.
        :raises ValueError: If the action has the wrong shape or isn't finite, or if not six values came back.
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
        """:return: What the environment inside renders: for ``"rgb_array"`` an image of shape (height, width, 3)."""
        return cast(Any, self.env).render()

    def close(self) -> None:
        """Close the environment inside, if it can be closed."""
        getattr(self.env, "close", lambda: None)()


class CostFromCallable(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """
    Computes ``info["cost"]`` of an environment that has a notion of cost, but does not report it.

    :param env: The environment.
    :param cost_function: Called with (obs, action, next_obs, info) at every step, where ``info`` is the environment's.
        It returns the cost of the step, a number, or an array of shape (n_constraints,).
    :param cost_limit: What an episode's costs may sum to, one number or one per constraint; None declares no limit.
    :param cost_limit_discounted: Whether the limit is one on the discounted sum.
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
        :return: As the environment, with ``info["cost"]``.
        :raises ResetNeeded: Before the first ``reset``.
        :raises ValueError: If the function returns something that isn't a finite number or flat array of such.
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
    Keeps the cost of the episode so far in ``info["episode_cost"]``, where SB3's ``Monitor`` finds it at the end:
    ``Monitor(EpisodeCost(env), "monitor.csv", info_keywords=("episode_cost",))``.

    :param env: The environment.
    :param cost_key: Key of ``info`` that holds the cost of a step; a missing one counts as 0.
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
        :return: As the environment, with ``info["episode_cost"]``: a number, or a list where there are several costs.
        """
        obs, reward, terminated, truncated, info = self.env.step(action)
        self._cost = self._cost + as_cost(info.get(self.cost_key, 0.0))
        # The Monitor writes it into a CSV file as it is; six digits, as of the return
        info["episode_cost"] = np.round(self._cost, 6).tolist()
        return obs, reward, terminated, truncated, info


def as_cost(value: Any) -> float | np.ndarray:
    """
    :param value: A cost, a number or an array of any kind.
    :return: The same as a float or a float64 array.
    """
    return float(value) if np.ndim(value) == 0 else np.asarray(value, dtype=np.float64)


def checked_action(action: Any, space: gym.spaces.Box) -> np.ndarray:
    """
    :param action: What was given to ``step``.
    :param space: The space that it should be of.
    :return: The same as an array of the space's shape and type.
    :raises ValueError: If its shape isn't the space's, or it holds NaN or infinity.
    """
    array = np.asarray(action, dtype=space.dtype)
    if array.shape != space.shape:
        raise ValueError(f"The action has shape {array.shape}, but this environment takes actions of shape {space.shape}.")
    if not np.isfinite(array).all():
        raise ValueError(f"The action {array} holds NaN or infinity, from which a simulation cannot go on.")
    return array
