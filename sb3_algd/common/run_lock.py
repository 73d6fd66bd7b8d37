"""One run at a time in a folder."""

import errno
import json
import os
import socket
import threading
import time
import weakref
from pathlib import Path
from typing import IO, ClassVar

from sb3_algd.common.guards import warn_user

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "checkpoint.lock"
# What systems say whose files cannot be locked
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


class RunLock:
    """
    A folder that belongs to one run. The kernel holds the lock and releases it when the process ends, however it ends.

    :param folder: The folder.
    """

    #: Locks that this process holds
    _held: ClassVar["weakref.WeakValueDictionary[Path, RunLock]"] = weakref.WeakValueDictionary()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: IO[bytes] | None = None
        self._thread = threading.current_thread()
        #: Whether another run of this process has taken the folder over
        self.lost = False

    @property
    def held(self) -> bool:
        """Whether the kernel holds the lock for this run."""
        return self._file is not None

    def acquire(self) -> None:
        """
        Lock the folder, which exists. Where its file system has no locks, that is said in a warning.

        :raises RuntimeError: If another run has locked it.
        """
        if self.held:
            return
        self.lost = False
        key = self.folder.resolve()
        other = self._held.get(key)
        if other is not None and other.held:
            if other._thread is not threading.current_thread() and other._thread.is_alive():
                raise RuntimeError(self._in_use(f"another thread of this process, {other._thread.name}"))
            # Its learn() has ended with an error, or is further up in this thread and will notice
            other.release()
            other.lost = True
        if fcntl is None:
            self._warn("This system")
            return
        while self._file is None:
            file = (self.folder / LOCK).open("a+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = self._holder()
                file.close()
                raise RuntimeError(self._in_use(holder)) from None
            except OSError as error:
                file.close()
                if error.errno not in _NO_LOCKS:
                    raise
                self._warn("Its file system")
                return
            if self._is_in_folder(file):
                self._file = file
            else:
                # Another run has removed the folder in the meantime
                file.close()
        self._thread = threading.current_thread()
        self._held[key] = self
        self._file.truncate(0)
        about = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._file.write(json.dumps(about).encode())
        self._file.flush()

    def _is_in_folder(self, file: IO[bytes]) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.folder / LOCK))
        except FileNotFoundError:
            return False

    def _holder(self) -> str:
        for _ in range(20):
            try:
                about = json.loads((self.folder / LOCK).read_bytes())
                return f"process {about['process']} on {about['host']}, since {about['since']}"
            except (OSError, ValueError, KeyError, TypeError):
                # It has the lock, and is about to write who it is
                time.sleep(0.05)
        return "another process"

    def _in_use(self, holder: str) -> str:
        return (
            f"{self.folder} is in use by {holder}: two runs would destroy each other's checkpoints. Give each run a save_path "
            "of its own. To go on with the other run, end its process first."
        )

    def _warn(self, what: str) -> None:
        warn_user(
            f"{what} cannot lock {self.folder}: see to it that no other run uses this folder. (A run that finds the "
            "checkpoint of another one in the place of its own stops.)"
        )

    def release(self) -> None:
        """Give the folder to others."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @classmethod
    def _forget(cls) -> None:
        # A forked process shares the open file, and would keep the lock alive after its parent's end
        for lock in list(cls._held.values()):
            lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=RunLock._forget)
