"""Memory: what is freed stays in the process, and what is used does not grow."""

import gc
import subprocess
import sys

import pytest

from tests.conftest import Algorithm, make_model_of


def test_memory_does_not_grow_with_updates(algorithm: Algorithm) -> None:
    model = make_model_of(algorithm, stats_window_size=2)
    model.learn(60)
    counts = []
    for _ in range(2):
        model.train(100, 16)
        gc.collect()
        counts.append(len(gc.get_objects()))
    assert counts[1] - counts[0] < 50


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_stays_in_the_process_unless_the_user_says_otherwise() -> None:
    code = """
import resource, torch
from sb3_algd.common.memory import keep_freed_memory
keep_freed_memory()
def work():
    kept = [torch.ones(500_000) for _ in range(10)]
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {}
    for setting in ({}, {"MALLOC_TRIM_THRESHOLD_": "100000"}):
        result = subprocess.run([sys.executable, "-c", code], env={"PATH": "", **setting}, capture_output=True, check=True)
        faults[bool(setting)] = int(result.stdout)
    # 20 MB in pages of 4 KB are 5,000 faults each time where the memory was given back
    assert 3 * faults[False] < faults[True]
