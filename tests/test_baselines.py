"""The baselines of the benchmarks: honest ones, or a comparison with them says nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from baselines import ConstrainedSAC
from stable_baselines3.sac.policies import Actor

from sb3_algd.lagrangian import augmented_lagrangian, estimate_risk

SMALL: dict[str, Any] = dict(policy_kwargs=dict(net_arch=[16]), batch_size=8, learning_starts=20, seed=0)


def make_model(**kwargs: Any) -> ConstrainedSAC:
    model = ConstrainedSAC("GaussianPolicy", "TwoModes-v0", **{**SMALL, **kwargs})
    return model.learn(30)


def test_the_policy_step_is_sacs_with_the_energy_for_the_value() -> None:
    model = make_model(rho=2.0)
    observations = th.rand(8, 1)
    expected_model = ConstrainedSAC("GaussianPolicy", "TwoModes-v0", **SMALL)
    expected_model.policy.load_state_dict(model.policy.state_dict())
    actor, ent_coef = expected_model.actor, model.log_ent_coef.detach().exp()
    assert isinstance(actor, Actor)

    th.manual_seed(1)
    actions, log_prob = actor.action_log_prob(observations)
    value = model.critic(observations, actions).amin(dim=0).squeeze(-1)
    risk = estimate_risk(model.cost_critic(observations, actions), 1.0)
    energy = augmented_lagrangian(value, risk, model.lagrange_multiplier.value, model._budget, 2.0)
    gradients = th.autograd.grad((energy + ent_coef * log_prob).mean(), list(actor.parameters()))

    th.manual_seed(1)
    model._update_policy(observations)
    for parameter, gradient in zip(model.actor.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        th.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_next_values_include_the_entropy() -> None:
    model = make_model()
    observations = th.rand(8, 1)
    th.manual_seed(1)
    actions, log_prob = model.actor.action_log_prob(observations)
    th.manual_seed(1)
    values, costs = model._next_values(observations)
    entropy_bonus = values - model.critic_target(observations, actions).amin(dim=0)
    th.testing.assert_close(entropy_bonus, -model.log_ent_coef.exp() * log_prob.unsqueeze(1))
    assert costs.shape == (4, 8, 1)


@pytest.mark.parametrize("higher", [True, False])
def test_the_entropy_coefficient_moves_towards_the_target(higher: bool) -> None:
    model = make_model()
    model.target_entropy = 1e6 if higher else -1e6
    before = model.log_ent_coef.item()
    for _ in range(50):
        model._update_policy(th.rand(8, 1))
    assert (model.log_ent_coef.item() > before) == higher


def test_the_entropy_coefficient_follows_the_schedule() -> None:
    model = make_model(learning_rate=lambda progress: 1e-2 * progress)
    assert model.ent_coef_optimizer.param_groups[0]["lr"] == model.critic.optimizer.param_groups[0]["lr"] < 1e-2


def test_it_cannot_be_recorded() -> None:
    with pytest.raises(ValueError, match="cuda_graph"):
        make_model(cuda_graph=True)


def test_it_is_saved_and_goes_on(tmp_path: Path) -> None:
    model = make_model()
    model.save(tmp_path / "model")
    loaded = ConstrainedSAC.load(tmp_path / "model", env=model.get_env())
    assert loaded.log_ent_coef.item() == model.log_ent_coef.item() != 0.0
    obs = np.zeros((1, 1), np.float32)
    assert np.array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    # The optimiser goes on with the coefficient that was loaded
    loaded.learn(30, reset_num_timesteps=False)
    assert loaded.log_ent_coef.item() != model.log_ent_coef.item()
