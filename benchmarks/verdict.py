"""
How often a verdict's interval holds the expected cost, for costs of known distributions.

    python -m benchmarks.verdict

Prints a Markdown table, in percent: how often the interval holds the expected cost; in brackets how often it has no upper
bound, and how often the verdict is "within the limit" where the limit is 10 % below the expected cost.
"""

from collections.abc import Callable

import numpy as np

from sb3_algd import constraint_verdict
from sb3_algd.common import verdict

#: Bootstrap samples of one verdict, fewer than by default because there are 28,000 verdicts
N_RESAMPLES = 2000
N_SAMPLES = 1000
N_EPISODES = (10, 20, 50, 100)

Draw = Callable[[np.random.Generator, int], np.ndarray]


def with_zeros(share: float, mean: float) -> Draw:
    """:param share: Share of episodes without cost. :param mean: Mean cost of the others. :return: Draws costs of episodes."""
    return lambda rng, n: rng.exponential(mean, n) * (rng.random(n) >= share)


#: Name: how costs are drawn, and their expected value
DISTRIBUTIONS: dict[str, tuple[Draw, float]] = {
    "normal, mean 20, standard deviation 5": (lambda rng, n: rng.normal(20.0, 5.0, n), 20.0),
    "exponential": (with_zeros(0.0, 20.0), 20.0),
    "0 in 50 %, else exponential": (with_zeros(0.5, 40.0), 20.0),
    "0 in 70 %": (with_zeros(0.7, 60.0), 18.0),
    "0 in 90 %": (with_zeros(0.9, 60.0), 6.0),
    "0 in 98 %": (with_zeros(0.98, 60.0), 1.2),
    "lognormal, sigma 1": (lambda rng, n: rng.lognormal(0.0, 1.0, n), float(np.exp(0.5))),
}


def cell(draw: Draw, expected: float, n_episodes: int) -> str:
    """:param draw: Draws costs. :param expected: Their mean. :param n_episodes: How many. :return: A cell of the table."""
    rng = np.random.default_rng(3)
    held = unbounded = wrong = 0
    for _ in range(N_SAMPLES):
        outcome = constraint_verdict(draw(rng, n_episodes), limit=0.9 * expected)
        held += bool(outcome.lower[0] <= expected <= outcome.upper[0])
        unbounded += bool(np.isinf(outcome.upper[0]))
        wrong += outcome.outcome == "within the limit"
    held_share, unbounded_share, wrong_share = (100.0 * count / N_SAMPLES for count in (held, unbounded, wrong))
    return f"{held_share:.1f} ({unbounded_share:.0f}, {wrong_share:.1f})"


def main() -> None:
    """Print the table."""
    verdict.N_RESAMPLES = N_RESAMPLES
    print(f"| cost of an episode | {' | '.join(f'{n} episodes' for n in N_EPISODES)} |")
    print("|" + " --- |" * (len(N_EPISODES) + 1))
    for name, (draw, expected) in DISTRIBUTIONS.items():
        print(f"| {name} | {' | '.join(cell(draw, expected, n) for n in N_EPISODES)} |", flush=True)


if __name__ == "__main__":
    main()
