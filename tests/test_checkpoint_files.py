"""Two runs in one folder, and files that are not as they were written."""

import errno
import json
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sb3_algd.common import checkpoint_files, run_lock
from sb3_algd.common.checkpoint import ResumableCheckpointCallback, resume
from sb3_algd.common.checkpoint_files import (
    MANIFEST,
    MANIFEST_COPY,
    N_BLOCKS,
    PARITY,
    read_manifest,
    repair,
    write_durably,
    write_parity,
)
from sb3_algd.common.run_lock import LOCK, RunLock
from tests.conftest import make_model, make_one_env, same, weights

ROOT = Path(__file__).parents[1]

# --- two runs --------------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, time
from stable_baselines3.common.callbacks import BaseCallback
from sb3_algd.common.checkpoint import ResumableCheckpointCallback, resume
from tests.conftest import make_model, make_one_env

class Slow(BaseCallback):
    def _on_step(self):
        time.sleep(0.02)
        return True

what, folder, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
if what == "new":
    make_model(make_one_env()).learn(steps, [Slow(), ResumableCheckpointCallback(20, folder)])
else:
    resume(folder, make_one_env(), Slow(), total_timesteps=steps)
"""


def start(what: str, folder: Path, steps: int) -> "subprocess.Popen[str]":
    arguments = [sys.executable, "-c", PROGRAM, what, str(folder), str(steps)]
    return subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.02)


def test_the_second_run_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    whole = make_model(make_one_env()).learn(60, ResumableCheckpointCallback(20, tmp_path / "whole"))
    first = start("new", tmp_path / "run", 60)
    wait_for(tmp_path / "run" / LOCK, first)
    with pytest.raises(RuntimeError, match=rf"run is in use by process {first.pid} on .*, since"):
        make_model(make_one_env()).learn(60, ResumableCheckpointCallback(20, tmp_path / "run"))
    assert first.wait() == 0
    assert same(weights(whole), weights(resume(tmp_path / "run", make_one_env())))


def test_of_two_resumes_at_once_one_is_refused(tmp_path: Path) -> None:
    make_model(make_one_env()).learn(20, ResumableCheckpointCallback(20, tmp_path))
    pair = [start("resume", tmp_path, 150) for _ in range(2)]
    errors = [process.communicate()[1] for process in pair]
    assert sorted(process.returncode for process in pair) == [0, 1]
    refused = pair[0].returncode
    assert f"is in use by process {pair[refused].pid}" in errors[1 - refused]
    assert read_manifest(tmp_path)["num_timesteps"] == 150


def test_a_killed_process_and_its_children_leave_no_lock(tmp_path: Path) -> None:
    program = f"""
import os, time
from pathlib import Path
from sb3_algd.common.run_lock import RunLock
lock = RunLock(Path({str(tmp_path)!r}))
lock.acquire()
if os.fork() == 0:
    # By now the child has let go of the lock
    print("locked", flush=True)
time.sleep(20)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, process_group=0)
    assert process.stdout is not None and process.stdout.readline()
    with pytest.raises(RuntimeError, match=f"in use by process {process.pid}"):
        RunLock(tmp_path).acquire()
    process.kill()
    process.wait()
    lock = RunLock(tmp_path)
    lock.acquire()
    assert lock.held
    os.killpg(process.pid, 9)


def test_a_training_that_broke_off_hands_the_folder_on_in_the_same_process(tmp_path: Path) -> None:
    broken, following = RunLock(tmp_path), RunLock(tmp_path)
    broken.acquire()
    following.acquire()
    assert following.held and broken.lost and not broken.held
    refused = []

    def other_thread() -> None:
        with pytest.raises(RuntimeError, match="in use by another thread of this process"):
            RunLock(tmp_path).acquire()
        refused.append(True)

    thread = threading.Thread(target=other_thread)
    thread.start()
    thread.join()
    assert refused


def test_a_folder_without_locks_is_named_and_the_other_run_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)
    callback, other = (ResumableCheckpointCallback(20, tmp_path) for _ in range(2))
    with pytest.warns(UserWarning, match="cannot lock"):
        model = make_model(make_one_env()).learn(20, callback)
    with pytest.warns(UserWarning, match="cannot lock"):
        expected = weights(make_model(make_one_env(), seed=1).learn(40, other))
    with pytest.warns(UserWarning, match="cannot lock"), pytest.raises(RuntimeError, match="is no longer the one of this run"):
        model.learn(20, callback, reset_num_timesteps=False)
    monkeypatch.undo()
    assert same(weights(resume(tmp_path, make_one_env())), expected)


def test_the_users_own_files_stay(tmp_path: Path) -> None:
    own = ["model_final.zip", "model_1000.zip", "buffer_final.pkl", "state_notes.pkl", "buffer_0123456.pkl", "notes.txt"]
    # A killed run's, and version 0.1.0's
    left = ["model_01234567_1.zip", "buffer_01234567_1.pkl", f"buffer_01234567_1.pkl{PARITY}", "model_3.zip", "state_3.pkl"]
    for name in own + left:
        (tmp_path / name).write_bytes(b"mine")
    make_model(make_one_env()).learn(40, ResumableCheckpointCallback(20, tmp_path))
    assert [name for name in own if not (tmp_path / name).exists()] == []
    assert [name for name in left if (tmp_path / name).exists()] == []


# --- damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Any]:
    """A folder with checkpoints of steps 20, 40 (the two that are left) and the weights after step 60."""
    folder = tmp_path / "checkpoint"
    expected = weights(make_model(make_one_env()).learn(60, ResumableCheckpointCallback(20, tmp_path / "whole")))
    make_model(make_one_env()).learn(40, ResumableCheckpointCallback(20, folder))
    return folder, expected


@pytest.mark.parametrize("kind", ["model", "state", "buffer", "previous buffer", MANIFEST, MANIFEST_COPY, "parity"])
def test_a_flipped_bit_changes_nothing_of_the_training(trained: tuple[Path, Any], kind: str) -> None:
    folder, expected = trained
    manifest = read_manifest(folder)
    buffers = [file["name"] for file in manifest["buffer"]["files"]]
    names = {"buffer": buffers[-1], "previous buffer": buffers[0], "parity": f"{buffers[0]}{PARITY}"}
    name = names.get(kind, manifest.get(kind, kind))
    message = {
        "model": rf"{name} is damaged .*goes on from the one before, of step 20",
        "state": rf"{name} is damaged .*goes on from the one before, of step 20",
        "buffer": rf"{name} was damaged, and has been repaired",
        "previous buffer": rf"{name} was damaged, and has been repaired",
        MANIFEST: rf"{MANIFEST} is damaged: its copy",
    }.get(kind)
    flip(folder / name, int(np.random.default_rng().integers(8 * (folder / name).stat().st_size)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = resume(folder, make_one_env(), total_timesteps=60)
    assert same(weights(resumed), expected)
    texts = " ".join(str(warning.message) for warning in caught)
    if message is None:
        assert "damaged" not in texts
    else:
        assert re.search(message, texts)


def test_a_truncated_or_missing_file_is_named(trained: tuple[Path, Any]) -> None:
    folder, expected = trained
    manifest = read_manifest(folder)
    (folder / manifest["model"]).unlink()
    state = folder / manifest["state"]
    state.write_bytes(state.read_bytes()[:100])
    with pytest.warns(UserWarning, match=rf"{manifest['model']} is missing, {manifest['state']} is damaged .*of step 20"):
        assert same(weights(resume(folder, make_one_env(), total_timesteps=60)), expected)


def test_what_cannot_be_repaired_is_refused_by_name(trained: tuple[Path, Any]) -> None:
    folder, _ = trained
    name = read_manifest(folder)["buffer"]["files"][0]["name"]
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"No checkpoint in .* can be used: {name} is damaged .*Restore these files"):
        resume(folder, make_one_env())
    assert not list(folder.glob("*.repaired"))
    for manifest in (MANIFEST, MANIFEST_COPY):
        (folder / manifest).write_bytes(b"\x00{")
    with pytest.raises(ValueError, match=f"{MANIFEST} and {MANIFEST_COPY} in .* are damaged"):
        resume(folder, make_one_env())


def test_a_manifest_that_lost_its_digest_does_not_pass_for_an_old_one(trained: tuple[Path, Any]) -> None:
    folder, _ = trained
    for name in (MANIFEST, MANIFEST_COPY):
        content = (folder / name).read_text()
        (folder / name).write_text(content.replace('"digest"', '"digesu"'))
    with pytest.raises(ValueError, match="are damaged"):
        read_manifest(folder)


def test_checkpoints_of_version_0_1_0_are_read(trained: tuple[Path, Any]) -> None:
    folder, expected = trained
    manifest = read_manifest(folder)
    for name in ("digest", "run", "files", "previous"):
        del manifest[name]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    (folder / MANIFEST_COPY).unlink()
    assert same(weights(resume(folder, make_one_env(), total_timesteps=60)), expected)


@pytest.mark.parametrize("size", [0, 1, N_BLOCKS, 1000, 100_003])
def test_one_block_can_be_repaired(tmp_path: Path, size: int) -> None:
    rng = np.random.default_rng(size)
    data = rng.bytes(size)
    path = tmp_path / "buffer"
    digest = write_durably(path, lambda file: file.write(data))
    write_durably(tmp_path / f"buffer{PARITY}", lambda file: write_parity(path, file))
    length = max(-(-size // N_BLOCKS), 1)
    for block in range(N_BLOCKS):
        damaged = bytearray(data)
        start = block * length
        damaged[start : start + length] = rng.bytes(len(damaged[start : start + length]))
        path.write_bytes(damaged)
        assert repair(path, size, digest) and path.read_bytes() == data
    # Cut off within the last block
    path.write_bytes(data[: max(size - length // 2, 0)])
    assert repair(path, size, digest) and path.read_bytes() == data
    if size == 1000:
        path.write_bytes(bytes(size))
        assert not repair(path, size, digest)
        (tmp_path / f"buffer{PARITY}").unlink()
        assert not repair(path, size, digest)


def test_an_error_after_the_manifest_was_replaced_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    callback = ResumableCheckpointCallback(20, tmp_path)
    make_model(make_one_env()).learn(20, callback)
    monkeypatch.setattr(checkpoint_files, "sync_folder", fails)
    with pytest.raises(OSError, match="Could not store the checkpoint of step 40"):
        make_model(make_one_env()).learn(40, ResumableCheckpointCallback(40, tmp_path))
    monkeypatch.undo()
    assert resume(tmp_path, make_one_env(), total_timesteps=40).num_timesteps == 40
