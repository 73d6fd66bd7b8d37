"""The policy of ALGD: a diffusion actor beside reward critics, cost critics and their targets."""

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_algd.algd.diffusion import make_process
from sb3_algd.algd.networks import BoundDenoiser, DenoisingNetwork
from sb3_algd.common.policies import ConstrainedPolicy


class DiffusionActor(BasePolicy):
    """
    Actor that samples actions by denoising.

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: Hidden layers of the denoising network
    :param features_extractor: Network to extract features
    :param features_dim: Number of features
    :param activation_fn: Activation function
    :param normalize_images: Whether to normalize images or not, dividing by 255.0 (True by default)
    :param diffusion: Reverse process, ``"ve"``, ``"ve-ancestral"`` or ``"ddpm"``
    :param denoising_steps: Number of denoising steps K
    :param diffusion_kwargs: Constants of the process's noise schedule
    """

    action_space: spaces.Box
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
        diffusion: str = "ve",
        denoising_steps: int = 5,
        diffusion_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor=features_extractor,
            normalize_images=normalize_images,
            squash_output=True,
        )
        # Save arguments to re-create object at loading
        self.net_arch = net_arch
        self.features_dim = features_dim
        self.activation_fn = activation_fn
        self.diffusion = diffusion
        self.denoising_steps = denoising_steps
        self.diffusion_kwargs = diffusion_kwargs

        self.action_dim = get_action_dim(action_space)
        self.process = make_process(diffusion, denoising_steps, **(diffusion_kwargs or {}))
        self.network = DenoisingNetwork(
            features_dim, self.action_dim, denoising_steps, net_arch, activation_fn, self.process.predicts_noise
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            dict(
                net_arch=self.net_arch,
                features_dim=self.features_dim,
                activation_fn=self.activation_fn,
                features_extractor=self.features_extractor,
                diffusion=self.diffusion,
                denoising_steps=self.denoising_steps,
                diffusion_kwargs=self.diffusion_kwargs,
            )
        )
        return data

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        has_policy = any(name.startswith(f"{prefix}network.") for name in state_dict)
        ancestral = f"{prefix}process.ancestral" in state_dict
        # The same weights make other actions in the other process
        if has_policy and ancestral != hasattr(self.process, "ancestral"):
            names = ("'ve-ancestral'",) if ancestral else ("'ve'", "'ddpm'")
            raise ValueError(f"`policy_kwargs` must have diffusion={' or '.join(names)}, with which this policy has learned.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def denoise(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[BoundDenoiser, list[th.Tensor]]:
        """
        Run the reverse process for a batch of observations.

        :param obs: Observations
        :param deterministic: Whether to leave out all noise
        :return: The network bound to the observations, and the K + 1 latents from first to last,
            each of shape (batch, action_dim); the action is the tanh of the last one.
        """
        denoiser = self.network.bind(self.extract_features(obs, self.features_extractor))
        latents = self.process.denoise(denoiser, (denoiser.batch_size, self.action_dim), deterministic)
        return denoiser, latents

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        :param obs: Observations
        :param deterministic: Whether to leave out all noise
        :return: Actions in [-1, 1], shape (batch, action_dim)
        """
        _, latents = self.denoise(obs, deterministic)
        return th.tanh(latents[-1])

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self(observation, deterministic)


class DiffusionPolicy(ConstrainedPolicy):
    """
    Policy class (diffusion actor, reward critics, cost critics and their targets) for ALGD.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param net_arch: The specification of the networks: a list for all, or ``dict(pi=[...], qf=[...])``
        (``[128, 128, 128]`` for the actor and ``[256, 256]`` for reward and cost critics by default, the paper's)
    :param activation_fn: Activation function of the actor and the reward critics, one without randomness of its own
    :param diffusion: Reverse process: ``"ve"`` (variance exploding), ``"ve-ancestral"`` (less noise) or ``"ddpm"``
    :param denoising_steps: Number of denoising steps K
    :param diffusion_kwargs: Constants of the noise schedule, see :class:`~sb3_algd.algd.diffusion.VESDE`
        (both types) and :class:`~sb3_algd.algd.diffusion.DDPM`
    :param kwargs: What the critics and all of SB3's policies take, see :class:`~sb3_algd.common.policies.ConstrainedPolicy`:
        ``n_cost_critics``, ``cost_activation_fn``, ``layer_norm``, ``n_critics``, ``features_extractor_class``,
        ``features_extractor_kwargs``, ``normalize_images``, ``optimizer_class``, ``optimizer_kwargs``,
        ``share_features_extractor``, ``n_candidates``
    """

    actor: DiffusionActor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.ReLU,
        diffusion: str = "ve",
        denoising_steps: int = 5,
        diffusion_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if net_arch is None:
            net_arch = dict(pi=[128, 128, 128], qf=[256, 256])
        super().__init__(observation_space, action_space, lr_schedule, net_arch, activation_fn, **kwargs)
        self.diffusion_args = dict(diffusion=diffusion, denoising_steps=denoising_steps, diffusion_kwargs=diffusion_kwargs)
        self.actor_kwargs.update(self.diffusion_args)
        self._build(lr_schedule)

    def make_actor(self) -> DiffusionActor:
        """:return: A new actor, on the policy's device."""
        return DiffusionActor(**self._update_features_extractor(self.actor_kwargs)).to(self.device)

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Shape of the standard normal noise that one action is made of: one row per denoising step."""
        return self.actor.denoising_steps, self.actor.action_dim

    def actions_from_noise(self, obs: PyTorchObs, noise: th.Tensor) -> th.Tensor:
        """See :meth:`~sb3_algd.common.policies.ConstrainedPolicy.actions_from_noise`."""
        n_candidates = noise.shape[1]
        features = self.actor.extract_features(obs, self.actor.features_extractor)
        if n_candidates > 1:
            features = features.repeat_interleave(n_candidates, dim=0)
        denoiser = self.actor.network.bind(features)
        per_step = noise.flatten(0, 1).unbind(dim=1)
        latents = self.actor.process.denoise(denoiser, (denoiser.batch_size, self.actor.action_dim), noise=per_step)
        return th.tanh(latents[-1]).unflatten(0, (-1, n_candidates))

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), **self.diffusion_args}


MlpPolicy = DiffusionPolicy


class CnnPolicy(DiffusionPolicy):
    """:class:`DiffusionPolicy` for image observations: ``NatureCNN`` is the default features extractor."""

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


class MultiInputPolicy(DiffusionPolicy):
    """:class:`DiffusionPolicy` for Dict observations: ``CombinedExtractor`` is the default features extractor."""

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
