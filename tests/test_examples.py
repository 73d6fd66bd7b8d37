"""Every example runs, in a short form, and docs/examples.md shows it."""

import importlib.util
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
#: What it prints in the end, and what it leaves
LEAVES = {
    "best_feasible_model": ("best feasible: return ", "logs/best_model.zip"),
    "own_environment": ("energy ", ""),
    "quickstart": ("(limit: 64)", "two_modes.zip"),
    "resume": ("the same weights: True", "checkpoint/checkpoint.json"),
    "ros_like": ("100 actions, cost ", "agent.onnx"),
    "sac_lagrangian": ("SACLag: return ", ""),
    "several_constraints": ("aside: ", ""),
    "zoo": ("the agent that comes along: return 7", "logs/algd/TwoModes-v0_1/TwoModes-v0.zip"),
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["example"])
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert inspect.signature(module.main).parameters["steps"].default >= 800
    module.main(200)
    last, left = LEAVES[path.stem]
    assert last in capsys.readouterr().out
    assert (tmp_path / left).exists()


def test_every_example_is_shown() -> None:
    assert {path.stem for path in EXAMPLES} == set(LEAVES)
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    assert all(f"../examples/{path.name}" in page for path in EXAMPLES)
