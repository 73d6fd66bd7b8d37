"""What the commands have in common."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import rl_zoo3

from sb3_algd.algd import ALGD
from sb3_algd.zoo import ALGO, TRAINED_AGENTS


def default_option(name: str, value: str) -> None:
    """
    Give the command line a default that the Zoo does not have.

    :param name: The option
    :param value: Its value
    """
    # In front, so that the user's own, which comes later, overrides it
    sys.argv[1:1] = [name, value]


def folder_given() -> bool:
    """:return: Whether the command line names a log folder"""
    return any(argument == "-f" or argument.startswith("--fo") for argument in sys.argv[1:])


def default_to_trained_agents() -> None:
    """Look for agents among those that come with the package, unless the command line names a folder."""
    if not folder_given():
        default_option("-f", str(TRAINED_AGENTS))


class ALGDToShow(ALGD):
    """Stands in for ALGD where the Zoo loads an agent only to show it."""

    @classmethod
    def load(cls, *args: Any, **kwargs: Any) -> ALGD:  # type: ignore[override]
        """:param args: Of ALGD's. :param kwargs: Of ALGD's. :return: The model, almost without replay buffer"""
        # rl_zoo3 2.9.2 does this for the algorithms in a fixed list
        kwargs = {"buffer_size": 1, "optimize_memory_usage": False, **kwargs}
        return ALGD.load(*args, **kwargs)


# The Zoo prints it, and writes it into model cards
ALGDToShow.__name__ = ALGD.__name__


@contextlib.contextmanager
def agents_to_show() -> Iterator[None]:
    """Let the Zoo load ALGD agents without their replay buffers' memory."""
    with patch.dict(rl_zoo3.ALGOS, {ALGO: ALGDToShow}):
        yield


def show_missing_agent(error: Exception) -> SystemExit:
    """
    :param error: What the Zoo says where there is no agent.
    :return: The same with what to do, to be raised.
    """
    shipped = sorted(path.name.rsplit("_", 1)[0] for path in (TRAINED_AGENTS / ALGO).glob("*_[0-9]*"))
    return SystemExit(
        f"{error}\nName the log folder of your training with -f (the folder 'logs' by default there). "
        f"Without -f an agent that comes with the package is shown: {', '.join(shipped)}."
    )
