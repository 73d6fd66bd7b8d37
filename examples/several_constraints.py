"""Two constraints: the environment reports two costs per step, and each has a limit and a multiplier of its own."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from sb3_algd import ALGD, evaluate_policy


class Corridor(gym.Env[np.ndarray, np.ndarray]):
    """Walk right as fast as possible. Speed costs, and so does leaving the middle of the corridor."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    #: Per episode: steps that are too fast, steps that are aside
    cost_limit = (40.0, 10.0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """:param seed: Seed. :param options: Not used. :return: First observation and info."""
        super().reset(seed=seed)
        self.position = np.array([0.0, self.np_random.uniform(-0.5, 0.5)])
        return self.position.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """:param action: Speed to the right and to the left. :return: What Gymnasium asks for."""
        self.position = self.position + 0.1 * np.asarray(action, dtype=float)
        costs = [float(action[0] > 0.5), float(abs(self.position[1]) > 1.0)]
        return self.position.astype(np.float32), float(action[0]), False, False, {"cost": costs}


gym.register("Corridor-v0", Corridor, max_episode_steps=100)  # type: ignore[arg-type]


def main(steps: int = 3_000) -> None:
    """:param steps: Environment steps."""
    model = ALGD("DiffusionPolicy", "Corridor-v0", policy_kwargs=dict(net_arch=[64, 64]), seed=0)
    model.learn(total_timesteps=steps)
    env = model.get_env()
    assert env is not None
    mean_return, _, mean_costs, _ = evaluate_policy(model, env, n_eval_episodes=20)
    print(f"return {mean_return:.1f}")
    for name, cost, limit in zip(("too fast", "aside"), np.atleast_1d(mean_costs), model.cost_limit, strict=True):
        print(f"{name}: {cost:.1f} steps of an episode, limit {limit:g}")


if __name__ == "__main__":
    main()
