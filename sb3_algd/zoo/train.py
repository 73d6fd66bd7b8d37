"""
The Zoo's ``train``: train an agent on a task, or tune its hyperparameters with ``-optimize``.

    python -m sb3_algd.zoo train --env Safexp-PointButton1-v0
"""

import argparse
import contextlib
import shutil
from typing import Any
from unittest.mock import patch

import rl_zoo3.train

from sb3_algd.common.mistakes import MISTAKES, one_line
from sb3_algd.zoo import ALGO
from sb3_algd.zoo.commandline import default_option, pairs_checked, refuse_options
from sb3_algd.zoo.manager import CostExperimentManager


def train() -> None:
    """
    Run the Zoo's command with our default algorithm, hyperparameters and costs.

    :raises SystemExit: If training cannot start, with the reason in one line; nothing is left behind
    """
    default_option("--algo", ALGO)
    refuse_options()
    managers: list[CostExperimentManager] = []

    def make_manager(args: argparse.Namespace, *rest: Any, **kwargs: Any) -> CostExperimentManager:
        # The Zoo's -1 stands for what the configuration says, and it takes all others below 1 for the same
        if args.n_timesteps < 1 and args.n_timesteps != -1:
            raise ValueError(f"`n_timesteps` must be at least 1, or -1 for that of the configuration, got {args.n_timesteps}.")
        for option in ("n_eval_envs", "eval_episodes"):
            if (given := getattr(args, option)) < 1:
                raise ValueError(f"--{option.replace('_', '-')} must be at least 1, got {given}.")
        managers.append(CostExperimentManager(args, *rest, **kwargs))
        return managers[-1]

    # A bug during training keeps its traceback, whatever its kind
    with patch.object(rl_zoo3.train, "ExperimentManager", make_manager), pairs_checked():
        try:
            rl_zoo3.train.train()
        except MISTAKES as error:
            if any(manager.started for manager in managers):
                raise
            for folders in (manager.made_folders for manager in managers if manager.made_folders):
                shutil.rmtree(folders[0], ignore_errors=True)
                with contextlib.suppress(OSError):
                    for folder in folders[1:]:
                        # Another run may have its results there by now
                        folder.rmdir()
            raise SystemExit(one_line(error)) from error


if __name__ == "__main__":
    train()
