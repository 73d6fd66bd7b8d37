"""What a model makes of the costs of its rollouts: limits, replay buffer, logs and warnings."""

import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_algd import ALGD, CostHerReplayBuffer, CostNStepReplayBuffer, CostReplayBuffer
from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm
from tests.conftest import Algorithm, CostlyBitFlipping, CostlyEnv, make_env, make_model, make_model_of


def cost_limits(model: ConstrainedOffPolicyAlgorithm) -> list[float]:
    assert isinstance(model.cost_limit, np.ndarray)
    return model.cost_limit.tolist()


def logged(model: ConstrainedOffPolicyAlgorithm, folder: Path, steps: int = 100) -> dict[str, float]:
    model.set_logger(configure(str(folder), ["csv"]))
    model.learn(steps, log_interval=1)
    lines = (folder / "progress.csv").read_text().splitlines()
    return {
        key: float(value)
        for key, value in zip(lines[0].split(","), lines[-1].split(","), strict=True)
        if value not in ("", "None")
    }


def test_costs_and_losses_are_logged(tmp_path: Path, algorithm: Algorithm) -> None:
    model = make_model_of(algorithm, cost_gamma=0.9, multiplier_kwargs=dict(learning_rate=0.01, init_value=0.5))
    row = logged(model, tmp_path)
    costs = np.mean(model.ep_cost_buffer)
    assert len(model.ep_cost_buffer) == 5
    assert row["rollout/ep_cost_mean"] == pytest.approx(costs)
    assert row["rollout/cost_rate"] == pytest.approx(costs / 20)  # five whole episodes of 20 steps
    assert row["rollout/cost_limit"] == 5.0 and row["rollout/horizon"] == 20
    factor = (1 - 0.9**20) / 0.1 / 20
    assert row["train/cost_budget"] == pytest.approx(5.0 * factor)
    # As of the last update, which came before the fifth episode had ended
    assert row["train/episode_cost"] == pytest.approx(np.mean(list(model.ep_cost_buffer)[:4]) * factor)
    assert "rollout/ep_rew_mean" in row and "rollout/ep_cost_discounted_mean" not in row
    special = "score_loss" if algorithm is ALGD else "ent_coef"
    for key in ("critic_loss", "cost_critic_loss", "energy", special, "policy_grad_norm", "risk", "policy_risk"):
        assert np.isfinite(row[f"train/{key}"])
    # Three episodes have ended while the constraint acts, four of them as of the last update
    assert 0.0 < row["train/multiplier"] != 0.5


def test_each_constraint_is_logged_and_discounted_limits_in_their_unit(tmp_path: Path, algorithm: Algorithm) -> None:
    discounted: dict[str, Any] = dict(cost_limit_discounted=True, cost_gamma=0.9, cost_limit_gamma=0.9)
    discounted["multiplier_kwargs"] = dict(init_value=1.0)
    model = make_model_of(algorithm, make_env(n_costs=2), cost_limit=[5.0, 3.0], **discounted)
    row = logged(model, tmp_path)
    assert [row["train/cost_budget_0"], row["train/cost_budget_1"]] == [5.0, 3.0]
    assert row["train/multiplier_0"] > 0 and row["train/risk_1"] != row["train/risk_0"]
    assert 0 < row["rollout/ep_cost_discounted_mean_0"] < row["rollout/ep_cost_mean_0"]
    assert model._cost_tracker is not None
    before = np.mean(list(model._cost_tracker.discounted_costs)[:4], axis=0)
    assert [row["train/episode_cost_0"], row["train/episode_cost_1"]] == pytest.approx(before.tolist())


def test_the_limit_that_the_environment_declares_is_taken(capsys: pytest.CaptureFixture[str], algorithm: Algorithm) -> None:
    model = make_model_of(algorithm, "TwoModes-v0", cost_limit=None, verbose=1, gamma=0.9, cost_gamma=0.9)
    assert cost_limits(model) == [64.0] and model.episode_length == 100 and not model.cost_limit_discounted
    assert model.cost_budget[0] == pytest.approx(64 * (1 - 0.9**100) / 0.1 / 100)
    assert "Cost limit per episode (plain sum): [64.0], horizon: 100 steps" in capsys.readouterr().out
    with pytest.raises(ValueError, match="2 value"):
        make_model_of(algorithm, "TwoModes-v0", cost_limit=[1.0, 2.0])


def test_a_declared_discounted_limit() -> None:
    env = make_env()
    env.unwrapped.cost_limit, env.unwrapped.cost_limit_discounted = 7.0, True  # type: ignore[attr-defined]
    model = make_model(env, cost_limit=None, cost_gamma=0.99)
    assert model.cost_limit_discounted and model.cost_budget.tolist() == [7.0]
    assert make_model(env, cost_limit=None, cost_limit_discounted=False).cost_limit_discounted is False
    # A limit that the user gives is in the declared unit unless said otherwise
    with pytest.warns(UserWarning, match="taken for a discounted sum"):
        model = make_model(env, cost_limit=6.0, cost_gamma=0.99)
    assert model.cost_limit_discounted and model.cost_budget.tolist() == [6.0]
    assert not make_model(env, cost_limit=7.0, cost_limit_discounted=False).cost_limit_discounted


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


def test_a_multiplier_that_no_episode_moves_is_warned_about_once() -> None:
    model = make_model(CostlyEnv(), episode_length=20)
    start = model.lagrange_multiplier.value.clone()
    with pytest.warns(UserWarning, match="No episode has ended in 41 steps") as warned:
        model.learn(60)
    assert len([warning for warning in warned if "No episode" in str(warning.message)]) == 1
    assert th.equal(model.lagrange_multiplier.value, start)


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
    assert samples.reward_dones.sum() == 0


def test_buffer_costs_match_the_environments_row_by_row() -> None:
    model = make_model(make_vec_env(lambda: make_env(2), n_envs=3), cost_limit=[1.0, 2.0]).learn(90)
    buffer = model.replay_buffer
    assert isinstance(buffer, CostReplayBuffer) and buffer.pos == 30
    np.testing.assert_allclose(buffer.costs[:30], buffer.observations[:30, :, :2] ** 2, rtol=1e-6)
    assert len(np.unique(buffer.costs[:30])) == 180
    buffer.sample(8)


def test_vec_normalize_leaves_costs_and_learns(algorithm: Algorithm) -> None:
    env = VecNormalize(make_vec_env(make_env, n_envs=2))
    model = make_model_of(algorithm, env).learn(80)
    buffer = model.replay_buffer
    assert isinstance(buffer, CostReplayBuffer)
    np.testing.assert_allclose(buffer.costs[:40, :, 0], buffer.observations[:40, :, 0] ** 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "kwargs", [dict(n_steps=3), dict(replay_buffer_class=NStepReplayBuffer, replay_buffer_kwargs=dict(n_steps=3))]
)
def test_n_step_returns(tmp_path: Path, kwargs: dict, algorithm: Algorithm) -> None:
    model = make_model_of(algorithm, gamma=0.9, cost_gamma=0.8, **kwargs).learn(40)
    buffer = model.replay_buffer
    assert isinstance(buffer, CostNStepReplayBuffer)
    assert (buffer.n_steps, buffer.gamma, buffer.cost_gamma) == (3, 0.9, 0.8)
    model.save(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = algorithm.load(tmp_path / "model", env=make_env())
    assert isinstance(loaded.replay_buffer, CostNStepReplayBuffer)


def test_her(algorithm: Algorithm) -> None:
    env = DummyVecEnv([lambda: gym.wrappers.TimeLimit(CostlyBitFlipping(n_bits=3, continuous=True, max_steps=3), 3)])
    kwargs = dict(policy="MultiInputPolicy", replay_buffer_class=HerReplayBuffer, learning_starts=10, cost_limit=1.0)
    model = make_model_of(algorithm, env, buffer_size=100, **kwargs).learn(30)
    assert isinstance(model.replay_buffer, CostHerReplayBuffer) and model._n_updates == 20
    assert model.replay_buffer.costs.max() > 0


def test_learn_takes_a_float() -> None:
    assert make_model(learning_starts=1000).learn(2e1).num_timesteps == 20  # type: ignore[arg-type]


def test_a_wrong_number_of_limits_is_refused_at_the_first_step() -> None:
    model = make_model(make_env(n_costs=2))
    with pytest.raises(ValueError, match=r"reports 2 cost\(s\) per step but there are 1 cost limit"):
        model.learn(10)
    assert model.num_timesteps == 1


def test_n_steps_with_dict_observations_is_refused() -> None:
    with pytest.raises(AssertionError, match="not supported for Dict"):
        make_model(CostlyBitFlipping(continuous=True), policy="MultiInputPolicy", n_steps=3)
