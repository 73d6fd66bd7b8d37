"""Costs of steps and episodes."""

import numpy as np

from sb3_algd.common.episode_costs import EpisodeCostTracker, read_costs


def test_costs_are_read_from_another_key_or_by_a_function() -> None:
    infos = [{"c": 1.0, "speed": 3.0}, {"c": 2.0, "speed": 5.0}]
    assert read_costs(infos, "c", 1)[0].tolist() == [[1.0], [2.0]]
    assert read_costs(infos, lambda info: [info["c"], info["speed"] > 4], 2)[0].tolist() == [[1.0, 0.0], [2.0, 1.0]]
    costs, reported = read_costs([{}, {}], "cost", 2)
    assert costs.tolist() == [[0.0, 0.0], [0.0, 0.0]] and not reported
    costs, reported = read_costs([{}, {"cost": np.float64(3.0)}], "cost", 1)
    assert costs.tolist() == [[0.0], [3.0]] and reported


def test_tracker_sums_up_each_environments_episodes() -> None:
    tracker = EpisodeCostTracker(n_envs=2, n_constraints=2, cost_gamma=0.5, window=10)
    steps = np.array([[[1, 10], [2, 0]], [[1, 10], [4, 0]], [[1, 10], [8, 0]]], dtype=np.float64)
    dones = np.array([[False, False], [False, True], [True, False]])
    lengths = []
    for costs, done in zip(steps, dones, strict=True):
        tracker.update(costs, done)
        lengths.append(tracker.newest_lengths)
    assert lengths == [[], [2], [3]]
    # Environment 1 finished after two steps, environment 0 after three
    np.testing.assert_allclose(tracker.episode_costs, [[6, 0], [3, 30]])
    np.testing.assert_allclose(tracker.discounted_costs, [[2 + 0.5 * 4, 0], [1.75, 17.5]])
    np.testing.assert_allclose(tracker.cost_rate, [17 / 6, 30 / 6])
    # After a reset of the environments the unfinished episode of environment 1 is forgotten, finished ones are not
    tracker.start_episodes(2)
    tracker.update(np.ones((2, 2)), np.array([True, True]))
    np.testing.assert_allclose(tracker.episode_costs, [[6, 0], [3, 30], [1, 1], [1, 1]])
    assert tracker.newest_lengths == [1, 1]


def test_a_tracker_that_did_not_know_lengths_goes_on() -> None:
    tracker = EpisodeCostTracker(n_envs=2, n_constraints=1, cost_gamma=0.5)
    tracker.update(np.ones((2, 1)), np.array([False, False]))
    state = {name: value for name, value in vars(tracker).items() if name not in ("newest_lengths", "_steps")}
    again = EpisodeCostTracker.__new__(EpisodeCostTracker)
    again.__setstate__(state)
    again.update(np.ones((2, 1)), np.array([True, False]))
    # What is left of the episode counts
    assert again.newest_lengths == [1] and again.episode_costs[0].tolist() == [2.0]
