"""What faults happen to: small runs of each kind, the processes that train them, and what happens to their files."""

import contextlib
import hashlib
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecNormalize

from sb3_algd import ALGD
from sb3_algd.common import checkpoint_files
from sb3_algd.common.checkpoint import ResumableCheckpointCallback, resume
from sb3_algd.common.checkpoint_files import MANIFEST
from tests.conftest import CostlyBitFlipping, CostlyEnv, make_env

STEPS, SAVE_FREQ = 64, 16


# --- kinds of runs ---------------------------------------------------------------------------------------------------


class ImageEnv(CostlyEnv):
    """Small images of noise, whose brightness is the state."""

    observation_space = spaces.Box(0, 255, shape=(36, 36, 1), dtype=np.uint8)

    def _image(self) -> np.ndarray:
        return self.np_random.integers(0, 255, (36, 36, 1)).astype(np.uint8)

    def reset(self, **kwargs: Any) -> Any:
        super().reset(**kwargs)
        return self._image(), {}

    def step(self, action: np.ndarray) -> Any:
        _, *rest = super().step(action)
        return self._image(), *rest


class DictEnv(CostlyEnv):
    """The state in two parts."""

    observation_space = spaces.Dict({"a": spaces.Box(-1, 1, (2,), np.float32), "b": spaces.Box(-1, 1, (1,), np.float32)})

    def reset(self, **kwargs: Any) -> Any:
        state, info = super().reset(**kwargs)
        return {"a": state[:2], "b": state[2:]}, info

    def step(self, action: np.ndarray) -> Any:
        state, *rest = super().step(action)
        return {"a": state[:2], "b": state[2:]}, *rest


def _limited(env: gym.Env) -> gym.Env:
    return gym.wrappers.TimeLimit(env, 8)


def _make_goal_env() -> gym.Env:
    return CostlyBitFlipping(n_bits=3, continuous=True, max_steps=5)


#: Name: environments, arguments of the model
RUNS: dict[str, tuple[Callable[[], VecEnv], dict[str, Any]]] = {
    "plain": (lambda: make_vec_env(lambda: make_env(1, 8), n_envs=1), {}),
    "image": (lambda: make_vec_env(lambda: _limited(ImageEnv()), n_envs=1), dict(policy="CnnPolicy")),
    "Dict": (lambda: make_vec_env(lambda: _limited(DictEnv()), n_envs=1), dict(policy="MultiInputPolicy")),
    "HER": (
        lambda: make_vec_env(_make_goal_env, n_envs=2),
        dict(policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer, episode_length=5),
    ),
    "VecNormalize": (lambda: VecNormalize(make_vec_env(lambda: make_env(1, 8), n_envs=2)), {}),
    "SubprocVecEnv": (lambda: SubprocVecEnv([lambda: make_env(1, 8)] * 2, start_method="fork"), {}),
}


def make_run(kind: str) -> ALGD:
    """:param kind: A kind of run. :return: Its untrained model."""
    make_envs, kwargs = RUNS[kind]
    small = dict(net_arch=[8], denoising_steps=2)
    if kind == "image":
        small["features_extractor_kwargs"] = dict(features_dim=8)
    defaults: dict[str, Any] = dict(policy="MlpPolicy", policy_kwargs=small, buffer_size=50, cost_limit=2.0, batch_size=8)
    return ALGD(
        env=make_envs(), learning_starts=10, train_freq=4, gradient_steps=2, seed=0, device="cpu", **{**defaults, **kwargs}
    )


def hash_of(*values: Any) -> str:
    """:param values: Arrays, dictionaries of arrays, numbers. :return: SHA-256 of all of them."""
    digest = hashlib.sha256()
    for value in values:
        for part in value.values() if isinstance(value, dict) else [value]:
            digest.update(np.asarray(part).tobytes())
    return digest.hexdigest()


def result_of(model: ALGD) -> str:
    """:param model: A trained model. :return: Hash of everything that it has learned and seen."""
    buffer = model.replay_buffer
    assert buffer is not None
    values: list[Any] = [module.state_dict() for module in (model.policy, model.lagrange_multiplier, model.units)]
    for name in ("observations", "next_observations", "rewards", "costs", "actions", "dones", "timeouts"):
        stored = getattr(buffer, name)
        rows = stored.items() if isinstance(stored, dict) else [(name, stored)]
        values.append({key: array[: buffer.size()] for key, array in rows})
    normalize = model.get_vec_normalize_env()
    if normalize is not None:
        assert isinstance(normalize.obs_rms, RunningMeanStd)
        values += [normalize.obs_rms.mean, normalize.obs_rms.var, normalize.ret_rms.var]
    return hash_of(*values, model._last_obs, model.num_timesteps, model._n_updates)


class StepLog(BaseCallback):
    """
    Writes down where a training begins, and what is seen and done in each of its steps. A kill leaves what was written.

    :param path: File that gets a line of each.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def _write(self, *words: Any) -> None:
        with self.path.open("a") as file:
            print(*words, file=file)

    def _on_training_start(self) -> None:
        self._write("began", self.num_timesteps)

    def _on_step(self) -> bool:
        costs = [info["cost"] for info in self.locals["infos"]]
        seen = [self.locals[name] for name in ("actions", "new_obs", "rewards", "dones")]
        self._write(self.num_timesteps, hash_of(*seen, costs))
        return True


def run_or_resume(kind: str, folder: Path, log: Path, anew: bool = False) -> ALGD:
    """
    :param kind: A kind of run.
    :param folder: Of its checkpoint.
    :param log: See :class:`StepLog`.
    :param anew: Whether to start from the beginning.
    :return: The model after its whole training.
    """
    if anew or not (folder / MANIFEST).exists():
        return make_run(kind).learn(STEPS, [StepLog(log), ResumableCheckpointCallback(SAVE_FREQ, folder)])
    resumed = resume(folder, RUNS[kind][0](), StepLog(log), total_timesteps=STEPS)
    assert isinstance(resumed, ALGD)
    return resumed


# --- processes -------------------------------------------------------------------------------------------------------


def in_process(work: Callable[[], ALGD], out: Path, prepare: Callable[[], Any] | None = None) -> int:
    """
    Fork a process that trains.

    :param work: Trains.
    :param out: File of its result.
    :param prepare: Called before, in the new process.
    :return: Its id.
    """
    process = os.fork()
    if process:
        return process
    os.setpgid(0, 0)
    # Environments in processes of their own say much when their parent is killed
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    result: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if prepare is not None:
                prepare()
            result["digest"] = result_of(work())
        except BaseException as error:  # noqa: BLE001
            result["error"] = f"{type(error).__name__}: {error}"
            result["traceback"] = traceback.format_exc()
    texts = [str(warning.message) for warning in caught]
    result["warnings"] = [text for text in texts if "checkpoint" in text or "has been repaired" in text]
    out.write_text(json.dumps(result))
    os._exit(0)


def wait(process: int) -> int:
    """:param process: Id. :return: How it ended, after what it has left was ended too."""
    status = os.waitpid(process, 0)[1]
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)
    return status


class FileEvents:
    """
    Counts what happens to the files of a folder, and lets something happen at one of these events.

    :param folder: The folder.
    :param at: Number of the event, 0 for none.
    :param happen: What happens, called with the open file where one is half-written.
    :param only: Kind of event that counts, None for all.
    """

    def __init__(self, folder: Path, at: int, happen: Callable[[], Any], only: str | None = None) -> None:
        self.folder, self.at, self.happen, self.only = f"{folder}{os.sep}", at, happen, only
        self.count = 0

    def event(self, kind: str) -> bool:
        """:param kind: What happened. :return: Whether this is the one."""
        if self.only is None or kind == self.only:
            self.count += 1
            return self.count == self.at
        return False

    def watch(self) -> None:
        """Begin, for the rest of this process."""
        events, write, fsync = self, checkpoint_files._Hashing.write, os.fsync

        def half_write(self: Any, data: Any) -> int:
            if events.event("write"):
                self._file.write(bytes(memoryview(data).cast("B"))[: memoryview(data).nbytes // 2])
                self._file.flush()
                events.happen()
            return write(self, data)

        def watched_fsync(file: Any) -> None:
            if self.event("fsync"):
                self.happen()
            fsync(file)

        def audit(name: str, arguments: tuple[Any, ...]) -> None:
            inside = bool(arguments) and str(arguments[0]).startswith(self.folder)
            writes = name == "open" and isinstance(arguments[1], str) and arguments[1][:1] in "wa"
            if inside and (writes or name in ("os.rename", "os.remove")) and self.event(name):
                self.happen()

        checkpoint_files._Hashing.write = half_write  # type: ignore[method-assign]
        os.fsync = watched_fsync  # type: ignore[assignment]
        sys.addaudithook(audit)
