"""Models and replay buffers that version 0.1.0 has saved."""

import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th

from sb3_algd import ALGD, CostNStepReplayBuffer, CostReplayBuffer, evaluate_policy
from sb3_algd.common.constraint import budget_per_unit_cost
from sb3_algd.common.lagrange import EpisodeController, LagrangeMultiplier
from sb3_algd.common.legacy import adopt_saved

DATA = Path(__file__).parent / "data"
#: Trained for 2,000 steps
TRAINED = DATA / "algd_0.1.0_trained.zip"
#: What version 0.1.0 itself says of the models: deterministic actions in this state, and the multiplier
OBSERVATION = np.array([0.25], dtype=np.float32)
ACTIONS = {"ve": [-0.9430947303771973, -0.24672538042068481], "ddpm": [0.027431607246398926, 0.17668652534484863]}
MULTIPLIERS = {"ve": 0.8978996276855469, "ddpm": 0.67274010181427}


def load(diffusion: str, env: Any = None, **kwargs: Any) -> ALGD:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ALGD.load(DATA / f"algd_0.1.0_{diffusion}.zip", env, device="cpu", **kwargs)


@pytest.mark.parametrize("diffusion", ["ve", "ddpm"])
def test_the_saved_policy_acts_as_it_did(diffusion: str) -> None:
    model = load(diffusion)
    actions, _ = model.predict(OBSERVATION, deterministic=True)
    np.testing.assert_allclose(actions, ACTIONS[diffusion], atol=1e-6)
    assert float(model.lagrange_multiplier.value) == MULTIPLIERS[diffusion]
    assert model.actor.diffusion == diffusion
    if diffusion == "ddpm":
        assert isinstance(model.lagrange_multiplier, LagrangeMultiplier)
        assert model.lagrange_multiplier.optimizer.state_dict()["state"] != {}


def test_arguments_have_their_names_of_today() -> None:
    ve, ddpm = load("ve"), load("ddpm")
    assert (ve.actor_learning_rate, ve.cost_critic_learning_rate, ddpm.actor_learning_rate) == (5e-4, 2e-4, None)
    assert ve.multiplier_kwargs == dict(init_value=0.9, max_value=7.0)
    assert ve.score_kwargs == dict(temperature=0.5, n_samples=3, pairing="after", grad_through_chain=False)
    assert (ve.multiplier_signal, ddpm.multiplier_signal) == ("episodes", "buffer")
    assert ddpm.multiplier_kwargs == dict(init_value=0.6931, learning_rate=3e-4, max_value=100.0)
    assert ddpm.score_kwargs == dict(temperature=1.0, n_samples=4, pairing="before", grad_through_chain=True)
    # And an effect
    assert (ve.lagrange_multiplier.max_value, ddpm.lagrange_multiplier.max_value) == (7.0, 100.0)
    assert isinstance(ve.lagrange_multiplier, EpisodeController) and isinstance(ddpm.lagrange_multiplier, LagrangeMultiplier)
    assert (ve._score_matching.n_samples, ddpm._score_matching.pairing) == (3, "before")
    assert (ve.score_coef, ddpm.score_coef) == (0.1, 0.1)
    # The energy is the one that they have learned in
    for model in (ve, ddpm):
        assert (model.penalty, model.normalize, model.constraint_start, model._constraint_acts) == (
            "pointwise",
            False,
            0.0,
            True,
        )
        assert model.cost_limit_gamma == model.cost_gamma
        assert model._rho.tolist() == [model.rho] and model._proportional.tolist() == [0.0]
    old_names = {"multiplier_init", "score_temperature", "policy_learning_rate", "score_space", "cuda_graph"}
    assert not old_names & (vars(ve).keys() | vars(ddpm).keys())


@pytest.mark.parametrize("diffusion", ["ve", "ddpm"])
def test_training_goes_on(diffusion: str, tmp_path: Path) -> None:
    with warnings.catch_warnings() if diffusion == "ddpm" else pytest.warns(UserWarning, match="updated another way"):
        model = ALGD.load(DATA / f"algd_0.1.0_{diffusion}.zip", gym.make("TwoModes-v0"), device="cpu")
    before, n_updates = {name: value.clone() for name, value in model.policy.state_dict().items()}, model._n_updates
    # The replay buffer is not in the file
    model.learning_starts, model.batch_size = model.num_timesteps + 100, 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(120, reset_num_timesteps=False)
    assert model._n_updates == n_updates + 20
    assert model.actor.optimizer.param_groups[0]["lr"] == (5e-4 if diffusion == "ve" else 1e-3)
    after = model.policy.state_dict()
    for network in ("actor", "critic", "cost_critic"):
        assert any(not th.equal(before[name], after[name]) for name in after if name.startswith(f"{network}."))
    assert float(model.lagrange_multiplier.value) != MULTIPLIERS[diffusion]
    # What is saved now is a model of today
    model.save(tmp_path / "model")
    loaded = ALGD.load(tmp_path / "model", device="cpu")
    assert loaded.multiplier_kwargs == model.multiplier_kwargs and loaded.score_kwargs == model.score_kwargs
    actions, again = (each.predict(OBSERVATION, deterministic=True)[0] for each in (model, loaded))
    np.testing.assert_array_equal(actions, again)


def test_costs_of_the_last_episodes_are_kept() -> None:
    model = load("ve")
    tracker = model._cost_tracker
    assert tracker is not None and len(tracker.episode_costs) > 0
    recent = tracker.recent_costs(discounted=False)
    np.testing.assert_array_equal(recent, list(tracker.episode_costs)[-10:])


def test_what_is_given_to_load_comes_first() -> None:
    kwargs = dict(learning_rate=0.2, max_value=50.0)
    model = load("ve", actor_learning_rate=1e-5, multiplier_kwargs=kwargs, score_kwargs=dict(n_samples=2))
    assert model.actor_learning_rate == 1e-5
    assert model.multiplier_kwargs == dict(init_value=0.9, learning_rate=0.2, max_value=50.0)
    assert (model.lagrange_multiplier.max_value, model._score_matching.n_samples) == (50.0, 2)
    assert model._score_matching.temperature == 0.5
    model = load("ve", penalty="expectation", normalize=True, constraint_start=0.3, policy_delay=3, cost_limit_gamma=0.9)
    assert (model.penalty, model.normalize, model.constraint_start, model.policy_delay) == ("expectation", True, 0.3, 3)
    assert model.cost_limit_gamma == 0.9 and "_given_to_load" not in vars(model)


def test_a_discount_factor_that_the_file_has_once_is_not_guessed_twice() -> None:
    with pytest.raises(ValueError, match="`cost_limit_gamma` must be given with `cost_gamma`"):
        load("ve", cost_gamma=0.5)
    model = load("ve", cost_gamma=0.5, cost_limit_gamma=0.9)
    assert (model.cost_gamma, model.cost_limit_gamma) == (0.5, 0.9)


def saved_attributes(**changed: Any) -> dict[str, Any]:
    """Attributes of a model of version 0.1.0, as far as they matter here."""
    old = dict(
        multiplier_init=0.5,
        multiplier_learning_rate=1e-4,
        multiplier_max=10.0,
        multiplier_space="projected",
        multiplier_signal="buffer",
        cost_gamma=0.99,
        score_temperature=1.0,
        n_score_samples=4,
        score_pairing="after",
        score_grad_through_chain=False,
        policy_learning_rate=None,
        guidance_coef=1.0,
        score_coef=0.1,
        score_space="action",
        clip_score_samples=False,
    )
    return {
        "actor_learning_rate": None,
        "policy_kwargs": {},
        "multiplier_kwargs": None,
        "score_kwargs": None,
        **old,
        **changed,
    }


def test_the_weights_of_the_two_losses_are_kept() -> None:
    attributes = saved_attributes(guidance_coef=0.0)
    adopt_saved(attributes)
    assert (attributes["guidance_coef"], attributes["score_coef"]) == (0.0, 0.1)


@pytest.mark.parametrize("name, value", [("score_space", "latent"), ("clip_score_samples", True)])
def test_an_option_that_is_gone_is_not_dropped_silently(name: str, value: Any) -> None:
    attributes = saved_attributes(**{name: value})
    with pytest.warns(UserWarning, match=f"trained with {name}={value!r}"):
        adopt_saved(attributes)
    assert name not in attributes


def test_attributes_of_a_model_of_today_stay() -> None:
    attributes = {"score_kwargs": None, "multiplier_kwargs": {"max_value": 5.0}}
    adopt_saved(attributes)
    assert attributes == {"score_kwargs": None, "multiplier_kwargs": {"max_value": 5.0}}


def test_the_agent_that_comes_along_keeps_its_limit() -> None:
    model = ALGD.load(TRAINED, device="cpu")
    assert model.cost_limit.tolist() == [64.0]
    mean_reward, _, mean_cost, _ = evaluate_policy(model, gym.make("TwoModes-v0"), 5, warn=False)
    assert 60 < mean_reward < 80 and 45 < mean_cost < 66


def test_in_a_new_process() -> None:
    program = f"""
import numpy as np
from stable_baselines3.common.save_util import load_from_pkl
# Pickled classes are found by their old names, also before anything else of the package was imported
buffer = load_from_pkl({str(DATA / "algd_0.1.0_buffer.pkl")!r})
from sb3_algd import ALGD
for path in {[str(DATA / "algd_0.1.0_ve.zip"), str(DATA / "algd_0.1.0_ddpm.zip"), str(TRAINED)]!r}:
    print("action", *ALGD.load(path, device="cpu").predict(np.float32([0.25]), deterministic=True)[0])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("action")]
    actions = [[float(number) for number in numbers] for _, *numbers in lines]
    np.testing.assert_allclose(actions[:2], [ACTIONS["ve"], ACTIONS["ddpm"]], atol=1e-6)
    assert len(actions) == 3


def test_a_replay_buffer_is_loaded_and_follows_the_model() -> None:
    model = ALGD("MlpPolicy", "TwoModes-v0", n_steps=2, cost_gamma=0.5, buffer_size=40, batch_size=8, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_replay_buffer(DATA / "algd_0.1.0_buffer.pkl")
        buffer: Any = model.replay_buffer
        assert type(buffer) is CostNStepReplayBuffer
        assert (buffer.n_steps, buffer.cost_gamma, buffer.cost_key) == (2, 0.5, "cost")
        # It was made with the seed 0
        assert buffer.n_added == buffer.size() == 30
        np.testing.assert_allclose(buffer.costs[:3].ravel(), [0.07503403, 0.84282124, 0.3925529], rtol=1e-6)
        assert buffer.costs.sum() == pytest.approx(9.187499)
        assert buffer.lowest_costs.tolist() == [0.0]
        model.learning_starts = 0
        model.learn(20)
    assert model._n_updates == 20 and buffer.n_added == 50


def test_a_replay_buffer_without_its_lowest_costs_gets_them() -> None:
    model = ALGD("MlpPolicy", "TwoModes-v0", buffer_size=40, device="cpu")
    assert isinstance(model.replay_buffer, CostReplayBuffer)
    old = pickle.loads(pickle.dumps(model.replay_buffer))
    old.costs[3] = -2.0
    del old.lowest_costs, old.cost_reported
    old.adopt_settings(model.replay_buffer)
    assert old.lowest_costs.tolist() == [-2.0] and old.cost_reported


def test_weights_alone_are_taken_from_a_file_of_version_0_1_0() -> None:
    trained = load("ddpm")
    kwargs: dict[str, Any] = dict(policy_kwargs=trained.policy_kwargs, multiplier_kwargs=dict(max_value=100.0))
    model = ALGD("MlpPolicy", "TwoModes-v0", device="cpu", **kwargs)
    model.set_parameters(str(DATA / "algd_0.1.0_ddpm.zip"))
    assert all(th.equal(value, trained.policy.state_dict()[name]) for name, value in model.policy.state_dict().items())
    assert float(model.lagrange_multiplier.value) == MULTIPLIERS["ddpm"]


def test_weights_alone_are_not_taken_into_critics_of_another_kind() -> None:
    kwargs = {**load("ve").policy_kwargs, "layer_norm": True}
    model = ALGD("MlpPolicy", "TwoModes-v0", policy_kwargs=kwargs, device="cpu")
    with pytest.raises(ValueError, match="must have layer_norm=False"):
        model.set_parameters(str(DATA / "algd_0.1.0_ve.zip"))
    plain = ALGD("MlpPolicy", "TwoModes-v0", policy_kwargs=dict(layer_norm=False), device="cpu")
    with pytest.raises(ValueError, match="must have layer_norm=True"):
        plain.set_parameters(ALGD("MlpPolicy", "TwoModes-v0", device="cpu").get_parameters())


def test_the_budget_is_the_one_that_was_saved() -> None:
    model = load("ve")
    factor = 1.0 if model.cost_limit_discounted else budget_per_unit_cost(model.episode_length, model.cost_gamma)
    assert model.cost_budget == pytest.approx(model.cost_limit * factor)


@pytest.mark.parametrize("signal", ["episodes", "buffer"])
def test_parameters_alone_keep_a_multiplier_that_is_no_logarithm(signal: Any) -> None:
    model = ALGD("MlpPolicy", "TwoModes-v0", policy_kwargs=load("ve").policy_kwargs, multiplier_signal=signal, device="cpu")
    model.set_parameters(str(DATA / "algd_0.1.0_ve.zip"))
    assert float(model.lagrange_multiplier.value) == pytest.approx(MULTIPLIERS["ve"], rel=1e-6)
