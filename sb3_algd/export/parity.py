"""Whether an exported policy acts as ``predict`` does, with the same noise."""

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecNormalize

from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm
from sb3_algd.common.policies import ConstrainedPolicy
from sb3_algd.export.spaces import OBSERVATION
from sb3_algd_runtime import Agent

if TYPE_CHECKING:
    from sb3_algd.export.onnx_file import ExportedPolicy

#: By how much the energy of the exported choice may exceed the lowest one, relative to 1 + |energy|: single precision
MAX_ENERGY_DIFFERENCE = 1e-4
N_CHECKS = 64

Observation = dict[str, np.ndarray]


def sample_observations(model: ConstrainedOffPolicyAlgorithm, graph: "ExportedPolicy", n_observations: int) -> Observation:
    """
    :param model: The model
    :param graph: Its policy
    :param n_observations: How many
    :return: Raw observations by name, from the replay buffer if it has any, else from the observation space
    """
    buffer: Any = model.replay_buffer
    if buffer is None or buffer.size() == 0:
        # A copy: the samples of the model's own space stay as they would be
        raw_spaces = copy.deepcopy(graph.raw_spaces)
        for space in raw_spaces.values():
            space.seed(0)
        return {
            name: np.stack([np.asarray(space.sample(), dtype=space.dtype) for _ in range(n_observations)])
            for name, space in raw_spaces.items()
        }
    rows = np.random.default_rng(0).integers(buffer.size(), size=n_observations)
    stored = buffer.observations if graph.is_dict else {OBSERVATION: buffer.observations}
    observations = {}
    for name, space in graph.raw_spaces.items():
        values = stored[name][rows, 0]
        if space.shape != graph.policy_spaces[name].shape:
            values = np.moveaxis(values, 1, -1)
        observations[name] = values.reshape(n_observations, *(space.shape or ())).astype(space.dtype)
    return observations


def compare(
    agent: Agent, graph: "ExportedPolicy", model: ConstrainedOffPolicyAlgorithm, vec_normalize: VecNormalize | None
) -> float:
    """
    :param agent: The exported policy
    :param graph: What it was exported from
    :param model: The model
    :param vec_normalize: Its wrapper, if any
    :return: The largest difference between actions of the exported policy and of ``predict`` with the same noise, in batches
        and one by one, as a share of half the action's range where that is above 1
    """
    policy = graph.policy
    observations = sample_observations(model, graph, N_CHECKS)
    worst = 0.0
    for rows in (slice(0, N_CHECKS), slice(0, 1), slice(1, 2)):
        raw: Any = {name: value[rows] for name, value in observations.items()}
        raw = raw if graph.is_dict else raw[OBSERVATION]
        seen = raw if vec_normalize is None else vec_normalize.normalize_obs(raw)
        n_rows = rows.stop - rows.start
        with th.random.fork_rng():
            th.manual_seed(0)
            noise = draw_as_predict(graph, n_rows)
            for deterministic in {graph.deterministic, True}:
                th.manual_seed(0)
                expected, _ = policy.predict(seen, deterministic=deterministic)
                actual = agent.act(raw, deterministic, noise=None if graph.deterministic else noise.numpy())
                differences = distance(policy, actual, expected)
                if graph.n_candidates > 1 and not deterministic:
                    differences = np.minimum(differences, distance_to_equals(policy, seen, noise, actual))
                worst = max(worst, float(differences.max())) if np.isfinite(differences).all() else np.inf
    return worst


def draw_as_predict(graph: "ExportedPolicy", n_rows: int) -> th.Tensor:
    """
    :param graph: The policy
    :param n_rows: Number of observations
    :return: The noise that ``predict`` draws from the current state of the generator, in the layout of the graph
    """
    n_steps, action_dim = graph.policy.noise_shape
    if graph.n_candidates > 1:
        return th.randn((n_rows, graph.n_candidates, n_steps, action_dim))
    return th.randn((n_steps, n_rows, action_dim)).transpose(0, 1).unsqueeze(1).contiguous()


def distance(policy: ConstrainedPolicy, actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """
    :param policy: The policy
    :param actual: Actions, shape (..., *action_space.shape)
    :param expected: Others, of a shape that fits
    :return: Largest difference of each row, relative to half the action's range where that is above 1, shape (...)
    """
    space = policy.action_space
    relative = np.abs(actual - expected) / np.maximum((space.high - space.low) / 2, 1.0)
    return relative.max(axis=tuple(range(-len(space.shape), 0)))


def distance_to_equals(policy: ConstrainedPolicy, observations: Any, noise: th.Tensor, actual: np.ndarray) -> np.ndarray:
    """
    Where the energies of two candidates differ by no more than rounding, each of them is a right choice.

    :param policy: The policy
    :param observations: Batch of observations as ``predict`` takes them
    :param noise: Noise of the candidates
    :param actual: The exported policy's choices
    :return: Difference of each to the nearest candidate whose energy equals the lowest one, shape (batch,)
    """
    with th.no_grad():
        obs, _ = policy.obs_to_tensor(observations)
        candidates = policy.actions_from_noise(obs, noise)
        energy = policy.energy(obs, candidates)
    lowest = energy.amin(dim=1, keepdim=True)
    equal = (energy - lowest <= MAX_ENERGY_DIFFERENCE * (1.0 + lowest.abs())).numpy()
    actions = policy.unscale_action(candidates.numpy().reshape(*equal.shape, *policy.action_space.shape))
    return np.where(equal, distance(policy, actual[:, np.newaxis], actions), np.inf).min(axis=1)
