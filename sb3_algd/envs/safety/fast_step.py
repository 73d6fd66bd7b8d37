"""Faster steps for Safety-Gymnasium's navigation tasks, with bit-identical results.

The package looks up every position, sensor and contact by name in each step. The meaning of a name only changes when the
world is rebuilt. So this module looks up the names once per reset and reads the same numbers by index after that. The
arithmetic keeps the order of operations. Matrix products and transcendental functions use the same NumPy function on the
same operands, stacked, because another function could round differently.

Faster resets are in :mod:`sb3_algd.envs.safety.fast_reset`.
"""

from typing import Any

import mujoco
import numpy as np

from sb3_algd.envs.safety.fast_reset import distance_between, model_with_sky, sample_layout, without_sky


def fast_task_class(task_class: type) -> type:
    """
    :param task_class: A navigation task class of the package.
    :return: A faster subclass with the same results.
    """
    mixin = FastButtonMixin if task_class.__name__.startswith("Button") else FastMixin
    return type(f"Fast{task_class.__name__}", (mixin, task_class), {})


def body_ids(model: Any, obstacle: Any) -> list[int]:
    """
    :param model: The MuJoCo model.
    :param obstacle: One of the task's kinds of object.
    :return: The ids of the bodies at the positions of these objects.
    """
    if obstacle.name == "circle":
        return [0]  # The circle is at the origin, like MuJoCo's world body.
    if not hasattr(obstacle, "num"):
        return [int(model.body(obstacle.name).id)]
    suffix = "obj" if obstacle.type == "mocaps" else ""
    return [int(model.body(f"{obstacle.name[:-1]}{i}{suffix}").id) for i in range(obstacle.num)]


class Sensors:
    """
    Writes an agent's sensor values to the front of a flat observation.

    :param task: The task. Its world is already built.
    """

    def __init__(self, task: Any) -> None:
        agent, model = task.agent, task.model
        as_components = agent.sensor_conf.sensors_angle_components
        hinges = set(agent.sensor_info.hinge_pos_names) if as_components else set()
        balls = set(agent.sensor_info.ballquat_names) if as_components else set()
        copied: list[tuple[int, int]] = []
        angles: list[tuple[int, int]] = []
        self._quaternions: list[tuple[int, int]] = []
        self.size = 0
        for name, space in agent.build_sensor_observation_space().items():
            address = int(model.sensor_adr[model.sensor(name).id])
            if name in hinges:
                angles.append((address, self.size))
            elif name in balls:
                self._quaternions.append((address, self.size))
            else:
                # Only the z position of a free joint is observed.
                address += 2 if name == agent.sensor_info.freejoint_pos_name else 0
                copied.extend((address + i, self.size + i) for i in range(space.shape[0]))
            self.size += int(np.prod(space.shape))
        self._values = task.data.sensordata
        self._copy_from, self._copy_to = np.array(copied, dtype=np.intp).reshape(-1, 2).T
        self._angle_from, self._angle_to = np.array(angles, dtype=np.intp).reshape(-1, 2).T

    def read_into(self, flat: np.ndarray) -> None:
        """:param flat: The observation of shape (n,). The first :attr:`size` numbers are set."""
        flat[self._copy_to] = self._values[self._copy_from]
        if len(self._angle_from) > 0:
            angles = self._values[self._angle_from]
            flat[self._angle_to] = np.sin(angles)
            flat[self._angle_to + 1] = np.cos(angles)
        for address, start in self._quaternions:
            mujoco.mju_quat2Mat(flat[start : start + 9], self._values[address : address + 4])


class Lidars:
    """
    Writes the lidar values of all kinds of object to a flat observation.

    :param task: The task. Its world is already built.
    :param start: The index of the first lidar value in the observation.
    """

    def __init__(self, task: Any, start: int) -> None:
        self._data = task.data
        self._agent = int(task.model.body("agent").id)
        self._bins: int = task.lidar_conf.num_bins
        self._max_dist: float = task.lidar_conf.max_dist
        self.starts: dict[str, int] = {}
        bodies: list[int] = []
        self._bin_starts: list[int] = []
        for obstacle in task._obstacles:
            if obstacle.is_lidar_observed:
                ids = body_ids(task.model, obstacle)
                bodies.extend(ids)
                self._bin_starts.extend([start] * len(ids))
                self.starts[obstacle.name] = start
                start += self._bins
        self._bodies = np.array(bodies, dtype=np.intp)
        self._on_floor = np.zeros((len(bodies), 1, 3))

    def read_into(self, flat: np.ndarray) -> None:
        """:param flat: The observation of shape (n,). The lidar values have to be zero before."""
        if len(self._bodies) == 0:
            return
        rotation = self._data.xmat[self._agent].reshape(3, 3)
        self._on_floor[:, 0, :2] = self._data.xpos[self._bodies, :2]
        # NumPy uses the same routine for stacked (1, 3) by (3, 3) products as for single ones, but not for (n, 3) by (3, 3).
        seen = np.matmul(self._on_floor - self._data.xpos[self._agent], rotation)[:, 0, :]
        distances = np.abs(seen[:, 0] + 1j * seen[:, 1]).tolist()
        angles = (np.arctan2(seen[:, 1], seen[:, 0]) % (np.pi * 2)).tolist()
        bin_size = (np.pi * 2) / self._bins
        for distance, angle, start in zip(distances, angles, self._bin_starts, strict=True):
            index = int(angle / bin_size)
            share = (angle - bin_size * index) / bin_size
            closeness = max(0, self._max_dist - distance) / self._max_dist
            # Neighbouring bins get a share of the reading, so that it changes without jumps.
            for position, value in (
                (start + index, closeness),
                (start + (index + 1) % self._bins, share * closeness),
                (start + (index - 1) % self._bins, (1 - share) * closeness),
            ):
                if value > flat[position]:
                    flat[position] = value


class Costs:
    """
    Computes the costs of a task's objects with the rules of the package.

    :param task: The task. Its world is already built.
    """

    def __init__(self, task: Any) -> None:
        self._data = task.data
        self._model = task.model
        self._obstacles = task._obstacles
        self._agent = int(task.model.body("agent").id)
        agent_geoms = set(task.agent.body_info.geom_names)
        self.geom_names = [task.model.geom(i).name for i in range(task.model.ngeom)]
        self._is_agent = [name in agent_geoms for name in self.geom_names]
        self._bodies = {
            obstacle.name: body_ids(task.model, obstacle)
            for obstacle in self._obstacles
            if obstacle.name in ("hazards", "vases")
        }
        self._jacobian = np.zeros((3, task.model.nv))

    def touched(self) -> list[tuple[str, str]]:
        """:return: The names of the two geoms for each contact of the agent."""
        is_agent, names = self._is_agent, self.geom_names
        return [(names[a], names[b]) for a, b in self._data.contact.geom.tolist() if is_agent[a] or is_agent[b]]

    def of_step(self) -> dict[str, Any]:
        """:return: The cost of each kind of object with the package's keys, and their sum as ``cost_sum``."""
        touched = self.touched()
        costs: dict[str, Any] = {}
        for obstacle in self._obstacles:
            if not obstacle.is_constrained:
                continue
            if obstacle.name == "buttons":
                if obstacle.timer == 0:
                    goal = f"button{obstacle.goal_button}"
                    others = [pair for pair in touched if goal not in pair]
                    costs["cost_buttons"] = count(others, "button") * obstacle.cost
            elif obstacle.name == "hazards":
                costs["cost_hazards"] = self._hazards(obstacle)
            elif obstacle.name == "pillars":
                costs["cost_pillars"] = count(touched, "pillar") * obstacle.cost
            elif obstacle.name == "gremlins":
                costs["cost_gremlins"] = count(touched, "gremlin") * obstacle.contact_cost
            elif obstacle.name == "vases" and not obstacle.displace_cost:
                costs["cost_vases_contact"] = count(touched, "vase") * obstacle.contact_cost
                costs["cost_vases_velocity"] = self._vases_velocity(obstacle)
            else:
                costs.update(obstacle.cal_cost())
        costs["cost_sum"] = sum(costs.values())
        return costs

    def _hazards(self, hazards: Any) -> float:
        x, y = self._data.xpos[self._agent, :2].tolist()
        cost = 0.0
        for hazard_x, hazard_y in self._data.xpos[self._bodies["hazards"], :2].tolist():
            distance = distance_between(x, y, hazard_x, hazard_y)
            if distance <= hazards.size:
                cost += hazards.cost * (hazards.size - distance)
        return cost

    def _vases_velocity(self, vases: Any) -> float:
        cost = 0.0
        for body in self._bodies["vases"]:
            mujoco.mj_jacBody(self._model, self._data, self._jacobian, None, body)
            speed = np.sqrt(np.sum(np.square(np.dot(self._jacobian, self._data.qvel))))
            if speed >= vases.velocity_threshold:
                cost += speed * vases.velocity_cost
        return cost


def count(pairs: list[tuple[str, str]], kind: str) -> int:
    """
    :param pairs: The names of two geoms for each contact.
    :param kind: The beginning of the names to count.
    :return: The number of contacts in which one of the names begins with ``kind``.
    """
    return sum(a.startswith(kind) or b.startswith(kind) for a, b in pairs)


def moved_through_ids(gremlins: Any) -> Any:
    """
    :param gremlins: The task's gremlins. Their world is already built.
    :return: A function that moves them along their circles. It replaces their method ``move``.
    """
    data, model = gremlins.engine.data, gremlins.engine.model
    ids = [int(model.body_mocapid[model.body(f"gremlin{i}mocap").id]) for i in range(gremlins.num)]
    position = np.array([0.0, 0.0, gremlins.size])

    def move() -> None:
        position[0] = np.sin(data.time) * gremlins.travel
        position[1] = np.cos(data.time) * gremlins.travel
        data.mocap_pos[ids] = position

    return move


class FastMixin:
    """Mixin for a task class of the package. It reads by index where the task class looks up names."""

    def _build(self) -> None:
        task: Any = self
        task.random_generator.sample_layout = lambda: sample_layout(task.random_generator)
        with without_sky():
            super()._build()  # type: ignore[misc]
        self._costs = Costs(task)
        self._sensors = Sensors(task)
        self._lidars = Lidars(task, self._sensors.size)
        for mocap in task._mocaps.values():
            mocap.move = moved_through_ids(mocap)

    def _get_viewer(self, mode: str) -> Any:
        task: Any = self
        if mode in task._viewers:
            return super()._get_viewer(mode)  # type: ignore[misc]
        # A new viewer copies the textures of its model to the graphics card and keeps them there.
        engine, model = task.world.engine, task.model
        engine.model = model_with_sky(task.world)
        try:
            viewer = super()._get_viewer(mode)  # type: ignore[misc]
        finally:
            engine.model = model
        viewer.model = model
        return viewer

    def calculate_cost(self) -> dict[str, Any]:
        """:return: The costs of this step by key, before the package turns them into indicators."""
        task: Any = self
        mujoco.mj_forward(task.model, task.data)
        return self._costs.of_step()

    def obs(self) -> np.ndarray:
        """
        :return: The observation, of the shape and type of the task's observation space.
        :raises ValueError: If the observation is not in the space, which means that the simulation has become unstable.
        """
        task: Any = self
        mujoco.mj_forward(task.model, task.data)
        space = task.observation_space
        flat = np.zeros(space.shape)
        self._sensors.read_into(flat)
        self._lidars.read_into(flat)
        if not ((flat >= space.low) & (flat <= space.high)).all():
            raise ValueError(f"The simulation has become unstable: {flat} is not in the observation space.")
        return flat


class FastButtonMixin(FastMixin):
    """Mixin for the Button tasks: the agent presses a target, and for a while after that it does not see the buttons."""

    def obs(self) -> np.ndarray:
        """:return: The observation. The lidar of the buttons is zero for a while after the target was pressed."""
        task: Any = self
        flat = super().obs()
        if task.buttons.timer != 0:
            start = self._lidars.starts["buttons"]
            flat[start : start + task.lidar_conf.num_bins] = 0.0
        return flat

    @property
    def goal_achieved(self) -> bool:
        """Whether the agent touches the target button."""
        task: Any = self
        goal = f"button{task.buttons.goal_button}"
        return any(goal in pair for pair in self._costs.touched())
