"""
ALGD in the `RL Zoo <https://github.com/DLR-RM/rl-baselines3-zoo>`_: train, tune, enjoy, record and plot with its commands.

Importing this module registers ALGD in ``rl_zoo3.ALGOS``, for those who drive the Zoo from Python. The commands are
``python -m sb3_algd.zoo.<command>``, or ``sb3-algd <command>``.
"""

from pathlib import Path

try:
    import rl_zoo3
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
except ImportError as error:
    raise ImportError(
        f"The commands of the RL Zoo need {error.name}, which is not installed. Install what they need with: "
        'pip install "sb3_algd[zoo]"  (in a copy of the repository: pip install ".[zoo]")'
    ) from error

from sb3_algd import ALGD
from sb3_algd.zoo.hyperparams import convert_algd_params, sample_algd_params

#: Name of ALGD on the Zoo's command line
ALGO = "algd"


def _data_folder(name: str) -> Path:
    """Where data is that is kept at the top of the repository, and in this package where it is installed from a wheel."""
    installed = Path(__file__).parent / name
    return installed if installed.is_dir() else Path(__file__).parents[2] / name


#: The hyperparameters of each task
CONFIG_FILE = _data_folder("zoo_configs") / f"{ALGO}.yml"
#: Agents that come with the package
TRAINED_AGENTS = _data_folder("trained_agents")


def register() -> None:
    """Tell the Zoo of ALGD; calling it again changes nothing."""
    # The Zoo has no hook for algorithms of others. Its modules share these dictionaries, so they are changed in place.
    rl_zoo3.ALGOS[ALGO] = ALGD
    HYPERPARAMS_SAMPLER[ALGO] = sample_algd_params
    HYPERPARAMS_CONVERTER[ALGO] = convert_algd_params


register()
