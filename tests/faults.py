"""
The fault suite: runs are killed, their files damaged, their disk filled, and a second run started beside them. Each is
resumed, and has to end with the weights of the run to which nothing happened, bit for bit.

    python -m tests.faults --out faults.jsonl

Every trial is a forked process. A fault counts as ``exact`` (the same weights, also where a warning told of the damage),
``refused`` (an error that names the file and what to do) or ``silent`` (other weights, or another error).
"""

import argparse
import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecNormalize

from sb3_algd import ALGD
from sb3_algd.common import checkpoint_files
from sb3_algd.common.checkpoint import ResumableCheckpointCallback, resume
from sb3_algd.common.checkpoint_files import MANIFEST
from tests.conftest import CostlyBitFlipping, CostlyEnv, make_env

STEPS, SAVE_FREQ = 64, 16
COLUMNS = ("tried", "exact", "warned", "refused", "silent")
#: Kinds of faults, and how many of each are tried with each kind of run
FULL = dict(kill=11, kill_at_file_event=12, half_written=5, bit_flip=12, truncation=4, full_disk=3, two_runs=2, two_resumes=3)
SHORT = dict(kill=1, kill_at_file_event=1, bit_flip=1)


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


def result_of(model: ALGD) -> str:
    """:param model: A trained model. :return: Hash of everything that it has learned and seen."""
    digest = hashlib.sha256()
    assert model.replay_buffer is not None
    states = [model.policy.state_dict(), model.lagrange_multiplier.state_dict()]
    digest.update(pickle.dumps([(name, value.numpy().tobytes()) for state in states for name, value in state.items()]))
    size = model.replay_buffer.size()
    for name in ("rewards", "costs", "actions", "dones", "timeouts"):
        digest.update(getattr(model.replay_buffer, name)[:size].tobytes())
    normalize = model.get_vec_normalize_env()
    if normalize is not None:
        assert isinstance(normalize.obs_rms, RunningMeanStd)
        digest.update(pickle.dumps((normalize.obs_rms.mean.tobytes(), float(normalize.ret_rms.var))))
    digest.update(f"{model.num_timesteps} {model._n_updates}".encode())
    return digest.hexdigest()


def run_or_resume(kind: str, folder: Path, anew: bool = False) -> ALGD:
    """
    :param kind: A kind of run.
    :param folder: Of its checkpoint.
    :param anew: Whether to start from the beginning.
    :return: The model after its whole training.
    """
    if anew or not (folder / MANIFEST).exists():
        return make_run(kind).learn(STEPS, ResumableCheckpointCallback(SAVE_FREQ, folder))
    resumed = resume(folder, RUNS[kind][0](), total_timesteps=STEPS)
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
    result["warnings"] = [str(warning.message) for warning in caught if "checkpoint" in str(warning.message)]
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
        self.folder, self.at, self.happen, self.only = str(folder), at, happen, only
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


def kill_self() -> None:
    """As from outside."""
    os.kill(os.getpid(), signal.SIGKILL)


# --- faults ----------------------------------------------------------------------------------------------------------


class Suite:
    """
    Faults of one kind of run.

    :param kind: The kind of run.
    :param folder: For everything that is written.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        folder.mkdir(parents=True)
        self.rng = np.random.default_rng(len(kind))
        self.number = 0
        #: A run that was broken off after its checkpoint of step 48
        self.broken = folder / "broken"
        self.n_events: Counter[str] = Counter()
        started = time.monotonic()
        self.expected = self._finish(folder / "whole", anew=True)["digest"]
        self.seconds = time.monotonic() - started
        self._count_events()
        # The last checkpoint is that of the end: the process is killed as it writes it
        wait(self._start(self.broken, "fsync", int(0.9 * self.n_events["fsync"]), kill_self))

    def _count_events(self) -> None:
        out = self.folder / "events.json"

        def prepare() -> None:
            self.watched = {only: FileEvents(self.folder / "counted", 0, kill_self, only) for only in (None, "write", "fsync")}
            for events in self.watched.values():
                events.watch()

        def work() -> ALGD:
            model = run_or_resume(self.kind, self.folder / "counted", anew=True)
            out.write_text(json.dumps([[str(only), events.count] for only, events in self.watched.items()]))
            return model

        wait(in_process(work, self.folder / "counted.json", prepare))
        self.n_events.update(dict(json.loads(out.read_text())))

    def _start(self, folder: Path, only: str | None, at: int, happen: Callable[[], Any]) -> int:
        """Start a run, or resume it if it has a checkpoint, to which something happens at a file event."""
        events = FileEvents(folder, at, happen, only)
        return in_process(lambda: run_or_resume(self.kind, folder), self.folder / "ignored.json", events.watch)

    def _finish(self, folder: Path, anew: bool = False) -> dict[str, Any]:
        out = self.folder / "result.json"
        out.unlink(missing_ok=True)
        wait(in_process(lambda: run_or_resume(self.kind, folder, anew), out))
        result: dict[str, Any] = json.loads(out.read_text())
        if anew and "digest" not in result:
            raise RuntimeError(result["traceback"])
        return result

    def _new_folder(self, copied: bool = False) -> Path:
        self.number += 1
        folder = self.folder / f"{self.number}"
        if copied:
            shutil.copytree(self.broken, folder)
        return folder

    def _judge(self, folder: Path) -> tuple[str, str]:
        """Resume, and compare."""
        result = self._finish(folder)
        shutil.rmtree(folder)
        if result.get("digest") == self.expected:
            return "exact", "; ".join(result["warnings"])
        if "can be used: " in result.get("error", "") or "are damaged" in result.get("error", ""):
            return "refused", result["error"]
        return "silent", result.get("traceback", "other weights")

    def kill(self) -> tuple[str, str]:
        """Kill a run and its resumption at random moments."""
        folder = self._new_folder()
        for _ in range(2):
            process = in_process(lambda: run_or_resume(self.kind, folder), self.folder / "ignored.json")
            time.sleep(self.rng.uniform(0, self.seconds))
            os.kill(process, signal.SIGKILL)
            wait(process)
        return self._judge(folder)

    def kill_at_file_event(self) -> tuple[str, str]:
        """Kill a run as it opens, syncs, renames or removes one of its files, and the resumed run too."""
        folder = self._new_folder()
        for _ in range(2):
            wait(self._start(folder, None, int(self.rng.integers(1, self.n_events["None"] + 1)), kill_self))
        return self._judge(folder)

    def half_written(self) -> tuple[str, str]:
        """Kill a run when half of a block of bytes is written."""
        folder = self._new_folder()
        wait(self._start(folder, "write", int(self.rng.integers(1, self.n_events["write"] + 1)), kill_self))
        return self._judge(folder)

    def _damaged(self) -> Path:
        files = sorted(path for path in self._new_folder(copied=True).iterdir() if path.stat().st_size > 0)
        return files[self.rng.integers(len(files))]

    def bit_flip(self) -> tuple[str, str]:
        """Flip one bit of a random file."""
        path = self._damaged()
        data = bytearray(path.read_bytes())
        data[self.rng.integers(len(data))] ^= 1 << self.rng.integers(8)
        path.write_bytes(data)
        return self._judge(path.parent)

    def truncation(self) -> tuple[str, str]:
        """Cut a random file off somewhere."""
        path = self._damaged()
        os.truncate(path, int(self.rng.integers(path.stat().st_size)))
        return self._judge(path.parent)

    def full_disk(self) -> tuple[str, str]:
        """Let the disk be full at a random write; the run ends with an error."""
        folder = self._new_folder()

        def full() -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        wait(self._start(folder, "write", int(self.rng.integers(1, self.n_events["write"] + 1)), full))
        error = json.loads((self.folder / "ignored.json").read_text()).get("error", "")
        if "Could not store the checkpoint" not in error:
            return "silent", error
        return self._judge(folder)

    def _two(self, folder: Path) -> tuple[str, str]:
        outs = [self.folder / f"ignored{index}.json" for index in range(2)]
        begin = time.monotonic() + 0.1

        def work() -> ALGD:
            time.sleep(max(begin - time.monotonic(), 0))
            return run_or_resume(self.kind, folder)

        for process in [in_process(work, out) for out in outs]:
            wait(process)
        results = [json.loads(out.read_text()) for out in outs]
        refused = [result for result in results if "is in use by process" in result.get("error", "")]
        finished = [result for result in results if result.get("digest") == self.expected]
        # The second may also have come when the first had ended
        if not finished or len(refused) + len(finished) < 2:
            return "silent", str(results)
        return self._judge(folder)

    def two_runs(self) -> tuple[str, str]:
        """Start two runs in one folder at once."""
        return self._two(self._new_folder())

    def two_resumes(self) -> tuple[str, str]:
        """Resume one run twice at once."""
        return self._two(self._new_folder(copied=True))


def try_faults(kind: str, folder: Path, counts: dict[str, int], out: Path | None) -> list[tuple[str, str, str, str]]:
    """
    Try faults with one kind of run.

    :param kind: The kind of run.
    :param folder: For everything that is written.
    :param counts: How many of each fault.
    :param out: File that gets a line of each. None for none.
    :return: Run, fault, outcome and details of each.
    """
    th.set_num_threads(1)
    suite = Suite(kind, folder / kind)
    found = []
    for fault, count in counts.items():
        for _ in range(count):
            outcome, details = getattr(suite, fault)()
            found.append((kind, fault, outcome, details))
            if out is not None:
                with out.open("a") as file:
                    file.write(json.dumps(found[-1]) + "\n")
            if outcome == "silent":
                print(f"{kind}, {fault}: {details}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Run the suite, and leave its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few of each")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--jobs", type=int, default=2, help="kinds of runs at a time")
    parser.add_argument("--out", type=Path, help="file that gets a line of JSON for each fault")
    args = parser.parse_args()
    counts = SHORT if args.short else FULL
    started = time.monotonic()
    # Processes that may have children, other than those of a Pool
    executor = ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"))
    with tempfile.TemporaryDirectory() as folder, executor as pool:
        trials = [pool.submit(try_faults, kind, Path(folder), counts, args.out) for kind in args.runs]
        found = [row for trial in trials for row in trial.result()]
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for _, fault, outcome, details in found:
        table[fault].update(["tried", outcome, *(["warned"] if outcome == "exact" and details else [])])
    print(
        "| fault | tried | exact | of these with a warning | refused by name | silent |\n| --- | --- | --- | --- | --- | --- |"
    )
    total: Counter[str] = sum(table.values(), Counter())
    for fault, row in [*table.items(), ("all", total)]:
        print(f"| {fault.replace('_', ' ')} | " + " | ".join(str(row[name]) for name in COLUMNS) + " |")
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes")
    if total["silent"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
