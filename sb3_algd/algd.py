"""ALGD, Augmented Lagrangian-Guided Diffusion: the training loop."""

import io
import pathlib
from collections import defaultdict, deque
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar

import gymnasium as gym
import numpy as np
import torch as th
import torch.nn.functional as F
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, PyTorchObs, RolloutReturn, Schedule
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_algd.acceleration import (
    GraphedFunction,
    can_be_recorded,
    keep_freed_memory,
    move_batch,
    release_from_graph,
    set_learning_rate,
    split_batch,
    to_device,
)
from sb3_algd.buffers import (
    CostKey,
    CostNStepReplayBuffer,
    CostReplayBufferSamples,
    _CostStorage,
    cost_buffer_class,
    read_costs,
)
from sb3_algd.constraint import (
    DeclaredConstraint,
    EpisodeCostTracker,
    budget_per_unit_cost,
    settle_cost_limit,
    settle_episode_length,
)
from sb3_algd.guards import NormalizationBackup, WeightsBackup, check_finite, explain_environment_errors, warn_user
from sb3_algd.lagrangian import DEFAULT_MULTIPLIER_INIT, LagrangeMultiplier, augmented_lagrangian, estimate_risk
from sb3_algd.networks import EnsembleCritic
from sb3_algd.policies import CnnPolicy, DiffusionActor, DiffusionPolicy, MlpPolicy, MultiInputPolicy
from sb3_algd.score import ScorePairing, ScoreSpace, draw_score_samples, draw_score_states, estimate_score

SelfALGD = TypeVar("SelfALGD", bound="ALGD")

# multiplier_signal="episodes": how many recent episodes count
SIGNAL_EPISODES = 5
# Several batches are drawn from the replay buffer at once, as far as their observations take no more memory
BYTES_AT_ONCE = 32 * 2**20


class ALGD(OffPolicyAlgorithm):
    """
    Augmented Lagrangian-Guided Diffusion (ALGD): off-policy safe RL with a diffusion policy.
    Paper: https://arxiv.org/abs/2602.02924

    Maximises the return subject to a limit on the cost of an episode. The augmented Lagrangian of reward and cost critics is
    the energy that guides the policy's denoising process.

    The defaults are the paper's but for these; docs/results.md has both.

    - For one gradient step per environment step instead of about ten: ``gradient_steps=1``, ``learning_rate=1e-3``,
      ``tau=0.02``, ``target_update_interval=1`` (the paper's: 10, 3e-4, 0.005, 2) and SB3's ``learning_starts=100`` (5000).
    - To keep the limit: ``multiplier_signal="episodes"``, ``multiplier_space="projected"``,
      ``multiplier_learning_rate=1e-4``, ``bound_cost_targets=True`` (the paper's: ``"buffer"``, ``"log"``, 3e-4, False).
    - The paper's code also has ``use_policy_at_warmup=True`` and ``score_grad_through_chain=True``.

    :param policy: The policy model to use (DiffusionPolicy, MlpPolicy, CnnPolicy, MultiInputPolicy)
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
        during the rollout. (The paper's code does about 10 per step.)
    :param action_noise: the action noise type (None by default), added to the policy's own randomness
    :param replay_buffer_class: Replay buffer class to use. If ``None``, it will be automatically selected;
        SB3's own classes stand for their twins with costs in :mod:`sb3_algd.buffers`.
    :param replay_buffer_kwargs: Keyword arguments to pass to the replay buffer on creation,
        for instance ``dict(reward_cut_key="goal_met")``.
    :param optimize_memory_usage: Enable a memory efficient variant of the replay buffer
        at a cost of more complexity.
    :param n_steps: When n_step > 1, uses n-step returns (with the NStepReplayBuffer) for rewards and costs.
    :param target_update_interval: update the target networks every ``target_update_interval`` gradient steps,
        counted over the whole training.
    :param use_sde: Not supported: a diffusion policy has noise of its own.
    :param stats_window_size: Window size for the rollout logging, specifying the number of episodes to average
        the reported success rate, mean episode length, mean reward and mean cost over
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation, among them
        ``diffusion="ve"`` or ``"ddpm"``, see :class:`~sb3_algd.policies.DiffusionPolicy`
    :param verbose: Verbosity level: 0 for no output, 1 for info messages (such as device or wrappers used), 2 for
        debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run.
        Setting it to auto, the code will be run on the GPU if possible.
    :param cost_limit: Cost allowed per episode, one number or one per constraint. If ``None``, the limit that the environment
        declares (attributes ``cost_limit`` and ``cost_limit_discounted``), else 25 with a warning.
    :param cost_limit_discounted: Whether ``cost_limit`` is a sum discounted with ``cost_gamma`` instead of a plain sum.
        If ``None``, what the environment declares of its own limit, and a plain sum where you give the limit.
    :param episode_length: Horizon T that a plain limit is spread over. If ``None``, the environment's time limit,
        else 1000 with a warning.
    :param cost_gamma: the discount factor of costs
    :param cost_key: Key of ``info`` that holds a step's cost (a number or one per constraint), or a function of ``info``
    :param rho: Coefficient of the quadratic penalty; 0 gives the plain Lagrangian
    :param multiplier_init: Initial value of the Lagrange multipliers
    :param multiplier_learning_rate: Learning rate of the multipliers, a number or a schedule
    :param multiplier_max: Upper bound of the multipliers
    :param multiplier_space: ``"projected"`` or ``"log"`` (the paper's), see :class:`~sb3_algd.lagrangian.LagrangeMultiplier`
    :param multiplier_signal: What moves the multipliers: the costs of the last 5 training episodes (``"episodes"``; of fewer
        if ``stats_window_size`` is lower), the risk of the replay buffer's actions (``"buffer"``, the paper's), or the risk of
        the current policy's actions in the same states (``"policy"``). The last two are what the cost critics believe.
    :param score_temperature: Temperature beta of the energy, paper section on the score target
    :param n_score_samples: Number N of Monte-Carlo samples of the score target
    :param guidance_coef: Weight of the policy loss through the denoising chain
    :param score_coef: Weight of the score matching loss
    :param cost_risk_coef: Number of standard deviations over the cost critics that are added to their mean
    :param cost_target_risk_coef: Number of standard deviations over the target cost critics that are added to what each of
        them expects. It makes up for the policy's choice of actions whose cost is underestimated, as the minimum of the two
        reward critics does for those whose value is overestimated (the paper has none)
    :param bound_cost_targets: Whether what the target cost critics expect counts as no less than the lowest costs seen
        allow: 0 if there were no negative ones (the paper's code has no such bound)
    :param score_pairing: State that step k's score is learned at: the one ``"after"`` the step's update (the paper's code)
        or the one ``"before"`` it, where sampling evaluates the score
    :param score_space: ``"action"`` (the paper's): samples and gradient of the score target in action space;
        ``"latent"``: before the tanh, where the process runs, with the chain rule's factor
    :param clip_score_samples: Whether the score target's sample actions are clipped to [-1, 1] (the paper's are not)
    :param score_grad_through_chain: Whether the score loss also sends gradients back through the denoising chain
        (the paper's does)
    :param cost_critic_learning_rate: Learning rate of the cost critics, ``learning_rate`` if ``None``
    :param policy_learning_rate: Learning rate of the actor, ``learning_rate`` if ``None``
    :param use_policy_at_warmup: Whether the untrained policy acts before ``learning_starts`` (the paper's code)
        instead of uniformly random actions
    :param reduced_precision: Whether the networks' matrix products of an update are done in bfloat16 (autocast; weights,
        losses and optimizers stay in single precision). For its effect on speed and learning see docs/performance.md
    :param cuda_graph: Whether updates are recorded as a CUDA graph and replayed. Needs a CUDA device to have an effect, and an
        optimizer with the option ``capturable``, as Adam. Arguments such as ``rho`` must not be changed during ``learn()``
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "DiffusionPolicy": DiffusionPolicy,
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: DiffusionPolicy
    actor: DiffusionActor
    critic: EnsembleCritic
    critic_target: EnsembleCritic
    cost_critic: EnsembleCritic
    cost_critic_target: EnsembleCritic
    replay_buffer: _CostStorage | None

    def __init__(
        self,
        policy: str | type[DiffusionPolicy],
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
        use_sde: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        *,
        cost_limit: float | list[float] | np.ndarray | None = None,
        cost_limit_discounted: bool | None = None,
        episode_length: int | None = None,
        cost_gamma: float = 0.99,
        cost_key: CostKey = "cost",
        rho: float = 1.0,
        multiplier_init: float = DEFAULT_MULTIPLIER_INIT,
        multiplier_learning_rate: float | Schedule = 1e-4,
        multiplier_max: float = 100.0,
        multiplier_space: Literal["log", "projected"] = "projected",
        multiplier_signal: Literal["buffer", "policy", "episodes"] = "episodes",
        score_temperature: float = 1.0,
        n_score_samples: int = 4,
        guidance_coef: float = 1.0,
        score_coef: float = 0.1,
        cost_risk_coef: float = 1.0,
        cost_target_risk_coef: float = 0.0,
        bound_cost_targets: bool = True,
        score_pairing: ScorePairing = "after",
        score_space: ScoreSpace = "action",
        clip_score_samples: bool = False,
        score_grad_through_chain: bool = False,
        cost_critic_learning_rate: float | Schedule | None = None,
        policy_learning_rate: float | Schedule | None = None,
        use_policy_at_warmup: bool = False,
        reduced_precision: bool = False,
        cuda_graph: bool = False,
        _init_setup_model: bool = True,
    ) -> None:
        if use_sde or (policy_kwargs or {}).get("use_sde"):
            raise ValueError(
                "ALGD does not support gSDE (use_sde=True): its diffusion policy explores with the noise of the denoising "
                "process. Leave use_sde out; use action_noise for additional exploration."
            )
        super().__init__(
            policy,
            env,
            learning_rate,
            buffer_size,
            learning_starts,
            batch_size,
            tau,
            gamma,
            train_freq,
            gradient_steps,
            action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            optimize_memory_usage=optimize_memory_usage,
            n_steps=n_steps,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            sde_support=False,
            support_multi_env=True,
        )
        self.target_update_interval = target_update_interval
        self.cost_limit = cost_limit
        self.cost_limit_discounted = cost_limit_discounted
        self.episode_length = episode_length
        self.cost_gamma = cost_gamma
        self.cost_key = cost_key
        self.rho = rho
        self.multiplier_init = multiplier_init
        self.multiplier_learning_rate = multiplier_learning_rate
        self.multiplier_max = multiplier_max
        self.multiplier_space = multiplier_space
        self.multiplier_signal = multiplier_signal
        self.score_temperature = score_temperature
        self.n_score_samples = n_score_samples
        self.guidance_coef = guidance_coef
        self.score_coef = score_coef
        self.cost_risk_coef = cost_risk_coef
        self.cost_target_risk_coef = cost_target_risk_coef
        self.bound_cost_targets = bound_cost_targets
        self.score_pairing = score_pairing
        self.score_space = score_space
        self.clip_score_samples = clip_score_samples
        self.score_grad_through_chain = score_grad_through_chain
        self.cost_critic_learning_rate = cost_critic_learning_rate
        self.policy_learning_rate = policy_learning_rate
        self.use_policy_at_warmup = use_policy_at_warmup
        self.reduced_precision = reduced_precision
        self.cuda_graph = cuda_graph
        self._graphed_update: GraphedFunction | None = None
        self._declared: DeclaredConstraint | None = None
        self._settled: dict[str, Any] = {}
        self._cost_tracker: EpisodeCostTracker | None = None
        self._cost_reported = False
        self._missing_episode_reported = False
        self._weights_backup = WeightsBackup()
        self._normalization_backup = NormalizationBackup(None)

        if _init_setup_model:
            self._setup_model()

    def _setup_lr_schedule(self) -> None:
        super()._setup_lr_schedule()
        # None follows lr_schedule, also where a user has replaced it
        self.policy_lr_schedule = None if self.policy_learning_rate is None else FloatSchedule(self.policy_learning_rate)
        self.cost_critic_lr_schedule = (
            None if self.cost_critic_learning_rate is None else FloatSchedule(self.cost_critic_learning_rate)
        )
        self.multiplier_lr_schedule = FloatSchedule(self.multiplier_learning_rate)

    def _setup_model(self) -> None:
        self._check_arguments()
        self._setup_constraint()
        if self.replay_buffer is None:
            self.replay_buffer = self._make_replay_buffer()
        # SB3 fills in what it would have chosen, a buffer without costs among it: keep the arguments as the user gave them,
        # so that a saved model is loaded with the same ones
        given = {name: getattr(self, name) for name in ("policy_kwargs", "replay_buffer_class", "replay_buffer_kwargs")}
        self.policy_kwargs = {**self.policy_kwargs, "n_constraints": self.n_constraints}
        self.replay_buffer_kwargs = dict(self.replay_buffer_kwargs)
        super()._setup_model()
        self.__dict__.update(given)
        self._create_aliases()
        self.lagrange_multiplier = LagrangeMultiplier(
            self.n_constraints,
            self.multiplier_init,
            self.multiplier_lr_schedule(1),
            self.multiplier_max,
            self.multiplier_space,
        ).to(self.device)
        if self.cuda_graph and not all(map(can_be_recorded, self._optimizers())):
            raise ValueError(
                f"{self.policy.optimizer_class.__name__} cannot be recorded in a CUDA graph: leave cuda_graph out, or use "
                "th.optim.Adam."
            )

    def _optimizers(self) -> list[th.optim.Optimizer]:
        modules = (self.actor, self.critic, self.cost_critic, self.lagrange_multiplier)
        return [module.optimizer for module in modules]

    def _create_aliases(self) -> None:
        self.actor = self.policy.actor
        self.critic = self.policy.critic
        self.critic_target = self.policy.critic_target
        self.cost_critic = self.policy.cost_critic
        self.cost_critic_target = self.policy.cost_critic_target

    def _check_arguments(self) -> None:
        """Refuse arguments that cannot work, before anything is built."""
        if not isinstance(self.action_space, spaces.Box):
            # An AssertionError as from SB3's algorithms
            raise AssertionError(
                f"ALGD only supports continuous (Box) action spaces but {self.action_space} was provided: "
                "its diffusion policy samples real-valued actions. Wrap the environment to take a Box."
            )
        for name, choices in {
            "multiplier_signal": ("buffer", "policy", "episodes"),
            "score_pairing": ("after", "before"),
            "score_space": ("action", "latent"),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")
        for name in ("rho", "guidance_coef", "score_coef", "cost_risk_coef", "cost_target_risk_coef"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}.")
        if self.episode_length is not None and (self.episode_length < 1 or self.episode_length != int(self.episode_length)):
            raise ValueError(f"The episode length must be a whole number of steps, at least 1, got {self.episode_length}.")
        if "n_constraints" in self.policy_kwargs:
            raise ValueError("n_constraints follows from cost_limit: leave it out of policy_kwargs.")
        if not self.score_temperature > 0.0:
            raise ValueError(f"score_temperature must be > 0, got {self.score_temperature}.")
        for name in ("n_score_samples", "target_update_interval"):
            if getattr(self, name) < 1 or getattr(self, name) != int(getattr(self, name)):
                raise ValueError(f"{name} must be a whole number, at least 1, got {getattr(self, name)}.")

    def _setup_constraint(self) -> None:
        """Settle limit, horizon and budget, from the arguments or from what the environment declares."""
        # At loading: what is as it was saved was not given anew
        loaded = {name: value for name, value in self._settled.items() if np.array_equal(getattr(self, name), value)}
        limits, self.cost_limit_discounted = settle_cost_limit(self.cost_limit, self.cost_limit_discounted, self.env)
        before = len(self._settled.get("cost_limit", limits))
        if before != len(limits):
            raise ValueError(
                f"cost_limit has {len(limits)} value(s), {limits.tolist()}, but the model was trained with {before} "
                "constraint(s), which its cost critics are made for: give one limit per constraint, or train a new model."
            )
        self.cost_limit = limits
        self.n_constraints = len(limits)
        self.episode_length = settle_episode_length(self.episode_length, self.env, warn=not self.cost_limit_discounted)
        self._settled = {"cost_limit": limits, "episode_length": self.episode_length}
        self._compare_constraint(loaded)
        # Computed in any case: it also checks horizon and discount factor
        factor = budget_per_unit_cost(self.episode_length, self.cost_gamma)
        self._budget_factor = 1.0 if self.cost_limit_discounted else factor
        self.cost_budget = limits * self._budget_factor
        self._budget = th.as_tensor(self.cost_budget, dtype=th.float32, device=self.device)
        # Shape (n_constraints,); no bound until _set_cost_floor() knows one
        self._cost_floor = th.full_like(self._budget, -np.inf)
        if self.verbose >= 1:
            unit = f"discounted with {self.cost_gamma:g}" if self.cost_limit_discounted else "plain sum"
            print(
                f"Cost limit per episode ({unit}): {limits.tolist()}, horizon: {self.episode_length} steps, "
                f"budget of the cost critics: {self.cost_budget.tolist()}"
            )

    def _compare_constraint(self, in_force: dict[str, Any]) -> None:
        """
        Warn if the environment declares another constraint than the one before.

        :param in_force: Limit and horizon, where they come from the environment before or from its model
        """
        if self.env is None:
            return
        declared = DeclaredConstraint(self.env)
        if self._declared is not None:
            declared.warn_of_changes(self._declared, in_force)
        self._declared = declared

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Change the environment, see SB3. Limit and horizon stay, with a warning where the environment declares others.

        :param env: The environment for learning a policy
        :param force_reset: Force call to ``reset()`` before training to avoid unexpected behavior.
        """
        super().set_env(env, force_reset)
        self._compare_constraint(self._settled)

    def _make_replay_buffer(self) -> _CostStorage:
        if self.replay_buffer_class is not None:
            requested_class = self.replay_buffer_class
        elif isinstance(self.observation_space, spaces.Dict):
            requested_class = DictReplayBuffer
            if self.n_steps > 1:
                # An AssertionError as from SB3's algorithms
                raise AssertionError("N-step returns are not supported for Dict observation spaces: use n_steps=1.")
        else:
            requested_class = NStepReplayBuffer if self.n_steps > 1 else ReplayBuffer
        buffer_class = cost_buffer_class(requested_class)
        kwargs: dict[str, Any] = {"n_constraints": self.n_constraints, "cost_key": self.cost_key}
        if issubclass(buffer_class, CostNStepReplayBuffer):
            kwargs.update(gamma=self.gamma, cost_gamma=self.cost_gamma)
            if self.replay_buffer_class is None:
                kwargs["n_steps"] = self.n_steps
        if issubclass(buffer_class, HerReplayBuffer):
            assert self.env is not None, "You must pass an environment when using `HerReplayBuffer`"
            kwargs["env"] = self.env
        return buffer_class(
            self.buffer_size,
            self.observation_space,
            self.action_space,
            # In CPU memory: train() moves whole batches to the device
            device="cpu",
            n_envs=self.n_envs,
            optimize_memory_usage=self.optimize_memory_usage,
            **{**kwargs, **self.replay_buffer_kwargs},
        )

    def train(self, gradient_steps: int, batch_size: int = 256) -> None:
        """
        Update critics, policy and multipliers.

        :param gradient_steps: Number of updates
        :param batch_size: Number of transitions per update
        """
        assert self.replay_buffer is not None
        # Switch to train mode (this affects batch norm / dropout)
        self.policy.set_training_mode(True)
        self._update_learning_rates()
        # Tensors are collected and read once at the end: reading each would wait for the device each time
        logs: dict[str, list[th.Tensor]] = defaultdict(list)
        episode_risk = self._episode_risk()
        self._set_cost_floor()

        for batch in self._sample_batches(gradient_steps, batch_size):
            self._weights_backup.renew(self)
            self._n_updates += 1
            for name, value in (self._graphed_update or self._update)(batch, episode_risk).items():
                logs[name].append(value)
            # Counted over the whole training, or an interval of 2 would never be met with one gradient step per call
            if self._n_updates % self.target_update_interval == 0:
                self.policy.update_targets(self.tau)
                # Copy running stats, see SB3's GH issue #996
                self.policy.copy_batch_norm_stats()

        means = {name: th.stack(values).mean(dim=0) for name, values in logs.items()}
        self._log_training({**means, "multiplier": self.lagrange_multiplier.value})

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

    def _sample_batches(self, gradient_steps: int, batch_size: int) -> Iterator[CostReplayBufferSamples]:
        """Batches on the model's device; several are drawn and moved there at once."""
        assert self.replay_buffer is not None
        while gradient_steps > 0:
            n_batches = min(gradient_steps, max(BYTES_AT_ONCE // self._batch_bytes(batch_size), 1))
            samples: CostReplayBufferSamples = self.replay_buffer.sample(  # type: ignore[assignment]
                n_batches * batch_size, env=self._vec_normalize_env
            )
            yield from split_batch(samples if self.device.type == "cpu" else move_batch(samples, self.device), n_batches)
            gradient_steps -= n_batches

    def _batch_bytes(self, batch_size: int) -> int:
        """Size of a batch's observations and next observations."""
        obs_space = self.observation_space
        parts = obs_space.spaces.values() if isinstance(obs_space, spaces.Dict) else [obs_space]
        return 2 * batch_size * sum(int(np.prod(part.shape or (1,))) * np.dtype(part.dtype).itemsize for part in parts)

    def _update_learning_rates(self) -> None:
        progress = self._current_progress_remaining
        self.logger.record("train/learning_rate", self.lr_schedule(progress))
        for optimizer, schedule in (
            (self.critic.optimizer, None),
            (self.actor.optimizer, self.policy_lr_schedule),
            (self.cost_critic.optimizer, self.cost_critic_lr_schedule),
            (self.lagrange_multiplier.optimizer, self.multiplier_lr_schedule),
        ):
            set_learning_rate(optimizer, (schedule or self.lr_schedule)(progress))

    def _update(self, batch: CostReplayBufferSamples, episode_risk: th.Tensor | None) -> dict[str, th.Tensor]:
        """
        One update of critics, actor and multipliers, without a look at any value.

        :param batch: Transitions
        :param episode_risk: See :meth:`_episode_risk`
        :return: Losses, gradient norm and risks
        """
        precision = partial(th.autocast, self.device.type, th.bfloat16, enabled=self.reduced_precision)
        with precision():
            metrics, buffer_risk = self._update_critics(batch)
        # Another region: within one, autocast keeps its copies of the critics' weights, which have just changed
        with precision():
            policy_metrics, policy_risk = self._update_policy(batch.observations)
        risk = {"buffer": buffer_risk, "policy": policy_risk, "episodes": episode_risk}[self.multiplier_signal]
        # None before the first episode has ended
        if risk is not None:
            self.lagrange_multiplier.update(risk - self._budget)
        return {**metrics, **policy_metrics, "risk": buffer_risk, "policy_risk": policy_risk}

    def _update_critics(self, batch: CostReplayBufferSamples) -> tuple[dict[str, th.Tensor], th.Tensor]:
        """
        One step of reward and cost critics towards their bootstrapped targets.

        :param batch: Transitions
        :return: Losses, and the risk of the stored actions before the step, shape (n_constraints,)
        """
        discounts = self.gamma if batch.discounts is None else batch.discounts
        cost_discounts = self.cost_gamma if batch.cost_discounts is None else batch.cost_discounts
        with th.no_grad():
            next_values, next_costs = self._next_values(batch.next_observations)
            if self.cost_target_risk_coef > 0.0 and len(next_costs) > 1:
                next_costs = next_costs + self.cost_target_risk_coef * next_costs.std(dim=0)
            # A multiplier that pulls hard otherwise finds actions whose cost is underestimated, down to below zero
            next_costs = th.maximum(next_costs, self._cost_floor)
            targets = batch.rewards + (1 - batch.dones) * discounts * next_values
            # Each member is trained against its own target
            cost_targets = batch.costs + (1 - batch.cost_dones) * cost_discounts * next_costs

        # Sum over the reward critics of the mean squared error; over the cost critics the mean
        values = self.critic(batch.observations, batch.actions)
        critic_loss = (values - targets).square().mean(dim=(1, 2)).sum()
        cost_values = self.cost_critic(batch.observations, batch.actions)
        cost_critic_loss = F.mse_loss(cost_values, cost_targets)
        self.critic.optimizer.zero_grad()
        self.cost_critic.optimizer.zero_grad()
        # They have no parameter in common
        (critic_loss + cost_critic_loss).backward()
        self.critic.optimizer.step()
        self.cost_critic.optimizer.step()

        risk = estimate_risk(cost_values.detach(), self.cost_risk_coef).mean(dim=0)
        return {"critic_loss": critic_loss.detach(), "cost_critic_loss": cost_critic_loss.detach()}, risk

    def _next_values(self, next_observations: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        """
        What the target critics expect of the current policy.

        :param next_observations: States
        :return: Values, shape (batch, 1), and costs of each member, shape (E, batch, n_constraints)
        """
        actions = self.actor(next_observations)
        values = self.critic_target(next_observations, actions).amin(dim=0)
        return values, self.cost_critic_target(next_observations, actions)

    def _update_policy(self, observations: PyTorchObs) -> tuple[dict[str, th.Tensor], th.Tensor]:
        """
        One step of the actor: guidance by the energy through the denoising chain, and matching of the energy's score.

        :param observations: States
        :return: Losses and gradient norm, and the risk of the policy's actions, shape (n_constraints,)
        """
        denoiser, latents = self.actor.denoise(observations)
        actions = th.tanh(latents[-1])
        step, latent_k = draw_score_states(latents, self.score_pairing)
        if not self.score_grad_through_chain:
            latent_k = latent_k.detach()
        samples, slope = draw_score_samples(
            latent_k.detach(),
            self.actor.process.score_std[step].unsqueeze(1),
            self.n_score_samples,
            self.score_space,
            self.clip_score_samples,
        )

        # Row 0 holds the policy's actions, the others the score samples
        energy, energy_grad, risk = self._energy(observations, th.cat([actions.detach().unsqueeze(0), samples]))
        # Has the gradient of the mean energy of the policy's actions, without another pass through the critics
        guidance_loss = (actions * energy_grad[0]).sum(dim=-1).mean()
        target = estimate_score(energy[1:], slope * energy_grad[1:], self.score_temperature)
        score_loss = F.mse_loss(denoiser.score(th.tanh(latent_k), step), target)

        self.actor.optimizer.zero_grad()
        (self.guidance_coef * guidance_loss + self.score_coef * score_loss).backward()
        gradients = [parameter.grad for parameter in self.actor.parameters() if parameter.grad is not None]
        grad_norm = th.nn.utils.get_total_norm(gradients)
        self.actor.optimizer.step()

        metrics = {
            "guidance_loss": energy[0].mean(),
            "score_loss": score_loss.detach(),
            "policy_grad_norm": grad_norm,
        }
        return metrics, risk[0].mean(dim=0)

    def _energy(self, observations: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        Augmented Lagrangian of several actions in the same states, and its gradient.

        :param observations: States, batch first
        :param actions: Shape (n, batch, action_dim)
        :return: Energy, shape (n, batch); gradient with respect to the actions, shape (n, batch, action_dim);
            risk, shape (n, batch, n_constraints); all detached
        """
        with th.no_grad():
            critic = self.critic.bind(self.critic.features(observations))
            cost_critic = self.cost_critic.bind(self.cost_critic.features(observations))
            values, cost_values = critic.values(actions), cost_critic.values(actions)
        # Through the few operations between values and energy with autograd, through the critics by hand
        values.requires_grad_()
        cost_values.requires_grad_()
        risk = estimate_risk(cost_values, self.cost_risk_coef)
        value = values.amin(dim=0).squeeze(-1)
        energy = augmented_lagrangian(value, risk, self.lagrange_multiplier.value, self._budget, self.rho)
        value_gradients, cost_gradients = th.autograd.grad(energy.sum(), [values, cost_values])
        with th.no_grad():
            energy_grad = critic.action_gradient(value_gradients) + cost_critic.action_gradient(cost_gradients)
        return energy.detach(), energy_grad, risk.detach()

    def _recent_cost(self) -> np.ndarray | None:
        """Mean cost of the last training episodes in the budget's unit, shape (n_constraints,); None before one has ended."""
        tracker = self._cost_tracker
        if tracker is None:
            return None
        recent = tracker.discounted_costs if self.cost_limit_discounted else tracker.episode_costs
        return self._budget_factor * np.mean(list(recent)[-SIGNAL_EPISODES:], axis=0) if recent else None

    def _episode_risk(self) -> th.Tensor | None:
        """The same, on the device, where it moves the multipliers."""
        if self.multiplier_signal != "episodes" or self._cost_tracker is None:
            return None
        cost = self._recent_cost()
        if cost is None:
            self._warn_no_episode(self._cost_tracker)
            return None
        return to_device(th.as_tensor(cost, dtype=th.float32), self.device)

    def _warn_no_episode(self, tracker: EpisodeCostTracker) -> None:
        """
        Warn once if there should have been an end of an episode by now.

        :param tracker: What has counted the steps
        """
        assert self.episode_length is not None
        if self._missing_episode_reported or tracker.total_steps <= 2 * self.n_envs * self.episode_length:
            return
        self._missing_episode_reported = True
        warn_user(
            f"No episode has ended in {tracker.total_steps} steps, so the Lagrange multiplier does not move "
            f"(multiplier_signal='episodes'; the horizon is {self.episode_length} steps). Wrap the environment in a "
            "gymnasium.wrappers.TimeLimit, or use multiplier_signal='policy'."
        )

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
            self._record_each("train/episode_risk", cost)

    def _record_each(self, key: str, values: np.ndarray) -> None:
        """Record a value, or each of several under a numbered key."""
        for index, value in enumerate(values):
            self.logger.record(key if len(values) == 1 else f"{key}_{index}", float(value))

    @property
    def ep_cost_buffer(self) -> deque[np.ndarray]:
        """Costs of recent training episodes, arrays of shape (n_constraints,), as ``ep_info_buffer`` for rewards."""
        assert self._cost_tracker is not None, "No episode was run yet: call learn() first"
        return self._cost_tracker.episode_costs

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        environments_reset = reset_num_timesteps or self._last_obs is None
        if self.replay_buffer is not None:
            # SB3 gives a loaded one the model's device, but train() moves whole batches there
            self.replay_buffer.device = th.device("cpu")
            if environments_reset:
                # Or n-step sums would run on into the episodes that start now
                self.replay_buffer.end_episodes()
        if self._cost_tracker is None or reset_num_timesteps:
            self._cost_tracker = EpisodeCostTracker(self.n_envs, self.n_constraints, self.cost_gamma, self._stats_window_size)
        elif environments_reset:
            self._cost_tracker.start_episodes(self.n_envs)
        self._start_recording()
        if self.device.type == "cpu":
            keep_freed_memory()
        self._normalization_backup = NormalizationBackup(self._vec_normalize_env)
        arguments = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        if environments_reset:
            assert self._last_obs is not None
            self._check_first_observation(self._last_obs)
        return arguments

    def _start_recording(self) -> None:
        self._graphed_update = GraphedFunction(self._update, self._optimizers()) if self.cuda_graph else None

    def set_parameters(
        self, load_path_or_dict: str | dict[str, Any], exact_match: bool = True, device: th.device | str = "auto"
    ) -> None:
        """
        Load parameters from a file or a dictionary, see SB3.

        :param load_path_or_dict: See SB3
        :param exact_match: See SB3
        :param device: See SB3
        """
        super().set_parameters(load_path_or_dict, exact_match, device)
        for optimizer in self._optimizers():
            release_from_graph(optimizer)
        # A recording would go on with the optimizer states that have just been replaced
        self._start_recording()

    def _check_first_observation(self, obs: np.ndarray | dict[str, np.ndarray]) -> None:
        """
        Look at an observation before the policy acts on it.

        :param obs: From the environments, which may have been reset
        :raises ValueError: If it is not finite
        """
        # Normalising clips, which hides infinity
        original = obs if self._vec_normalize_env is None else self._vec_normalize_env.old_obs
        try:
            check_finite("observation", original)
        except ValueError:
            self._normalization_backup.restore()
            self._last_obs = None  # the next learn() starts from a reset
            raise

    def collect_rollouts(self, *args: Any, **kwargs: Any) -> RolloutReturn:
        """
        Collect experiences and store them into the replay buffer, see SB3.

        :param args: See SB3
        :param kwargs: See SB3
        :return: Number of steps and episodes, and whether to go on
        :raises ValueError: If the environment's ``step`` returns six values, or what it returns is not finite
        :raises RuntimeError: If the process of an environment died
        """
        stored = False
        try:
            with explain_environment_errors():
                rollout = super().collect_rollouts(*args, **kwargs)
            stored = rollout.continue_training
            return rollout
        except (ValueError, gym.error.Error):
            self._normalization_backup.restore()
            raise
        finally:
            if not stored:
                # An error, or a callback that stops: the environments took a step that is not in the replay buffer. What comes
                # next would look as if it followed on the step before: the next learn() starts from a reset
                self._last_obs = None

    def _store_transition(self, replay_buffer: ReplayBuffer, buffer_action: np.ndarray, new_obs: Any, *args: Any) -> None:
        super()._store_transition(replay_buffer, buffer_action, new_obs, *args)
        # The first of a new episode among them, which the buffer sees with the next step only
        self._check_first_observation(new_obs)

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer from a pickle file.

        :param path: Path to the pickled replay buffer.
        :param truncate_last_traj: See SB3, for goal-conditioned buffers.
        :raises ValueError: If the buffer has no costs, or another number of them; the present buffer stays.
        """
        present = getattr(self, "replay_buffer", None)
        super().load_replay_buffer(path, truncate_last_traj)
        loaded = self.replay_buffer
        if isinstance(loaded, _CostStorage) and not hasattr(loaded, "lowest_costs"):
            # Saved by a version that did not note them
            loaded.lowest_costs = np.minimum(loaded.costs.min(axis=(0, 1)), 0.0)
        if not isinstance(loaded, _CostStorage) or loaded.n_constraints != self.n_constraints:
            self.replay_buffer = present
            raise ValueError(
                f"The replay buffer in {path} holds {getattr(loaded, 'n_constraints', 0)} cost(s) per step, but the model has "
                f"{self.n_constraints} constraint(s): load one that was saved by a model with the same constraints."
            )

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        self._normalization_backup = NormalizationBackup(self._vec_normalize_env)
        return super()._sample_action(0 if self.use_policy_at_warmup else learning_starts, action_noise, n_envs)

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        super()._update_info_buffer(infos, dones)
        assert self._cost_tracker is not None
        assert dones is not None
        costs, reported = read_costs(infos, self.cost_key, self.n_constraints)
        self._cost_tracker.update(costs, dones)
        if not self._cost_reported:
            self._cost_reported = reported
            if not reported and dones.any():
                self._warn_no_cost()

    def _warn_no_cost(self) -> None:
        # Said once, whether or not costs appear later
        self._cost_reported = True
        warn_user(
            f"The environment reported no cost (info[{self.cost_key!r}]) so far: a missing cost is treated as 0, "
            "so the constraint never binds. Name the right key with cost_key=..., or use an algorithm without constraints."
        )

    def dump_logs(self) -> None:
        """
        Write log data.
        """
        tracker = self._cost_tracker
        assert tracker is not None
        if len(tracker.episode_costs) > 0:
            self._record_each("rollout/ep_cost_mean", np.mean(tracker.episode_costs, axis=0))
            if self.cost_limit_discounted:
                self._record_each("rollout/ep_cost_discounted_mean", np.mean(tracker.discounted_costs, axis=0))
        self._record_each("rollout/cost_rate", tracker.cost_rate)
        self._record_each("rollout/cost_limit", np.asarray(self.cost_limit))
        self.logger.record("rollout/horizon", self.episode_length)
        super().dump_logs()

    def learn(
        self: SelfALGD,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "ALGD",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfALGD:
        """
        Return a trained model.

        :param total_timesteps: The total number of samples (env steps) to train on
        :param callback: callback(s) called at every step with state of the algorithm.
        :param log_interval: The number of episodes before logging.
        :param tb_log_name: the name of the run for TensorBoard logging
        :param reset_num_timesteps: whether or not to reset the current timestep number (used in logging)
        :param progress_bar: Display a progress bar using tqdm and rich.
        :return: the trained model
        """
        super().learn(
            # Given as 1e6 more often than not
            total_timesteps=int(total_timesteps),
            callback=callback,
            log_interval=log_interval,
            tb_log_name=tb_log_name,
            reset_num_timesteps=reset_num_timesteps,
            progress_bar=progress_bar,
        )
        if not self._cost_reported and self._cost_tracker is not None and self._cost_tracker.total_steps > 0:
            self._warn_no_cost()
        return self

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "actor",
            "critic",
            "critic_target",
            "cost_critic",
            "cost_critic_target",
            "_budget",
            "_cost_floor",
            "_graphed_update",
            "_weights_backup",
            "_normalization_backup",
        ]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts = [
            "policy",
            "actor.optimizer",
            "critic.optimizer",
            "cost_critic.optimizer",
            "lagrange_multiplier",
            "lagrange_multiplier.optimizer",
        ]
        return state_dicts, []
