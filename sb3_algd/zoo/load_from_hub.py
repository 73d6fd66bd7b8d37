"""
The Zoo's ``load_from_hub``: download an agent that ``push_to_hub`` has uploaded.

    python -m sb3_algd.zoo.load_from_hub --env Safexp-PointButton1-v0 -f logs -orga my_organization
"""

import runpy

from sb3_algd.zoo import ALGO
from sb3_algd.zoo.commandline import default_option


def load_from_hub() -> None:
    """Run the Zoo's command with our default algorithm."""
    default_option("--algo", ALGO)
    # rl_zoo3 2.9.2 has this command outside any function
    runpy.run_module("rl_zoo3.load_from_hub", run_name="__main__")


if __name__ == "__main__":
    load_from_hub()
