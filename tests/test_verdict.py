"""Verdicts on the limit: their confidence holds, and they are undecided where episodes are too few."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sb3_algd import constraint_verdict
from sb3_algd.common.callbacks import CostEvalCallback
from tests.conftest import make_model, make_one_env

Draw = Callable[[np.random.Generator, int], np.ndarray]


def with_zeros(share: float, mean_of_others: float) -> Draw:
    return lambda rng, n: rng.exponential(mean_of_others, n) * (rng.random(n) >= share)


@pytest.mark.parametrize(
    "draw, expected, n_episodes",
    [
        (lambda rng, n: rng.normal(20.0, 5.0, n), 20.0, 20),
        (lambda rng, n: rng.exponential(20.0, n), 20.0, 20),
        (lambda rng, n: rng.gamma(0.5, 40.0, n), 20.0, 20),
        (with_zeros(0.5, 40.0), 20.0, 20),
        (with_zeros(0.7, 60.0), 18.0, 20),
        # Rarer costs need more episodes
        (with_zeros(0.9, 60.0), 6.0, 50),
        (lambda rng, n: rng.poisson(1.0, n), 1.0, 20),
        (lambda rng, n: rng.exponential(20.0, n), 20.0, 5),
    ],
    ids=["normal", "exponential", "gamma", "half zeros", "most zeros", "nearly all zeros", "counts", "few episodes"],
)
def test_the_interval_holds_the_expected_cost_as_often_as_promised(draw: Draw, expected: float, n_episodes: int) -> None:
    rng, n_runs, too_low, too_high = np.random.default_rng(0), 400, 0, 0
    for _ in range(n_runs):
        verdict = constraint_verdict(draw(rng, n_episodes), limit=expected)
        too_low += verdict.upper[0] < expected
        too_high += verdict.lower[0] > expected
    # 95% are promised; with 400 runs the share has a standard deviation of 1.1 percent
    assert 1.0 - (too_low + too_high) / n_runs >= 0.925
    assert too_low / n_runs <= 0.06 and too_high / n_runs <= 0.06


def test_the_usual_interval_would_not_hold_it() -> None:
    rng, draw, too_low = np.random.default_rng(0), with_zeros(0.7, 60.0), 0
    for _ in range(400):
        costs = draw(rng, 20)
        too_low += costs.mean() + 2.093 * costs.std(ddof=1) / np.sqrt(20) < 18.0
    # 2.5% are promised
    assert too_low / 400 > 0.1


@pytest.mark.parametrize(
    "costs, outcome",
    [
        ([0.0] * 20, "within the limit"),
        ([0.0] * 18 + [1.0, 3.0], "within the limit"),
        ([40.0] * 20, "over the limit"),
        (np.linspace(28.0, 40.0, 30), "over the limit"),
        (np.linspace(10.0, 20.0, 30), "within the limit"),
        ([24.0, 26.0] * 10, "undecided"),
        ([0.0], "undecided"),
        ([24.0], "undecided"),
        ([40.0], "undecided"),
    ],
)
def test_outcomes(costs: Any, outcome: str) -> None:
    verdict = constraint_verdict(costs, 25.0)
    assert verdict.outcome == outcome and str(verdict).startswith(outcome)
    assert verdict.lower <= verdict.mean <= verdict.upper
    assert (verdict.episodes_needed == 0) == (outcome != "undecided")


def test_the_number_of_episodes_that_are_needed() -> None:
    costs = np.random.default_rng(0).exponential(20.0, 100)
    limit = costs.mean() + 2.0
    verdict = constraint_verdict(costs, limit)
    assert verdict.episodes_needed is not None and verdict.episodes_needed > 100
    assert f"about {verdict.episodes_needed} more episodes needed" in str(verdict)
    # With as many of the same kind it is decided, with a third it is not
    n_copies = int(np.ceil(1 + verdict.episodes_needed / 100))
    assert constraint_verdict(np.tile(costs, n_copies + 1), limit).outcome == "within the limit"
    assert constraint_verdict(np.tile(costs, max(1, n_copies // 3)), limit).outcome == "undecided"
    assert constraint_verdict([24.0, 26.0], 25.0).episodes_needed is None
    assert "no number of episodes will tell" in str(constraint_verdict([24.0, 26.0], 25.0))


def test_several_constraints() -> None:
    costs = np.stack([np.linspace(10.0, 20.0, 30), np.linspace(1.0, 3.0, 30)], axis=1)
    assert constraint_verdict(costs, [25.0, 5.0]).outcome == "within the limit"
    assert constraint_verdict(costs, [25.0, 1.0]).each == ["within the limit", "over the limit"]
    assert constraint_verdict(costs, [25.0, 1.0]).outcome == "over the limit"
    assert constraint_verdict(costs, [15.0, 5.0]).outcome == "undecided"


def test_the_same_episodes_get_the_same_verdict() -> None:
    costs = np.random.default_rng(0).exponential(20.0, 20)
    state: Any = np.random.get_state()
    assert str(constraint_verdict(costs, 25.0)) == str(constraint_verdict(costs, 25.0))
    after: Any = np.random.get_state()
    np.testing.assert_array_equal(after[1], state[1])


@pytest.mark.parametrize(
    "costs, limit, confidence, message",
    [
        ([], 1.0, 0.95, "must have shape"),
        (np.ones((3, 2)), [1.0, 1.0, 1.0], 0.95, "fit the limits"),
        ([1.0, np.nan], 1.0, 0.95, "must be finite"),
        ([1.0], np.inf, 0.95, "must be finite"),
        ([1.0], 1.0, 1.0, "between 0 and 1, got 1.0"),
    ],
)
def test_what_makes_no_sense_is_refused(costs: Any, limit: Any, confidence: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        constraint_verdict(costs, limit, confidence)


@pytest.mark.parametrize("confidence, n_episodes, feasible", [(None, 3, True), (0.95, 3, False), (0.95, 20, True)])
def test_a_model_is_feasible_if_the_upper_bound_is(confidence: float | None, n_episodes: int, feasible: bool) -> None:
    # An episode costs about 6.7, whatever the policy does
    callback = CostEvalCallback(
        make_one_env(), n_eval_episodes=n_episodes, eval_freq=30, verbose=0, warn=False, confidence=confidence
    )
    model = make_model(cost_limit=12.0)
    model.learn(30, callback=callback)
    assert (callback.best_violation == 0.0) == feasible
    with pytest.raises(ValueError, match="confidence must be between 0 and 1"):
        CostEvalCallback(make_one_env(), confidence=95.0)
