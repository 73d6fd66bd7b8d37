"""What every algorithm's update does: critics, multipliers, learning rates; and which arguments are refused."""

import copy
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_algd import ALGD, SACLag
from sb3_algd.common.batches import sample_batches
from sb3_algd.common.buffers import CostReplayBufferSamples
from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm
from sb3_algd.common.lagrange import LagrangeMultiplier
from tests.conftest import PAPER, SMALL, Algorithm, make_env, make_model, make_model_of, same, weights


def first_batch(model: ConstrainedOffPolicyAlgorithm, size: int = 16) -> CostReplayBufferSamples:
    assert model.replay_buffer is not None
    return next(iter(sample_batches(model.replay_buffer, 1, size, model.device, None)))


@pytest.mark.parametrize(("bound", "lowest", "expected"), [(True, 0.0, 0.0), (True, -0.02, -0.2), (False, 0.0, -5.0)])
def test_expected_costs_are_no_lower_than_the_costs_seen_allow(
    bound: bool, lowest: float, expected: float, algorithm: Algorithm
) -> None:
    model = make_model_of(algorithm, **{**PAPER, "cost_gamma": 0.9, "bound_cost_targets": bound})
    model.learn(20)  # fills the buffer, no update yet
    assert model.replay_buffer is not None
    with th.no_grad():
        for parameter in model.cost_critic_target.parameters():
            parameter.zero_()
        model.cost_critic_target.biases[-1].fill_(-5.0)
    model.replay_buffer.lowest_costs[:] = lowest
    model._set_cost_floor()
    batch: Any = model.replay_buffer.sample(64)
    values = model.cost_critic(batch.observations, batch.actions).detach()
    targets = batch.costs + 0.9 * expected  # no episode of this environment terminates
    _, cost_critic_loss, _ = model._critic_losses(batch)
    assert cost_critic_loss.item() == pytest.approx((values - targets).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("n_critics", [1, 4])
def test_pessimistic_cost_targets(n_critics: int, algorithm: Algorithm) -> None:
    policy_kwargs = dict(net_arch=[8], n_cost_critics=n_critics)
    model = make_model_of(algorithm, cost_gamma=0.9, cost_target_risk_coef=0.5, policy_kwargs=policy_kwargs, normalize=False)
    model.learn(20)
    assert model.replay_buffer is not None
    members = th.tensor([1.0, 2.0, 4.0, 9.0])[:n_critics, None, None]
    with th.no_grad():
        for parameter in model.cost_critic_target.parameters():
            parameter.zero_()
        model.cost_critic_target.biases[-1].copy_(members)
    batch: Any = model.replay_buffer.sample(64)
    values = model.cost_critic(batch.observations, batch.actions).detach()
    expected = members + 0.5 * members.std() if n_critics > 1 else members
    targets = batch.costs + 0.9 * expected  # no episode of this environment terminates
    _, cost_critic_loss, _ = model._critic_losses(batch)
    assert cost_critic_loss.item() == pytest.approx((values - targets).square().mean().item(), rel=1e-5)


def test_the_bound_of_expected_costs_follows_the_buffer() -> None:
    model = make_model(make_env(2), cost_limit=[5.0, 5.0], cost_gamma=0.9)
    model.learn(21)
    assert model._cost_floor.tolist() == [0.0, 0.0]
    assert model.replay_buffer is not None
    model.replay_buffer.lowest_costs[1] = -1.0
    model.train(1, 16)
    assert model._cost_floor.tolist() == [0.0, pytest.approx(-10.0)]
    model.cost_gamma = 1.0
    model.train(1, 16)
    assert model._cost_floor.tolist() == [0.0, -float("inf")]


def test_the_papers_multiplier_is_updated_from_the_replay_buffers_risk(
    monkeypatch: pytest.MonkeyPatch, algorithm: Algorithm
) -> None:
    kwargs = dict(learning_rate=0.1)
    model = make_model_of(algorithm, multiplier_signal="buffer", multiplier_kwargs=kwargs, constraint_start=0.0)
    model.learn(20)
    start = model.lagrange_multiplier.value.item()
    critic_losses = model._critic_losses
    monkeypatch.setattr(model, "_critic_losses", lambda batch: (*critic_losses(batch)[:2], th.tensor([1e3])))
    model.train(1, 16)
    assert model.lagrange_multiplier.value.item() > start


def test_targets_follow_every_second_update_counted_over_the_whole_run(algorithm: Algorithm) -> None:
    model = make_model_of(algorithm, learning_starts=0, target_update_interval=2)
    model.learn(1)
    targets = [parameter.clone() for parameter in model.critic_target.parameters()]
    assert model._n_updates == 1
    initial = make_model_of(algorithm).critic_target
    assert all(th.equal(a, b) for a, b in zip(targets, initial.parameters(), strict=True))
    model.train(gradient_steps=1, batch_size=16)  # the second update, in a call of its own
    assert not any(th.equal(a, b) for a, b in zip(targets, model.critic_target.parameters(), strict=True))


def test_each_optimizer_follows_its_own_schedule(algorithm: Algorithm) -> None:
    model = make_model_of(
        algorithm,
        learning_rate=1e-3,
        actor_learning_rate=lambda progress: 1e-2 * progress,
        cost_critic_learning_rate=2e-3,
        multiplier_signal="buffer",
        multiplier_kwargs=dict(learning_rate=lambda progress: 0.5 * progress),
        # 42 steps are made: the progress that remains becomes negative, a learning rate must not
        train_freq=3,
    )
    model.learn(40)
    assert isinstance(model.lagrange_multiplier, LagrangeMultiplier)
    networks = (model.critic, model.cost_critic, model.actor, model.lagrange_multiplier)
    optimizers = [network.optimizer for network in networks] + model._actor_optimizers()[1:]
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    # SACLag's entropy coefficient has no learning rate of its own
    assert rates == pytest.approx([1e-3, 2e-3, 0.0, 0.0] + [1e-3] * (algorithm is SACLag))


def test_a_replaced_learning_rate_schedule_counts_for_all_networks(algorithm: Algorithm) -> None:
    model = make_model_of(algorithm).learn(21)
    model.lr_schedule = lambda _: 0.0
    before = model.policy.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    model.train(gradient_steps=1, batch_size=16)
    assert all(th.equal(value, model.policy.state_dict()[key]) for key, value in before.items() if "target" not in key)


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize(
    ("algorithm", "special"), [(ALGD, dict(diffusion="ve")), (ALGD, dict(diffusion="ddpm")), (SACLag, {})]
)
def test_the_same_seed_gives_the_same_weights(algorithm: Algorithm, special: dict, n_envs: int) -> None:
    def trained(seed: int) -> dict[str, th.Tensor]:
        env = make_vec_env(make_env, n_envs=n_envs, seed=seed)
        return weights(make_model_of(algorithm, env, seed=seed, policy_kwargs={**SMALL, **special}).learn(60))

    first = trained(1)
    assert same(first, trained(1))
    assert not same(first, trained(2))


def test_the_users_policy_kwargs_are_not_changed(algorithm: Algorithm) -> None:
    kwargs = copy.deepcopy(SMALL)
    make_model_of(algorithm, policy_kwargs=kwargs)
    assert kwargs == SMALL


def test_divergence_stops_training_and_names_the_quantity(algorithm: Algorithm) -> None:
    model = make_model_of(algorithm).learn(30)
    with th.no_grad():
        model.critic.biases[-1].fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"train/critic_loss became \[nan\] at update"):
        model.learn(10, reset_num_timesteps=False)


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        (dict(cost_limit=-1.0), ValueError, "`cost_limit` must be a finite number >= 0"),
        (dict(policy_kwargs=dict(use_sde=True)), ValueError, "does not support gSDE"),
        (dict(replay_buffer_class=type("Strange", (ReplayBuffer,), {})), ValueError, "Strange does not store costs"),
        (
            dict(multiplier_signal="vibes"),
            ValueError,
            "`multiplier_signal` must be 'episodes' or 'buffer', got 'vibes'",
        ),
        (dict(rho=-1.0), ValueError, "`rho` must be a finite number"),
        (dict(target_update_interval=1.5), ValueError, "`target_update_interval` must be a whole number"),
        (dict(cost_limit="abc"), ValueError, "`cost_limit` must be a finite number >= 0, or a flat sequence"),
        (dict(cost_gamma=0.0), ValueError, "`cost_gamma` must be"),
        (dict(cost_gamma=1.5, cost_limit_discounted=True), ValueError, "`cost_gamma` must be"),
        (dict(episode_length=0), ValueError, "`episode_length` must be"),
        (dict(episode_length=2.5, cost_limit_discounted=True), ValueError, "`episode_length` must be"),
        (dict(policy_kwargs=dict(n_constraints=2)), ValueError, "follows from cost_limit"),
        (dict(multiplier_signal="buffer", multiplier_kwargs=dict(init_value=0.0)), ValueError, "`init_value` must be > 0"),
        (dict(multiplier_kwargs=dict(init_value=20.0)), ValueError, "`init_value` must be at most `max_value`, 10"),
        (
            dict(multiplier_signal="buffer", multiplier_kwargs=dict(confidence=1.0)),
            ValueError,
            "`multiplier_kwargs` must have no",
        ),
        (dict(constraint_start=1.5), ValueError, "`constraint_start` must be a number in"),
    ],
)
def test_bad_arguments(kwargs: dict, error: type[Exception], message: str, algorithm: Algorithm) -> None:
    with pytest.raises(error, match=message):
        make_model_of(algorithm, **kwargs)


def test_a_discrete_action_space_is_refused(algorithm: Algorithm) -> None:
    with pytest.raises(AssertionError, match=r"only supports continuous \(Box\) action spaces.*Wrap"):
        make_model_of(algorithm, "CartPole-v1")


def test_the_logged_norm_is_that_of_the_actors_gradients(algorithm: Algorithm) -> None:
    model = make_model_of(algorithm, learning_starts=60).learn(60)
    norm = model._update(first_batch(model))["policy_grad_norm"]
    gradients = [parameter.grad.flatten() for parameter in model.actor.parameters()]
    assert norm.item() == pytest.approx(th.linalg.vector_norm(th.cat(gradients)).item(), rel=1e-5)


class Readings(TorchDispatchMode):
    """Notes operations that make the processor wait for the device."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(function) for name in self.FORBIDDEN):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [
        (ALGD, {}),
        (ALGD, dict(policy_kwargs=dict(net_arch=[8], diffusion="ddpm"), **PAPER)),
        (ALGD, dict(score_kwargs=dict(pairing="before"), multiplier_signal="buffer", constraint_start=0.0)),
        (SACLag, {}),
        (SACLag, dict(ent_coef=0.1, **PAPER)),
    ],
)
def test_an_update_never_reads_from_the_device(
    algorithm: Algorithm, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sb3_algd.common.critics.skips_rows", lambda device: False)
    # Adam's own count of steps is in CPU memory for parameters on any device
    monkeypatch.setattr(th.optim.Adam, "step", lambda self: None)
    model = make_model_of(algorithm, learning_starts=60, **arguments).learn(60)
    batch = first_batch(model)
    with Readings() as readings:
        model._update(batch)
    assert readings.found == []


@pytest.mark.parametrize("diffusion", ["ve", "ddpm"])
def test_reduced_precision_rounds_the_update_but_keeps_single_precision_weights(diffusion: str) -> None:
    losses = []
    for reduced_precision in (False, True):
        model = make_model(
            reduced_precision=reduced_precision, policy_kwargs=dict(net_arch=[16, 16], diffusion=diffusion), learning_starts=60
        )
        model.learn(60)
        batch = first_batch(model)
        losses.append({name: value.numpy() for name, value in model._update(batch).items()})
        assert all(parameter.dtype == th.float32 for parameter in model.policy.parameters())
        assert model.units.moments.dtype == th.float32
        assert all(parameter.grad is not None for parameter in model.actor.parameters())
    assert losses[0]["critic_loss"] != losses[1]["critic_loss"]
    for name, value in losses[0].items():
        np.testing.assert_allclose(losses[1][name], value, rtol=0.1, atol=0.02, err_msg=name)


def test_reduced_precision_sees_the_newest_critics(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(reduced_precision=True, learning_rate=0.05, learning_starts=60)
    model.learn(60)
    energies = []
    energy_of = model._energy

    def noted(observations: th.Tensor, actions: th.Tensor) -> Any:
        result = energy_of(observations, actions)
        energies.append((actions.detach().clone(), result[0]))
        return result

    monkeypatch.setattr(model, "_energy", noted)
    batch = first_batch(model)
    model._update(batch)
    actions, during = energies[0]
    with th.autocast("cpu", th.bfloat16):
        # The critics have not changed since; the multiplier has, a little
        afterwards = energy_of(batch.observations, actions)[0]
    th.testing.assert_close(during, afterwards, rtol=1e-3, atol=1e-3)
