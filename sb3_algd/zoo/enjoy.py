"""
The Zoo's ``enjoy``: watch a trained agent, and see what it earns and what it costs.

    python -m sb3_algd.zoo enjoy --env Safexp-PointButton1-v0
    python -m sb3_algd.zoo enjoy --onnx agent.onnx
"""

import contextlib
import os
import sys
from typing import Any
from unittest.mock import patch

import numpy as np
import rl_zoo3.enjoy
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm
from sb3_algd.common.episode_costs import EpisodeCostTracker, read_costs
from sb3_algd.common.evaluation import cost_discount
from sb3_algd.common.verdict import constraint_verdict
from sb3_algd.export.description import ExportedConstraint
from sb3_algd.zoo import ALGO
from sb3_algd.zoo.commandline import (
    agent_played,
    default_option,
    default_to_stochastic,
    default_to_trained_agents,
    refuse_options,
    shipped_policy,
)
from sb3_algd.zoo.exported import name_task, played_instead, take_own_options


class EpisodeCounter(VecEnvWrapper):
    """
    Counts return and cost of each episode that ends.

    :param venv: The environments
    """

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        #: Whose limit counts, to be set before the first step; without it nothing is counted
        self.model: ConstrainedOffPolicyAlgorithm | ExportedConstraint | None = None
        self.returns: list[float] = []
        self._tracker: EpisodeCostTracker | None = None

    def reset(self) -> VecEnvObs:
        """:return: First observations"""
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        """:return: What the environments return"""
        observations, rewards, dones, infos = self.venv.step_wait()
        if self.model is None:
            return observations, rewards, dones, infos
        if self._tracker is None:
            self._tracker = EpisodeCostTracker(self.num_envs, self.model.n_constraints, cost_discount(self.model))
        costs, _ = read_costs(infos, self.model.cost_key, self.model.n_constraints)
        self._tracker.update(costs, dones)
        # By a Monitor, so of the rewards before any normalisation
        self.returns += [info["episode"]["r"] for info in infos if "episode" in info]
        self._print_costs(int(np.sum(dones)))
        return observations, rewards, dones, infos

    def _print_costs(self, n_ended: int) -> None:
        assert self.model is not None
        assert self._tracker is not None
        limits = ", ".join(f"{limit:g}" for limit in self.model.cost_limit)
        unit = " (discounted)" if self.model.cost_limit_discounted else ""
        for costs in list(self._tracker.discounted_costs)[len(self._tracker.discounted_costs) - n_ended :]:
            print(f"Episode Cost{unit}: {', '.join(f'{cost:.2f}' for cost in costs)} (limit {limits})")

    def report(self, max_cost: float | None = None) -> str:
        """
        :param max_cost: The largest cost that an episode can have
        :return: Return and cost, and whether the limit holds
        """
        if self.model is None or self._tracker is None or len(self.returns) == 0:
            return "No episode ended: give more steps with -n to see return and cost of an episode."
        costs = np.stack(self._tracker.discounted_costs)
        limits = np.asarray(self.model.cost_limit)
        lines = [
            f"{len(costs)} episodes",
            f"Return: {np.mean(self.returns):.2f} +/- {np.std(self.returns):.2f}",
        ]
        unit = " (discounted)" if self.model.cost_limit_discounted else ""
        try:
            verdict = constraint_verdict(costs, limits, max_cost=max_cost)
        except ValueError as error:
            raise SystemExit(f"--max-cost {max_cost:g}: {error}") from error
        for i, (limit, outcome) in enumerate(zip(limits, verdict.each, strict=True)):
            mean, std = costs[:, i].mean(), costs[:, i].std()
            name = f"Cost{unit}" if len(limits) == 1 else f"Cost {i}{unit}"
            n_within = int(np.sum(costs[:, i] <= limit))
            lines.append(
                f"{name}: {mean:.2f} +/- {std:.2f} ({verdict.interval(i)}), limit {limit:g}: {outcome} "
                f"({n_within} of {len(costs)} episodes within)"
            )
        if verdict.advice:
            lines.append(f"For a verdict: {verdict.advice}.")
        return "\n".join(lines)


def enjoy() -> None:
    """Run the Zoo's command with our default algorithm, agents and actions, and report costs."""
    counters: list[EpisodeCounter] = []
    create_test_env = rl_zoo3.enjoy.create_test_env

    def create_counted_env(*args: Any, **kwargs: Any) -> VecEnv:
        counters.append(EpisodeCounter(create_test_env(*args, **kwargs)))
        return counters[-1]

    def tell_counter(model: ConstrainedOffPolicyAlgorithm) -> None:
        counters[-1].model = model

    options = take_own_options()
    default_option("--algo", ALGO)
    path: str | None = options.onnx or shipped_policy()
    if path is None:
        default_to_trained_agents()
    elif options.onnx:
        name_task(path)
    refuse_options()
    default_to_stochastic()
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        print("There is no display here, so nothing is drawn (--no-render). record_video leaves a video instead.")
        sys.argv.append("--no-render")
    with (
        patch.object(rl_zoo3.enjoy, "create_test_env", create_counted_env),
        agent_played(tell_counter, begun=lambda: counters, policies=True),
        contextlib.nullcontext() if path is None else played_instead(path, counters),
    ):
        rl_zoo3.enjoy.enjoy()
    # Other algorithms have no limit
    if counters[-1].model is not None:
        print(counters[-1].report(options.max_cost))


if __name__ == "__main__":
    enjoy()
