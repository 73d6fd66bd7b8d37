"""
Plays a policy that ``sb3_algd.export`` has written, with NumPy and onnxruntime alone.

    agent = Agent.load("agent.onnx")
    action = agent.act(observation)

This module imports nothing else, neither PyTorch nor Stable-Baselines3 nor ``sb3_algd``, and it unpickles nothing: it may be
copied alone onto a robot. A file from a stranger can only compute. It runs no code of its own and reads no other file.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Agent"]

#: Key of the metadata in the ONNX file; the value is JSON
METADATA_KEY = "sb3_algd"
#: Version of the format, raised where an older runtime could not play the file
FORMAT = 1
#: Name of the input that takes the noise
NOISE = "noise"


class Agent:
    """
    A policy from an ONNX file.

    :param model: Content of the file
    :param seed: Seed of the noise that stochastic actions are drawn from
    :param name: What error messages call the file
    :raises ValueError: If it is not a complete file of ``sb3_algd.export``, or one of a newer version.
    :raises ImportError: If onnxruntime is missing.
    """

    def __init__(self, model: bytes, seed: int | None = None, name: str = "The model") -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("Playing an exported policy needs onnxruntime: pip install onnxruntime") from error
        options = onnxruntime.SessionOptions()
        # The networks are small: threads only wait for each other
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        # Errors are raised; what it would write to the terminal beside that says the same
        options.log_severity_level = 4
        # Weights in other files would be looked for in the working folder: there are none in what is no folder
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.devnull)
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            # The errors of onnxruntime have no other class in common
            raise ValueError(f"{name} is not a complete ONNX file that onnxruntime can run: {error}") from error
        #: What the file says of itself: algorithm, task, limit, and what was measured
        self.metadata = self._read_metadata(self._session.get_modelmeta().custom_metadata_map, name)
        try:
            # Name: shape of one observation and data type
            self._observations = {
                key: (tuple(entry["shape"]), np.dtype(entry["dtype"])) for key, entry in self.metadata["observations"].items()
            }
            self._is_dict = bool(self.metadata["is_dict"])
            noise_shape = self.metadata["noise_shape"]
            #: Shape of the noise of one action, None if the file always acts deterministically
            self.noise_shape: tuple[int, ...] | None = None if noise_shape is None else tuple(noise_shape)
            #: Shape of one action
            self.action_shape: tuple[int, ...] = tuple(self.metadata["action"]["shape"])
            names = [*self._observations, *([] if noise_shape is None else [NOISE])]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{name} was not written by sb3_algd.export: its metadata are not complete.") from error
        if sorted(names) != sorted(node.name for node in self._session.get_inputs()):
            raise ValueError(f"{name} was not written by sb3_algd.export: its inputs are others than its metadata say.")
        self._rng = np.random.default_rng(seed)

    @classmethod
    def load(cls, path: str | os.PathLike[str], seed: int | None = None) -> "Agent":
        """
        :param path: The ONNX file
        :param seed: Seed of the noise that stochastic actions are drawn from
        :return: Its policy
        :raises ValueError: If it is not a complete file of ``sb3_algd.export``, or one of a newer version.
        """
        # As bytes: a graph that is loaded from a path may refer to other files beside it
        return cls(Path(path).read_bytes(), seed, name=str(path))

    @staticmethod
    def _read_metadata(stored: Mapping[str, str], name: str) -> dict[str, Any]:
        if METADATA_KEY not in stored:
            raise ValueError(f"{name} was not written by sb3_algd.export: it has no metadata under {METADATA_KEY!r}.")
        try:
            metadata: dict[str, Any] = dict(json.loads(stored[METADATA_KEY]))
            newer = metadata["format"] > FORMAT
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{name} was not written by sb3_algd.export: its metadata cannot be read.") from error
        if newer:
            raise ValueError(
                f"{name} has format {metadata['format']}, but this version of the runtime knows formats up to {FORMAT}: "
                "install a newer sb3_algd."
            )
        return metadata

    def act(
        self,
        observation: Any,
        deterministic: bool = False,
        seed: int | None = None,
        noise: np.ndarray | None = None,
    ) -> np.ndarray:
        """
        Choose an action.

        :param observation: One raw observation of the environment or a batch of them (a dict of arrays for a Dict space):
            not normalised, images as the environment gives them
        :param deterministic: Whether to leave out all noise. A file that was exported with ``deterministic=True`` always does
        :param seed: Seed of this action alone. None goes on with the agent's own noise
        :param noise: Standard normal noise instead of drawn one, shape ``(*noise_shape)``, batch first for a batch
        :return: The action in the environment's own unit, batch first for a batch of observations
        :raises ValueError: If the observation or the noise has a wrong shape, type or keys, or is not finite.
        """
        inputs, batch_size = self._inputs(observation)
        if self.noise_shape is not None:
            shape = (batch_size or 1, *self.noise_shape)
            if deterministic:
                inputs[NOISE] = np.zeros(shape, dtype=np.float32)
            elif noise is not None:
                inputs[NOISE] = self._given_noise(noise, shape)
            else:
                rng = self._rng if seed is None else np.random.default_rng(seed)
                inputs[NOISE] = rng.standard_normal(shape, dtype=np.float32)
        elif noise is not None:
            raise ValueError("This file was exported with deterministic=True: it takes no noise.")
        actions = self._session.run(None, inputs)[0]
        return actions[0] if batch_size is None else actions

    def _inputs(self, observation: Any) -> tuple[dict[str, np.ndarray], int | None]:
        """:return: The observations, batch first, and the size of the batch, None for a single observation."""
        given = observation
        if not self._is_dict:
            given = {next(iter(self._observations)): observation}
        elif not isinstance(observation, Mapping) or set(observation) != set(self._observations):
            got = sorted(observation) if isinstance(observation, Mapping) else type(observation).__name__
            raise ValueError(f"The observation must be a dict with the keys {sorted(self._observations)}, got {got}.")
        inputs: dict[str, np.ndarray] = {}
        sizes: set[int | None] = set()
        for name, (shape, dtype) in self._observations.items():
            value = np.asarray(given[name])
            if value.dtype != dtype:
                if not np.can_cast(value.dtype, dtype, "same_kind"):
                    raise ValueError(f"The {self._called(name)} must be of type {dtype}, got {value.dtype}.")
                value = value.astype(dtype)
            if value.shape == shape:
                sizes.add(None)
                value = value[np.newaxis]
            elif value.shape[1:] == shape and value.ndim == len(shape) + 1:
                sizes.add(len(value))
            else:
                raise ValueError(
                    f"The {self._called(name)} must have shape {shape}, or {('n', *shape)} for a batch, got {value.shape}."
                )
            if dtype.kind == "f" and not np.isfinite(value).all():
                raise ValueError(f"The {self._called(name)} is not finite (NaN or infinite) at {self._first_bad(value)}.")
            inputs[name] = value
        if len(sizes) > 1:
            raise ValueError("The observation's parts must be all single or all batches of the same size.")
        return inputs, sizes.pop()

    def _called(self, name: str) -> str:
        return f"observation {name!r}" if self._is_dict else "observation"

    @staticmethod
    def _first_bad(value: np.ndarray) -> list[int]:
        return np.argwhere(~np.isfinite(value))[0].tolist()[1:]

    def _given_noise(self, noise: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        noise = np.asarray(noise, dtype=np.float32)
        if noise.shape not in (shape, self.noise_shape) or noise.size != np.prod(shape):
            raise ValueError(f"The noise must have shape {shape}, got {noise.shape}.")
        if not np.isfinite(noise).all():
            raise ValueError("The noise has values that are not finite.")
        return noise.reshape(shape)
