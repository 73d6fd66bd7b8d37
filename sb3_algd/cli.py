"""
The command line: ``sb3-algd <command>``, or ``python -m sb3_algd.zoo <command>``.

It starts on a base install; each command says which extra it needs.
"""

import argparse
import contextlib
import importlib
import runpy
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn
from unittest.mock import patch

import sb3_algd
from sb3_algd.common.mistakes import told_in_one_line


class Command(NamedTuple):
    """
    A command.

    :param description: What it does
    :param target: Its function, as ``"module:function"``, or the module alone where the command is outside any function
    :param algo_option: The Zoo's option of the algorithm where it has no default of ours
    :param needed: Options that the Zoo needs without a check, each with its long name
    """

    description: str
    target: str
    algo_option: str | None = None
    needed: tuple[tuple[str, str], ...] = ()


COMMANDS = {
    "envs": Command("list the environments, their limits, and what is missing to run them", "sb3_algd.envs.__main__:main"),
    "train": Command("train an agent, or tune its hyperparameters with -optimize", "sb3_algd.zoo.train:train"),
    "compare": Command(
        "train several algorithms and seeds; one figure, one table with verdicts", "sb3_algd.compare.__main__:main"
    ),
    "enjoy": Command("watch a trained agent; its return and cost, and whether the limit holds", "sb3_algd.zoo.enjoy:enjoy"),
    "export": Command("write a trained agent to files that need neither PyTorch nor pickle", "sb3_algd.zoo.export:export"),
    "record_video": Command("leave a video of a trained agent", "sb3_algd.zoo.record_video:record_video"),
    "plot_costs": Command("draw return and cost of runs, with the limit", "sb3_algd.zoo.plot_costs:plot_costs"),
    "plot_train": Command("draw the returns of training episodes", "rl_zoo3.plots:plot_train", "-a"),
    "all_plots": Command(
        "compare runs, with -k costs by their costs",
        "sb3_algd.zoo.plot_costs:all_plots",
        "-a",
        (("-e", "--env"), ("-f", "--exp-folders")),
    ),
    "plot_from_file": Command("draw what all_plots has saved", "rl_zoo3.plots:plot_from_file", needed=(("-i", "--input"),)),
    "push_to_hub": Command("upload a trained agent to the Hugging Face Hub", "sb3_algd.zoo.push_to_hub:push_to_hub"),
    "load_from_hub": Command("download one from there", "rl_zoo3.load_from_hub", "--algo"),
}
#: Rooms whose commands need nothing of the Zoo
ON_BASE = ("sb3_algd.envs", "sb3_algd.compare")


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Run the command that the command line names.

    :param arguments: The command line without the program's name, ``sys.argv`` if None
    """
    if arguments is not None:
        sys.argv = ["sb3-algd", *arguments]
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name == "--version":
        print(f"sb3_algd {sb3_algd.__version__}")
        return
    if name in ("-h", "--help"):
        print("usage: sb3-algd <command> [options]\n\n<command> --help tells its options. --version tells the version.\n")
        print("\n".join(f"  {name:16}{command.description}" for name, command in COMMANDS.items()))
        print('\nAll of them but envs and compare need the extra zoo: pip install "sb3_algd[zoo]"')
        print("compare also needs matplotlib, export the extra deploy")
        return
    if name not in COMMANDS:
        raise SystemExit(f"There is no command {name!r}: choose one of {', '.join(COMMANDS)}.")
    with patch.object(argparse.ArgumentParser, "error", _refuse):
        _run(name)


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """End with argparse's message alone: the usage of the Zoo's commands is 60 lines."""
    parser.exit(2, f"{parser.prog}: {message}. {parser.prog} --help tells its options.\n")


def _run(name: str) -> None:
    """Run a command."""
    command = COMMANDS[name]
    # The options of the command follow its name
    sys.argv[:2] = [f"sb3-algd {name}"]
    if not command.target.startswith(ON_BASE):
        _prepare_zoo(command)
    module, _, function = command.target.partition(":")
    if not function:
        with told_in_one_line():
            runpy.run_module(module, run_name="__main__")
        return
    for short, long in command.needed:
        if not any(word.startswith((short, long, "-h", "--help")) for word in sys.argv[1:]):
            raise SystemExit(f"{name} needs {short} ({long}): {name} --help tells more.")
    # The figures look for files and read numbers without a check
    plots = module.startswith(("rl_zoo3.plots", "sb3_algd.zoo.plot_costs"))
    advice = "Name the log folder with -f, or the file with -i and -o." if name != "plot_costs" else ""
    with told_in_one_line(advice=advice) if plots else contextlib.nullcontext():
        status = getattr(importlib.import_module(module), function)()
    if status:
        sys.exit(status)


def _prepare_zoo(command: Command) -> None:
    """Register our algorithms in the Zoo, and give the command ours as its default."""
    try:
        zoo = importlib.import_module("sb3_algd.zoo")
    except ImportError as error:
        raise SystemExit(str(error)) from None
    if command.algo_option is not None:
        # In front, so that the user's own, which comes later, overrides it
        sys.argv[1:1] = [command.algo_option, zoo.ALGO]


if __name__ == "__main__":
    main()
