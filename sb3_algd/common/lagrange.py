"""
The Lagrangian side of a constrained algorithm: risk, augmented Lagrangian and multiplier.

Shapes: ``n_c`` is the number of constraints, ``E`` the number of cost critics, ``...`` any leading dimensions
(batch, or samples x batch). Everything here is independent of networks and environments.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch as th
from torch import nn

#: One number for all constraints, or one per constraint
PerConstraint = float | Sequence[float] | np.ndarray

#: Steps of an episode from which on it moves a multiplier by more
LONG_EPISODE = 400
#: By how much more at most: that of 1,000 steps, the longest that were tried
MAX_FACTOR = 2.5

# A variance below this is taken as zero, so that the standard deviation's gradient stays finite
MIN_VARIANCE = 1e-12


def estimate_risk(cost_values: th.Tensor, coef: float) -> th.Tensor:
    """
    Pessimistic cost estimate: mean plus ``coef`` standard deviations over the ensemble (unbiased, 0 if E = 1).

    :param cost_values: Values of the cost critics, shape (E, ..., n_c).
    :param coef: How many standard deviations are added.
    :return: Risk, shape (..., n_c).
    """
    if cost_values.shape[0] == 1 or coef == 0.0:
        return cost_values.mean(dim=0)
    variance, mean = th.var_mean(cost_values, dim=0)
    return mean + coef * variance.clamp_min(MIN_VARIANCE).sqrt()


def risk_slope(cost_values: th.Tensor, coef: float) -> th.Tensor:
    """
    :param cost_values: Values of the cost critics, shape (E, ..., n_c).
    :param coef: How many standard deviations :func:`estimate_risk` adds.
    :return: Gradient of the risk with respect to each value, same shape.
    """
    n_critics = cost_values.shape[0]
    if n_critics == 1 or coef == 0.0:
        return th.full_like(cost_values, 1.0 / n_critics)
    variance, mean = th.var_mean(cost_values, dim=0)
    scale = th.where(variance > MIN_VARIANCE, coef / (n_critics - 1) * variance.clamp_min(MIN_VARIANCE).rsqrt(), 0.0)
    return 1.0 / n_critics + scale * (cost_values - mean)


def penalty_slope(risk: th.Tensor, multiplier: th.Tensor, budget: th.Tensor, rho: th.Tensor) -> th.Tensor:
    """
    :param risk: Shape (..., n_c).
    :param multiplier: :math:`\\lambda \\geq 0`, shape (n_c,).
    :param budget: :math:`h`, shape (n_c,).
    :param rho: Penalty coefficients, shape (n_c,).
    :return: Gradient of :func:`augmented_lagrangian` with respect to the risk,
        :math:`[\\lambda_i + \\rho_i (risk_i - h_i)]_+`, shape (..., n_c).
    """
    return (multiplier + rho * (risk - budget)).clamp_min(0.0)


def augmented_lagrangian(
    reward_value: th.Tensor, risk: th.Tensor, multiplier: th.Tensor, budget: th.Tensor, rho: th.Tensor
) -> th.Tensor:
    """
    The energy that guides the policy (the paper's augmented Lagrangian):

    .. math::
        L_A = -Q + \\sum_i \\frac{1}{2\\rho_i} \\left( [\\lambda_i + \\rho_i (risk_i - h_i)]_+^2 - \\lambda_i^2 \\right)

    :math:`\\rho_i = 0` is its limit, the plain Lagrangian :math:`-Q + \\sum_i \\lambda_i (risk_i - h_i)`. The two
    squares are not computed, because their difference would not be exact in single precision for small ``rho``.

    :param reward_value: :math:`Q(s, a)`, the minimum over the reward critics, shape (...).
    :param risk: Shape (..., n_c), see :func:`estimate_risk`.
    :param multiplier: :math:`\\lambda \\geq 0`, shape (n_c,).
    :param budget: :math:`h`, in the unit of the risk, shape (n_c,).
    :param rho: Penalty coefficients :math:`\\rho \\geq 0`, shape (n_c,).
    :return: Energy, shape (...).
    """
    violation = risk - budget
    # Without a quadratic term the constraint acts everywhere
    active = (multiplier + rho * violation > 0.0) | (rho == 0.0)
    penalty = multiplier * violation + 0.5 * rho * violation.square()
    return th.where(active, penalty, -multiplier.square() / (2.0 * rho)).sum(dim=-1) - reward_value


class EnergyTerms(NamedTuple):
    """
    All that makes an energy of values and risks: :func:`augmented_lagrangian` in units of its own.

    :param multiplier: :math:`\\lambda`, shape (n_c,).
    :param budget: :math:`h`, in the unit of the risk, shape (n_c,).
    :param rho: Penalty coefficients, shape (n_c,).
    :param slopes: What value and risks are divided by, shape (1 + n_c,).
    :param weight: What the energy is multiplied by, scalar.
    """

    multiplier: th.Tensor
    budget: th.Tensor
    rho: th.Tensor
    slopes: th.Tensor
    weight: th.Tensor

    def energy(self, value: th.Tensor, risk: th.Tensor) -> th.Tensor:
        """
        :param value: Shape (...).
        :param risk: Shape (..., n_c).
        :return: Energy, shape (...).
        """
        unit, units = self.slopes[0], self.slopes[1:]
        terms = self.multiplier, self.budget / units, self.rho
        return self.weight * augmented_lagrangian(value / unit, risk / units, *terms)

    def gradients(self, risk: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param risk: Shape (..., n_c).
        :return: Gradients of the energy with respect to the value, a scalar, and to the risk, shape (..., n_c).
        """
        unit, units = self.slopes[0], self.slopes[1:]
        slope = penalty_slope(risk / units, self.multiplier, self.budget / units, self.rho)
        return -self.weight / unit, self.weight / units * slope


class LagrangeMultiplier(nn.Module):
    """
    The paper's multipliers: one :math:`\\lambda_i = e^{\\theta_i}` per constraint, updated by dual gradient ascent with an
    Adam optimizer of its own.

    ``model.save`` and ``model.load`` keep the multipliers and the state of ``optimizer`` exactly.

    :param n_constraints: Number of constraints n_c.
    :param init_value: Initial value of the multipliers, > 0, one for all or one per constraint (0.6931 is the paper's).
    :param learning_rate: Initial learning rate (the paper's is 3e-4).
    :param max_value: Upper bound; a multiplier above it is clamped to it.
    :raises ValueError: If the initial value or the bound make no sense.
    """

    def __init__(
        self,
        n_constraints: int = 1,
        init_value: PerConstraint = 0.6931,
        learning_rate: float = 3e-4,
        max_value: float = 100.0,
    ) -> None:
        super().__init__()
        start = check_initial(init_value, max_value, n_constraints)
        if start.min() == 0.0:
            raise ValueError(
                f"`init_value` must be > 0, because the paper's multiplier moves in log space, got {init_value!r}."
            )
        self.max_value = max_value
        self.parameter = nn.Parameter(th.as_tensor(np.log(start), dtype=th.float32))
        self.optimizer = th.optim.Adam([self.parameter], lr=learning_rate)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}integral" in state_dict:
            raise ValueError("`multiplier_signal` must be 'episodes', as the multiplier was saved, got 'buffer'.")
        parameter = state_dict.get(f"{prefix}parameter")
        saved = saved_multiplier(state_dict, prefix)
        if saved is not None and parameter is not None:
            # The exponential of the bound's logarithm may be a little more than the bound
            check_saved(saved, self.max_value * (1 + 1e-5))
            state_dict[f"{prefix}parameter"] = saved.clamp_min(1e-8).log() if saved is parameter else parameter
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def value(self) -> th.Tensor:
        """The multipliers, detached, shape (n_c,)."""
        return self.parameter.detach().exp()

    def update(self, violation: th.Tensor) -> None:
        """
        One step of dual ascent: a multiplier rises where its constraint is violated and falls where there is slack.

        :param violation: :math:`risk_i - h_i`, shape (n_c,).
        """
        # The gradient of the loss lambda (h - risk) by hand: d lambda / d theta is lambda
        self.parameter.grad = -(self.value * violation.detach().to(self.parameter).expand_as(self.parameter))
        self.optimizer.step()
        with th.no_grad():
            self.parameter.clamp_(max=float(np.log(self.max_value)))


class EpisodeController(nn.Module):
    """
    One multiplier per constraint, updated once per finished episode from what recent episodes have cost: dual ascent on the
    relative violation with a proportional part (PID Lagrangian, arXiv 2007.03964, without the derivative),

    .. math::
        \\lambda \\leftarrow [\\lambda + \\eta\\, v]_0^{max}, \\quad value = [\\lambda + \\rho\\, v]_0^{max}, \\quad
        v = (J - d) / d \\in [-1, 1].

    It does not depend on how many updates are made, nor on the unit of the costs. An episode of more than 400 steps counts as
    so many more, up to 2.5, because a policy follows the multiplier in updates.

    :param n_constraints: Number of constraints n_c.
    :param init_value: Initial value of the multipliers, one for all or one per constraint.
    :param learning_rate: Step :math:`\\eta` per episode of up to 400 steps and relative violation.
    :param max_value: Upper bound. The integral stops there too (anti-windup).
    :param confidence: J is the mean of recent episodes plus so many standard errors.
    """

    integral: th.Tensor
    value: th.Tensor

    def __init__(
        self,
        n_constraints: int = 1,
        init_value: PerConstraint = 0.0,
        learning_rate: float = 0.03,
        max_value: float = 10.0,
        confidence: float = 1.0,
    ) -> None:
        super().__init__()
        start = check_initial(init_value, max_value, n_constraints)
        self.max_value = max_value
        self.learning_rate = learning_rate
        self.confidence = confidence
        self.register_buffer("integral", th.as_tensor(start, dtype=th.float64))
        #: The multipliers, shape (n_c,)
        self.register_buffer("value", th.as_tensor(start, dtype=th.float32))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = saved_multiplier(state_dict, prefix)
        if saved is not None:
            state_dict.update({f"{prefix}integral": saved, f"{prefix}value": saved})
        check_saved(state_dict[f"{prefix}integral"], self.max_value * (1 + 1e-5))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def update(self, costs: np.ndarray, limit: np.ndarray, rho: np.ndarray, steps: int = LONG_EPISODE) -> None:
        """
        One step: a multiplier rises where its constraint is violated and falls where there is slack.

        :param costs: Costs of recent episodes, shape (n, n_c).
        :param limit: Cost limits in their unit, shape (n_c,).
        :param rho: Proportional part :math:`\\rho`, shape (n_c,).
        :param steps: Environment steps of the episode that has ended.
        """
        error = costs.std(axis=0, ddof=1) / np.sqrt(len(costs)) if len(costs) > 1 else np.zeros_like(limit)
        bound = costs.mean(axis=0) + self.confidence * error
        violation = np.clip((bound - limit) / np.maximum(limit, 1e-8), -1.0, 1.0)
        rate = self.learning_rate * np.clip(steps / LONG_EPISODE, 1.0, MAX_FACTOR)
        integral = np.clip(self.integral.cpu().numpy() + rate * violation, 0.0, self.max_value)
        self.integral.copy_(th.as_tensor(integral))
        self.value.copy_(th.as_tensor(np.clip(integral + rho * violation, 0.0, self.max_value)))


def check_initial(init_value: PerConstraint, max_value: float, n_constraints: int) -> np.ndarray:
    """:param init_value: Given. :param max_value: Bound. :param n_constraints: n_c. :return: Initial values, shape (n_c,)."""
    start = per_constraint("init_value", init_value, n_constraints)
    if start.max() > max_value:
        raise ValueError(f"`init_value` must be at most `max_value`, {max_value:g}, got {init_value!r}.")
    return start


def check_saved(saved: th.Tensor, max_value: float) -> None:
    """:param saved: Multipliers of a file. :param max_value: Bound. :raises ValueError: If they are above it."""
    if float(saved.max()) > max_value:
        raise ValueError(f"`max_value` must be at least {float(saved.max()):g}, the saved multiplier, got {max_value:g}.")


def saved_multiplier(state_dict: dict[str, Any], prefix: str) -> th.Tensor | None:
    """
    Take the multipliers out of what a :class:`LagrangeMultiplier` or version 0.1.0 has saved.

    :param state_dict: What was saved.
    :param prefix: Of the names in it.
    :return: Shape (n_c,), None if an :class:`EpisodeController` has saved it.
    """
    # Version 0.1.0's may be no logarithms
    in_log_space = bool(state_dict.pop(f"{prefix}in_log_space", th.tensor(1.0)))
    parameter = state_dict.pop(f"{prefix}parameter", None)
    return parameter.exp() if in_log_space and parameter is not None else parameter


def per_constraint(name: str, value: PerConstraint, n_constraints: int) -> np.ndarray:
    """
    Give each constraint its number.

    :param name: Name of the argument, for the message.
    :param value: One number for all constraints, or one per constraint.
    :param n_constraints: Number of constraints n_c.
    :return: float64 array of shape (n_c,).
    :raises ValueError: If a number is negative or not finite, or there are too few or too many.
    """
    try:
        numbers = np.array(np.broadcast_to(np.asarray(value, dtype=np.float64), (n_constraints,)))
    except (TypeError, ValueError):
        numbers = np.full(n_constraints, np.nan)
    if not np.isfinite(numbers).all() or numbers.min() < 0.0:
        raise ValueError(
            f"`{name}` must be finite and >= 0, one number or {n_constraints} (one per constraint), got {value!r}."
        )
    return numbers
