"""What the commands have in common."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

from rl_zoo3.utils import StoreDict
from stable_baselines3.common.base_class import BaseAlgorithm

from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm
from sb3_algd.common.mistakes import one_line, told_in_one_line
from sb3_algd.export.policy_file import WEIGHTS
from sb3_algd.train import refuse_device
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


def refuse_options() -> None:
    """
    Refuse what the Zoo would take without a word: no task, in whose place it has its own, and a device that is not there.

    :raises SystemExit: With what to do
    """
    options = given_options()
    if options.env is None and not {"-h", "--help"} & set(sys.argv):
        raise SystemExit("Name the task with --env; sb3-algd envs lists those that come with the package.")
    refuse_device(options.device)


@contextlib.contextmanager
def pairs_checked() -> Iterator[None]:
    """
    Let the Zoo name the option and its form where a key:value cannot be read.

    :raises SystemExit: With the line
    """
    store = StoreDict.__call__

    def store_each(
        action: StoreDict,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        pairs: Sequence[str],
        option: str | None = None,
    ) -> None:
        stored: dict[str, Any] = {}
        for pair in pairs:
            form = f"{option} {pair}: write key:value with a value in Python, as batch_size:64 or \"policy:'MlpPolicy'\""
            if ":" not in pair:
                raise SystemExit(f"{form}.")
            try:
                store(action, parser, namespace, [pair], option)
            except Exception as error:
                # Anything, because the Zoo evaluates what is given
                raise SystemExit(f"{form} ({one_line(error)}).") from error
            stored.update(getattr(namespace, action.dest))
        setattr(namespace, action.dest, stored)

    with patch.object(StoreDict, "__call__", store_each):
        yield


@contextlib.contextmanager
def mistakes_in_one_line(begun: Callable[[], object] = lambda: False) -> Iterator[None]:
    """
    End a command with one line where a mistake on its command line shows.

    :param begun: Whether the work has begun. An error from then on is a bug and keeps its traceback, unless it names a file
    :raises SystemExit: With the line
    """
    with pairs_checked(), told_in_one_line(begun=begun):
        yield


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


def show_missing_agent(error: Exception, policies: bool = False) -> SystemExit:
    """
    :param error: What the Zoo says where there is no agent.
    :param policies: Whether the command takes policies without a model too.
    :return: The same with what to do, to be raised.
    """
    options = given_options()
    folder = TRAINED_AGENTS / options.algo
    if options.folder in (None, str(TRAINED_AGENTS)) and (asked := folder / f"{options.env}_1").is_dir():
        if (asked / WEIGHTS).is_file():
            return SystemExit(
                f"The agent of {options.env} that comes with the package is a policy alone ({asked / WEIGHTS}), and "
                f"this command needs the whole model. Train one with: sb3-algd train --env {options.env}. "
                "Then name its log folder with -f."
            )
        return SystemExit(
            f"The agent of {options.env} that comes with the package is one model alone: leave out --load-best and the "
            "other options that choose a model, or name the log folder of your training with -f."
        )
    said = one_line(error).rstrip(".")
    message = f"{said}. Name the log folder of your training with -f (the folder 'logs' by default there)."
    agents = [path for path in folder.glob("*_[0-9]*") if policies or list(path.glob("*.zip"))]
    shipped = sorted(path.name.rsplit("_", 1)[0] for path in agents)
    if shipped:
        message += f" Without -f an agent that comes with the package is taken: {', '.join(shipped)}."
    return SystemExit(message)


@contextlib.contextmanager
def agent_played(
    on_load: Callable[[ConstrainedOffPolicyAlgorithm], None] | None = None,
    begun: Callable[[], object] = lambda: False,
    policies: bool = False,
) -> Iterator[None]:
    """
    Run one of the Zoo's commands that load an agent: with little memory, and one line for a mistake or a missing agent.

    :param on_load: Called with each constrained agent that is loaded
    :param begun: Whether the work has begun, which it has at the latest when an agent is loaded
    :param policies: Whether the command takes policies without a model too
    :raises SystemExit: With the line
    """
    loaded: list[ConstrainedOffPolicyAlgorithm] = []

    def note(model: ConstrainedOffPolicyAlgorithm) -> None:
        loaded.append(model)
        if on_load is not None:
            on_load(model)

    def at_work() -> object:
        return loaded or begun()

    with agents_to_show(note), mistakes_in_one_line(begun=at_work):
        try:
            yield
        except (AssertionError, ValueError) as error:
            if at_work() or "found" not in str(error):
                raise
            raise show_missing_agent(error, policies) from error
