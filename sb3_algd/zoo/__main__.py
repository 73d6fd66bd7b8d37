"""
The commands of the RL Zoo for ALGD: ``sb3-algd <command>``, or ``python -m sb3_algd.zoo <command>``.
"""

import runpy
import sys

#: Each is a module of this package
COMMANDS = {
    "train": "train an agent, or tune its hyperparameters with -optimize",
    "enjoy": "watch a trained agent; its return and cost, and whether the limit holds",
    "record_video": "leave a video of a trained agent",
    "plot_costs": "draw return and cost of runs, with the limit",
    "plot_train": "draw the returns of training episodes",
    "all_plots": "compare runs",
    "plot_from_file": "draw what all_plots has saved",
    "push_to_hub": "upload a trained agent to the Hugging Face Hub",
    "load_from_hub": "download one from there",
}


def main() -> None:
    """Run the command that the command line names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: sb3-algd <command> [options]\n\n<command> --help tells its options.\n")
        print("\n".join(f"  {command:16}{what}" for command, what in COMMANDS.items()))
        return
    if name not in COMMANDS:
        raise SystemExit(f"There is no command {name!r}: choose one of {', '.join(COMMANDS)}.")
    # The options of the command follow its name
    sys.argv[:2] = [f"sb3-algd {name}"]
    runpy.run_module(f"sb3_algd.zoo.{name}", run_name="__main__", alter_sys=False)


if __name__ == "__main__":
    main()
