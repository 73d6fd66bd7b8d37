"""
The denoising network of the actor.

It can be bound to a batch of states: the part of its first layer that depends on the state is then computed once for all
denoising steps.
"""

from typing import Any

import torch as th
import torch.nn.functional as F
from stable_baselines3.common.torch_layers import create_mlp
from torch import nn

# Width of the learned embedding of the denoising step
STEP_EMBEDDING_DIM = 16


class BoundDenoiser:
    """
    A :class:`DenoisingNetwork` bound to a batch of states.

    The part of the first layer that depends on the state is computed once here and shared by all denoising steps.

    :param network: The network.
    :param features: Features of the states, shape (batch, features_dim).
    """

    def __init__(self, network: "DenoisingNetwork", features: th.Tensor) -> None:
        layers: list[Any] = list(network.mlp)
        first = layers[0]
        state_weight, action_weight, step_weight = first.weight.split(
            [network.features_dim, network.action_dim, STEP_EMBEDDING_DIM], dim=1
        )
        self._action_dim = network.action_dim
        # Activation function, weight and bias of each further layer: calls of the layers themselves take longer
        self._tail: list[tuple[Any, Any, Any]] = [
            (activation, layer.weight, layer.bias) for activation, layer in zip(layers[1::2], layers[2::2], strict=True)
        ]
        self._action_weight = action_weight.t()
        #: Number of states
        self.batch_size = features.shape[0]
        self._from_state = F.linear(features, state_weight, first.bias)
        self._from_step = F.linear(network.step_embedding.weight, step_weight)
        # With a noise head, each step looks at two inputs in the same state
        self._predicts_noise = network.predict_noise
        rows = self._from_state.repeat(2, 1) if self._predicts_noise else self._from_state
        self._from_state_and_steps = (self._from_step.unsqueeze(1) + rows).unbind()

    def _output(self, action: th.Tensor, step: int | th.Tensor) -> th.Tensor:
        several = isinstance(step, th.Tensor)
        base = self._from_state + self._from_step[step] if several else self._from_state_and_steps[step]
        hidden = th.addmm(base, action, self._action_weight)
        for activation, weight, bias in self._tail:
            hidden = F.linear(activation(hidden), weight, bias)
        # Single precision also under autocast
        return hidden.float()

    def score(self, action: th.Tensor, step: int | th.Tensor) -> th.Tensor:
        """
        :param action: Squashed action, shape (batch, action_dim).
        :param step: Index of the denoising step, one for all or one per row, shape (batch,).
        :return: Score phi(s, a, k), shape (batch, action_dim).
        """
        if not self._predicts_noise:
            return self._output(action, step)
        if not isinstance(step, th.Tensor):
            return self.score_and_noise(action, action, step)[0]
        return self._output(action, step).narrow(1, 0, self._action_dim)

    def score_and_noise(self, action: th.Tensor, latent: th.Tensor, step: int) -> tuple[th.Tensor, th.Tensor]:
        """
        :param action: Squashed action, where the score is wanted, shape (batch, action_dim).
        :param latent: Latent, where the noise prediction is wanted, shape (batch, action_dim).
        :param step: Index of the denoising step.
        :return: Score phi(s, a, k) and noise eps(s, x, k), each of shape (batch, action_dim).
        """
        # Both heads share the trunk but look at different inputs: one pass over both
        at_action, at_latent = self._output(th.cat([action, latent]), step).unflatten(0, (2, -1)).unbind()
        return at_action.narrow(1, 0, self._action_dim), at_latent.narrow(1, self._action_dim, self._action_dim)


class DenoisingNetwork(nn.Module):
    """
    Score network phi(s, a, k) and, as a second head on the same trunk, noise predictor eps(s, x, k).

    Input: features of the state, action, learned embedding of the step. Xavier-uniform weights, zero bias.

    :param features_dim: Number of features of a state.
    :param action_dim: Number of action dimensions.
    :param denoising_steps: Number of steps K.
    :param net_arch: Hidden layers.
    :param activation_fn: Activation function.
    :param predict_noise: Whether there is a noise head.
    """

    def __init__(
        self,
        features_dim: int,
        action_dim: int,
        denoising_steps: int,
        net_arch: list[int],
        activation_fn: type[nn.Module],
        predict_noise: bool,
    ) -> None:
        super().__init__()
        self.features_dim = features_dim
        self.action_dim = action_dim
        self.predict_noise = predict_noise
        self.step_embedding = nn.Embedding(denoising_steps, STEP_EMBEDDING_DIM)
        n_heads = 2 if predict_noise else 1
        input_dim = features_dim + action_dim + STEP_EMBEDDING_DIM
        self.mlp = nn.Sequential(*create_mlp(input_dim, n_heads * action_dim, net_arch, activation_fn))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                # The heads are initialised one by one: each has the fan-out of its own
                for rows in layer.weight.split(action_dim) if layer is self.mlp[-1] else [layer.weight]:
                    nn.init.xavier_uniform_(rows)
                nn.init.zeros_(layer.bias)

    def bind(self, features: th.Tensor) -> BoundDenoiser:
        """
        :param features: Features of the states, shape (batch, features_dim).
        :return: The network for these states.
        """
        return BoundDenoiser(self, features)
