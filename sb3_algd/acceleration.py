"""
How an update is made fast without changing what it computes: memory that stays mapped, batches that travel in one transfer,
updates recorded as CUDA graphs. docs/performance.md has the figures.
"""

import ctypes
import os
from collections.abc import Callable, Hashable
from functools import cache
from itertools import groupby
from typing import Any, TypeVar

import torch as th
from torch.utils._pytree import tree_flatten, tree_unflatten

Batch = TypeVar("Batch")

# glibc's names for mallopt(), and values that keep the temporaries of an update (tens of megabytes) in the process
_M_TRIM_THRESHOLD, _TRIM_THRESHOLD = -1, 512 * 2**20
_M_MMAP_THRESHOLD, _MMAP_THRESHOLD = -3, 32 * 2**20
# Eager calls before a graph is recorded: optimizers create their state, libraries their workspaces
GRAPH_WARM_UP_CALLS = 3


@cache
def keep_freed_memory() -> None:
    """
    Let the C library keep up to 512 MiB of freed memory instead of returning it to the system at once.

    An update frees and allocates the same tens of megabytes again and again; glibc would unmap them each time, and touching
    fresh pages then costs up to a third of an update. Does nothing where the C library is another one, or where the user
    has set ``MALLOC_TRIM_THRESHOLD_`` or ``MALLOC_MMAP_THRESHOLD_``.
    """
    if "MALLOC_TRIM_THRESHOLD_" in os.environ or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
    mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)


def split_batch(batch: Batch, n_parts: int) -> list[Batch]:
    """
    :param batch: Tensors, nested in tuples and dictionaries, batch first; None stays None.
    :param n_parts: Number of equal parts, a divisor of the batch size.
    :return: The parts.
    """
    if n_parts == 1:
        return [batch]
    leaves, structure = tree_flatten(batch)
    chunks = [[leaf] * n_parts if leaf is None else leaf.chunk(n_parts) for leaf in leaves]
    return [tree_unflatten(list(part), structure) for part in zip(*chunks, strict=True)]


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
        if device.type == "cuda":
            packed = packed.pin_memory()
        parts = packed.to(device, non_blocking=True).split([leaves[i].numel() for i in indices])
        for i, part in zip(indices, parts, strict=True):
            leaves[i] = part.view(leaves[i].shape)
    return tree_unflatten(leaves, structure)


def set_learning_rate(optimizer: th.optim.Optimizer, learning_rate: float) -> None:
    """
    :param optimizer: The optimizer.
    :param learning_rate: Its new learning rate; one that is a tensor is changed in place, as a recorded graph needs it.
    """
    for group in optimizer.param_groups:
        if isinstance(group["lr"], th.Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


class GraphedFunction:
    """
    A function of tensors that a CUDA device records once and then replays without the work of the processor.

    The function must only change tensors in place (weights, optimizer states), take its inputs as tensors, and must not
    look at values. On other devices it is called each time, with everything else the same, so that tests need no GPU.

    :param function: Takes the inputs, returns a dictionary of tensors.
    :param optimizers: The optimizers that the function steps; made fit for being recorded.
    """

    def __init__(self, function: Callable[..., dict[str, th.Tensor]], optimizers: list[th.optim.Optimizer]) -> None:
        self._function = function
        self._optimizers = optimizers
        self._calls = 0
        self._recorded: dict[Hashable, tuple[Any, list[Any], dict[str, th.Tensor]]] = {}

    def __call__(self, *inputs: Any) -> dict[str, th.Tensor]:
        """
        :param inputs: Tensors, nested in tuples and dictionaries; each shape is recorded for itself.
        :return: What the function returned, as tensors of its own.
        """
        leaves, structure = tree_flatten(inputs)
        device = next(leaf.device for leaf in leaves if leaf is not None)
        self._calls += 1
        if device.type == "cuda" and self._calls <= GRAPH_WARM_UP_CALLS:
            return self._warm_up(inputs, device)

        key = tuple(None if leaf is None else (leaf.shape, leaf.dtype) for leaf in leaves)
        if key not in self._recorded:
            static = [None if leaf is None else leaf.clone() for leaf in leaves]
            graph, outputs = None, {}
            if device.type == "cuda":
                graph = th.cuda.CUDAGraph()
                with th.cuda.graph(graph):
                    outputs = self._function(*tree_unflatten(static, structure))
            self._recorded[key] = (graph, static, outputs)
        graph, static, outputs = self._recorded[key]
        for target, leaf in zip(static, leaves, strict=True):
            if leaf is not None:
                target.copy_(leaf)
        if graph is None:
            outputs = self._function(*tree_unflatten(static, structure))
        else:
            graph.replay()
        # The next call overwrites what the graph returns
        return {name: value.clone() for name, value in outputs.items()}

    def _warm_up(self, inputs: tuple[Any, ...], device: th.device) -> dict[str, th.Tensor]:
        if self._calls == 1:
            for optimizer in self._optimizers:
                _make_capturable(optimizer, device)
        stream = th.cuda.Stream()
        stream.wait_stream(th.cuda.current_stream())
        with th.cuda.stream(stream):
            outputs = self._function(*inputs)
        th.cuda.current_stream().wait_stream(stream)
        return outputs


def _make_capturable(optimizer: th.optim.Optimizer, device: th.device) -> None:
    """Keep the optimizer's learning rate and step count on the device, where a recorded graph reads and writes them."""
    for group in optimizer.param_groups:
        if "capturable" not in group:
            raise ValueError(
                f"{type(optimizer).__name__} cannot be recorded in a CUDA graph: leave cuda_graph out, or use th.optim.Adam."
            )
        group["capturable"] = True
        group["lr"] = th.as_tensor(float(group["lr"]), dtype=th.float32, device=device)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = th.as_tensor(state["step"], dtype=th.float32, device=device)
