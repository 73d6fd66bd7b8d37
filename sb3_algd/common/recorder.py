"""Learning curves as CSV files: what the benchmarks and ``python -m sb3_algd.train`` measure while they train."""

import csv
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gymnasium as gym
import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import VecEnv

from sb3_algd.common.buffers import CostStorage
from sb3_algd.common.episode_costs import CostKey, EpisodeCostTracker, read_costs
from sb3_algd.common.evaluation import cost_discount, evaluate_policy
from sb3_algd.common.random_state import preserved_random_state

COLUMNS = (
    "step",
    "return_mean",
    "return_std",
    "cost_mean",
    "cost_std",
    "return_det",
    "cost_det",
    "train_cost",
    "multiplier",
    "seconds",
)

#: One row, by column
Row = dict[str, float]

#: Added to the seed of a run, so that no evaluation sees an episode that training may see
EVAL_SEED = 1_000_000


def evaluation_seed(seed: int, step: int = 0) -> int:
    """
    :param seed: Seed of a run.
    :param step: Step of an evaluation.
    :return: Seed of the evaluation, one that NumPy's generators take, with room for the environments' numbers.
    """
    return (EVAL_SEED * (seed + 1) + step) % 2**31


@contextmanager
def seeded_evaluation(model: BaseAlgorithm, env: VecEnv, seed: int, step: int) -> Iterator[None]:
    """
    Draw what depends on the run's seed and on the step alone, and leave the training's random generators as they were.

    :param model: The model that is evaluated.
    :param env: Environments of the evaluation.
    :param seed: Seed of the run.
    :param step: Step of the evaluation.
    """
    with preserved_random_state(model.device):
        seed = evaluation_seed(seed, step)
        set_random_seed(seed, using_cuda=model.device.type == "cuda")
        env.seed(seed)
        yield


def make_envs(env_id: str, n_envs: int = 1, seed: int | None = None) -> VecEnv:
    """
    SB3's ``make_vec_env`` without rendering, which it always asks for where it is given an id.

    :param env_id: Gymnasium id.
    :param n_envs: How many environments, stepped one after the other in this process.
    :param seed: Seed of the first one, the others count on.
    :return: The environments, each in a ``Monitor``.
    """
    return make_vec_env(lambda: gym.make(env_id), n_envs, seed=seed)


def describe(row: Row) -> str:
    """:param row: A row of a learning curve. :return: It in a line for people."""
    # Only constrained algorithms have one
    multiplier = "" if np.isnan(row["multiplier"]) else f"multiplier {row['multiplier']:.3g}, "
    return (
        f"step {row['step']:.0f}: return {row['return_mean']:.2f} (deterministic {row['return_det']:.2f}), "
        f"cost {row['cost_mean']:.2f} (deterministic {row['cost_det']:.2f}, training {row['train_cost']:.2f}), "
        f"{multiplier}{row['seconds']:.0f} s"
    )


class Stopwatch:
    """Measures seconds. Not a number, so that no checkpoint takes its reading to another process."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def lap(self) -> float:
        """:return: Seconds since the lap before, or since the start."""
        before, self._last = self._last, time.monotonic()
        return self._last - before


class LearningCurveRecorder(BaseCallback):
    """
    Evaluate the policy every ``eval_freq`` steps and at the end of training, and append a row to a CSV file each time.

    Training is the same, number for number, as without it: evaluations have environments of their own and leave the global
    random generators as they were. Costs are in the unit of the limit (a discounted sum if the limit is one).

    While training runs the file is named ``<path>.partial``, it gets its name when training has ended. A training that is
    resumed (:func:`sb3_algd.common.checkpoint.resume`) goes on with the rows and the time that it had at its checkpoint.

    :param path: The CSV file.
    :param make_eval_env: Makes that many environments, stepped together. They must not be normalised.
    :param eval_freq: Environment steps between two evaluations.
    :param n_episodes: Episodes with stochastic actions.
    :param n_deterministic: Episodes with deterministic actions. One is enough where every episode starts the same.
    :param seed: Seed of the run; evaluations use seeds derived from it that training does not use.
    :param cost_key: Key of ``info`` that holds the cost, or a function of it. None for the model's own.
    :param cost_gamma: Discount factor of evaluated costs. None for that of the model's limit.
    :param on_row: Called with each new row.
    :param episodes_path: CSV file of return and cost of each stochastic episode of the last evaluation. None for no such file.
    """

    def __init__(
        self,
        path: str | Path,
        make_eval_env: Callable[[int], VecEnv],
        eval_freq: int = 2000,
        n_episodes: int = 20,
        n_deterministic: int = 1,
        seed: int = 0,
        cost_key: CostKey | None = None,
        cost_gamma: float | None = None,
        on_row: Callable[[Row], None] | None = None,
        episodes_path: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.path = Path(path)
        self.partial_path = self.path.with_name(self.path.name + ".partial")
        self.make_eval_env = make_eval_env
        self.eval_freq = eval_freq
        self.n_episodes = n_episodes
        self.n_deterministic = n_deterministic
        self.seed = seed
        self.cost_key = cost_key
        self.cost_gamma = cost_gamma
        self.on_row = on_row
        self.episodes_path = None if episodes_path is None else Path(episodes_path)
        #: Return and cost of each stochastic episode of the last evaluation, shape (n_episodes, 2)
        self.last_episodes = np.empty((0, 2))
        self.rows: list[Row] = []
        #: Time spent on training alone, which is what a user without this recorder would wait for
        self.seconds = 0.0

    def _on_training_start(self) -> None:
        if np.size(getattr(self.model, "cost_limit", 0.0)) != 1:
            raise ValueError(
                "A learning curve has one cost column, but the model has several constraints: use CostEvalCallback."
            )
        if self.cost_gamma is None:
            self.cost_gamma = cost_discount(self.model)
        if self.cost_key is None:
            self.cost_key = getattr(self.model, "cost_key", "cost")
        with preserved_random_state(self.model.device):
            self.stochastic_env = self.make_eval_env(self.n_episodes)
            self.deterministic_env = self.make_eval_env(self.n_deterministic)
        # Longer than any stretch between two evaluations
        self._training_costs = EpisodeCostTracker(self.training_env.num_envs, 1, self.cost_gamma, window=self.eval_freq)
        # The same steps for a training that is resumed between two of them
        self._next_eval = (self.num_timesteps // self.eval_freq + 1) * self.eval_freq
        # resume() fills them again after this
        self.rows, self.seconds = [], 0.0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stopwatch = Stopwatch()

    def _on_step(self) -> bool:
        self.seconds += self._stopwatch.lap()
        assert self.cost_key is not None
        infos, buffer = self.locals["infos"], self.locals.get("replay_buffer")
        if isinstance(buffer, CostStorage) and buffer.cost_key == self.cost_key:
            costs, _ = buffer.read_costs(infos)
        else:
            costs, _ = read_costs(infos, self.cost_key, 1)
        self._training_costs.update(costs, self.locals["dones"])
        if self.num_timesteps >= self._next_eval:
            self._next_eval += self.eval_freq
            self._record()
        return True

    def episodes_restarted(self) -> None:
        """Forget the running training episodes: the environments were reset before their end."""
        self._training_costs.start_episodes(self.training_env.num_envs)

    def _record(self) -> None:
        self.seconds += self._stopwatch.lap()
        returns, costs = self._play(self.stochastic_env, self.n_episodes, deterministic=False)
        returns_det, costs_det = self._play(self.deterministic_env, self.n_deterministic, deterministic=True)
        self.last_episodes = np.column_stack([returns, costs])
        train_costs = self._training_costs.discounted_costs
        multiplier = getattr(self.model, "lagrange_multiplier", None)
        row = {
            "step": self.num_timesteps,
            "return_mean": np.mean(returns),
            "return_std": np.std(returns),
            "cost_mean": np.mean(costs),
            "cost_std": np.std(costs),
            "return_det": np.mean(returns_det),
            "cost_det": np.mean(costs_det),
            "train_cost": np.mean(train_costs) if train_costs else np.nan,
            "multiplier": np.nan if multiplier is None else float(multiplier.value),
            "seconds": self.seconds,
        }
        train_costs.clear()
        self.rows.append({key: float(value) for key, value in row.items()})
        self._write()
        if self.on_row is not None:
            self.on_row(self.rows[-1])
        self._stopwatch.lap()

    def _write(self) -> None:
        # A run may be killed at any time, also while this is written: what it has measured must be on disk by then
        new_path = self.partial_path.with_name(self.partial_path.name + ".new")
        with new_path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            for row in self.rows:
                writer.writerow({key: int(value) if key == "step" else f"{value:.6g}" for key, value in row.items()})
            file.flush()
            os.fsync(file.fileno())
        new_path.replace(self.partial_path)

    def _play(self, env: VecEnv, n_episodes: int, deterministic: bool) -> tuple[list[float], np.ndarray]:
        """Return and cost of each of ``n_episodes`` episodes, whose seeds depend on the run's seed and on the step alone."""
        assert self.cost_gamma is not None
        with seeded_evaluation(self.model, env, self.seed, self.num_timesteps):
            returns, _, costs = evaluate_policy(
                self.model,
                env,
                n_eval_episodes=n_episodes,
                deterministic=deterministic,
                return_episode_rewards=True,
                warn=False,
                cost_key=self.cost_key,
                cost_gamma=self.cost_gamma,
            )
        return returns, costs

    def _on_training_end(self) -> None:
        if not self.rows or self.rows[-1]["step"] != self.num_timesteps:
            self._record()
        if self.episodes_path is not None:
            # Before the curve, whose name says that nothing is left to do
            np.savetxt(self.episodes_path, self.last_episodes, "%.6g", ",", header="return,cost", comments="")
        self.partial_path.replace(self.path)
        self.stochastic_env.close()
        self.deterministic_env.close()
