"""The runtime alone: what it imports, and what it says of bad files and observations."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

import sb3_algd_runtime
from sb3_algd.export import export_onnx
from sb3_algd_runtime import FORMAT, METADATA_KEY, Agent
from tests.conftest import AnySpaceEnv, make_model

OBSERVATION = np.array([0.1, -0.2, 0.3], dtype=np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported policy."""
    path = tmp_path_factory.mktemp("export") / "agent.onnx"
    export_onnx(make_model(), path)
    return path


@pytest.fixture(scope="module")
def dict_agent(tmp_path_factory: pytest.TempPathFactory) -> Agent:
    """An exported policy of Dict observations."""
    space = spaces.Dict(a=spaces.Box(-1.0, 1.0, (2,), np.float32), b=spaces.Box(-1.0, 1.0, (1,), np.float32))
    path = tmp_path_factory.mktemp("export") / "agent.onnx"
    export_onnx(make_model(AnySpaceEnv(space), policy="MultiInputPolicy", episode_length=20), path)
    return Agent.load(path)


def rewritten(path: Path, properties: dict[str, str]) -> bytes:
    """The same graph with other metadata."""
    import onnx

    model = onnx.load_model_from_string(path.read_bytes())
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, properties)
    return model.SerializeToString()


def test_it_needs_numpy_and_onnxruntime_only(path: Path) -> None:
    program = f"""
import sys
for name in ("torch", "stable_baselines3", "gymnasium", "sb3_algd", "onnx", "onnxscript", "scipy"):
    sys.modules[name] = None
sys.path.insert(0, {str(Path(sb3_algd_runtime.__file__).parent)!r})
from sb3_algd_runtime import Agent
print(Agent.load({str(path)!r}, seed=0).act([0.1, -0.2, 0.3]).tolist())
assert all(sys.modules.get(name) is None for name in ("torch", "stable_baselines3", "gymnasium", "sb3_algd"))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == Agent.load(path, seed=0).act(OBSERVATION).tolist()


def test_it_neither_unpickles_nor_imports_anything_else() -> None:
    source = Path(sb3_algd_runtime.__file__).read_text(encoding="utf-8")
    assert not any(word in source for word in ("pickle.", "import pickle", "eval(", "exec(", "allow_pickle"))
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if line.strip().startswith(("import ", "from "))}
    assert imported == {"json", "os", "collections", "pathlib", "typing", "numpy", "onnxruntime"}


def test_seeds(path: Path) -> None:
    agent, again = Agent.load(path, seed=1), Agent.load(path, seed=1)
    first = agent.act(OBSERVATION)
    assert np.array_equal(first, again.act(OBSERVATION))
    assert not np.array_equal(first, agent.act(OBSERVATION))
    # A seed of its own does not touch the agent's noise
    assert np.array_equal(agent.act(OBSERVATION, seed=5), again.act(OBSERVATION, seed=5))
    again.act(OBSERVATION)
    assert np.array_equal(agent.act(OBSERVATION), again.act(OBSERVATION))
    noise = np.random.default_rng(2).standard_normal(agent.noise_shape)
    assert np.array_equal(agent.act(OBSERVATION, noise=noise), agent.act(OBSERVATION[None], noise=noise[None])[0])
    assert np.array_equal(agent.act(OBSERVATION, deterministic=True), agent.act(OBSERVATION, noise=0.0 * noise))


def test_single_observations_and_batches(path: Path) -> None:
    agent = Agent.load(path)
    assert agent.act(OBSERVATION).shape == (2,)
    assert agent.act(OBSERVATION.tolist()).shape == (2,)
    assert agent.act(np.zeros((1, 3))).shape == (1, 2)
    assert agent.act(np.zeros((7, 3), dtype=np.float32)).shape == (7, 2)
    assert agent.action_shape == (2,)


@pytest.mark.parametrize(
    "observation, message",
    [
        (np.zeros(4), r"must have shape \(3,\), or \('n', 3\) for a batch, got \(4,\)"),
        (np.zeros((2, 2, 3)), r"got \(2, 2, 3\)"),
        (0.5, r"got \(\)"),
        ([0.0, np.nan, 0.0], r"not finite \(NaN or infinite\) at \[1\]"),
        (np.full((2, 3), np.inf), "not finite"),
        (["a", "b", "c"], "must be of type float32, got <U1"),
        ({"a": [0.0]}, "must be of type float32, got object"),
    ],
)
def test_bad_observations(path: Path, observation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Agent.load(path).act(observation)


def test_noise_of_a_wrong_shape(path: Path) -> None:
    with pytest.raises(ValueError, match=r"must have shape \(1, 1, 5, 2\), got \(5, 2\)"):
        Agent.load(path).act(OBSERVATION, noise=np.zeros((5, 2)))
    with pytest.raises(ValueError, match="noise has values that are not finite"):
        Agent.load(path).act(OBSERVATION, noise=np.full((1, 5, 2), np.nan))


def test_dict_observations(dict_agent: Agent) -> None:
    assert dict_agent.act({"a": [0.1, 0.2], "b": [0.3]}).shape == (2, 1)
    assert dict_agent.act({"a": np.zeros((4, 2)), "b": np.zeros((4, 1))}).shape == (4, 2, 1)
    with pytest.raises(ValueError, match=r"keys \['a', 'b'\], got \['a'\]"):
        dict_agent.act({"a": [0.1, 0.2]})
    with pytest.raises(ValueError, match="got ndarray"):
        dict_agent.act(np.zeros(3))
    with pytest.raises(ValueError, match="batches of the same size"):
        dict_agent.act({"a": np.zeros((4, 2)), "b": [0.0]})
    with pytest.raises(ValueError, match=r"observation 'a' is not finite \(NaN or infinite\) at \[1\]"):
        dict_agent.act({"a": [0.0, np.nan], "b": [0.0]})


def test_bad_files(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    for content in (b"", b"not a model", whole[: len(whole) // 2], whole[:-100]):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad.onnx is not a complete ONNX file|was not written by sb3_algd.export"):
            Agent.load(tmp_path / "bad.onnx")
    with pytest.raises(ValueError, match=r"was not written by sb3_algd\.export: it has no metadata"):
        Agent(rewritten(path, {}))
    metadata = Agent.load(path).metadata
    with pytest.raises(ValueError, match=f"format {FORMAT + 1}.*install a newer sb3_algd"):
        Agent(rewritten(path, {METADATA_KEY: json.dumps({**metadata, "format": FORMAT + 1})}))
    for broken in ("{", "[]", json.dumps({"format": FORMAT}), json.dumps({**metadata, "noise_shape": None})):
        with pytest.raises(ValueError, match=r"was not written by sb3_algd\.export"):
            Agent(rewritten(path, {METADATA_KEY: broken}))
    with pytest.raises(FileNotFoundError):
        Agent.load(tmp_path / "missing.onnx")


def test_a_graph_that_refers_to_another_file_is_refused(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx

    model = onnx.load_model_from_string(path.read_bytes())
    onnx.save_model(model, tmp_path / "outside.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (tmp_path / "weights.bin").exists()
    with pytest.raises(ValueError, match="not a complete ONNX file"):
        Agent.load(tmp_path / "outside.onnx")
    # A single weight, in the working folder: without a shape that depends on it, nothing else would refuse it
    model = onnx.load_model_from_string(path.read_bytes())
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    (tmp_path / "secret.bin").write_bytes(weight.raw_data)
    onnx.external_data_helper.set_external_data(weight, "secret.bin")
    weight.ClearField("raw_data")
    (tmp_path / "one.onnx").write_bytes(model.SerializeToString())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="not a complete ONNX file"):
        Agent.load("one.onnx")


def test_without_onnxruntime(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="pip install onnxruntime"):
        Agent.load(path)
