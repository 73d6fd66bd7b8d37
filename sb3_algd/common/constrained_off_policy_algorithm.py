"""The update that all constrained algorithms share: critics, actor, multipliers."""

import copy
from abc import abstractmethod
from collections import defaultdict
from functools import partial
from typing import Any

import numpy as np
import torch as th
import torch.nn.functional as F
from gymnasium import spaces
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.common.utils import FloatSchedule, update_learning_rate

from sb3_algd.common.batches import sample_batches, to_device
from sb3_algd.common.buffers import CostReplayBufferSamples
from sb3_algd.common.critics import EnsembleCritic
from sb3_algd.common.guards import WeightsBackup
from sb3_algd.common.lagrange import EpisodeController, LagrangeMultiplier, estimate_risk, risk_slope
from sb3_algd.common.lagrangian_algorithm import LagrangianAlgorithm
from sb3_algd.common.legacy import adopt_saved, saved_space
from sb3_algd.common.policies import ConstrainedPolicy

#: The policy's actor, and its critics
NETWORKS = ("actor", "critic", "critic_target", "cost_critic", "cost_critic_target")


class ConstrainedOffPolicyAlgorithm(LagrangianAlgorithm):
    """
    Base class of off-policy algorithms that maximise the return subject to limits on the cost of an episode.

    Every algorithm has reward critics, cost critics and Lagrange multipliers, which are updated here. The actor makes the
    difference. A subclass states its arguments and ``policy_aliases``, and defines two methods: :meth:`_next_actions`, with
    which the critics' targets are made, and :meth:`_actor_loss`. There, :meth:`_energy` gives the augmented Lagrangian of
    actions and its gradient. docs/developing.md shows how to add an algorithm.

    :param args: see :class:`~sb3_algd.ALGD`, as all that follow
    :param target_update_interval: see there
    :param cost_risk_coef: see there
    :param cost_target_risk_coef: see there
    :param bound_cost_targets: see there
    :param actor_learning_rate: see there
    :param cost_critic_learning_rate: see there
    :param policy_delay: see there
    :param kwargs: see there
    """

    policy: ConstrainedPolicy
    actor: Any
    critic: EnsembleCritic
    critic_target: EnsembleCritic
    cost_critic: EnsembleCritic
    cost_critic_target: EnsembleCritic
    action_space: spaces.Box

    def __init__(
        self,
        *args: Any,
        target_update_interval: int,
        cost_risk_coef: float,
        cost_target_risk_coef: float,
        bound_cost_targets: bool,
        actor_learning_rate: float | Schedule | None,
        cost_critic_learning_rate: float | Schedule | None,
        policy_delay: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.target_update_interval = target_update_interval
        self.cost_risk_coef = cost_risk_coef
        self.cost_target_risk_coef = cost_target_risk_coef
        self.bound_cost_targets = bound_cost_targets
        self.actor_learning_rate = actor_learning_rate
        self.cost_critic_learning_rate = cost_critic_learning_rate
        self.policy_delay = policy_delay
        self._weights_backup = WeightsBackup()

    # --- what a subclass defines, besides _actor_loss ---------------------------------------------------------------------

    @abstractmethod
    def _next_actions(self, next_observations: PyTorchObs) -> tuple[th.Tensor, th.Tensor | None]:
        """
        Actions of the current policy, with which the critics' targets are made.

        :param next_observations: States
        :return: Actions, shape (batch, action_dim), and what is added to their value, shape (batch, 1), None for nothing
        """

    def _actor_optimizers(self) -> list[th.optim.Optimizer]:
        """:return: The optimizers of everything that the actor's loss trains"""
        return [self.actor.optimizer]

    # --- setting up -------------------------------------------------------------------------------------------------------

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        # None follows lr_schedule, also where a user has replaced it
        actor, cost_critic = self.actor_learning_rate, self.cost_critic_learning_rate
        self.actor_lr_schedule = None if actor is None else FloatSchedule(actor)
        self.cost_critic_lr_schedule = None if cost_critic is None else FloatSchedule(cost_critic)

    def _setup_model(self) -> None:
        adopt_saved(self.__dict__)
        self._check_arguments()
        loading = bool(self._settled)
        self._setup_constraint()
        self._setup_multiplier(loading)
        if self.replay_buffer is None:
            self.replay_buffer = self._make_replay_buffer()
        # SB3 fills in what it would have chosen, a buffer without costs among it: keep the arguments as the user gave them,
        # so that a saved model is loaded with the same ones
        given = {name: getattr(self, name) for name in ("policy_kwargs", "replay_buffer_class", "replay_buffer_kwargs")}
        self.policy_kwargs = {**self.policy_kwargs, "n_constraints": self.n_constraints}
        self.replay_buffer_kwargs = dict(self.replay_buffer_kwargs)
        super()._setup_model()
        self.__dict__.update(given)
        for name in NETWORKS:
            setattr(self, name, getattr(self.policy, name))

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if not isinstance(self.action_space, spaces.Box):
            # An AssertionError as from SB3's algorithms
            raise AssertionError(
                f"{type(self).__name__} only supports continuous (Box) action spaces but {self.action_space} was provided: "
                "its policy samples real-valued actions. Wrap the environment to take a Box."
            )
        if not np.all(self.action_space.low < self.action_space.high):
            raise ValueError(
                f"`action_space` must have low < high in every dimension, got {self.action_space}: actions are scaled "
                "to [-1, 1]. Leave out what cannot be chosen, in a wrapper."
            )
        if self.policy_kwargs.get("use_sde"):
            raise ValueError(f"{type(self).__name__} does not support gSDE: leave use_sde out of policy_kwargs.")
        if "n_constraints" in self.policy_kwargs:
            raise ValueError("n_constraints follows from cost_limit: leave it out of policy_kwargs.")

    def _settle_constraint(self) -> None:
        super()._settle_constraint()
        # Shape (n_constraints,); no bound until _set_cost_floor() knows one
        self._cost_floor = th.full_like(self._budget, -np.inf)

    def _sample_action(self, *args: Any, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
        action, buffer_action = super()._sample_action(*args, **kwargs)
        if not np.isfinite(action).all():
            # The environment would make something of it, and be blamed
            raise FloatingPointError(
                f"The policy's action became {action.tolist()} at step {self.num_timesteps}: training diverged and stopped, "
                f"the environment has not seen it. {self._weights_backup.restore(self)}; try a smaller learning_rate or "
                "scaled rewards, and look at action_noise if there is any."
            )
        return action, buffer_action

    def predict(self, *args: Any, **kwargs: Any) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Get the policy action from an observation, see SB3.

        :param args: See SB3
        :param kwargs: See SB3
        :return: See SB3
        """
        if self.policy.n_candidates > 1:
            self.policy.energy_terms = self._energy_terms(self.units.moments)
        return super().predict(*args, **kwargs)

    # --- the update -------------------------------------------------------------------------------------------------------

    def train(self, gradient_steps: int, batch_size: int = 256) -> None:
        """
        Update critics, actor and multipliers.

        :param gradient_steps: Number of updates
        :param batch_size: Number of transitions per update
        """
        assert self.replay_buffer is not None
        # Switch to train mode (this affects batch norm / dropout)
        self.policy.set_training_mode(True)
        self._update_learning_rates()
        # Tensors are collected and read once at the end: reading each would wait for the device each time
        logs: dict[str, list[th.Tensor]] = defaultdict(list)
        self._set_cost_floor()
        self._set_return_units()

        for batch in sample_batches(self.replay_buffer, gradient_steps, batch_size, self.device, self._vec_normalize_env):
            self._weights_backup.renew(self)
            self._n_updates += 1
            for name, value in self._update(batch).items():
                logs[name].append(value)
            # Counted over the whole training, or an interval of 2 would never be met with one gradient step per call
            if self._n_updates % self.target_update_interval == 0:
                self.policy.update_targets(self.tau)

        means = {name: th.stack(values).mean(dim=0) for name, values in logs.items()}
        self._log_training({**means, "multiplier": self.lagrange_multiplier.value})

    def _update(self, batch: CostReplayBufferSamples) -> dict[str, th.Tensor]:
        """
        One update, without a look at any value.

        :param batch: Transitions
        :return: Losses, gradient norm and risks
        """
        precision = partial(th.autocast, self.device.type, th.bfloat16, enabled=self.uses_bfloat16)

        # Reward and cost critics, which have no parameter in common
        with precision():
            critic_loss, cost_critic_loss, buffer_risk = self._call("_critic_losses", batch)
        self._minimize(critic_loss + cost_critic_loss, [self.critic.optimizer, self.cost_critic.optimizer])

        losses = {"critic_loss": critic_loss.detach(), "cost_critic_loss": cost_critic_loss.detach()}
        metrics = self._kept({**losses, "risk": buffer_risk})

        # Actor. Another region: within one, autocast keeps its copies of the critics' weights, which have just changed
        if self._n_updates % self.policy_delay == 0:
            with precision():
                actor_loss, actor_metrics, policy_risk, moments = self._call("_actor_loss", batch.observations)
            self._minimize(actor_loss, self._actor_optimizers())
            gradients = [parameter.grad for parameter in self.actor.parameters() if parameter.grad is not None]
            if self.normalize:
                self.units.keep(moments)
            norm = th.nn.utils.get_total_norm(gradients)
            metrics.update(self._kept({**actor_metrics, "policy_risk": policy_risk, "policy_grad_norm": norm}))

        # The paper's multiplier; the other one waits for the end of an episode
        if isinstance(self.lagrange_multiplier, LagrangeMultiplier) and self._constraint_acts:
            self.lagrange_multiplier.update(metrics["risk"] - self._budget)
        return metrics

    def _kept(self, metrics: dict[str, th.Tensor]) -> dict[str, th.Tensor]:
        # What CUDA graphs return is overwritten later
        return metrics if self.device.type == "cpu" else {name: value.clone() for name, value in metrics.items()}

    @staticmethod
    def _minimize(loss: th.Tensor, optimizers: list[th.optim.Optimizer]) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    def _critic_losses(self, batch: CostReplayBufferSamples) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        discounts = self.gamma if batch.discounts is None else batch.discounts
        cost_discounts = self.cost_gamma if batch.cost_discounts is None else batch.cost_discounts
        with th.no_grad():
            next_actions, bonus = self._next_actions(batch.next_observations)
            next_values = self.critic_target(batch.next_observations, next_actions).amin(dim=0)
            next_costs = self.cost_critic_target(batch.next_observations, next_actions)
            if bonus is not None:
                next_values = next_values + bonus
            if self.cost_target_risk_coef > 0.0 and len(next_costs) > 1:
                next_costs = next_costs + self.cost_target_risk_coef * next_costs.std(dim=0)
            # A multiplier that pulls hard otherwise finds actions whose cost is underestimated, down to below zero
            scale, cost_scales = self.units.returns[:1], self.units.returns[1:]
            next_costs = th.maximum(next_costs, self._cost_floor / cost_scales)
            targets = batch.rewards / scale + (1 - batch.reward_dones) * discounts * next_values
            # Each member is trained against its own target
            cost_targets = batch.costs / cost_scales + (1 - batch.terminations) * cost_discounts * next_costs

        # Sum over the reward critics of the mean squared error; over the cost critics the mean
        values = self.critic(batch.observations, batch.actions)
        critic_loss = (values - targets).square().mean(dim=(1, 2)).sum()
        cost_values = self.cost_critic(batch.observations, batch.actions)
        cost_critic_loss = F.mse_loss(cost_values, cost_targets)
        risk = estimate_risk(cost_values.detach(), self.cost_risk_coef).mean(dim=0)
        return critic_loss, cost_critic_loss, risk * cost_scales

    def _energy(self, observations: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
        """
        Augmented Lagrangian of several actions in the same states, and its gradient.

        :param observations: States, batch first
        :param actions: Shape (n, batch, action_dim)
        :return: Energy, shape (n, batch); gradient with respect to the actions, shape (n, batch, action_dim);
            risk, shape (n, batch, n_constraints); what the energy's units follow from, see
            :meth:`~sb3_algd.common.units.EnergyUnits.measure`; all detached
        """
        with th.no_grad():
            critic = self.critic.bind(self.critic.features(observations))
            cost_critic = self.cost_critic.bind(self.cost_critic.features(observations))
            values, cost_values = critic.values(actions), cost_critic.values(actions)
            risk = estimate_risk(cost_values, self.cost_risk_coef)
            value, which = values.min(dim=0, keepdim=True)
            value = value.squeeze(0).squeeze(-1)
            moments = self.units.measure(actions, value, risk) if self.normalize else self.units.moments
            terms = self._energy_terms(moments)
            energy = terms.energy(value, risk)
            # The gradient by hand: a third of autograd's operations
            value_gradient, risk_gradient = terms.gradients(risk)
            value_slope = th.zeros_like(values).scatter_(0, which, 1.0) * value_gradient
            cost_slope = risk_gradient * risk_slope(cost_values, self.cost_risk_coef)
            energy_grad = critic.action_gradient(value_slope) + cost_critic.action_gradient(cost_slope)
        return energy, energy_grad, risk * self.units.returns[1:], moments

    def _set_cost_floor(self) -> None:
        """Note the least that a discounted sum of costs can be, as far as the replay buffer tells."""
        assert self.replay_buffer is not None
        if not self.bound_cost_targets:
            return
        lowest = self.replay_buffer.lowest_costs
        # Without a discount there is no bound for costs that can be negative
        with np.errstate(divide="ignore"):
            floor = np.divide(lowest, 1.0 - self.cost_gamma, out=np.zeros_like(lowest), where=lowest < 0.0)
        self._cost_floor.copy_(to_device(th.from_numpy(floor), self.device))

    def _update_learning_rates(self) -> None:
        # Negative when more steps are made than were asked for, as one step of several environments does
        progress = max(self._current_progress_remaining, 0.0)
        self.logger.record("train/learning_rate", self.lr_schedule(progress))
        schedules: dict[th.optim.Optimizer, Schedule | None] = {
            **dict.fromkeys([self.critic.optimizer, *self._actor_optimizers()]),
            self.actor.optimizer: self.actor_lr_schedule,
            self.cost_critic.optimizer: self.cost_critic_lr_schedule,
        }
        if isinstance(self.lagrange_multiplier, LagrangeMultiplier):
            schedules[self.lagrange_multiplier.optimizer] = self.multiplier_lr_schedule
        for optimizer, schedule in schedules.items():
            update_learning_rate(optimizer, (schedule or self.lr_schedule)(progress))

    def _log_training(self, means: dict[str, th.Tensor]) -> None:
        """
        Record what came out of one ``train()`` call.

        :param means: Means of scalars and of risks of shape (n_constraints,), and the multipliers
        :raises FloatingPointError: If one is not finite; weights and optimisers are set back to a copy from before
        """
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        # Read from the device once
        read = th.cat([mean.reshape(-1) for mean in means.values()]).cpu().numpy()
        ends = np.cumsum([mean.numel() for mean in means.values()])
        for name, values in zip(means, np.split(read, ends[:-1]), strict=True):
            if not np.isfinite(values).all():
                what = f"train/{name} became {values.tolist()} at update {self._n_updates} (step {self.num_timesteps})"
                raise FloatingPointError(
                    f"{what}: training diverged and stopped. {self._weights_backup.restore(self)}; "
                    "try a smaller learning_rate or scaled rewards."
                )
            self._record_each(f"train/{name}", values)
        self._record_each("train/cost_budget", self.cost_budget)
        cost = self._recent_cost()
        if cost is not None:
            self._record_each("train/episode_cost", cost)

    # --- saving -----------------------------------------------------------------------------------------------------------

    def set_parameters(
        self, load_path_or_dict: str | dict[str, Any], exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """
        Load parameters from a file or a dictionary, see SB3.

        :param load_path_or_dict: See SB3
        :param exact_match: See SB3
        :param device: See SB3
        :raises ValueError: If they are of another kind of model; all that is there stays
        """
        if isinstance(load_path_or_dict, dict):
            parameters = load_path_or_dict
        else:
            _, parameters, _ = load_from_zip_file(load_path_or_dict, device=device, load_data=False)
            if "units" not in parameters:
                self.__dict__.setdefault("_saved_space", saved_space(load_path_or_dict))
        # Version 0.1.0 had no units, no layer normalisation, and always an optimizer of the multiplier
        if "units" not in parameters:
            parameters = {"units": {**self.units.state_dict(), "acts": th.ones(())}, **parameters}
            if "policy" in parameters:
                plain = {f"{name}.has_layer_norm": th.tensor(False) for name in NETWORKS[1:]}
                parameters["policy"] = {**plain, **parameters["policy"]}
        if self.__dict__.pop("_saved_space", "log") == "projected":
            parameters["lagrange_multiplier"]["in_log_space"] = th.tensor(0.0)
        if isinstance(self.lagrange_multiplier, EpisodeController):
            parameters.pop("lagrange_multiplier.optimizer", None)
        before: dict[str, Any] = copy.deepcopy(self.get_parameters())
        try:
            super().set_parameters(parameters, exact_match, device)
        except Exception:
            # SB3 replaces one network after the other
            super().set_parameters(before, device=self.device)
            raise
        self._constraint_acts = bool(self.units.acts)
        # What they say has a unit once they have learned something
        self._critics_loaded = bool(self.units.n_measured > 0)
        # A divergence must not undo what was loaded
        self._weights_backup = WeightsBackup()

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *NETWORKS, "_cost_floor", "_weights_backup"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        multiplier, _ = super()._get_torch_save_params()
        return ["policy", *multiplier, "actor.optimizer", "critic.optimizer", "cost_critic.optimizer"], []
