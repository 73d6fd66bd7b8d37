"""
Ask the cost critics of trained models what the policy is going to pay, and let it play to see what it pays.

    python -m benchmarks.calibration --tasks Safexp-PointButton2-v0 --algorithms algd-ve sac-lagrangian

For each run that has left its model (``python -m benchmarks.run --save``) a line in ``calibration.csv``, beside the learning
curves: means over the steps of 20 stochastic episodes of what the cost critics expect of the action that was taken, of the
risk that the energy has instead (the standard deviation of the critics added), and of the discounted cost from there to the
end of the episode, with the standard error of the last over the episodes; and the budget. A run that has a line is not played
again.

The last ``2 / (1 - cost_gamma)`` steps or so before the time limit are left out, because their costs go on after it: what was
paid is too low by what comes so late that it is discounted to 14 % or less. The models are those of ``benchmarks.run``, which
have no ``VecNormalize``; to measure a run that was repeated, delete its line.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
import yaml

from benchmarks.settings import ALGORITHMS, RESULTS
from sb3_algd import evaluate_policy
from sb3_algd.common.calibration import paid_costs
from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm
from sb3_algd.common.constraint import declared_by_env
from sb3_algd.common.episode_costs import read_costs
from sb3_algd.common.lagrange import estimate_risk
from sb3_algd.common.random_state import preserved_random_state
from sb3_algd.common.recorder import evaluation_seed, make_envs

FILE = "calibration.csv"
COLUMNS = ("seed", "step", "budget", "expected", "risk", "paid", "paid_error", "n_steps")
N_EPISODES = 20


class Episodes:
    """
    Callback of ``evaluate_policy`` that keeps what the critics expect and what is paid.

    :param model: The model that plays, with one constraint.
    :param n_counted: How many steps of each episode count, from its start; all if None.
    """

    def __init__(self, model: ConstrainedOffPolicyAlgorithm, n_counted: int | None) -> None:
        self.model = model
        self.n_counted = n_counted
        #: For each episode and step that counts: expectation of the critics, risk, discounted cost from there on
        self.episodes: list[np.ndarray] = []
        self._running: dict[int, list[tuple[float, float, float]]] = {}
        self._asked: object = None

    def __call__(self, locals_: dict[str, Any], globals_: dict[str, Any]) -> None:
        """Count one step of one environment, see SB3's ``evaluate_policy`` for the arguments."""
        index, info = locals_["i"], locals_["info"]
        # Once per step of all environments, whichever of them still plays
        if locals_["observations"] is not self._asked:
            self._asked = locals_["observations"]
            self._ask(locals_["observations"], locals_["actions"])
        cost = float(read_costs([info], self.model.cost_key, 1)[0].item())
        episode = self._running.setdefault(index, [])
        episode.append((float(self._expected[index]), float(self._risk[index]), cost))
        if locals_["done"]:
            # Whether it went on for long or not: to choose by the end of an episode is to choose by its costs
            self.episodes.append(discounted(np.array(self._running.pop(index)), self.model.cost_gamma)[: self.n_counted])

    def _ask(self, observations: np.ndarray, actions: np.ndarray) -> None:
        # In evaluation mode, as predict() has left it
        policy = self.model.policy
        with th.no_grad():
            scaled = th.as_tensor(policy.scale_action(actions), dtype=th.float32)
            costs = self.model.cost_critic(policy.obs_to_tensor(observations)[0], scaled) * self.model.units.returns[1:]
        self._expected = costs.mean(dim=0).squeeze(-1)
        self._risk = estimate_risk(costs, self.model.cost_risk_coef).squeeze(-1)


def discounted(episode: np.ndarray, cost_gamma: float) -> np.ndarray:
    """
    :param episode: Expectation, risk and cost of each step, shape (steps, 3).
    :param cost_gamma: The discount factor.
    :return: The same with the discounted cost from there on instead of the cost.
    """
    steps = episode.copy()
    steps[:, 2:] = paid_costs(steps[:, 2:], np.zeros(len(steps)), cost_gamma)
    return steps


def error_of_mean(values: list[np.ndarray]) -> float:
    """
    :param values: Values of the steps of each episode.
    :return: Standard error, over the episodes, of the mean over all steps; not a number for one episode.
    """
    n = len(values)
    if n == 1:
        return float("nan")
    everything = np.concatenate(values)
    deviations = np.array([np.sum(episode - everything.mean()) for episode in values])
    return float(np.sqrt(n / (n - 1) * np.sum(deviations**2)) / len(everything))


def measure(path: Path, task: str, algorithm: str, seed: int, n_episodes: int) -> dict[str, float]:
    """
    :param path: A saved model.
    :param task: Its task.
    :param algorithm: Its algorithm, a key of ``benchmarks.settings.ALGORITHMS``.
    :param seed: The seed of its run.
    :param n_episodes: How many episodes are played.
    :return: The line of this model.
    """
    model_class = ALGORITHMS[algorithm][0]
    if not issubclass(model_class, ConstrainedOffPolicyAlgorithm):
        sys.exit(f"{path}: {algorithm} has no cost critic that could be asked.")
    model = model_class.load(path, device="cpu")
    if model.n_constraints != 1 or model.cost_gamma == 1.0:
        sys.exit(f"{path}: only models with one constraint and a discounted cost can be asked.")
    env = make_envs(task, n_episodes)
    limit = declared_by_env(env, "_max_episode_steps")
    n_counted = None if limit is None else limit + 1 - round(2.0 / (1.0 - model.cost_gamma))
    if n_counted is not None and n_counted <= 0:
        sys.exit(f"{task}: its episodes are shorter than 2 / (1 - cost_gamma) steps, so that no step can be counted.")
    played = Episodes(model, n_counted)
    with preserved_random_state(model.device):
        th.manual_seed(evaluation_seed(seed))
        env.seed(evaluation_seed(seed))
        evaluate_policy(model, env, n_episodes, deterministic=False, callback=played)
    env.close()
    steps = np.concatenate(played.episodes)
    error = error_of_mean([episode[:, 2] for episode in played.episodes])
    values = (seed, model.num_timesteps, model.cost_budget[0], *steps.mean(axis=0), error, len(steps))
    return dict(zip(COLUMNS, map(float, values), strict=True))


def algorithm_of(folder: Path) -> str:
    """:param folder: A results folder. :return: Key of ``benchmarks.settings.ALGORITHMS`` of what was run there."""
    return str(yaml.safe_load((folder / "settings.yaml").read_text())["algorithm"])


def write_lines(path: Path, lines: list[dict[str, float]]) -> None:
    """:param path: A ``calibration.csv``. :param lines: All of its lines."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" for name, value in line.items()} for line in lines)


def read_lines(path: Path) -> list[dict[str, float]]:
    """:param path: A ``calibration.csv``. :return: Its lines, none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in line.items()} for line in csv.DictReader(file)]


def main(arguments: list[str] | None = None) -> None:
    """:param arguments: Those of the command line if None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", required=True, help="Gymnasium ids")
    parser.add_argument("--algorithms", nargs="+", default=["algd-ve"], help="algorithms or experiments with a cost critic")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the models are")
    args = parser.parse_args(arguments)
    th.set_num_threads(1)
    without: list[str] = []
    for task in args.tasks:
        for name in args.algorithms:
            folder = args.results / task / name
            lines = {int(line["seed"]): line for line in read_lines(folder / FILE)}
            paths = sorted(folder.glob("seed*.zip"))
            if not paths and not lines:
                without.append(str(folder))
            for path in paths:
                seed = int(path.stem.removeprefix("seed"))
                if seed in lines:
                    continue
                lines[seed] = line = measure(path, task, algorithm_of(folder), seed, N_EPISODES)
                print(f"{task}/{name}/seed{seed}: " + ", ".join(f"{key} {line[key]:.3g}" for key in COLUMNS[2:7]), flush=True)
                write_lines(folder / FILE, [lines[key] for key in sorted(lines)])
    if without:
        sys.exit(f"No models in {', '.join(without)}: keep them with python -m benchmarks.run --save")


if __name__ == "__main__":
    main()
