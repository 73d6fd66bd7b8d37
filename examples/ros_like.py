"""
An exported policy in a node as ROS has them: an observation comes in, an action goes out. ROS is not needed to run it.

On a robot, `Node` is `rclpy.node.Node`, `Message` is `std_msgs.msg.Float32MultiArray`, and `PolicyNode` stays as it is. It
needs NumPy and onnxruntime, not PyTorch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import gymnasium as gym

from sb3_algd_runtime import Agent

STOP = (0.0, 0.0)


@dataclass
class Message:
    """Numbers on a topic."""

    data: list[float] = field(default_factory=list)


class Node:
    """What the example takes of ROS: topics within this process."""

    #: Who listens
    topics: dict[str, list[Callable[[Message], None]]] = {}  # noqa: RUF012

    def __init__(self, name: str) -> None:
        self.name = name

    def create_subscription(self, kind: type[Message], topic: str, callback: Callable[[Message], None], depth: int) -> None:
        """Let a function be called with each message on a topic."""
        self.topics.setdefault(topic, []).append(callback)

    def create_publisher(self, kind: type[Message], topic: str, depth: int) -> "Publisher":
        """Make what sends messages to a topic."""
        return Publisher(self.topics.setdefault(topic, []))


@dataclass
class Publisher:
    """Sends messages to those who listen."""

    listeners: list[Callable[[Message], None]]

    def publish(self, message: Message) -> None:
        """:param message: What is sent."""
        for listener in self.listeners:
            listener(message)


class PolicyNode(Node):
    """
    Answers each observation with an action, and one that the policy cannot take with a stop.

    :param path: The exported policy.
    """

    def __init__(self, path: Path) -> None:
        super().__init__("policy")
        self.agent = Agent.load(path, seed=0)
        self.publisher = self.create_publisher(Message, "action", 1)
        # A queue of one: an old observation is worse than none
        self.create_subscription(Message, "observation", self.on_observation, 1)

    def on_observation(self, message: Message) -> None:
        """:param message: The observation, as the environment gave it in training: not normalised."""
        try:
            action = self.agent.act(message.data).tolist()
        except ValueError as error:
            print(f"Stopped: {error}")
            action = list(STOP)
        self.publisher.publish(Message(action))


def export(steps: int, path: Path) -> None:
    """:param steps: Environment steps of a training. :param path: Where its policy goes."""
    from sb3_algd import ALGD
    from sb3_algd.export import export_onnx

    model = ALGD("DiffusionPolicy", "TwoModes-v0", policy_kwargs=dict(net_arch=[64, 64]), seed=0)
    model.learn(total_timesteps=steps)
    export_onnx(model, path)


def main(steps: int = 800) -> None:
    """:param steps: Environment steps of the training."""
    path = Path("agent.onnx")
    export(steps, path)
    node = PolicyNode(path)
    actions: list[list[float]] = []
    robot = Node("robot")
    robot.create_subscription(Message, "action", lambda message: actions.append(message.data), 1)
    sensors = robot.create_publisher(Message, "observation", 1)

    env = gym.make(node.agent.metadata["task"])
    observation, _ = env.reset(seed=0)
    cost, done = 0.0, False
    while not done:
        sensors.publish(Message(observation.tolist()))
        observation, _, terminated, truncated, info = env.step(actions[-1])
        cost, done = cost + info["cost"], terminated or truncated
    sensors.publish(Message([float("nan")]))
    assert actions[-1] == list(STOP)
    print(f"{len(actions) - 1} actions, cost {cost:.1f}, limit {node.agent.metadata['cost_limit'][0]:g}")


if __name__ == "__main__":
    main()
