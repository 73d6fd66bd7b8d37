"""ALGD, Augmented Lagrangian-Guided Diffusion."""

from sb3_algd.algd.algd import ALGD
from sb3_algd.algd.policies import CnnPolicy, DiffusionPolicy, MlpPolicy, MultiInputPolicy

__all__ = ["ALGD", "CnnPolicy", "DiffusionPolicy", "MlpPolicy", "MultiInputPolicy"]
