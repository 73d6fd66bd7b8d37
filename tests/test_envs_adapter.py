"""The adapter of safety-gymnasium 1.0.0: what it does not change, and its errors for missing packages.

Most cases run in a process of their own, because a process imports a package only once.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sb3_algd
from sb3_algd.envs.safety.adapter import HashableArray, ScalarIndexModel, scalar

GENUINE = """
import gymnasium

class Task:
    pass

def make(env_id):
    return "made by the genuine package"

gymnasium.register("SafetyPointGoal1-v0", "safety_gymnasium.builder:Builder", max_episode_steps=7)
"""


# The environments without the rest of the package: it imports PyTorch, which takes seconds and is not needed here.
ENVS_ALONE = f"""
import sys, types
sys.modules["sb3_algd"] = types.ModuleType("sb3_algd")
sys.modules["sb3_algd"].__path__ = [{str(Path(sb3_algd.__file__).parent)!r}]
from sb3_algd.envs import register_envs
register_envs()
"""


def run(code: str, before: str = ENVS_ALONE, path: Path | None = None) -> str:
    """Run code in a new interpreter and return its output. The folder `path` comes first in its `sys.path`."""
    first = "" if path is None else f"import sys; sys.path.insert(0, {str(path)!r})\n"
    command = [sys.executable, "-W", "ignore", "-c", first + before + code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_needs_neither_safety_gymnasium_nor_mujoco() -> None:
    code = """
import sys
sys.modules["safety_gymnasium"] = sys.modules["mujoco"] = None
import sb3_algd, gymnasium
print("SafetyPointGoal1-v0" in gymnasium.registry, "AntSpeed-v0" in gymnasium.registry)
"""
    assert run(code, before="") == "True True"


def test_a_missing_package_is_one_clear_error() -> None:
    code = """
import importlib.util, gymnasium
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "safety_gymnasium" else found(name, *a)
for env_id in ("SafetyPointGoal1-v0", "SafetyAntVelocity-v1", "Safexp-PointButton1-v0"):
    try:
        gymnasium.make(env_id)
    except ImportError as error:
        print(error)
"""
    lines = run(code).splitlines()
    assert len(lines) == 3
    assert len(set(lines)) == 1
    assert "not installed" in lines[0]
    assert "pip install --no-deps safety-gymnasium==1.0.0" in lines[0]


def test_a_missing_dependency_is_named_and_can_be_installed_meanwhile() -> None:
    code = """
import sys, gymnasium
sys.modules["xmltodict"] = None
try:
    gymnasium.make("SafetyPointGoal1-v0")
except ImportError as error:
    print(error)
del sys.modules["xmltodict"]
print(gymnasium.make("SafetyPointGoal1-v0").observation_space.shape)
"""
    error, shape = run(code).splitlines()
    assert "xmltodict" in error
    assert 'pip install "sb3_algd[safety]"' in error
    assert shape == "(60,)"


def test_a_missing_mujoco_is_named_by_the_speed_tasks() -> None:
    code = """
import sys, gymnasium
sys.modules["mujoco"] = None
try:
    gymnasium.make("AntSpeed-v0")
except Exception as error:
    print(type(error).__name__, error)
"""
    out = run(code)
    assert "mujoco" in out.lower()
    assert "install" in out


def test_an_unknown_id_is_an_error_that_names_a_near_one() -> None:
    code = """
import gymnasium
try:
    gymnasium.make("SafetyPointGoall1-v0")
except gymnasium.error.NameNotFound as error:
    print(error)
"""
    assert "Did you mean: `SafetyPointGoal1`" in run(code)


@pytest.fixture
def genuine(tmp_path: Path) -> Path:
    """A folder with a safety_gymnasium that imports without the adapter."""
    package = tmp_path / "safety_gymnasium"
    package.mkdir()
    (package / "__init__.py").write_text(GENUINE)
    return tmp_path


def test_a_working_package_is_used_untouched(genuine: Path) -> None:
    code = """
from sb3_algd.envs.safety.adapter import load, is_adapted
package = load()
import safety_gymnasium
print(package is safety_gymnasium, is_adapted(), sorted(set(vars(package)) - set(vars(types))))
print(safety_gymnasium.make("x"))
"""
    loaded, made = run(code, path=genuine).splitlines()
    assert loaded == "True False ['Task', '__path__', 'gymnasium', 'make']"
    assert made == "made by the genuine package"


def test_loading_a_working_package_keeps_our_ids(genuine: Path) -> None:
    """The package registers the same ids. That must not replace ours while one of them is made."""
    code = """
import gymnasium
from sb3_algd.envs.safety.adapter import load
before = gymnasium.spec("SafetyPointGoal1-v0").entry_point
load()
print(gymnasium.spec("SafetyPointGoal1-v0").entry_point == before, before)
"""
    assert run(code, path=genuine) == "True sb3_algd.envs.safety.navigation:NavigationEnv"


def test_a_package_that_was_imported_before_keeps_its_ids(genuine: Path) -> None:
    code = """
import gymnasium
print(gymnasium.spec("SafetyPointGoal1-v0").entry_point, gymnasium.spec("SafetyCarGoal1-v0").entry_point)
"""
    assert (
        run(code, before="import safety_gymnasium" + ENVS_ALONE, path=genuine)
        == "safety_gymnasium.builder:Builder sb3_algd.envs.safety.navigation:NavigationEnv"
    )


def test_the_package_s_files_and_numpy_s_arrays_are_what_they_were() -> None:
    code = """
import sys, hashlib, pathlib, importlib.util
sys.dont_write_bytecode = True
root = pathlib.Path(importlib.util.find_spec("safety_gymnasium").origin).parent
def digest():
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(root.rglob("*.py")))).hexdigest()
before = digest()
import gymnasium, numpy
gymnasium.make("SafetyDoggoGoal1-v0").reset(seed=0)
print(digest() == before, float is __builtins__.float)
try:
    hash(numpy.zeros(1))
except TypeError:
    print("arrays are not hashable")
"""
    assert run(code).splitlines() == ["True True", "arrays are not hashable"]


def test_load_says_at_once_that_it_has_been_called() -> None:
    code = """
from sb3_algd.envs.safety.adapter import load, is_adapted
first = load()
print(load() is first, is_adapted(), hasattr(first, "__path__"))
"""
    assert run(code) == "True True True"


def test_hashable_array() -> None:
    array = np.array([1.0, 0.0, 0.0, 1.0]).view(HashableArray)
    assert hash(array) == hash(array.copy())
    assert hash(array) != hash(2 * array)
    np.testing.assert_array_equal(array * [1, 1, 1, 0.25], [1.0, 0.0, 0.0, 0.25])


def test_one_element_arrays_pass_for_numbers() -> None:
    class Model:
        """Accepts the same index types as MuJoCo."""

        nq = 7

        def jnt(self, index: int) -> int:
            assert type(index) is int
            return index

    model = ScalarIndexModel(Model())
    assert [model.jnt(index) for index in (3, np.int32(3), np.array([3]), np.array([[3]]))] == [3] * 4
    assert model.nq == 7
    assert [scalar(value) for value in (0.5, np.float64(0.5), np.array([0.5]))] == [0.5] * 3
    with pytest.raises(ValueError, match="size 1"):
        scalar(np.zeros(2))
