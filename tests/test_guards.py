"""What keeps a long run from going wrong silently."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_algd import evaluate_policy
from sb3_algd.common.checkpoint import ResumableCheckpointCallback, resume
from sb3_algd.common.checkpoint_files import read_manifest
from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm
from sb3_algd.common.guards import NormalizationBackup, check_finite
from tests.conftest import (
    Algorithm,
    BrokenEnv,
    CostlyEnv,
    make_env,
    make_model,
    make_model_of,
    make_one_env,
    same,
    weights,
)


class NotFiniteEnv(CostlyEnv):
    """
    Something that is not finite comes up.

    :param step: At which step of the environment's life, 0 for the first observation.
    :param what: ``"observation"``, of the step or of the episode that begins after it, or ``"reward"``
    """

    def __init__(self, step: int, what: str = "observation", terminated: bool = False) -> None:
        super().__init__()
        self.bad_step, self.what, self.terminated = step, what, terminated
        self.steps = 0

    def reset(self, **kwargs: Any) -> Any:
        obs, info = super().reset(**kwargs)
        return (obs * np.nan if self.terminated and self.steps == self.bad_step else obs), info

    def step(self, action: np.ndarray) -> Any:
        obs, reward, _, truncated, info = super().step(action)
        self.steps += 1
        if self.steps == self.bad_step and not self.terminated:
            obs, reward = (obs * np.inf, reward) if self.what == "observation" else (obs, np.nan)
        return obs, reward, self.terminated and self.steps == self.bad_step, truncated, info


@pytest.mark.parametrize("step", [0, 25])
@pytest.mark.parametrize("normalize", [False, True])
def test_a_first_observation_that_is_not_finite_never_reaches_the_policy(
    monkeypatch: pytest.MonkeyPatch, normalize: bool, step: int
) -> None:
    env: Any = make_vec_env(lambda: NotFiniteEnv(step, terminated=True), n_envs=1)
    model = make_model(VecNormalize(env) if normalize else env)
    seen: list[np.ndarray] = []

    def watched(obs: np.ndarray, **kwargs: Any) -> Any:
        seen.append(obs)
        return predict(obs, **kwargs)

    predict = model.predict
    monkeypatch.setattr(model, "predict", watched)
    with pytest.raises(ValueError, match="non-finite observation"):
        model.learn(60)
    assert model.num_timesteps == step
    assert all(np.isfinite(obs).all() for obs in seen)
    # The episode after the next reset is a sound one, and training goes on
    env.set_attr("bad_step", -1)
    env.envs[0].unwrapped.bad_step = -1
    model.learn(30, reset_num_timesteps=False)
    assert model.num_timesteps == step + 30


@pytest.mark.parametrize("what", ["observation", "reward"])
def test_normalisation_survives_what_is_not_finite(what: str) -> None:
    env = VecNormalize(make_vec_env(lambda: NotFiniteEnv(25, what), n_envs=1))
    sound = VecNormalize(make_vec_env(CostlyEnv, n_envs=1))
    with pytest.raises(ValueError, match=f"non-finite {what}"):
        make_model(env, learning_starts=1000).learn(60)
    make_model(sound, learning_starts=1000).learn(24)
    assert isinstance(env.obs_rms, RunningMeanStd) and isinstance(sound.obs_rms, RunningMeanStd)
    # As it was after the last sound step
    np.testing.assert_array_equal(env.obs_rms.mean, sound.obs_rms.mean)
    np.testing.assert_array_equal(env.obs_rms.var, sound.obs_rms.var)
    assert (env.ret_rms.mean, env.ret_rms.var, env.ret_rms.count) == (
        sound.ret_rms.mean,
        sound.ret_rms.var,
        sound.ret_rms.count,
    )


def test_normalisation_of_dictionaries_is_kept_too() -> None:
    class DictEnv(CostlyEnv):
        observation_space = gym.spaces.Dict(a=CostlyEnv.observation_space)

        def reset(self, **kwargs: Any) -> Any:
            obs, info = super().reset(**kwargs)
            return {"a": obs}, info

    env = VecNormalize(DummyVecEnv([DictEnv]))
    env.reset()
    backup = NormalizationBackup(env)
    assert isinstance(env.obs_rms, dict)
    before = env.obs_rms["a"].mean.copy()
    env.obs_rms["a"].update(np.full((1, 3), np.nan))
    assert np.isnan(env.obs_rms["a"].mean).all()
    backup.restore()
    np.testing.assert_array_equal(env.obs_rms["a"].mean, before)


def test_the_key_of_a_dictionary_is_named() -> None:
    check_finite("observation", {"a": np.zeros(2), "b": np.ones(2, dtype=np.uint8)})
    with pytest.raises(ValueError, match=r"non-finite observation 'b': \[nan\]"):
        check_finite("observation", {"a": np.zeros(2), "b": np.array([np.nan])})


def test_what_is_infinite_in_single_precision_is_refused() -> None:
    check_finite("reward", np.array([1e38]))
    with pytest.raises(ValueError, match="non-finite reward"):
        check_finite("reward", np.array([1e39]))


# --- divergence ------------------------------------------------------------------------------------------------------


def test_divergence_sets_the_weights_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: Algorithm) -> None:
    monkeypatch.setattr("sb3_algd.common.guards.BACKUP_INTERVAL", 8)
    # Without units of their own, which change the weights before a copy is made
    model = make_model_of(algorithm, normalize=False).learn(36)
    assert model._n_updates == 16
    # The copy is made before the 17th update
    sound = weights(model)
    moments = {key: value["exp_avg"].clone() for key, value in model.critic.optimizer.state_dict()["state"].items()}
    model.learn(3, reset_num_timesteps=False)
    with th.no_grad():
        next(model.cost_critic.parameters()).fill_(th.inf)
    with pytest.raises(
        FloatingPointError, match=r"cost_critic_loss became.*at update 20 \(step 40\).*after update 16 and can be"
    ):
        model.learn(10, reset_num_timesteps=False)
    assert same(weights(model), sound) and model._n_updates == 16
    for key, value in model.critic.optimizer.state_dict()["state"].items():
        assert th.equal(value["exp_avg"], moments[key])
    model.save(tmp_path / "model")
    algorithm.load(tmp_path / "model", env=make_env()).learn(25)


def test_the_weights_are_copied_within_a_long_call_too(monkeypatch: pytest.MonkeyPatch, algorithm: Algorithm) -> None:
    monkeypatch.setattr("sb3_algd.common.guards.BACKUP_INTERVAL", 8)
    model = make_model_of(algorithm).learn(21)
    calls: list[None] = []
    update = model._update

    def diverging_update(*args: Any) -> Any:
        calls.append(None)
        if len(calls) == 20:
            with th.no_grad():
                next(model.critic.parameters()).fill_(th.nan)
        return update(*args)

    monkeypatch.setattr(model, "_update", diverging_update)
    # One update and a copy before it were made by learn(); the next copies are due before the updates after 8 and 16
    with pytest.raises(FloatingPointError, match="set back to what it was after update 16"):
        model.train(30, 16)
    assert model._n_updates == 16 and all(th.isfinite(value).all() for value in weights(model).values())
    # Nothing that was learned elsewhere is left over from the divergence
    model.train(2, 16)


def test_spoilt_weights_are_not_copied(monkeypatch: pytest.MonkeyPatch, algorithm: Algorithm) -> None:
    monkeypatch.setattr("sb3_algd.common.guards.BACKUP_INTERVAL", 1)
    model = make_model_of(algorithm).learn(25)
    with th.no_grad():
        next(model.actor.parameters()).fill_(th.nan)
    with pytest.raises(FloatingPointError, match="set back to what it was after update 4"):
        model.train(1, 16)
    assert all(th.isfinite(value).all() for value in weights(model).values())


class SpoilCritic(BaseCallback):
    """
    Fills weights of critics with a value.

    :param name: Which critics, ``"critic"`` or ``"cost_critic"``
    :param step: When
    :param value: Which value
    """

    def __init__(self, name: str, step: int, value: float) -> None:
        super().__init__()
        self.name, self.step, self.value = name, step, value

    def _on_step(self) -> bool:
        if self.num_timesteps == self.step:
            with th.no_grad():
                next(getattr(self.model, self.name).parameters()).fill_(self.value)
        return True


def test_weights_that_are_not_finite_are_not_stored(tmp_path: Path) -> None:
    # Without updates, nothing but the callback can notice
    model = make_model(make_one_env(), gradient_steps=0)
    with pytest.raises(FloatingPointError, match=r"not finite at step 60.*The checkpoint of step 40 stays"):
        model.learn(100, [SpoilCritic("cost_critic", 45, th.nan), ResumableCheckpointCallback(20, tmp_path)])
    assert read_manifest(tmp_path)["num_timesteps"] == 40


def test_divergence_leaves_a_checkpoint_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="training diverged"):
        make_model(make_one_env()).learn(100, [SpoilCritic("critic", 50, th.inf), ResumableCheckpointCallback(20, tmp_path)])
    resumed = resume(tmp_path, make_one_env())
    assert resumed.num_timesteps == 100
    assert all(th.isfinite(value).all() for value in weights(resumed).values())


# --- environments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what, message",
    [
        ("reward", "non-finite reward"),
        ("cost", "non-finite cost"),
        ("observation", "non-finite observation"),
        ("six", r"more than Gymnasium's five values.*wrap"),
    ],
)
def test_a_broken_environment_gives_an_error_and_loses_nothing(
    tmp_path: Path, what: str, message: str, algorithm: Algorithm
) -> None:
    model = make_model_of(algorithm, gym.wrappers.TimeLimit(BrokenEnv(what), 1000))
    with pytest.raises(ValueError, match=message):
        model.learn(100)
    assert model.replay_buffer is not None and model.replay_buffer.pos == 29
    assert all(th.isfinite(value).all() for value in weights(model).values())
    model.save(tmp_path / "model")
    assert same(weights(algorithm.load(tmp_path / "model")), weights(model))


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


def check_steps_follow_on_each_other(model: ConstrainedOffPolicyAlgorithm) -> None:
    buffer = model.replay_buffer
    assert buffer is not None and buffer.pos > 25
    before, after = buffer.observations[: buffer.pos, 0, 0], buffer.next_observations[: buffer.pos, 0, 0]
    assert (after - before).tolist() == [1.0] * buffer.pos
    ends = buffer.dones[: buffer.pos, 0].astype(bool)
    # Where it does not go on from one row to the next, an episode has ended
    assert ends[:-1][before[1:] != after[:-1]].all()


@pytest.mark.parametrize("nan_at", [15, 20])  # within an episode, and its last step
def test_going_on_after_bad_input_stores_true_transitions_only(nan_at: int, algorithm: Algorithm) -> None:
    model = make_model_of(algorithm, gym.wrappers.TimeLimit(CountingEnv(nan_at), 20), learning_starts=100)
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


def test_a_six_tuple_environment_in_a_process_of_its_own_gives_the_advice() -> None:
    env = SubprocVecEnv([lambda: gym.wrappers.TimeLimit(BrokenEnv("six"), 1000)], start_method="fork")
    with pytest.raises(RuntimeError, match=r"SubprocVecEnv\) died; its own error is printed.*sb3_algd.envs.SixTupleEnv"):
        make_model(env).learn(40)


def test_a_six_tuple_environment_in_an_evaluation_gives_the_advice() -> None:
    with pytest.raises(ValueError, match=r"more than Gymnasium's five values.*wrap"):
        evaluate_policy(make_model(), BrokenEnv("six"), warn=False)


def test_warnings_point_at_the_users_line() -> None:
    with pytest.warns(UserWarning, match="a limit of 25 per episode") as record:
        make_model(cost_limit=None)
    assert record[0].filename == make_model.__code__.co_filename
    with pytest.warns(UserWarning, match="never binds") as record:
        model = make_model("Pendulum-v1", learning_starts=1000).learn(10)
    assert record[0].filename == __file__
    with pytest.warns(UserWarning, match="reported no cost") as record:
        evaluate_policy(model, gym.wrappers.TimeLimit(gym.make("Pendulum-v1"), 2), n_eval_episodes=1)
    assert [warning.filename for warning in record if "no cost" in str(warning.message)] == [__file__]


# --- actions ---------------------------------------------------------------------------------------------------------


class CostOfActions(CostlyEnv):
    """Its cost is that of the action, as in many environments."""

    def step(self, action: np.ndarray) -> Any:
        obs, reward, terminated, truncated, _ = super().step(action)
        return obs, reward, terminated, truncated, {"cost": float(np.abs(action).sum())}


class SpoilActor(BaseCallback):
    """Makes the policy act NaN from a step on."""

    def _on_step(self) -> bool:
        if self.num_timesteps == 35:
            with th.no_grad():
                for parameter in self.model.policy.actor.parameters():  # type: ignore[union-attr]
                    parameter.fill_(th.nan)
        return True


def test_an_action_that_is_not_finite_is_the_policys_fault(monkeypatch: pytest.MonkeyPatch, algorithm: Algorithm) -> None:
    monkeypatch.setattr("sb3_algd.common.guards.BACKUP_INTERVAL", 4)
    model = make_model_of(algorithm, gym.wrappers.TimeLimit(CostOfActions(), 20), train_freq=10, gradient_steps=4)
    with pytest.raises(
        FloatingPointError,
        match=r"The policy's action became .*nan.* at step 35: .*has not seen it. The model was set back to what it was",
    ):
        model.learn(60, SpoilActor())
    assert model.replay_buffer is not None and model.replay_buffer.pos == 35
    assert all(th.isfinite(value).all() for value in weights(model).values())
    model.learn(20)


def test_bounds_without_width_are_refused(algorithm: Algorithm) -> None:
    env = make_env()
    env.unwrapped.action_space = gym.spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 0.0], np.float32))
    with pytest.raises(ValueError, match="`action_space` must have low < high in every dimension"):
        make_model_of(algorithm, env)


@pytest.mark.parametrize("cost", ["1.0", {"speed": 1.0}, [[1.0], [1.0, 2.0]]])
def test_a_cost_that_is_no_number_is_named(cost: Any) -> None:
    with pytest.raises(
        ValueError, match=r"reported a cost that is no number and no sequence of numbers: .*cost_key=<function"
    ):
        make_model(cost_key=lambda info: cost).learn(5)
