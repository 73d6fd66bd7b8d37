"""Ensembles of critics, and their gradients by hand."""

from functools import partial
from typing import Any

import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_algd.common.critics import EnsembleCritic


def make_critic(n_outputs: int, activation_fn: Any = th.nn.SiLU, net_arch: tuple[int, ...] = (8, 8)) -> EnsembleCritic:
    obs_space, action_space = spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,))
    extractor = FlattenExtractor(obs_space)
    return EnsembleCritic(
        obs_space, action_space, list(net_arch), extractor, 3, activation_fn, n_critics=3, n_outputs=n_outputs
    )


@pytest.mark.parametrize("n_outputs", [1, 3])
@pytest.mark.parametrize("net_arch", [(), (8,), (8, 8), (8, 4, 8)])
@pytest.mark.parametrize("activation_fn", [th.nn.ReLU, th.nn.SiLU, th.nn.Tanh, th.nn.PReLU, partial(th.nn.ELU, inplace=True)])
@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("members_alike", [True, False])
def test_the_gradient_by_hand_is_autograds(
    n_outputs: int,
    net_arch: tuple[int, ...],
    activation_fn: Any,
    skips: bool,
    members_alike: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sb3_algd.common.critics.skips_rows", lambda device: skips)
    critic = make_critic(n_outputs, activation_fn, net_arch)
    features, actions = th.randn(7, 3), th.randn(4, 7, 2, requires_grad=True)
    weights = th.randn(3, 4, 7, n_outputs)
    some = th.rand(4, 7) < 0.5
    if members_alike:
        weights[:, some] = 0.0
    else:
        # All rows of one member, some of another, none of the third
        weights[1, some] = 0.0
        weights[2] = 0.0
    one_by_one = th.stack([critic(features, action) for action in actions], dim=1)
    (expected,) = th.autograd.grad((weights * one_by_one).sum(), actions)
    with th.no_grad():
        bound = critic.bind(features)
        th.testing.assert_close(bound.values(actions), one_by_one)
        gradient = bound.action_gradient(weights)
    th.testing.assert_close(gradient, expected)
    assert all(parameter.grad is None for parameter in critic.parameters())


def test_several_actions_per_state_meet_their_own_state() -> None:
    critic = make_critic(1)
    obs, actions = th.randn(7, 3), th.randn(4, 7, 2)
    several = critic.bind(obs).values(actions)
    for index in range(4):
        th.testing.assert_close(several[:, index], critic(obs, actions[index]))
