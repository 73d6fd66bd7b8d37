"""A tiny constrained task with a known optimum in closed form, for tests and first trials. It needs no simulator."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

EPISODE_LENGTH = 100
"""Steps per episode, the registered time limit."""


class TwoModesEnv(gym.Env[np.ndarray, np.ndarray]):
    """
    Push as hard as the cost limit allows, to either side, and keep the tracker on the target.

    Each step shows a target ``s``, uniform in [-0.5, 0.5]. The action is ``(push, track)`` in [-1, 1]:

    - reward: ``|push| - (track - s)**2``
    - cost: ``push**2``, in ``info["cost"]``

    The next target does not depend on the action, so an episode of T steps with cost limit d is T times the same problem.
    The reward grows like the square root of the cost. The optimal policy therefore spends the limit evenly:
    ``|push| = sqrt(d / T)`` and ``track = s``, with return ``sqrt(d * T)``. Left and right are equally good, which gives the
    optimal policy two modes. Without the constraint, ``|push| = 1`` would be optimal.

    Episodes only end by the registered time limit of 100 steps.

    :param cost_limit: The cost limit d of an episode of 100 steps. The default of 64 allows pushes of 0.8.
    :param render_mode: ``"rgb_array"`` or None.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    cost_limit_discounted = False

    def __init__(self, cost_limit: float = 64.0, render_mode: str | None = None) -> None:
        self.cost_limit = cost_limit
        self.render_mode = render_mode
        self.observation_space = spaces.Box(-0.5, 0.5, shape=(1,), dtype=np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, shape=(2,), dtype=np.float32)
        self._action = np.zeros(2)
        self._shown = 0.0

    @property
    def optimal_return(self) -> float:
        """The return of the optimal policy within the limit."""
        return EPISODE_LENGTH * self.optimal_push

    @property
    def optimal_push(self) -> float:
        """The absolute push of the optimal policy within the limit."""
        return min(float(np.sqrt(self.cost_limit / EPISODE_LENGTH)), 1.0)

    def mode_shares(self, targets: np.ndarray, actions: np.ndarray, radius: float = 0.25) -> tuple[float, float]:
        """
        How often a policy chooses one of the two optimal actions.

        :param targets: Observations of shape (n, 1).
        :param actions: The policy's actions for them, of shape (n, 2).
        :param radius: The largest distance from an optimal action that counts as a hit.
        :return: The shares of actions at the left and at the right mode. The rest is at neither.
        """
        track_error = actions[:, 1] - targets[:, 0]
        left, right = (
            np.hypot(actions[:, 0] - push, track_error) < radius for push in (-self.optimal_push, self.optimal_push)
        )
        return float(left.mean()), float(right.mean())

    def _observe(self) -> np.ndarray:
        self._target = self.np_random.uniform(-0.5, 0.5, size=1).astype(np.float32)
        return self._target

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """
        Start an episode.

        :param seed: The seed of the targets.
        :param options: Not used.
        :return: The first target, of shape (1,), and an empty info.
        """
        super().reset(seed=seed)
        self._action = np.zeros(2)
        observation = self._observe()
        self._shown = float(observation[0])
        return observation, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """
        Take a step.

        :param action: (push, track), of shape (2,).
        :return: (obs, reward, terminated, truncated, info). ``info["cost"]`` is the cost of the step.
        """
        push, track = np.clip(action, -1.0, 1.0)
        reward = float(abs(push) - (track - self._target[0]) ** 2)
        self._action, self._shown = np.array([push, track]), float(self._target[0])
        return self._observe(), reward, False, False, {"cost": float(push**2)}

    def render(self) -> np.ndarray | None:
        """
        Draw the last step.

        The upper half shows the push as a bar, with dark lines at the two optimal pushes. A red bar costs more than the limit
        allows on average. The lower half shows the target as a line and the tracker as a square.

        :return: An image of shape (height, width, 3), or None without ``render_mode="rgb_array"``.
        """
        if self.render_mode != "rgb_array":
            return None
        height, width = 160, 320

        def column(x: float) -> int:
            return round((width - 1) * (x + 1.1) / 2.2)

        picture = np.full((height, width, 3), 255, dtype=np.uint8)
        push, track = self._action
        too_hard = abs(push) > 1.05 * self.optimal_push
        left, right = sorted((column(0.0), column(push)))
        picture[30:60, left : right + 1] = (178, 24, 43) if too_hard else (0, 114, 178)
        for x in (-self.optimal_push, self.optimal_push):
            picture[20:70, column(x) - 1 : column(x) + 2] = 51
        picture[20:70, column(0.0)] = 153
        picture[100:140, column(self._shown) - 1 : column(self._shown) + 2] = 51
        picture[113:127, column(track) - 7 : column(track) + 8] = (230, 159, 0)
        return picture
