"""
Export of a trained model to one ONNX file: from the raw observation to the action of the environment.

The file holds everything between the two: VecNormalize's statistics, SB3's preprocessing, the actor with its whole denoising
chain, with several candidates also the target critics, and the rescaling to the action space. ``sb3_algd_runtime`` plays it
with NumPy and onnxruntime alone. Needs the extra ``deploy``.
"""

import io
import json
import logging
import os
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm
from sb3_algd.common.policies import ConstrainedPolicy
from sb3_algd.export.description import copy_policy, describe_model, find_vec_normalize, raw_observation_space
from sb3_algd.export.parity import Observation, compare
from sb3_algd.export.spaces import OBSERVATION, as_dict
from sb3_algd_runtime import FORMAT, METADATA_KEY, NOISE, Agent

#: Largest difference to ``predict`` with which a file is written, as a share of half the action's range where that is above 1
MAX_DIFFERENCE = 1e-5

#: Name of the graph's output
ACTION = "action"


class ExportedPolicy(nn.Module):
    """
    From raw observations and noise to actions of the environment: what ``predict`` does, as one graph.

    :param policy: The policy, on the CPU and in evaluation mode
    :param observation_space: Space of the raw observations
    :param vec_normalize: The wrapper with whose statistics the policy was trained, None for none
    :param n_candidates: Number of candidates N
    :param deterministic: Whether the action is the deterministic one; then the graph takes no noise
    """

    def __init__(
        self,
        policy: ConstrainedPolicy,
        observation_space: spaces.Space,
        vec_normalize: VecNormalize | None,
        n_candidates: int,
        deterministic: bool,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.raw_spaces = as_dict(observation_space)
        self.policy_spaces = as_dict(policy.observation_space)
        self.is_dict = isinstance(observation_space, spaces.Dict)
        self.n_candidates = n_candidates
        self.deterministic = deterministic
        # In double precision as in VecNormalize: a mean may be large beside the standard deviation
        self.statistics: dict[str, tuple[th.Tensor, th.Tensor, float]] = {}
        if vec_normalize is not None and vec_normalize.norm_obs:
            rms: Any = vec_normalize.obs_rms
            for name, statistic in rms.items() if isinstance(rms, dict) else [(OBSERVATION, rms)]:
                std = np.sqrt(statistic.var + vec_normalize.epsilon)
                self.statistics[name] = (th.from_numpy(statistic.mean), th.from_numpy(std), float(vec_normalize.clip_obs))
        low, high = policy.action_space.low, policy.action_space.high
        dtype = np.result_type(np.float32, low.dtype)
        self.low = th.from_numpy(low.astype(dtype))
        self.range = th.from_numpy((high - low).astype(dtype))

    def forward(self, *inputs: th.Tensor) -> th.Tensor:
        """
        :param inputs: Raw observations in the order of ``raw_spaces``, batch first, and unless deterministic, noise of
            shape (batch, N, rows, action_dim)
        :return: Actions of the environment, shape (batch, *action_space.shape)
        """
        observations = {}
        for (name, raw_space), value in zip(self.raw_spaces.items(), inputs, strict=False):
            if name in self.statistics:
                mean, std, clip = self.statistics[name]
                value = ((value.double() - mean) / std).clamp(-clip, clip).float()
            if raw_space.shape != self.policy_spaces[name].shape:
                # Channels first, as VecTransposeImage does
                value = value.permute(0, 3, 1, 2)
            observations[name] = value
        obs: Any = observations if self.is_dict else observations[OBSERVATION]
        noise = inputs[-1]
        if self.deterministic:
            noise = th.zeros((inputs[0].shape[0], 1, *self.policy.noise_shape))
        scaled = self.policy.best_action(obs, noise).unflatten(1, self.low.shape)
        return self.low + 0.5 * (scaled + 1.0) * self.range


def export_onnx(
    model: ConstrainedOffPolicyAlgorithm,
    path: str | os.PathLike[str],
    *,
    deterministic: bool = False,
    n_candidates: int | None = None,
    vec_normalize: VecNormalize | Literal["auto"] | None = "auto",
    observation_space: spaces.Space | None = None,
    task: str | None = None,
    results: dict[str, Any] | None = None,
) -> float:
    """
    Write a trained model's policy to an ONNX file, after a comparison of its actions with those of ``predict``.

    The comparison takes observations from the replay buffer if there are any, else from the observation space.

    :param model: The model, of ALGD, SACLag or another constrained algorithm
    :param path: The file
    :param deterministic: Whether the file always acts deterministically. If False, the caller chooses at each action
    :param n_candidates: Number of actions that are sampled per state, of which the one with the lowest energy acts.
        If None, the policy's own. Above 1 the file also holds the target critics
    :param vec_normalize: The ``VecNormalize`` wrapper with which the model was trained, None if it was trained without.
        ``"auto"`` takes it from the model's environment
    :param observation_space: Space of the raw observations. If None, the one of the model's environment
    :param task: Id of the task, for the metadata. If None, the one of the model's environment
    :param results: What was measured, for the metadata, for instance ``dict(mean_return=26.1, mean_cost=19.2)``
    :return: The largest difference to ``predict``, as a share of half the action's range where that is above 1
    :raises ValueError: If the actions differ from those of ``predict``, the model has no environment that tells whether it was
        trained with ``VecNormalize``, or an argument makes no sense. Then nothing is written.
    """
    if not isinstance(model, ConstrainedOffPolicyAlgorithm):
        raise ValueError(f"export_onnx takes a model of ALGD or SACLag, got {type(model).__name__}.")
    n_candidates = model.policy.n_candidates if n_candidates is None else n_candidates
    if n_candidates < 1 or n_candidates != int(n_candidates):
        raise ValueError(f"n_candidates must be a whole number, at least 1, got {n_candidates}.")
    # Candidates without noise are all alike
    n_candidates = 1 if deterministic else int(n_candidates)
    normalizer = find_vec_normalize(model, vec_normalize)
    if observation_space is None:
        observation_space = raw_observation_space(model, normalizer)
    check_spaces(observation_space, model.observation_space)

    policy = copy_policy(model)
    policy.n_candidates = n_candidates
    graph = ExportedPolicy(policy, observation_space, normalizer, n_candidates, deterministic)
    metadata = describe(model, graph, observation_space, task, results)
    content = write_graph(graph, metadata)
    difference = compare(Agent(content), graph, model, normalizer)
    if not difference <= MAX_DIFFERENCE:
        raise ValueError(
            f"The exported policy's actions differ from those of predict() by up to {difference:.2g}, which is more than "
            f"{MAX_DIFFERENCE:g}: nothing was written to {path}. Does the policy use randomness of its own, "
            "or take observations of very large numbers?"
        )
    Path(path).write_bytes(content)
    return difference


def check_spaces(raw: spaces.Space, of_policy: spaces.Space) -> None:
    """
    Refuse raw observations that are not the policy's, but for the place of the channels.

    :param raw: Space of the raw observations
    :param of_policy: The policy's observation space
    :raises ValueError: If they do not fit, or have names that the file uses itself.
    """
    parts, expected = as_dict(raw), as_dict(of_policy)
    taken = sorted({NOISE, ACTION} & parts.keys())
    if taken:
        raise ValueError(f"The file calls its own input and output {NOISE!r} and {ACTION!r}: rename the observations {taken}.")
    fits = parts.keys() == expected.keys() and isinstance(raw, spaces.Dict) == isinstance(of_policy, spaces.Dict)
    for name in expected if fits else ():
        shape, wanted = parts[name].shape or (), expected[name].shape or ()
        fits = fits and (shape == wanted or (len(shape) == 3 and (shape[2], *shape[:2]) == wanted))
    if not fits:
        raise ValueError(f"The policy takes observations of {of_policy}, the raw ones are of {raw}.")


def describe(
    model: ConstrainedOffPolicyAlgorithm,
    graph: ExportedPolicy,
    observation_space: spaces.Space,
    task: str | None,
    results: dict[str, Any] | None,
) -> dict[str, Any]:
    """
    :param model: The model
    :param graph: What is exported
    :param observation_space: Space of the raw observations
    :param task: See :func:`export_onnx`
    :param results: See there
    :return: The metadata of the file
    """
    action_space = model.action_space
    return {
        **describe_model(model, task, results),
        "format": FORMAT,
        "is_dict": graph.is_dict,
        "observations": {
            name: {"shape": list(space.shape or ()), "dtype": str(space.dtype)} for name, space in graph.raw_spaces.items()
        },
        "action": {
            "shape": list(action_space.shape),
            "dtype": str(graph.low.numpy().dtype),
            "low": action_space.low.tolist(),
            "high": action_space.high.tolist(),
        },
        "noise_shape": None if graph.deterministic else [graph.n_candidates, *graph.policy.noise_shape],
        "n_candidates": graph.n_candidates,
        "deterministic": graph.deterministic,
        "normalized": sorted(graph.statistics),
    }


def write_graph(graph: ExportedPolicy, metadata: dict[str, Any]) -> bytes:
    """
    :param graph: The policy
    :param metadata: What the file says of itself
    :return: Content of the ONNX file
    :raises ImportError: If onnx or onnxscript is missing.
    """
    try:
        import onnxscript
    except ImportError as error:
        raise ImportError('Exporting needs onnx and onnxscript: pip install "sb3_algd[deploy]"') from error
    opset = onnxscript.opset18

    def addcdiv(self: Any, tensor1: Any, tensor2: Any, value: float = 1.0) -> Any:
        return opset.Add(self, opset.Div(opset.Mul(tensor1, value), tensor2))

    inputs = [th.from_numpy(array) for array in example_inputs(graph, 3).values()]
    batch = th.export.Dim("batch")
    # torch.onnx reports its progress, and that torchvision is missing
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        program = th.onnx.export(
            graph,
            tuple(inputs),
            dynamo=True,
            input_names=list(example_inputs(graph, 1)),
            output_names=[ACTION],
            dynamic_shapes=(tuple({0: batch} for _ in inputs),),
            custom_translation_table={th.ops.aten.addcdiv.default: addcdiv},
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props[METADATA_KEY] = json.dumps(metadata)
    return program.model_proto.SerializeToString()


def example_inputs(graph: ExportedPolicy, batch_size: int) -> Observation:
    """
    :param graph: The policy
    :param batch_size: Number of observations
    :return: What the graph takes, by name
    """
    arrays = {
        name: np.zeros((batch_size, *(space.shape or ())), dtype=space.dtype) for name, space in graph.raw_spaces.items()
    }
    if not graph.deterministic:
        arrays[NOISE] = np.zeros((batch_size, graph.n_candidates, *graph.policy.noise_shape), dtype=np.float32)
    return arrays
