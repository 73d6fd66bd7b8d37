"""Safety-Gymnasium's velocity tasks: a MuJoCo walker should run, but not faster than a threshold."""

import importlib
from typing import Any

from sb3_algd.envs.safety.adapter import is_adapted, load
from sb3_algd.envs.safety.rendering import METADATA, choose_backend, make_current, release
from sb3_algd.envs.wrappers import SixTupleEnv

MODULES = {
    "Ant": "ant",
    "HalfCheetah": "half_cheetah",
    "Hopper": "hopper",
    "Humanoid": "humanoid",
    "Swimmer": "swimmer",
    "Walker2d": "walker2d",
}


class VelocityEnv(SixTupleEnv):
    """
    A velocity task, version 1. Each step above the speed threshold of the walker costs 1.

    :param walker: A key of :data:`MODULES`.
    :param cost_limit: The limit on the sum of an episode's costs.
    :param options: Arguments of the MuJoCo environment: ``render_mode``, ``width``, ``height``, ``camera_name``, ...
    """

    metadata = METADATA

    def __init__(self, walker: str, cost_limit: float, **options: Any) -> None:
        load()
        choose_backend()
        module = importlib.import_module(f"safety_gymnasium.tasks.safe_velocity.safety_{MODULES[walker]}_velocity_v1")
        self.walker: Any = getattr(module, f"Safety{walker}VelocityEnv")(**options)
        super().__init__(self.walker, cost_limit)
        self.metadata = {**self.walker.metadata, **METADATA}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """
        :param seed: The seed of the noise on the start pose.
        :param options: Not used.
        :return: The first observation, of shape (n,), and the walker's info.
        """
        obs, info = super().reset(seed=seed, options=options)
        if is_adapted():
            import mujoco

            # With the noise, the torso's quaternion does not have unit length. MuJoCo 2 normalised it in place before the
            # first observation. MuJoCo 3 only does so in the first step.
            mujoco.mj_normalizeQuat(self.walker.model, self.walker.data.qpos)
            obs = self.walker._get_obs()
        return obs, info

    def render(self) -> Any:
        """:return: An image of shape (height, width, 3), or the depths of shape (height, width)."""
        make_current(self.walker.mujoco_renderer._viewers.values())
        return super().render()

    def close(self) -> None:
        """Close the rendering contexts."""
        release(self.walker.mujoco_renderer._viewers.values())
        super().close()
