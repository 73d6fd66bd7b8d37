"""What several test files need: environments with known costs, small models, and the algorithms that tests run through."""

import os
import sys
from typing import Any, TypeVar
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.vec_env import VecEnv

from sb3_algd import ALGD, SACLag, cli
from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm

Algorithm = type[ConstrainedOffPolicyAlgorithm]
Model = TypeVar("Model", bound=ConstrainedOffPolicyAlgorithm)

#: ``policy_kwargs`` of networks that train fast
SMALL: dict[str, Any] = dict(net_arch=[16, 16])
#: The paper's energy and updates: raw units, a penalty per action, from the start, everything in every update
PAPER: dict[str, Any] = dict(
    penalty="pointwise", rho=1.0, normalize=False, constraint_start=0.0, cost_target_risk_coef=0.0, policy_delay=1
)


@pytest.fixture(scope="session", autouse=True)
def logs_of_sb3(tmp_path_factory: pytest.TempPathFactory) -> None:
    """SB3 makes a log folder for every ``learn()``: in pytest's folder, which pytest removes."""
    os.environ["SB3_LOGDIR"] = str(tmp_path_factory.mktemp("logs_of_sb3"))


@pytest.fixture(params=[ALGD, SACLag])
def algorithm(request: pytest.FixtureRequest) -> Algorithm:
    """Each algorithm in turn."""
    return request.param


# --- environments ----------------------------------------------------------------------------------------------------


class CostlyEnv(gym.Env):
    """Random observations; the reward is the sum of the actions, the costs are fixed functions of the observation."""

    observation_space: spaces.Space = spaces.Box(-1.0, 1.0, shape=(3,), dtype=np.float32)
    action_space: spaces.Space = spaces.Box(-2.0, 2.0, shape=(2,), dtype=np.float32)

    def __init__(self, n_costs: int = 1) -> None:
        self.n_costs = n_costs

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        return self.state, {}

    def step(self, action: np.ndarray) -> Any:
        cost = self.state[: self.n_costs] ** 2 if self.n_costs > 1 else float(self.state[0] ** 2)
        self.state = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        return self.state, float(np.sum(action)), False, False, {"cost": cost}


class AnySpaceEnv(CostlyEnv):
    """Random observations of a space."""

    action_space = spaces.Box(np.array([[-2.0], [0.0]], dtype=np.float32), np.array([[2.0], [30.0]], dtype=np.float32))

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__()
        self.observation_space = observation_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> Any:
        _, reward, _, _, info = super().step(action)
        return self.observation_space.sample(), reward, False, False, info


class BrokenEnv(CostlyEnv):
    """
    Goes wrong at its 30th step.

    :param what: ``"six"`` (values are returned), or what is not finite: ``"reward"``, ``"cost"`` or ``"observation"``
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.steps = 0

    def step(self, action: np.ndarray) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        self.steps += 1
        if self.steps >= 30:
            if self.what == "six":
                return obs, reward, 1.0, terminated, truncated, info
            if self.what == "reward":
                reward = float("nan")
            if self.what == "cost":
                info["cost"] = float("inf")
            if self.what == "observation":
                obs = np.full_like(obs, np.nan)
        return obs, reward, terminated, truncated, info


class CostlyBitFlipping(BitFlippingEnv):
    """A goal task whose cost tells the observation."""

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = super().step(action)
        assert isinstance(observation, dict)
        info["cost"] = float(observation["achieved_goal"].sum())
        return observation, reward, terminated, truncated, info


def run_cli(*options: object) -> None:
    """Run a command in this process, with the command line that a user gives."""
    with patch.object(sys, "argv", ["sb3-algd", *map(str, options)]):
        cli.main()


def make_env(n_costs: int = 1, steps: int = 20) -> gym.Env:
    return gym.wrappers.TimeLimit(CostlyEnv(n_costs), steps)


def make_one_env() -> VecEnv:
    return make_vec_env(make_env, n_envs=1)


# --- models ----------------------------------------------------------------------------------------------------------


def make_model_of(algorithm: type[Model], env: Any = None, **kwargs: Any) -> Model:
    defaults: dict[str, Any] = dict(
        policy="MlpPolicy",
        policy_kwargs=SMALL,
        learning_starts=20,
        batch_size=16,
        buffer_size=500,
        seed=0,
        cost_limit=5.0,
        device="cpu",
    )
    constructor: Any = algorithm
    return constructor(env=make_env() if env is None else env, **{**defaults, **kwargs})


def make_model(env: Any = None, **kwargs: Any) -> ALGD:
    return make_model_of(ALGD, env, **kwargs)


def weights(model: ConstrainedOffPolicyAlgorithm) -> dict[str, th.Tensor]:
    state = {**model.policy.state_dict(), **model.lagrange_multiplier.state_dict(), **model.units.state_dict()}
    return {key: value.clone() for key, value in state.items()}


def same(a: dict[str, th.Tensor], b: dict[str, th.Tensor]) -> bool:
    return a.keys() == b.keys() and all(th.equal(a[key], b[key]) for key in a)


def learned(model: Model, steps: int) -> Model:
    """Train, and see that every network did learn."""
    before = weights(model)
    model.learn(steps)
    after = weights(model)
    for network in ("actor", "critic", "cost_critic"):
        assert any(not th.equal(before[key], after[key]) for key in after if key.startswith(network)), network
    assert all(th.isfinite(value).all() for value in after.values())
    return model
