"""Exported policies act as ``predict`` does, from raw observations to actions of the environment."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_algd import ALGD, SACLag
from sb3_algd.export import export_onnx
from sb3_algd_runtime import Agent
from tests.conftest import SMALL, AnySpaceEnv, CostlyEnv, make_model, make_model_of

IMAGE = spaces.Box(0, 255, shape=(36, 36, 3), dtype=np.uint8)
DICT = spaces.Dict(
    position=spaces.Box(-9.0, 9.0, shape=(2, 2), dtype=np.float64), lap=spaces.Discrete(4), flags=spaces.MultiBinary(3)
)
# Unequal bounds, and not an action vector
ACTIONS = spaces.Box(np.array([[-2.0], [0.0]], dtype=np.float32), np.array([[2.0], [30.0]], dtype=np.float32))


def make_any_env(observation_space: spaces.Space) -> DummyVecEnv:
    observation_space.seed(0)
    return DummyVecEnv([lambda: gym.wrappers.TimeLimit(AnySpaceEnv(observation_space), 20)])


def predicted(model: Any, raw: Any, n: int, deterministic: bool) -> tuple[np.ndarray, np.ndarray]:
    """What ``predict`` returns for n raw observations, and the noise that it has drawn."""
    normalizer = model.get_vec_normalize_env()
    seen = raw if normalizer is None else normalizer.normalize_obs(raw)
    n_candidates, (rows, dim) = model.policy.n_candidates, model.policy.noise_shape
    th.manual_seed(1)
    noise = th.randn((n, n_candidates, rows, dim)) if n_candidates > 1 else th.randn((rows, n, dim)).swapaxes(0, 1)[:, None]
    th.manual_seed(1)
    return model.predict(seen, deterministic=deterministic)[0], noise.numpy()


def assert_parity(model: Any, agent: Agent, space: spaces.Space, tolerance: float = 1e-5) -> None:
    space.seed(3)
    for n in (1, 64):
        samples = [space.sample() for _ in range(n)]
        raw: Any = (
            np.stack(samples)
            if not isinstance(space, spaces.Dict)
            else {name: np.stack([sample[name] for sample in samples]) for name in space}
        )
        for deterministic in (False, True):
            expected, noise = predicted(model, raw, n, deterministic)
            actual = agent.act(raw, deterministic, noise=noise)
            assert actual.shape == expected.shape and actual.dtype == expected.dtype
            np.testing.assert_allclose(actual, expected, atol=tolerance * 15)
            if n > 1 and not deterministic:
                assert np.ptp(actual) > 0.1


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "algorithm, policy_kwargs", [(ALGD, {}), (ALGD, dict(diffusion="ddpm")), (SACLag, {})], ids=["ve", "ddpm", "sac_lag"]
)
@pytest.mark.parametrize(
    "policy, space, keys",
    [
        ("MlpPolicy", spaces.Box(995.0, 1005.0, shape=(3,), dtype=np.float32), None),
        ("MultiInputPolicy", DICT, ["position"]),
    ],
    ids=["flat", "dict"],
)
def test_parity(
    tmp_path: Path, algorithm: Any, policy_kwargs: dict, policy: str, space: spaces.Space, keys: Any, normalize: bool
) -> None:
    env: Any = make_any_env(space)
    if normalize:
        # A mean that is large beside the standard deviation, which single precision would not stand
        env = VecNormalize(env, norm_obs_keys=keys, clip_obs=1.2)
    model = make_model_of(algorithm, env, policy=policy, policy_kwargs={**SMALL, **policy_kwargs}).learn(40)
    assert export_onnx(model, tmp_path / "agent.onnx") <= 1e-5
    agent = Agent.load(tmp_path / "agent.onnx")
    assert agent.metadata["normalized"] == ([] if not normalize else keys or ["observation"])
    assert_parity(model, agent, space)


@pytest.mark.parametrize("algorithm, policy_kwargs", [(ALGD, {}), (ALGD, dict(diffusion="ddpm")), (SACLag, {})])
def test_parity_of_images_as_the_environment_gives_them(tmp_path: Path, algorithm: Any, policy_kwargs: dict) -> None:
    model = make_model_of(algorithm, make_any_env(IMAGE), policy="CnnPolicy", policy_kwargs={**SMALL, **policy_kwargs})
    model.learn(22)
    export_onnx(model, tmp_path / "agent.onnx")
    agent = Agent.load(tmp_path / "agent.onnx")
    assert agent.metadata["observations"]["observation"] == {"shape": [36, 36, 3], "dtype": "uint8"}
    assert_parity(model, agent, IMAGE)
    with pytest.raises(ValueError, match="must be of type uint8, got float64"):
        agent.act(np.zeros(IMAGE.shape))


@pytest.mark.parametrize("algorithm", [ALGD, SACLag])
def test_parity_of_the_best_candidate(tmp_path: Path, algorithm: Any) -> None:
    model = make_model_of(algorithm, policy_kwargs={**SMALL, "n_candidates": 4, "share_features_extractor": True}).learn(60)
    export_onnx(model, tmp_path / "agent.onnx")
    agent = Agent.load(tmp_path / "agent.onnx")
    assert agent.noise_shape == (4, *model.policy.noise_shape)
    space = model.observation_space
    assert_parity(model, agent, space)
    # The one that the energy chooses
    observations = np.stack([space.sample() for _ in range(50)])
    noise = np.random.default_rng(0).standard_normal((50, *agent.noise_shape)).astype(np.float32)
    with th.no_grad():
        obs, candidates = th.as_tensor(observations), model.policy.actions_from_noise(
            th.as_tensor(observations), th.as_tensor(noise)
        )
        energy = model.policy.energy(obs, candidates).numpy()
    chosen = model.policy.unscale_action(candidates.numpy())[np.arange(50), energy.argmin(axis=1)]
    np.testing.assert_allclose(agent.act(observations, noise=noise), chosen, atol=1e-5)
    assert len(set(energy.argmin(axis=1))) > 1


def test_a_deterministic_file_takes_no_noise(tmp_path: Path) -> None:
    model = make_model()
    export_onnx(model, tmp_path / "agent.onnx", deterministic=True, n_candidates=8)
    agent = Agent.load(tmp_path / "agent.onnx")
    observation = np.full(3, 0.3, dtype=np.float32)
    np.testing.assert_allclose(agent.act(observation), model.predict(observation, deterministic=True)[0], atol=1e-5)
    with pytest.raises(ValueError, match="takes no noise"):
        agent.act(observation, noise=np.zeros((1, 5, 2)))


def test_metadata(tmp_path: Path) -> None:
    model = make_model_of(SACLag, gym.make("TwoModes-v0"), cost_limit=None)
    export_onnx(model, tmp_path / "agent.onnx", results=dict(mean_return=1.5))
    metadata = Agent.load(tmp_path / "agent.onnx").metadata
    assert metadata["algorithm"] == "SACLag" and metadata["task"] == "TwoModes-v0"
    assert metadata["cost_limit"] == [64.0] and metadata["cost_limit_discounted"] is False
    assert metadata["results"] == {"mean_return": 1.5}


def test_exporting_leaves_no_trace_in_the_model(tmp_path: Path) -> None:
    def trained(export: bool) -> ALGD:
        model = make_model().learn(30)
        model.policy.set_training_mode(True)
        if export:
            export_onnx(model, tmp_path / "agent.onnx", n_candidates=2)
            assert model.policy.training and model.policy.n_candidates == 1
        return model.learn(30, reset_num_timesteps=False)

    for a, b in zip(trained(True).policy.parameters(), trained(False).policy.parameters(), strict=True):
        assert th.equal(a, b)


class Noisy(BaseFeaturesExtractor):
    """Features with randomness of their own."""

    def __init__(self, observation_space: gym.Space) -> None:
        super().__init__(observation_space, features_dim=3)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """:param observations: Shape (batch, 3). :return: The same with noise."""
        return observations + th.randn_like(observations)


def test_a_policy_that_acts_differently_is_not_written(tmp_path: Path) -> None:
    model = make_model(policy_kwargs={**SMALL, "features_extractor_class": Noisy})
    with pytest.raises(ValueError, match="differ from those of predict"):
        export_onnx(model, tmp_path / "agent.onnx")
    assert not (tmp_path / "agent.onnx").exists()


def test_a_model_without_environment_must_say_whether_it_was_normalised(tmp_path: Path) -> None:
    env = VecNormalize(make_any_env(spaces.Box(-1.0, 1.0, shape=(3,), dtype=np.float32)))
    model = make_model(env).learn(40)
    model.save(tmp_path / "model")
    env.save(str(tmp_path / "vecnormalize.pkl"))
    loaded = ALGD.load(tmp_path / "model", device="cpu")
    with pytest.raises(ValueError, match=r"trained with VecNormalize: give vec_normalize=VecNormalize.load"):
        export_onnx(loaded, tmp_path / "agent.onnx")
    export_onnx(loaded, tmp_path / "agent.onnx", vec_normalize=VecNormalize.load(str(tmp_path / "vecnormalize.pkl"), env.venv))
    assert_parity(model, Agent.load(tmp_path / "agent.onnx"), env.venv.observation_space)
    export_onnx(loaded, tmp_path / "raw.onnx", vec_normalize=None)
    assert Agent.load(tmp_path / "raw.onnx").metadata["normalized"] == []


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    model: Any = make_model()
    with pytest.raises(ValueError, match="n_candidates must be a whole number"):
        export_onnx(model, tmp_path / "agent.onnx", n_candidates=0)
    with pytest.raises(ValueError, match="VecNormalize wrapper, None or 'auto', got 'yes'"):
        export_onnx(model, tmp_path / "agent.onnx", vec_normalize="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="The policy takes observations of"):
        export_onnx(model, tmp_path / "agent.onnx", observation_space=spaces.Box(-1, 1, (4,)))
    taken = spaces.Dict(noise=spaces.Box(-1, 1, (4,)), speed=spaces.Box(-1, 1, (4,)))
    with pytest.raises(
        ValueError, match=r"its own input and output 'noise' and 'action': rename the observations \['noise'\]"
    ):
        export_onnx(model, tmp_path / "agent.onnx", observation_space=taken)
    other: Any = SAC("MlpPolicy", "Pendulum-v1", device="cpu")
    with pytest.raises(ValueError, match="a model of ALGD or SACLag, got SAC"):
        export_onnx(other, tmp_path / "agent.onnx")


def test_partly_infinite_bounds_are_refused_as_in_sb3() -> None:
    class Unbounded(CostlyEnv):
        action_space = spaces.Box(np.array([-1.0, -np.inf], dtype=np.float32), np.ones(2, dtype=np.float32))

    with pytest.raises(AssertionError, match="finite lower and upper bound"):
        make_model(gym.wrappers.TimeLimit(Unbounded(), 20))
