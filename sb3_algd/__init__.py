"""Safe off-policy RL for Stable-Baselines3: ALGD (Augmented Lagrangian-Guided Diffusion) and SAC-Lagrangian."""

import sys

from sb3_algd.algd import ALGD, CnnPolicy, DiffusionPolicy, MlpPolicy, MultiInputPolicy
from sb3_algd.algd import policies as _policies
from sb3_algd.common import buffers as _buffers
from sb3_algd.common import legacy as _legacy
from sb3_algd.common.buffers import (
    CostDictReplayBuffer,
    CostHerReplayBuffer,
    CostNStepReplayBuffer,
    CostReplayBuffer,
)
from sb3_algd.common.evaluation import evaluate_policy
from sb3_algd.common.verdict import constraint_verdict
from sb3_algd.envs import register_envs
from sb3_algd.sac_lag import SACLag

__version__ = "0.2.0"

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
    "SACLag",
    "constraint_verdict",
    "evaluate_policy",
]

# Where the models and replay buffers that version 0.1.0 has saved look for their classes
sys.modules.update({"sb3_algd.policies": _policies, "sb3_algd.buffers": _buffers, "sb3_algd.constraint": _legacy})

register_envs()
