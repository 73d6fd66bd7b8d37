"""The algorithm: updates against a plain re-implementation, saving, logging, and what bad input gets."""

import copy
import io
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_algd import ALGD, CostHerReplayBuffer, CostNStepReplayBuffer, CostReplayBuffer
from tests.test_buffers import CostlyBitFlipping

SMALL = dict(net_arch=[16, 16])


class CostlyEnv(gym.Env):
    """Random observations; the reward is the sum of the actions, the costs are fixed functions of the observation."""

    observation_space: spaces.Space = spaces.Box(-1.0, 1.0, shape=(3,), dtype=np.float32)
    action_space: spaces.Space = spaces.Box(-2.0, 2.0, shape=(2,), dtype=np.float32)

    def __init__(self, n_costs: int = 1) -> None:
        self.n_costs = n_costs

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        return self.state, {}

    def step(self, action: np.ndarray) -> Any:
        cost = self.state[: self.n_costs] ** 2 if self.n_costs > 1 else float(self.state[0] ** 2)
        self.state = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        return self.state, float(np.sum(action)), False, False, {"cost": cost}


def make_env(n_costs: int = 1, steps: int = 20) -> gym.Env:
    return gym.wrappers.TimeLimit(CostlyEnv(n_costs), steps)


def make_model(env: Any = None, **kwargs: Any) -> ALGD:
    defaults: dict[str, Any] = dict(
        policy_kwargs=SMALL, learning_starts=20, batch_size=16, buffer_size=500, seed=0, cost_limit=5.0, device="cpu"
    )
    return ALGD("DiffusionPolicy", make_env() if env is None else env, **{**defaults, **kwargs})


def weights(model: ALGD) -> dict[str, th.Tensor]:
    state = {**model.policy.state_dict(), **model.lagrange_multiplier.state_dict()}
    return {key: value.clone() for key, value in state.items()}


def cost_limits(model: ALGD) -> list[float]:
    assert isinstance(model.cost_limit, np.ndarray)
    return model.cost_limit.tolist()


def same(a: dict[str, th.Tensor], b: dict[str, th.Tensor]) -> bool:
    return a.keys() == b.keys() and all(th.equal(a[key], b[key]) for key in a)


# --- the updates -----------------------------------------------------------------------------------------------------


def plain_critics(critic: Any, obs: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """Every member of an ensemble on its own, on the concatenated input: (E, batch, n_outputs)."""
    outputs = []
    for index in range(critic.n_critics):
        hidden = th.cat([obs, actions], dim=1)
        for depth, (weight, bias) in enumerate(zip(critic.weights, critic.biases, strict=True)):
            hidden = (critic.activation(hidden) if depth > 0 else hidden) @ weight[index] + bias[index]
        outputs.append(hidden)
    return th.stack(outputs)


def plain_energy(model: ALGD, obs: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """The paper's augmented Lagrangian, written down as it is printed: (batch,)."""
    q = plain_critics(model.critic, obs, actions).squeeze(-1).min(dim=0).values
    costs = plain_critics(model.cost_critic, obs, actions)
    risk = costs.mean(dim=0) + model.cost_risk_coef * costs.std(dim=0)
    multiplier, budget = model.lagrange_multiplier.value, model._budget
    squares = (multiplier + model.rho * (risk - budget)).clamp_min(0).square() - multiplier.square()
    return (squares / (2 * model.rho)).sum(dim=1) - q


def plain_chain(model: ALGD, obs: th.Tensor) -> list[th.Tensor]:
    """The reverse process from its definition, each network call on its whole input: latents after each step."""
    network, steps = model.actor.network, model.actor.denoising_steps

    def output(second: th.Tensor, k: int) -> th.Tensor:
        embedding = network.step_embedding(th.full((len(obs),), k))
        return network.mlp(th.cat([obs, second, embedding], dim=1))

    noise = th.randn(steps, len(obs), 2)
    if model.actor.diffusion == "ve":
        sigma = 0.01 * 100.0 ** (np.arange(steps) / (steps - 1))
        drift = np.diff(sigma**2, prepend=0.0)
    else:
        beta = np.linspace(1e-4, 0.02, steps)
        bar = np.cumprod(1 - beta)
        before = np.append(1.0, bar[:-1])
    x = noise[0]
    after: dict[int, th.Tensor] = {}
    for k in reversed(range(steps)):
        score = output(th.tanh(x), k)[:, :2]
        if model.actor.diffusion == "ve":
            x = x + drift[k] * score + (np.sqrt(drift[k]) * noise[k] if k > 0 else 0.0)
        else:
            clean = (x - np.sqrt(1 - bar[k]) * output(x, k)[:, 2:]) / np.sqrt(bar[k])
            x = (beta[k] * np.sqrt(before[k]) * clean + (1 - before[k]) * np.sqrt(1 - beta[k]) * x) / (1 - bar[k])
            x = x + 0.05 * score / score.norm(dim=1, keepdim=True)
            x = x + (np.sqrt(beta[k] * (1 - before[k]) / (1 - bar[k])) * noise[k] if k > 0 else 0.0)
        after[k] = x
    return [after[k] for k in range(steps)]


def plain_policy_gradients(model: ALGD, obs: th.Tensor) -> tuple[float, float, list[th.Tensor]]:
    """Both policy losses and the actor's gradients, with one backward pass per loss and no shared work."""
    latents = plain_chain(model, obs)
    guidance_loss = plain_energy(model, obs, th.tanh(latents[0])).mean()

    step = th.randint(model.actor.denoising_steps, (len(obs),))
    action = th.tanh(th.stack(latents)[step, th.arange(len(obs))].detach())
    sigma = model.actor.process.score_std[step].unsqueeze(1)
    noise = th.randn(model.n_score_samples, len(obs), 2)
    energies, gradients = [], []
    for i in range(model.n_score_samples):
        sample = (action + sigma * noise[i]).requires_grad_()
        energy = plain_energy(model, obs, sample)
        energies.append(energy.detach())
        gradients.append(th.autograd.grad(energy.sum(), sample)[0])
    likelihoods = th.softmax(-th.stack(energies) / model.score_temperature, dim=0)
    target = sum(-w.unsqueeze(1) * g for w, g in zip(likelihoods, gradients, strict=True)) / model.score_temperature
    network = model.actor.network
    predicted = network.mlp(th.cat([obs, action, network.step_embedding(step)], dim=1))[:, :2]
    score_loss = (predicted - target).square().mean()
    loss = model.guidance_coef * guidance_loss + model.score_coef * score_loss
    return guidance_loss.item(), score_loss.item(), list(th.autograd.grad(loss, list(model.actor.parameters())))


@pytest.mark.parametrize("active", ["nowhere", "somewhere", "everywhere"])
@pytest.mark.parametrize("diffusion", ["ve", "ddpm"])
@pytest.mark.parametrize("n_costs", [1, 3])
def test_policy_update_equals_a_plain_implementation(diffusion: str, n_costs: int, active: str) -> None:
    model = make_model(
        make_env(n_costs),
        cost_limit=[2.0] * n_costs,
        policy_kwargs=dict(SMALL, diffusion=diffusion),
        score_temperature=0.7,
        guidance_coef=0.8,
        score_coef=0.3,
        rho=0.5,
    )
    obs = th.randn(32, 3)
    with th.no_grad():
        for weight in model.cost_critic.weights:
            weight.mul_(3.0)
        costs = plain_critics(model.cost_critic, obs, th.rand(32, 2) * 2 - 1)
        risk = costs.mean(dim=0) + costs.std(dim=0)
        # The constraint is active where the risk is above this
        threshold = {
            "nowhere": risk.max(dim=0).values + 9,
            "somewhere": risk.median(dim=0).values,
            "everywhere": risk.min() - 9,
        }
        model.lagrange_multiplier.parameter.fill_(0.3)
        model._budget.copy_(threshold[active] + model.lagrange_multiplier.value / model.rho)
    th.manual_seed(5)
    guidance_loss, score_loss, gradients = plain_policy_gradients(model, obs)
    critics_before = [parameter.clone() for parameter in [*model.critic.parameters(), *model.cost_critic.parameters()]]
    th.manual_seed(5)
    metrics, policy_risk = model._update_policy(obs)
    share = (risk > threshold[active]).float().mean().item()
    assert {"nowhere": share == 0.0, "somewhere": 0.2 < share < 0.8, "everywhere": share == 1.0}[active]
    assert metrics["guidance_loss"].item() == pytest.approx(guidance_loss, rel=1e-4, abs=1e-5)
    assert metrics["score_loss"].item() == pytest.approx(score_loss, rel=1e-4)
    for (name, parameter), expected in zip(model.actor.named_parameters(), gradients, strict=True):
        assert parameter.grad is not None
        th.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5, msg=name)
    norm = th.linalg.vector_norm(th.cat([gradient.flatten() for gradient in gradients]))
    assert metrics["policy_grad_norm"].item() == pytest.approx(norm.item(), rel=1e-3)
    # The critics get neither a step nor gradients from the policy update
    critics = [*model.critic.parameters(), *model.cost_critic.parameters()]
    assert all(th.equal(a, b) for a, b in zip(critics_before, critics, strict=True))
    assert all(parameter.grad is None for parameter in critics)
    assert policy_risk.shape == (n_costs,)


@pytest.mark.parametrize("diffusion", ["ve", "ddpm"])
@pytest.mark.parametrize("n_costs", [1, 2])
def test_critic_update_equals_a_plain_implementation(n_costs: int, diffusion: str) -> None:
    policy_kwargs = dict(SMALL, diffusion=diffusion)
    model = make_model(make_env(n_costs), cost_limit=[2.0] * n_costs, gamma=0.9, cost_gamma=0.8, policy_kwargs=policy_kwargs)
    model.learn(20)  # fills the buffer, no update yet
    assert model.replay_buffer is not None
    model._set_cost_floor()
    batch: Any = model.replay_buffer.sample(64)
    batch = batch._replace(dones=(th.rand(64, 1) < 0.3).float(), cost_dones=(th.rand(64, 1) < 0.3).float())
    th.manual_seed(3)
    with th.no_grad():
        next_actions = th.tanh(plain_chain(model, batch.next_observations)[0])
        next_q = plain_critics(model.critic_target, batch.next_observations, next_actions)
        y = batch.rewards + (1 - batch.dones) * 0.9 * th.minimum(next_q[0], next_q[1])
        next_costs = plain_critics(model.cost_critic_target, batch.next_observations, next_actions)
        assert (next_costs < 0).any() and (next_costs > 0).any()
        next_costs = next_costs.clamp_min(0.0)  # no cost of this environment is negative
    q = plain_critics(model.critic, batch.observations, batch.actions)
    critic_loss = ((q[0] - y) ** 2).mean() + ((q[1] - y) ** 2).mean()
    costs = plain_critics(model.cost_critic, batch.observations, batch.actions)
    cost_loss = th.stack(
        [((costs[e] - (batch.costs + (1 - batch.cost_dones) * 0.8 * next_costs[e])) ** 2).mean() for e in range(4)]
    ).mean()
    expected = [
        *th.autograd.grad(critic_loss, list(model.critic.parameters())),
        *th.autograd.grad(cost_loss, list(model.cost_critic.parameters())),
    ]
    th.manual_seed(3)
    metrics, risk = model._update_critics(batch)
    assert metrics["critic_loss"].item() == pytest.approx(critic_loss.item(), rel=1e-4)
    assert metrics["cost_critic_loss"].item() == pytest.approx(cost_loss.item(), rel=1e-4)
    for parameter, gradient in zip([*model.critic.parameters(), *model.cost_critic.parameters()], expected, strict=True):
        assert parameter.grad is not None
        th.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
    th.testing.assert_close(risk, (costs.mean(dim=0) + costs.std(dim=0)).mean(dim=0).detach())


@pytest.mark.parametrize(("bound", "lowest", "expected"), [(True, 0.0, 0.0), (True, -0.02, -0.2), (False, 0.0, -5.0)])
def test_expected_costs_are_no_lower_than_the_costs_seen_allow(bound: bool, lowest: float, expected: float) -> None:
    model = make_model(cost_gamma=0.9, bound_cost_targets=bound)
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
    metrics, _ = model._update_critics(batch)
    assert metrics["cost_critic_loss"].item() == pytest.approx((values - targets).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("n_critics", [1, 4])
def test_pessimistic_cost_targets(n_critics: int) -> None:
    model = make_model(cost_gamma=0.9, cost_target_risk_coef=0.5, policy_kwargs={"net_arch": [8], "n_cost_critics": n_critics})
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
    metrics, _ = model._update_critics(batch)
    assert metrics["cost_critic_loss"].item() == pytest.approx((values - targets).square().mean().item(), rel=1e-5)


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


def test_score_gradient_through_the_chain_is_an_option() -> None:
    gradients = []
    for through_chain in (False, True):
        model = make_model(guidance_coef=0.0, score_grad_through_chain=through_chain)
        th.manual_seed(0)
        model._update_policy(th.ones(16, 3))
        gradients.append(th.cat([p.grad.flatten() for p in model.actor.parameters() if p.grad is not None]))
    assert not th.allclose(gradients[0], gradients[1])


@pytest.mark.parametrize("signal", ["buffer", "policy", "episodes"])
def test_multiplier_listens_to_its_signal(signal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(multiplier_signal=signal, multiplier_learning_rate=0.1)
    model.learn(20)
    high, low = th.tensor([1e3]), th.tensor([0.0])
    start = model.lagrange_multiplier.value.item()
    if signal == "episodes":
        model._cost_tracker.episode_costs.append(np.array([1e3]))  # type: ignore[union-attr]
    monkeypatch.setattr(model, "_update_critics", lambda batch: ({}, high if signal == "buffer" else low))
    monkeypatch.setattr(model, "_update_policy", lambda observations: ({}, high if signal == "policy" else low))
    model.train(1, 16)
    assert model.lagrange_multiplier.value.item() > start


def test_a_multiplier_that_no_episode_moves_is_warned_about_once() -> None:
    model = make_model(CostlyEnv(), episode_length=20)
    start = model.lagrange_multiplier.value.clone()
    with pytest.warns(UserWarning, match="No episode has ended in 41 steps") as warned:
        model.learn(60)
    assert len([warning for warning in warned if "No episode" in str(warning.message)]) == 1
    assert th.equal(model.lagrange_multiplier.value, start)


def test_training_from_a_loaded_buffer_alone(tmp_path: Path) -> None:
    trained = make_model().learn(40)
    assert trained.replay_buffer is not None
    trained.replay_buffer.costs[3] = -0.5
    del trained.replay_buffer.lowest_costs  # as saved by an earlier version
    trained.save_replay_buffer(tmp_path / "buffer")
    model = make_model()
    model.load_replay_buffer(tmp_path / "buffer")
    assert model.replay_buffer is not None and model.replay_buffer.lowest_costs.tolist() == [-0.5]
    model.set_logger(configure(None, []))
    before = weights(model)
    model.train(3, 16)
    assert not same(weights(model), before)


def test_targets_follow_every_second_update_counted_over_the_whole_run() -> None:
    model = make_model(learning_starts=0, target_update_interval=2)
    model.learn(1)
    targets = [parameter.clone() for parameter in model.critic_target.parameters()]
    assert model._n_updates == 1
    initial = make_model().critic_target
    assert all(th.equal(a, b) for a, b in zip(targets, initial.parameters(), strict=True))
    model.train(gradient_steps=1, batch_size=16)  # the second update, in a call of its own
    assert not any(th.equal(a, b) for a, b in zip(targets, model.critic_target.parameters(), strict=True))


def test_n_step_sums_stop_where_a_new_learn_resets_the_environment() -> None:
    model = make_model(n_steps=3, gamma=0.5, cost_gamma=0.5, learning_starts=100)
    model.learn(5).learn(5)
    buffer = model.replay_buffer
    assert isinstance(buffer, CostNStepReplayBuffer)
    rewards, costs = buffer.rewards[:, 0], buffer.costs[:, 0, 0]
    samples = buffer._get_samples(np.array([2, 3, 4, 5]))
    for values, sums in ((rewards, samples.rewards), (costs, samples.costs)):
        expected = [values[2] + values[3] / 2 + values[4] / 4, values[3] + values[4] / 2, values[4]]
        np.testing.assert_allclose(sums[:3, 0], expected, rtol=1e-5)
        np.testing.assert_allclose(sums[3, 0], values[5] + values[6] / 2 + values[7] / 4, rtol=1e-5)
    # The end is that of a time limit: the critics look beyond it
    assert samples.dones.sum() == 0


def test_each_optimizer_follows_its_own_schedule() -> None:
    model = make_model(
        learning_rate=1e-3,
        policy_learning_rate=lambda progress: 1e-2 * progress,
        cost_critic_learning_rate=2e-3,
        multiplier_learning_rate=lambda progress: 0.5 * progress,
    )
    model.learn(40)
    rates = [
        optimizer.param_groups[0]["lr"]
        for optimizer in (
            model.critic.optimizer,
            model.actor.optimizer,
            model.cost_critic.optimizer,
            model.lagrange_multiplier.optimizer,
        )
    ]
    assert rates == pytest.approx([1e-3, 0.0, 2e-3, 0.0])


# --- reproducibility, saving -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("diffusion", ["ve", "ddpm"])
def test_the_same_seed_gives_the_same_weights(diffusion: str, n_envs: int) -> None:
    def trained(seed: int) -> dict[str, th.Tensor]:
        env = make_vec_env(make_env, n_envs=n_envs, seed=seed)
        return weights(make_model(env, seed=seed, policy_kwargs=dict(SMALL, diffusion=diffusion)).learn(60))

    first = trained(1)
    assert same(first, trained(1))
    assert not same(first, trained(2))


@pytest.mark.parametrize("diffusion", ["ve", "ddpm"])
def test_save_load_continue(tmp_path: Path, diffusion: str) -> None:
    model = make_model(policy_kwargs=dict(SMALL, diffusion=diffusion)).learn(50)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = ALGD.load(tmp_path / "model", env=make_env())
    loaded.load_replay_buffer(tmp_path / "buffer")
    assert same(weights(model), weights(loaded))
    assert th.equal(model.lagrange_multiplier.value, loaded.lagrange_multiplier.value)
    assert model.lagrange_multiplier.value.item() != pytest.approx(0.6931, abs=1e-4)
    assert loaded._n_updates == model._n_updates
    # Optimizers and targets too: the next updates are the same, number for number
    for each in (model, loaded):
        each.set_logger(configure(None, []))
        th.manual_seed(7)
        np.random.seed(7)
        each.train(gradient_steps=5, batch_size=16)
    assert same(weights(model), weights(loaded))
    loaded.learn(30, reset_num_timesteps=False)
    assert loaded.num_timesteps == 80


def test_the_saved_model_predicts_the_same_in_a_new_process(tmp_path: Path) -> None:
    model = make_model().learn(30)
    model.save(tmp_path / "model")
    obs = np.linspace(-1, 1, 30, dtype=np.float32).reshape(10, 3)
    np.save(tmp_path / "obs.npy", obs)
    program = (
        "import sys, numpy as np, torch as th; from sb3_algd import ALGD; m = ALGD.load(sys.argv[1] + '/model');"
        "o = np.load(sys.argv[1] + '/obs.npy'); a = m.predict(o, deterministic=True)[0]; th.manual_seed(0);"
        "np.save(sys.argv[1] + '/actions.npy', np.stack([a, m.predict(o)[0]]))"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, cwd=Path(__file__).parents[1])
    deterministic, stochastic = np.load(tmp_path / "actions.npy")
    np.testing.assert_array_equal(deterministic, model.predict(obs, deterministic=True)[0])
    th.manual_seed(0)
    np.testing.assert_array_equal(stochastic, model.predict(obs)[0])


def test_loading_with_another_number_of_limits_is_refused(tmp_path: Path) -> None:
    make_model().save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"has 2 value.*trained with 1 constraint"):
        ALGD.load(tmp_path / "model", cost_limit=[1.0, 2.0])


def test_loading_with_another_limit_recomputes_the_budget() -> None:
    file = io.BytesIO()
    make_model(cost_gamma=1.0).save(file)
    file.seek(0)
    loaded = ALGD.load(file, cost_limit=8.0)
    assert loaded.cost_budget.tolist() == [8.0] and loaded._budget.tolist() == [8.0]
    file.seek(0)
    # The class as a whole stays as it was saved
    assert cost_limits(ALGD.load(file)) == [5.0]


def test_arguments_given_at_loading_win_and_the_same_ones_are_accepted(tmp_path: Path) -> None:
    make_model(n_steps=3, gamma=0.9).save(tmp_path / "model")
    loaded = ALGD.load(tmp_path / "model", env=make_env(), n_steps=5, gamma=0.5, policy_kwargs=SMALL)
    assert isinstance(loaded.replay_buffer, CostNStepReplayBuffer)
    assert (loaded.replay_buffer.n_steps, loaded.replay_buffer.gamma) == (5, 0.5)
    assert type(ALGD.load(tmp_path / "model", env=make_env(), n_steps=1).replay_buffer) is CostReplayBuffer


def test_a_buffer_with_other_costs_is_refused_and_the_present_one_stays(tmp_path: Path) -> None:
    model = make_model(make_env(n_costs=2), cost_limit=[1.0, 2.0]).learn(10)
    make_model().learn(10).save_replay_buffer(tmp_path / "one")
    SAC("MlpPolicy", make_env(), buffer_size=100).save_replay_buffer(tmp_path / "none")
    present = model.replay_buffer
    for name, count in (("one", 1), ("none", 0)):
        with pytest.raises(ValueError, match=rf"holds {count} cost\(s\) per step, but the model has 2"):
            model.load_replay_buffer(tmp_path / name)
        assert model.replay_buffer is present


def test_a_replaced_learning_rate_schedule_counts_for_all_networks() -> None:
    model = make_model().learn(21)
    model.lr_schedule = lambda _: 0.0
    before = model.policy.state_dict()
    before = {key: value.clone() for key, value in before.items()}
    model.train(gradient_steps=1, batch_size=16)
    assert all(th.equal(value, model.policy.state_dict()[key]) for key, value in before.items() if "target" not in key)


def test_the_users_policy_kwargs_are_not_changed() -> None:
    kwargs = copy.deepcopy(SMALL)
    make_model(policy_kwargs=kwargs)
    assert kwargs == SMALL


# --- limits and logging ----------------------------------------------------------------------------------------------


def logged(model: ALGD, folder: Path, steps: int = 100) -> dict[str, float]:
    model.set_logger(configure(str(folder), ["csv"]))
    model.learn(steps, log_interval=1)
    lines = (folder / "progress.csv").read_text().splitlines()
    return {
        key: float(value)
        for key, value in zip(lines[0].split(","), lines[-1].split(","), strict=True)
        if value not in ("", "None")
    }


def test_costs_and_losses_are_logged(tmp_path: Path) -> None:
    model = make_model(cost_gamma=0.9, multiplier_learning_rate=0.01)
    row = logged(model, tmp_path)
    costs = np.mean(model.ep_cost_buffer)
    assert len(model.ep_cost_buffer) == 5
    assert row["rollout/ep_cost_mean"] == pytest.approx(costs)
    assert row["rollout/cost_rate"] == pytest.approx(costs / 20)  # five whole episodes of 20 steps
    assert row["rollout/cost_limit"] == 5.0 and row["rollout/horizon"] == 20
    factor = (1 - 0.9**20) / 0.1 / 20
    assert row["train/cost_budget"] == pytest.approx(5.0 * factor)
    # As of the last update, which came before the fifth episode had ended
    assert row["train/episode_risk"] == pytest.approx(np.mean(list(model.ep_cost_buffer)[:4]) * factor)
    assert "rollout/ep_rew_mean" in row and "rollout/ep_cost_discounted_mean" not in row
    for key in ("critic_loss", "cost_critic_loss", "guidance_loss", "score_loss", "policy_grad_norm", "risk", "policy_risk"):
        assert np.isfinite(row[f"train/{key}"])
    assert row["train/multiplier"] != pytest.approx(0.6931, abs=1e-3)


def test_each_constraint_is_logged_and_discounted_limits_in_their_unit(tmp_path: Path) -> None:
    model = make_model(make_env(n_costs=2), cost_limit=[5.0, 3.0], cost_limit_discounted=True, cost_gamma=0.9)
    row = logged(model, tmp_path)
    assert [row["train/cost_budget_0"], row["train/cost_budget_1"]] == [5.0, 3.0]
    assert row["train/multiplier_0"] > 0 and row["train/risk_1"] != row["train/risk_0"]
    assert 0 < row["rollout/ep_cost_discounted_mean_0"] < row["rollout/ep_cost_mean_0"]
    assert model._cost_tracker is not None
    before = np.mean(list(model._cost_tracker.discounted_costs)[:4], axis=0)
    assert [row["train/episode_risk_0"], row["train/episode_risk_1"]] == pytest.approx(before.tolist())


def test_the_limit_that_the_environment_declares_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    model = ALGD("DiffusionPolicy", "TwoModes-v0", verbose=1, gamma=0.9, cost_gamma=0.9)
    assert cost_limits(model) == [64.0] and model.episode_length == 100 and not model.cost_limit_discounted
    assert model.cost_budget[0] == pytest.approx(64 * (1 - 0.9**100) / 0.1 / 100)
    assert "Cost limit per episode (plain sum): [64.0], horizon: 100 steps" in capsys.readouterr().out
    with pytest.raises(ValueError, match="2 value"):
        ALGD("DiffusionPolicy", "TwoModes-v0", cost_limit=[1.0, 2.0])


def test_a_declared_discounted_limit() -> None:
    env = make_env()
    env.unwrapped.cost_limit, env.unwrapped.cost_limit_discounted = 7.0, True  # type: ignore[attr-defined]
    model = make_model(env, cost_limit=None)
    assert model.cost_limit_discounted and model.cost_budget.tolist() == [7.0]
    assert make_model(env, cost_limit=None, cost_limit_discounted=False).cost_limit_discounted is False
    # A limit that the user gives is a plain sum unless said otherwise
    assert not make_model(env, cost_limit=7.0).cost_limit_discounted


def test_without_any_limit_or_horizon_there_are_warnings() -> None:
    with pytest.warns(UserWarning, match=r"a limit of 25 per episode") as record:
        model = make_model(CostlyEnv(), cost_limit=None)
    assert any("1000 steps are assumed" in str(warning.message) for warning in record)
    assert cost_limits(model) == [25.0] and model.episode_length == 1000


def test_an_environment_without_costs_is_warned_about_once() -> None:
    with pytest.warns(UserWarning, match="never binds") as record:
        model = make_model("Pendulum-v1", learning_starts=1000).learn(450)
    assert sum("never binds" in str(warning.message) for warning in record) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(200)
        make_model(learning_starts=1000).learn(45)  # one that reports costs
    with pytest.warns(UserWarning, match="never binds"):  # also if no episode ends
        make_model("Pendulum-v1", learning_starts=1000).learn(10)


# --- other citizens of SB3 -------------------------------------------------------------------------------------------


def test_buffer_costs_match_the_environments_row_by_row() -> None:
    model = make_model(make_vec_env(lambda: make_env(2), n_envs=3), cost_limit=[1.0, 2.0]).learn(90)
    buffer = model.replay_buffer
    assert isinstance(buffer, CostReplayBuffer) and buffer.pos == 30
    np.testing.assert_allclose(buffer.costs[:30], buffer.observations[:30, :, :2] ** 2, rtol=1e-6)
    assert len(np.unique(buffer.costs[:30])) == 180
    buffer.sample(8)


def test_vec_normalize_leaves_costs_and_learns() -> None:
    env = VecNormalize(make_vec_env(make_env, n_envs=2))
    model = make_model(env).learn(80)
    buffer = model.replay_buffer
    assert isinstance(buffer, CostReplayBuffer)
    np.testing.assert_allclose(buffer.costs[:40, :, 0], buffer.observations[:40, :, 0] ** 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "kwargs", [dict(n_steps=3), dict(replay_buffer_class=NStepReplayBuffer, replay_buffer_kwargs=dict(n_steps=3))]
)
def test_n_step_returns(tmp_path: Path, kwargs: dict) -> None:
    model = make_model(gamma=0.9, cost_gamma=0.8, **kwargs).learn(40)
    buffer = model.replay_buffer
    assert isinstance(buffer, CostNStepReplayBuffer)
    assert (buffer.n_steps, buffer.gamma, buffer.cost_gamma) == (3, 0.9, 0.8)
    model.save(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(ALGD.load(tmp_path / "model", env=make_env()).replay_buffer, CostNStepReplayBuffer)


def test_her() -> None:
    env = DummyVecEnv([lambda: gym.wrappers.TimeLimit(CostlyBitFlipping(n_bits=3, continuous=True, max_steps=3), 3)])
    model = ALGD(
        "MultiInputPolicy",
        env,
        replay_buffer_class=HerReplayBuffer,
        policy_kwargs=SMALL,
        learning_starts=10,
        cost_limit=1.0,
        buffer_size=100,
    ).learn(30)
    assert isinstance(model.replay_buffer, CostHerReplayBuffer) and model._n_updates == 20
    assert model.replay_buffer.costs.max() > 0


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False)),
        dict(action_noise=NormalActionNoise(np.zeros(2), 0.1 * np.ones(2)), gradient_steps=-1, train_freq=(1, "episode")),
        dict(rho=0.0, score_pairing="before", score_space="latent", clip_score_samples=True, multiplier_space="projected"),
        dict(policy_kwargs=dict(SMALL, n_critics=3, n_cost_critics=1, denoising_steps=1), n_score_samples=1),
        dict(use_policy_at_warmup=True),
    ],
)
def test_options_learn(kwargs: dict) -> None:
    model = make_model(**kwargs)
    before = weights(model)
    model.learn(45)
    after = weights(model)
    assert not any(th.equal(before[key], after[key]) for key in after if key.startswith(("actor", "critic.", "cost_critic.")))


def test_warmup_is_uniform_or_the_policys() -> None:
    small = {}
    for by_policy in (False, True):
        model = make_model(learning_starts=400, use_policy_at_warmup=by_policy).learn(400)
        assert model.replay_buffer is not None
        small[by_policy] = np.mean(np.abs(model.replay_buffer.actions[:400]) < 0.25)
    # Uniform actions fill the box evenly, the tanh of a nearly Gaussian latent of variance 2 prefers its edges
    assert small[False] == pytest.approx(0.25, abs=0.05)
    assert small[True] == pytest.approx(0.14, abs=0.05)


def test_learn_takes_a_float() -> None:
    assert make_model(learning_starts=1000).learn(2e1).num_timesteps == 20  # type: ignore[arg-type]


# --- bad input -------------------------------------------------------------------------------------------------------


class BrokenEnv(CostlyEnv):
    """Goes wrong at its 30th step."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.steps = 0

    def step(self, action: np.ndarray) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        self.steps += 1
        if self.steps >= 30:
            if self.what == "six":
                return obs, reward, 1.0, terminated, truncated, info
            if self.what == "reward":
                reward = float("nan")
            if self.what == "cost":
                info["cost"] = float("inf")
            if self.what == "observation":
                obs = np.full_like(obs, np.nan)
        return obs, reward, terminated, truncated, info


@pytest.mark.parametrize(
    "what, message",
    [
        ("reward", "non-finite reward"),
        ("cost", "non-finite cost"),
        ("observation", "non-finite observation"),
        ("six", r"more than Gymnasium's five values.*wrap"),
    ],
)
def test_a_broken_environment_gives_an_error_and_loses_nothing(tmp_path: Path, what: str, message: str) -> None:
    model = make_model(gym.wrappers.TimeLimit(BrokenEnv(what), 1000))
    with pytest.raises(ValueError, match=message):
        model.learn(100)
    assert model.replay_buffer is not None and model.replay_buffer.pos == 29
    assert all(th.isfinite(value).all() for value in weights(model).values())
    model.save(tmp_path / "model")
    assert same(weights(ALGD.load(tmp_path / "model")), weights(model))


class CountingEnv(CostlyEnv):
    """The observation counts steps, through the ends of episodes; the reward is NaN once."""

    def __init__(self, nan_at: int) -> None:
        super().__init__()
        self.nan_at = nan_at
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return self._count(), {}

    def step(self, action: np.ndarray) -> Any:
        reward = float("nan") if self.steps == self.nan_at else 0.0
        return self._count(), reward, False, False, {"cost": 0.0}

    def _count(self) -> np.ndarray:
        self.steps += 1
        return np.full(3, self.steps, dtype=np.float32)


def check_steps_follow_on_each_other(model: ALGD) -> None:
    buffer = model.replay_buffer
    assert buffer is not None and buffer.pos > 25
    before, after = buffer.observations[: buffer.pos, 0, 0], buffer.next_observations[: buffer.pos, 0, 0]
    assert (after - before).tolist() == [1.0] * buffer.pos
    ends = buffer.dones[: buffer.pos, 0].astype(bool)
    # Where it does not go on from one row to the next, an episode has ended
    assert ends[:-1][before[1:] != after[:-1]].all()


@pytest.mark.parametrize("nan_at", [15, 20])  # within an episode, and its last step
def test_going_on_after_bad_input_stores_true_transitions_only(nan_at: int) -> None:
    model = make_model(gym.wrappers.TimeLimit(CountingEnv(nan_at), 20), learning_starts=100)
    with pytest.raises(ValueError, match="non-finite reward"):
        model.learn(30)
    model.learn(30, reset_num_timesteps=False)
    check_steps_follow_on_each_other(model)


def test_going_on_after_a_callback_has_stopped_stores_true_transitions_only() -> None:
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.num_timesteps != 10

    model = make_model(gym.wrappers.TimeLimit(CountingEnv(-1), 20), learning_starts=100)
    model.learn(30, callback=Stop())
    assert model.num_timesteps == 10
    model.learn(30, reset_num_timesteps=False)
    check_steps_follow_on_each_other(model)


def test_a_registered_six_tuple_environment_gives_the_same_advice() -> None:
    checked = gym.wrappers.PassiveEnvChecker(BrokenEnv("six"))
    with pytest.raises(ValueError, match=r"more than Gymnasium's five values.*wrap"):
        make_model(gym.wrappers.TimeLimit(checked, 1000)).learn(100)


@pytest.mark.parametrize(
    "kwargs, error, message",
    [
        (dict(cost_limit=-1.0), ValueError, "cost_limit must be finite and >= 0"),
        (dict(use_sde=True), ValueError, "does not support gSDE"),
        (dict(policy_kwargs=dict(use_sde=True)), ValueError, "does not support gSDE"),
        (dict(policy_kwargs=dict(diffusion="flow")), ValueError, "Unknown diffusion type 'flow'"),
        (dict(replay_buffer_class=type("Strange", (ReplayBuffer,), {})), ValueError, "Strange does not store costs"),
        (dict(multiplier_signal="vibes"), ValueError, "multiplier_signal must be one of"),
        (dict(score_space="pixel"), ValueError, "score_space must be one of"),
        (dict(rho=-1.0), ValueError, "rho must be finite"),
        (dict(score_temperature=0.0), ValueError, "score_temperature must be > 0"),
        (dict(n_score_samples=0), ValueError, "n_score_samples must be a whole number"),
        (dict(n_score_samples=2.5), ValueError, "n_score_samples must be a whole number"),
        (dict(target_update_interval=1.5), ValueError, "target_update_interval must be a whole number"),
        (dict(cost_limit="abc"), ValueError, "cost_limit must be a number or a flat sequence"),
        (dict(cost_gamma=0.0), ValueError, "cost_gamma must be"),
        (dict(cost_gamma=1.5, cost_limit_discounted=True), ValueError, "cost_gamma must be"),
        (dict(episode_length=0), ValueError, "episode length must be"),
        (dict(episode_length=2.5, cost_limit_discounted=True), ValueError, "episode length must be"),
        (dict(policy_kwargs=dict(n_constraints=2)), ValueError, "follows from cost_limit"),
        (dict(multiplier_init=0.0, multiplier_space="log"), ValueError, "cannot start at 0"),
    ],
)
def test_bad_arguments(kwargs: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_model(**kwargs)


def test_a_discrete_action_space_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"only supports continuous \(Box\) action spaces.*Wrap"):
        ALGD("DiffusionPolicy", "CartPole-v1")


def test_a_wrong_number_of_limits_is_refused_at_the_first_step() -> None:
    model = make_model(make_env(n_costs=2))
    with pytest.raises(ValueError, match=r"reports 2 cost\(s\) per step but there are 1 cost limit"):
        model.learn(10)
    assert model.num_timesteps == 1


def test_n_steps_with_dict_observations_is_refused() -> None:
    with pytest.raises(AssertionError, match="not supported for Dict"):
        ALGD("MultiInputPolicy", CostlyBitFlipping(continuous=True), n_steps=3, cost_limit=1.0)


def test_divergence_stops_training_and_names_the_quantity() -> None:
    model = make_model().learn(30)
    with th.no_grad():
        model.critic.biases[-1].fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"train/critic_loss became \[nan\] at update"):
        model.learn(10, reset_num_timesteps=False)
