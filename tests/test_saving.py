"""Saving and loading: what comes back, what may be given anew, and what is refused."""

import base64
import io
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.logger import configure

from sb3_algd import ALGD, CostNStepReplayBuffer, CostReplayBuffer, SACLag
from tests.conftest import SMALL, Algorithm, make_env, make_model_of, same, weights


@pytest.mark.parametrize(
    ("algorithm", "special"),
    [(ALGD, dict(diffusion="ve")), (ALGD, dict(diffusion="ve-ancestral")), (ALGD, dict(diffusion="ddpm")), (SACLag, {})],
)
def test_save_load_continue(tmp_path: Path, algorithm: Algorithm, special: dict) -> None:
    model = make_model_of(algorithm, policy_kwargs={**SMALL, **special}).learn(50)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = algorithm.load(tmp_path / "model", env=make_env())
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


def test_the_saved_model_predicts_the_same_in_a_new_process(tmp_path: Path, algorithm: Algorithm) -> None:
    model = make_model_of(algorithm).learn(30)
    model.save(tmp_path / "model")
    obs = np.linspace(-1, 1, 30, dtype=np.float32).reshape(10, 3)
    np.save(tmp_path / "obs.npy", obs)
    program = (
        "import sys, numpy as np, torch as th, sb3_algd; m = getattr(sb3_algd, sys.argv[2]).load(sys.argv[1] + '/model');"
        "o = np.load(sys.argv[1] + '/obs.npy'); a = m.predict(o, deterministic=True)[0]; th.manual_seed(0);"
        "np.save(sys.argv[1] + '/actions.npy', np.stack([a, m.predict(o)[0]]))"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), algorithm.__name__], check=True, cwd=Path(__file__).parents[1]
    )
    deterministic, stochastic = np.load(tmp_path / "actions.npy")
    np.testing.assert_array_equal(deterministic, model.predict(obs, deterministic=True)[0])
    th.manual_seed(0)
    np.testing.assert_array_equal(stochastic, model.predict(obs)[0])


def test_loading_with_another_number_of_limits_is_refused(tmp_path: Path, algorithm: Algorithm) -> None:
    make_model_of(algorithm).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"has 2 value.*trained with 1 constraint"):
        algorithm.load(tmp_path / "model", cost_limit=[1.0, 2.0])


def test_loading_with_another_limit_recomputes_the_budget(algorithm: Algorithm) -> None:
    file = io.BytesIO()
    make_model_of(algorithm, cost_gamma=1.0).save(file)
    file.seek(0)
    loaded = algorithm.load(file, cost_limit=8.0)
    assert loaded.cost_budget.tolist() == [8.0] and loaded._budget.tolist() == [8.0]
    file.seek(0)
    # The class as a whole stays as it was saved
    assert algorithm.load(file).cost_limit.tolist() == [5.0]


def test_arguments_given_at_loading_win_and_the_same_ones_are_accepted(tmp_path: Path, algorithm: Algorithm) -> None:
    make_model_of(algorithm, n_steps=3, gamma=0.9).save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=make_env(), n_steps=5, gamma=0.5, policy_kwargs=SMALL)
    assert isinstance(loaded.replay_buffer, CostNStepReplayBuffer)
    assert (loaded.replay_buffer.n_steps, loaded.replay_buffer.gamma) == (5, 0.5)
    assert type(algorithm.load(tmp_path / "model", env=make_env(), n_steps=1).replay_buffer) is CostReplayBuffer


def test_training_from_a_loaded_buffer_alone(tmp_path: Path, algorithm: Algorithm) -> None:
    trained = make_model_of(algorithm).learn(40)
    assert trained.replay_buffer is not None
    trained.replay_buffer.costs[3] = -0.5
    del trained.replay_buffer.lowest_costs  # as saved by an earlier version
    trained.save_replay_buffer(tmp_path / "buffer")
    model = make_model_of(algorithm)
    model.load_replay_buffer(tmp_path / "buffer")
    assert model.replay_buffer is not None and model.replay_buffer.lowest_costs.tolist() == [-0.5]
    model.set_logger(configure(None, []))
    before = weights(model)
    model.train(3, 16)
    assert not same(weights(model), before)


def test_a_buffer_with_other_costs_is_refused_and_the_present_one_stays(tmp_path: Path, algorithm: Algorithm) -> None:
    model = make_model_of(algorithm, make_env(n_costs=2), cost_limit=[1.0, 2.0]).learn(10)
    make_model_of(algorithm).learn(10).save_replay_buffer(tmp_path / "one")
    SAC("MlpPolicy", make_env(), buffer_size=100).save_replay_buffer(tmp_path / "none")
    present = model.replay_buffer
    for name, message in (
        ("one", r"with 1 cost\(s\) per step, but the model has a CostReplayBuffer with 2"),
        ("none", r"holds no costs \(ReplayBuffer\), but the model has 2 constraint"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_replay_buffer(tmp_path / name)
        assert model.replay_buffer is present


# --- files of strangers ----------------------------------------------------------------------------------------------


class Evil:
    """Leaves a file where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("member", ["data", "policy.pth", "pytorch_variables.pth", "lagrange_multiplier.pth"])
def test_set_parameters_runs_no_code_of_the_file(tmp_path: Path, algorithm: Algorithm, member: str) -> None:
    model = make_model_of(algorithm, seed=1).learn(30)
    model.save(tmp_path / "good")
    trace, evil = tmp_path / "trace", io.BytesIO()
    if member == "data":
        code = base64.b64encode(cloudpickle.dumps(Evil(trace))).decode()
        content = json.loads(zipfile.ZipFile(tmp_path / "good.zip").read("data"))
        content["evil"] = {":type:": "Evil", ":serialized:": code}
        evil.write(json.dumps(content).encode())
    else:
        th.save({"x": Evil(trace)}, evil)
    with zipfile.ZipFile(tmp_path / "good.zip") as good, zipfile.ZipFile(tmp_path / "evil.zip", "w") as file:
        for name in good.namelist():
            file.writestr(name, evil.getvalue() if name == member else good.read(name))
    fresh = make_model_of(algorithm)
    before = weights(fresh)
    if member == "data":
        fresh.set_parameters(str(tmp_path / "evil"), device="cpu")
        assert same(weights(fresh), weights(model))
        assert not trace.exists()
        # The code is there: load() runs it, as SB3's does
        algorithm.load(tmp_path / "evil")
        assert trace.exists()
    else:
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            fresh.set_parameters(str(tmp_path / "evil"), device="cpu")
        assert same(weights(fresh), before)
        assert not trace.exists()
