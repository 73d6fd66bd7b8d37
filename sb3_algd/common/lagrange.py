"""
The Lagrangian side of a constrained algorithm: risk, augmented Lagrangian and multiplier.

Shapes: ``n_c`` is the number of constraints, ``E`` the number of cost critics, ``...`` any leading dimensions
(batch, or samples x batch). Everything here is independent of networks and environments.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch as th
from torch import nn

#: One number for all constraints, or one per constraint
PerConstraint = float | Sequence[float] | np.ndarray

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


class LagrangeMultiplier(nn.Module):
    """
    One multiplier :math:`\\lambda_i` per constraint, updated by dual gradient ascent with its own Adam optimizer.

    ``model.save`` and ``model.load`` keep the multipliers and the state of ``optimizer`` exactly.

    :param n_constraints: Number of constraints n_c.
    :param init_value: Initial value of the multipliers, one for all or one per constraint, > 0 in log space
        (0.6931 is the paper's).
    :param learning_rate: Initial learning rate (the paper's is 3e-4).
    :param max_value: Upper bound; a multiplier above it is clamped to it.
    :param space: ``"projected"`` (:math:`\\lambda` itself, projected onto [0, max_value]) or ``"log"``
        (the paper's: :math:`\\lambda = e^\\theta`, multiplicative steps).
    :raises ValueError: If the initial value or the bound make no sense.
    """

    def __init__(
        self,
        n_constraints: int = 1,
        init_value: PerConstraint = 0.6931,
        learning_rate: float = 1e-4,
        max_value: float = 100.0,
        space: Literal["log", "projected"] = "projected",
    ) -> None:
        super().__init__()
        start = per_constraint("init_value", init_value, n_constraints)
        if start.max() > max_value:
            raise ValueError(f"`init_value` must be at most `max_value`, {max_value:g}, got {init_value!r}.")
        if space == "log" and start.min() == 0.0:
            raise ValueError(f"`init_value` must be > 0 in log space, got {init_value!r}: or use the projected space.")
        self.space = space
        self.max_value = max_value
        self.parameter = nn.Parameter(th.as_tensor(np.log(start) if space == "log" else start, dtype=th.float32))
        #: Kept with the parameter, which means nothing without it
        self.register_buffer("in_log_space", th.tensor(float(space == "log")))
        self.optimizer = th.optim.Adam([self.parameter], lr=learning_rate)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Version 0.1.0 has saved the parameter alone
        in_log_space = bool(state_dict.setdefault(f"{prefix}in_log_space", th.tensor(float(self.space == "log"))))
        if in_log_space != (self.space == "log"):
            saved_space = "log" if in_log_space else "projected"
            raise ValueError(
                f"`space` must be {saved_space!r}, as the multiplier was saved, got {self.space!r} (see multiplier_kwargs)."
            )
        saved = state_dict[f"{prefix}parameter"]
        highest = float((saved.exp() if in_log_space else saved).max())
        # The exponential of the bound's logarithm may be a little more than the bound
        if highest > self.max_value * (1 + 1e-5):
            raise ValueError(f"`max_value` must be at least {highest:g}, the saved multiplier, got {self.max_value:g}.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def value(self) -> th.Tensor:
        """The multipliers, detached, shape (n_c,)."""
        parameter = self.parameter.detach()
        return parameter.exp() if self.space == "log" else parameter

    def update(self, violation: th.Tensor) -> th.Tensor:
        """
        One step of dual ascent: a multiplier rises where its constraint is violated and falls where there is slack.

        :param violation: :math:`risk_i - h_i`, shape (n_c,).
        :return: The loss before the step, detached, scalar: :math:`\\sum_i \\lambda_i (h_i - risk_i)`.
        """
        current = self.value.clone()
        violation = violation.detach().to(self.parameter).expand_as(self.parameter)
        # The gradient of the loss by hand: d lambda / d theta is lambda in log space, 1 in projected space
        self.parameter.grad = -(current * violation if self.space == "log" else violation)
        self.optimizer.step()
        with th.no_grad():
            if self.space == "log":
                self.parameter.clamp_(max=float(np.log(self.max_value)))
            else:
                self.parameter.clamp_(min=0.0, max=self.max_value)
        return -(current * violation).sum()


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
