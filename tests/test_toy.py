"""ALGD learns the tiny task: close to the constrained optimum, within the limit, and at both modes."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from benchmarks import toy
from sb3_algd.envs.toy import EPISODE_LENGTH, TwoModesEnv


def play(push: np.ndarray, cost_limit: float = 64.0) -> tuple[float, float]:
    """Return and cost of an episode with these pushes and perfect tracking."""
    env: Any = gym.wrappers.TimeLimit(TwoModesEnv(cost_limit), EPISODE_LENGTH)
    obs, _ = env.reset(seed=0)
    total_reward, total_cost = 0.0, 0.0
    for step in range(EPISODE_LENGTH):
        obs, reward, _, truncated, info = env.step(np.array([push[step], obs[0]]))
        total_reward, total_cost = total_reward + reward, total_cost + info["cost"]
    assert truncated
    return total_reward, total_cost


def test_the_optimum_in_closed_form() -> None:
    env = TwoModesEnv()
    for side in (-1.0, 1.0):
        assert play(np.full(EPISODE_LENGTH, side * env.optimal_push)) == pytest.approx((env.optimal_return, env.cost_limit))
    # The constraint binds, and pushes of other sizes that cost the same bring less
    value, cost = play(np.ones(EPISODE_LENGTH))
    assert value > env.optimal_return and cost > env.cost_limit
    rng = np.random.default_rng(0)
    for _ in range(20):
        push = rng.uniform(-1.0, 1.0, EPISODE_LENGTH)
        value, cost = play(push)
        assert value < TwoModesEnv(cost).optimal_return


def test_mode_shares() -> None:
    targets = np.zeros((4, 1))
    actions = np.array([[-0.8, 0.0], [0.8, 0.2], [0.7, -0.1], [0.8, 0.3]])
    assert TwoModesEnv().mode_shares(targets, actions) == (0.25, 0.5)


@pytest.mark.parametrize(("algorithm", "steps"), [("algd-ve", 2500), ("algd-ddpm", 2000)])
def test_learning(algorithm: str, steps: int, tmp_path: Path) -> None:
    arguments = ["--algorithms", algorithm, "--seeds", "0", "--out", str(tmp_path)]
    toy.main([*arguments, "--steps", str(steps), "--eval-every", str(steps), "--episodes", "10"])
    folder = tmp_path / toy.TASK / algorithm
    curve, modes = toy.read_curve(folder / "seed0.csv"), toy.read_curve(folder / "modes_seed0.csv")
    # Less strict than the full proof, which trains for longer
    assert curve["return_mean"][-1] > 0.75 * TwoModesEnv().optimal_return
    assert curve["cost_mean"][-1] < 1.05 * TwoModesEnv().cost_limit
    assert min(modes["left"][-1], modes["right"][-1]) > 0.15
