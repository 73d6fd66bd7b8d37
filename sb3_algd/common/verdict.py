"""Whether a policy keeps its limit, as far as a number of episodes can tell."""

from dataclasses import dataclass
from typing import Any

import numpy as np

#: Bootstrap samples
N_RESAMPLES = 5000
#: Fewer episodes than this are too few for a bootstrap
MIN_BOOTSTRAP_EPISODES = 10
#: So many episodes must have another cost than the most frequent one: rarer costs may be missing in the sample altogether
MIN_DIFFERENT = 5
#: Numbers that are resampled at a time
BLOCK = 2_000_000
WITHIN, OVER, UNDECIDED = "within the limit", "over the limit", "undecided"


@dataclass(frozen=True)
class ConstraintVerdict:
    """
    Mean cost per episode with a confidence interval, beside the limit. All arrays have shape (n_constraints,).

    :param mean: Mean cost of the episodes
    :param std: Standard deviation of the episodes' costs
    :param lower: Lower bound of the expected cost
    :param upper: Upper bound of the expected cost, infinite where these episodes give none
    :param limit: The limit
    :param max_cost: The largest cost that an episode can have, infinite where that is not known
    :param confidence: Confidence of the interval
    :param n_episodes: Number of episodes
    :param n_different: Number of episodes that have another cost than the most frequent one
    """

    mean: np.ndarray
    std: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    limit: np.ndarray
    max_cost: np.ndarray
    confidence: float
    n_episodes: int
    n_different: np.ndarray

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

        0 if nothing is undecided, None if no number would do because a mean lies on its limit, or because all episodes cost
        the same and ``max_cost`` is not known.
        """
        needed = [self._needed(i) for i, outcome in enumerate(self.each) if outcome == UNDECIDED]
        if not needed:
            return 0
        return int(np.ceil(max(needed))) - self.n_episodes if max(needed) < np.inf else None

    def _needed(self, i: int) -> float:
        """:return: About how many episodes decide about a constraint."""
        mean, limit, n, n_different = self.mean[i], self.limit[i], self.n_episodes, self.n_different[i]
        if mean == limit:
            return np.inf
        if n >= MIN_BOOTSTRAP_EPISODES and n_different >= MIN_DIFFERENT:
            # The width of an interval falls with the root of the number of episodes
            width = self.upper[i] - mean if mean < limit else mean - self.lower[i]
            return float(n * (width / (limit - mean)) ** 2)
        for_bootstrap = max(MIN_BOOTSTRAP_EPISODES, (2.0 * self.std[i] / (limit - mean)) ** 2)
        if n >= MIN_BOOTSTRAP_EPISODES:
            for_bootstrap = max(for_bootstrap, n * MIN_DIFFERENT / n_different if n_different > 0 else np.inf)
        scale = self.max_cost[i] if mean < limit else mean
        if scale == np.inf:
            return float(max(for_bootstrap, n + 1))
        alpha = (1.0 - self.confidence) / 2.0
        p, q = (mean / scale, limit / scale) if mean < limit else (0.0, 1.0 - limit / scale)
        return float(max(min(for_bootstrap, -np.log(alpha) / relative_entropy(p, q)), n + 1))

    def interval(self, i: int) -> str:
        """:param i: Index of a constraint. :return: Its interval in words."""
        upper = f"{self.lower[i]:.2f} to {self.upper[i]:.2f}" if self.upper[i] < np.inf else f"at least {self.lower[i]:.2f}"
        return f"{self.confidence:.0%} confidence: {upper}"

    @property
    def advice(self) -> str:
        """What an undecided verdict needs, nothing if none is."""
        if self.outcome != UNDECIDED:
            return ""
        if self.episodes_needed is not None:
            return f"about {self.episodes_needed} more episodes needed"
        open_ended = [i for i, outcome in enumerate(self.each) if outcome == UNDECIDED and self.upper[i] == np.inf]
        if not any(self.mean[i] < self.limit[i] for i in open_ended):
            return "no number of episodes will tell"
        seen = "all episodes cost the same" if self.mean[open_ended].any() else "no episode has a cost"
        return f"{seen}, which says nothing of rare costs unless it is known what an episode can cost (max_cost)"

    def __str__(self) -> str:
        parts = [
            f"{outcome} (mean {self.mean[i]:.2f}, {self.interval(i)}, limit {self.limit[i]:g})"
            for i, outcome in enumerate(self.each)
        ]
        return "; ".join(parts) + (f": {self.advice}" if self.advice else "")


def constraint_verdict(costs: Any, limit: Any, confidence: float = 0.95, max_cost: Any = None) -> ConstraintVerdict:
    """
    Judge the costs of episodes.

    The interval of the expected cost is a studentised bootstrap, which keeps its confidence for skewed distributions and for
    many zeros, as long as at least 10 episodes were played and 5 of them have another cost than the most frequent one. Else
    the sample may lack what is rare and dear: then there is an upper bound only if ``max_cost`` is known, Chernoff's, which
    holds for every distribution of costs between 0 and ``max_cost``. For n episodes without any cost it is ``max_cost`` times
    :math:`1 - \\alpha^{1/n}` with :math:`\\alpha = (1 - confidence) / 2`. Without it the verdict cannot be "within the limit".
    What the interval cannot know of is an episode a hundred times as dear as the others that none of the sample happens to be:
    where there may be such ones, play many episodes.

    A verdict of several constraints holds for each with this confidence, not for all at once.

    :param costs: Cost of each episode in the unit of the limit, shape (n_episodes,) or (n_episodes, n_constraints)
    :param limit: The limit, one number or one per constraint
    :param confidence: Probability with which the interval holds the expected cost, the rest half on each side
    :param max_cost: The largest cost that an episode can have, one number or one per constraint: for instance the number of
        steps where a step costs at most 1. None if it is not known
    :return: The verdict
    :raises ValueError: If there are no costs, one is not finite or exceeds ``max_cost``, or shapes or confidence make no
        sense.
    """
    values = np.asarray(costs, dtype=np.float64)
    values = values[:, np.newaxis] if values.ndim == 1 else values
    limits = np.atleast_1d(np.asarray(limit, dtype=np.float64))
    largest = np.atleast_1d(np.asarray(np.inf if max_cost is None else max_cost, dtype=np.float64))
    shapes = ((1,), values.shape[1:])
    if values.ndim != 2 or values.size == 0 or limits.shape not in shapes or largest.shape not in shapes:
        raise ValueError(
            "Costs must have shape (n_episodes,) or (n_episodes, n_constraints) and fit the limits and max_cost, "
            f"got {np.shape(costs)}, {np.shape(limit)} and {np.shape(max_cost)}."
        )
    if not np.isfinite(values).all() or not np.isfinite(limits).all():
        raise ValueError("Costs and limits must be finite.")
    if not (values <= largest).all():
        raise ValueError(f"An episode costs {values.max():g}, more than max_cost = {max_cost} allows.")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"The confidence must be between 0 and 1, got {confidence}.")
    limits, largest = np.broadcast_to(limits, values.shape[1:]), np.broadcast_to(largest, values.shape[1:])
    alpha = (1.0 - confidence) / 2.0
    lower, upper = np.array([mean_interval(column, top, alpha) for column, top in zip(values.T, largest, strict=True)]).T
    n_different = np.array([count_different(column) for column in values.T])
    return ConstraintVerdict(
        values.mean(axis=0), values.std(axis=0), lower, upper, limits, largest, confidence, len(values), n_different
    )


def count_different(values: np.ndarray) -> int:
    """:param values: Shape (n,). :return: How many differ from the most frequent one."""
    return int(len(values) - np.unique(values, return_counts=True)[1].max())


def mean_interval(values: np.ndarray, max_cost: float, alpha: float) -> tuple[float, float]:
    """
    :param values: Shape (n,)
    :param max_cost: The largest that is possible, infinite if that is not known
    :param alpha: Probability of an error on either side
    :return: Lower and upper bound of the expected value
    """
    mean, least, worst = values.mean(), min(0.0, values.min()), values.max()
    lower, upper = -np.inf, np.inf
    if len(values) >= MIN_BOOTSTRAP_EPISODES and count_different(values) >= MIN_DIFFERENT:
        low, high = studentized_quantiles(values, alpha)
        lower, upper = mean - high * values.std(), mean - low * values.std()
    if not np.isfinite(upper) and np.isfinite(max_cost):
        upper = least + chernoff_bound(mean - least, max_cost - least, len(values), alpha)
    if not np.isfinite(lower):
        # Costs that were not seen can only raise the expected value
        lower = worst - chernoff_bound(worst - mean, worst - least, len(values), alpha)
    return float(max(lower, least)), float(min(upper, max_cost))


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
    low, high = mean / scale, 1.0
    for _ in range(60):
        q = (low + high) / 2.0
        low, high = (q, high) if n * relative_entropy(mean / scale, q) < -np.log(alpha) else (low, q)
    return scale * high


def relative_entropy(p: float, q: float) -> float:
    """:param p: A probability below 1. :param q: Another one. :return: Relative entropy of coins with these probabilities."""
    if q <= 0.0 or q >= 1.0:
        return 0.0 if p == q else np.inf
    return float((1.0 - p) * np.log((1.0 - p) / (1.0 - q)) + (p * np.log(p / q) if p > 0.0 else 0.0))
