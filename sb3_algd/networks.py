"""
The networks of ALGD: the denoising network of the actor, and ensembles of critics.

Both can be bound to a batch of states, which computes the part of their first layer that depends on the state once for all
actions.
Critic ensembles are stored stacked, one tensor per layer with the ensemble as its first dimension, so that all members are
evaluated by one batched matrix product per layer.
"""

import math
from itertools import pairwise

import torch as th
import torch.nn.functional as F
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs
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
        first = network.mlp[0]
        assert isinstance(first, nn.Linear)
        state_weight, action_weight, step_weight = first.weight.split(
            [network.features_dim, network.action_dim, STEP_EMBEDDING_DIM], dim=1
        )
        self._action_dim = network.action_dim
        self._tail = list(network.mlp)[1:]
        self._action_weight = action_weight
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
        return self._finish(th.addmm(base, action, self._action_weight.t()))

    def _finish(self, hidden: th.Tensor) -> th.Tensor:
        for layer in self._tail:
            hidden = layer(hidden)
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
        at_action, at_latent = self._output(th.cat([action, latent]), step).chunk(2)
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
        self.activation = activation_fn()
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        widths = [features_dim + get_action_dim(action_space), *net_arch, n_outputs]
        for fan_in, fan_out in pairwise(widths):
            weight = nn.Parameter(th.empty(n_critics, fan_in, fan_out))
            (_narrow_normal if narrow_init else _xavier_uniform)(weight)
            self.weights.append(weight)
            self.biases.append(nn.Parameter(th.zeros(n_critics, 1, fan_out)))

    def features(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: Observations
        :return: Features, shape (batch, features_dim), without gradient if the extractor is shared with the actor
        """
        # Never re-enable gradients inside a caller's no_grad()
        with th.set_grad_enabled(th.is_grad_enabled() and not self.share_features_extractor):
            return self.extract_features(obs, self.features_extractor)

    def bind(self, features: th.Tensor) -> "BoundCritic":
        """
        :param features: Features of states, shape (batch, features_dim).
        :return: The ensemble for these states.
        """
        return BoundCritic(self, features)

    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        :param obs: Observations
        :param actions: Shape (batch, action_dim)
        :return: Values, shape (E, batch, n_outputs)
        """
        inputs = th.cat([self.features(obs), actions], dim=1)
        if computes_stacked(inputs.device):
            hidden = th.baddbmm(self.biases[0], inputs.expand(self.n_critics, -1, -1), self.weights[0])
            return self.finish_stacked(hidden)
        first = zip(self.biases[0].unbind(), self.weights[0].unbind(), strict=True)
        return self.finish_one_by_one([th.addmm(bias, inputs, weight) for bias, weight in first])

    def finish_stacked(self, hidden: th.Tensor) -> th.Tensor:
        """
        :param hidden: What the first layer gives, before its activation, shape (E, rows, width).
        :return: Values, shape (E, rows, n_outputs), in single precision also under autocast.
        """
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            hidden = th.baddbmm(bias, self.activation(hidden), weight)
        return hidden.float()

    def finish_one_by_one(self, hidden: list[th.Tensor]) -> th.Tensor:
        """
        :param hidden: The same for each member, E tensors of shape (rows, width).
        :return: Values, shape (E, rows, n_outputs), in single precision also under autocast.
        """
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            members = zip(bias.unbind(), hidden, weight.unbind(), strict=True)
            hidden = [th.addmm(b, self.activation(h), w) for b, h, w in members]
        return th.stack(hidden).float()


def computes_stacked(device: th.device) -> bool:
    """
    Whether all members of an ensemble are computed by one batched product per layer, else one after the other.

    The results are the same. Stacked saves kernel launches on an accelerator; on a CPU a batched product runs at two thirds of
    the speed of plain ones.

    :param device: Device of the ensemble.
    :return: True on accelerators.
    """
    return device.type != "cpu"


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
        self._stacked = computes_stacked(features.device)
        if self._stacked:
            from_state = th.baddbmm(critic.biases[0], features.expand(critic.n_critics, -1, -1), state_weight)
            self._from_state = from_state.unsqueeze(1)
        else:
            members = zip(critic.biases[0].unbind(), state_weight.unbind(), strict=True)
            self._members_from_state = [th.addmm(bias, features, weight) for bias, weight in members]

    def values(self, actions: th.Tensor) -> th.Tensor:
        """
        :param actions: One or several actions per state, shape (..., batch, action_dim).
        :return: Values, shape (E, ..., batch, n_outputs).
        """
        critic, shape = self._critic, actions.shape[:-1]
        rows, batch_size = actions.flatten(0, -2), actions.shape[-2]
        if self._stacked:
            from_action = th.bmm(rows.expand(critic.n_critics, -1, -1), self._action_weight)
            hidden = from_action.unflatten(1, (-1, batch_size)) + self._from_state
            values = critic.finish_stacked(hidden.flatten(1, 2))
        else:
            members = zip(self._members_from_state, self._action_weight.unbind(), strict=True)
            values = critic.finish_one_by_one(
                [(th.mm(rows, weight).unflatten(0, (-1, batch_size)) + state).flatten(0, 1) for state, weight in members]
            )
        return values.view(critic.n_critics, *shape, -1)
