"""What a checkpoint is made of: restarted episodes, rows of the replay buffer, data of callbacks."""

import io
import pickle
import uuid
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback
from stable_baselines3.common.type_aliases import MaybeCallback

from sb3_algd.common.buffers import CostStorage
from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm


def restart_episodes(model: ConstrainedOffPolicyAlgorithm, seed: int) -> None:
    """
    Start new episodes, in a way that can be repeated.

    :param model: The model, whose environments are reset.
    :param seed: Seed of environments and of the spaces that actions and observations are drawn from.
    """
    env = model.env
    assert env is not None and model._cost_tracker is not None
    # Only the spaces of environments in this process are the environments' own, those of others are copies
    own_spaces = [*env.get_attr("action_space"), *env.get_attr("observation_space")]
    for offset, space in enumerate([*own_spaces, env.action_space, model.action_space, model.observation_space]):
        space.seed(seed + offset)
    env.seed(seed)
    model._last_obs = env.reset()  # type: ignore[assignment]
    model._last_episode_starts = np.ones(model.n_envs, dtype=bool)
    if model._vec_normalize_env is not None:
        model._last_original_obs = model._vec_normalize_env.get_original_obs()
    if model.action_noise is not None:
        model.action_noise.reset()
    model._cost_tracker.start_episodes(model.n_envs)
    assert model._return_scale is not None
    model._return_scale.start_episodes(model.n_envs)


def original_observation(model: ConstrainedOffPolicyAlgorithm) -> Any:
    """The newest observation, as the environment gave it."""
    return model._last_obs if model._vec_normalize_env is None else model._vec_normalize_env.get_original_obs()


def same_observation(a: Any, b: Any) -> bool:
    """:param a: Observation. :param b: Another. :return: Whether all their numbers are the same."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
    return np.array_equal(a, b)


def buffer_rows(buffer: CostStorage) -> dict[tuple[str, ...], np.ndarray]:
    """All arrays with one row per stored step, by the names that lead to them."""
    named: dict[tuple[str, ...], Any] = {(name,): value for name, value in vars(buffer).items()}
    for name, value in vars(buffer).items():
        if isinstance(value, dict):
            named.update({(name, key): item for key, item in value.items()})
    shape = (buffer.buffer_size, buffer.n_envs)
    return {path: array for path, array in named.items() if isinstance(array, np.ndarray) and array.shape[:2] == shape}


def buffer_state(buffer: CostStorage) -> dict[str, Any]:
    """What changes in a buffer beside the rows that are added: counters, and the arrays that change in older rows too."""
    rows = buffer_rows(buffer)
    numbers = {
        name: value
        for name, value in vars(buffer).items()
        if isinstance(value, (bool, int, np.ndarray)) and (name,) not in rows
    }
    return {"numbers": numbers, "rewritten": {name: rows[(name,)][: buffer.size()] for name in buffer.rewritten_arrays}}


def plan_buffer(buffer: CostStorage, stored: dict[str, Any] | None, new_file: str) -> tuple[dict[str, Any], np.ndarray]:
    """
    Find what of a replay buffer is not stored yet.

    :param buffer: The replay buffer.
    :param stored: What the last manifest says of this buffer, None if it does not.
    :param new_file: Name of the file that the new rows go to.
    :return: What the next manifest says of it, and the rows that are written now.
    """
    n_added = buffer.n_added
    if stored is not None:
        series, before = stored["series"], stored["n_added"]
        # A file whose rows are all overwritten by now is not needed
        files = [file for file in stored["files"] if file["n_added"] > n_added - buffer.buffer_size]
    else:
        series, before, files = uuid.uuid4().hex, 0, []
    n_new = min(n_added - before, buffer.buffer_size)
    # The memory efficient variant keeps the last next observation in the row that comes next
    n_rows = min(n_new + (n_new > 0 and buffer.optimize_memory_usage), buffer.buffer_size)
    rows = (buffer.pos - n_new + np.arange(n_rows)) % buffer.buffer_size
    if n_rows > 0:
        files = [*files, {"name": new_file, "n_added": n_added}]
    return {"series": series, "n_added": n_added, "files": files}, rows


def load_buffer(buffer: CostStorage, state: dict[str, Any], files: list[Path]) -> None:
    """Fill a new buffer."""
    arrays = buffer_rows(buffer)
    for path in files:
        with path.open("rb") as file:
            rows, stored = pickle.load(file)
        for key, array in stored.items():
            arrays[key][rows] = array
    vars(buffer).update(state["numbers"])
    for name, array in state["rewritten"].items():
        arrays[(name,)][: len(array)] = array


def saved_model(model: ConstrainedOffPolicyAlgorithm) -> bytes:
    """What ``model.save()`` stores. In memory first: PyTorch hides a full disk behind errors of its own."""
    file = io.BytesIO()
    model.save(file)
    return file.getvalue()


def as_list(callback: MaybeCallback) -> list[BaseCallback]:
    """:param callback: What ``learn()`` may be given. :return: The callbacks in it."""
    if callback is None:
        return []
    if isinstance(callback, list):
        return list(callback)
    return [callback if isinstance(callback, BaseCallback) else ConvertCallback(callback)]


def callbacks_in(callback: BaseCallback) -> Iterator[BaseCallback]:
    """A callback and those inside it; lists of callbacks have nothing to remember."""
    if not isinstance(callback, CallbackList):
        yield callback
    inside = [
        child
        for name, value in vars(callback).items()
        for child in (value if isinstance(value, list) else [value])
        if isinstance(child, BaseCallback) and name != "parent"
    ]
    # Two attributes may hold the same one
    for child in {id(child): child for child in inside}.values():
        yield from callbacks_in(child)


def _is_plain(value: Any) -> bool:
    """Whether a value is data: numbers, texts, arrays, and collections of these."""
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple, deque)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str, np.generic, np.ndarray))


def plain_values(values: dict[str, Any]) -> dict[str, Any]:
    """The plain ones among some values, copied."""
    return {name: pickle.loads(pickle.dumps(value)) for name, value in values.items() if _is_plain(value)}


def plain_attributes(callback: BaseCallback) -> dict[str, Any]:
    """:param callback: A callback. :return: Its attributes that are data, copied."""
    # locals and globals belong to the running learn()
    return plain_values({name: value for name, value in vars(callback).items() if name not in ("locals", "globals")})
