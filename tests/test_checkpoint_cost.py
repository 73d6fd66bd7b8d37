"""The benchmark of checkpoints."""

import sys

import pytest

from benchmarks import checkpoints


def test_it_measures_each_checkpoint_and_the_check(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["checkpoints", "--sizes", "2000", "100", "--rounds", "1"])
    checkpoints.main()
    _, _, *rows = capsys.readouterr().out.splitlines()
    names, sizes, megabytes, *_ = zip(*([cell.strip() for cell in row.split("|")[1:-1]] for row in rows), strict=True)
    assert names == ("checkpoint 1", "checkpoint 2", "check before a resume")
    assert sizes == ("2,000", "100", "2,100")
    first, second, together = map(float, megabytes)
    # A transition is two observations of 60 numbers of four bytes, and something more
    assert 1900 * 480e-6 < first - second < 1900 * 600e-6
    assert together == pytest.approx(first + second, rel=0.1)
