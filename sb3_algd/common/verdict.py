"""Whether a policy keeps its limit, as far as a number of episodes can tell."""

from dataclasses import dataclass
from typing import Any

import numpy as np

#: Bootstrap samples
N_RESAMPLES = 5000
#: Fewer episodes than this are too few for a bootstrap
MIN_BOOTSTRAP_EPISODES = 10
#: Numbers that are resampled at a time
BLOCK = 2_000_000
WITHIN, OVER, UNDECIDED = "within the limit", "over the limit", "undecided"


@dataclass(frozen=True)
class ConstraintVerdict:
    """
    Mean cost per episode with a confidence interval, beside the limit. All arrays have shape (n_constraints,).

    :param mean: Mean cost of the episodes
    :param lower: Lower bound of the expected cost
    :param upper: Upper bound of the expected cost
    :param limit: The limit
    :param confidence: Confidence of the interval
    :param n_episodes: Number of episodes
    """

    mean: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    limit: np.ndarray
    confidence: float
    n_episodes: int

    @property
    def each(self) -> list[str]:
        """One of "within the limit", "over the limit" and "undecided" for each constraint."""
        return [
            WITHIN if upper <= limit else OVER if lower > limit else UNDECIDED
            for lower, upper, limit in zip(self.lower, self.upper, self.limit, strict=True)
        ]

    @property
    def outcome(self) -> str:
        """ "over the limit" if one constraint is, "within the limit" if all are, else "undecided"."""
        each = self.each
        return OVER if OVER in each else UNDECIDED if UNDECIDED in each else WITHIN

    @property
    def episodes_needed(self) -> int | None:
        """
        About how many more episodes an undecided verdict needs if mean and spread stay as they are.

        0 if nothing is undecided, None if no number would do because a mean lies on its limit.
        """
        factor = 1.0
        for outcome, mean, lower, upper, limit in zip(self.each, self.mean, self.lower, self.upper, self.limit, strict=True):
            if outcome != UNDECIDED:
                continue
            if mean == limit:
                return None
            # The width of an interval falls with the root of the number of episodes
            width = upper - mean if mean < limit else mean - lower
            factor = max(factor, (width / abs(limit - mean)) ** 2)
        return int(np.ceil(self.n_episodes * (factor - 1.0)))

    def __str__(self) -> str:
        parts = []
        for outcome, mean, lower, upper, limit in zip(self.each, self.mean, self.lower, self.upper, self.limit, strict=True):
            parts.append(f"{outcome} (mean {mean:.2f}, {self.confidence:.0%}: {lower:.2f} to {upper:.2f}, limit {limit:g})")
        text = "; ".join(parts)
        if self.outcome != UNDECIDED:
            return text
        needed = self.episodes_needed
        return f"{text}: " + ("no number of episodes will tell" if needed is None else f"about {needed} more episodes needed")


def constraint_verdict(costs: Any, limit: Any, confidence: float = 0.95) -> ConstraintVerdict:
    """
    Judge the costs of episodes.

    The interval of the expected cost is a studentised bootstrap, which keeps its confidence for skewed distributions and for
    many zeros. Below 10 episodes, or where too few of them differ, the bounds are Chernoff's for costs between 0 and twice the
    limit (twice the worst cost seen, if that is more): for n episodes without any cost, the upper bound is twice the limit
    times :math:`1 - \\alpha^{1/n}` with :math:`\\alpha = (1 - confidence) / 2`.

    No method can see what no episode has shown: a cost that one in ten episodes has is missing in 20 episodes with a
    probability of 12 percent. A verdict of several constraints holds for each with this confidence, not for all at once.

    :param costs: Cost of each episode in the unit of the limit, shape (n_episodes,) or (n_episodes, n_constraints)
    :param limit: The limit, one number or one per constraint
    :param confidence: Probability with which the interval holds the expected cost, the rest half on each side
    :return: The verdict
    :raises ValueError: If there are no costs, one is not finite, or the shapes or the confidence make no sense.
    """
    values = np.asarray(costs, dtype=np.float64)
    values = values[:, np.newaxis] if values.ndim == 1 else values
    limits = np.atleast_1d(np.asarray(limit, dtype=np.float64))
    if values.ndim != 2 or values.size == 0 or limits.shape not in ((1,), values.shape[1:]):
        raise ValueError(
            "Costs must have shape (n_episodes,) or (n_episodes, n_constraints) and fit the limits, "
            f"got {np.shape(costs)} and {np.shape(limit)}."
        )
    if not np.isfinite(values).all() or not np.isfinite(limits).all():
        raise ValueError("Costs and limits must be finite.")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"The confidence must be between 0 and 1, got {confidence}.")
    limits = np.broadcast_to(limits, values.shape[1:])
    bounds = [mean_interval(column, level, (1.0 - confidence) / 2.0) for column, level in zip(values.T, limits, strict=True)]
    lower, upper = np.array(bounds).T
    return ConstraintVerdict(values.mean(axis=0), lower, upper, limits, confidence, len(values))


def mean_interval(values: np.ndarray, scale: float, alpha: float) -> tuple[float, float]:
    """
    :param values: Shape (n,)
    :param scale: Twice this value is taken to be possible although it was not seen
    :param alpha: Probability of an error on either side
    :return: Lower and upper bound of the expected value
    """
    mean, least, worst = values.mean(), min(0.0, values.min()), values.max()
    lower, upper = -np.inf, np.inf
    if len(values) >= MIN_BOOTSTRAP_EPISODES and values.min() < worst:
        low, high = studentized_quantiles(values, alpha)
        lower, upper = mean - high * values.std(), mean - low * values.std()
    if not np.isfinite(upper):
        upper = least + chernoff_bound(mean - least, 2.0 * max(scale, worst) - least, len(values), alpha)
    if not np.isfinite(lower):
        # Costs that were not seen can only raise the expected value
        lower = worst - chernoff_bound(worst - mean, worst - least, len(values), alpha)
    return float(max(lower, least)), float(upper)


def studentized_quantiles(values: np.ndarray, alpha: float) -> tuple[float, float]:
    """
    :param values: Shape (n,)
    :param alpha: Probability of an error on either side
    :return: Quantiles of (mean* - mean) / std* over bootstrap samples, infinite where samples of equal values decide
    """
    # Always the same numbers: the same episodes get the same verdict
    rng = np.random.default_rng(0)
    statistics = []
    rows = max(1, BLOCK // len(values))
    for start in range(0, N_RESAMPLES, rows):
        n_samples = min(rows, N_RESAMPLES - start)
        samples = values[rng.integers(len(values), size=(n_samples, len(values)))]
        difference, std = samples.mean(axis=1) - values.mean(), samples.std(axis=1)
        # Equal values may have a standard deviation of rounding errors
        statistics.append(
            np.where(std > 1e-9 * values.std(), difference / np.maximum(std, 1e-300), np.copysign(np.inf, difference))
        )
    low, high = np.quantile(np.concatenate(statistics), [alpha, 1.0 - alpha], method="inverted_cdf")
    return float(low), float(high)


def chernoff_bound(mean: float, scale: float, n: int, alpha: float) -> float:
    """
    :param mean: Mean of n values between 0 and ``scale``
    :param scale: The largest that is possible
    :param n: Number of values
    :param alpha: Probability of an error
    :return: Upper bound of their expected value: where n times the relative entropy of the two reaches log(1 / alpha)
    """
    if mean >= scale:
        return mean
    p, low, high = mean / scale, mean / scale, 1.0
    for _ in range(60):
        q = (low + high) / 2.0
        entropy = (1.0 - p) * np.log((1.0 - p) / (1.0 - q)) + (p * np.log(p / q) if p > 0.0 else 0.0)
        low, high = (q, high) if n * entropy < -np.log(alpha) else (low, q)
    return scale * high
