"""SAC-Lagrangian: SAC whose actor minimises the Lagrangian of reward and cost critics."""

from typing import Any, ClassVar, Literal

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, Schedule
from stable_baselines3.sac.policies import Actor

from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm
from sb3_algd.common.episode_costs import CostKey
from sb3_algd.common.lagrange import PerConstraint
from sb3_algd.sac_lag.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, SACLagPolicy


class SACLag(ConstrainedOffPolicyAlgorithm):
    """
    SAC-Lagrangian: off-policy safe RL with a Gaussian policy, the usual baseline.
    SAC: https://arxiv.org/abs/1801.01290, with a Lagrangian: https://arxiv.org/abs/2002.08550

    Maximises the return and the policy's entropy subject to a limit on the cost of an episode. Critics, budget, multipliers
    and replay buffer are those of :class:`~sb3_algd.ALGD`, so the difference between the two is the diffusion policy.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy)
    :param env: The environment to learn from (if registered in Gym, can be str); it reports costs in ``info["cost"]``
    :param learning_rate: learning rate for all optimizers that have none of their own,
        it can be a function of the current progress remaining (from 1 to 0)
    :param buffer_size: size of the replay buffer
    :param learning_starts: how many steps of the model to collect transitions for before learning starts
    :param batch_size: Minibatch size for each gradient update
    :param tau: the soft update coefficient ("Polyak update", between 0 and 1)
    :param gamma: the discount factor of rewards
    :param train_freq: Update the model every ``train_freq`` steps. Alternatively pass a tuple of frequency and unit
        like ``(5, "step")`` or ``(2, "episode")``.
    :param gradient_steps: How many gradient steps to do after each rollout (see ``train_freq``)
        Set to ``-1`` means to do as many gradient steps as steps done in the environment
        during the rollout.
    :param action_noise: the action noise type (None by default), added to the policy's own randomness
    :param replay_buffer_class: Replay buffer class to use. If ``None``, it will be automatically selected;
        SB3's own classes stand for their twins with costs in :mod:`sb3_algd.common.buffers`.
    :param replay_buffer_kwargs: Keyword arguments to pass to the replay buffer on creation,
        for instance ``dict(reward_cut_key="goal_met")``.
    :param optimize_memory_usage: Enable a memory efficient variant of the replay buffer
        at a cost of more complexity.
    :param n_steps: When n_step > 1, uses n-step returns (with the NStepReplayBuffer) for rewards and costs.
    :param target_update_interval: update the target networks every ``target_update_interval`` gradient steps,
        counted over the whole training.
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
        the reported success rate, mean episode length, mean reward and mean cost over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation,
        see :class:`~sb3_algd.sac_lag.policies.SACLagPolicy`
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for
        debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run.
        Setting it to auto, the code will be run on the GPU if possible.
    :param cost_limit: Cost allowed per episode, one number or one per constraint. If ``None``, the limit that the environment
        declares (attributes ``cost_limit`` and ``cost_limit_discounted``), else 25 with a warning.
    :param cost_limit_discounted: Whether ``cost_limit`` is a sum discounted with ``cost_limit_gamma`` instead of a plain sum.
        If ``None``, the unit that the environment declares, else a plain sum.
    :param cost_limit_gamma: The discount factor that a discounted ``cost_limit`` is meant with; nothing else
    :param episode_length: Horizon T that a limit is spread over. If ``None``, the environment's time limit,
        else 1000 with a warning.
    :param cost_gamma: the discount factor with which the cost critics learn; the limit is converted into their unit
    :param cost_key: Key of ``info`` that holds a step's cost (a number or one per constraint), or a function of ``info``
    :param penalty: What weighs a cost: one coefficient for all states and actions (``"expectation"``), the augmented
        Lagrangian of the whole problem, whose limit is on the expected cost of an episode; or the paper's
        ``"pointwise"``, a coefficient that grows with the risk of the single action, for costs of every step such as speed
    :param rho: Coefficient of the quadratic penalty, one number or one per constraint; 0 gives the plain Lagrangian. With
        ``"expectation"`` it is the proportional part of the controller: what the multiplier is larger by at a cost of twice
        the limit (nothing where ``multiplier_signal`` is ``"buffer"``). With ``"pointwise"`` it is the paper's rho (1 there),
        per unit of the energy, see ``normalize``
    :param constraint_start: Share of the training, from 0 to 1, after which the constraint begins to act; until then the
        policy learns without it. Once it acts it goes on to, also in a later ``learn()``. With 0 (the paper's) the
        multiplier moves from the first episode on; ``init_value`` in ``multiplier_kwargs`` gives pressure before that
    :param multiplier_kwargs: Arguments of what ``multiplier_signal`` names. For ``"episodes"``,
        :class:`~sb3_algd.common.lagrange.EpisodeController`: ``init_value``, ``learning_rate`` (per episode of up to 400
        steps and relative violation), ``max_value``, ``confidence`` (standard errors that are added to the mean cost). For
        ``"buffer"``, :class:`~sb3_algd.common.lagrange.LagrangeMultiplier`: ``init_value``, ``learning_rate`` (of Adam, or a
        schedule), ``max_value``. One ``init_value`` for all or one per constraint
    :param multiplier_signal: What the multipliers are updated from: once per finished episode from what recent ones have cost
        (``"episodes"``, a PI controller of the relative violation, https://arxiv.org/abs/2007.03964), or once per update from
        the risk that the cost critics expect of the replay buffer's actions (``"buffer"``, the paper's dual ascent)
    :param normalize: Whether critics learn rewards and costs in units of their discounted sums, and the energy is measured in
        units of its slopes per unit of action and divided by one plus the sum of the multipliers, so that the same arguments
        serve rewards and costs of any scale (the paper has none of it)
    :param cost_risk_coef: Number of standard deviations over the cost critics that are added to their mean
    :param cost_target_risk_coef: Number of standard deviations over the target cost critics that are added to what each of
        them expects. It makes up for the policy's choice of actions whose cost is underestimated, as the minimum of the two
        reward critics does for those whose value is overestimated
    :param bound_cost_targets: Whether what the target cost critics expect counts as no less than the lowest costs seen
        allow: 0 if there were no negative ones
    :param actor_learning_rate: Learning rate of the actor, ``learning_rate`` if ``None``
    :param cost_critic_learning_rate: Learning rate of the cost critics, ``learning_rate`` if ``None``
    :param ent_coef: Entropy regularization coefficient, a number >= 0. ``"auto"`` to learn it automatically,
        ``"auto_0.1"`` to start from 0.1
    :param target_entropy: target entropy when learning ``ent_coef``, ``"auto"`` for minus the number of action dimensions
    :param use_policy_at_warmup: Whether the untrained policy acts before ``learning_starts``
        instead of uniformly random actions
    :param policy_delay: Number of updates of the critics per update of the policy
    :param reduced_precision: Whether the networks' matrix products of an update are done in bfloat16 (autocast; weights,
        losses, risks and optimizers stay in single precision). ``"auto"``: where updates are compiled and the device has
        units for them (AMX or AVX512-BF16, tensor cores)
    :param compile: Whether updates are compiled with ``torch.compile``, which takes up to a minute at the start of training.
        ``"auto"``: for a ``learn()`` of at least 5,000 updates in bfloat16, or 10,000 in single precision, where a C++
        compiler (CPU) or Triton (GPU) is found. Random numbers are the same, results differ by rounding. See
        docs/performance.md
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: SACLagPolicy
    actor: Actor

    def __init__(
        self,
        policy: str | type[SACLagPolicy],
        env: GymEnv | str,
        learning_rate: float | Schedule = 1e-3,
        buffer_size: int = 1_000_000,  # 1e6
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 0.02,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        target_update_interval: int = 1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        *,
        cost_limit: PerConstraint | None = None,
        cost_limit_discounted: bool | None = None,
        cost_limit_gamma: float = 0.99,
        episode_length: int | None = None,
        cost_gamma: float = 0.95,
        cost_key: CostKey = "cost",
        penalty: Literal["expectation", "pointwise"] = "expectation",
        rho: PerConstraint = 0.5,
        constraint_start: float = 0.2,
        multiplier_kwargs: dict[str, Any] | None = None,
        multiplier_signal: Literal["episodes", "buffer"] = "episodes",
        normalize: bool = True,
        cost_risk_coef: float = 1.0,
        cost_target_risk_coef: float = 0.5,
        bound_cost_targets: bool = True,
        actor_learning_rate: float | Schedule | None = None,
        cost_critic_learning_rate: float | Schedule | None = None,
        ent_coef: str | float = "auto",
        target_entropy: str | float = "auto",
        use_policy_at_warmup: bool = False,
        policy_delay: int = 2,
        reduced_precision: bool | Literal["auto"] = "auto",
        compile: bool | Literal["auto"] = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            buffer_size=buffer_size,
            learning_starts=learning_starts,
            batch_size=batch_size,
            tau=tau,
            gamma=gamma,
            train_freq=train_freq,
            gradient_steps=gradient_steps,
            action_noise=action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            target_update_interval=target_update_interval,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            cost_limit=cost_limit,
            cost_limit_discounted=cost_limit_discounted,
            cost_limit_gamma=cost_limit_gamma,
            episode_length=episode_length,
            cost_gamma=cost_gamma,
            cost_key=cost_key,
            penalty=penalty,
            rho=rho,
            constraint_start=constraint_start,
            normalize=normalize,
            multiplier_kwargs=multiplier_kwargs,
            multiplier_signal=multiplier_signal,
            cost_risk_coef=cost_risk_coef,
            cost_target_risk_coef=cost_target_risk_coef,
            bound_cost_targets=bound_cost_targets,
            actor_learning_rate=actor_learning_rate,
            cost_critic_learning_rate=cost_critic_learning_rate,
            use_policy_at_warmup=use_policy_at_warmup,
            policy_delay=policy_delay,
            reduced_precision=reduced_precision,
            compile=compile,
        )
        self.ent_coef = ent_coef
        self.target_entropy = target_entropy
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        super()._setup_model()
        self._target_entropy = (
            -float(np.prod(self.action_space.shape)) if self.target_entropy == "auto" else float(self.target_entropy)
        )
        # As in SB3's SAC: the logarithm is learned, a fixed coefficient has neither logarithm nor optimizer
        self.log_ent_coef: th.Tensor | None = None
        self.ent_coef_optimizer: th.optim.Adam | None = None
        self.ent_coef_tensor = th.full((1,), self._initial_ent_coef(), device=self.device)
        if self._learns_ent_coef:
            self.log_ent_coef = self.ent_coef_tensor.log().requires_grad_(True)
            self.ent_coef_optimizer = th.optim.Adam([self.log_ent_coef], lr=self.lr_schedule(1))

    def _check_arguments(self) -> None:
        super()._check_arguments()
        learns = isinstance(self.ent_coef, str) and self.ent_coef.startswith("auto")
        if learns != getattr(self, "_learns_ent_coef", learns):
            kind = "a number" if learns else "'auto' or 'auto_<number>'"
            raise ValueError(f"`ent_coef` must be {kind}, as the model was saved, got {self.ent_coef!r}.")
        self._learns_ent_coef = learns

    def _initial_ent_coef(self) -> float:
        if self.ent_coef == "auto":
            return 1.0
        return float(self.ent_coef.removeprefix("auto_") if isinstance(self.ent_coef, str) else self.ent_coef)

    def _current_ent_coef(self) -> th.Tensor:
        return self.ent_coef_tensor if self.log_ent_coef is None else self.log_ent_coef.exp()

    def _actor_optimizers(self) -> list[th.optim.Optimizer]:
        optimizers = super()._actor_optimizers()
        return optimizers if self.ent_coef_optimizer is None else [*optimizers, self.ent_coef_optimizer]

    def _next_actions(self, next_observations: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        actions, log_prob = self.actor.action_log_prob(next_observations)
        # The entropy is part of the reward
        # In the unit of the critics, as the actor weighs it against them
        terms = self._energy_terms(self.units.moments)
        return actions, -self._current_ent_coef() * terms.slopes[0] / terms.weight * log_prob.unsqueeze(1)

    def _actor_loss(self, observations: PyTorchObs) -> tuple[th.Tensor, dict[str, th.Tensor], th.Tensor, th.Tensor]:
        actions, log_prob = self.actor.action_log_prob(observations)
        ent_coef = self._current_ent_coef().detach()
        with th.no_grad():
            # The energy's units need a second action per state
            others, _ = self.actor.action_log_prob(observations)
        energy, energy_grad, risk, moments = self._energy(observations, th.stack([actions.detach(), others]))
        # Has the gradient of the mean energy, without another pass through the critics
        loss = (actions * energy_grad[0]).sum(dim=-1).mean() + (ent_coef * log_prob).mean()
        if self.log_ent_coef is not None:
            loss = loss - (self.log_ent_coef * (log_prob.detach() + self._target_entropy)).mean()
        return loss, {"energy": energy[0].mean(), "ent_coef": ent_coef.squeeze()}, risk[0].mean(dim=0), moments

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "log_ent_coef", "ent_coef_tensor", "ent_coef_optimizer"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, variables = super()._get_torch_save_params()
        if not self._learns_ent_coef:
            # It follows from the argument, which may be given anew to load(), a fixed one for a fixed one
            return state_dicts, variables
        return [*state_dicts, "ent_coef_optimizer"], [*variables, "log_ent_coef"]
