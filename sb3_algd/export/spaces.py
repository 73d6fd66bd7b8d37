"""Observation and action spaces as JSON."""

from collections import OrderedDict
from typing import Any

import numpy as np
from gymnasium import spaces

#: Name of the only observation where the space is no Dict
OBSERVATION = "observation"


def as_dict(space: spaces.Space) -> dict[str, spaces.Space]:
    """:param space: A space of observations. :return: Its parts by name."""
    return dict(space.spaces) if isinstance(space, spaces.Dict) else {OBSERVATION: space}


def space_to_json(space: spaces.Space) -> dict[str, Any]:
    """
    :param space: A space that SB3's policies take
    :return: The same as JSON can hold it. A bound is one number where all are alike, and null where there is none
    :raises ValueError: If the space is of another kind.
    """
    if isinstance(space, spaces.Dict):
        return {"type": "Dict", "spaces": {name: space_to_json(part) for name, part in space.spaces.items()}}
    if isinstance(space, spaces.Box):
        bounds = {"low": _bound_to_json(space.low), "high": _bound_to_json(space.high)}
        return {"type": "Box", "shape": list(space.shape), "dtype": str(space.dtype), **bounds}
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        return {"type": "MultiDiscrete", "nvec": space.nvec.tolist()}
    if isinstance(space, spaces.MultiBinary):
        return {"type": "MultiBinary", "n": list(space.shape) if len(space.shape) > 1 else int(space.n)}  # type: ignore
    raise ValueError(f"Spaces of type {type(space).__name__} cannot be exported.")


def space_from_json(entry: dict[str, Any]) -> spaces.Space:
    """
    :param entry: What :func:`space_to_json` made
    :return: The space
    :raises ValueError: If it is of an unknown kind.
    """
    kind = entry["type"]
    if kind == "Dict":
        # Gymnasium sorts the keys of a plain dict, and features are in the order of the keys
        return spaces.Dict(OrderedDict((name, space_from_json(part)) for name, part in entry["spaces"].items()))
    if kind == "Box":
        dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
        low, high = (
            np.broadcast_to(np.array(_bound_from_json(entry[name], infinite), dtype=dtype), shape)
            for name, infinite in (("low", -np.inf), ("high", np.inf))
        )
        return spaces.Box(low, high, shape, dtype=dtype.type)
    if kind == "Discrete":
        return spaces.Discrete(entry["n"], start=entry["start"])
    if kind == "MultiDiscrete":
        return spaces.MultiDiscrete(entry["nvec"])
    if kind == "MultiBinary":
        return spaces.MultiBinary(entry["n"])
    raise ValueError(f"unknown type of a space: {kind!r}")


def _bound_to_json(bound: np.ndarray) -> Any:
    if bound.size and (bound == bound.flat[0]).all():
        return bound.flat[0].item() if np.isfinite(bound.flat[0]) else None
    values = bound.astype(object)
    values[~np.isfinite(bound)] = None
    return values.tolist()


def _bound_from_json(bound: Any, infinite: float) -> Any:
    if isinstance(bound, list):
        return [_bound_from_json(part, infinite) for part in bound]
    return infinite if bound is None else bound
