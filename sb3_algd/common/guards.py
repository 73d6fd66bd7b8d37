"""What keeps a long run from going wrong silently: finite numbers, copies of what they could spoil, and useful warnings."""

import copy
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import stable_baselines3
import torch as th
from stable_baselines3.common.save_util import recursive_getattr
from stable_baselines3.common.vec_env import VecNormalize

if TYPE_CHECKING:
    from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm

#: Updates between two copies of the weights: each costs about as much as an update
BACKUP_INTERVAL = 500

SIX_TUPLE_ADVICE = (
    "The environment's step() returns more than Gymnasium's five values, probably the cost as in "
    "Safety-Gymnasium's (obs, reward, cost, terminated, truncated, info). "
    "Put the cost into info['cost']: wrap the environment in sb3_algd.envs.SixTupleEnv."
)
# What SB3 says of a bare environment, and what Gymnasium's checker says of a registered one
_SIX_TUPLE_ERROR = re.compile(r"too many values to unpack \(expected 5|step.* to return a four or five element tuple")

_PACKAGES = tuple(f"{Path(file).parent}{os.sep}" for file in (Path(__file__).parent, stable_baselines3.__file__))


def warn_user(message: str) -> None:
    """
    Warn, with the place in the user's own code that led here.

    :param message: What is odd, and what to do.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGES):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


@contextmanager
def explain_environment_errors() -> Iterator[None]:
    """
    Say what is wrong where the message of an environment does not.

    :raises ValueError: If the environment's ``step`` returned six values
    :raises RuntimeError: If the process of an environment died
    """
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise RuntimeError(
            "An environment in a process of its own (SubprocVecEnv) died; its own error is printed above this one. If "
            f"that says 'too many values to unpack (expected 5)': {SIX_TUPLE_ADVICE}"
        ) from error
    except (ValueError, gym.error.Error) as error:
        if not _SIX_TUPLE_ERROR.search(str(error)):
            raise
        raise ValueError(SIX_TUPLE_ADVICE) from error


def check_finite(name: str, value: np.ndarray | dict[str, np.ndarray]) -> None:
    """
    Refuse what would silently poison every later update.

    :param name: What the value is, for the message.
    :param value: Array, or one array per key.
    :raises ValueError: If a number is not finite, in single precision.
    """
    for key, array in value.items() if isinstance(value, dict) else [("", value)]:
        if array.dtype == np.float64:
            # What networks and most replay buffers make of it
            with np.errstate(over="ignore"):
                array = array.astype(np.float32)
        if not np.isfinite(array).all():
            where = f" {key!r}" if key else ""
            raise ValueError(
                f"The environment returned a non-finite {name}{where}: {array}. Nothing of it was stored; "
                "the model can still be saved. Fix the environment, or clip its output in a wrapper."
            )


def all_finite(parameters: dict[str, Any]) -> bool:
    """
    :param parameters: What SB3's ``get_parameters`` gives: a state dictionary per network and optimiser.
    :return: Whether all weights are finite. (One that is not spoils the optimisers' moments as well, never the reverse.)
    """
    tensors = [
        tensor.isfinite().all()
        for state in parameters.values()
        for tensor in state.values()
        if isinstance(tensor, th.Tensor) and tensor.is_floating_point()
    ]
    return bool(th.stack(tensors).all())


class NormalizationBackup:
    """
    The running statistics of a ``VecNormalize``, to undo what one non-finite observation or reward does to them for good.

    :param vec_normalize: The wrapper, None for none.
    """

    def __init__(self, vec_normalize: VecNormalize | None) -> None:
        statistics: list[Any] = []
        if vec_normalize is not None:
            obs_rms = getattr(vec_normalize, "obs_rms", [])
            statistics = [vec_normalize.ret_rms, *(obs_rms.values() if isinstance(obs_rms, dict) else np.ravel(obs_rms))]
        # An update replaces these three, so references are enough, and cost nothing at each step
        self._statistics = [(rms, rms.mean, rms.var, rms.count) for rms in statistics]

    def restore(self) -> None:
        """Give the statistics their values back."""
        for rms, mean, var, count in self._statistics:
            rms.mean, rms.var, rms.count = mean, var, count


class WeightsBackup:
    """A copy of everything learned, made every ``BACKUP_INTERVAL`` updates, to go back to when training diverges."""

    def __init__(self) -> None:
        self._parameters: dict[str, Any] | None = None
        self._n_updates = 0

    def renew(self, model: "ConstrainedOffPolicyAlgorithm") -> None:
        """
        Copy weights and optimisers if the last copy is old.

        :param model: The model, before an update.
        """
        if self._parameters is not None and model._n_updates - self._n_updates < BACKUP_INTERVAL:
            return
        # What a subclass keeps as single tensors is not among SB3's parameters
        variables = {name: recursive_getattr(model, name).detach() for name in model._get_torch_save_params()[1]}
        parameters = {**model.get_parameters(), "": variables}
        # The next losses will show it; the old copy is needed then
        if all_finite(parameters):
            self._parameters, self._n_updates = copy.deepcopy(parameters), model._n_updates

    def restore(self, model: "ConstrainedOffPolicyAlgorithm") -> str:
        """
        Go back to the copy.

        :param model: The model that diverged.
        :return: What was done, for the error message.
        """
        if self._parameters is None:
            return "Go back to the last saved model"
        parameters = dict(self._parameters)
        for name, value in parameters.pop("").items():
            recursive_getattr(model, name).data.copy_(value)
        model.set_parameters(parameters, device=model.device)
        model._n_updates = self._n_updates
        return f"The model was set back to what it was after update {self._n_updates} and can be saved"
