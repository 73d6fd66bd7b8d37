"""The algorithms of the benchmarks, and where results go."""

from pathlib import Path

from sb3_contrib import TQC
from stable_baselines3 import SAC

from sb3_algd import ALGD, SACLag
from sb3_algd.compare.settings import TUNED, Algorithm

RESULTS = Path(__file__).parent / "results"

#: Class, policy and arguments of each algorithm, on top of its own defaults
ALGORITHMS: dict[str, Algorithm] = {
    "algd-ve": (ALGD, "DiffusionPolicy", {"policy_kwargs": {"diffusion": "ve"}}),
    # For legs and costs of every step, as the RL Zoo's settings of the speed tasks
    "algd-pointwise": (ALGD, "DiffusionPolicy", {"policy_kwargs": {"diffusion": "ve-ancestral"}, "penalty": "pointwise"}),
    # Its policy soon is nearly deterministic: with 100 random steps it got stuck before it had seen anything
    "algd-ddpm": (ALGD, "DiffusionPolicy", {"policy_kwargs": {"diffusion": "ddpm"}, "learning_starts": 2000}),
    "algd-ve-plain": (ALGD, "DiffusionPolicy", {"policy_kwargs": {"diffusion": "ve"}, "rho": 0}),
    # A Gaussian policy under the same limit, with the paper's penalty and with the default one
    "sac-pointwise": (SACLag, "MlpPolicy", {"penalty": "pointwise"}),
    "sac-lagrangian": (SACLag, "MlpPolicy", {}),
    # Without any constraint, what SB3's users have today; how these arguments were chosen is in docs/results-0.1.0.md
    "sac": (SAC, "MlpPolicy", TUNED),
    "tqc": (TQC, "MlpPolicy", TUNED),
}
