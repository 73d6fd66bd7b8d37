"""
The Zoo's ``plot_train``: return and length of training episodes.

    python -m sb3_algd.zoo.plot_train -e Safexp-PointButton1-v0 -f logs
"""

from rl_zoo3.plots import plot_train as zoo

from sb3_algd.zoo import ALGO
from sb3_algd.zoo.commandline import default_option


def plot_train() -> None:
    """Run the Zoo's command with our default algorithm."""
    default_option("-a", ALGO)
    zoo()


if __name__ == "__main__":
    plot_train()
