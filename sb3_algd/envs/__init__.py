"""Environments with costs: registration in Gymnasium, and wrappers. What needs MuJoCo is in :mod:`sb3_algd.envs.safety`."""

import multiprocessing

import gymnasium as gym

from sb3_algd.envs.catalogue import entries
from sb3_algd.envs.wrappers import CostFromCallable, SixTupleEnv

__all__ = ["CostFromCallable", "SixTupleEnv", "register_envs"]


def register_envs() -> None:
    """
    Register every id of :mod:`sb3_algd.envs.catalogue` in Gymnasium. A second call changes nothing.

    An id that is already registered, for example by a working ``safety_gymnasium``, is not replaced.
    """
    for entry in entries():
        if entry.id not in gym.registry:
            gym.register(entry.id, entry.entry_point, max_episode_steps=entry.episode_steps, kwargs=entry.kwargs)
    # Stable-Baselines3's SubprocVecEnv forks its workers from a server process that knows no id but Gymnasium's, unless the
    # user's main module is a file that imports this package: in a notebook or under pytest it isn't.
    if "forkserver" in multiprocessing.get_all_start_methods():
        multiprocessing.set_forkserver_preload(["__main__", "sb3_algd"])
