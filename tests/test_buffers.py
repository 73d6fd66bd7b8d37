"""Costs in the replay buffers."""

import copy
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_algd.common.buffers import (
    CostDictReplayBuffer,
    CostHerReplayBuffer,
    CostNStepReplayBuffer,
    CostReplayBuffer,
    CostReplayBufferSamples,
    cost_buffer_class,
)
from tests.conftest import CostlyBitFlipping

OBSERVATIONS = spaces.Box(-1e6, 1e6, shape=(2,), dtype=np.float32)
ACTIONS = spaces.Box(-1.0, 1.0, shape=(1,), dtype=np.float32)
N_ENVS = 3


def transition(step: int, n_envs: int = N_ENVS, **info: Any) -> dict[str, Any]:
    """A step in which every number tells its step and environment."""
    tag = step + 0.1 * np.arange(n_envs)
    return dict(
        obs=np.stack([tag, tag], axis=1),
        next_obs=np.stack([tag + 1, tag + 1], axis=1),
        action=np.full((n_envs, 1), 0.5),
        reward=10.0 * tag,
        done=np.zeros(n_envs, dtype=bool),
        infos=[{"cost": [tag[i], -tag[i]], **info} for i in range(n_envs)],
    )


def filled(buffer: CostReplayBuffer, steps: int) -> CostReplayBuffer:
    for step in range(steps):
        buffer.add(**transition(step, buffer.n_envs))
    return buffer


def cost_sample(buffer: Any, size: int = 256) -> CostReplayBufferSamples:
    sample = buffer.sample(size)
    assert isinstance(sample, CostReplayBufferSamples)
    return sample


@pytest.mark.parametrize("steps", [5, 13])  # not yet full, overwritten
def test_costs_stay_with_their_transition(steps: int) -> None:
    buffer = filled(CostReplayBuffer(8 * N_ENVS, OBSERVATIONS, ACTIONS, "cpu", N_ENVS, n_constraints=2), steps)
    batch = cost_sample(buffer)
    assert batch.costs.shape == (256, 2)
    assert isinstance(batch.observations, th.Tensor) and isinstance(batch.next_observations, th.Tensor)
    tag = batch.observations[:, 0]
    assert len(tag.unique()) > N_ENVS
    th.testing.assert_close(batch.costs, th.stack([tag, -tag], dim=1))
    th.testing.assert_close(batch.rewards[:, 0], 10.0 * tag)
    th.testing.assert_close(batch.next_observations[:, 0], tag + 1.0)


def test_the_lowest_costs_are_known_after_they_were_overwritten() -> None:
    buffer = CostReplayBuffer(8 * N_ENVS, OBSERVATIONS, ACTIONS, "cpu", N_ENVS, n_constraints=2)
    assert buffer.lowest_costs.tolist() == [0.0, 0.0]
    filled(buffer, 5)
    assert buffer.lowest_costs.tolist() == [0.0, pytest.approx(-4.2)]
    buffer.add(**{**transition(0), "infos": [{"cost": [-1.0, 0.0]}] * N_ENVS})
    filled(buffer, 4)
    filled(buffer, 4)
    assert buffer.lowest_costs.tolist() == [-1.0, pytest.approx(-4.2)]


def test_memory_optimised_buffer_keeps_costs_aligned() -> None:
    buffer = CostReplayBuffer(
        8, OBSERVATIONS, ACTIONS, "cpu", 1, optimize_memory_usage=True, handle_timeout_termination=False, n_constraints=2
    )
    batch = cost_sample(filled(buffer, 11))
    assert isinstance(batch.observations, th.Tensor) and isinstance(batch.next_observations, th.Tensor)
    tag = batch.observations[:, 0]
    th.testing.assert_close(batch.costs[:, 0], tag)
    th.testing.assert_close(batch.next_observations[:, 0], tag + 1.0)


def test_dict_observations() -> None:
    space = spaces.Dict(a=OBSERVATIONS, b=spaces.Discrete(4))
    buffer = CostDictReplayBuffer(30, space, ACTIONS, "cpu", N_ENVS)
    for step in range(6):
        data = transition(step)
        for key in ("obs", "next_obs"):
            data[key] = {"a": data[key], "b": np.full(N_ENVS, step % 4)}
        data["infos"] = [{"cost": step + 0.1 * i} for i in range(N_ENVS)]
        buffer.add(**data)
    batch = cost_sample(buffer)
    assert isinstance(batch.observations, dict)
    th.testing.assert_close(batch.costs[:, 0], batch.observations["a"][:, 0])


def test_time_limits_bootstrap_and_terminations_do_not() -> None:
    buffer = CostReplayBuffer(30, OBSERVATIONS, ACTIONS, "cpu", N_ENVS, n_constraints=2)
    data = transition(0)
    data["done"] = np.array([True, True, False])
    data["infos"][1]["TimeLimit.truncated"] = True
    buffer.add(**data)
    batch = cost_sample(buffer)
    assert isinstance(batch.observations, th.Tensor)
    first = batch.observations[:, 0] < 0.05  # environment 0
    assert first.any() and not first.all()
    th.testing.assert_close(batch.reward_dones[:, 0], first.float())
    th.testing.assert_close(batch.terminations, batch.reward_dones)


def test_reward_cut_key_cuts_the_reward_bootstrap_only() -> None:
    buffer = CostReplayBuffer(30, OBSERVATIONS, ACTIONS, "cpu", N_ENVS, n_constraints=2, reward_cut_key="goal_met")
    buffer.add(**transition(0, goal_met=True))
    buffer.add(**transition(1, goal_met=False))
    batch = cost_sample(buffer)
    assert isinstance(batch.observations, th.Tensor)
    th.testing.assert_close(batch.reward_dones[:, 0], (batch.observations[:, 0] < 0.5).float())
    assert not batch.terminations.any()


def n_step_buffer(**kwargs: Any) -> CostNStepReplayBuffer:
    return CostNStepReplayBuffer(8, OBSERVATIONS, ACTIONS, "cpu", 1, n_steps=3, gamma=0.9, cost_gamma=0.5, **kwargs)


def n_step_batch(buffer: CostNStepReplayBuffer, row: int) -> dict[str, float]:
    """The numbers of one sampled transition."""
    batch = buffer._get_samples(np.array([row]))
    assert isinstance(batch.next_observations, th.Tensor)
    assert batch.discounts is not None and batch.cost_discounts is not None
    return dict(
        reward=batch.rewards.item(),
        cost=batch.costs[0, 0].item(),
        next_obs=batch.next_observations[0, 0].item(),
        done=batch.reward_dones.item(),
        cost_done=batch.terminations.item(),
        discount=batch.discounts.item(),
        cost_discount=batch.cost_discounts.item(),
    )


def test_n_step_sums_equal_a_hand_computation() -> None:
    buffer = n_step_buffer()
    for step in range(6):
        data = transition(step, 1)
        data["infos"] = [{"cost": float(step)}]
        data["done"] = np.array([step == 3])
        buffer.add(**data)
    assert n_step_batch(buffer, 0) == pytest.approx(
        dict(
            reward=0 + 0.9 * 10 + 0.81 * 20,
            cost=0 + 0.5 * 1 + 0.25 * 2,
            next_obs=3.0,
            done=0.0,
            cost_done=0.0,
            discount=0.9**3,
            cost_discount=0.5**3,
        )
    )
    # The episode terminates at step 3, the sum stops there
    assert n_step_batch(buffer, 2) == pytest.approx(
        dict(reward=20 + 0.9 * 30, cost=2 + 0.5 * 3, next_obs=4.0, done=1.0, cost_done=1.0, discount=0.81, cost_discount=0.25)
    )
    # Nothing follows the newest transition: one step, and a bootstrap
    assert n_step_batch(buffer, 5) == pytest.approx(
        dict(reward=50.0, cost=5.0, next_obs=6.0, done=0.0, cost_done=0.0, discount=0.9, cost_discount=0.5)
    )


def test_n_step_rewards_equal_those_of_sb3() -> None:
    ours = n_step_buffer()
    theirs = NStepReplayBuffer(8, OBSERVATIONS, ACTIONS, "cpu", 1, n_steps=3, gamma=0.9)
    rng = np.random.default_rng(0)
    for step in range(21):
        data = transition(step, 1)
        data["done"] = rng.random(1) < 0.3
        data["infos"] = [{"cost": 1.0, "TimeLimit.truncated": bool(data["done"][0] and rng.random() < 0.5)}]
        ours.add(**data)
        theirs.add(**data)
        rows = np.arange(min(step + 1, 8))
        batch, expected = ours._get_samples(rows), theirs._get_samples(rows)
        th.testing.assert_close(batch.reward_dones, expected.dones, msg=f"dones at step {step}")
        for field in ("observations", "next_observations", "rewards", "discounts"):
            th.testing.assert_close(getattr(batch, field), getattr(expected, field), msg=f"{field} at step {step}")


def test_n_step_reward_cut_stops_the_reward_sum_only() -> None:
    buffer = n_step_buffer(reward_cut_key="goal_met")
    for step in range(5):
        data = transition(step, 1)
        data["infos"] = [{"cost": float(step), "goal_met": step == 1}]
        buffer.add(**data)
    assert n_step_batch(buffer, 0) == pytest.approx(
        dict(reward=9.0, cost=1.0, next_obs=3.0, done=1.0, cost_done=0.0, discount=0.81, cost_discount=0.125)
    )


def test_her_keeps_each_transitions_cost() -> None:
    env = DummyVecEnv([lambda: CostlyBitFlipping(n_bits=4, continuous=True) for _ in range(2)])
    buffer = CostHerReplayBuffer(200, env.observation_space, env.action_space, env, "cpu", n_envs=2)
    obs = env.reset()
    for _ in range(40):
        action = np.stack([env.action_space.sample() for _ in range(2)])
        next_obs, reward, done, infos = env.step(action)
        assert isinstance(next_obs, dict)
        stored = {key: value.copy() for key, value in next_obs.items()}
        for i in np.flatnonzero(done):
            for key in stored:
                stored[key][i] = infos[i]["terminal_observation"][key]
        buffer.add(obs, stored, action, reward, done, infos)
        obs = next_obs
    batch = cost_sample(buffer, 100)
    assert isinstance(batch.next_observations, dict)
    th.testing.assert_close(batch.costs[:, 0], batch.next_observations["achieved_goal"].sum(dim=1).float())
    assert len(batch.costs.unique()) > 1
    assert not hasattr(buffer, "_drawn")


def test_vec_normalize_scales_rewards_and_leaves_costs() -> None:
    env = VecNormalize(DummyVecEnv([lambda: gym.make("Pendulum-v1")]))
    assert not isinstance(env.obs_rms, dict)
    env.ret_rms.var, env.obs_rms.mean = np.array(4.0), np.array([100.0, 0.0, 0.0])
    buffer = CostReplayBuffer(10, env.observation_space, env.action_space, "cpu")
    buffer.add(np.zeros((1, 3)), np.zeros((1, 3)), np.zeros((1, 1)), np.array([6.0]), np.array([False]), [{"cost": 7.0}])
    batch: Any = buffer.sample(4, env)
    th.testing.assert_close(batch.costs, th.full((4, 1), 7.0))
    th.testing.assert_close(batch.rewards, th.full((4, 1), 3.0), atol=1e-4, rtol=0)
    assert isinstance(batch.observations, th.Tensor) and batch.observations[0, 0] == -10.0


@pytest.mark.parametrize("name", ["next_obs", "reward", "cost"])
def test_non_finite_numbers_are_refused_and_nothing_is_stored(name: str) -> None:
    buffer = filled(CostReplayBuffer(30, OBSERVATIONS, ACTIONS, "cpu", N_ENVS, n_constraints=2), 2)
    before = pickle.dumps(buffer)
    data = transition(2)
    if name == "cost":
        data["infos"][1]["cost"] = [0.0, np.nan]
    else:
        data[name][1] = np.inf
    with pytest.raises(ValueError, match="non-finite"):
        buffer.add(**data)
    assert pickle.dumps(buffer) == before


def test_a_copy_keeps_the_function_that_reads_costs() -> None:
    def total(info: dict[str, Any]) -> float:
        return sum(info["cost"])

    buffer = filled(CostReplayBuffer(30, OBSERVATIONS, ACTIONS, "cpu", N_ENVS, cost_key=total), 2)
    copied = copy.deepcopy(buffer)
    copied.add(**transition(2))
    assert copied.size() == 3 and buffer.size() == 2
    assert pickle.loads(pickle.dumps(buffer)).cost_key is None  # as before: another process may not have it


def test_a_wrong_number_of_costs_is_refused() -> None:
    buffer = CostReplayBuffer(30, OBSERVATIONS, ACTIONS, "cpu", N_ENVS)
    with pytest.raises(ValueError, match=r"2 cost\(s\) per step but there are 1 cost limit"):
        buffer.add(**transition(0))


def test_sb3_classes_map_to_their_twins() -> None:
    assert cost_buffer_class(ReplayBuffer) is CostReplayBuffer
    assert cost_buffer_class(DictReplayBuffer) is CostDictReplayBuffer
    assert cost_buffer_class(NStepReplayBuffer) is CostNStepReplayBuffer
    assert cost_buffer_class(HerReplayBuffer) is CostHerReplayBuffer
    assert issubclass(CostNStepReplayBuffer, NStepReplayBuffer) and issubclass(CostHerReplayBuffer, HerReplayBuffer)

    class Mine(CostReplayBuffer):
        pass

    class Stranger(ReplayBuffer):
        pass

    assert cost_buffer_class(Mine) is Mine
    with pytest.raises(ValueError, match="Stranger does not store costs"):
        cost_buffer_class(Stranger)


def test_her_does_not_cut_relabelled_transitions() -> None:
    class GoalMet(CostlyBitFlipping):
        def step(self, action: Any) -> Any:
            *others, info = super().step(action)
            return *others, {**info, "goal_met": True}

    env = DummyVecEnv([lambda: GoalMet(n_bits=4, continuous=True, max_steps=5)])
    buffer = CostHerReplayBuffer(200, env.observation_space, env.action_space, env, "cpu", reward_cut_key="goal_met")
    obs = env.reset()
    for _ in range(40):
        action = np.stack([env.action_space.sample()])
        next_obs, reward, _done, infos = env.step(action)
        buffer.add(obs, next_obs, action, reward, np.zeros(1), infos)
        obs = next_obs
    buffer.end_episodes()
    batch = cost_sample(buffer, 100)
    # Four of five are relabelled, and come last
    np.testing.assert_array_equal(batch.reward_dones[:, 0], [1.0] * 20 + [0.0] * 80)
    assert not batch.terminations.any()
