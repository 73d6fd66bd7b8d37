"""SB3's SAC with the treatment that ALGD's updates get, for comparison: compiled losses, on request in bfloat16."""

from collections.abc import Callable
from typing import Any

import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.utils import polyak_update


class CompiledSAC(SAC):
    """
    SAC with compiled updates and fused optimizers; it learns the entropy coefficient.

    :param args: See SAC
    :param bfloat16: Whether matrix products are done in bfloat16
    :param kwargs: See SAC
    """

    def __init__(self, *args: Any, bfloat16: bool, **kwargs: Any) -> None:
        kwargs["policy_kwargs"] = {**kwargs.get("policy_kwargs", {}), "optimizer_kwargs": dict(fused=True)}
        super().__init__(*args, **kwargs)
        self.bfloat16 = bfloat16
        compiled: dict[str, Callable[..., Any]] = {
            method.__name__: th.compile(method, dynamic=False) for method in (self._critic_loss, self._actor_loss)
        }
        self._compiled = compiled

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Update policy, critics, targets and entropy coefficient, without the log.

        :param gradient_steps: Number of updates
        :param batch_size: Number of transitions per update
        """
        assert self.replay_buffer is not None
        assert self.ent_coef_optimizer is not None
        self.policy.set_training_mode(True)
        self._update_learning_rate([self.actor.optimizer, self.critic.optimizer, self.ent_coef_optimizer])
        for _ in range(gradient_steps):
            batch = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
            with th.autocast(self.device.type, th.bfloat16, enabled=self.bfloat16):
                critic_loss = self._compiled["_critic_loss"](batch)
            self._step(critic_loss, [self.critic.optimizer])
            with th.autocast(self.device.type, th.bfloat16, enabled=self.bfloat16):
                actor_loss = self._compiled["_actor_loss"](batch.observations)
            self._step(actor_loss, [self.actor.optimizer, self.ent_coef_optimizer])
            self._n_updates += 1
            polyak_update(self.critic.parameters(), self.critic_target.parameters(), self.tau)

    @staticmethod
    def _step(loss: th.Tensor, optimizers: list[th.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    def _critic_loss(self, batch: ReplayBufferSamples) -> th.Tensor:
        assert self.log_ent_coef is not None
        with th.no_grad():
            next_actions, log_prob = self.actor.action_log_prob(batch.next_observations)
            next_values = th.cat(self.critic_target(batch.next_observations, next_actions), dim=1).float()
            next_values = next_values.amin(dim=1, keepdim=True) - self.log_ent_coef.exp() * log_prob.reshape(-1, 1)
            targets = batch.rewards + (1 - batch.dones) * self.gamma * next_values
        values = th.stack(self.critic(batch.observations, batch.actions)).float()
        return 0.5 * (values - targets).square().mean(dim=(1, 2)).sum()

    def _actor_loss(self, observations: th.Tensor) -> th.Tensor:
        assert self.log_ent_coef is not None and isinstance(self.target_entropy, float)
        actions, log_prob = self.actor.action_log_prob(observations)
        log_prob = log_prob.reshape(-1, 1)
        # SB3's SAC computes gradients of the critics' weights here, and throws them away
        weights = {name: weight.detach() for name, weight in self.critic.named_parameters()}
        both = th.func.functional_call(self.critic, weights, (observations, actions))
        values = th.cat(both, dim=1).float().amin(dim=1, keepdim=True)
        loss = (self.log_ent_coef.detach().exp() * log_prob - values).mean()
        return loss - (self.log_ent_coef * (log_prob + self.target_entropy).detach()).mean()
