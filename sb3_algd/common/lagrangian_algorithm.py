"""What weighs costs against rewards: multipliers, when they act, and the units in which both are compared."""

from abc import ABC
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import FloatSchedule

from sb3_algd.common.calibration import expected_and_paid
from sb3_algd.common.compilation import CompilingAlgorithm
from sb3_algd.common.constraint import ConstraintSetting
from sb3_algd.common.critics import EnsembleCritic
from sb3_algd.common.guards import warn_user
from sb3_algd.common.lagrange import EnergyTerms, EpisodeController, LagrangeMultiplier, PerConstraint, per_constraint
from sb3_algd.common.units import EnergyUnits, ReturnScale

#: Newest steps that expected and paid costs are compared along, if episodes are longer
MAX_CALIBRATION_STEPS = 1000
#: How often in a row the cost critics must expect less than half of what is paid for a warning
N_FOOLED = 3


class LagrangianAlgorithm(CompilingAlgorithm, ABC):
    """
    An algorithm whose energy is the augmented Lagrangian of what its critics expect.

    :param args: see :class:`~sb3_algd.ALGD`, as all that follow
    :param penalty: see there
    :param rho: see there
    :param constraint_start: see there
    :param multiplier_kwargs: see there
    :param multiplier_signal: see there
    :param normalize: see there
    :param kwargs: see there
    """

    critic: EnsembleCritic
    critic_target: EnsembleCritic
    cost_critic: EnsembleCritic
    cost_critic_target: EnsembleCritic
    lagrange_multiplier: EpisodeController | LagrangeMultiplier

    rho = ConstraintSetting()

    def __init__(
        self,
        *args: Any,
        penalty: str,
        rho: PerConstraint,
        constraint_start: float,
        multiplier_kwargs: dict[str, Any] | None,
        multiplier_signal: str,
        normalize: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.penalty = penalty
        self.rho = rho
        self.constraint_start = constraint_start
        self.multiplier_kwargs = multiplier_kwargs
        self.multiplier_signal = multiplier_signal
        self.normalize = normalize
        #: Whether the constraint has started to act; it does not stop again
        self._constraint_acts = False
        self._return_scale: ReturnScale | None = None
        #: Whether the critics, their units with them, come from a file
        self._critics_loaded = False
        #: For the warning that the cost critics are fooled
        self._multiplier_before: np.ndarray | float = np.inf
        self._n_fooled = 0

    def _check_arguments(self) -> None:
        super()._check_arguments()
        given, episodes = self.multiplier_kwargs or {}, self.multiplier_signal == "episodes"
        if not episodes and "confidence" in given:
            raise ValueError("`multiplier_kwargs` must have no 'confidence' where `multiplier_signal` is 'buffer'.")
        if episodes and callable(given.get("learning_rate")):
            raise ValueError("`multiplier_kwargs` must have a number as 'learning_rate', except where it is the paper's.")

    def _setup_multiplier(self, loading: bool) -> None:
        kwargs = dict(self.multiplier_kwargs or {})
        if loading:
            # The saved multipliers take its place
            kwargs["init_value"] = min(1.0, kwargs.get("max_value", 1.0))
        self.units = EnergyUnits(self.n_constraints).to(self.device)
        self.units.acts.fill_(float(self._constraint_acts))
        multiplier: EpisodeController | LagrangeMultiplier
        if self.multiplier_signal == "episodes":
            multiplier = EpisodeController(self.n_constraints, **kwargs)
        else:
            self.multiplier_lr_schedule = FloatSchedule(kwargs.pop("learning_rate", 3e-4))
            multiplier = LagrangeMultiplier(self.n_constraints, learning_rate=self.multiplier_lr_schedule(1), **kwargs)
        self.lagrange_multiplier = multiplier.to(self.device)

    def _settle_constraint(self) -> None:
        super()._settle_constraint()
        rho = per_constraint("rho", self.rho, self.n_constraints)
        # Per action, or of the whole problem
        self._rho = th.as_tensor(rho * (self.penalty == "pointwise"), dtype=th.float32, device=self.device)
        self._proportional = rho * (self.penalty == "expectation")
        self._budget = th.as_tensor(self.cost_budget, dtype=th.float32, device=self.device)

    def _energy_terms(self, moments: th.Tensor) -> EnergyTerms:
        """
        :param moments: See :meth:`~sb3_algd.common.units.EnergyUnits.measure`
        :return: All that makes an energy of what the critics say
        """
        multiplier, rho = self.units.acts * self.lagrange_multiplier.value, self.units.acts * self._rho
        if self.normalize:
            # A multiplier that pulls hard makes the reward's part small instead of the energy large
            slopes, weight = self.units.slopes(moments), 1.0 / (1.0 + multiplier.sum())
        else:
            slopes = th.ones_like(self.units.returns)
            weight = slopes[0]
        # A limit may be as large as a number can be, to leave a cost unconstrained
        budget = th.minimum(self._budget / self.units.returns[1:], 1e15 * slopes[1:])
        return EnergyTerms(multiplier, budget, rho, slopes, weight)

    def _set_return_units(self) -> None:
        """Take over the scale of returns as measured so far. What the critics say stays the same."""
        if self._return_scale is None or not (self.normalize or self._critics_loaded):
            return
        # A model may be loaded with normalize=False
        scale = self._return_scale.value if self.normalize else np.ones(1 + self.n_constraints)
        new = th.as_tensor(scale, dtype=th.float32, device=self.device)
        factor = self.units.returns / new
        # Before the first update the critics have learned nothing yet, unless they come from a file
        if self._n_updates > 0 or self._critics_loaded:
            for ensembles, ratio in (
                ((self.critic, self.critic_target), factor[:1]),
                ((self.cost_critic, self.cost_critic_target), factor[1:]),
            ):
                for ensemble in ensembles:
                    ensemble.rescale(ratio)
            self.units.moments[1:].mul_(factor.square())
        self.units.returns.copy_(new)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        environments_reset = reset_num_timesteps or self._last_obs is None
        discounts = np.array([self.gamma, *[self.cost_gamma] * self.n_constraints])
        if self._return_scale is None:
            self._return_scale = ReturnScale(self.n_envs, discounts)
        elif environments_reset:
            self._return_scale.start_episodes(self.n_envs)
        self._return_scale.discounts = discounts
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: Any,
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        assert self._return_scale is not None and self.replay_buffer is not None and self._cost_tracker is not None
        self._return_scale.update(reward, self.replay_buffer.newest_costs, dones)
        # The progress that SB3 keeps is that of the step before, and at first that of the training before
        if not self._constraint_acts and self.num_timesteps >= self.constraint_start * self._total_timesteps:
            self._constraint_acts = True
            self.units.acts.fill_(1.0)
        controller = self.lagrange_multiplier
        if self._constraint_acts and isinstance(controller, EpisodeController):
            self._warn_no_episode()
            if dones.any():
                costs = self._cost_tracker.recent_costs(self.cost_limit_discounted)
                for steps in self._cost_tracker.newest_lengths:
                    controller.update(costs, self.cost_limit, self._proportional, steps)

    def _warn_no_episode(self) -> None:
        """Warn once if an episode should have ended by now."""
        if self._warned_of_no_episode or self._steps_without_episode <= 2 * self.n_envs * self.episode_length:
            return
        self._warned_of_no_episode = True
        warn_user(
            f"No episode has ended in {self._steps_without_episode} steps, so the Lagrange multiplier is not updated "
            f"(multiplier_signal='episodes'; the horizon is {self.episode_length} steps). Wrap the environment in a "
            "gymnasium.wrappers.TimeLimit, or call learn() with reset_num_timesteps=False."
        )

    def _after_training(self) -> None:
        super()._after_training()
        if not self._constraint_acts and self.num_timesteps > 0:
            warn_user(
                f"Training ended at step {self.num_timesteps}, before the constraint began to act (constraint_start="
                f"{self.constraint_start:g} of {self._total_timesteps} steps): the policy has not learned to keep its limit. "
                "Train for longer, or give a lower constraint_start."
            )

    def dump_logs(self) -> None:
        """
        Write log data.
        """
        self._record_calibration()
        super().dump_logs()

    def _record_calibration(self) -> None:
        """Record by how much the cost critics are wrong along the newest steps, and warn where the multiplier follows."""
        assert self.replay_buffer is not None
        if self._n_updates == 0:
            return
        horizon = min(self.episode_length, MAX_CALIBRATION_STEPS)
        pair = expected_and_paid(self.cost_critic, self.replay_buffer, horizon, self.cost_gamma, self._vec_normalize_env)
        if pair is None:
            return
        expected, paid = pair[0] * self.units.returns[1:].cpu().numpy(), pair[1]
        self._record_each("train/cost_bias", expected - paid)
        multiplier = self.lagrange_multiplier.value.cpu().numpy().copy()
        rises = multiplier > self._multiplier_before
        self._multiplier_before = multiplier
        self._n_fooled = self._n_fooled + 1 if np.any(rises & (expected < 0.5 * paid) & (paid > self.cost_budget)) else 0
        if self._n_fooled == N_FOOLED:
            warn_user(
                f"The cost critics expect {expected.tolist()} along recent episodes where {paid.tolist()} is paid, "
                f"while the multiplier rises to {multiplier.tolist()}: the policy has found actions whose cost they "
                "underestimate. Let it learn more slowly (policy_delay, actor_learning_rate, learning_rate of "
                "multiplier_kwargs), or let the constraint act later (constraint_start)."
            )

    def _excluded_save_params(self) -> list[str]:
        own = ["lagrange_multiplier", "units", "_rho", "_budget", "_proportional"]
        return [*super()._excluded_save_params(), *own]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts = ["lagrange_multiplier", "units"]
        if isinstance(self.lagrange_multiplier, LagrangeMultiplier):
            state_dicts.append("lagrange_multiplier.optimizer")
        return state_dicts, []
