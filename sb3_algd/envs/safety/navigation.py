"""Safety-Gymnasium's navigation tasks (Goal, Button, Push, Circle, Run) as Gymnasium environments."""

from typing import Any

import gymnasium as gym
import numpy as np

from sb3_algd.envs.safety.adapter import is_adapted, load
from sb3_algd.envs.safety.rendering import METADATA, choose_backend, make_current, release
from sb3_algd.envs.wrappers import SixTupleEnv


class NavigationEnv(SixTupleEnv):
    """
    A navigation task of Safety-Gymnasium.

    :param task_id: The id of the task in Safety-Gymnasium, which includes the agent.
    :param agent: ``"Point"``, ``"Car"``, ``"Doggo"``, ``"Racecar"`` or ``"Ant"``.
    :param cost_limit: The limit on the sum of an episode's costs.
    :param render_mode: ``"rgb_array"``, ``"depth_array"`` or None.
    :param render_options: ``width`` and ``height`` in pixels, and ``camera_name`` (``"vision"`` from the agent, ``"track"``
        behind it, ``"fixednear"``, ``"fixedfar"``) or ``camera_id``.
    """

    metadata = METADATA

    def __init__(
        self, task_id: str, agent: str, cost_limit: float, render_mode: str | None = None, **render_options: Any
    ) -> None:
        load()
        choose_backend()
        from safety_gymnasium import tasks
        from safety_gymnasium.builder import Builder
        from safety_gymnasium.utils.task_utils import get_task_class_name

        task_class = self._task_class(getattr(tasks, get_task_class_name(task_id)))

        class TaskBuilder(Builder):
            """The package's builder with our task class."""

            def _get_task(self) -> Any:
                task = task_class(config=self.config)
                task.build_observation_space()
                return task

        # The package creates a float64 Box with float32 bounds, for which NumPy warns about an overflow.
        with np.errstate(over="ignore"):
            builder = TaskBuilder(task_id, config={"agent_name": agent}, render_mode=render_mode, **render_options)
        super().__init__(builder, cost_limit)
        self.metadata = {**builder.metadata, **METADATA}
        self.task = builder.task

    def _task_class(self, task_class: type) -> type:
        """
        :param task_class: The package's class of the task.
        :return: The class to use instead.
        """
        if not is_adapted():
            return task_class
        from sb3_algd.envs.safety.fast_step import fast_task_class

        return fast_task_class(task_class)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """
        :param seed: The seed of the layout, and of the next layouts if later calls give no seed. It has no effect on a task
            with a fixed layout.
        :param options: Not used.
        :return: The first observation, of shape (n,), and an empty info.
        """
        gym.Env.reset(self, seed=seed)
        # The package refuses a seed if the layout is fixed.
        return super().reset(seed=seed if self.task.mechanism_conf.randomize_layout else None, options=options)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """
        :param action: Of shape (n_actuators,).
        :return: As in :class:`sb3_algd.envs.wrappers.SixTupleEnv`. ``info["goal_met"]`` says whether this step reached the
            target. ``info["cost_hazards"]`` and similar keys are the costs of each kind of object.
        """
        obs, reward, terminated, truncated, info = super().step(action)
        info.setdefault("goal_met", False)
        return obs, reward, terminated, truncated, info

    def render(self) -> Any:
        """:return: An image of shape (height, width, 3), or the depths of shape (height, width)."""
        make_current(self.task._viewers.values())
        return super().render()

    def close(self) -> None:
        """Close the rendering contexts."""
        release(self.task._viewers.values())
        for viewer in self.task._viewers.values():
            viewer.close()
        self.task._viewers.clear()
        self.task.viewer = None
