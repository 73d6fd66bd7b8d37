"""An environment of your own: it puts the cost of each step into ``info["cost"]`` and declares a limit per episode."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from sb3_algd import ALGD, evaluate_policy


class Heater(gym.Env[np.ndarray, np.ndarray]):
    """Keep a room warm. Heating costs energy, and an episode may use 20 units of it."""

    observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = spaces.Box(0.0, 1.0, (1,), np.float32)
    cost_limit = 20.0

    def _observe(self) -> np.ndarray:
        return np.array([np.clip(self.temperature / 20 - 1, -1, 1)], dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """:param seed: Seed. :param options: Not used. :return: First observation and info."""
        super().reset(seed=seed)
        self.temperature = self.np_random.uniform(10, 20)
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """:param action: Power of the heater, in [0, 1]. :return: What Gymnasium asks for."""
        power = float(action[0])
        self.temperature += 2 * power - 0.05 * self.temperature
        reward = 1 - abs(self.temperature - 21) / 21
        return self._observe(), reward, False, False, {"cost": power}


gym.register("Heater-v0", Heater, max_episode_steps=50)  # type: ignore[arg-type]


def main(steps: int = 3_000) -> None:
    """:param steps: Environment steps."""
    model = ALGD("DiffusionPolicy", "Heater-v0", policy_kwargs=dict(net_arch=[64, 64]), learning_starts=100, verbose=1, seed=0)
    model.learn(total_timesteps=steps)
    env = model.get_env()
    assert env is not None
    mean_return, _, mean_cost, _ = evaluate_policy(model, env, n_eval_episodes=20)
    print(f"return {mean_return:.1f}, energy {mean_cost:.1f} of {model.cost_limit.item():g}")


if __name__ == "__main__":
    main()
