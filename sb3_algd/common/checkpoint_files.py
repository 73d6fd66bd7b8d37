"""
The files of a checkpoint: each is checked by its SHA-256, and damage is found, named and, where that is possible, repaired.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from sb3_algd.common.guards import warn_user

MANIFEST = "checkpoint.json"
#: The same once more, for the case that the first one is damaged
MANIFEST_COPY = "checkpoint.copy.json"
#: Suffix of the file that a damaged one is repaired from
PARITY = ".parity"
#: A damaged part of a file is repaired if it lies in one of as many equal blocks
N_BLOCKS = 16
#: Names of a checkpoint's files, with the name of their run
_NAMES = r"(model_{run}_\d+\.zip|(state|buffer)_{run}_\d+\.pkl(\.parity)?)"
_CHUNK = 1 << 20

# --- files -----------------------------------------------------------------------------------------------------------


class _Hashing:
    """
    Computes the SHA-256 of what is written.

    :param file: Where it goes.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.hash = hashlib.sha256()

    def write(self, data: Any) -> int:
        """:param data: Bytes. :return: How many there are."""
        self.hash.update(data)
        return self._file.write(data)


def write_durably(path: Path, writer: Callable[[Any], Any]) -> str:
    """
    :param path: A new file.
    :param writer: Writes it. After this it is on the disk.
    :return: Its SHA-256.
    :raises OSError: If it cannot be written, or what can be read there is something else.
    """
    with path.open("wb") as file:
        hashing = _Hashing(file)
        writer(hashing)
        file.flush()
        os.fsync(file.fileno())
    if file_hash(path) != hashing.hash.hexdigest():
        raise OSError(errno.EIO, "What was written is not what can be read", str(path))
    return hashing.hash.hexdigest()


def file_hash(path: Path) -> str:
    """:param path: A file. :return: Its SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """Make a rename survive a power failure, where the system can."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _blocks(path: Path, size: int) -> Iterator[np.ndarray]:
    """The blocks of a file that is, or should be, ``size`` bytes long, filled up with zeros."""
    length = -(-size // N_BLOCKS)
    with path.open("rb") as file:
        for _ in range(N_BLOCKS):
            block = np.zeros(length, dtype=np.uint8)
            data = np.frombuffer(file.read(length), dtype=np.uint8)
            block[: len(data)] = data
            yield block


def write_parity(path: Path, file: Any) -> None:
    """
    Write the exclusive or of a file's blocks, from which any one of them can be computed.

    :param path: The file.
    :param file: Where it goes.
    """
    file.write(_exclusive_or(_blocks(path, path.stat().st_size)).tobytes())


def _exclusive_or(blocks: Iterator[np.ndarray]) -> np.ndarray:
    result = next(blocks)
    for block in blocks:
        result ^= block
    return result


def repair(path: Path, size: int, digest: str) -> bool:
    """
    Repair a file of which one block is damaged.

    :param path: The file; beside it is its parity.
    :param size: What its length should be.
    :param digest: What its SHA-256 should be.
    :return: Whether it is as it was.
    """
    try:
        stored = np.frombuffer(path.with_name(path.name + PARITY).read_bytes(), dtype=np.uint8)
        if len(stored) != -(-size // N_BLOCKS):
            return False
        # What has to be changed in the block that is damaged, whichever that is
        difference = _exclusive_or(_blocks(path, size)) ^ stored
    except OSError:
        return False
    mended = path.with_name(path.name + ".repaired")
    for damaged in range(N_BLOCKS):
        with mended.open("wb") as file:
            for index, block in enumerate(_blocks(path, size)):
                file.write((block ^ difference if index == damaged else block).tobytes())
            file.truncate(size)
            file.flush()
            os.fsync(file.fileno())
        if file_hash(mended) == digest:
            os.replace(mended, path)
            return True
    mended.unlink()
    return False


# --- manifests -------------------------------------------------------------------------------------------------------


def files_of(manifest: dict[str, Any]) -> list[str]:
    """:param manifest: Of a checkpoint. :return: Names of its files."""
    return [manifest["model"], manifest["state"], *(file["name"] for file in manifest["buffer"]["files"])]


def _digest(manifest: dict[str, Any]) -> str:
    rest = {name: value for name, value in manifest.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def replace_manifest(path: Path, manifest: dict[str, Any], written: list[Path]) -> None:
    """
    Make a manifest the one that counts, in one step.

    :param path: Folder of the checkpoint.
    :param manifest: The manifest.
    :param written: Gets the names of temporary files, which are there if this raises an error.
    :raises OSError: If it cannot be written; the one before stays.
    """
    content = json.dumps({**manifest, "digest": _digest(manifest)}, indent=1).encode()
    for name in (MANIFEST, MANIFEST_COPY):
        written.append(path / f"{name}.new")
        write_durably(written[-1], lambda file: file.write(content))
    os.replace(path / f"{MANIFEST}.new", path / MANIFEST)
    # It counts from here on: nothing that it names may be removed, whatever fails now
    written.clear()
    os.replace(path / f"{MANIFEST_COPY}.new", path / MANIFEST_COPY)
    sync_folder(path)


def _parse(content: bytes) -> dict[str, Any] | None:
    """What a manifest says, None if it is damaged."""
    try:
        manifest = json.loads(content)
        if "digest" in manifest:
            return manifest if manifest["digest"] == _digest(manifest) else None
        # Version 0.1.0 has written neither of these. One that was damaged has others of them left
        known = {"number", "num_timesteps", "n_envs", "save_freq", "model", "state", "buffer"} <= manifest.keys()
        return manifest if known and not {"run", "files", "previous"} & manifest.keys() else None
    except (ValueError, TypeError):
        return None


def manifest_content(path: Path) -> bytes | None:
    """:param path: Folder of a checkpoint. :return: The manifest as it is stored, None if there is none."""
    try:
        return (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        return None


def read_manifest(path: Path) -> dict[str, Any]:
    """
    :param path: Folder of a checkpoint.
    :return: Its files, and the step that it was stored at (``num_timesteps``).
    :raises FileNotFoundError: If there is none.
    :raises ValueError: If it is damaged, and its copy is too.
    """
    damaged = []
    for name in (MANIFEST, MANIFEST_COPY):
        try:
            content = (path / name).read_bytes()
        except FileNotFoundError:
            continue
        except OSError:
            content = b""
        manifest = _parse(content)
        if manifest is None:
            damaged.append(name)
            continue
        if damaged:
            warn_user(f"{path / MANIFEST} is damaged: its copy, {MANIFEST_COPY}, is used.")
        return manifest
    if damaged:
        raise ValueError(
            f"{' and '.join(damaged)} in {path} {'is' if len(damaged) == 1 else 'are'} damaged, which say what belongs to the "
            "checkpoint: restore one of them from a backup, or train from the start."
        )
    raise FileNotFoundError(
        f"There is no checkpoint in {path}: it is another folder, or the run ended before its first one. Train from the start."
    )


def _damage(path: Path, manifest: dict[str, Any]) -> list[str]:
    """What is wrong with the files of a checkpoint, after what can be repaired was repaired."""
    found = []
    for name in files_of(manifest):
        # Version 0.1.0 has noted nothing
        expected = manifest.get("files", {}).get(name)
        try:
            if expected is None or file_hash(path / name) == expected["sha256"]:
                (path / name).stat()
            elif repair(path / name, expected["size"], expected["sha256"]):
                warn_user(f"{path / name} was damaged, and has been repaired. Look after the disk.")
            else:
                found.append(f"{name} is damaged (its SHA-256 is not the one in {MANIFEST})")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
    return found


def choose_checkpoint(path: Path) -> dict[str, Any]:
    """
    The newest checkpoint whose files are all as they were written.

    :param path: The folder.
    :return: Its manifest. A warning says if it is not the newest one.
    :raises FileNotFoundError: If there is no checkpoint.
    :raises ValueError: If all are damaged.
    """
    newest = read_manifest(path)
    problems: list[str] = []
    for manifest in (newest, newest.get("previous")):
        if manifest is None:
            continue
        damage = _damage(path, manifest)
        if not damage:
            if problems:
                warn_user(
                    f"The newest checkpoint in {path}, of step {newest['num_timesteps']}, is damaged: {', '.join(problems)}. "
                    f"Training goes on from the one before, of step {manifest['num_timesteps']}."
                )
            return manifest
        problems += [problem for problem in damage if problem not in problems]
    raise ValueError(
        f"No checkpoint in {path} can be used: {', '.join(problems)}. Restore these files from a backup, or train "
        "from the start."
    )


def remove_others(path: Path, manifest: dict[str, Any], run: str | None) -> None:
    """
    Remove the files of checkpoints that are no longer needed.

    :param path: The folder.
    :param manifest: Of the newest checkpoint, which names the one before.
    :param run: Part of the names of this run's files: others are left alone. None if the folder belongs to this run.
    """
    named = {name for checkpoint in (manifest, manifest["previous"]) if checkpoint for name in files_of(checkpoint)}
    present = set(os.listdir(path))
    # Whatever else is there may be the user's
    others = {name for name in present if re.fullmatch(_NAMES.replace("{run}", run or "[0-9a-f]{8}"), name)}
    if run is None:
        # Version 0.1.0 has named no run, but a model of the user's has no state with its number beside it
        for name in present:
            pair = {name, name.replace("model_", "state_").replace(".zip", ".pkl")}
            if re.fullmatch(r"model_\d+\.zip", name) and pair <= present:
                others |= pair
    for name in others:
        if name.removesuffix(PARITY) not in named:
            (path / name).unlink(missing_ok=True)
