"""What is allowed: cost limits, their unit and horizon, and the budget of the cost critics that follows from them."""

import contextlib
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from sb3_algd.common.guards import warn_user

#: Argument of the algorithms: attribute of the environment that declares it
DECLARED_BY = {
    "cost_limit": "cost_limit",
    "cost_limit_discounted": "cost_limit_discounted",
    # Of Gymnasium's TimeLimit wrapper
    "episode_length": "_max_episode_steps",
}

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
    if horizon < 1 or horizon != int(horizon):
        raise ValueError(f"`episode_length` must be a whole number of steps, at least 1, got {horizon!r}.")
    if not 0.0 < cost_gamma <= 1.0:
        raise ValueError(f"`cost_gamma` must be a number in (0, 1], got {cost_gamma!r}.")
    if cost_gamma == 1.0:
        return 1.0
    return (1.0 - cost_gamma**horizon) / ((1.0 - cost_gamma) * horizon)


def check_cost_limit(cost_limit: object) -> np.ndarray:
    """
    Validate a cost limit and give it its canonical form.

    :param cost_limit: A number, or one number per constraint.
    :return: The limits as a read-only float64 array of shape (n_c,).
    :raises ValueError: If a limit is not a number, negative or not finite, or if there is none.
    """
    try:
        limits = np.atleast_1d(np.array(cost_limit, dtype=np.float64))
    except (TypeError, ValueError):
        limits = np.empty(0)
    if limits.ndim != 1 or limits.size == 0:
        raise ValueError(
            f"`cost_limit` must be a number or a flat sequence with one number per constraint, got {cost_limit!r}."
        )
    if not np.all(np.isfinite(limits)) or np.any(limits < 0):
        raise ValueError(
            f"`cost_limit` must be finite and >= 0, got {cost_limit!r}: it is the cost allowed per episode "
            "(use 0 to forbid any cost, or a very large number to leave a cost unconstrained)."
        )
    # Set as a whole only: the budget would not follow a change of one number
    limits.flags.writeable = False
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
        raise ValueError(
            f"The environments declare different values of `{name}`: {values}. Give the value to the algorithm instead."
        )
    return values[0]


def settle_cost_limit(
    cost_limit: Any, discounted: bool | None, env: VecEnv | None, own_costs: bool
) -> tuple[np.ndarray, bool]:
    """
    The cost limits that are in force: those given, else those that the environment declares, else Safety-Gymnasium's 25.

    A limit is in the unit that the environment declares, unless the caller says which one it is in.

    :param cost_limit: The limit that was given, None for none.
    :param discounted: Whether the limit is a discounted sum, None for the unit that the environment declares.
    :param env: The environment, which may declare ``cost_limit`` and ``cost_limit_discounted``.
    :param own_costs: Whether the limit is one of other costs than ``info["cost"]``, of which the environment may declare one:
        there may be more or fewer of them.
    :return: Limits of shape (n_c,), and whether they are discounted sums.
    :raises ValueError: If the limit makes no sense or does not fit the environment's number of constraints.
    """
    # Where the environments disagree, the user has to say what counts, and may have done so
    declares = declared_constraint(env) if env is not None and cost_limit is not None else {}
    if env is not None and cost_limit is None:
        declares = {name: declared_by_env(env, name) for name in ("cost_limit", "cost_limit_discounted")}
    declared, declared_unit = declares.get("cost_limit"), bool(np.any(declares.get("cost_limit_discounted", False)))
    unit = declared_unit if discounted is None else discounted
    if cost_limit is None and declared is None:
        warn_user(
            "No cost_limit was given and the environment declares none (attribute `cost_limit`): "
            f"a limit of {FALLBACK_COST_LIMIT:g} per episode is used, as in Safety-Gymnasium. Give cost_limit."
        )
        return check_cost_limit(FALLBACK_COST_LIMIT), unit
    limits = check_cost_limit(declared if cost_limit is None else cost_limit)
    if declared is not None and np.size(declared) != len(limits) and not own_costs:
        raise ValueError(
            f"cost_limit has {len(limits)} value(s), {limits.tolist()}, but the environment has "
            f"{np.size(declared)} constraint(s) (it declares {declared}): give one limit per constraint, or say with "
            "cost_key=<function of info> which costs they are for."
        )
    if cost_limit is not None and discounted is None and declared_unit:
        warn_user(
            f"cost_limit={limits.tolist()} is taken for a discounted sum, the unit in which the environment declares its own "
            f"limit ({declared}). Say which one you mean: cost_limit_discounted=True, or False for a plain sum."
        )
    return limits, unit


def settle_episode_length(episode_length: int | None, env: VecEnv | None, warn: bool) -> int:
    """
    The horizon that is in force: the one given, else the environment's time limit, else 1000.

    :param episode_length: The length that was given, None for none.
    :param env: The environment, which may be wrapped in Gymnasium's ``TimeLimit``.
    :param warn: Whether to warn if there is neither.
    :return: Number of steps T.
    """
    if episode_length is None and env is not None:
        episode_length = declared_by_env(env, DECLARED_BY["episode_length"])
    if episode_length is None:
        episode_length = FALLBACK_EPISODE_LENGTH
        if warn:
            warn_user(
                "No episode_length was given and the environment has no time limit: "
                f"{FALLBACK_EPISODE_LENGTH} steps are assumed to turn the cost limit into a budget. Give episode_length."
            )
    return episode_length


def declared_constraint(env: VecEnv) -> dict[str, list[Any]]:
    """
    What an environment says of its constraint.

    :param env: The vectorized environment.
    :return: For each argument that it declares the values, flat. Nothing where the environments disagree: there the user has
        said what counts.
    """
    found: dict[str, list[Any]] = {}
    for argument, attribute in DECLARED_BY.items():
        with contextlib.suppress(ValueError):
            value = declared_by_env(env, attribute)
            if value is not None:
                found[argument] = np.ravel(value).tolist()
    return found


def warn_of_changes(declared: dict[str, list[Any]], before: dict[str, list[Any]], in_force: dict[str, Any]) -> None:
    """
    Warn where an environment declares another constraint than the one before, and the model keeps its own.

    :param declared: What the environment declares, see :func:`declared_constraint`.
    :param before: What the model's environment declared before.
    :param in_force: What the model goes by, for each argument that it took over from its environment.
    """
    for argument, value in in_force.items():
        new, kept = declared.get(argument), np.ravel(value).tolist()
        if new is not None and new not in (before.get(argument), kept):
            warn_user(
                f"The environment declares {argument} = {new}, but the model keeps its own, {kept}. "
                f"To go by the environment's, save the model and load it with {argument}=...: "
                f"load(path, env=env, {argument}={new[0] if len(new) == 1 else new})."
            )


class HorizonCheck:
    """Compares an assumed horizon with the lengths of the episodes that the environment cuts off."""

    #: Episodes of the same length before a warning
    N_EPISODES = 3

    def __init__(self) -> None:
        self._lengths: list[int] = []

    def update(self, infos: list[dict[str, Any]], horizon: int, cost_gamma: float, limit_gamma: float) -> bool:
        """
        Look at one step of all environments, and warn where the horizon is another one than the episodes'.

        :param infos: Of the environments, in which a ``Monitor`` notes the lengths of episodes that ended.
        :param horizon: The horizon that the budget is computed with.
        :param cost_gamma: Discount factor of the cost critics.
        :param limit_gamma: Discount factor of the limit, 1 for a plain sum.
        :return: Whether there is nothing more to look for.
        """
        ended = [info for info in infos if "episode" in info]
        self._lengths += [int(info["episode"]["l"]) for info in ended if info.get("TimeLimit.truncated")]
        if any(not info.get("TimeLimit.truncated") for info in ended) or len(set(self._lengths)) > 1:
            # They have no common length
            return True
        if len(self._lengths) < self.N_EPISODES:
            return False
        length = self._lengths[0]
        in_budget, in_limit = (
            budget_per_unit_cost(horizon, gamma) / budget_per_unit_cost(length, gamma) for gamma in (cost_gamma, limit_gamma)
        )
        if in_budget != in_limit:
            warn_user(
                f"The environment ends its episodes after {length} steps, but a horizon of {horizon} steps is assumed: the "
                f"budget of the cost critics is {in_budget / in_limit:.2g} times what the cost limit allows. "
                f"Give episode_length={length}."
            )
        return True


class ConstraintSetting:
    """An attribute that budget, episode costs and replay buffer depend on: they follow it when it is set."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, model: Any, owner: type | None = None) -> Any:
        if model is None:
            return self
        if self.name not in model.__dict__:
            raise AttributeError(self.name)
        return model.__dict__[self.name]

    def __set__(self, model: Any, value: Any) -> None:
        before = dict(model.__dict__)
        model.__dict__[self.name] = value
        # Nothing depends on it before the model is set up
        if hasattr(model, "cost_budget"):
            try:
                model._settle_constraint()
            except (TypeError, ValueError):
                model.__dict__.update(before)
                raise
