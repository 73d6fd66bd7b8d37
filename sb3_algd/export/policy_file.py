"""
The actor alone, without pickle: its weights in ``policy.safetensors`` and all else, as plain JSON, in ``config.json``.

A model's own file is unpickled when it is loaded, which can run any code of whoever wrote it. These two files can only hold
numbers and names that are known here. Needs the extra ``deploy``.
"""

import copy
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_algd import ALGD, SACLag
from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm
from sb3_algd.common.policies import ConstrainedPolicy
from sb3_algd.export.description import (
    ExportedConstraint,
    copy_policy,
    describe_model,
    find_vec_normalize,
    raw_observation_space,
)
from sb3_algd.export.spaces import OBSERVATION, space_from_json, space_to_json

WEIGHTS, CONFIG = "policy.safetensors", "config.json"
#: Version of the format, raised where an older version of this package could not load the files
POLICY_FORMAT = 1
#: Observations with which the files are compared with the model
N_CHECKS = 8
#: What a config may name: nothing else is ever looked up
POLICIES: dict[str, type[ConstrainedPolicy]] = {
    algorithm.__name__: algorithm.policy_aliases["MlpPolicy"] for algorithm in (ALGD, SACLag)  # type: ignore[misc]
}
EXTRACTORS = {extractor.__name__: extractor for extractor in (FlattenExtractor, NatureCNN, CombinedExtractor)}
ACTIVATIONS = {
    activation.__name__: activation
    for activation in (nn.ReLU, nn.SiLU, nn.Mish, nn.GELU, nn.Tanh, nn.ELU, nn.LeakyReLU, nn.Softplus, nn.Sigmoid)
}
#: Arguments of the policy that make its actor
PLAIN_ARGUMENTS = ("features_extractor_kwargs", "normalize_images", "diffusion", "denoising_steps", "diffusion_kwargs")


class LoadedPolicy(ExportedConstraint):
    """
    A policy from :func:`load_policy`: from raw observations to actions of the environment, as an exported ONNX file.

    It can be evaluated like a model: :func:`~sb3_algd.evaluate_policy` counts costs in the unit of the limit.

    :param actor: The actor
    :param config: What the config says
    """

    def __init__(self, actor: BasePolicy, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.actor = actor
        self.config = config
        self.action_space = actor.action_space
        #: Observations as the actor takes them, images in either order of the axes
        self.observation_space = actor.observation_space
        self._statistics: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        normalization = config["normalization"]
        if normalization is not None:
            self._clip = float(normalization["clip_obs"])
            for name, entry in normalization["statistics"].items():
                std = np.sqrt(np.array(entry["var"]) + float(normalization["epsilon"]))
                self._statistics[name] = (np.array(entry["mean"]), std)

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Choose actions, with SB3's interface.

        :param observation: A raw observation or a batch of them: not normalised
        :param state: Not used
        :param episode_start: Not used
        :param deterministic: Whether to leave out all noise
        :return: Actions of the environment, and ``state``
        """
        if self._statistics:
            whole = not isinstance(observation, dict)
            parts = {OBSERVATION: observation} if whole else dict(observation)
            for name, (mean, std) in self._statistics.items():
                parts[name] = np.clip((parts[name] - mean) / std, -self._clip, self._clip).astype(np.float32)
            observation = parts[OBSERVATION] if whole else parts
        return self.actor.predict(observation, state, episode_start, deterministic)


def export_policy(
    model: ConstrainedOffPolicyAlgorithm,
    folder: str | os.PathLike[str],
    *,
    vec_normalize: VecNormalize | Literal["auto"] | None = "auto",
    task: str | None = None,
    results: dict[str, Any] | None = None,
) -> Path:
    """
    Leave a trained model's actor in two files that are loaded without pickle, ``policy.safetensors`` and ``config.json``.

    :param model: The model, of ALGD or SACLag
    :param folder: Where they go; it is made if it is missing
    :param vec_normalize: The ``VecNormalize`` wrapper with which the model was trained, None if it was trained without.
        ``"auto"`` takes it from the model's environment
    :param task: Id of the task. If None, the one of the model's environment
    :param results: What was measured, for instance ``dict(mean_return=26.1, mean_cost=19.2)``
    :return: The folder
    :raises ValueError: If the policy has parts of other packages, or chooses among several candidates, for which it takes its
        critics. Then nothing is written.
    """
    safetensors = _safetensors()
    if POLICIES.get(type(model).__name__) is None or not isinstance(model, (ALGD, SACLag)):
        raise ValueError(f"export_policy takes a model of ALGD or SACLag, got {type(model).__name__}.")
    if model.policy.n_candidates > 1:
        raise ValueError(
            f"The policy chooses the best of {model.policy.n_candidates} candidates with its critics, which these files leave "
            "out: set model.policy.n_candidates = 1, or use export_onnx."
        )
    normalizer = find_vec_normalize(model, vec_normalize)
    policy = copy_policy(model)
    content = safetensors.save({name: value.contiguous() for name, value in policy.actor.state_dict().items()})
    config = {
        **describe_model(model, task, results),
        "format": POLICY_FORMAT,
        "sha256": hashlib.sha256(content).hexdigest(),
        "observation_space": space_to_json(model.observation_space),
        "action_space": space_to_json(model.action_space),
        "policy_kwargs": _actor_arguments(policy),
        "normalization": _describe_normalizer(normalizer),
    }
    try:
        text = json.dumps(config, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"The policy's arguments cannot be written as JSON: {error}") from error
    if not _acts_as(policy, _load(content, json.loads(text)), raw_observation_space(model, normalizer), normalizer):
        raise ValueError(f"The policy's actions would be others than those of predict(): nothing was written to {folder}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(content)
    (folder / CONFIG).write_text(text, encoding="utf-8")
    return folder


def load_policy(folder: str | os.PathLike[str], device: th.device | str = "cpu") -> LoadedPolicy:
    """
    Load what :func:`export_policy` has left. Nothing is unpickled: files from a stranger can run nothing.

    :param folder: Where ``policy.safetensors`` and ``config.json`` are
    :param device: Device of the actor
    :return: The policy
    :raises ValueError: If the files are damaged, of a newer version, or not of this package.
    """
    folder = Path(folder)
    content, text = (folder / WEIGHTS).read_bytes(), (folder / CONFIG).read_text(encoding="utf-8", errors="replace")
    config = _read_config(text, folder / CONFIG)
    if config["sha256"] != hashlib.sha256(content).hexdigest():
        raise ValueError(f"{folder / WEIGHTS} is damaged, or does not belong to the {CONFIG} beside it.")
    _safetensors()
    try:
        return _load(content, config, device)
    except Exception as error:
        # Whatever a stranger has written may go wrong anywhere
        raise ValueError(f"{folder} was not written by sb3_algd.export: {' '.join(str(error).split())}") from error


def _load(content: bytes, config: dict[str, Any], device: th.device | str = "cpu") -> LoadedPolicy:
    actor = _make_actor(config)
    actor.load_state_dict(_safetensors().load(content))
    return LoadedPolicy(actor.to(device), config)


def _acts_as(
    policy: ConstrainedPolicy, loaded: LoadedPolicy, raw_space: spaces.Space, normalizer: VecNormalize | None
) -> bool:
    """:return: Whether the loaded policy's actions are those of the policy, for observations of the space."""
    # A copy: the samples of the model's own space stay as they would be
    space = copy.deepcopy(raw_space)
    space.seed(0)
    for _ in range(N_CHECKS):
        observation = space.sample()
        seen = observation if normalizer is None else normalizer.normalize_obs(observation)
        with th.random.fork_rng():
            th.manual_seed(0)
            expected, _ = policy.predict(seen)
            th.manual_seed(0)
            actual, _ = loaded.predict(observation)
        if not np.allclose(actual, expected, rtol=1e-5, atol=1e-5):
            return False
    return True


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError('Policies without pickle need safetensors: pip install "sb3_algd[deploy]"') from error
    return safetensors.torch


def _read_config(text: str, path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = dict(json.loads(text))
        newer = config["format"] > POLICY_FORMAT
        known = isinstance(config["sha256"], str) and config["algorithm"] in POLICIES
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} was not written by sb3_algd.export, or is not complete.") from error
    if newer:
        raise ValueError(
            f"{path} has format {config['format']}, but this version of sb3_algd knows formats up to {POLICY_FORMAT}: "
            "install a newer one."
        )
    if not known:
        raise ValueError(f"{path} was not written by sb3_algd.export, or is not complete.")
    return config


def _actor_arguments(policy: ConstrainedPolicy) -> dict[str, Any]:
    """:param policy: A policy. :return: Its ``policy_kwargs`` as far as they concern the actor, as JSON can hold them."""
    given = policy._get_constructor_parameters()
    names = {}
    for argument, known in (("features_extractor_class", EXTRACTORS), ("activation_fn", ACTIVATIONS)):
        names[argument] = given[argument].__name__
        if known.get(names[argument]) is not given[argument]:
            raise ValueError(
                f"{argument}={names[argument]} cannot be written without pickle, only {', '.join(known)}: use export_onnx, "
                "which keeps what it computes."
            )
    return {
        **names,
        "net_arch": policy.actor_kwargs["net_arch"],
        **{name: given[name] for name in PLAIN_ARGUMENTS if name in given},
    }


def _make_actor(config: dict[str, Any]) -> BasePolicy:
    """:param config: What the config says. :return: The actor, with new weights, in evaluation mode."""
    stored = config["policy_kwargs"]
    arguments = {name: stored[name] for name in PLAIN_ARGUMENTS if name in stored}
    with th.random.fork_rng():
        policy = POLICIES[config["algorithm"]](
            space_from_json(config["observation_space"]),
            space_from_json(config["action_space"]),  # type: ignore[arg-type]
            lambda _: 0.0,
            # The smallest critics, which go at once
            net_arch=dict(pi=stored["net_arch"], qf=[1]),
            n_critics=1,
            n_cost_critics=1,
            features_extractor_class=EXTRACTORS[stored["features_extractor_class"]],
            activation_fn=ACTIVATIONS[stored["activation_fn"]],
            **arguments,
        )
    actor: BasePolicy = policy.actor
    actor.optimizer = None  # type: ignore[assignment]
    actor.set_training_mode(False)
    return actor.requires_grad_(False)


def _describe_normalizer(normalizer: VecNormalize | None) -> dict[str, Any] | None:
    """:param normalizer: The wrapper. :return: What it does to observations, in plain numbers, None for nothing."""
    if normalizer is None or not normalizer.norm_obs:
        return None
    rms: Any = normalizer.obs_rms
    statistics = rms if isinstance(rms, dict) else {OBSERVATION: rms}
    return {
        "clip_obs": float(normalizer.clip_obs),
        "epsilon": float(normalizer.epsilon),
        "statistics": {name: {"mean": rms.mean.tolist(), "var": rms.var.tolist()} for name, rms in statistics.items()},
    }
