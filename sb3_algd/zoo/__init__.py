"""
The algorithms of this package in the `RL Zoo <https://github.com/DLR-RM/rl-baselines3-zoo>`_: train, tune, enjoy, record and
plot with its commands.

Importing this module registers ALGD and SACLag in ``rl_zoo3.ALGOS``, for those who drive the Zoo from Python. The commands are
``python -m sb3_algd.zoo <command>``, or ``sb3-algd <command>``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    import rl_zoo3
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
except ImportError as error:
    raise ImportError(
        f"The commands of the RL Zoo need {error.name}, which is not installed. Install what they need with: "
        'pip install "sb3_algd[zoo]"  (in a copy of the repository: pip install ".[zoo]")'
    ) from error

from sb3_algd import ALGD, SACLag
from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm
from sb3_algd.zoo.hyperparams import convert_params, sample_algd_params, sample_params, sample_sac_lag_params

#: Name of the default algorithm on the Zoo's command line
ALGO = "algd"


def _data_folder(name: str) -> Path:
    """Where data is that is kept at the top of the repository, and in this package where it is installed from a wheel."""
    installed = Path(__file__).parent / name
    return installed if installed.is_dir() else Path(__file__).parents[2] / name


#: The hyperparameters of each task, one file per algorithm
CONFIGS = _data_folder("zoo_configs")
#: Agents that come with the package
TRAINED_AGENTS = _data_folder("trained_agents")


def register(
    name: str, algorithm: type[ConstrainedOffPolicyAlgorithm], sampler: Callable[..., dict[str, Any]] = sample_params
) -> None:
    """
    Tell the Zoo of an algorithm. Its hyperparameters are read from the file that ``train --conf-file`` names, or from
    ``<name>.yml`` in ``zoo_configs``.

    :param name: Its name on the command line
    :param algorithm: Its class
    :param sampler: What ``-optimize`` may choose, see :mod:`sb3_algd.zoo.hyperparams`
    """
    # The Zoo has no hook for algorithms of others. Its modules share these dictionaries, so they are changed in place.
    rl_zoo3.ALGOS[name] = algorithm
    HYPERPARAMS_SAMPLER[name] = sampler
    HYPERPARAMS_CONVERTER[name] = convert_params


def is_constrained(algo: str) -> bool:
    """:param algo: Name of an algorithm. :return: Whether it has cost limits."""
    return issubclass(rl_zoo3.ALGOS.get(algo, object), ConstrainedOffPolicyAlgorithm)


register("algd", ALGD, sample_algd_params)
register("sac_lag", SACLag, sample_sac_lag_params)
