"""
The Zoo's ``all_plots``: compare runs, also by their costs.

    python -m sb3_algd.zoo.all_plots -e Safexp-PointButton1-v0 -f logs -k costs
"""

from rl_zoo3.plots import all_plots as zoo

from sb3_algd.zoo import ALGO
from sb3_algd.zoo.commandline import default_option


def all_plots() -> None:
    """Run the Zoo's command with our default algorithm."""
    default_option("-a", ALGO)
    zoo()


if __name__ == "__main__":
    all_plots()
