"""Verdicts on the limit: their confidence holds, and they are undecided where episodes are too few."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sb3_algd import constraint_verdict
from sb3_algd.common import verdict as verdict_module
from sb3_algd.common.callbacks import CostEvalCallback
from tests.conftest import make_model, make_one_env

Draw = Callable[[np.random.Generator, int], np.ndarray]


def with_zeros(share: float, mean_of_others: float) -> Draw:
    return lambda rng, n: rng.exponential(mean_of_others, n) * (rng.random(n) >= share)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer bootstrap samples, for tests of many verdicts."""
    monkeypatch.setattr(verdict_module, "N_RESAMPLES", 1000)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "draw, expected, n_episodes",
    [
        (lambda rng, n: rng.normal(20.0, 5.0, n), 20.0, 20),
        (lambda rng, n: rng.exponential(20.0, n), 20.0, 20),
        (lambda rng, n: rng.gamma(0.5, 40.0, n), 20.0, 20),
        (with_zeros(0.5, 40.0), 20.0, 20),
        (with_zeros(0.7, 60.0), 18.0, 20),
        (with_zeros(0.9, 60.0), 6.0, 20),
        (with_zeros(0.9, 60.0), 6.0, 50),
        (with_zeros(0.95, 60.0), 3.0, 100),
        # Dear and so rare that most samples lack them
        (lambda rng, n: 1000.0 * (rng.random(n) < 0.02), 20.0, 20),
        (lambda rng, n: rng.exponential(20.0, n), 20.0, 10),
        (lambda rng, n: rng.poisson(1.0, n), 1.0, 20),
        (lambda rng, n: rng.exponential(20.0, n), 20.0, 5),
    ],
    ids=[
        "normal",
        "exponential",
        "gamma",
        "half zeros",
        "most zeros",
        "nine of ten zeros",
        "nine of ten zeros, more episodes",
        "nineteen of twenty zeros",
        "rare and dear",
        "ten episodes",
        "counts",
        "few episodes",
    ],
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


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("share, n_episodes", [(0.5, 20), (0.9, 20), (0.9, 50), (0.98, 20), (0.98, 50), (0.995, 100)])
def test_a_policy_over_its_limit_is_seldom_called_within(share: float, n_episodes: int) -> None:
    draw, rng, wrong = with_zeros(share, 60.0), np.random.default_rng(0), 0
    for _ in range(400):
        wrong += constraint_verdict(draw(rng, n_episodes), limit=0.9 * 60.0 * (1.0 - share)).outcome == "within the limit"
    # 2.5% are promised; with 400 runs the share has a standard deviation of 0.8 percent
    assert wrong / 400 <= 0.045


@pytest.mark.usefixtures("quick")
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("share, n_episodes", [(0.5, 20), (0.98, 5), (0.98, 20), (0.98, 50), (0.995, 100)])
def test_with_a_known_maximum_bounds_are_finite_and_hold(share: float, n_episodes: int) -> None:
    rng, missed, mean_upper = np.random.default_rng(0), 0, 0.0
    for _ in range(400):
        costs = rng.uniform(0.0, 100.0, n_episodes) * (rng.random(n_episodes) >= share)
        verdict = constraint_verdict(costs, 25.0, max_cost=100.0)
        missed += not verdict.lower[0] <= 50.0 * (1.0 - share) <= verdict.upper[0]
        mean_upper += verdict.upper[0] / 400
    assert missed / 400 <= 0.075
    assert mean_upper < 80.0


def test_the_usual_interval_would_not_hold_it() -> None:
    rng, draw, too_low = np.random.default_rng(0), with_zeros(0.7, 60.0), 0
    for _ in range(400):
        costs = draw(rng, 20)
        too_low += costs.mean() + 2.093 * costs.std(ddof=1) / np.sqrt(20) < 18.0
    # 2.5% are promised
    assert too_low / 400 > 0.1


@pytest.mark.parametrize(
    "costs, max_cost, outcome, advice",
    [
        ([0.0] * 20, 100.0, "within the limit", ""),
        ([0.0] * 20, 1000.0, "undecided", "about 126 more"),
        ([0.0] * 146, 1000.0, "within the limit", ""),
        ([0.0] * 145, 1000.0, "undecided", "about 1 more"),
        ([0.0] * 20, None, "undecided", "no episode has a cost, .*max_cost"),
        ([24.0] * 20, None, "undecided", "all episodes cost the same, .*max_cost"),
        ([0.0] * 18 + [1.0, 3.0], 100.0, "within the limit", ""),
        ([0.0] * 18 + [1.0, 3.0], None, "undecided", "about 30 more"),
        ([0.0] * 45 + [1.0, 3.0, 2.0, 5.0, 4.0], None, "within the limit", ""),
        ([40.0] * 20, None, "over the limit", ""),
        (np.linspace(28.0, 40.0, 30), None, "over the limit", ""),
        (np.linspace(10.0, 20.0, 30), None, "within the limit", ""),
        (np.linspace(10.0, 20.0, 30), 1000.0, "within the limit", ""),
        ([24.0, 26.0] * 10, None, "undecided", "no number of episodes will tell"),
        ([20.0, 22.0, 21.0], None, "undecided", "about 7 more"),
        ([0.0], None, "undecided", "about 9 more"),
        ([24.0], None, "undecided", "about 9 more"),
        ([40.0], None, "undecided", "more episodes needed"),
    ],
)
def test_outcomes(costs: Any, max_cost: float | None, outcome: str, advice: str) -> None:
    verdict = constraint_verdict(costs, 25.0, max_cost=max_cost)
    assert verdict.outcome == outcome and str(verdict).startswith(outcome)
    assert re.search(advice, verdict.advice) and (verdict.advice == "") == (advice == "")
    assert str(verdict).endswith(verdict.advice)
    assert verdict.lower <= verdict.mean <= verdict.upper
    assert (verdict.episodes_needed == 0) == (outcome != "undecided")


def test_intervals_in_words() -> None:
    assert constraint_verdict([0.0] * 20, 25.0, max_cost=100.0).interval(0) == "95% confidence: 0.00 to 16.84"
    assert constraint_verdict([40.0] * 20, 25.0, 0.9).interval(0) == "90% confidence: at least 34.44"


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


def test_a_cost_above_the_maximum_is_refused() -> None:
    with pytest.raises(ValueError, match="An episode costs 3, more than max_cost = 2 allows"):
        constraint_verdict([1.0, 3.0], 5.0, max_cost=2)
    with pytest.raises(ValueError, match="fit the limits and max_cost"):
        constraint_verdict([1.0, 3.0], 5.0, max_cost=[5.0, 5.0])
    costs = np.stack([np.zeros(30), np.zeros(30)], axis=1)
    assert constraint_verdict(costs, [5.0, 5.0], max_cost=[10.0, 1000.0]).each == ["within the limit", "undecided"]


@pytest.mark.parametrize("max_cost, feasible", [(None, False), (20.0, True), (1000.0, False)])
def test_a_model_without_any_cost_is_feasible_where_enough_episodes_say_so(max_cost: float | None, feasible: bool) -> None:
    callback = CostEvalCallback(
        make_one_env(), n_eval_episodes=20, eval_freq=30, verbose=0, warn=False, confidence=0.95, max_cost=max_cost
    )
    model = make_model(cost_limit=5.0, cost_key=lambda info: 0.0)
    model.learn(30, callback=callback)
    assert (callback.best_violation == 0.0) == feasible
    assert np.isfinite(callback.best_violation)


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
