"""The paper's MuJoCo tasks: run, while the discounted sum of speeds stays below a limit.

The physics is that of Gymnasium's version 5. Observations and rewards match the original version 3: no contact forces,
inertias or the like in the observations, and no contact cost in the reward.
"""

from typing import Any, ClassVar

import numpy as np
from gymnasium.envs.mujoco.ant_v5 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from gymnasium.envs.mujoco.humanoid_v5 import HumanoidEnv
from gymnasium.error import ResetNeeded

from sb3_algd.envs.safety.rendering import METADATA, choose_backend, make_current, release
from sb3_algd.envs.wrappers import checked_action


class SpeedMixin:
    """
    Mixin for a MuJoCo environment of Gymnasium. It adds the speed as ``info["cost"]``.

    :param cost_limit: The limit on the discounted sum of an episode's costs, with discount factor 0.99.
    :param options: Arguments of the environment: ``render_mode``, ``width``, ``camera_name``, ``reset_noise_scale``, ...
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
        :param seed: The seed of the noise on the start pose.
        :param options: Not used.
        :return: The first observation, of shape (n,), and the info of the MuJoCo environment.
        """
        self._needs_reset = False
        return super().reset(seed=seed, options=options)  # type: ignore[misc]

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """
        :param action: Torques of shape (n_actuators,), within the bounds of the action space.
        :return: (obs, reward, terminated, truncated, info) of the MuJoCo environment. ``info["cost"]`` is the speed of this
            step in m/s: the absolute x velocity, or the norm of the x and y velocities if the walker can turn.
        :raises ResetNeeded: Before the first ``reset``.
        :raises ValueError: If the action has the wrong shape or is not finite.
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
        """Close the rendering contexts."""
        release(self.mujoco_renderer._viewers.values())
        super().close()  # type: ignore[misc]


class AntSpeedEnv(SpeedMixin, AntEnv):
    """Ant with 27 observations and 8 torques."""

    settings: ClassVar[dict[str, Any]] = {"include_cfrc_ext_in_observation": False, "contact_cost_weight": 0.0}


class HalfCheetahSpeedEnv(SpeedMixin, HalfCheetahEnv):
    """HalfCheetah with 17 observations and 6 torques."""


class HopperSpeedEnv(SpeedMixin, HopperEnv):
    """Hopper with 11 observations and 3 torques."""


class HumanoidSpeedEnv(SpeedMixin, HumanoidEnv):
    """Humanoid with 45 observations and 17 torques."""

    settings: ClassVar[dict[str, Any]] = {
        "include_cinert_in_observation": False,
        "include_cvel_in_observation": False,
        "include_qfrc_actuator_in_observation": False,
        "include_cfrc_ext_in_observation": False,
        "contact_cost_weight": 0.0,
    }
