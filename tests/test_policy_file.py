"""Actors in files without pickle act as their models do, and files of strangers can run nothing."""

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from safetensors.torch import load_file
from stable_baselines3 import SAC
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize, VecTransposeImage
from torch import nn

from sb3_algd import ALGD, SACLag, evaluate_policy
from sb3_algd.export import export_policy, load_policy
from sb3_algd.export.spaces import space_from_json, space_to_json
from tests.conftest import SMALL, AnySpaceEnv, make_model, make_model_of

IMAGE = spaces.Box(0, 255, shape=(36, 36, 3), dtype=np.uint8)
# Keys in no alphabetical order
DICT = spaces.Dict(
    position=spaces.Box(-9.0, 9.0, shape=(2, 2), dtype=np.float64), lap=spaces.Discrete(4), flags=spaces.MultiBinary(3)
)


def make_any_env(space: spaces.Space) -> DummyVecEnv:
    space.seed(0)
    return DummyVecEnv([lambda: gym.wrappers.TimeLimit(AnySpaceEnv(space), 20)])


def assert_acts_as(policy: Any, model: Any, space: spaces.Space) -> None:
    normalizer = model.get_vec_normalize_env()
    for n in (1, 64):
        samples: list[Any] = [space.sample() for _ in range(n)]
        raw: Any = {name: np.stack([s[name] for s in samples]) for name in space} if isinstance(space, spaces.Dict) else None
        raw = np.stack(samples) if raw is None else raw
        for deterministic in (False, True):
            th.manual_seed(1)
            expected, _ = model.predict(
                raw if normalizer is None else normalizer.normalize_obs(raw), None, None, deterministic
            )
            th.manual_seed(1)
            actual, _ = policy.predict(raw, deterministic=deterministic)
            np.testing.assert_array_equal(actual, expected)
    assert policy.predict(space.sample())[0].shape == model.action_space.shape


def test_an_ancestral_policy_acts_as_its_model(tmp_path: Path) -> None:
    model = make_model(policy_kwargs=dict(SMALL, diffusion="ve-ancestral"))
    policy = load_policy(export_policy(model, tmp_path / "policy"))
    assert_acts_as(policy, model, model.observation_space)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where an actor is."""
    return export_policy(make_model(cost_limit=[5.0]), tmp_path / "policy")


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "policy, space, keys",
    [
        ("MlpPolicy", spaces.Box(995.0, 1005.0, shape=(3,), dtype=np.float32), None),
        ("MultiInputPolicy", DICT, ["position"]),
        ("CnnPolicy", IMAGE, None),
    ],
    ids=["flat", "dict", "image"],
)
@pytest.mark.parametrize(
    "algorithm, policy_kwargs",
    [(ALGD, {}), (ALGD, dict(diffusion="ddpm", denoising_steps=3)), (SACLag, dict(activation_fn=nn.Tanh))],
    ids=["ve", "ddpm", "sac_lag"],
)
def test_parity(
    tmp_path: Path, algorithm: Any, policy_kwargs: dict, policy: str, space: spaces.Space, keys: Any, normalize: bool
) -> None:
    env: Any = make_any_env(space)
    if normalize:
        # The order that SB3 can store
        env = VecTransposeImage(env) if policy == "CnnPolicy" else env
        env = VecNormalize(env, norm_obs=policy != "CnnPolicy", norm_obs_keys=keys, clip_obs=1.2)
    model = make_model_of(algorithm, env, policy=policy, policy_kwargs={**SMALL, **policy_kwargs}).learn(25)
    export_policy(model, tmp_path)
    loaded = load_policy(tmp_path)
    assert_acts_as(loaded, model, space)
    assert (loaded.config["normalization"] is not None) == (normalize and policy != "CnnPolicy")


def test_it_is_evaluated_like_a_model_and_goes_into_one(tmp_path: Path) -> None:
    model = make_model_of(ALGD, gym.make("TwoModes-v0"), cost_limit=None, cost_limit_discounted=True)
    export_policy(model, tmp_path, results={"mean_cost": 3.0})
    loaded = load_policy(tmp_path)
    assert loaded.config["task"] == "TwoModes-v0" and loaded.config["results"] == {"mean_cost": 3.0}
    results = []
    for candidate in (model, loaded):
        env = DummyVecEnv([lambda: gym.make("TwoModes-v0")])
        env.seed(1)
        th.manual_seed(0)
        results.append(evaluate_policy(candidate, env, n_eval_episodes=2, warn=False))
    # In the unit of the limit
    assert results[0] == results[1]
    other = make_model_of(ALGD, gym.make("TwoModes-v0"), cost_limit=None, seed=5)
    assert not np.array_equal(
        other.predict(np.zeros(1), deterministic=True)[0], model.predict(np.zeros(1), None, None, True)[0]
    )
    other.policy.actor.load_state_dict(load_file(tmp_path / "policy.safetensors"))
    assert_acts_as(loaded, other, other.observation_space)


def test_nothing_is_unpickled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("unpickled")

    expected = load_policy(folder).predict(np.zeros(3), deterministic=True)[0]
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(th, "load", refuse)
    # They are what a model's own file is loaded with
    with pytest.raises(AssertionError, match="unpickled"):
        ALGD.load(saved_model(), device="cpu")
    np.testing.assert_array_equal(load_policy(folder).predict(np.zeros(3), deterministic=True)[0], expected)


def saved_model() -> io.BytesIO:
    file = io.BytesIO()
    make_model().save(file)
    file.seek(0)
    return file


def test_files_are_small(tmp_path: Path) -> None:
    model = ALGD("MlpPolicy", gym.make("TwoModes-v0"), device="cpu")
    model.save(tmp_path / "model.zip")
    export_policy(model, tmp_path)
    size = sum((tmp_path / name).stat().st_size for name in ("policy.safetensors", "config.json"))
    assert size < (tmp_path / "model.zip").stat().st_size / 10
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        assert size < len(archive.read("policy.pth")) / 10


def change(config: dict[str, Any], **changes: Any) -> str:
    return json.dumps({**config, **changes})


def test_damaged_and_foreign_files(folder: Path, tmp_path: Path) -> None:
    weights, text = (folder / "policy.safetensors").read_bytes(), (folder / "config.json").read_text()
    config = json.loads(text)
    flipped = bytearray(weights)
    flipped[-3] ^= 1
    for content in (b"", weights[: len(weights) // 2], bytes(flipped), pickle.dumps({"a": 1})):
        (folder / "policy.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"policy\.safetensors is damaged, or does not belong to"):
            load_policy(folder)
    (folder / "policy.safetensors").write_bytes(weights)
    kwargs = config["policy_kwargs"]
    for broken in (
        "",
        text[: len(text) // 2],
        "[]",
        "null",
        "{}",
        change(config, algorithm="os.system"),
        change(config, algorithm=["ALGD"]),
        change(config, format="1"),
        change(config, sha256=None),
        change(config, cost_limit="much"),
        change(config, observation_space={"type": "Graph"}),
        change(config, action_space=config["observation_space"]),
        change(config, normalization={"statistics": {}}),
        change(config, policy_kwargs={**kwargs, "net_arch": [8]}),
        change(config, policy_kwargs={**kwargs, "activation_fn": "Linear"}),
        change(config, policy_kwargs={**kwargs, "features_extractor_class": "builtins.exec"}),
        change(config, policy_kwargs={**kwargs, "diffusion": "none"}),
    ):
        (folder / "config.json").write_text(broken)
        with pytest.raises(ValueError, match=r"was not written by sb3_algd\.export") as error:
            load_policy(folder)
        assert "\n" not in str(error.value)
    (folder / "config.json").write_text(change(config, format=2))
    with pytest.raises(ValueError, match=r"has format 2, but .* up to 1: install a newer one"):
        load_policy(folder)
    with pytest.raises(FileNotFoundError):
        load_policy(tmp_path / "nowhere")


class Mine(FlattenExtractor):
    """A features extractor of a user's own."""


class MyALGD(ALGD):
    """An algorithm of a user's own."""


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="features_extractor_class=Mine cannot be written without pickle"):
        export_policy(make_model(policy_kwargs={**SMALL, "features_extractor_class": Mine}), tmp_path)
    with pytest.raises(ValueError, match="activation_fn=Softsign cannot be written without pickle, only ReLU"):
        export_policy(make_model(policy_kwargs={**SMALL, "activation_fn": nn.Softsign}), tmp_path)
    with pytest.raises(ValueError, match="best of 4 candidates"):
        export_policy(make_model(policy_kwargs={**SMALL, "n_candidates": 4}), tmp_path)
    with pytest.raises(ValueError, match="a model of ALGD or SACLag, got MyALGD"):
        export_policy(make_model_of(MyALGD), tmp_path)
    other: Any = SAC("MlpPolicy", "Pendulum-v1", device="cpu")
    with pytest.raises(ValueError, match="a model of ALGD or SACLag, got SAC"):
        export_policy(other, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(np.array([-1.0, -np.inf]), np.array([np.inf, 2.5]), dtype=np.float64),
        spaces.Box(-np.inf, np.inf, (2, 3), np.float32),
        spaces.Box(np.array([0.1, 0.2], np.float32), np.array([0.3, 0.7], np.float32)),
        IMAGE,
        spaces.Discrete(5, start=-2),
        spaces.MultiDiscrete([3, 4]),
        spaces.MultiBinary(4),
        spaces.MultiBinary([2, 3]),
        DICT,
    ],
)
def test_spaces_survive(space: spaces.Space) -> None:
    again = space_from_json(json.loads(json.dumps(space_to_json(space), allow_nan=False)))
    assert again == space and again.dtype == space.dtype
    if isinstance(space, spaces.Dict) and isinstance(again, spaces.Dict):
        assert list(again.spaces) == list(space.spaces)


def test_other_spaces_are_refused() -> None:
    with pytest.raises(ValueError, match="type Text cannot be exported"):
        space_to_json(spaces.Text(5))
