"""
The fault suite: runs are killed, their files damaged, their disk filled, and a second run started beside them. Each is
resumed, has to begin at the step of the checkpoint that counts, to see and do in every step what the run saw and did to which
nothing happened, and to end with its weights, bit for bit.

    python -m tests.faults --out faults.jsonl

The same command goes on where it was interrupted. Every trial is a forked process. A fault counts as ``exact`` (all of this,
also where a warning told of the damage), ``refused`` (an error that names the file and what to do) or ``silent`` (anything
else). A kill that comes after the end of its process is no fault, and is tried again.
"""

import argparse
import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

from sb3_algd import ALGD
from sb3_algd.common.checkpoint_files import MANIFEST, files_of
from tests.fault_runs import RUNS, STEPS, FileEvents, in_process, run_or_resume, wait

COLUMNS = ("tried", "exact", "warned", "refused", "silent")
#: Kinds of faults, and how many of each are tried with each kind of run
FULL = dict(kill=10, kill_at_file_event=12, half_written=5, bit_flip=12, truncation=4, full_disk=4, two_runs=2, two_resumes=3)
SHORT = dict(kill=1, kill_at_file_event=1, bit_flip=1, full_disk=1)
#: What a full disk makes impossible
NEEDS_ROOM = ("os.rename", "open", "fsync", "write")


def kill_self() -> None:
    """As from outside."""
    os.kill(os.getpid(), signal.SIGKILL)


def disk_is_full() -> None:
    """As the system says it."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def was_killed(status: int) -> bool:
    """:param status: How a process ended. :return: Whether a kill has hit it."""
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def manifest_of(folder: Path) -> dict[str, Any]:
    """:param folder: Of a checkpoint. :return: Its manifest, as it stands there; of step 0 if there is none."""
    path = folder / MANIFEST
    return json.loads(path.read_text()) if path.exists() else {"num_timesteps": 0}


class Suite:
    """
    Faults of one kind of run.

    :param kind: The kind of run.
    :param folder: For everything that is written.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        folder.mkdir(parents=True)
        self.number = self.trial = 0
        self.rng = np.random.default_rng()
        started = time.monotonic()
        whole = self._finish(folder / "whole", anew=True)
        self.seconds = time.monotonic() - started
        if "digest" not in whole:
            raise RuntimeError(whole["traceback"])
        self.expected = whole["digest"]
        #: Hash of each step of the undisturbed run
        self.steps = dict(line.split() for line in self._log("result").read_text().splitlines()[1:])
        assert str(STEPS) in self.steps
        self.n_events = self._count_events()
        #: A run that was broken off after its checkpoint of step 48: the last one is that of the end, and is being written
        self.broken = folder / "broken"
        assert was_killed(self._start(self.broken, "fsync", int(0.9 * self.n_events["fsync"]), kill_self))
        assert manifest_of(self.broken)["num_timesteps"] == 48

    def try_one(self, fault: str, trial: int) -> tuple[str, str]:
        """:param fault: Kind of fault. :param trial: Its number. :return: Outcome and details."""
        self.trial, self.rng = trial, np.random.default_rng([list(RUNS).index(self.kind), list(FULL).index(fault), trial])
        try:
            outcome: tuple[str, str] = getattr(self, fault)()
        except AssertionError as error:
            return "silent", str(error)
        return outcome

    # --- processes -------------------------------------------------------------------------------------------------------

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _begin(self, folder: Path, name: str, prepare: Callable[[], Any] | None = None, anew: bool = False) -> int:
        """Start a run, or resume it if it has a checkpoint. Its process leaves a result and a log of this name."""
        log, out = self._log(name), self.folder / f"{name}.json"
        for path in (log, out):
            path.unlink(missing_ok=True)
        return in_process(lambda: run_or_resume(self.kind, folder, log, anew), out, prepare)

    def _began(self, name: str) -> int | None:
        """Where a process began to train, None if it did not. Each of its steps has to be that of the undisturbed run."""
        lines = self._log(name).read_text().splitlines() if self._log(name).exists() else []
        for line in lines[1:]:
            step, seen = line.split()
            assert self.steps.get(step, seen) == seen, f"Step {step} is another one than in the undisturbed run."
        return int(lines[0].split()[1]) if lines else None

    def _end(self, process: int, folder: Path, begins: int) -> int:
        status = wait(process)
        began = self._began("ignored")
        assert began in (None, begins), f"Training in {folder} began at step {began}, its checkpoint was of step {begins}."
        return status

    def _start(self, folder: Path, only: str | None, at: int, happen: Callable[[], Any]) -> int:
        """Train while something happens at a file event. Returns how the process has ended."""
        begins = manifest_of(folder)["num_timesteps"]
        return self._end(self._begin(folder, "ignored", FileEvents(folder, at, happen, only).watch), folder, begins)

    def _finish(self, folder: Path, anew: bool = False) -> dict[str, Any]:
        wait(self._begin(folder, "result", anew=anew))
        result: dict[str, Any] = json.loads((self.folder / "result.json").read_text())
        return result

    def _count_events(self) -> dict[str, int]:
        folder, out = self.folder / "counted", self.folder / "events.json"
        watched = {str(only): FileEvents(folder, 0, kill_self, only) for only in (None, *NEEDS_ROOM)}

        def work() -> ALGD:
            for events in watched.values():
                events.watch()
            model = run_or_resume(self.kind, folder, self._log("counted"))
            out.write_text(json.dumps({only: events.count for only, events in watched.items()}))
            return model

        wait(in_process(work, self.folder / "counted.json"))
        counts: dict[str, int] = json.loads(out.read_text())
        return counts

    def _new_folder(self, copied: bool = False) -> Path:
        self.number += 1
        folder = self.folder / f"{self.number}"
        if copied:
            shutil.copytree(self.broken, folder)
        return folder

    def _judge(self, folder: Path, damaged: str | None = None) -> tuple[str, str]:
        """Resume, and compare."""
        newest = manifest_of(folder if damaged is None else self.broken)
        result = self._finish(folder)
        shutil.rmtree(folder)
        error = result.get("error", "")
        if "can be used: " in error or "are damaged" in error:
            return "refused", error
        warned = "; ".join(result["warnings"])
        # Without one of its files a checkpoint does not count
        if damaged in newest.get("files", {}) and "has been repaired" not in warned:
            newest = newest["previous"]
            assert damaged not in files_of(newest), f"{damaged} is damaged, and belongs to the checkpoint before, too."
        began = self._began("result")
        if result.get("digest") != self.expected:
            return "silent", result.get("traceback", "Other weights, or other transitions.")
        assert began == newest["num_timesteps"], f"Began at step {began}, the checkpoint was of {newest['num_timesteps']}."
        return "exact", warned

    # --- faults ----------------------------------------------------------------------------------------------------------

    def _kill_twice(self, run: Callable[[Path, float], int]) -> tuple[str, str]:
        """:param run: Has a process killed that trains in a folder, at a fraction of a whole run. Returns how it has ended."""
        for _ in range(50):
            folder, first = self._new_folder(), self.rng.uniform(0, 1)
            if was_killed(run(folder, first)) and was_killed(run(folder, self.rng.uniform(0, 1 - first))):
                return self._judge(folder)
        raise RuntimeError("No kill hits a process that runs.")

    def kill(self) -> tuple[str, str]:
        """Kill a run and its resumption at random moments."""

        def run(folder: Path, fraction: float) -> int:
            begins = manifest_of(folder)["num_timesteps"]
            process = self._begin(folder, "ignored")
            time.sleep(fraction * self.seconds)
            os.kill(process, signal.SIGKILL)
            return self._end(process, folder, begins)

        return self._kill_twice(run)

    def kill_at_file_event(self) -> tuple[str, str]:
        """Kill a run as it opens, syncs, renames or removes one of its files, and the resumed run too."""
        return self._kill_twice(
            lambda folder, fraction: self._start(folder, None, 1 + int(fraction * self.n_events["None"]), kill_self)
        )

    def half_written(self) -> tuple[str, str]:
        """Kill a run when half of a block of bytes is written."""
        folder = self._new_folder()
        assert was_killed(self._start(folder, "write", int(self.rng.integers(1, self.n_events["write"] + 1)), kill_self))
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
        return self._judge(path.parent, path.name)

    def truncation(self) -> tuple[str, str]:
        """Cut a random file off somewhere."""
        path = self._damaged()
        os.truncate(path, int(self.rng.integers(path.stat().st_size)))
        return self._judge(path.parent, path.name)

    def full_disk(self) -> tuple[str, str]:
        """Let the disk be full as something is written, opened, synced or renamed; the run ends with an error."""
        folder, only = self._new_folder(), NEEDS_ROOM[self.trial % len(NEEDS_ROOM)]
        # Without room for the lock, which is opened first, nothing begins
        at = self.rng.integers(2 if only == "open" else 1, self.n_events[only] + 1)
        self._start(folder, only, int(at), disk_is_full)
        error = json.loads((self.folder / "ignored.json").read_text()).get("error", "")
        assert "Could not store the checkpoint" in error, f"No room at {only} {at}: {error or 'no error'}"
        return self._judge(folder)

    def _two(self, folder: Path) -> tuple[str, str]:
        names = ["first", "second"]
        begin = time.monotonic() + 0.1
        before = manifest_of(folder)["num_timesteps"]
        processes = [self._begin(folder, name, lambda: time.sleep(max(begin - time.monotonic(), 0))) for name in names]
        for process in processes:
            wait(process)
        results = [json.loads((self.folder / f"{name}.json").read_text()) for name in names]
        refused = [result for result in results if "is in use by process" in result.get("error", "")]
        finished = [result for result in results if result.get("digest") == self.expected]
        assert finished and len(refused) + len(finished) == 2, str(results)
        # The second may also have come when the first had ended
        began = [self._began(name) for name in names]
        assert set(began) <= {before, STEPS, None}, f"Began at {began}, the checkpoint was of step {before}."
        return self._judge(folder)

    def two_runs(self) -> tuple[str, str]:
        """Start two runs in one folder at once."""
        return self._two(self._new_folder())

    def two_resumes(self) -> tuple[str, str]:
        """Resume one run twice at once."""
        return self._two(self._new_folder(copied=True))


def tried_before(out: Path | None) -> list[list[str]]:
    """:param out: File of an earlier call. :return: Its rows: run, fault, outcome and details of each."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out is not None and out.exists() else []


def try_faults(kind: str, folder: Path, counts: dict[str, int], out: Path | None) -> list[list[str]]:
    """
    Try faults with one kind of run.

    :param kind: The kind of run.
    :param folder: For everything that is written.
    :param counts: How many of each fault.
    :param out: File that gets a line of each; those that it has already are not tried again. None for none.
    :return: Run, fault, outcome and details of each.
    """
    th.set_num_threads(1)
    found = [row for row in tried_before(out) if row[0] == kind and row[1] in counts]
    n_tried = Counter(fault for _, fault, *_ in found)
    missing = [(fault, trial) for fault, count in counts.items() for trial in range(n_tried[fault], count)]
    suite = Suite(kind, folder / kind) if missing else None
    for fault, trial in missing:
        assert suite is not None
        outcome, details = suite.try_one(fault, trial)
        found.append([kind, fault, outcome, details])
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
    parser.add_argument("--out", type=Path, help="file that gets a line of JSON for each fault, and is gone on with")
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
        "| fault | tried | exact | of these with a warning | refused by name | not as it should be |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    total: Counter[str] = sum(table.values(), Counter())
    described = [(str(getattr(Suite, fault).__doc__).rstrip("."), row) for fault, row in table.items()]
    for fault, row in [*described, ("All", total)]:
        print(f"| {fault} | " + " | ".join(str(row[name]) for name in COLUMNS) + " |")
    print(f"\n{(time.monotonic() - started) / 60:.1f} minutes")
    if total["silent"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
