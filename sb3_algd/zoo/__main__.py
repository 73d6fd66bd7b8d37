"""
The commands of the RL Zoo for ALGD and SACLag: ``python -m sb3_algd.zoo <command>``, or ``sb3-algd <command>``.
"""

import importlib
import runpy
import sys
from typing import NamedTuple

from sb3_algd.zoo import ALGO
from sb3_algd.zoo.commandline import default_option


class Command(NamedTuple):
    """
    A command.

    :param description: What it does
    :param target: Its function, as ``"module:function"``, or the module alone where the command is outside any function
    :param algo_option: The Zoo's option of the algorithm where it has no default of ours
    """

    description: str
    target: str
    algo_option: str | None = None


COMMANDS = {
    "train": Command("train an agent, or tune its hyperparameters with -optimize", "sb3_algd.zoo.train:train"),
    "enjoy": Command("watch a trained agent; its return and cost, and whether the limit holds", "sb3_algd.zoo.enjoy:enjoy"),
    "record_video": Command("leave a video of a trained agent", "sb3_algd.zoo.record_video:record_video"),
    "plot_costs": Command("draw return and cost of runs, with the limit", "sb3_algd.zoo.plot_costs:plot_costs"),
    "plot_train": Command("draw the returns of training episodes", "rl_zoo3.plots:plot_train", "-a"),
    "all_plots": Command("compare runs, with -k costs by their costs", "rl_zoo3.plots:all_plots", "-a"),
    "plot_from_file": Command("draw what all_plots has saved", "rl_zoo3.plots:plot_from_file"),
    "push_to_hub": Command("upload a trained agent to the Hugging Face Hub", "sb3_algd.zoo.push_to_hub:push_to_hub"),
    "load_from_hub": Command("download one from there", "rl_zoo3.load_from_hub", "--algo"),
}


def main() -> None:
    """Run the command that the command line names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: python -m sb3_algd.zoo <command> [options]\n\n<command> --help tells its options.\n")
        print("\n".join(f"  {name:16}{command.description}" for name, command in COMMANDS.items()))
        return
    if name not in COMMANDS:
        raise SystemExit(f"There is no command {name!r}: choose one of {', '.join(COMMANDS)}.")
    command = COMMANDS[name]
    # The options of the command follow its name
    sys.argv[:2] = [f"python -m sb3_algd.zoo {name}"]
    if command.algo_option is not None:
        default_option(command.algo_option, ALGO)
    module, _, function = command.target.partition(":")
    if function:
        getattr(importlib.import_module(module), function)()
    else:
        runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    main()
