"""The update of ALGD against a plain re-implementation, and the options that it learns with."""

import copy
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.noise import NormalActionNoise
from torch.nn import functional as F

from sb3_algd import ALGD
from sb3_algd.algd.score import ScoreMatching
from sb3_algd.common.lagrange import LagrangeMultiplier
from tests.conftest import PAPER, SMALL, make_env, make_model, weights


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


def plain_energy(model: ALGD, obs: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """The paper's augmented Lagrangian, written down as it is printed: (batch,)."""
    q = plain_critics(model.critic, obs, actions).squeeze(-1).min(dim=0).values
    costs = plain_critics(model.cost_critic, obs, actions)
    risk = costs.mean(dim=0) + model.cost_risk_coef * costs.std(dim=0)
    multiplier, budget, rho = model.lagrange_multiplier.value, model._budget, th.as_tensor(model.rho)
    squares = (multiplier + rho * (risk - budget)).clamp_min(0).square() - multiplier.square()
    return (squares / (2 * rho)).sum(dim=1) - q


def plain_chain(model: ALGD, obs: th.Tensor) -> list[th.Tensor]:
    """The reverse process from its definition, each network call on its whole input: latents after each step."""
    network, steps = model.actor.network, model.actor.denoising_steps

    def output(second: th.Tensor, k: int) -> th.Tensor:
        embedding = network.step_embedding(th.full((len(obs),), k))
        return network.mlp(th.cat([obs, second, embedding], dim=1))

    noise = th.randn(steps, len(obs), 2)
    if model.actor.diffusion != "ddpm":
        sigma = 0.01 * 100.0 ** (np.arange(steps) / (steps - 1))
        drift = np.diff(sigma**2, prepend=0.0)
        unit, spread = np.ones(steps), np.sqrt(drift)
        if model.actor.diffusion == "ve-ancestral":
            # The network gives sigma_k times the score
            unit, spread = sigma, spread * np.append(0.0, sigma[:-1]) / sigma
    else:
        beta = np.linspace(1e-4, 0.02, steps)
        bar = np.cumprod(1 - beta)
        before = np.append(1.0, bar[:-1])
    x = noise[0]
    after: dict[int, th.Tensor] = {}
    for k in reversed(range(steps)):
        score = output(th.tanh(x), k)[:, :2]
        if model.actor.diffusion != "ddpm":
            x = x + drift[k] / unit[k] * score + (spread[k] * noise[k] if k > 0 else 0.0)
        else:
            clean = (x - np.sqrt(1 - bar[k]) * output(x, k)[:, 2:]) / np.sqrt(bar[k])
            x = (beta[k] * np.sqrt(before[k]) * clean + (1 - before[k]) * np.sqrt(1 - beta[k]) * x) / (1 - bar[k])
            x = x + 0.05 * score / score.norm(dim=1, keepdim=True)
            x = x + (np.sqrt(beta[k] * (1 - before[k]) / (1 - bar[k])) * noise[k] if k > 0 else 0.0)
        after[k] = x
    return [after[k] for k in range(steps)]


def plain_policy_gradients(
    model: ALGD, obs: th.Tensor, temperature: float, n_samples: int, through_chain: bool = False
) -> tuple[float, float, list[th.Tensor]]:
    """Both parts of the actor's loss and its gradients, with one backward pass per part and no shared work."""
    latents = plain_chain(model, obs)
    mean_energy = plain_energy(model, obs, th.tanh(latents[0])).mean()

    step = th.randint(model.actor.denoising_steps, (len(obs),))
    chosen = th.tanh(th.stack(latents)[step, th.arange(len(obs))])
    action = chosen.detach()
    sigma = model.actor.process.score_std[step].unsqueeze(1)
    noise = th.randn(n_samples, len(obs), 2)
    energies, gradients = [], []
    for i in range(n_samples):
        sample = (action + sigma * noise[i]).requires_grad_()
        energy = plain_energy(model, obs, sample)
        energies.append(energy.detach())
        gradients.append(th.autograd.grad(energy.sum(), sample)[0])
    likelihoods = th.softmax(-th.stack(energies) / temperature, dim=0)
    target = sum(-w.unsqueeze(1) * g for w, g in zip(likelihoods, gradients, strict=True)) / temperature
    network = model.actor.network
    asked = chosen if through_chain else action
    predicted = network.mlp(th.cat([obs, asked, network.step_embedding(step)], dim=1))[:, :2]
    if model.actor.diffusion == "ve-ancestral":
        target = sigma * target
    score_loss = (predicted - target).square().mean()
    loss = model.guidance_coef * mean_energy + model.score_coef * score_loss
    return mean_energy.item(), score_loss.item(), list(th.autograd.grad(loss, list(model.actor.parameters())))


@pytest.mark.parametrize("active", ["nowhere", "somewhere", "everywhere"])
@pytest.mark.parametrize("diffusion", ["ve", "ve-ancestral", "ddpm"])
@pytest.mark.parametrize("n_costs", [1, 3])
def test_policy_update_equals_a_plain_implementation(diffusion: str, n_costs: int, active: str) -> None:
    model = make_model(
        make_env(n_costs),
        cost_limit=[2.0] * n_costs,
        policy_kwargs=dict(SMALL, diffusion=diffusion),
        score_kwargs=dict(temperature=0.7, n_samples=5),
        guidance_coef=0.8,
        score_coef=0.3,
        # One for all, or one per constraint
        **{**PAPER, "rho": 0.5 if n_costs == 1 else [0.5, 1.0, 0.2]},
    )
    model.units.acts.fill_(1.0)
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
        model.lagrange_multiplier.value.fill_(0.3)
        model._budget.copy_(threshold[active] + model.lagrange_multiplier.value / th.as_tensor(model.rho))
    th.manual_seed(5)
    energy, score_loss, gradients = plain_policy_gradients(model, obs, temperature=0.7, n_samples=5)
    critics_before = [parameter.clone() for parameter in [*model.critic.parameters(), *model.cost_critic.parameters()]]
    th.manual_seed(5)
    loss, metrics, policy_risk, _ = model._actor_loss(obs)
    loss.backward()
    share = (risk > threshold[active]).float().mean().item()
    assert {"nowhere": share == 0.0, "somewhere": 0.2 < share < 0.8, "everywhere": share == 1.0}[active]
    assert metrics["energy"].item() == pytest.approx(energy, rel=1e-4, abs=1e-5)
    assert metrics["score_loss"].item() == pytest.approx(score_loss, rel=1e-4)
    for (name, parameter), expected in zip(model.actor.named_parameters(), gradients, strict=True):
        assert parameter.grad is not None
        th.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5, msg=name)
    # The critics get neither a step nor gradients from the actor's loss
    critics = [*model.critic.parameters(), *model.cost_critic.parameters()]
    assert all(th.equal(a, b) for a, b in zip(critics_before, critics, strict=True))
    assert all(parameter.grad is None for parameter in critics)
    assert policy_risk.shape == (n_costs,)


@pytest.mark.parametrize("diffusion", ["ve", "ve-ancestral", "ddpm"])
@pytest.mark.parametrize("n_costs", [1, 2])
def test_critic_update_equals_a_plain_implementation(n_costs: int, diffusion: str) -> None:
    policy_kwargs = dict(SMALL, diffusion=diffusion)
    model = make_model(
        make_env(n_costs), cost_limit=[2.0] * n_costs, gamma=0.9, cost_gamma=0.8, policy_kwargs=policy_kwargs, **PAPER
    )
    model.learn(20)  # fills the buffer, no update yet
    assert model.replay_buffer is not None
    model._set_cost_floor()
    batch: Any = model.replay_buffer.sample(64)
    batch = batch._replace(reward_dones=(th.rand(64, 1) < 0.3).float(), terminations=(th.rand(64, 1) < 0.3).float())
    th.manual_seed(3)
    with th.no_grad():
        next_actions = th.tanh(plain_chain(model, batch.next_observations)[0])
        next_q = plain_critics(model.critic_target, batch.next_observations, next_actions)
        y = batch.rewards + (1 - batch.reward_dones) * 0.9 * th.minimum(next_q[0], next_q[1])
        next_costs = plain_critics(model.cost_critic_target, batch.next_observations, next_actions)
        assert (next_costs < 0).any() and (next_costs > 0).any()
        next_costs = next_costs.clamp_min(0.0)  # no cost of this environment is negative
    q = plain_critics(model.critic, batch.observations, batch.actions)
    critic_loss = ((q[0] - y) ** 2).mean() + ((q[1] - y) ** 2).mean()
    costs = plain_critics(model.cost_critic, batch.observations, batch.actions)
    cost_loss = th.stack(
        [((costs[e] - (batch.costs + (1 - batch.terminations) * 0.8 * next_costs[e])) ** 2).mean() for e in range(4)]
    ).mean()
    expected = [
        *th.autograd.grad(critic_loss, list(model.critic.parameters())),
        *th.autograd.grad(cost_loss, list(model.cost_critic.parameters())),
    ]
    th.manual_seed(3)
    *losses, risk = model._critic_losses(batch)
    assert losses[0].item() == pytest.approx(critic_loss.item(), rel=1e-4)
    assert losses[1].item() == pytest.approx(cost_loss.item(), rel=1e-4)
    (losses[0] + losses[1]).backward()
    for parameter, gradient in zip([*model.critic.parameters(), *model.cost_critic.parameters()], expected, strict=True):
        assert parameter.grad is not None
        th.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
    th.testing.assert_close(risk, (costs.mean(dim=0) + costs.std(dim=0)).mean(dim=0).detach())


def test_score_matching_alone_leaves_the_noise_head() -> None:
    # However small, a guidance loss would make Adam take whole steps of it
    for guidance_coef in (0.0, 1e-6):
        model = make_model(policy_kwargs=dict(SMALL, diffusion="ddpm"), guidance_coef=guidance_coef)
        before = weights(model)
        model.learn(45)
        after = weights(model)
        name = "actor.network.mlp.4.weight"
        changed = (after[name] - before[name]).abs().amax(dim=1)
        assert (changed[:2] > 1e-3).all()
        assert (changed[2:] > 1e-3).all() if guidance_coef else (changed[2:] == 0.0).all()


def test_score_gradient_through_the_chain_is_an_option() -> None:
    gradients = []
    for through_chain in (False, True):
        model = make_model(guidance_coef=0.0, score_kwargs=dict(grad_through_chain=through_chain))
        th.manual_seed(0)
        loss, *_ = model._actor_loss(th.ones(16, 3))
        loss.backward()
        gradients.append(th.cat([p.grad.flatten() for p in model.actor.parameters() if p.grad is not None]))
    assert not th.allclose(gradients[0], gradients[1])


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False)),
        dict(action_noise=NormalActionNoise(np.zeros(2), 0.1 * np.ones(2)), gradient_steps=-1, train_freq=(1, "episode")),
        dict(rho=0.0, score_kwargs=dict(pairing="before"), multiplier_signal="buffer"),
        PAPER,
        dict(policy_kwargs=dict(SMALL, n_critics=3, n_cost_critics=1, denoising_steps=1), score_kwargs=dict(n_samples=1)),
        dict(use_policy_at_warmup=True),
    ],
)
def test_options_learn(kwargs: dict) -> None:
    model = make_model(**kwargs)
    before = weights(model)
    model.learn(45)
    learned = ("actor", "critic.", "cost_critic.")
    after = {key: value for key, value in model.policy.named_parameters() if key.startswith(learned)}
    assert not any(th.equal(before[key], value) for key, value in after.items())


def test_warmup_is_uniform_or_the_policys() -> None:
    small = {}
    for by_policy in (False, True):
        model = make_model(learning_starts=400, use_policy_at_warmup=by_policy).learn(400)
        assert model.replay_buffer is not None
        small[by_policy] = np.mean(np.abs(model.replay_buffer.actions[:400]) < 0.25)
    # Uniform actions fill the box evenly, the tanh of a nearly Gaussian latent of variance 2 prefers its edges
    assert small[False] == pytest.approx(0.25, abs=0.05)
    assert small[True] == pytest.approx(0.14, abs=0.05)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (
            dict(policy_kwargs=dict(diffusion="flow")),
            "`policy_kwargs` must have 've', 've-ancestral' or 'ddpm' as 'diffusion', got 'flow'",
        ),
        (dict(guidance_coef=-1.0), "`guidance_coef` must be a finite number >= 0"),
        (dict(score_coef=-1.0), "`score_coef` must be a finite number >= 0, got -1.0"),
        (dict(score_kwargs=dict(temperature=0.0)), "`score_kwargs` must be .*'temperature': a finite number > 0"),
        (dict(score_kwargs=dict(n_samples=0)), "`score_kwargs` must be .*'n_samples': a whole number"),
        (dict(score_kwargs=dict(n_samples=2.5)), "`score_kwargs` must be .*'n_samples': a whole number"),
        (dict(score_kwargs=dict(pairing="beside")), "'pairing': 'after' or 'before'"),
    ],
)
def test_bad_arguments(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**kwargs)


# --- the paper's arguments -------------------------------------------------------------------------------------------

#: What the paper and its released code have, where it is an argument here
PAPERS: dict[str, Any] = dict(
    learning_rate=3e-4,
    buffer_size=1_000_000,
    learning_starts=5000,
    batch_size=256,
    tau=0.005,
    gamma=0.99,
    train_freq=1,
    gradient_steps=10,
    n_steps=1,
    target_update_interval=2,
    cost_gamma=0.99,
    penalty="pointwise",
    rho=1.0,
    constraint_start=0.0,
    multiplier_signal="buffer",
    normalize=False,
    cost_risk_coef=1.0,
    cost_target_risk_coef=0.0,
    bound_cost_targets=False,
    actor_learning_rate=None,
    cost_critic_learning_rate=None,
    guidance_coef=1.0,
    score_coef=0.1,
    use_policy_at_warmup=True,
    policy_delay=1,
    reduced_precision=False,
)


def test_the_page_has_the_papers_arguments() -> None:
    page = (Path(__file__).parents[1] / "docs" / "modules" / "algd.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \| `(.*?)` \|$", page, re.MULTILINE)
    defaults = {name: parameter.default for name, parameter in inspect.signature(ALGD.__init__).parameters.items()}
    given = {name: value for name, value in ALGD.paper_kwargs().items() if value != defaults[name]}
    assert rows == [(name, repr(defaults[name]), repr(value)) for name, value in given.items()]


def test_the_papers_arguments_are_complete() -> None:
    """Whatever the defaults become, ``paper_kwargs`` has the paper's value of each argument."""
    given = ALGD.paper_kwargs()
    defaults = {name: parameter.default for name, parameter in inspect.signature(ALGD.__init__).parameters.items()}
    assert {name: given.get(name, defaults[name]) for name in PAPERS} == PAPERS
    model = make_model(**{**given, "buffer_size": 100})
    assert isinstance(model.lagrange_multiplier, LagrangeMultiplier)
    assert model.lagrange_multiplier.value.item() == pytest.approx(0.6931)
    assert model.multiplier_lr_schedule(1) == 3e-4
    # No bound that training would reach
    assert model.lagrange_multiplier.max_value >= 1e6
    assert vars(model._score_matching) == vars(
        ScoreMatching(temperature=1.0, n_samples=4, pairing="after", grad_through_chain=True)
    )
    assert model.replay_buffer is not None and model.replay_buffer.reward_cut_key == "goal_met"
    assert model.critic.n_critics == 2 and model.cost_critic.n_critics == 4
    assert not model.critic.layer_norm and not model.cost_critic.layer_norm
    assert (model.actor.diffusion, model.actor.denoising_steps) == ("ve", 5)
    assert make_model(**{**ALGD.paper_kwargs(safety_gym=False), "buffer_size": 100}).replay_buffer_kwargs == {}


@pytest.mark.parametrize("diffusion", ["ve", "ddpm"])
def test_with_the_papers_arguments_the_update_is_the_plain_one(diffusion: str) -> None:
    """A whole update, losses and Adam's steps written down plainly, as the paper and its code have them."""
    given = ALGD.paper_kwargs()
    given["policy_kwargs"] = {**SMALL, **given["policy_kwargs"], "diffusion": diffusion}
    model = make_model(**{**given, "buffer_size": 100, "learning_starts": 40, "batch_size": 16, "cost_limit": 5.0})
    model.learn(40)
    model._update_learning_rates()
    model._set_cost_floor()
    with th.no_grad():
        for critic in (model.critic, model.critic_target, model.cost_critic, model.cost_critic_target):
            for parameter in critic.parameters():
                parameter.add_(0.3 * th.randn_like(parameter))
    assert model.replay_buffer is not None
    batch: Any = model.replay_buffer.sample(16)
    plain = copy.deepcopy(model)
    th.manual_seed(4)
    model._update(batch)

    th.manual_seed(4)
    with th.no_grad():
        next_actions = th.tanh(plain_chain(plain, batch.next_observations)[0])
        next_value = plain_critics(plain.policy.critic_target, batch.next_observations, next_actions).min(dim=0).values
        target = batch.rewards + (1 - batch.reward_dones) * 0.99 * next_value
        # Each member its own, also below zero
        next_costs = plain_critics(plain.policy.cost_critic_target, batch.next_observations, next_actions)
        cost_targets = batch.costs + (1 - batch.terminations) * 0.99 * next_costs
    costs = plain_critics(plain.cost_critic, batch.observations, batch.actions)
    risk = (costs.mean(dim=0) + costs.std(dim=0)).mean(dim=0).detach()
    values = plain_critics(plain.critic, batch.observations, batch.actions)
    losses = [(plain.critic, sum((value - target).square().mean() for value in values))]
    losses.append((plain.cost_critic, (costs - cost_targets).square().mean()))
    for network, loss in losses:
        plain_step(network, th.autograd.grad(loss, list(network.parameters())))
    plain_step(plain.actor, plain_policy_gradients(plain, batch.observations, 1.0, 4, through_chain=True)[2])
    # Adam's first step is as long as the learning rate
    expected = np.log(0.6931) + 3e-4 * np.sign(risk.item() - plain.cost_budget.item())
    assert isinstance(model.lagrange_multiplier, LagrangeMultiplier)
    assert model.lagrange_multiplier.parameter.item() == pytest.approx(expected, abs=1e-7)
    for name, value in model.policy.state_dict().items():
        th.testing.assert_close(value, plain.policy.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


def plain_step(network: th.nn.Module, gradients: Any) -> None:
    optimizer = th.optim.Adam(network.parameters(), lr=3e-4, fused=False, foreach=False)
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
