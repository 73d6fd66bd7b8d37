"""Mistakes on the command line, which end a program with one line instead of a traceback."""

import contextlib
import re
from collections.abc import Callable, Iterator

import gymnasium as gym

#: What a mistake on the command line leads to, before training starts
MISTAKES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    gym.error.Error,
    ImportError,
    LookupError,
    NameError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
)


def one_line(error: BaseException) -> str:
    """:param error: An error. :return: What it says, in one line and without the name of its class."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    text = re.sub(r"^(\w+)\.__init__\(\) got an unexpected keyword argument", r"\1 has no argument", text)
    if isinstance(error, KeyError):
        return f"there is no {text}"
    return text or type(error).__name__


@contextlib.contextmanager
def told_in_one_line(prefix: str = "", advice: str = "", begun: Callable[[], object] = lambda: False) -> Iterator[None]:
    """
    End the program with one line where a mistake on the command line shows.

    :param prefix: What the line begins with, for instance the option
    :param advice: What to do about it
    :param begun: Whether the work has begun. An error from then on is a bug and keeps its traceback, unless it names a file
    :raises SystemExit: With the line
    """
    try:
        yield
    except MISTAKES as error:
        if begun() and not isinstance(error, OSError):
            raise
        told = f"{prefix}: {one_line(error)}" if prefix else one_line(error)
        raise SystemExit(f"{told.rstrip('.')}. {advice}" if advice else told) from error
