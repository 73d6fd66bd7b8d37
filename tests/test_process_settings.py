"""What the package sets for the whole process: visible, and only with the user's consent."""

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest

from sb3_algd import ALGD
from sb3_algd.common import cost_aware_algorithm
from sb3_algd.common.memory import keep_freed_memory


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Calls of a C library whose mallopt() sets nothing."""
    made: list[tuple[int, int]] = []

    class Library:
        def mallopt(self, name: int, value: int) -> int:
            made.append((name, value))
            return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    for name in ("SB3_ALGD_KEEP_FREED_MEMORY", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    keep_freed_memory.cache_clear()
    yield made
    keep_freed_memory.cache_clear()


def make_model(**kwargs: Any) -> ALGD:
    return ALGD("MlpPolicy", "TwoModes-v0", learning_starts=100, buffer_size=100, device="cpu", **kwargs)


def test_training_sets_the_c_librarys_memory_once(calls: list[tuple[int, int]]) -> None:
    model = make_model()
    assert calls == []
    for _ in range(2):
        model.learn(2)
    assert calls == [(-1, 512 * 2**20), (-3, 32 * 2**20)]


@pytest.mark.parametrize(
    "name, value",
    [("SB3_ALGD_KEEP_FREED_MEMORY", "0"), ("MALLOC_TRIM_THRESHOLD_", "1000"), ("GLIBC_TUNABLES", "glibc.malloc.check=1")],
)
def test_the_user_can_switch_it_off(
    calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    make_model(verbose=1).learn(2)
    assert calls == []
    assert "Freed memory" not in capsys.readouterr().out


@pytest.mark.parametrize("verbose", [0, 1])
def test_training_says_so(calls: list[tuple[int, int]], capsys: pytest.CaptureFixture[str], verbose: int) -> None:
    make_model(verbose=verbose).learn(2)
    assert len(calls) == 2
    assert ("SB3_ALGD_KEEP_FREED_MEMORY=0 switches it off" in capsys.readouterr().out) == (verbose == 1)


def test_another_c_library_is_left_alone(calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert keep_freed_memory() is False
    assert cost_aware_algorithm.keep_freed_memory is keep_freed_memory
