"""Actor and critics against plain re-computations of what they stand for."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.utils import ConstantSchedule
from torch import nn

from sb3_algd import CnnPolicy, DiffusionPolicy, MultiInputPolicy
from sb3_algd.common.critics import EnsembleCritic
from tests.conftest import SMALL, make_model

OBSERVATIONS = spaces.Box(-1.0, 1.0, shape=(5,), dtype=np.float32)
ACTIONS = spaces.Box(np.array([-2.0, 0.0], dtype=np.float32), np.array([2.0, 4.0], dtype=np.float32))


def make_policy(**kwargs: Any) -> DiffusionPolicy:
    th.manual_seed(0)
    return DiffusionPolicy(OBSERVATIONS, ACTIONS, ConstantSchedule(3e-4), **kwargs)


def member(critic: EnsembleCritic, index: int, inputs: th.Tensor) -> th.Tensor:
    """One critic of the ensemble, layer by layer."""
    hidden = inputs
    for depth, (weight, bias) in enumerate(zip(critic.weights, critic.biases, strict=True)):
        if depth > 0:
            hidden = critic.activation(hidden)
        hidden = hidden @ weight[index] + bias[index]
    return hidden


@pytest.mark.parametrize("net_arch", [[], [8], [16, 8]])
def test_stacked_critics_equal_single_networks(net_arch: list[int]) -> None:
    policy = make_policy(net_arch=net_arch, n_constraints=3, n_cost_critics=4, layer_norm=False)
    obs, actions = th.randn(7, 5), th.randn(7, 2)
    for critic, n_members, n_outputs in ((policy.critic, 2, 1), (policy.cost_critic, 4, 3)):
        values = critic(obs, actions)
        assert values.shape == (n_members, 7, n_outputs)
        for index in range(n_members):
            th.testing.assert_close(values[index], member(critic, index, th.cat([obs, actions], dim=1)))


def test_critics_bound_to_states_take_several_actions() -> None:
    policy = make_policy(n_constraints=2)
    obs = th.randn(7, 5)
    bound = policy.cost_critic.bind(policy.cost_critic.features(obs))
    for actions in th.randn(3, 7, 2):
        th.testing.assert_close(bound.values(actions), policy.cost_critic(obs, actions))


@pytest.mark.parametrize("diffusion, n_heads", [("ve", 1), ("ddpm", 2)])
def test_bound_denoiser_equals_the_network_on_its_whole_input(diffusion: str, n_heads: int) -> None:
    policy = make_policy(diffusion=diffusion)
    network = policy.actor.network
    obs, action, latent = th.randn(6, 5), th.rand(6, 2), th.randn(6, 2)
    denoiser = network.bind(obs)
    assert network.mlp[-1].out_features == 2 * n_heads

    def plain(second: th.Tensor, step: th.Tensor) -> th.Tensor:
        return network.mlp(th.cat([obs, second, network.step_embedding(step)], dim=1))

    steps = th.tensor([0, 1, 2, 3, 4, 2])
    th.testing.assert_close(denoiser.score(action, steps), plain(action, steps)[:, :2])
    th.testing.assert_close(denoiser.score(action, 3), plain(action, th.full((6,), 3))[:, :2])
    if diffusion == "ddpm":
        score, noise = denoiser.score_and_noise(action, latent, 3)
        th.testing.assert_close(score, plain(action, th.full((6,), 3))[:, :2])
        th.testing.assert_close(noise, plain(latent, th.full((6,), 3))[:, 2:])


def test_initialisation_is_the_papers() -> None:
    policy = make_policy()
    for layer in policy.actor.network.mlp:
        if isinstance(layer, nn.Linear):
            bound = np.sqrt(6.0 / (layer.in_features + layer.out_features))
            assert 0.9 * bound < layer.weight.abs().max() <= bound
            assert not layer.bias.any()
    for weight in policy.critic.weights:
        bound = np.sqrt(6.0 / (weight.shape[1] + weight.shape[2]))
        assert 0.9 * bound < weight.abs().max() <= bound
        assert not th.equal(weight[0], weight[1])
    for weight in list(policy.cost_critic.weights)[:-1]:
        assert weight.std().item() == pytest.approx(0.5 / np.sqrt(weight.shape[1]), rel=0.05)
    assert not any(bias.any() for critic in (policy.critic, policy.cost_critic) for bias in critic.biases)
    arch = [layer.out_features for layer in policy.actor.network.mlp if isinstance(layer, nn.Linear)]
    assert arch == [128, 128, 128, 2]
    assert [weight.shape[2] for weight in policy.cost_critic.weights] == [256, 256, 1]


def test_targets_start_equal_and_follow() -> None:
    policy = make_policy(net_arch=[8])
    pairs = ((policy.critic, policy.critic_target), (policy.cost_critic, policy.cost_critic_target))
    for critic, target in pairs:
        assert all(th.equal(a, b) for a, b in zip(critic.parameters(), target.parameters(), strict=True))
        with th.no_grad():
            for parameter in critic.parameters():
                parameter.add_(1.0)
        before = [parameter.clone() for parameter in target.parameters()]
        policy.update_targets(0.25)
        for old, new in zip(before, target.parameters(), strict=True):
            th.testing.assert_close(new.detach(), old + 0.25)
        policy.update_targets(1.0)
    assert not any(parameter.requires_grad for _, target in pairs for parameter in target.parameters())
    policy.set_training_mode(True)
    assert policy.critic.training and not policy.critic_target.training and not policy.cost_critic_target.training


def test_weights_of_the_other_ve_process_are_refused(tmp_path: Path) -> None:
    """They would be taken, and act in another way."""
    models = {kind: make_model(policy_kwargs=dict(SMALL, diffusion=kind)) for kind in ("ve", "ve-ancestral")}
    for kind, model in models.items():
        model.save(tmp_path / kind)
    for kind, other in (("ve", "ve-ancestral"), ("ve-ancestral", "ve")):
        before = copy.deepcopy(models[kind].policy.state_dict())
        with pytest.raises(ValueError, match=f"`policy_kwargs` must have diffusion='{other}'"):
            models[kind].set_parameters(str(tmp_path / other))
        with pytest.raises(ValueError, match=f"must have diffusion='{other}'"):
            models[kind].actor.load_state_dict(models[other].actor.state_dict())
        after = models[kind].policy.state_dict()
        assert all(th.equal(value, after[name]) for name, value in before.items())
        # What has no actor in it says nothing of it
        critics = {name: value for name, value in models[other].policy.state_dict().items() if not name.startswith("actor.")}
        models[kind].policy.load_state_dict(critics, strict=False)


@pytest.mark.parametrize("diffusion", ["ve", "ve-ancestral", "ddpm"])
def test_actions_are_in_the_box_and_the_actor_alone_predicts_them(diffusion: str) -> None:
    policy = make_policy(diffusion=diffusion)
    obs = np.random.default_rng(0).uniform(-1, 1, (64, 5)).astype(np.float32)
    th.manual_seed(1)
    actions, _ = policy.predict(obs)
    assert actions.shape == (64, 2) and ACTIONS.contains(actions.min(axis=0)) and ACTIONS.contains(actions.max(axis=0))
    th.manual_seed(1)
    np.testing.assert_array_equal(policy.actor.predict(obs)[0], actions)
    assert np.abs(policy.predict(obs)[0] - actions).max() > 1e-3
    state = th.get_rng_state()
    first, second = policy.predict(obs, deterministic=True)[0], policy.predict(obs, deterministic=True)[0]
    np.testing.assert_array_equal(first, second)
    assert th.equal(th.get_rng_state(), state)
    np.testing.assert_allclose(policy.predict(obs[3], deterministic=True)[0], first[3], rtol=1e-5, atol=1e-6)


def test_shared_features_extractor_is_trained_by_the_actor_only() -> None:
    space = spaces.Box(0, 255, shape=(3, 36, 36), dtype=np.uint8)
    policy = CnnPolicy(space, ACTIONS, ConstantSchedule(3e-4), share_features_extractor=True, net_arch=[8])
    assert policy.critic.features_extractor is policy.actor.features_extractor
    assert policy.cost_critic.features_extractor is policy.actor.features_extractor
    assert policy.critic_target.features_extractor is not policy.actor.features_extractor
    extractor = {id(parameter) for parameter in policy.actor.features_extractor.parameters()}
    for critic in (policy.critic, policy.cost_critic):
        optimized = {id(parameter) for group in critic.optimizer.param_groups for parameter in group["params"]}
        assert not optimized & extractor
    obs = th.randint(0, 255, (2, 3, 36, 36), dtype=th.uint8)
    assert not policy.critic.features(obs).requires_grad
    with th.no_grad():
        assert not policy.actor.extract_features(obs, policy.actor.features_extractor).requires_grad
        assert not make_policy().critic.features(th.randn(2, 5)).requires_grad


@pytest.mark.parametrize(
    "policy_class, space, kwargs",
    [
        (DiffusionPolicy, OBSERVATIONS, dict(diffusion="ddpm", denoising_steps=3, n_cost_critics=2, n_constraints=2)),
        (
            DiffusionPolicy,
            OBSERVATIONS,
            dict(net_arch=dict(pi=[8], qf=[4]), activation_fn=nn.Tanh, diffusion_kwargs=dict(sigma_max=0.5)),
        ),
        (MultiInputPolicy, spaces.Dict(a=OBSERVATIONS, b=spaces.Discrete(3)), dict(net_arch=[8])),
    ],
)
def test_policy_save_and_load(tmp_path: Path, policy_class: type[DiffusionPolicy], space: Any, kwargs: dict) -> None:
    policy = policy_class(space, ACTIONS, ConstantSchedule(3e-4), **kwargs)
    policy.save(str(tmp_path / "policy.pkl"))
    loaded = policy_class.load(str(tmp_path / "policy.pkl"))
    obs = space.sample()
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], policy.predict(obs, deterministic=True)[0])
    assert loaded.state_dict().keys() == policy.state_dict().keys()


def test_an_empty_ensemble_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one critic"):
        make_policy(n_cost_critics=0)


def test_other_forms_of_adam_stay_possible() -> None:
    policy = make_policy(net_arch=[8], optimizer_kwargs=dict(foreach=True))
    assert policy.actor.optimizer.defaults["foreach"] is True
    assert not policy.actor.optimizer.defaults["fused"]
    assert make_policy(net_arch=[8]).actor.optimizer.defaults["fused"] is True
