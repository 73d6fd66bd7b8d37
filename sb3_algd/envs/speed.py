"""The paper's MuJoCo tasks: run, while the discounted sum of one's speed stays below a limit.

The physics is that of Gymnasium's version 5. Its observations and rewards are set to what the original version 3 had in
effect: no contact forces and the like among the observations, no contact cost in the reward.
"""

from typing import Any, ClassVar

import numpy as np
from gymnasium.envs.mujoco.ant_v5 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from gymnasium.envs.mujoco.humanoid_v5 import HumanoidEnv
from gymnasium.error import ResetNeeded

from sb3_algd.envs.rendering import METADATA, choose_backend, make_current, release
from sb3_algd.envs.wrappers import checked_action


class SpeedMixin:
    """
    Goes before a MuJoCo environment of Gymnasium among the bases, and adds the speed as ``info["cost"]``.

    :param cost_limit: The limit on the discounted sum of an episode's costs, discount 0.99.
    :param options: What the environment takes: ``render_mode``, ``width``, ``camera_name``, ``reset_noise_scale``, ...
    """

    settings: ClassVar[dict[str, Any]] = {}
    metadata: dict[str, Any]
    mujoco_renderer: Any
    cost_limit_discounted = True

    def __init__(self, cost_limit: float, **options: Any) -> None:
        choose_backend()
        self.cost_limit = cost_limit
        self._needs_reset = True
        super().__init__(**{**self.settings, **options})
        self.metadata = {**self.metadata, **METADATA}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """
        :param seed: Decides the noise on the start pose.
        :param options: Unused.
        :return: The first observation, of shape (n,), and its info.
        """
        self._needs_reset = False
        return super().reset(seed=seed, options=options)  # type: ignore[misc]

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """
        :param action: Torques, of shape (n_actuators,), within the action space's bounds.
        :return: (obs, reward, terminated, truncated, info) of the MuJoCo environment, with the speed over this step, m/s,
            as ``info["cost"]``: of the x velocity, or of the x and y velocities where the walker can turn.
        :raises ResetNeeded: Before the first ``reset``.
        :raises ValueError: If the action has the wrong shape or isn't finite.
        """
        if self._needs_reset:
            raise ResetNeeded("This environment has not been reset: call reset() before the first step().")
        action = checked_action(action, self.action_space)  # type: ignore[attr-defined]
        obs, reward, terminated, truncated, info = super().step(action)  # type: ignore[misc]
        info["cost"] = float(np.hypot(info["x_velocity"], info.get("y_velocity", 0.0)))
        return obs, float(reward), bool(terminated), bool(truncated), info

    def render(self) -> Any:
        """:return: An image of shape (height, width, 3), or the depths of shape (height, width)."""
        make_current(self.mujoco_renderer._viewers.values())
        return super().render()  # type: ignore[misc]

    def close(self) -> None:
        """Close the drawing contexts that rendering opened."""
        release(self.mujoco_renderer._viewers.values())
        super().close()  # type: ignore[misc]


class AntSpeedEnv(SpeedMixin, AntEnv):
    """Ant, 27 observations, 8 torques."""

    settings: ClassVar[dict[str, Any]] = {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0.0}


class HalfCheetahSpeedEnv(SpeedMixin, HalfCheetahEnv):
    """HalfCheetah, 17 observations, 6 torques."""


class HopperSpeedEnv(SpeedMixin, HopperEnv):
    """Hopper, 11 observations, 3 torques."""


class HumanoidSpeedEnv(SpeedMixin, HumanoidEnv):
    """Humanoid, 45 observations, 17 torques."""

    settings: ClassVar[dict[str, Any]] = {
        "include_cinert_in_observation": False,
        "include_cvel_in_observation": False,
        "include_qfrc_actuator_in_observation": False,
        "include_cfrc_ext_in_observation": False,
        "contact_cost_weight": 0.0,
    }
