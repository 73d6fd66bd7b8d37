"""What a run is, the settings that the runs of a results folder share, and where results go."""

import contextlib
import fcntl
import inspect
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import yaml
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_algd import ALGD, __version__
from sb3_algd.common.cost_aware_algorithm import CostAwareAlgorithm
from sb3_algd.common.mistakes import one_line, told_in_one_line

#: Class, policy, and arguments on top of its own defaults
Algorithm = tuple[type[BaseAlgorithm], str, dict[str, Any]]
#: For algorithms without a constraint the learning rates that ALGD and SACLag have, not SB3's
TUNED = {"learning_rate": 1e-3, "tau": 0.02}


@dataclass(frozen=True)
class Settings:
    """What the runs in one results folder have in common."""

    task: str
    algorithm: str
    steps: int
    eval_every: int
    n_episodes: int
    n_deterministic: int
    n_envs: int
    device: str
    kwargs: dict[str, Any]
    #: Storing a checkpoint ends the running episodes, so it is part of what a run does
    checkpoint_every: int | None = None


@dataclass(frozen=True)
class Run:
    """One run: its settings, its seed and where its results go."""

    settings: Settings
    seed: int
    folder: Path
    algorithm: Algorithm
    #: Whether everything that the algorithm logs is kept
    log: bool = False
    #: Whether the trained model is kept
    save: bool = False
    #: Whether return and cost of each episode of the last evaluation are kept
    keep_episodes: bool = False
    #: Modules that register the task
    packages: tuple[str, ...] = ()

    @property
    def csv(self) -> Path:
        """The learning curve, which exists once the run is finished."""
        return self.folder / f"seed{self.seed}.csv"

    @property
    def episodes(self) -> Path:
        """Episodes of the last evaluation."""
        return self.folder / f"episodes_seed{self.seed}.csv"

    @property
    def checkpoint(self) -> Path:
        """Where an interrupted run goes on from."""
        return self.folder / f"seed{self.seed}_checkpoint"

    @property
    def label(self) -> str:
        """How the run is called in messages."""
        return f"{self.folder.parent.name}/{self.folder.name}/seed{self.seed}"


def limit_is_discounted(task: str) -> bool:
    """:param task: Id of a task. :return: Whether the limit that it declares is on the discounted sum of costs."""
    env = gym.make(task)
    discounted = env.has_wrapper_attr("cost_limit_discounted") and bool(env.get_wrapper_attr("cost_limit_discounted"))
    env.close()
    return discounted


def cost_gamma(model_class: type[BaseAlgorithm], task: str) -> float | None:
    """
    :param model_class: The algorithm of a run.
    :param task: Its task.
    :return: Discount factor of the costs that are recorded; None to go by the model, which knows its limit's unit.
    """
    if issubclass(model_class, CostAwareAlgorithm):
        return None
    return inspect.signature(ALGD).parameters["cost_limit_gamma"].default if limit_is_discounted(task) else 1.0


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """
    :param pairs: ``key=value`` each, the value in YAML, the key with dots for nested arguments.
    :return: The arguments, nested.
    """
    overrides: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator:
            raise SystemExit(f"--set {pair}: write key=value, for instance --set rho=0")
        *parents, last = key.split(".")
        target = overrides
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise SystemExit(f"--set {pair}: {parent} is {target} already, it has no {last}")
        # YAML takes 3e-4 for a string, because it has no dot
        parsed = yaml.safe_load(value)
        if isinstance(parsed, str):
            with contextlib.suppress(ValueError):
                parsed = float(parsed)
        target[last] = parsed
    return overrides


def merged(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """
    :param base: Arguments, maybe nested.
    :param overrides: Arguments that win.
    :return: Both together; the inputs stay as they are.
    """
    result = dict(base)
    for key, value in overrides.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if nested else value
    return result


def declared_limit(task: str, cost_limit: float | None = None) -> float | None:
    """
    :param task: Id of the task; one that does not exist ends the program before any run starts.
    :param cost_limit: The limit that is given.
    :return: The cost limit that is in force, None if none is given and the task declares none.
    """
    try:
        env = gym.make(task)
    except (gym.error.Error, ImportError) as error:
        raise SystemExit(f"Cannot make the task {task}: {one_line(error)}") from error
    limit = cost_limit
    if limit is None and env.has_wrapper_attr("cost_limit"):
        limit = env.get_wrapper_attr("cost_limit")
    env.close()
    if limit is None:
        return None
    if np.size(limit) != 1:
        raise SystemExit(f"{task} has several constraints: runs are compared under one limit.")
    return float(np.asarray(limit).item())


def prepare_folder(
    folder: Path, settings: Settings, seeds: list[int], command: list[str], cost_limit: float | None = None
) -> None:
    """
    Write down what the runs in a folder have in common: the version of the package, which says what the defaults are, the
    arguments that are given, and the limit. Runs with other settings must not be mixed with them.

    :param folder: The results folder of one task and one algorithm.
    :param settings: The settings of the runs.
    :param seeds: The runs that are asked for.
    :param command: What was asked for, the words after ``python``.
    :param cost_limit: The limit that is in force. None for the one in the arguments, or of the task
    """
    path = folder / "settings.yaml"
    described = {
        "version": __version__,
        **vars(settings),
        "cost_limit": declared_limit(settings.task, settings.kwargs.get("cost_limit")) if cost_limit is None else cost_limit,
        "command": shlex.join(["python", *command]),
    }
    if not path.exists() or not (results_in(folder) or is_running(folder)):
        if not path.exists():
            _refuse_unknown(folder)
        with told_in_one_line("The results folder cannot be made", "Give another --out."):
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(yaml.safe_dump(described, sort_keys=False))
        return
    stored, now = _flat(yaml.safe_load(path.read_text())), _flat(described)
    free = {"command"}
    if all((folder / f"seed{seed}.csv").exists() for seed in seeds):
        # Nothing is added to the runs of another version
        free.add("version")
    differing = [key for key in sorted((stored.keys() | now.keys()) - free) if stored.get(key) != now.get(key)]
    if differing:
        changes = ", ".join(f"{key}: {stored.get(key)} there, {now.get(key)} now" for key in differing)
        raise SystemExit(f"{folder} holds runs with other settings ({changes}). Give another --out.")


def _flat(described: dict[str, Any]) -> dict[str, Any]:
    """Settings with the algorithm's arguments among them, so that a message names the one that differs."""
    return {**{key: value for key, value in described.items() if key != "kwargs"}, **described["kwargs"]}


def results_in(folder: Path) -> list[str]:
    """:param folder: A results folder. :return: Names of the learning curves, finished or not, and checkpoints in it."""
    return sorted(path.name for pattern in ("seed*.csv*", "seed*_checkpoint") for path in folder.glob(pattern))


def is_running(folder: Path) -> bool:
    """:param folder: A results folder. :return: Whether a process is doing one of its runs, which may have no results yet."""
    for path in folder.glob(".seed*.lock"):
        # Without locks in this file system nothing can be said
        with path.open("r+") as lock, contextlib.suppress(OSError):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def _refuse_unknown(folder: Path) -> None:
    """End the program if a folder without settings has results."""
    # A run that was killed without a checkpoint starts afresh
    left = [name for name in results_in(folder) if not name.endswith(".partial")]
    if left:
        raise SystemExit(
            f"{folder} has {', '.join(left)}, but no settings.yaml to say what was run: move them away, or give another --out."
        )
