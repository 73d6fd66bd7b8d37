"""ALGD (Augmented Lagrangian-Guided Diffusion): safe off-policy reinforcement learning for Stable-Baselines3."""

from sb3_algd.algd import ALGD
from sb3_algd.buffers import (
    CostDictReplayBuffer,
    CostHerReplayBuffer,
    CostNStepReplayBuffer,
    CostReplayBuffer,
)
from sb3_algd.envs import register_envs
from sb3_algd.evaluation import evaluate_policy
from sb3_algd.policies import CnnPolicy, DiffusionPolicy, MlpPolicy, MultiInputPolicy

__version__ = "0.1.0"

__all__ = [
    "ALGD",
    "CnnPolicy",
    "CostDictReplayBuffer",
    "CostHerReplayBuffer",
    "CostNStepReplayBuffer",
    "CostReplayBuffer",
    "DiffusionPolicy",
    "MlpPolicy",
    "MultiInputPolicy",
    "evaluate_policy",
]

register_envs()
