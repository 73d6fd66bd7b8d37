"""
Ensembles of critics, stored stacked: one tensor per layer with the ensemble as its first dimension, so that all members are
evaluated by one batched matrix product per layer.

An ensemble can be bound to a batch of states: the part of its first layer that depends on the state is then computed once for
all actions.
"""

import math
from itertools import pairwise
from typing import Any

import torch as th
import torch.nn.functional as F
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_algd.common.fused import FusedCritic, activate


def _xavier_uniform(weight: th.Tensor) -> None:
    """Xavier-uniform initialisation of stacked weights (E, fan_in, fan_out)."""
    bound = math.sqrt(6.0 / (weight.shape[1] + weight.shape[2]))
    nn.init.uniform_(weight, -bound, bound)


def _narrow_normal(weight: th.Tensor) -> None:
    """Normal initialisation of stacked weights (E, fan_in, fan_out), std 1 / (2 sqrt(fan_in)): nearly equal cost estimates."""
    nn.init.normal_(weight, std=0.5 / math.sqrt(weight.shape[1]))


class EnsembleCritic(BaseModel):
    """
    Ensemble of action-value functions, each with one or several outputs, stacked for speed.

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: Hidden layers
    :param features_extractor: Network to extract features
    :param features_dim: Number of features
    :param activation_fn: Activation function
    :param normalize_images: Whether to normalize images or not, dividing by 255.0 (True by default)
    :param n_critics: Number of members E
    :param n_outputs: Number of outputs of each member
    :param layer_norm: Whether each hidden layer is normalised before its activation function (without affine part)
    :param narrow_init: Whether weights start from a narrow normal distribution (cost critics) instead of Xavier-uniform
    :param share_features_extractor: Whether the features extractor is the actor's; then it is not trained by the critic
    """

    features_extractor: BaseFeaturesExtractor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        n_critics: int = 2,
        n_outputs: int = 1,
        layer_norm: bool = False,
        narrow_init: bool = False,
        share_features_extractor: bool = False,
    ) -> None:
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        if n_critics < 1:
            raise ValueError(f"An ensemble needs at least one critic, got {n_critics}.")
        self.n_critics = n_critics
        self.features_dim = features_dim
        self.share_features_extractor = share_features_extractor
        activation: Any = activation_fn()
        if hasattr(activation, "inplace"):
            # What it was given is needed for the gradient
            activation.inplace = False
        self.activation: nn.Module = activation
        self.layer_norm = layer_norm
        # Saved with the weights, because layers without parameters leave no other trace
        self.register_buffer("has_layer_norm", th.tensor(layer_norm))
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        widths = [features_dim + get_action_dim(action_space), *net_arch, n_outputs]
        for fan_in, fan_out in pairwise(widths):
            weight = nn.Parameter(th.empty(n_critics, fan_in, fan_out))
            (_narrow_normal if narrow_init else _xavier_uniform)(weight)
            self.weights.append(weight)
            self.biases.append(nn.Parameter(th.zeros(n_critics, 1, fan_out)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.setdefault(f"{prefix}has_layer_norm", self.has_layer_norm)
        if bool(saved) != self.layer_norm:
            raise ValueError(f"`policy_kwargs` must have layer_norm={bool(saved)}, with which these critics have learned.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    @th.no_grad()
    def rescale(self, factor: th.Tensor) -> None:
        """:param factor: What all values are multiplied by from now on, shape (n_outputs,)."""
        self.weights[-1].mul_(factor)
        self.biases[-1].mul_(factor)

    def features(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: Observations
        :return: Features, shape (batch, features_dim), without gradient if the extractor is shared with the actor
        """
        # Never re-enable gradients inside a caller's no_grad()
        with th.set_grad_enabled(th.is_grad_enabled() and not self.share_features_extractor):
            return self.extract_features(obs, self.features_extractor)

    def bind(self, features: th.Tensor) -> "BoundCritic | FusedCritic":
        """
        :param features: Features of states, shape (batch, features_dim).
        :return: The ensemble for these states.
        """
        if th.compiler.is_dynamo_compiling() and len(self.weights) > 1:
            return FusedCritic(list(self.weights), list(self.biases), self.activation, self.layer_norm, features)
        return BoundCritic(self, features)

    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        :param obs: Observations
        :param actions: Shape (batch, action_dim)
        :return: Values, shape (E, batch, n_outputs)
        """
        inputs = th.cat([self.features(obs), actions], dim=1)
        hidden = th.baddbmm(self.biases[0], inputs.expand(self.n_critics, -1, -1), self.weights[0])
        for depth in range(1, len(self.weights)):
            hidden = self.layer(depth, hidden)
        # Single precision also under autocast
        return hidden.float()

    def layer(self, depth: int, hidden: th.Tensor) -> th.Tensor:
        """
        One of the layers after the first.

        :param depth: Index of the layer, from 1.
        :param hidden: What the layer before it gives, before the activation function, shape (E, rows, fan_in).
        :return: The same of this layer, shape (E, rows, fan_out).
        """
        if th.compiler.is_dynamo_compiling():
            hidden = activate(hidden, self.activation, self.layer_norm)
        else:
            hidden = self.activation(F.layer_norm(hidden, hidden.shape[-1:]) if self.layer_norm else hidden)
        weight, bias = self.weights[depth], self.biases[depth]
        if weight.shape[2] == 1:
            # On CPUs, a batched matrix product with one column takes six times as long
            return (hidden * weight.transpose(1, 2)).sum(dim=2, keepdim=True) + bias
        return th.baddbmm(bias, hidden, weight)


class BoundCritic:
    """
    An :class:`EnsembleCritic` bound to a batch of states.

    The part of the first layer that depends on the state is computed once here and shared by all actions in these states.

    :param critic: The ensemble.
    :param features: Features of the states, shape (batch, features_dim).
    """

    def __init__(self, critic: EnsembleCritic, features: th.Tensor) -> None:
        first = critic.weights[0]
        state_weight, self._action_weight = first.split([critic.features_dim, first.shape[1] - critic.features_dim], dim=1)
        self._critic = critic
        self._from_state = th.baddbmm(critic.biases[0], features.expand(critic.n_critics, -1, -1), state_weight).unsqueeze(1)

    def values(self, actions: th.Tensor) -> th.Tensor:
        """
        :param actions: One or several actions per state, shape (..., batch, action_dim).
        :return: Values, shape (E, ..., batch, n_outputs), in single precision also under autocast.
        """
        critic, shape = self._critic, actions.shape[:-1]
        # What each layer gives, before the activation function, shape (E, rows, width)
        from_action = th.bmm(actions.flatten(0, -2).expand(critic.n_critics, -1, -1), self._action_weight)
        self._hidden = [from_action.unflatten(1, (-1, shape[-1])).add_(self._from_state).flatten(1, 2)]
        for depth in range(1, len(critic.weights)):
            self._hidden.append(critic.layer(depth, self._hidden[-1]))
        return self._hidden[-1].float().view(critic.n_critics, *shape, -1)

    def action_gradient(self, values_gradient: th.Tensor) -> th.Tensor:
        """
        Backward pass through the last :meth:`values` down to its actions, by hand: a third of autograd's operations.

        :param values_gradient: Gradient with respect to the values, shape (E, ..., batch, n_outputs).
        :return: Gradient with respect to the actions, shape (..., batch, action_dim).
        """
        shape = values_gradient.shape[1:-1]
        gradient = values_gradient.flatten(1, -2)
        if not skips_rows(gradient.device) or th.compiler.is_compiling() or (needed := gradient.any(dim=2)).all():
            return self._backward(gradient, self._hidden, slice(None)).sum(dim=0).view(*shape, -1)
        # A constraint is active for all cost critics alike, while a reward has its minimum at one of the critics
        alike = (needed == needed[0]).all()
        parts = [slice(None)] if alike else [slice(member, member + 1) for member in range(len(needed))]
        total = gradient.new_zeros(gradient.shape[1], self._action_weight.shape[1])
        for members in parts:
            rows = needed[members][0].nonzero().squeeze(1)
            if len(rows) > 0:
                hidden = [hidden[members].index_select(1, rows) for hidden in self._hidden[:-1]]
                total.index_add_(0, rows, self._backward(gradient[members].index_select(1, rows), hidden, members).sum(dim=0))
        return total.view(*shape, -1)

    def _backward(self, gradient: th.Tensor, hidden: list[th.Tensor], members: slice) -> th.Tensor:
        """
        :param gradient: Gradient with respect to the values of some members and rows, shape (members, rows, n_outputs).
        :param hidden: What each layer gave for them, before the activation function, shape (members, rows, width).
        :param members: Which members they are.
        :return: Gradient with respect to the actions, shape (members, rows, action_dim).
        """
        for depth in reversed(range(1, len(self._critic.weights))):
            weight = self._critic.weights[depth][members].transpose(1, 2)
            gradient = gradient * weight if weight.shape[1] == 1 else th.bmm(gradient, weight)
            gradient = _before_activation(self._critic, hidden[depth - 1], gradient.to(hidden[depth - 1].dtype))
        return th.bmm(gradient, self._action_weight[members].transpose(1, 2)).float()


def skips_rows(device: th.device) -> bool:
    """
    Whether the critics' backward pass leaves out the rows whose gradient is zero: those where another reward critic has the
    minimum, and for the cost critics those where the constraint is not active.

    :param device: Device of the gradient.
    :return: True on CPUs; accelerators would have to be waited for to learn which rows these are.
    """
    return device.type == "cpu"


def _before_activation(critic: EnsembleCritic, hidden: th.Tensor, gradient: th.Tensor) -> th.Tensor:
    """
    Backward pass through the activation function of a hidden layer, and its normalisation where there is one.

    :param critic: The ensemble.
    :param hidden: What the layer gave.
    :param gradient: Gradient with respect to what the activation function returned.
    :return: Gradient with respect to what the layer gave.
    """
    if not critic.layer_norm:
        return _through_activation(critic.activation, hidden, gradient)
    shape = hidden.shape[-1:]
    normal, mean, scale = th.native_layer_norm(hidden, shape, None, None, 1e-5)
    gradient = _through_activation(critic.activation, normal, gradient)
    return th.ops.aten.native_layer_norm_backward(gradient, hidden, shape, mean, scale, None, None, [True, False, False])[0]


def _through_activation(activation: nn.Module, hidden: th.Tensor, gradient: th.Tensor) -> th.Tensor:
    # What autograd calls for the two default ones, without its bookkeeping
    if type(activation) is nn.ReLU:
        return th.ops.aten.threshold_backward(gradient, hidden, 0)
    if type(activation) is nn.SiLU:
        return th.ops.aten.silu_backward(gradient, hidden)
    return th.func.vjp(activation, hidden)[1](gradient)[0]
