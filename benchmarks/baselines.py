"""
What ALGD is compared with: SAC under the same constraint, with a Gaussian policy in the place of the diffusion policy.

Everything else is ALGD's own: reward and cost critics, budget, multiplier, energy and replay buffer. So the difference to
ALGD is what the diffusion policy brings, and the difference between ``rho=1`` and ``rho=0`` (SAC-Lagrangian) what the
augmented Lagrangian brings.
"""

from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.sac.policies import Actor

from sb3_algd import ALGD
from sb3_algd.acceleration import set_learning_rate
from sb3_algd.policies import DiffusionPolicy


class GaussianPolicy(DiffusionPolicy):
    """ALGD's critics with SAC's actor, a squashed Gaussian with two hidden layers of 256 by default."""

    actor: Actor  # type: ignore[assignment]

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            observation_space, action_space, lr_schedule, net_arch=[256, 256] if net_arch is None else net_arch, **kwargs
        )

    def make_actor(self) -> Actor:  # type: ignore[override]
        """:return: SAC's actor, on the policy's device."""
        names = ("observation_space", "action_space", "normalize_images", "net_arch", "activation_fn")
        kwargs = {name: self.actor_kwargs[name] for name in names}
        return Actor(**self._update_features_extractor(kwargs)).to(self.device)


class ConstrainedSAC(ALGD):
    """
    SAC whose energy is ALGD's augmented Lagrangian; SAC-Lagrangian with ``rho=0``.

    The entropy coefficient is learned as in SB3's SAC, towards minus the number of action dimensions.

    What concerns the score or the diffusion has no effect.

    :param args: See :class:`~sb3_algd.ALGD`
    :param kwargs: See :class:`~sb3_algd.ALGD`
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"GaussianPolicy": GaussianPolicy}
    actor: Actor  # type: ignore[assignment]
    action_space: spaces.Box

    def _setup_model(self) -> None:
        if self.cuda_graph:
            raise ValueError("ConstrainedSAC cannot be recorded, its distribution looks at values: leave cuda_graph out.")
        super()._setup_model()
        self.target_entropy = -float(np.prod(self.action_space.shape))
        self.log_ent_coef = th.zeros(1, device=self.device, requires_grad=True)
        self.ent_coef_optimizer = th.optim.Adam([self.log_ent_coef], lr=self.lr_schedule(1))

    def _optimizers(self) -> list[th.optim.Optimizer]:
        return [*super()._optimizers(), self.ent_coef_optimizer]

    def _update_learning_rates(self) -> None:
        super()._update_learning_rates()
        set_learning_rate(self.ent_coef_optimizer, self.lr_schedule(self._current_progress_remaining))

    def _next_values(self, next_observations: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        actions, log_prob = self.actor.action_log_prob(next_observations)
        values = self.critic_target(next_observations, actions).amin(dim=0)
        values = values - self.log_ent_coef.exp() * log_prob.unsqueeze(1)
        return values, self.cost_critic_target(next_observations, actions)

    def _update_policy(self, observations: PyTorchObs) -> tuple[dict[str, th.Tensor], th.Tensor]:
        actions, log_prob = self.actor.action_log_prob(observations)
        ent_coef = self.log_ent_coef.detach().exp()
        ent_coef_loss = -(self.log_ent_coef * (log_prob.detach() + self.target_entropy)).mean()
        self.ent_coef_optimizer.zero_grad()
        ent_coef_loss.backward()
        self.ent_coef_optimizer.step()

        energy, energy_grad, risk = self._energy(observations, actions.detach().unsqueeze(0))
        # Has the gradient of the mean energy, without another pass through the critics
        guidance_loss = (actions * energy_grad[0]).sum(dim=-1).mean()
        self.actor.optimizer.zero_grad()
        (guidance_loss + (ent_coef * log_prob).mean()).backward()
        self.actor.optimizer.step()
        metrics = {"guidance_loss": energy[0].mean(), "ent_coef": ent_coef.squeeze()}
        return metrics, risk[0].mean(dim=0)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "log_ent_coef", "ent_coef_optimizer"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        return [*state_dicts, "ent_coef_optimizer"], [*variables, "log_ent_coef"]
