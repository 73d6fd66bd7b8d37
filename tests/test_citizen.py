"""The algorithms as citizens of Stable-Baselines3: each of its features together with costs, by the values that come out."""

import io
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.callbacks import CheckpointCallback, StopTrainingOnMaxEpisodes
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import VecNormalize, VecTransposeImage

from sb3_algd import ALGD, CostDictReplayBuffer, CostHerReplayBuffer, CostNStepReplayBuffer, SACLag
from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm
from tests.conftest import (
    SMALL,
    Algorithm,
    CostlyBitFlipping,
    CostlyEnv,
    learned,
    make_env,
    make_model,
    make_model_of,
    same,
    weights,
)

#: Algorithm, what is special about its policy, and number of constraints
KINDS = [
    (algorithm, special, n_costs)
    for algorithm, special in ((ALGD, dict(diffusion="ve")), (ALGD, dict(diffusion="ddpm")), (SACLag, {}))
    for n_costs in (1, 2)
]
kinds = pytest.mark.parametrize("algorithm, special, n_costs", KINDS)


def limits(n_costs: int) -> list[float]:
    return [5.0, 3.0][:n_costs]


class ImageEnv(CostlyEnv):
    """The observation is an image, whose first pixels tell the state and so the costs."""

    observation_space: spaces.Space = spaces.Box(0, 255, shape=(36, 36, 1), dtype=np.uint8)

    def picture(self) -> np.ndarray:
        image = np.zeros((36, 36, 1), dtype=np.uint8)
        image[0, :3, 0] = np.round(127 * (1 + self.state))
        return image

    def reset(self, **kwargs: Any) -> Any:
        _, info = super().reset(**kwargs)
        return self.picture(), info

    def step(self, action: np.ndarray) -> Any:
        _, *others = super().step(action)
        return self.picture(), *others


class DictEnv(ImageEnv):
    """Image and numbers."""

    observation_space = spaces.Dict(image=ImageEnv.observation_space, state=CostlyEnv.observation_space)

    def reset(self, **kwargs: Any) -> Any:
        image, info = super().reset(**kwargs)
        return {"image": image, "state": self.state}, info

    def step(self, action: np.ndarray) -> Any:
        image, *others = super().step(action)
        return {"image": image, "state": self.state}, *others


def pixels_of_cost(buffer: Any, images: np.ndarray, rows: int) -> None:
    """Costs are the squares of the states that the images show, up to their rounding."""
    states = images[:rows, :, 0, 0, : buffer.n_constraints] / 127.0 - 1
    np.testing.assert_allclose(buffer.costs[:rows], states**2, atol=0.01)


@kinds
def test_images(algorithm: Algorithm, special: dict, n_costs: int) -> None:
    env = make_vec_env(lambda: gym.wrappers.TimeLimit(ImageEnv(n_costs), 5), n_envs=2)
    policy_kwargs = {**SMALL, **special, "features_extractor_kwargs": dict(features_dim=8)}
    kwargs = dict(policy="CnnPolicy", policy_kwargs=policy_kwargs, buffer_size=60, learning_starts=8, batch_size=4)
    model = make_model_of(algorithm, env, cost_limit=limits(n_costs), **kwargs)
    assert isinstance(model.env, VecTransposeImage)
    buffer: Any = learned(model, 12).replay_buffer
    pixels_of_cost(buffer, buffer.observations, 6)
    first = env.reset()
    assert isinstance(first, np.ndarray)
    action, _ = model.predict(first, deterministic=True)
    assert action.shape == (2, 2)


@kinds
@pytest.mark.parametrize("share", [False, True])
def test_dict_observations(algorithm: Algorithm, special: dict, n_costs: int, share: bool) -> None:
    env = make_vec_env(lambda: gym.wrappers.TimeLimit(DictEnv(n_costs), 5), n_envs=2)
    extractor = dict(share_features_extractor=share, features_extractor_kwargs=dict(cnn_output_dim=8))
    policy_kwargs = {**SMALL, **special, **extractor}
    kwargs = dict(policy="MultiInputPolicy", policy_kwargs=policy_kwargs, buffer_size=60, learning_starts=8, batch_size=4)
    model = make_model_of(algorithm, env, cost_limit=limits(n_costs), **kwargs)
    buffer = learned(model, 12).replay_buffer
    assert isinstance(buffer, CostDictReplayBuffer)
    np.testing.assert_allclose(buffer.costs[:6], buffer.observations["state"][:6, :, :n_costs] ** 2, rtol=1e-6)
    pixels_of_cost(buffer, buffer.observations["image"], 6)
    assert (model.critic.features_extractor is model.actor.features_extractor) == share


@kinds
def test_goals(algorithm: Algorithm, special: dict, n_costs: int) -> None:
    class GoalEnv(CostlyBitFlipping):
        def step(self, action: Any) -> Any:
            *others, info = super().step(action)
            return *others, {"cost": [info["cost"], 2 * info["cost"]][:n_costs]}

    model = make_model_of(
        algorithm,
        make_vec_env(lambda: GoalEnv(n_bits=4, continuous=True, max_steps=4), n_envs=2),
        policy="MultiInputPolicy",
        replay_buffer_class=HerReplayBuffer,
        buffer_size=100,
        learning_starts=16,
        cost_limit=limits(n_costs),
        episode_length=4,
        policy_kwargs={**SMALL, **special},
    )
    buffer = learned(model, 32).replay_buffer
    assert isinstance(buffer, CostHerReplayBuffer)
    batch = buffer.sample(64)
    assert isinstance(batch.next_observations, dict)
    # Whatever the goal, the cost is the one that was paid
    paid = batch.next_observations["achieved_goal"].sum(dim=1).float()
    th.testing.assert_close(batch.costs, th.stack([paid, 2 * paid], dim=1)[:, :n_costs])


@kinds
def test_n_step_costs_equal_a_hand_computation(algorithm: Algorithm, special: dict, n_costs: int) -> None:
    model = make_model_of(
        algorithm,
        make_env(n_costs, steps=4),
        cost_limit=limits(n_costs),
        n_steps=3,
        gamma=0.9,
        cost_gamma=0.5,
        policy_kwargs={**SMALL, **special},
    )
    buffer = learned(model, 28).replay_buffer
    assert isinstance(buffer, CostNStepReplayBuffer)
    batch = buffer._get_samples(np.array([4, 6, 7]))
    costs = buffer.costs[:, 0]
    # The episode ends with row 7, by the time limit
    expected = [costs[4] + 0.5 * costs[5] + 0.25 * costs[6], costs[6] + 0.5 * costs[7], costs[7]]
    np.testing.assert_allclose(batch.costs, expected, rtol=1e-6)
    assert batch.cost_discounts is not None
    np.testing.assert_allclose(batch.cost_discounts[:, 0], [0.5**3, 0.5**2, 0.5])
    assert not batch.terminations.any()


@kinds
def test_normalisation_scales_rewards_but_not_costs(algorithm: Algorithm, special: dict, n_costs: int) -> None:
    env = VecNormalize(make_vec_env(lambda: make_env(n_costs), n_envs=3), clip_obs=100.0)
    model = make_model_of(algorithm, env, cost_limit=limits(n_costs), policy_kwargs={**SMALL, **special})
    buffer: Any = learned(model, 90).replay_buffer
    np.testing.assert_allclose(buffer.costs[:30], buffer.observations[:30, :, :n_costs] ** 2, rtol=1e-4, atol=1e-7)
    np.random.seed(0)
    raw = buffer.sample(64)
    np.random.seed(0)
    batch = buffer.sample(64, env=env)
    th.testing.assert_close(batch.costs, raw.costs)
    th.testing.assert_close(batch.rewards, raw.rewards / np.sqrt(env.ret_rms.var + 1e-8), rtol=1e-4, atol=1e-5)
    assert not th.allclose(batch.observations, raw.observations)


@kinds
def test_replay_buffer_and_policy_are_saved_and_loaded(
    tmp_path: Path, algorithm: Algorithm, special: dict, n_costs: int
) -> None:
    def make() -> ConstrainedOffPolicyAlgorithm:
        env = make_vec_env(lambda: make_env(n_costs), n_envs=2)
        return make_model_of(algorithm, env, cost_limit=limits(n_costs), policy_kwargs={**SMALL, **special})

    model = learned(make(), 40)
    model.save_replay_buffer(tmp_path / "buffer")
    other = make()
    other.load_replay_buffer(tmp_path / "buffer")
    assert model.replay_buffer is not None and other.replay_buffer is not None
    np.testing.assert_array_equal(model.replay_buffer.costs, other.replay_buffer.costs)
    assert other.replay_buffer.costs[:20].min() > 0

    obs = np.random.default_rng(0).uniform(-1, 1, (5, 3)).astype(np.float32)
    expected, _ = model.predict(obs, deterministic=True)
    model.policy.save(str(tmp_path / "policy"))
    policy = type(model.policy).load(str(tmp_path / "policy"))
    np.testing.assert_array_equal(policy.predict(obs, deterministic=True)[0], expected)
    assert same(dict(policy.state_dict()), dict(model.policy.state_dict()))
    model.actor.save(str(tmp_path / "actor"))
    actor = type(model.actor).load(str(tmp_path / "actor"))
    np.testing.assert_array_equal(actor.predict(obs, deterministic=True)[0], expected)


def test_standard_policy_kwargs_take_effect() -> None:
    model = make_model(
        policy_kwargs=dict(
            net_arch=dict(pi=[8, 9], qf=[10]),
            activation_fn=th.nn.Tanh,
            n_critics=3,
            optimizer_class=th.optim.RMSprop,
            optimizer_kwargs=dict(alpha=0.5),
        )
    )
    layers = [layer for layer in model.actor.network.mlp if isinstance(layer, th.nn.Linear)]
    assert [layer.out_features for layer in layers] == [8, 9, 2]
    assert any(isinstance(layer, th.nn.Tanh) for layer in model.actor.network.mlp)
    assert [tuple(weight.shape) for weight in model.critic.weights] == [(3, 5, 10), (3, 10, 1)]
    assert [tuple(weight.shape) for weight in model.cost_critic.weights] == [(4, 5, 10), (4, 10, 1)]
    for optimizer in (model.actor.optimizer, model.critic.optimizer, model.cost_critic.optimizer):
        assert isinstance(optimizer, th.optim.RMSprop) and optimizer.defaults["alpha"] == 0.5
    learned(model, 30)


def test_action_noise_is_added_to_the_policys_action(algorithm: Algorithm) -> None:
    noise = NormalActionNoise(np.full(2, 5.0), np.zeros(2))
    model = make_model_of(algorithm, action_noise=noise, learning_starts=0, gradient_steps=0)
    model.learn(10)
    assert model.replay_buffer is not None
    # So much noise leaves the edge of the box only
    np.testing.assert_array_equal(model.replay_buffer.actions[:10], 1.0)


def test_excluded_and_included_parameters_and_custom_objects(algorithm: Algorithm) -> None:
    model = make_model_of(algorithm, rho=0.3, cost_key=lambda info: info["cost"]).learn(30)
    file = io.BytesIO()
    model.save(file, exclude=["rho", "cost_key"], include=["replay_buffer"])
    file.seek(0)
    loaded = algorithm.load(file, custom_objects=dict(cost_limit=9.0, buffer_size=7))
    assert loaded.rho == 0.5 and loaded.cost_key == "cost"  # the defaults
    assert np.asarray(loaded.cost_limit).tolist() == [9.0] and loaded.cost_budget[0] > model.cost_budget[0]
    assert loaded.buffer_size == 7
    assert loaded.replay_buffer is not None and model.replay_buffer is not None
    np.testing.assert_array_equal(loaded.replay_buffer.costs, model.replay_buffer.costs)


def test_learning_goes_on_where_it_stopped(algorithm: Algorithm) -> None:
    model = make_model_of(algorithm).learn(50)
    costs = list(model.ep_cost_buffer)
    assert len(costs) == 2
    tracker = model._cost_tracker
    model.learn(50, reset_num_timesteps=False)
    assert model.num_timesteps == 100 and model._n_updates == 80
    # The episode that ran at step 50 is counted whole
    buffer = model.replay_buffer
    assert buffer is not None and model._cost_tracker is tracker
    np.testing.assert_allclose(np.ravel(model.ep_cost_buffer), buffer.costs[:100, 0, 0].reshape(5, 20).sum(axis=1), rtol=1e-5)
    model.learn(25)
    assert model.num_timesteps == 25 and len(model.ep_cost_buffer) == 1


def test_callbacks_stop_training_and_store_models(tmp_path: Path, algorithm: Algorithm) -> None:
    stop = StopTrainingOnMaxEpisodes(2)
    model = make_model_of(algorithm).learn(200, callback=[CheckpointCallback(25, str(tmp_path)), stop])
    assert model.num_timesteps == 40
    assert algorithm.load(tmp_path / "rl_model_25_steps").num_timesteps == 25


@pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU")
def test_a_model_moves_to_another_device(tmp_path: Path, algorithm: Algorithm) -> None:
    model = make_model_of(algorithm, device="cuda").learn(40)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=make_env(), device="cpu")
    for key, value in weights(loaded).items():
        assert value.device.type == "cpu"
        th.testing.assert_close(value, weights(model)[key].cpu())
    learned(loaded, 30)
