"""Whether the cost critics expect what is paid: the number to look at where a limit is not kept."""

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecNormalize

from sb3_algd.common.batches import move_batch
from sb3_algd.common.buffers import CostStorage
from sb3_algd.common.critics import EnsembleCritic


def newest_transitions(replay_buffer: CostStorage, length: int) -> np.ndarray:
    """
    :param replay_buffer: The replay buffer.
    :param length: Number of steps.
    :return: Rows of the newest steps, oldest first, as many as there are.
    """
    length = min(length, replay_buffer.size())
    return (replay_buffer.pos - length + np.arange(length)) % replay_buffer.buffer_size


def paid_costs(costs: np.ndarray, dones: np.ndarray, cost_gamma: float) -> np.ndarray:
    """
    Discounted costs from each step on, to the end of what is given.

    :param costs: Shape (steps, n_c).
    :param dones: Whether an episode ended with the step, shape (steps,).
    :param cost_gamma: Discount factor.
    :return: Shape (steps, n_c).
    """
    paid = np.zeros((len(costs) + 1, costs.shape[1]))
    for step in reversed(range(len(costs))):
        paid[step] = costs[step] + (0.0 if dones[step] else cost_gamma) * paid[step + 1]
    return paid[:-1]


@th.no_grad()
def expected_and_paid(
    cost_critic: EnsembleCritic, replay_buffer: CostStorage, horizon: int, cost_gamma: float, env: VecNormalize | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """
    What the cost critics expect along the newest steps of the first environment, and what was paid from there on.

    The very last steps are left out: what comes after them is not known yet.

    :param cost_critic: The cost critics.
    :param replay_buffer: The replay buffer.
    :param horizon: Number of steps.
    :param cost_gamma: Discount factor of the costs.
    :param env: Normalises observations, None for none.
    :return: Mean of what is expected by all critics, in the unit that they learn in, and of what was paid, each of shape
        (n_c,); None before there are enough steps.
    """
    tail = min(round(2.0 / max(1.0 - cost_gamma, 1e-8)), horizon)
    rows = newest_transitions(replay_buffer, horizon + tail)
    if len(rows) < horizon + tail:
        return None
    paid = paid_costs(replay_buffer.costs[rows, 0], replay_buffer.dones[rows, 0], cost_gamma)[:horizon]
    rows, first = rows[:horizon], np.zeros(horizon, dtype=int)
    observations = replay_buffer._lookup(replay_buffer.observations, rows, first, env)
    actions = replay_buffer.to_torch(replay_buffer.actions[rows, first])
    if cost_critic.device.type != "cpu":
        observations, actions = move_batch((observations, actions), cost_critic.device)
    expected = cost_critic(observations, actions).mean(dim=(0, 1))
    return expected.cpu().numpy(), paid.mean(axis=0)
