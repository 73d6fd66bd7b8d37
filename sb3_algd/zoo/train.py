"""
The Zoo's ``train``: train an agent on a task, or tune its hyperparameters with ``-optimize``.

    python -m sb3_algd.zoo train --env Safexp-PointButton1-v0
"""

from unittest.mock import patch

import rl_zoo3.train

from sb3_algd.zoo import ALGO
from sb3_algd.zoo.commandline import default_option
from sb3_algd.zoo.manager import CostExperimentManager


def train() -> None:
    """Run the Zoo's command with our default algorithm, hyperparameters and costs."""
    default_option("--algo", ALGO)
    with patch.object(rl_zoo3.train, "ExperimentManager", CostExperimentManager):
        rl_zoo3.train.train()


if __name__ == "__main__":
    train()
