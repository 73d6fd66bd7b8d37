"""What the commands have in common."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm
from sb3_algd.export.policy_file import WEIGHTS
from sb3_algd.zoo import ALGO, TRAINED_AGENTS, is_constrained


def default_option(name: str, *values: str) -> None:
    """
    Give the command line a default that the Zoo does not have.

    :param name: The option
    :param values: Its value, if it has one
    """
    # In front, so that the user's own, which comes later, overrides it
    sys.argv[1:1] = [name, *values]


def given_options() -> argparse.Namespace:
    """:return: Options of the command line that our defaults depend on"""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--algo", default=ALGO)
    parser.add_argument("--env")
    parser.add_argument("-f", "--folder")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--eval-freq", type=int)
    return parser.parse_known_args()[0]


def default_to_stochastic() -> None:
    """Play the stochastic actions whose cost is limited, unless ``--deterministic`` is given, as the Zoo does for Atari."""
    options = given_options()
    if not options.deterministic and is_constrained(options.algo):
        default_option("--stochastic")


def default_to_trained_agents() -> None:
    """Look for agents among those that come with the package, unless the command line names a folder."""
    if given_options().folder is None:
        default_option("-f", str(TRAINED_AGENTS))


def shipped_policy() -> str | None:
    """:return: Folder of the policy that comes with the package for this task, None without one or if a folder is named"""
    options = given_options()
    folder = TRAINED_AGENTS / options.algo / f"{options.env}_1"
    return str(folder) if options.folder is None and (folder / WEIGHTS).is_file() else None


@contextlib.contextmanager
def agents_to_show(on_load: Callable[[ConstrainedOffPolicyAlgorithm], None] | None = None) -> Iterator[None]:
    """
    Let the Zoo load constrained agents without the memory of their replay buffers.

    :param on_load: Called with each model that is loaded
    """

    def load(cls: type[ConstrainedOffPolicyAlgorithm], *args: Any, **kwargs: Any) -> ConstrainedOffPolicyAlgorithm:
        # rl_zoo3 2.9.2 does this for the algorithms in a fixed list
        kwargs = {"buffer_size": 1, "optimize_memory_usage": False, **kwargs}
        model: ConstrainedOffPolicyAlgorithm = BaseAlgorithm.load.__func__(cls, *args, **kwargs)  # type: ignore[attr-defined]
        if on_load is not None:
            on_load(model)
        return model

    with patch.object(ConstrainedOffPolicyAlgorithm, "load", classmethod(load)):
        yield


def show_missing_agent(error: Exception) -> SystemExit:
    """
    :param error: What the Zoo says where there is no agent.
    :return: The same with what to do, to be raised.
    """
    message = f"{error}\nName the log folder of your training with -f (the folder 'logs' by default there)."
    shipped = sorted(path.name.rsplit("_", 1)[0] for path in (TRAINED_AGENTS / given_options().algo).glob("*_[0-9]*"))
    if shipped:
        message += f" Without -f an agent that comes with the package is shown: {', '.join(shipped)}."
    return SystemExit(message)
