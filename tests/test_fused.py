"""The arithmetic of compiled updates, run eagerly, against the readable form of the same."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from sb3_algd.common.critics import BoundCritic, EnsembleCritic
from sb3_algd.common.fused import FusedCritic, activate


def make_critic(
    action_dim: int = 2,
    n_outputs: int = 1,
    net_arch: tuple[int, ...] = (16, 8),
    activation_fn: type[nn.Module] = nn.SiLU,
    layer_norm: bool = True,
) -> EnsembleCritic:
    th.manual_seed(0)
    space = spaces.Box(-1.0, 1.0, (5,), np.float32)
    critic = EnsembleCritic(
        space,
        spaces.Box(-1.0, 1.0, (action_dim,), np.float32),
        list(net_arch),
        FlattenExtractor(space),
        5,
        activation_fn,
        n_critics=3,
        n_outputs=n_outputs,
        layer_norm=layer_norm,
    )
    for bias in critic.biases:
        nn.init.normal_(bias)
    return critic


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("activation_fn", [nn.ReLU, nn.SiLU, nn.Tanh])
@pytest.mark.parametrize(("action_dim", "n_outputs", "net_arch"), [(2, 1, (16, 8)), (7, 1, (16,)), (2, 3, (8, 8, 8))])
def test_values_and_gradients_are_those_of_the_eager_critic(
    layer_norm: bool, activation_fn: type[nn.Module], action_dim: int, n_outputs: int, net_arch: tuple[int, ...]
) -> None:
    critic = make_critic(action_dim, n_outputs, net_arch, activation_fn, layer_norm)
    features, actions = th.randn(10, 5), th.randn(4, 10, action_dim)
    slope = th.randn(3, 4, 10, n_outputs)
    with th.no_grad():
        expected = BoundCritic(critic, features)
        found = FusedCritic(list(critic.weights), list(critic.biases), critic.activation, layer_norm, features)
        th.testing.assert_close(found.values(actions), expected.values(actions), rtol=1e-4, atol=1e-5)
        th.testing.assert_close(found.action_gradient(slope), expected.action_gradient(slope), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("activation_fn", [nn.ReLU, nn.SiLU, nn.Tanh])
def test_a_hidden_layer_has_the_gradient_of_the_eager_one(layer_norm: bool, activation_fn: type[nn.Module]) -> None:
    critic = make_critic(activation_fn=activation_fn, layer_norm=layer_norm)
    hidden = th.randn(3, 10, 16, requires_grad=True)
    outputs = [activate(hidden, critic.activation, layer_norm)]
    outputs.append(critic.activation(nn.functional.layer_norm(hidden, (16,)) if layer_norm else hidden))
    gradient = th.randn(3, 10, 16)
    found, expected = (th.autograd.grad(output, hidden, gradient)[0] for output in outputs)
    th.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    th.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
