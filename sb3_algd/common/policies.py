"""What the policies of all constrained algorithms share: reward critics, cost critics and the critics' targets."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor, get_actor_critic_arch
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_algd.common.critics import EnsembleCritic
from sb3_algd.common.lagrange import EnergyTerms

# Modules of these packages keep no tensor of a forward pass for the next one
_KNOWN_PACKAGES = ("torch", "stable_baselines3", "sb3_algd")


class ConstrainedPolicy(BasePolicy, ABC):
    """
    Policy class with an actor, reward critics, cost critics and their targets. Subclasses make the actor.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule (could be constant)
    :param net_arch: The specification of the networks: a list for all, or ``dict(pi=[...], qf=[...])``
    :param activation_fn: Activation function of the actor and the reward critics, one without randomness of its own
    :param n_cost_critics: Number of cost critics E
    :param cost_activation_fn: Activation function of the cost critics
    :param n_constraints: Number of constraints n_c, set by the algorithm from its ``cost_limit``
    :param layer_norm: Whether the hidden layers of reward and cost critics are normalised
    :param features_extractor_class: Features extractor to use.
    :param features_extractor_kwargs: Keyword arguments
        to pass to the features extractor.
    :param normalize_images: Whether to normalize images or not,
         dividing by 255.0 (True by default)
    :param optimizer_class: The optimizer to use,
        ``th.optim.Adam`` by default
    :param optimizer_kwargs: Additional keyword arguments,
        excluding the learning rate, to pass to the optimizer
    :param n_critics: Number of reward critics to create.
    :param share_features_extractor: Whether to share or not the features extractor
        between the actor and the critics (this saves computation time)
    :param n_candidates: Number of actions that ``predict`` samples per state; the one with the lowest energy acts. Only for
        acting, also in training: targets and losses always use one sample. Deterministic actions have no candidates.
        The attribute of the same name can be set at any time.
    """

    #: What the energy needs beside the critics; the model sets it, see :meth:`energy`
    energy_terms: EnergyTerms | None = None
    action_space: spaces.Box
    actor: Any
    critic: EnsembleCritic
    critic_target: EnsembleCritic
    cost_critic: EnsembleCritic
    cost_critic_target: EnsembleCritic

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]],
        activation_fn: type[nn.Module] = nn.ReLU,
        n_cost_critics: int = 4,
        cost_activation_fn: type[nn.Module] = nn.SiLU,
        n_constraints: int = 1,
        layer_norm: bool = True,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        share_features_extractor: bool = False,
        n_candidates: int = 1,
    ) -> None:
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            features_extractor_kwargs,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=True,
            normalize_images=normalize_images,
        )
        actor_arch, critic_arch = get_actor_critic_arch(net_arch)
        self.net_arch = net_arch
        self.share_features_extractor = share_features_extractor
        if n_candidates < 1 or n_candidates != int(n_candidates):
            raise ValueError(f"n_candidates must be a whole number, at least 1, got {n_candidates}.")
        self.n_candidates = int(n_candidates)
        net_args = {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "normalize_images": normalize_images,
        }
        self.actor_kwargs = {**net_args, "net_arch": actor_arch, "activation_fn": activation_fn}
        shared_kwargs = {**net_args, "net_arch": critic_arch, "share_features_extractor": share_features_extractor}
        shared_kwargs["layer_norm"] = layer_norm
        self.critic_kwargs = {**shared_kwargs, "activation_fn": activation_fn, "n_critics": n_critics}
        self.cost_critic_kwargs = {
            **shared_kwargs,
            "activation_fn": cost_activation_fn,
            "n_critics": n_cost_critics,
            "n_outputs": n_constraints,
            "narrow_init": True,
        }

    def _build(self, lr_schedule: Schedule) -> None:
        self.actor = self.make_actor()
        self.actor.optimizer = self._make_optimizer(list(self.actor.parameters()), lr_schedule)
        self.critic, self.critic_target = self._make_critic_pair(self.critic_kwargs)
        self.cost_critic, self.cost_critic_target = self._make_critic_pair(self.cost_critic_kwargs)
        for critic in (self.critic, self.cost_critic):
            # A shared features extractor is trained by the policy loss only
            own = [
                parameter
                for name, parameter in critic.named_parameters()
                if not (self.share_features_extractor and name.startswith("features_extractor"))
            ]
            critic.optimizer = self._make_optimizer(own, lr_schedule)

    @abstractmethod
    def make_actor(self) -> BasePolicy:
        """:return: A new actor, on the policy's device."""

    def _make_optimizer(self, parameters: list[nn.Parameter], lr_schedule: Schedule) -> th.optim.Optimizer:
        kwargs = dict(self.optimizer_kwargs)
        other_form = kwargs.get("foreach") or kwargs.get("differentiable")
        if self.optimizer_class in (th.optim.Adam, th.optim.AdamW) and not other_form:
            # The same steps in one pass over the parameters
            kwargs.setdefault("fused", True)
        return self.optimizer_class(parameters, lr=lr_schedule(1), **kwargs)  # type: ignore[call-arg]

    def _make_critic_pair(self, critic_kwargs: dict[str, Any]) -> tuple[EnsembleCritic, EnsembleCritic]:
        """Make an ensemble and its target, which never shares its features extractor and always is in eval mode."""
        shared = self.actor.features_extractor if self.share_features_extractor else None
        critic = EnsembleCritic(**self._update_features_extractor(critic_kwargs, shared)).to(self.device)
        target = EnsembleCritic(**self._update_features_extractor(critic_kwargs)).to(self.device)
        target.load_state_dict(critic.state_dict())
        target.set_training_mode(False)
        target.requires_grad_(False)
        return critic, target

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            dict(
                net_arch=self.net_arch,
                activation_fn=self.actor_kwargs["activation_fn"],
                n_cost_critics=self.cost_critic_kwargs["n_critics"],
                cost_activation_fn=self.cost_critic_kwargs["activation_fn"],
                n_constraints=self.cost_critic_kwargs["n_outputs"],
                layer_norm=self.critic_kwargs["layer_norm"],
                n_critics=self.critic_kwargs["n_critics"],
                share_features_extractor=self.share_features_extractor,
                lr_schedule=self._dummy_schedule,  # dummy lr schedule, not needed for loading policy alone
                optimizer_class=self.optimizer_class,
                optimizer_kwargs=self.optimizer_kwargs,
                features_extractor_class=self.features_extractor_class,
                features_extractor_kwargs=self.features_extractor_kwargs,
                n_candidates=self.n_candidates,
            )
        )
        return data

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        :param obs: Observations
        :param deterministic: Whether to use deterministic actions
        :return: Actions in [-1, 1], shape (batch, action_dim)
        """
        return self._predict(obs, deterministic=deterministic)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        if self.n_candidates == 1 or deterministic:
            return self.actor(observation, deterministic)
        n_states = len(next(iter(observation.values()))) if isinstance(observation, dict) else len(observation)
        return self.best_action(observation, th.randn((n_states, self.n_candidates, *self.noise_shape), device=self.device))

    @property
    @abstractmethod
    def noise_shape(self) -> tuple[int, int]:
        """Shape of the standard normal noise that one action is made of: (rows, action_dim)."""

    @abstractmethod
    def actions_from_noise(self, obs: PyTorchObs, noise: th.Tensor) -> th.Tensor:
        """
        The actor as a function without randomness of its own. Noise of zeros makes the deterministic action.

        :param obs: Observations
        :param noise: Standard normal noise, shape (batch, n, *noise_shape) for n actions per state
        :return: Actions in [-1, 1], shape (batch, n, action_dim)
        """

    def best_action(self, obs: PyTorchObs, noise: th.Tensor) -> th.Tensor:
        """
        Of n actions per state, the one with the lowest energy.

        :param obs: Observations
        :param noise: Standard normal noise, shape (batch, n, *noise_shape)
        :return: Actions in [-1, 1], shape (batch, action_dim)
        """
        actions = self.actions_from_noise(obs, noise)
        if noise.shape[1] == 1:
            return actions.squeeze(1)
        best = self.energy(obs, actions).argmin(dim=1, keepdim=True).unsqueeze(-1)
        return actions.gather(1, best.expand(-1, -1, actions.shape[-1])).squeeze(1)

    def energy(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        Energy of several actions per state for acting: of the target critics, with the largest cost estimate of the ensemble.

        :param obs: Observations
        :param actions: Actions in [-1, 1], shape (batch, n, action_dim)
        :return: Shape (batch, n)
        :raises ValueError: If the policy does not know the multipliers, because no model has set them.
        """
        if self.energy_terms is None:
            raise ValueError(
                "A policy without its model does not know the multipliers, which n_candidates > 1 needs: "
                "call predict() of the model, or set n_candidates to 1."
            )
        actions = actions.transpose(0, 1)
        values = self.critic_target.bind(self.critic_target.features(obs)).values(actions)
        costs = self.cost_critic_target.bind(self.cost_critic_target.features(obs)).values(actions)
        return self.energy_terms.energy(values.amin(dim=0).squeeze(-1), costs.amax(dim=0)).transpose(0, 1)

    def predict(self, *args: Any, **kwargs: Any) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Get the policy action from an observation, see SB3.

        :param args: See SB3
        :param kwargs: See SB3
        :return: See SB3
        """
        if not hasattr(self, "_keeps_nothing"):
            self._keeps_nothing = all(type(m).__module__.split(".")[0] in _KNOWN_PACKAGES for m in self.actor.modules())
        # SB3's no_grad() alone takes a sixth longer. But a user's module that keeps a tensor at its first use must not keep
        # one of inference mode, because training could not use it
        with th.inference_mode(self._keeps_nothing):
            return super().predict(*args, **kwargs)

    def set_training_mode(self, mode: bool) -> None:
        """
        Put the policy in either training or evaluation mode.

        This affects certain modules, such as batch normalisation and dropout. Targets always stay in evaluation mode.

        :param mode: if true, set to training mode, else set to evaluation mode
        """
        if all(module.training == mode for module in (self, self.actor, self.critic, self.cost_critic)):
            # predict() asks each time, and walking through all networks is a tenth of its time
            return
        self.actor.set_training_mode(mode)
        self.critic.set_training_mode(mode)
        self.cost_critic.set_training_mode(mode)
        self.training = mode

    @th.no_grad()
    def update_targets(self, tau: float) -> None:
        """
        Move the target critics towards the critics.

        :param tau: Polyak coefficient, 1 copies the critics
        """
        for critic, target in ((self.critic, self.critic_target), (self.cost_critic, self.cost_critic_target)):
            th._foreach_lerp_(list(target.parameters()), list(critic.parameters()), tau)
            # Running statistics of normalisation layers are copied, see SB3's GH issue #996
            for (name, buffer), copied in zip(critic.named_buffers(), target.buffers(), strict=True):
                if "running_" in name:
                    copied.copy_(buffer)
