"""The short form of the fault suite, see tests/faults.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fault_runs import RUNS
from tests.faults import SHORT


@pytest.mark.skipif(not hasattr(os, "fork"), reason="every fault happens to a forked process")
@pytest.mark.parametrize("kind", RUNS)
def test_killed_and_damaged_runs_end_as_if_nothing_had_happened(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "faults"
    command = [sys.executable, "-m", "tests.faults", "--short", "--jobs", "1", "--runs", kind, "--out", str(out)]
    # Threads of this process would be missing in a forked one
    result = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    outcomes = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(outcomes) == sum(SHORT.values())
    assert {outcome for _, _, outcome, _ in outcomes} <= {"exact"}
