"""SAC-Lagrangian: its update against a plain one and against SB3's SAC, its entropy coefficient, saving and learning."""

import copy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.envs import FakeImageEnv, SimpleMultiObsEnv
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch.nn import functional as F

from sb3_algd import SACLag, evaluate_policy
from sb3_algd.common.buffers import CostReplayBufferSamples
from sb3_algd.common.lagrange import LagrangeMultiplier
from sb3_algd.common.policies import ConstrainedPolicy
from tests.conftest import PAPER


class TwoCostsEnv(gym.Env):
    """Random observations; the reward is ``reward`` times the sum of the actions, the costs are their squares."""

    observation_space = spaces.Box(-1.0, 1.0, shape=(3,), dtype=np.float32)
    action_space = spaces.Box(-1.0, 1.0, shape=(2,), dtype=np.float32)

    def __init__(self, n_costs: int = 1, reward: float = 1.0) -> None:
        self.n_costs, self.reward = n_costs, reward

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        obs = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        return obs, self.reward * float(action.sum()), False, False, {"cost": (action[: self.n_costs] ** 2).tolist()}


def make_env(n_costs: int = 1, steps: int = 10) -> gym.Env:
    return gym.wrappers.TimeLimit(TwoCostsEnv(n_costs), steps)


def make_model(env: Any = None, **kwargs: Any) -> SACLag:
    defaults: dict[str, Any] = dict(
        policy_kwargs=dict(net_arch=[16, 16]),
        learning_starts=10,
        batch_size=8,
        buffer_size=100,
        cost_limit=3.0,
        seed=0,
        device="cpu",
    )
    return SACLag("MlpPolicy", make_env() if env is None else env, **{**defaults, **kwargs})


def log_ent_coef(model: SACLag) -> th.Tensor:
    assert model.log_ent_coef is not None
    return model.log_ent_coef


def ent_coef_optimizer(model: SACLag) -> th.optim.Adam:
    assert model.ent_coef_optimizer is not None
    return model.ent_coef_optimizer


def weights(model: SACLag) -> dict[str, th.Tensor]:
    state = {
        **model.policy.state_dict(),
        **model.lagrange_multiplier.state_dict(),
        "ent_coef": model._current_ent_coef().detach(),
    }
    return {key: value.clone() for key, value in state.items()}


def assert_close(a: dict[str, th.Tensor], b: dict[str, th.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_allclose(a[key].detach(), b[key].detach(), rtol=1e-4, atol=1e-6, err_msg=key)


# --- the update ------------------------------------------------------------------------------------------------------


def plain_critics(critic: Any, obs: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """Every member of an ensemble on its own, on the concatenated input: (E, batch, n_outputs)."""
    outputs = []
    for index in range(critic.n_critics):
        hidden = th.cat([obs, actions], dim=1)
        for depth, (weight, bias) in enumerate(zip(critic.weights, critic.biases, strict=True)):
            if depth > 0:
                hidden = critic.activation(F.layer_norm(hidden, hidden.shape[-1:]) if critic.layer_norm else hidden)
            hidden = hidden @ weight[index] + bias[index]
        outputs.append(hidden)
    return th.stack(outputs)


def plain_energy(model: SACLag, obs: th.Tensor, actions: th.Tensor, rho: list[float]) -> th.Tensor:
    """The Lagrangian, augmented where rho > 0, as it is printed: (batch,)."""
    costs = plain_critics(model.cost_critic, obs, actions)
    risk = costs.mean(dim=0) + costs.std(dim=0)
    energy = -plain_critics(model.critic, obs, actions).squeeze(-1).min(dim=0).values
    for index, coef in enumerate(rho):
        multiplier = model.lagrange_multiplier.value[index]
        violation = risk[:, index] - float(model.cost_budget[index])
        if coef == 0:
            energy = energy + multiplier * violation
        else:
            energy = energy + ((multiplier + coef * violation).clamp_min(0).square() - multiplier.square()) / (2 * coef)
    return energy


def plain_update(model: SACLag, batch: CostReplayBufferSamples, rho: list[float]) -> None:
    """One update of everything, written down as in the papers, with PyTorch's plain Adam."""
    policy: ConstrainedPolicy = model.policy
    alpha = log_ent_coef(model).detach().exp()
    with th.no_grad():
        next_actions, next_log_prob = model.actor.action_log_prob(batch.next_observations)
        next_obs: Any = batch.next_observations
        next_value = plain_critics(policy.critic_target, next_obs, next_actions).min(dim=0).values
        next_value = next_value - alpha * next_log_prob.unsqueeze(1)
        target = batch.rewards + (1 - batch.reward_dones) * model.gamma * next_value
        next_costs = plain_critics(policy.cost_critic_target, next_obs, next_actions).clamp_min(0)
        cost_target = batch.costs + (1 - batch.terminations) * model.cost_gamma * next_costs
    obs: Any = batch.observations
    # The paper's multiplier follows what the critics expect of the replay buffer's actions
    with th.no_grad():
        costs = plain_critics(model.cost_critic, obs, batch.actions)
        violation = (costs.mean(dim=0) + costs.std(dim=0)).mean(dim=0) - th.as_tensor(model.cost_budget)
    loss = sum(F.mse_loss(value, target) for value in plain_critics(policy.critic, obs, batch.actions))
    cost_loss = F.mse_loss(plain_critics(policy.cost_critic, obs, batch.actions), cost_target)
    plain_step(loss, policy.critic, 1e-3)  # type: ignore[arg-type]
    plain_step(cost_loss, policy.cost_critic, 2e-3)

    actions, log_prob = model.actor.action_log_prob(obs)
    energy = plain_energy(model, obs, actions, rho)
    plain_step((energy + alpha * log_prob).mean(), model.actor, 3e-3)
    with th.no_grad():
        # Adam's first step is as long as the learning rate, against the sign of the gradient
        gradient = -(log_prob + model._target_entropy).mean()
        log_ent_coef(model).sub_(1e-3 * gradient.sign())
        assert isinstance(model.lagrange_multiplier, LagrangeMultiplier)
        model.lagrange_multiplier.parameter.add_(4e-3 * violation.sign())


def plain_step(loss: th.Tensor, network: th.nn.Module, learning_rate: float) -> None:
    parameters = list(network.parameters())
    optimizer = th.optim.Adam(parameters, lr=learning_rate, fused=False, foreach=False)
    for parameter, gradient in zip(parameters, th.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()


@pytest.mark.parametrize("rho", [[0.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
def test_the_update_is_the_plain_one(rho: list[float]) -> None:
    model = make_model(
        make_env(2),
        cost_limit=[3.0, 0.1],
        **{**PAPER, "rho": rho},
        multiplier_signal="buffer",
        multiplier_kwargs=dict(init_value=[0.5, 2.0], learning_rate=4e-3),
        cost_critic_learning_rate=2e-3,
        actor_learning_rate=3e-3,
        learning_starts=50,
    )
    model.learn(50)
    model._update_learning_rates()
    model._set_cost_floor()
    # Critics whose minimum is not always the same one
    with th.no_grad():
        for critic in (model.critic, model.critic_target, model.cost_critic, model.cost_critic_target):
            for parameter in critic.parameters():
                parameter.add_(0.1 * th.randn_like(parameter))
    plain = copy.deepcopy(model)
    batch: Any = model.replay_buffer.sample(32)  # type: ignore[union-attr]
    th.manual_seed(3)
    metrics = model._update(batch)
    th.manual_seed(3)
    plain_update(plain, batch, rho)
    assert_close(weights(model), weights(plain))
    assert metrics["ent_coef"] == 1.0


def test_without_a_multiplier_it_is_sac(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five updates of both on the same batches. Noise is left out: the two draw it in another order."""
    monkeypatch.setattr(th.distributions.Normal, "rsample", lambda self, shape=(): self.mean)
    kwargs: dict[str, Any] = dict(learning_rate=1e-3, tau=0.02, gamma=0.9, ent_coef="auto_0.1", batch_size=16)
    plain = dict(net_arch=[16, 16], layer_norm=False)
    model = make_model(**PAPER, cost_limit=1e6, learning_starts=50, policy_kwargs=plain, **kwargs)
    model.learn(50)
    sac = SAC("MlpPolicy", make_env(), policy_kwargs=dict(net_arch=[16, 16]), device="cpu", **kwargs)
    sac.set_logger(model.logger)
    sac.actor.load_state_dict(model.actor.state_dict())

    def as_nets(critic: Any) -> dict[str, th.Tensor]:
        state = {}
        for index in range(2):
            for depth, (weight, bias) in enumerate(zip(critic.weights, critic.biases, strict=True)):
                state[f"qf{index}.{2 * depth}.weight"] = weight[index].t().detach().clone()
                state[f"qf{index}.{2 * depth}.bias"] = bias[index, 0].detach().clone()
        return state

    sac.critic.load_state_dict(as_nets(model.critic))
    sac.critic_target.load_state_dict(as_nets(model.critic_target))
    for _ in range(5):
        batch: Any = model.replay_buffer.sample(16)  # type: ignore[union-attr]
        # The first fields are those of SB3's
        for each, samples in ((model, batch), (sac, ReplayBufferSamples(*batch[:5]))):
            with monkeypatch.context() as patch:
                patch.setattr(each.replay_buffer, "sample", lambda *args, samples=samples, **kwargs: samples)
                each.train(1, 16)
    assert float(model.lagrange_multiplier.value) == 0.0
    assert_close(dict(model.actor.state_dict()), dict(sac.actor.state_dict()))
    assert_close(as_nets(model.critic), dict(sac.critic.state_dict()))
    assert_close(as_nets(model.critic_target), dict(sac.critic_target.state_dict()))
    th.testing.assert_close(log_ent_coef(model), sac.log_ent_coef, rtol=1e-4, atol=1e-6)
    assert log_ent_coef(model).item() != pytest.approx(np.log(0.1))


# --- the entropy coefficient -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ent_coef", ["auto", "auto_0.1", 0.3, "0.3", 0.0])
def test_the_entropy_coefficient_starts_and_is_learned_as_in_sac(ent_coef: Any) -> None:
    model = make_model(ent_coef=ent_coef)
    sac = SAC("MlpPolicy", make_env(), ent_coef=ent_coef, device="cpu")
    learned = str(ent_coef).startswith("auto")
    start = sac.log_ent_coef.exp().item() if learned else sac.ent_coef_tensor.item()  # type: ignore[union-attr]
    assert model._current_ent_coef().item() == pytest.approx(start)
    assert model._target_entropy == sac.target_entropy == -2.0
    model.learn(20)
    assert (model._current_ent_coef().item() != pytest.approx(start)) == learned
    assert model.logger.name_to_value["train/ent_coef"] == pytest.approx(start, rel=0.05)
    assert (model.log_ent_coef is not None) == (model.ent_coef_optimizer is not None) == learned


@pytest.mark.parametrize("target_entropy, rises", [(10.0, True), (-50.0, False)])
def test_the_entropy_coefficient_moves_towards_the_target(target_entropy: float, rises: bool) -> None:
    model = make_model(target_entropy=target_entropy)
    model.learn(30)
    assert (log_ent_coef(model).item() > 0.0) == rises


def test_the_entropy_coefficient_has_the_learning_rate_of_all() -> None:
    model = make_model(learning_rate=lambda progress: 1e-3 * (2 - progress), actor_learning_rate=1e-5)
    model.learn(20)
    assert model.critic.optimizer.param_groups[0]["lr"] == 2e-3
    assert ent_coef_optimizer(model).param_groups[0]["lr"] == 2e-3
    assert model.actor.optimizer.param_groups[0]["lr"] == 1e-5


@pytest.mark.parametrize(
    "name, value",
    [
        ("ent_coef", value)
        for value in (-1.0, "auto_0", "auto_-1", "auto_x", "automatic", "x", np.nan, np.inf, None, [1.0, 2.0])
    ]
    + [("target_entropy", value) for value in ("x", None, np.nan, -np.inf)],
)
def test_what_makes_no_sense_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^`{name}` must be"):
        make_model(**{name: value})


def test_a_divergence_sets_the_entropy_coefficient_back() -> None:
    env = make_env()
    model = make_model(env, learning_rate=0.1, normalize=False)
    model.learn(20)
    assert log_ent_coef(model).item() != 0.0
    env.unwrapped.reward = 1e30  # type: ignore[attr-defined]
    with pytest.raises(FloatingPointError, match="set back to what it was after update 0"):
        model.learn(20, reset_num_timesteps=False)
    assert log_ent_coef(model).item() == 0.0
    assert log_ent_coef(model).requires_grad
    assert all(value.isfinite().all() for value in weights(model).values())


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ent_coef", ["auto", 0.3])
def test_a_loaded_model_goes_on_as_the_saved_one(tmp_path: Path, ent_coef: Any) -> None:
    model = make_model(ent_coef=ent_coef)
    model.learn(30)
    model.save(tmp_path / "model")
    loaded = SACLag.load(tmp_path / "model", make_env(), device="cpu")
    assert all(th.equal(value, weights(loaded)[name]) for name, value in weights(model).items())
    # Including all moments of all optimizers
    batch: Any = model.replay_buffer.sample(16)  # type: ignore[union-attr]
    for each in (model, loaded):
        each._set_cost_floor()
        th.manual_seed(0)
        each._update(batch)
    assert all(th.equal(value, weights(loaded)[name]) for name, value in weights(model).items())
    if ent_coef == "auto":
        moments = [ent_coef_optimizer(each).state[log_ent_coef(each)]["exp_avg"] for each in (model, loaded)]
        assert th.equal(*moments) and moments[0].item() != 0.0


def test_a_fixed_entropy_coefficient_can_be_given_anew(tmp_path: Path) -> None:
    make_model(ent_coef=0.3).save(tmp_path / "model")
    assert SACLag.load(tmp_path / "model", ent_coef=0.1).ent_coef_tensor.item() == pytest.approx(0.1)


@pytest.mark.parametrize(
    "saved, given, message", [(0.3, "auto", "a number"), ("auto", 0.3, "'auto'"), ("auto_0.1", "0.3", "'auto'")]
)
def test_a_fixed_entropy_coefficient_is_not_loaded_as_a_learned_one(
    tmp_path: Path, saved: Any, given: Any, message: str
) -> None:
    make_model(ent_coef=saved).save(tmp_path / "model")
    with pytest.raises(ValueError, match=f"`ent_coef` must be {message}.* as the model was saved, got {given!r}"):
        SACLag.load(tmp_path / "model", ent_coef=given)


# --- policies --------------------------------------------------------------------------------------------------------


class CostOf(gym.Wrapper):
    """Every step costs 1."""

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated, truncated, {**info, "cost": 1.0}


@pytest.mark.parametrize("share_features_extractor", [False, True])
@pytest.mark.parametrize("policy", ["CnnPolicy", "MultiInputPolicy"])
def test_images_and_dictionaries(policy: str, share_features_extractor: bool) -> None:
    env: gym.Env = (
        FakeImageEnv(screen_height=36, screen_width=36, n_channels=1, discrete=False)
        if policy == "CnnPolicy"
        else SimpleMultiObsEnv(discrete_actions=False, random_start=False)
    )
    kwargs = dict(features_dim=8) if policy == "CnnPolicy" else dict(cnn_output_dim=8)
    model = SACLag(
        policy,
        CostOf(env),
        learning_starts=4,
        batch_size=4,
        buffer_size=20,
        cost_limit=1.0,
        episode_length=10,
        policy_kwargs=dict(net_arch=[8], features_extractor_kwargs=kwargs, share_features_extractor=share_features_extractor),
        seed=0,
        device="cpu",
    )
    before = weights(model)
    model.learn(8)
    after = weights(model)
    for network in ("actor.features_extractor", "actor.mu", "critic.weights", "cost_critic.weights"):
        assert any(not th.equal(before[name], after[name]) for name in after if name.startswith(network)), network
    assert all(value.isfinite().all() for value in after.values())
    obs, _ = env.reset()
    actions, _ = model.predict(obs)
    assert env.action_space.contains(actions)


# --- learning --------------------------------------------------------------------------------------------------------


class SquareCostEnv(gym.Env):
    """The reward is the action and the cost its square: with a limit of 0.25 a step the best action is 0.5."""

    observation_space = spaces.Box(-1.0, 1.0, shape=(1,), dtype=np.float32)
    action_space = spaces.Box(-1.0, 1.0, shape=(1,), dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        return np.zeros(1, dtype=np.float32), float(action[0]), False, False, {"cost": float(action[0] ** 2)}


def test_it_learns_the_best_policy_within_its_limit() -> None:
    env = gym.wrappers.TimeLimit(SquareCostEnv(), 10)
    model = make_model(
        env,
        cost_limit=2.5,
        gamma=0.5,
        cost_gamma=0.5,
        ent_coef=0.01,
        learning_starts=100,
        batch_size=64,
        buffer_size=2000,
        # With a small entropy coefficient the best policy without a limit is one that no longer tries anything
        constraint_start=0.0,
        policy_kwargs=dict(net_arch=[32, 32]),
    )
    model.learn(1000)
    mean_reward, _, mean_cost, _ = evaluate_policy(model, env, 20, warn=False)
    assert 4.5 < mean_reward < 5.3
    assert 2.1 < mean_cost < 2.8
    assert 0.3 < float(model.lagrange_multiplier.value) < 2.0
