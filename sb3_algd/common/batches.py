"""How batches reach the device: several are drawn from the replay buffer at once, and travel in one transfer."""

from collections.abc import Iterator
from itertools import groupby
from typing import TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize
from torch.utils._pytree import tree_flatten, tree_unflatten

from sb3_algd.common.buffers import CostReplayBufferSamples, CostStorage

Batch = TypeVar("Batch")

# Several batches are drawn from the replay buffer at once, as far as their observations take no more memory
BYTES_AT_ONCE = 32 * 2**20


def sample_batches(
    replay_buffer: CostStorage, n_batches: int, batch_size: int, device: th.device, env: VecNormalize | None
) -> Iterator[CostReplayBufferSamples]:
    """
    Draw batches from the replay buffer.

    :param replay_buffer: The replay buffer, in CPU memory.
    :param n_batches: Number of batches.
    :param batch_size: Number of transitions in each.
    :param device: Where the batches are needed.
    :param env: Normalises observations and rewards, None for none.
    :return: The batches, on the device.
    """
    at_once = max(BYTES_AT_ONCE // observation_bytes(replay_buffer.observation_space, batch_size), 1)
    while n_batches > 0:
        n_drawn = min(n_batches, at_once)
        samples: CostReplayBufferSamples = replay_buffer.sample(n_drawn * batch_size, env=env)  # type: ignore[assignment]
        yield from split_batch(samples if device.type == "cpu" else move_batch(samples, device), n_drawn)
        n_batches -= n_drawn


def observation_bytes(observation_space: spaces.Space, batch_size: int) -> int:
    """
    :param observation_space: Space of the observations.
    :param batch_size: Number of transitions.
    :return: Size of a batch's observations and next observations.
    """
    parts = observation_space.spaces.values() if isinstance(observation_space, spaces.Dict) else [observation_space]
    return 2 * batch_size * sum(int(np.prod(part.shape or (1,))) * np.dtype(part.dtype).itemsize for part in parts)


def split_batch(batch: Batch, n_parts: int) -> list[Batch]:
    """
    :param batch: Tensors, nested in tuples and dictionaries, batch first; None stays None.
    :param n_parts: Number of equal parts, a divisor of the batch size.
    :return: The parts.
    """
    if n_parts == 1:
        return [batch]
    leaves, structure = tree_flatten(batch)
    # Dealt out in turn: HerReplayBuffer puts real transitions first and those with new goals last. Contiguous,
    # because an update would be compiled again for every other stride
    parts = [[leaf if leaf is None else leaf[first::n_parts].contiguous() for leaf in leaves] for first in range(n_parts)]
    return [tree_unflatten(part, structure) for part in parts]


def to_device(tensor: th.Tensor, device: th.device) -> th.Tensor:
    """
    :param tensor: In CPU memory.
    :param device: Where to.
    :return: The tensor there; the processor does not wait until it has arrived.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=tensor.is_pinned())


def move_batch(batch: Batch, device: th.device) -> Batch:
    """
    Move a batch to the device in one transfer per data type (one in all, unless there are images).

    :param batch: Tensors in CPU memory, nested in tuples and dictionaries, batch first; None stays None.
    :param device: Where to.
    :return: The batch there; its tensors are views of the memory that was transferred.
    """
    leaves, structure = tree_flatten(batch)
    present = sorted((i for i, leaf in enumerate(leaves) if leaf is not None), key=lambda i: str(leaves[i].dtype))
    for _, group in groupby(present, key=lambda i: leaves[i].dtype):
        indices = list(group)
        packed = th.cat([leaves[i].reshape(-1) for i in indices])
        parts = to_device(packed, device).split([leaves[i].numel() for i in indices])
        for i, part in zip(indices, parts, strict=True):
            leaves[i] = part.view(leaves[i].shape)
    return tree_unflatten(leaves, structure)
