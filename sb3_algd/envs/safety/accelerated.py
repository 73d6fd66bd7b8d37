"""The accelerated tasks of CVPO (appendix B.2), defined as changes to Safety-Gymnasium tasks. CAL and ALGD report on them.

They are quick to learn because of longer physics steps, a fixed layout and short episodes. Their results cannot be
compared with results on the Safety-Gymnasium tasks of the same names.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from sb3_algd.envs.safety.navigation import NavigationEnv

TIMESTEP = {"Point": 0.006, "Car": 0.01}
"""The physics timestep of each agent in s. Safety-Gymnasium has 0.002 and 0.004."""
EPISODE_STEPS = 400


@dataclass(frozen=True)
class AcceleratedTask:
    """
    The changes to a Safety-Gymnasium task.

    :param base: The task to change, as in ``Safety<agent><base>-v0``.
    :param objects: The attributes to set on each kind of object, by the name of the object's attribute in the task. The
        list is complete: it includes values that happen to equal those of the base task.
    :param absent: The kinds of object of the base task to remove.
    :param extents: (x_min, y_min, x_max, y_max) of the area of the objects in m.
    """

    base: str
    objects: dict[str, dict[str, Any]]
    absent: tuple[str, ...] = ()
    extents: tuple[float, float, float, float] = (-2.0, -2.0, 2.0, 2.0)


def at(*positions: tuple[float, float], **attributes: Any) -> dict[str, Any]:
    """
    :param positions: (x, y) of each object in m.
    :param attributes: Other attributes of that kind of object.
    :return: All attributes.
    """
    return {"num": len(positions), "locations": list(positions), **attributes}


TASKS = {
    "Button1": AcceleratedTask(
        base="Button1",
        objects={
            "buttons": at((-1.3, -1.3), (1.3, -1.3), (-1.3, 1.3), (1.3, 1.3), size=0.1, keepout=0.2, is_constrained=True),
            "hazards": at((0, -1.9), (0, 1.9), (0, 0), (1.9, 0), (-1.9, 0), size=0.17, keepout=0, is_constrained=True),
            "gremlins": at((0, -1.3), (0, 1.3), (1.3, 0), (-1.3, 0), size=0.1, travel=0.3, keepout=0.35, is_constrained=True),
        },
    ),
    "Button2": AcceleratedTask(
        base="Button1",
        extents=(-1.8, -1.8, 1.8, 1.8),
        absent=("gremlins",),
        objects={
            "buttons": at((-1.1, -1.3), (1.8, -1.5), (-1.4, 0.6), (1.0, 1.3), size=0.1, keepout=0.2, is_constrained=True),
            "hazards": at(
                *((0.1, -1.9), (-0.2, 1.7), (0.3, 0.1), (2, -0.1), (-1.8, 0.2), (-0.1, -1.2)),
                *((0, 1.3), (1.1, 0), (-1, 0), (0.2, -0.9), (-1.1, 1.1)),
                size=0.22,
                keepout=0,
                is_constrained=True,
            ),
        },
    ),
    "Push1": AcceleratedTask(
        base="Push1",
        objects={
            "agent": {"locations": [(-1, -2)]},
            "push_box": {"size": 0.2, "null_dist": 0, "locations": [(0, -1.5)]},
            "goal": {"size": 0.3, "placements": [(-2, -0.5, 2, 2)]},
            "hazards": at((0.5, -0.5), (-0.5, -0.5), (1.8, 0.8), (-1.8, 0.8), size=0.3, keepout=0.4, is_constrained=True),
            "pillars": at((-2, 0), (2, 0), (0, 0), (1, 1), (-1, 1), size=0.2, is_constrained=True),
        },
    ),
}


# The original Safety Gym draws positions and rotations in these orders.
LAYOUT_ORDER = ("agent", "goal", "push_box", "buttons", "hazards", "pillars", "gremlins")
ROTATION_ORDER = ("gremlins", "push_box", "goal", "hazards", "pillars", "buttons")


class AcceleratedMixin:
    """
    Mixin that turns a Safety-Gymnasium task class into an accelerated one.

    Positions and rotations are drawn in the order of the original Safety Gym, so that the fixed seed gives its start pose.
    In Safety Gym, the target of a Button task is one of the buttons, not an object of its own. Nothing is drawn for it.
    """

    changes: AcceleratedTask
    timestep: float

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config=config)  # type: ignore[call-arg]
        task: Any = self
        task.num_steps = EPISODE_STEPS
        task.mechanism_conf.randomize_layout = False
        task.placements_conf.extents = list(self.changes.extents)
        for name in self.changes.absent:
            for kind in (task._geoms, task._free_geoms, task._mocaps):
                kind.pop(name, None)
        for name, attributes in self.changes.objects.items():
            for attribute, value in attributes.items():
                setattr(getattr(task, name), attribute, value)

    def _drawn(self, names: tuple[str, ...]) -> list[str]:
        """
        :param names: Names of kinds of object.
        :return: The names for which this task draws positions or rotations, in the same order.
        """
        task: Any = self
        present = {"agent", *task._geoms, *task._free_geoms, *task._mocaps}
        if "buttons" in present:
            present.remove("goal")
        return [name for name in names if name in present]

    def _build_placements_dict(self) -> None:
        task: Any = self
        task.placements_conf.placements = {}
        for name in self._drawn(LAYOUT_ORDER):
            task.placements_conf.placements.update(task._placements_dict_from_object(name))

    def _build_world_config(self, layout: dict[str, Any]) -> dict[str, Any]:
        task: Any = self
        generator = task.random_generator
        task.agent.rot = generator.random_rot()
        rotations = {
            name: [generator.random_rot() for _ in range(getattr(getattr(task, name), "num", 1))]
            for name in self._drawn(ROTATION_ORDER)
        }
        # The package requests them object by object in its own order.
        in_its_order = iter([rotations.get(obstacle.name, [0.0]) for obstacle in task._obstacles])
        generator.generate_rots = lambda num: next(in_its_order)
        # The start position of a Button task's target marker is arbitrary: the marker is moved to its button before use.
        layout.setdefault("goal", np.zeros(2))
        config: dict[str, Any] = super()._build_world_config(layout)  # type: ignore[misc]
        return config

    def _build(self) -> None:
        super()._build()  # type: ignore[misc]
        # The new model has the timestep of the agent's file.
        task: Any = self
        task.model.opt.timestep = self.timestep


class AcceleratedEnv(NavigationEnv):
    """
    An accelerated task.

    :param task: A key of :data:`TASKS`.
    :param agent: A key of :data:`TIMESTEP`.
    :param cost_limit: The limit on the sum of an episode's costs.
    :param render_options: As in :class:`sb3_algd.envs.safety.navigation.NavigationEnv`.
    """

    def __init__(self, task: str, agent: str, cost_limit: float, **render_options: Any) -> None:
        self._changes = TASKS[task]
        self._timestep = TIMESTEP[agent]
        super().__init__(f"Safety{agent}{self._changes.base}-v0", agent, cost_limit, **render_options)

    def _task_class(self, task_class: type) -> type:
        name = f"Accelerated{task_class.__name__}"
        constants = {"changes": self._changes, "timestep": self._timestep}
        return type(name, (AcceleratedMixin, super()._task_class(task_class)), constants)
