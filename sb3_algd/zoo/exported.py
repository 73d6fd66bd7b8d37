"""Exported agents in the Zoo's ``enjoy``."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import rl_zoo3.enjoy
from stable_baselines3.common.vec_env import VecEnv

from sb3_algd.common.mistakes import one_line
from sb3_algd.export.description import ExportedConstraint, ask_for_cost_key
from sb3_algd.export.policy_file import LoadedPolicy, load_policy
from sb3_algd.export.spaces import as_dict
from sb3_algd.train import at_least
from sb3_algd.zoo.commandline import default_option, given_options
from sb3_algd_runtime import Agent


class ExportedModel(ExportedConstraint):
    """
    An exported agent with the interface that the Zoo expects of a model.

    :param agent: The agent
    :param env: The environment that it is to play
    :raises ValueError: If the environment has other observations or actions, or the file does not tell its limit.
    """

    def __init__(self, agent: Agent, env: VecEnv) -> None:
        super().__init__(agent.metadata)
        self.agent = agent
        wanted = {name: tuple(entry["shape"]) for name, entry in agent.metadata["observations"].items()}
        given = {name: space.shape for name, space in as_dict(env.observation_space).items()}
        if given != wanted:
            raise ValueError(f"it takes observations of the shapes {wanted}, this environment has {given}")
        if env.action_space.shape != agent.action_shape:
            raise ValueError(f"it has actions of shape {agent.action_shape}, this environment takes {env.action_space.shape}")
        if self.cost_key is ask_for_cost_key:
            raise ValueError("its model read costs with a function (cost_key), which the file cannot hold: enjoy the model")

    def predict(self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> Any:
        """
        :param observation: Observations of the environments
        :param state: Not used
        :param episode_start: Not used
        :param deterministic: Whether to leave out all noise
        :return: Actions, and ``state``
        """
        return np.asarray(self.agent.act(observation, deterministic)), state


def take_own_options() -> argparse.Namespace:
    """:return: Our options of ``enjoy``, which the Zoo does not see."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("options of sb3_algd")
    group.add_argument("--onnx", metavar="FILE", help="play an exported agent; its task is known from the file")
    group.add_argument("--max-cost", type=at_least(0.0), help="the largest cost that an episode can have, for the verdict")
    if {"-h", "--help"} & set(sys.argv):
        print(parser.format_help().partition("\n\n")[2])
    options, sys.argv[1:] = parser.parse_known_args()
    return options


def name_task(path: str) -> None:
    """
    Let the Zoo play the task of an exported agent, unless the command line names another one.

    :param path: The ONNX file
    :raises SystemExit: If the file cannot be played, or there is no such task here.
    """
    try:
        agent = Agent.load(path)
    except OSError as error:
        raise SystemExit(f"{one_line(error)}. Write an agent to a file with: sb3-algd export") from error
    except (ValueError, ImportError) as error:
        raise SystemExit(one_line(error)) from error
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--env", default=agent.metadata.get("task"))
    task = parser.parse_known_args()[0].env
    if task is None:
        raise SystemExit(f"{path} does not name its task: give --env.")
    try:
        gym.spec(task)
    except (gym.error.Error, ImportError, ValueError) as error:
        raise SystemExit(f"--env {task}: {one_line(error)}") from None
    default_option("--env", task)


@contextlib.contextmanager
def played_instead(path: str, envs: list[Any]) -> Iterator[None]:
    """
    Let the Zoo play an exported agent where it would load a model.

    With a log folder (``-f``) the environment is the one of its run, with the arguments and wrappers of the training.

    :param path: The ONNX file, or the folder of a policy without pickle
    :param envs: Where the environments are that the Zoo makes, the last one counts
    """
    find, read = rl_zoo3.enjoy.get_model_path, rl_zoo3.enjoy.get_saved_hyperparams
    from_logs = given_options().folder is not None

    def find_model(*args: Any) -> tuple[str, str, str]:
        # Nothing is in there
        return "", path, find(*args)[2] if from_logs else os.devnull

    def read_hyperparams(*args: Any, **kwargs: Any) -> tuple[dict[str, Any], str | None]:
        hyperparams, stats_path = read(*args, **kwargs)
        # The statistics are in the file
        return {**hyperparams, "normalize": False}, stats_path

    class Loader:
        """Takes the place of the algorithm."""

        @staticmethod
        def load(*args: Any, seed: int | None = None, **kwargs: Any) -> ExportedModel | LoadedPolicy:
            """:param args: Not used. :param seed: Seed of the actions. :param kwargs: Not used. :return: The agent."""
            try:
                # Actions of a policy follow PyTorch's seed, which the Zoo has set
                model = load_policy(path) if os.path.isdir(path) else ExportedModel(Agent.load(path, seed), envs[-1])
            except (ValueError, ImportError) as error:
                raise SystemExit(f"{path}: {error}") from error
            envs[-1].model = model
            return model

    with (
        patch.object(rl_zoo3.enjoy, "get_model_path", find_model),
        patch.object(rl_zoo3.enjoy, "get_saved_hyperparams", read_hyperparams),
        patch.dict(rl_zoo3.enjoy.ALGOS, {given_options().algo: Loader}),
    ):
        yield
