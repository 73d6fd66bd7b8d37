"""Rooms: which modules may import which, and how long a file may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sb3_algd

ROOT = Path(sb3_algd.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
#: Room: rooms of the package that it may import beside itself
ALLOWED: dict[str, set[str]] = {
    "common": set(),
    "algd": {"common"},
    "sac_lag": {"common"},
    "envs": set(),
    "export": {"common", "sb3_algd"},
    "plotting": set(),
    # It imports the module of a command when the command is given
    "cli": {"common", "sb3_algd"},
    "train": {"algd", "common", "envs", "plotting", "sac_lag", "sb3_algd"},
    "zoo": {"algd", "common", "envs", "export", "plotting", "sac_lag", "sb3_algd", "train", "cli"},
    "compare": {"algd", "common", "envs", "plotting", "sac_lag", "sb3_algd", "train"},
    # The package itself registers the environments
    "sb3_algd": {"algd", "common", "envs", "sac_lag"},
}
OPTIONAL = ("mujoco", "safety_gymnasium", "rl_zoo3", "matplotlib", "scipy", "optuna", "pandas", "huggingface_sb3")


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "sb3_algd" if parts == ("__init__",) else parts[0]


def imported_modules(path: Path) -> Iterator[str]:
    """All modules that a file imports, also inside functions and for type checkers only."""
    package = ("sb3_algd", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from sb3_algd import envs` imports a room, `from sb3_algd import ALGD` the package
            yield from (f"{module}.{alias.name}" if module == "sb3_algd" else module for alias in node.names)


def rooms_imported(path: Path) -> set[str]:
    found = set()
    for module in imported_modules(path):
        if module.split(".")[0] == "sb3_algd":
            second = module.split(".")[1] if "." in module else "sb3_algd"
            found.add(second if second in ALLOWED else "sb3_algd")
    return found - {room_of(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    assert rooms_imported(path) <= ALLOWED[room_of(path)]


def test_every_room_is_known_and_used() -> None:
    assert {room_of(path) for path in FILES} == set(ALLOWED)
    # What is parsed above does find imports
    assert rooms_imported(ROOT / "algd" / "algd.py") == {"common"}
    assert rooms_imported(ROOT / "sac_lag" / "sac_lag.py") == {"common"}
    assert "envs" in rooms_imported(ROOT / "__init__.py")


def test_a_file_fits_into_a_head() -> None:
    tests = sorted(Path(__file__).parent.glob("*.py"))
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES + tests}
    assert {path.name: length for path, length in lengths.items() if length > 400} == {}
    assert lengths[ROOT / "algd" / "algd.py"] <= 300


def test_the_core_needs_no_optional_package() -> None:
    program = f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None
import gymnasium as gym
import sb3_algd
for algorithm in (sb3_algd.ALGD, sb3_algd.SACLag):
    algorithm("MlpPolicy", gym.make("TwoModes-v0"), learning_starts=2, batch_size=4, device="cpu").learn(4)
leaves = ("sb3_algd.zoo", "sb3_algd.plotting", "sb3_algd.train", "sb3_algd.compare")
assert not any(name.startswith(leaves) for name in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
