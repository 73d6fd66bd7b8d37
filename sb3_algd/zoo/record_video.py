"""
The Zoo's ``record_video``: a video of a trained agent.

    python -m sb3_algd.zoo record_video --env Safexp-PointButton1-v0 -n 400
"""

import os
import runpy
from typing import Any
from unittest.mock import patch

from stable_baselines3.common import vec_env

from sb3_algd.zoo import ALGO
from sb3_algd.zoo.commandline import (
    agent_played,
    default_option,
    default_to_stochastic,
    default_to_trained_agents,
    given_options,
    refuse_options,
)


def record_video() -> None:
    """Run the Zoo's command with our default algorithm, agents and actions."""
    default_option("--algo", ALGO)
    refuse_options()
    default_to_stochastic()
    if given_options().folder is None:
        # The Zoo's own default is the folder of the agent, here inside the installed package
        default_option("-o", "videos")
        default_to_trained_agents()
    recorder = vec_env.VecVideoRecorder

    def record(venv: vec_env.VecEnv, folder: str, *args: Any, **kwargs: Any) -> vec_env.VecVideoRecorder:
        # A recorder that cannot make its folder complains once more when it is deleted
        os.makedirs(folder, exist_ok=True)
        return recorder(venv, folder, *args, **kwargs)

    with (
        patch.object(vec_env, "VecVideoRecorder", record),
        agent_played(),
    ):
        # rl_zoo3 2.9.2 has this command outside any function
        runpy.run_module("rl_zoo3.record_video", run_name="__main__")


if __name__ == "__main__":
    record_video()
