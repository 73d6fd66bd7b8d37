"""SAC-Lagrangian."""

from sb3_algd.sac_lag.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, SACLagPolicy
from sb3_algd.sac_lag.sac_lag import SACLag

__all__ = ["CnnPolicy", "MlpPolicy", "MultiInputPolicy", "SACLag", "SACLagPolicy"]
