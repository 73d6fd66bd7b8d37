"""
Whether exported policies act as their models do, and how fast.

    python -m benchmarks.deployment

Prints a Markdown table: the largest difference between ``Agent.act`` and ``predict`` with the same noise, for each kind of
policy, and the time of one action in both, measured in turns in this process.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_algd import ALGD, SACLag
from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm
from sb3_algd.export import export_onnx
from sb3_algd_runtime import Agent

#: Name: algorithm and ``policy_kwargs``
KINDS: dict[str, tuple[type[ConstrainedOffPolicyAlgorithm], dict[str, Any]]] = {
    "ALGD (VE)": (ALGD, {}),
    "ALGD (DDPM)": (ALGD, {"diffusion": "ddpm"}),
    "SACLag": (SACLag, {}),
}
#: Name: policy, space and the keys that VecNormalize may normalise, None for no VecNormalize
OBSERVATIONS: dict[str, tuple[str, spaces.Space, list[str] | None]] = {
    "flat": ("MlpPolicy", spaces.Box(-5.0, 50.0, (60,), np.float32), []),
    "Dict": (
        "MultiInputPolicy",
        spaces.Dict(position=spaces.Box(-9.0, 9.0, (2, 2), np.float64), lap=spaces.Discrete(4), flags=spaces.MultiBinary(3)),
        ["position"],
    ),
    "image": ("CnnPolicy", spaces.Box(0, 255, (64, 64, 3), np.uint8), None),
}
ROUNDS, CALLS = 100, 10


class RandomEnv(gym.Env):
    """
    Random observations, for policies that are only compared.

    :param observation_space: Their space
    """

    action_space: spaces.Space = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 30.0], np.float32))
    cost_limit = 5.0

    def __init__(self, observation_space: spaces.Space) -> None:
        self.observation_space = observation_space
        self.observation_space.seed(0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """:param seed: Seed of the generator. :param options: Not used. :return: An observation and an empty info."""
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """:param action: What was chosen. :return: An observation, the reward, no end, and the cost."""
        return self.observation_space.sample(), float(action[0]), False, False, {"cost": float(action[1] / 30.0)}


def make_random(space: spaces.Space) -> gym.Env:
    """:param space: Space of observations. :return: An environment of episodes of 50 steps."""
    return gym.wrappers.TimeLimit(RandomEnv(space), 50)


def sample(space: spaces.Space, n: int) -> Any:
    """:param space: A space. :param n: How many. :return: A batch of its samples."""
    samples = [space.sample() for _ in range(n)]
    return {key: np.stack([s[key] for s in samples]) for key in space} if isinstance(space, spaces.Dict) else np.stack(samples)


def difference(agent: Agent, model: ConstrainedOffPolicyAlgorithm, raw: Any, n: int) -> float:
    """
    :param agent: The exported policy
    :param model: Its model
    :param raw: Batch of raw observations
    :param n: Its size
    :return: Largest difference of stochastic and deterministic actions, as a share of half the action's range
    """
    normalizer = model.get_vec_normalize_env()
    seen = raw if normalizer is None else normalizer.normalize_obs(raw)
    rows, dim = model.policy.noise_shape
    half_range = (model.action_space.high - model.action_space.low) / 2.0
    worst = 0.0
    for deterministic in (False, True):
        th.manual_seed(1)
        # In the order in which predict() draws it
        noise = th.randn((rows, n, dim)).transpose(0, 1)[:, None].numpy()
        th.manual_seed(1)
        expected, _ = model.predict(seen, deterministic=deterministic)
        worst = max(worst, float(np.max(np.abs(agent.act(raw, deterministic, noise=noise) - expected) / half_range)))
    return worst


def microseconds(*works: Callable[[], Any]) -> list[float]:
    """:param works: What is timed, in turns. :return: Median time of one call each."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(ROUNDS):
        for work, taken in zip(works, times, strict=True):
            for _ in range(CALLS):
                # One by one, so that the median leaves out those in which another process had the core
                started = time.perf_counter()
                work()
                taken.append((time.perf_counter() - started) * 1e6)
    return [float(np.median(taken)) for taken in times]


def predict(model: ConstrainedOffPolicyAlgorithm, raw: Any, normalizer: VecNormalize | None) -> None:
    """:param model: A model that chooses an action. :param raw: A raw observation. :param normalizer: Its wrapper."""
    model.predict(raw if normalizer is None else normalizer.normalize_obs(raw), deterministic=False)


def print_row(*cells: object) -> None:
    """:param cells: Cells of a row of a table."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def compare_kinds(kinds: Sequence[str], folder: Path) -> None:
    """:param kinds: Which policies. :param folder: Where the exported files go."""
    print_row(
        "policy", "observations", "VecNormalize", "difference, 1", "difference, 64", "`act`, µs", "`predict`, µs", "ratio"
    )
    print_row(*["---"] * 8)
    for kind in kinds:
        algorithm, policy_kwargs = KINDS[kind]
        for name, (policy, space, keys) in OBSERVATIONS.items():
            for normalize in (False,) if keys is None else (False, True):
                env: VecEnv = DummyVecEnv([partial(make_random, space)])
                if normalize:
                    env = VecNormalize(env, norm_obs_keys=keys or None)
                arguments: dict[str, Any] = dict(
                    policy_kwargs=policy_kwargs, learning_starts=100, buffer_size=200, device="cpu"
                )
                model = algorithm(policy, env, seed=0, cost_limit=5.0, **arguments).learn(110)
                export_onnx(model, folder / "agent.onnx")
                agent = Agent.load(folder / "agent.onnx", seed=0)
                differences = [difference(agent, model, sample(space, n), n) for n in (1, 64)]
                raw = space.sample()
                act, slow = microseconds(partial(agent.act, raw), partial(predict, model, raw, model.get_vec_normalize_env()))
                cells = [f"{value:.1e}" for value in differences] + [f"{act:.0f}", f"{slow:.0f}", f"{slow / act:.1f}"]
                print_row(kind, name, "yes" if normalize else "no", *cells)


def main(arguments: Sequence[str] | None = None) -> None:
    """:param arguments: Those of the command line if None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="of these only the ones named")
    args = parser.parse_args(arguments)
    th.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        compare_kinds(args.kinds, Path(folder))


if __name__ == "__main__":
    main()
