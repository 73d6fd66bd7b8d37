"""The global random generators that training draws from: their states, kept and given back."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th

#: State of each generator, by the name of its library
RandomState = dict[str, Any]


def get_random_state(device: th.device) -> RandomState:
    """
    :param device: The device of the model, whose generator counts beside the CPU's.
    :return: The states of Python's, NumPy's and PyTorch's generators.
    """
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": th.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = th.cuda.get_rng_state(device)
    return state


def set_random_state(state: RandomState, device: th.device) -> None:
    """
    :param state: What :func:`get_random_state` gave. The state of a CUDA device counts on a CUDA device only.
    :param device: The device of the model.
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    th.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        th.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def preserved_random_state(device: th.device) -> Iterator[None]:
    """
    Give every global random generator its state back afterwards, so that what runs inside has no influence on training.

    :param device: The device of the model.
    """
    state = get_random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)
