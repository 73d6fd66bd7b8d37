"""
How an update is made fast without changing what it computes: memory that stays mapped, batches that travel in one transfer,
updates recorded as CUDA graphs. docs/performance.md has the figures.
"""

import ctypes
import os
from collections import Counter
from collections.abc import Callable, Hashable
from functools import cache, partial
from itertools import groupby
from typing import Any, TypeVar

import torch as th
from torch.utils._pytree import tree_flatten, tree_unflatten

Batch = TypeVar("Batch")
Outputs = dict[str, th.Tensor]

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
    fresh pages then costs up to a third of an update. Holds for the whole process. Does nothing where the C library is another
    one, or where the user has set ``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_`` or ``GLIBC_TUNABLES``.
    """
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")):
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
    # Dealt out in turn: HerReplayBuffer puts real transitions first and those with new goals last
    parts = [[leaf if leaf is None else leaf[first::n_parts] for leaf in leaves] for first in range(n_parts)]
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
    :param recorder: Runs the function for a recording and returns what replays it, and the outputs; CUDA's by default. With
        one given, recordings are made on every device.
    """

    def __init__(
        self,
        function: Callable[..., Outputs],
        optimizers: list[th.optim.Optimizer],
        recorder: Callable[[Callable[[], Outputs]], tuple[Callable[[], Any], Outputs]] | None = None,
    ) -> None:
        self._function = function
        self._optimizers = optimizers
        self._recorder = recorder
        self._stream: Any = None
        self._calls: Counter[Hashable] = Counter()
        self._recorded: dict[Hashable, tuple[list[Any], Callable[[], Any] | None, Outputs]] = {}

    def __call__(self, *inputs: Any) -> Outputs:
        """
        :param inputs: Tensors, nested in tuples and dictionaries; each shape is recorded for itself.
        :return: What the function returned, as tensors of its own.
        """
        leaves, structure = tree_flatten(inputs)
        device = next(leaf.device for leaf in leaves if leaf is not None)
        records = device.type == "cuda" or self._recorder is not None
        key = tuple(None if leaf is None else (leaf.shape, leaf.dtype) for leaf in leaves)
        self._calls[key] += 1
        # Per key: an optimizer whose state does not exist yet would, in a recording, create it anew at each replay
        if records and self._calls[key] <= GRAPH_WARM_UP_CALLS:
            return self._warm_up(inputs, device)

        if key not in self._recorded:
            static = [None if leaf is None else leaf.clone() for leaf in leaves]
            replay: Callable[[], Any] | None = None
            outputs: Outputs = {}
            if records:
                record = self._recorder or partial(_record_cuda_graph, device, self._stream)
                replay, outputs = record(lambda: self._function(*tree_unflatten(static, structure)))
            self._recorded[key] = (static, replay, outputs)
        static, replay, outputs = self._recorded[key]
        for target, leaf in zip(static, leaves, strict=True):
            if leaf is not None:
                target.copy_(leaf)
        if replay is None:
            outputs = self._function(*tree_unflatten(static, structure))
        else:
            replay()
        # The next call overwrites what a recording returns
        return {name: value.clone() for name, value in outputs.items()}

    def _warm_up(self, inputs: tuple[Any, ...], device: th.device) -> Outputs:
        if device.type != "cuda":
            return self._function(*inputs)
        if self._stream is None:
            self._stream = th.cuda.Stream(device)
            for optimizer in self._optimizers:
                _make_capturable(optimizer, device)
        current = th.cuda.current_stream(device)
        self._stream.wait_stream(current)
        with th.cuda.stream(self._stream):
            outputs = self._function(*inputs)
        current.wait_stream(self._stream)
        return outputs


def _record_cuda_graph(device: th.device, stream: Any, function: Callable[[], Outputs]) -> tuple[Callable[[], Any], Outputs]:
    """Record a call; nothing is computed yet."""
    graph = th.cuda.CUDAGraph()
    with th.cuda.device(device), th.cuda.graph(graph, stream=stream):
        outputs = function()
    return graph.replay, outputs


def can_be_recorded(optimizer: th.optim.Optimizer) -> bool:
    """:param optimizer: An optimizer. :return: Whether a CUDA graph can hold its steps."""
    return all("capturable" in group for group in optimizer.param_groups)


def _make_capturable(optimizer: th.optim.Optimizer, device: th.device) -> None:
    """Keep the optimizer's learning rate and step count on the device, where a recorded graph reads and writes them."""
    for group in optimizer.param_groups:
        group["capturable"] = True
        group["lr"] = th.as_tensor(float(group["lr"]), dtype=th.float32, device=device)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = th.as_tensor(state["step"], dtype=th.float32, device=device)


def release_from_graph(optimizer: th.optim.Optimizer) -> None:
    """
    Undo what a recording needed, for a state that was saved with it: other devices refuse it.

    :param optimizer: The optimizer.
    """
    for group in optimizer.param_groups:
        if isinstance(group["lr"], th.Tensor):
            group["lr"] = float(group["lr"])
            group["capturable"] = False
        if not group.get("fused"):
            # Where Adam looks at it in each step; loading puts it on the parameters' device if they were recorded
            for state in (optimizer.state[parameter] for parameter in group["params"] if parameter in optimizer.state):
                if "step" in state:
                    state["step"] = th.as_tensor(state["step"], device="cpu")
