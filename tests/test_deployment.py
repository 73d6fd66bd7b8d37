"""The tables of docs/deployment.md."""

from pathlib import Path

import gymnasium as gym
import pytest

from benchmarks import candidates, deployment, verdict
from tests.conftest import SMALL, make_model


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks and few calls."""
    monkeypatch.setattr(deployment, "ROUNDS", 2)
    monkeypatch.setattr(deployment, "CALLS", 2)
    kinds = {name: (algorithm, {**SMALL, **kwargs}) for name, (algorithm, kwargs) in deployment.KINDS.items()}
    monkeypatch.setattr(deployment, "KINDS", {name: kinds[name] for name in ("ALGD (DDPM)", "SACLag")})
    monkeypatch.setattr(deployment, "OBSERVATIONS", {"Dict": deployment.OBSERVATIONS["Dict"]})


def rows(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


@pytest.mark.usefixtures("quick")
def test_kinds_of_policies_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    deployment.main([])
    header, *table = rows(capsys)
    assert [row[:3] for row in table] == [[kind, "Dict", yes] for kind in ("ALGD (DDPM)", "SACLag") for yes in ("no", "yes")]
    assert all(len(row) == len(header) and max(float(row[3]), float(row[4])) <= 1e-5 for row in table)
    assert all(float(row[5]) > 0 and float(row[6]) > 0 for row in table)


@pytest.mark.usefixtures("quick")
def test_candidates_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(gym.make("TwoModes-v0"), cost_limit=None).save(tmp_path / "seed0")
    command = ["--models", str(tmp_path / "seed0.zip"), "--env", "TwoModes-v0", "--out", str(tmp_path)]
    command += ["--episodes", "3", "--n-envs", "2", "--candidates"]
    candidates.main([*command, "4"])
    header, *before = rows(capsys)
    # What is measured is not measured again
    candidates.main([*command, "1", "4"])
    _, *table = rows(capsys)
    assert table[:2] == before
    assert [row[1] for row in table] == ["stochastic, N = 4", "deterministic", "stochastic, N = 1"]
    assert all(row[0] == f"{tmp_path.name}/seed0" and len(row) == len(header) for row in table)
    assert len({row[3] for row in table}) == len(table)
    # All push, to some side
    assert all(0.0 <= float(left) + float(right) <= 1.0 for *_, left, right in (table[0], table[2]))
    assert table[1][-2:] == ["", ""]


def test_how_often_verdicts_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "N_SAMPLES", 50)
    monkeypatch.setattr(verdict.verdict, "N_RESAMPLES", 200)
    draw, expected = verdict.DISTRIBUTIONS["0 in 98 %"]
    assert verdict.cell(draw, expected, 10) == "100.0 (100, 0.0)"
    draw, expected = verdict.DISTRIBUTIONS["exponential"]
    held, rest = verdict.cell(draw, expected, 20).split(" (")
    assert 80.0 <= float(held) <= 100.0 and rest.startswith("0, ")
