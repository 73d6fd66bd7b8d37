"""
The arithmetic of the critics in the form that inductor makes fast code of, for compiled updates.

Each hidden layer of the critics becomes one loop between two matrix products, in which a row stays in the processor's nearest
cache. The eager form in :mod:`sb3_algd.common.critics` is the reference.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch as th
from torch import nn

#: What ``torch.nn.functional.layer_norm`` adds to the variance
EPSILON = 1e-5
#: Actions of up to so many dimensions are multiplied in the loop of the first layer, instead of by a product of its own
NARROW = 4


class Hidden(NamedTuple):
    """A hidden layer, each of shape (E, rows, width) but for the scale, (E, rows, 1)."""

    #: What the next layer gets
    output: th.Tensor
    #: Slope of the activation function
    slope: th.Tensor
    #: What the activation function was given, and by what it was multiplied to normalise it, None without normalisation
    normal: th.Tensor
    scale: th.Tensor | None

    def input_gradient(self, gradient: th.Tensor) -> th.Tensor:
        """
        :param gradient: Gradient with respect to the output.
        :return: Gradient with respect to what the layer was given.
        """
        gradient = gradient.float() * self.slope
        if self.scale is None:
            return gradient
        along = (gradient * self.normal).mean(dim=-1, keepdim=True)
        return (gradient - gradient.mean(dim=-1, keepdim=True) - self.normal * along) * self.scale


def in_memory(tensor: th.Tensor) -> th.Tensor:
    """
    :param tensor: A tensor.
    :return: The same. Inductor computes it once and stores it, where it would compute it anew in each loop that needs it.
    """
    return tensor.as_strided(tensor.shape, tensor.stride())


def hidden_layer(hidden: th.Tensor, activation: nn.Module, normalise: bool, dtype: th.dtype) -> Hidden:
    """
    :param hidden: What the layer's matrix product gave, with the bias, shape (E, rows, width).
    :param activation: Activation function.
    :param normalise: Whether there is a layer normalisation before it.
    :param dtype: Data type of the matrix products.
    :return: The hidden layer.
    """
    normal, scale = hidden.float(), None
    if normalise:
        normal = normal - normal.mean(dim=-1, keepdim=True)
        scale = (normal.square().mean(dim=-1, keepdim=True) + EPSILON).rsqrt()
        normal = normal * scale
    if type(activation) is nn.ReLU:
        return Hidden(normal.relu().to(dtype), (normal > 0).float(), normal, scale)
    if type(activation) is nn.SiLU:
        sigmoid = normal.sigmoid()
        output = normal * sigmoid
        slope = sigmoid + output * (1.0 - sigmoid)
    else:
        output, pull_back = th.func.vjp(activation, normal)[:2]
        slope = pull_back(th.ones_like(normal))[0]
    # An exponential is dear, memory less so
    return Hidden(output.to(dtype), in_memory(slope.to(dtype)), normal, scale)


class _Activate(th.autograd.Function):
    """A hidden layer with its backward pass by hand: autograd's would keep and read the same in single precision."""

    @staticmethod
    def forward(ctx: Any, hidden: th.Tensor, activation: nn.Module, normalise: bool) -> th.Tensor:
        """See :func:`activate`."""
        layer = hidden_layer(hidden, activation, normalise, hidden.dtype)
        ctx.dtype, ctx.normalise = hidden.dtype, normalise
        kept = (layer.slope, layer.normal) if layer.scale is None else (layer.slope, layer.normal, layer.scale)
        ctx.save_for_backward(*kept)
        return layer.output

    @staticmethod
    def backward(ctx: Any, gradient: th.Tensor) -> tuple[th.Tensor, None, None]:
        """:return: Gradient with respect to what the layer was given."""
        slope, normal, *scale = ctx.saved_tensors
        layer = Hidden(normal, slope, normal, scale[0] if scale else None)
        return layer.input_gradient(gradient).to(ctx.dtype), None, None


def activate(hidden: th.Tensor, activation: nn.Module, normalise: bool) -> th.Tensor:
    """
    :param hidden: What the layer's matrix product gave, with the bias, shape (E, rows, width).
    :param activation: Activation function.
    :param normalise: Whether there is a layer normalisation before it.
    :return: What the next layer gets.
    """
    return _Activate.apply(hidden, activation, normalise)


class FusedCritic:
    """
    An ensemble bound to a batch of states, see :class:`~sb3_algd.common.critics.BoundCritic`.

    With one output, the gradient with respect to the actions is known up to a factor per row before the energy is, and is
    computed in the same loops as the values.

    :param weights: Weights of each layer, shape (E, fan_in, fan_out); at least two layers.
    :param biases: Biases of each layer, shape (E, 1, fan_out).
    :param activation: Activation function.
    :param normalise: Whether the hidden layers are normalised.
    :param features: Features of the states, shape (batch, features_dim).
    """

    def __init__(
        self,
        weights: Sequence[th.Tensor],
        biases: Sequence[th.Tensor],
        activation: nn.Module,
        normalise: bool,
        features: th.Tensor,
    ) -> None:
        self._activation, self._normalise = activation, normalise
        n_features = features.shape[1]
        state_weight, self._action_weight = weights[0].split([n_features, weights[0].shape[1] - n_features], dim=1)
        self._from_state = th.baddbmm(biases[0], features.expand(len(weights[0]), -1, -1), state_weight)
        #: Of the matrix products, also under autocast
        self._dtype = self._from_state.dtype
        self._biases = biases[1:]
        # Converted once for both directions
        self._weights = [weight.to(self._dtype) for weight in weights[1:-1]]
        self._last_weight = weights[-1]
        self._layers: list[Hidden] = []
        self._slope: th.Tensor | None = None

    def values(self, actions: th.Tensor) -> th.Tensor:
        """
        :param actions: One or several actions per state, shape (..., batch, action_dim).
        :return: Values, shape (E, ..., batch, n_outputs), in single precision.
        """
        hidden = self._first_layer(actions.reshape(-1, *actions.shape[-2:]))
        self._layers = [hidden_layer(hidden, self._activation, self._normalise, self._dtype)]
        for weight, bias in zip(self._weights, self._biases[:-1], strict=True):
            hidden = th.bmm(self._layers[-1].output, weight).float() + bias
            self._layers.append(hidden_layer(hidden, self._activation, self._normalise, self._dtype))
        if self._last_weight.shape[2] == 1:
            row = self._last_weight.transpose(1, 2)
            values = (self._layers[-1].output * row).sum(dim=2, keepdim=True) + self._biases[-1]
            self._slope = self._pull_back(row)
        else:
            values = th.baddbmm(self._biases[-1], self._layers[-1].output, self._last_weight).float()
        return values.view(len(values), *actions.shape[:-1], -1)

    def action_gradient(self, values_gradient: th.Tensor) -> th.Tensor:
        """
        Backward pass through the last :meth:`values` down to its actions.

        :param values_gradient: Gradient with respect to the values, shape (E, ..., batch, n_outputs).
        :return: Gradient with respect to the actions, shape (..., batch, action_dim).
        """
        gradient = values_gradient.flatten(1, -2)
        if self._slope is not None:
            gradient = gradient * self._slope
        else:
            gradient = self._pull_back(th.bmm(gradient, self._last_weight.transpose(1, 2)))
        return gradient.sum(dim=0).view(*values_gradient.shape[1:-1], -1)

    def _first_layer(self, actions: th.Tensor) -> th.Tensor:
        n_critics, action_dim, width = self._action_weight.shape
        from_state = self._from_state.unsqueeze(1).float()
        if action_dim <= NARROW:
            weight = self._action_weight.view(n_critics, 1, 1, action_dim, width)
            hidden = sum((actions[..., i, None] * weight[..., i, :] for i in range(action_dim)), from_state)
            return in_memory(hidden.flatten(1, 2).to(self._dtype))
        from_action = th.bmm(actions.flatten(0, 1).expand(n_critics, -1, -1), self._action_weight)
        return (from_state + from_action.unflatten(1, (-1, actions.shape[1]))).flatten(1, 2)

    def _pull_back(self, gradient: th.Tensor) -> th.Tensor:
        """
        :param gradient: Gradient with respect to the output of the last hidden layer, shape (E, rows or 1, width).
        :return: Gradient with respect to the actions, shape (E, rows, action_dim).
        """
        gradient = self._layers[-1].input_gradient(gradient)
        for weight, layer in zip(reversed(self._weights), reversed(self._layers[:-1]), strict=True):
            gradient = layer.input_gradient(th.bmm(gradient.to(self._dtype), weight.transpose(1, 2)))
        return th.bmm(gradient.to(self._dtype), self._action_weight.to(self._dtype).transpose(1, 2)).float()
