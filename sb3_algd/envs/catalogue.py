"""The ids that this package registers, in one table."""

from dataclasses import dataclass, field
from typing import Any

STOCK, ACCELERATED, SPEED, OWN = "stock", "accelerated", "speed", "own"
"""The tracks. Results of different tracks cannot be compared, even if the task names are similar."""

AGENTS = ("Point", "Car", "Doggo", "Racecar", "Ant")
NAVIGATION = {"Goal": (3, 1000), "Button": (3, 1000), "Push": (3, 1000), "Circle": (3, 500), "Run": (1, 500)}
"""The number of levels and the steps per episode of each kind of navigation task."""
WALKERS = ("Ant", "HalfCheetah", "Hopper", "Humanoid", "Swimmer", "Walker2d")
ACCELERATED_TASKS = (("Point", "Button1"), ("Point", "Button2"), ("Car", "Button1"), ("Car", "Button2"), ("Point", "Push1"))
SPEED_LIMITS = {"Ant": 103.115, "HalfCheetah": 151.989, "Hopper": 82.748, "Humanoid": 20.140}
"""Limits on the discounted sum of speeds in m/s, with discount factor 0.99."""

STOCK_LIMIT = 25.0
ACCELERATED_LIMIT = 10.0


@dataclass(frozen=True)
class Entry:
    """
    One registered environment.

    :param id: The id in Gymnasium.
    :param track: One of the four tracks.
    :param entry_point: The class as ``"module:name"``. The module is imported when the first environment is made.
    :param episode_steps: The time limit of an episode in steps.
    :param kwargs: The keyword arguments of the class.
    """

    id: str
    track: str
    entry_point: str
    episode_steps: int
    kwargs: dict[str, Any] = field(default_factory=dict)


def entries() -> list[Entry]:
    """:return: All environments of this package, track by track."""
    envs, safety = "sb3_algd.envs", "sb3_algd.envs.safety"
    table = []
    for task, (levels, steps) in NAVIGATION.items():
        for agent in AGENTS:
            for level in range(levels):
                task_id = f"Safety{agent}{task}{level}-v0"
                kwargs = {"task_id": task_id, "agent": agent, "cost_limit": STOCK_LIMIT}
                table.append(Entry(task_id, STOCK, f"{safety}.navigation:NavigationEnv", steps, kwargs))
    for walker in WALKERS:
        kwargs = {"walker": walker, "cost_limit": STOCK_LIMIT}
        table.append(Entry(f"Safety{walker}Velocity-v1", STOCK, f"{safety}.velocity:VelocityEnv", 1000, kwargs))
    for agent, task in ACCELERATED_TASKS:
        kwargs = {"task": task, "agent": agent, "cost_limit": ACCELERATED_LIMIT}
        table.append(Entry(f"Safexp-{agent}{task}-v0", ACCELERATED, f"{safety}.accelerated:AcceleratedEnv", 400, kwargs))
    for walker, limit in SPEED_LIMITS.items():
        table.append(Entry(f"{walker}Speed-v0", SPEED, f"{safety}.speed:{walker}SpeedEnv", 1000, {"cost_limit": limit}))
    table.append(Entry("TwoModes-v0", OWN, f"{envs}.toy:TwoModesEnv", 100))
    return table
