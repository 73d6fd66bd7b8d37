"""The policy of SAC-Lagrangian: SAC's Gaussian actor beside reward critics, cost critics and their targets."""

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.sac.policies import Actor
from torch import nn

from sb3_algd.common.policies import ConstrainedPolicy


class UncheckedGaussian(SquashedDiagGaussianDistribution):
    """
    SB3's squashed Gaussian without PyTorch's checks of its numbers.

    The checks wait for the device, three times for each batch. At a divergence they raise an error of their own, before the
    algorithm can set the weights back.
    """

    def proba_distribution(self, mean_actions: th.Tensor, log_std: th.Tensor) -> "UncheckedGaussian":
        """
        Create the distribution given its parameters.

        :param mean_actions: Means before squashing, shape (batch, action_dim)
        :param log_std: Logarithms of the standard deviations, same shape
        :return: The distribution
        """
        self.distribution = th.distributions.Normal(mean_actions, log_std.exp(), validate_args=False)
        return self


class SACLagPolicy(ConstrainedPolicy):
    """
    Policy class (squashed Gaussian actor, reward critics, cost critics and their targets) for SAC-Lagrangian.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param net_arch: The specification of the networks: a list for all (``[256, 256]`` by default),
        or ``dict(pi=[...], qf=[...])``
    :param activation_fn: Activation function of the actor and the reward critics
    :param kwargs: What the critics and all of SB3's policies take, see :class:`~sb3_algd.common.policies.ConstrainedPolicy`
    """

    actor: Actor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            observation_space, action_space, lr_schedule, [256, 256] if net_arch is None else net_arch, activation_fn, **kwargs
        )
        self._build(lr_schedule)

    def make_actor(self) -> Actor:
        """:return: SAC's actor, on the policy's device."""
        actor = Actor(**self._update_features_extractor(self.actor_kwargs))
        actor.action_dist = UncheckedGaussian(actor.action_dist.action_dim)  # type: ignore[assignment]
        return actor.to(self.device)

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Shape of the standard normal noise that one action is made of."""
        return 1, get_action_dim(self.action_space)

    def actions_from_noise(self, obs: PyTorchObs, noise: th.Tensor) -> th.Tensor:
        """See :meth:`~sb3_algd.common.policies.ConstrainedPolicy.actions_from_noise`."""
        mean, log_std, _ = self.actor.get_action_dist_params(obs)
        return th.tanh(mean.unsqueeze(1) + log_std.exp().unsqueeze(1) * noise.squeeze(2))


MlpPolicy = SACLagPolicy


class CnnPolicy(SACLagPolicy):
    """:class:`SACLagPolicy` for image observations: ``NatureCNN`` is the default features extractor."""

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *,
        features_extractor_class: type[BaseFeaturesExtractor] = NatureCNN,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            observation_space, action_space, lr_schedule, features_extractor_class=features_extractor_class, **kwargs
        )


class MultiInputPolicy(SACLagPolicy):
    """:class:`SACLagPolicy` for Dict observations: ``CombinedExtractor`` is the default features extractor."""

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *,
        features_extractor_class: type[BaseFeaturesExtractor] = CombinedExtractor,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            observation_space, action_space, lr_schedule, features_extractor_class=features_extractor_class, **kwargs
        )
