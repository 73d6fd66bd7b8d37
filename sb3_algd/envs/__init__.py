"""Environments with costs: registration in Gymnasium, and wrappers. What needs MuJoCo is in :mod:`sb3_algd.envs.safety`."""

import multiprocessing

import gymnasium as gym

from sb3_algd.envs.catalogue import entries
from sb3_algd.envs.wrappers import CostFromCallable, SixTupleEnv

__all__ = ["CostFromCallable", "SixTupleEnv", "register_envs"]

PACKAGE = "sb3_algd"


def register_envs() -> None:
    """
    Register every id of :mod:`sb3_algd.envs.catalogue` in Gymnasium. A second call changes nothing.

    An id that is already registered, for example by a working ``safety_gymnasium``, is not replaced.
    """
    for entry in entries():
        if entry.id not in gym.registry:
            gym.register(entry.id, entry.entry_point, max_episode_steps=entry.episode_steps, kwargs=entry.kwargs)
    preload_in_forkserver()


def preload_in_forkserver() -> None:
    """
    Add this package to the modules that a forkserver preloads, after those of the user.

    Stable-Baselines3's ``SubprocVecEnv`` starts its workers from a forkserver if there is one. Without the preload, they only
    know our ids if the main module of the user is a file that imports this package. In a notebook or under pytest it is not.
    A forkserver that is already running is left as it is.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return
    from multiprocessing import forkserver

    # The list is global and may be the user's. Python can only replace it, and has no public function to read it. If a
    # later version renames the attribute, nothing is preloaded: that is better than to drop the user's modules.
    current = getattr(forkserver._forkserver, "_preload_modules", None)
    if current is not None and PACKAGE not in current:
        multiprocessing.set_forkserver_preload([*current, PACKAGE])
