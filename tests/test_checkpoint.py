"""Checkpoints: training resumed after a kill equals the uninterrupted one, bit for bit."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_algd import ALGD, SACLag
from sb3_algd.common.callbacks import CostEvalCallback
from sb3_algd.common.checkpoint import ResumableCheckpointCallback, resume
from sb3_algd.common.checkpoint_files import MANIFEST, MANIFEST_COPY, PARITY, read_manifest
from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm
from sb3_algd.common.run_lock import LOCK
from tests.conftest import (
    SMALL,
    Algorithm,
    CostlyBitFlipping,
    make_env,
    make_model,
    make_model_of,
    make_one_env,
    same,
    weights,
)

STEPS, SAVE_FREQ = 72, 20


def normalized_envs() -> VecEnv:
    return VecNormalize(make_vec_env(lambda: make_env(2), n_envs=2))


def goal_envs() -> VecEnv:
    return make_vec_env(lambda: CostlyBitFlipping(n_bits=3, continuous=True, max_steps=5), n_envs=2)


class StopAt(BaseCallback):
    """Breaks off as a kill would, at least for the process."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def _on_step(self) -> bool:
        if self.num_timesteps >= self.step:
            raise KeyboardInterrupt
        return True


def noise() -> OrnsteinUhlenbeckActionNoise:
    return OrnsteinUhlenbeckActionNoise(np.zeros(2), 0.1 * np.ones(2))


def interrupted_and_resumed(
    algorithm: Algorithm,
    make_envs: Callable[[], VecEnv],
    folder: Path,
    stop: int = 55,
    **kwargs: Any,
) -> tuple[ConstrainedOffPolicyAlgorithm, ConstrainedOffPolicyAlgorithm]:
    """The same training without and with an interruption."""
    models = []
    for name, extra in (("whole", []), ("broken", [StopAt(stop)])):
        model = make_model_of(algorithm, make_envs(), **kwargs)
        callbacks = [*extra, ResumableCheckpointCallback(SAVE_FREQ, folder / name)]
        if extra:
            with pytest.raises(KeyboardInterrupt):
                model.learn(STEPS, callbacks)
        else:
            models.append(model.learn(STEPS, callbacks))
    # A new process has other states
    np.random.seed(123)
    th.manual_seed(123)
    models.append(resume(folder / "broken", make_envs()))
    return models[0], models[1]


def assert_same_training(whole: ConstrainedOffPolicyAlgorithm, resumed: ConstrainedOffPolicyAlgorithm) -> None:
    assert type(resumed) is type(whole)
    assert resumed.num_timesteps == whole.num_timesteps and resumed._n_updates == whole._n_updates
    assert resumed._episode_num == whole._episode_num
    # The controller and the energy's units among them
    assert same(weights(whole), weights(resumed))
    assert whole._constraint_acts and resumed._constraint_acts and whole.units.acts.item() == resumed.units.acts.item() == 1.0
    scales = whole._return_scale, resumed._return_scale
    assert scales[0] is not None and scales[1] is not None
    for name, value in vars(scales[0]).items():
        np.testing.assert_array_equal(value, vars(scales[1])[name], name)
    assert whole._n_fooled == resumed._n_fooled
    np.testing.assert_array_equal(whole._multiplier_before, resumed._multiplier_before)
    np.testing.assert_array_equal(whole.ep_cost_buffer, resumed.ep_cost_buffer)
    assert whole.ep_info_buffer is not None and resumed.ep_info_buffer is not None
    # All but the time that they took
    assert [(info["r"], info["l"]) for info in whole.ep_info_buffer] == [
        (info["r"], info["l"]) for info in resumed.ep_info_buffer
    ]
    ours, theirs = whole.replay_buffer, resumed.replay_buffer
    assert ours is not None and theirs is not None
    assert (ours.pos, ours.full) == (theirs.pos, theirs.full)
    for name in ("costs", "rewards", "dones", "timeouts", "actions"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), name)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(action_noise=noise(), n_steps=3),
        # Overwritten twice
        dict(buffer_size=30, optimize_memory_usage=True, replay_buffer_kwargs=dict(handle_timeout_termination=False)),
        dict(train_freq=(1, "episode"), gradient_steps=3),
    ],
    ids=["noise and n-step", "memory efficient", "episodes"],
)
def test_one_environment(tmp_path: Path, kwargs: dict[str, Any], algorithm: Algorithm) -> None:
    # The VE type is run by the other tests
    special = dict(diffusion="ddpm") if algorithm is ALGD and "train_freq" in kwargs else {}
    kwargs = {"policy_kwargs": {**SMALL, **special}, **kwargs}
    whole, resumed = interrupted_and_resumed(algorithm, make_one_env, tmp_path, **kwargs)
    assert_same_training(whole, resumed)
    if isinstance(whole, SACLag) and isinstance(resumed, SACLag):
        assert th.equal(whole._current_ent_coef(), resumed._current_ent_coef())


@pytest.mark.parametrize("buffer_size", [40, 500])
def test_two_normalized_environments_with_two_constraints(tmp_path: Path, buffer_size: int, algorithm: Algorithm) -> None:
    kwargs: dict[str, Any] = dict(buffer_size=buffer_size, cost_limit=[1.0, 2.0], action_noise=noise())
    whole, resumed = interrupted_and_resumed(algorithm, normalized_envs, tmp_path, **kwargs)
    assert_same_training(whole, resumed)
    first, second = whole.get_vec_normalize_env(), resumed.get_vec_normalize_env()
    assert first is not None and second is not None
    assert isinstance(first.obs_rms, RunningMeanStd) and isinstance(second.obs_rms, RunningMeanStd)
    np.testing.assert_array_equal(first.obs_rms.mean, second.obs_rms.mean)
    assert (first.ret_rms.var, first.ret_rms.count) == (second.ret_rms.var, second.ret_rms.count)


@pytest.mark.parametrize("buffer_size", [30, 500])
def test_goals(tmp_path: Path, buffer_size: int, algorithm: Algorithm) -> None:
    kwargs: dict[str, Any] = dict(policy="MultiInputPolicy", cost_limit=1.0, episode_length=5, buffer_size=buffer_size)
    whole, resumed = interrupted_and_resumed(algorithm, goal_envs, tmp_path, replay_buffer_class=HerReplayBuffer, **kwargs)
    assert_same_training(whole, resumed)
    assert isinstance(whole.replay_buffer, HerReplayBuffer) and isinstance(resumed.replay_buffer, HerReplayBuffer)
    np.testing.assert_array_equal(whole.replay_buffer.ep_length, resumed.replay_buffer.ep_length)


# --- killed processes ------------------------------------------------------------------------------------------------

PROGRAM = """
import os, signal, sys, time
from stable_baselines3.common.callbacks import BaseCallback
from sb3_algd.common.checkpoint import ResumableCheckpointCallback
from tests.conftest import make_model, make_one_env

class Slow(BaseCallback):
    def _on_step(self):
        time.sleep(0.05)
        return True

folder, save_freq, kill_at_write = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if kill_at_write:
    fsync, count = os.fsync, 0

    def killing(file):
        global count
        count += 1
        if count == kill_at_write:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(file)

    os.fsync = killing
# Neither the constraint's start nor compilation may depend on how long the killed training was meant to be
model = make_model(make_one_env(), constraint_start=0.0, compile=False)
model.learn(10_000, [Slow(), ResumableCheckpointCallback(save_freq, folder)])
"""


def start(folder: Path, kill_at_write: int = 0) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-c", PROGRAM, str(folder), str(SAVE_FREQ), str(kill_at_write)]
    return subprocess.Popen(arguments, cwd=Path(__file__).parents[1])


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_at_an_arbitrary_moment_or_while_saving(tmp_path: Path) -> None:
    whole = make_model(make_one_env(), constraint_start=0.0, compile=False)
    whole.learn(STEPS, ResumableCheckpointCallback(SAVE_FREQ, tmp_path / "whole"))
    # Each checkpoint takes seven: model, state, buffer, parity, manifest, copy, folder. In two processes the second one is
    # broken at its parity and when the manifests were just replaced; the third process is killed from outside, at any moment
    processes = {write: start(tmp_path / f"{write}", write) for write in (11, 14, 0)}
    while not (tmp_path / "0" / MANIFEST).exists():
        assert processes[0].poll() is None
        time.sleep(0.02)
    time.sleep(np.random.default_rng().uniform(0, 2))
    processes[0].kill()
    for write, process in processes.items():
        assert process.wait() == -9
        stored = read_manifest(tmp_path / f"{write}")["num_timesteps"]
        if write:
            assert stored == {11: SAVE_FREQ, 14: 2 * SAVE_FREQ}[write]
        resumed = resume(tmp_path / f"{write}", make_one_env(), total_timesteps=STEPS)
        assert_same_training(whole, resumed)


# --- what is stored --------------------------------------------------------------------------------------------------


def test_only_new_transitions_are_written_and_overwritten_ones_go(tmp_path: Path) -> None:
    model = make_model(make_one_env(), buffer_size=50, learning_starts=1000)
    model.learn(100, ResumableCheckpointCallback(20, tmp_path))
    manifest = read_manifest(tmp_path)
    # Rows 51 to 100 are what the buffer holds; the file with 41 to 60 is the oldest that is needed
    assert [file["n_added"] for file in manifest["buffer"]["files"]] == [60, 80, 100]
    # The checkpoint before, at step 80, needs one more; each has its parity
    buffers = {file["name"] for checkpoint in (manifest, manifest["previous"]) for file in checkpoint["buffer"]["files"]}
    assert len(buffers) == 4
    names = {checkpoint[kind] for checkpoint in (manifest, manifest["previous"]) for kind in ("model", "state")}
    names |= {MANIFEST, MANIFEST_COPY, LOCK, *buffers, *(f"{name}{PARITY}" for name in buffers)}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_replaced_buffer_is_written_anew(tmp_path: Path) -> None:
    other = make_model(learning_starts=1000).learn(50)
    other.save_replay_buffer(tmp_path / "other")
    callback = ResumableCheckpointCallback(20, tmp_path / "checkpoint")
    model = make_model(make_one_env()).learn(20, callback)
    model.load_replay_buffer(tmp_path / "other")
    model.learn(20, callback, reset_num_timesteps=False)
    assert model.replay_buffer is not None
    expected = model.replay_buffer.rewards[:70].copy()
    resumed = resume(tmp_path / "checkpoint", make_one_env())
    assert resumed.replay_buffer is not None and resumed.replay_buffer.pos == 70
    np.testing.assert_array_equal(resumed.replay_buffer.rewards[:70], expected)


def test_stored_episodes_end_as_at_a_time_limit(tmp_path: Path) -> None:
    model = make_model(make_one_env(), learning_starts=1000)
    model.learn(50, ResumableCheckpointCallback(25, tmp_path))
    buffer = model.replay_buffer
    assert buffer is not None
    # Episodes of 20 steps, cut at 25 and 50
    np.testing.assert_array_equal(np.flatnonzero(buffer.dones[:50]), [19, 24, 44, 49])
    np.testing.assert_array_equal(buffer.timeouts, buffer.dones)
    assert len(model.ep_cost_buffer) == 2  # a part of an episode is none


class Tally(BaseCallback):
    """Counts, remembers, and has a setting and something that cannot be stored."""

    def __init__(self, setting: str) -> None:
        super().__init__()
        self.setting = setting
        self.seen: list[int] = []
        self.file = sys.stdout

    def _on_step(self) -> bool:
        self.seen.append(self.num_timesteps)
        return True


def test_other_callbacks_take_up_their_results(tmp_path: Path) -> None:
    def callbacks(setting: str) -> tuple[Tally, CostEvalCallback]:
        return Tally(setting), CostEvalCallback(Monitor(make_env()), n_eval_episodes=1, eval_freq=15, verbose=0)

    checkpoints = ResumableCheckpointCallback(20, tmp_path)
    tally, evaluation = callbacks("first")
    make_model(make_one_env()).learn(40, [tally, evaluation, checkpoints])
    reward, violation = evaluation.best_mean_reward, evaluation.best_violation
    assert np.isfinite(reward)
    tally, evaluation = callbacks("second")
    resume(tmp_path, make_one_env(), [tally, evaluation], total_timesteps=44)
    assert tally.seen == list(range(1, 45)) and tally.n_calls == 44
    # What the user gives counts, what came out before is kept
    assert tally.setting == "second"
    assert (evaluation.best_mean_reward, evaluation.best_violation) == (reward, violation)
    assert evaluation.n_calls == 44


def test_a_complete_run_has_its_normalization_again(tmp_path: Path, algorithm: Algorithm) -> None:
    make_model_of(algorithm, whole := normalized_envs(), cost_limit=[1.0, 2.0]).learn(
        40, ResumableCheckpointCallback(20, tmp_path)
    )
    resume(tmp_path, again := normalized_envs())
    assert isinstance(whole, VecNormalize) and isinstance(again, VecNormalize)
    assert isinstance(whole.obs_rms, RunningMeanStd) and isinstance(again.obs_rms, RunningMeanStd)
    np.testing.assert_array_equal(again.obs_rms.mean, whole.obs_rms.mean)
    assert (again.ret_rms.var, again.ret_rms.count) == (whole.ret_rms.var, whole.ret_rms.count)


def test_a_complete_run_is_returned_as_it_is(tmp_path: Path) -> None:
    model = make_model(make_one_env()).learn(30, ResumableCheckpointCallback(20, tmp_path))
    before = (tmp_path / MANIFEST).read_text()
    assert same(weights(resume(tmp_path, make_one_env())), weights(model))
    assert (tmp_path / MANIFEST).read_text() == before


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [1, 3, 4])
def test_a_full_disk_is_named_and_the_checkpoint_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    callback = ResumableCheckpointCallback(20, tmp_path)
    model = make_model(make_one_env()).learn(25, callback)
    files = sorted(path.name for path in tmp_path.iterdir())
    count = 0

    def full(file: int) -> None:
        nonlocal count
        count += 1
        if count == write:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"step 45 in .*: No space left on device. The checkpoint of step 25 stays"):
        model.learn(30, callback, reset_num_timesteps=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    monkeypatch.undo()
    assert resume(tmp_path, make_one_env(), total_timesteps=30).num_timesteps == 30


class Elsewhere(gym.Wrapper):
    """Does not keep to the seed."""

    def reset(self, **kwargs: Any) -> Any:
        obs, info = self.env.reset(**kwargs)
        return obs + np.float32(np.random.default_rng().normal()), info


def test_an_environment_that_does_not_keep_to_its_seed_is_warned_about(tmp_path: Path) -> None:
    make_model(Elsewhere(make_env())).learn(20, ResumableCheckpointCallback(20, tmp_path))
    with pytest.warns(UserWarning, match="starts elsewhere than in the interrupted run"):
        assert resume(tmp_path, Elsewhere(make_env()), total_timesteps=25).num_timesteps == 25


def test_a_class_that_is_found_nowhere_else_is_stored_and_has_to_be_named(tmp_path: Path) -> None:
    class Mine(ALGD):
        pass

    make_model_of(Mine, make_one_env()).learn(20, ResumableCheckpointCallback(10, tmp_path))
    with pytest.raises(ValueError, match=r"Mine, cannot be found: give model_class"):
        resume(tmp_path, make_one_env())
    assert type(resume(tmp_path, make_one_env(), total_timesteps=25, model_class=Mine)) is Mine


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no checkpoint in"):
        resume(tmp_path, make_one_env())
    for save_freq in (0, "20", None, float("nan"), 2.5):
        with pytest.raises(ValueError, match="`save_freq` must be a whole number from 1"):
            ResumableCheckpointCallback(save_freq, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="use Stable-Baselines3's CheckpointCallback for SAC"):
        SAC("MlpPolicy", make_env(), buffer_size=10).learn(1, ResumableCheckpointCallback(1, tmp_path))
    make_model(make_one_env()).learn(20, ResumableCheckpointCallback(10, tmp_path))
    with pytest.raises(ValueError, match=r"had 1 environment\(s\), not 2: give as many"):
        resume(tmp_path, make_vec_env(make_env, n_envs=2))
    with pytest.raises(ValueError, match="was not wrapped in VecNormalize"):
        resume(tmp_path, VecNormalize(make_one_env()), total_timesteps=30)
    run = read_manifest(tmp_path)["run"]
    with pytest.warns(UserWarning, match="holds a checkpoint of an earlier run"):
        make_model(make_one_env()).learn(10, ResumableCheckpointCallback(10, tmp_path))
    # What is left belongs to the new run
    manifest = read_manifest(tmp_path)
    assert manifest["run"] != run and manifest["previous"] is None
    assert not list(tmp_path.glob(f"*{run}*"))
