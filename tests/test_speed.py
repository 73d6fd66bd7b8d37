"""The benchmark of updates and acting."""

from pathlib import Path

import pytest
import torch as th

from benchmarks import speed
from sb3_algd import ALGD


def keys(folder: Path) -> list[str]:
    return [line.rpartition(",")[0] for line in (folder / "measurements.csv").read_text().splitlines()]


def test_what_was_measured_is_not_measured_again_and_fills_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    n = th.get_num_threads()
    page, threads = tmp_path / "page.md", f"{n} thread{'s' * (n > 1)}"
    page.write_text(f"<!-- table: updates, {threads} -->\n\n<!-- table: acting -->\n")
    arguments = ["--rounds", "2", "--seconds", "0", "--out", str(tmp_path), "--models", "sac", "ve", "products", "--parts"]
    speed.main([*arguments, "updates", "acting"])
    measured = keys(tmp_path)
    # SAC, three variants of ALGD, two products; and SAC and ALGD with one and with 64 observations
    assert len(set(measured)) == len(measured) == 1 + 2 * (6 + 4)

    # As if it had been stopped before the last two
    file = tmp_path / "measurements.csv"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-2]))
    capsys.readouterr()
    speed.main([*arguments, "acting", "--page", str(page)])
    assert keys(tmp_path) == measured
    output = capsys.readouterr().out
    assert "acting: ve, " in output and "acting: sac, " not in output
    firsts = [line.split(" | ")[0] for line in page.read_text().splitlines() if line.startswith("| ")]
    assert firsts == ["| what", "| ---", "| sac", "| ve", "| threads", "| ---", f"| {n}", f"| {n}"]


def test_the_operations_of_an_update_are_counted_with_every_second_update_of_the_policy() -> None:
    model = speed.make_model("ve", "cpu")
    assert isinstance(model, ALGD)
    assert 1.0 < speed.count_operations(model) < 3.3
