"""What an exported policy says of itself, and what is taken from its model."""

from typing import Any, Literal

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize, VecTransposeImage, unwrap_vec_wrapper

import sb3_algd
from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm
from sb3_algd.common.episode_costs import CostKey
from sb3_algd.common.lagrange import EnergyTerms
from sb3_algd.common.policies import ConstrainedPolicy


def describe_model(model: ConstrainedOffPolicyAlgorithm, task: str | None, results: dict[str, Any] | None) -> dict[str, Any]:
    """
    :param model: The model
    :param task: Id of the task. If None, the one of the model's environment
    :param results: What was measured
    :return: Where the policy comes from and which limit it was trained for, as JSON can hold it
    """
    if task is None and model.env is not None:
        spec = model.env.get_attr("spec")[0]
        task = None if spec is None else spec.id
    return {
        "version": sb3_algd.__version__,
        "algorithm": type(model).__name__,
        "task": task,
        "num_timesteps": model.num_timesteps,
        "cost_limit": np.asarray(model.cost_limit).tolist(),
        "cost_limit_discounted": bool(model.cost_limit_discounted),
        "cost_limit_gamma": model.cost_limit_gamma,
        # A function cannot be written down
        "cost_key": model.cost_key if isinstance(model.cost_key, str) else None,
        "episode_length": model.episode_length,
        "results": results or {},
    }


class ExportedConstraint:
    """
    The limit that an exported policy was trained for, under the names that evaluations look for in a model.

    :param description: What the file says
    :raises ValueError: If that is not complete.
    """

    def __init__(self, description: dict[str, Any]) -> None:
        try:
            self.cost_limit = np.array(description["cost_limit"], dtype=np.float64).reshape(-1)
            self.cost_limit_discounted = bool(description["cost_limit_discounted"])
            self.cost_limit_gamma = float(description["cost_limit_gamma"])
            cost_key = description["cost_key"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError("The file does not say which cost limit its policy was trained for.") from error
        self.n_constraints = len(self.cost_limit)
        self.cost_key: CostKey = ask_for_cost_key if cost_key is None else str(cost_key)


def ask_for_cost_key(info: dict[str, Any]) -> Any:
    """
    Takes the place of a ``cost_key`` that no file can hold.

    :param info: What an environment returned
    :raises ValueError: Always.
    """
    raise ValueError("The model read its costs with a function, which an exported policy cannot hold: give cost_key=...")


def find_vec_normalize(
    model: ConstrainedOffPolicyAlgorithm, vec_normalize: VecNormalize | Literal["auto"] | None
) -> VecNormalize | None:
    """
    :param model: The model
    :param vec_normalize: See :func:`~sb3_algd.export.export_onnx`
    :return: The wrapper whose statistics belong to the model, None for none
    :raises ValueError: If that is unknown.
    """
    if vec_normalize is None or isinstance(vec_normalize, VecNormalize):
        return vec_normalize
    if vec_normalize != "auto":
        raise ValueError(f"vec_normalize must be a VecNormalize wrapper, None or 'auto', got {vec_normalize!r}.")
    if model.env is None:
        raise ValueError(
            "The model has no environment, which would tell whether it was trained with VecNormalize: give "
            "vec_normalize=VecNormalize.load(...) with the saved statistics, or vec_normalize=None if it was trained without."
        )
    return model.get_vec_normalize_env()


def copy_policy(model: ConstrainedOffPolicyAlgorithm) -> ConstrainedPolicy:
    """
    :param model: The model
    :return: A copy of its policy on the CPU and in evaluation mode, which knows the terms of the energy
    """
    # As it is loaded from a file: distributions of SB3's actors hold tensors that cannot be copied
    with th.random.fork_rng():
        policy = type(model.policy)(**model.policy._get_constructor_parameters()).to("cpu").requires_grad_(False)
    policy.load_state_dict({name: value.cpu() for name, value in model.policy.state_dict().items()})
    policy.set_training_mode(False)
    policy.energy_terms = EnergyTerms(*(term.detach().cpu() for term in model._energy_terms(model.units.moments)))
    return policy


def raw_observation_space(model: ConstrainedOffPolicyAlgorithm, vec_normalize: VecNormalize | None) -> spaces.Space:
    """
    :param model: The model
    :param vec_normalize: Its wrapper, if any
    :return: Space of the observations before they are normalised and images are transposed
    """
    if vec_normalize is not None:
        return vec_normalize.venv.observation_space
    transposed = None if model.env is None else unwrap_vec_wrapper(model.env, VecTransposeImage)
    return model.observation_space if transposed is None else transposed.venv.observation_space
