"""The compiled update: the same numbers as the eager one, and when it is used."""

import io
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

import sb3_algd.common.compilation as compilation
from sb3_algd import ALGD, SACLag
from sb3_algd.common.compilation import CompiledMethod
from tests.conftest import PAPER, SMALL, Algorithm, CostlyEnv, make_env, make_model, make_model_of, same, weights
from tests.test_checkpoint import assert_same_training, interrupted_and_resumed


class Halves(gym.ObservationWrapper):
    """Observations as a dictionary of two vectors."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        box = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.observation_space = spaces.Dict({"first": box, "rest": spaces.Box(-1.0, 1.0, (2,), np.float32)})

    def observation(self, observation: np.ndarray) -> dict[str, np.ndarray]:
        return {"first": observation[:1], "rest": observation[1:]}


class Images(gym.ObservationWrapper):
    """Observations as images, which SB3 preprocesses by looking at values."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return np.full((36, 36, 1), int(100 + 100 * observation[0]), np.uint8)


def gradients(model: Any) -> list[th.Tensor]:
    parameters = [*model.critic.parameters(), *model.cost_critic.parameters(), *model.actor.parameters()]
    found = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    for parameter in parameters:
        parameter.grad = None
    return found


def distance(found: list[th.Tensor], expected: list[th.Tensor]) -> float:
    """How far one vector is from another, as a share of its length."""
    difference, length = (
        sum(float(x.square().sum()) for x in xs) ** 0.5
        for xs in ([a - b for a, b in zip(found, expected, strict=True)], expected)
    )
    return difference / length


def run(model: Any, critic: Any, actor: Any, batch: Any) -> tuple[list[th.Tensor], list[th.Tensor]]:
    """Numbers and gradients of one update, with the same noise each time."""
    gradients(model)
    th.manual_seed(7)
    critic_loss, cost_critic_loss, risk = critic(batch)
    (critic_loss + cost_critic_loss).backward()
    loss, metrics, policy_risk, moments = actor(batch.observations)
    loss.backward()
    return [critic_loss, cost_critic_loss, risk, loss, *metrics.values(), policy_risk, moments], gradients(model)


CASES: dict[str, tuple[Algorithm, dict[str, Any]]] = {
    "ve": (ALGD, dict(policy_kwargs=dict(net_arch=[16, 16], denoising_steps=3))),
    "pointwise": (ALGD, dict(policy_kwargs=dict(net_arch=[16, 16], layer_norm=False), penalty="pointwise")),
    "ddpm, three constraints": (
        ALGD,
        dict(policy_kwargs=dict(net_arch=[16, 16], diffusion="ddpm", denoising_steps=3), cost_limit=[5.0] * 3, **PAPER),
    ),
    "n-step": (ALGD, dict(policy_kwargs=dict(net_arch=[16], denoising_steps=2), n_steps=3)),
    "dict": (ALGD, dict(policy="MultiInputPolicy", policy_kwargs=dict(net_arch=[16], denoising_steps=2))),
    "sac_lag": (SACLag, dict(policy_kwargs=SMALL)),
}


@pytest.mark.parametrize(("case", "bfloat16"), [*((case, False) for case in CASES), ("ve", True), ("sac_lag", True)])
def test_a_compiled_update_computes_what_the_eager_one_does(case: str, bfloat16: bool) -> None:
    algorithm, kwargs = CASES[case]
    env: gym.Env = CostlyEnv(len(np.atleast_1d(kwargs.get("cost_limit", 5.0))))
    env = gym.wrappers.TimeLimit(Halves(env) if case == "dict" else env, 20)
    model = make_model_of(algorithm, env, compile=False, **kwargs).learn(60)
    model.policy.set_training_mode(True)
    assert model.replay_buffer is not None
    told: list[str] = []
    critic, actor = (
        CompiledMethod(method, model.device, lambda message, level: told.append(message))
        for method in (model._critic_losses, model._actor_loss)
    )
    batch: Any = model.replay_buffer.sample(32)
    # Active nowhere, somewhere, everywhere. The risks are about 2: beside a budget of a million they would be lost to rounding
    for budget in (1e2, float(model._critic_losses(batch)[2].mean()), -1e2):
        model._budget = th.full_like(model._budget, budget)
        expected, expected_gradients = run(model, model._critic_losses, model._actor_loss, batch)
        scale = max(float(gradient.abs().max()) for gradient in expected_gradients)
        with th.autocast("cpu", th.bfloat16, enabled=bfloat16):
            found, found_gradients = run(model, critic, actor, batch)
        if bfloat16:
            # Which has 8 bits where single precision has 24
            assert {value.dtype for value in (*found, *found_gradients)} == {th.float32}
            assert any(not th.equal(a, b) for a, b in zip(found_gradients, expected_gradients, strict=True))
            th.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
            assert distance(found_gradients, expected_gradients) < 0.1
        else:
            th.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            th.testing.assert_close(found_gradients, expected_gradients, rtol=1e-3, atol=1e-5 * max(scale, 1.0))
    assert told == []


def test_training_with_compiled_updates_resembles_the_eager_one_and_leaves_nothing_in_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kwargs = dict(reduced_precision=False, policy_kwargs=dict(net_arch=[8], denoising_steps=1))
    eager, compiled = (make_model(compile=compile, **kwargs).learn(40) for compile in (False, True))
    assert compiled._compiled.keys() == {"_critic_losses", "_actor_loss"}
    for name, value in weights(eager).items():
        th.testing.assert_close(weights(compiled)[name], value, rtol=1e-2, atol=1e-3, msg=name)
    file = io.BytesIO()
    compiled.save(file)
    file.seek(0)
    loaded = ALGD.load(file, env=make_env(), device="cpu")
    assert same(weights(loaded), weights(compiled))
    monkeypatch.setattr(th, "compile", lambda function, **options: function)
    loaded.learn(10, reset_num_timesteps=False)
    assert loaded._compiled.keys() == {"_critic_losses", "_actor_loss"}


def test_a_third_shape_is_computed_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_for: list[th.Size] = []

    def pretend(function: Any, **options: Any) -> Any:
        def compiled(observations: th.Tensor) -> Any:
            compiled_for.append(observations.shape)
            return function(observations)

        return compiled

    monkeypatch.setattr(th, "compile", pretend)
    model, told = make_model(compile=False), []
    method = CompiledMethod(model._actor_loss, model.device, lambda message, level: told.append((message, level)))
    for rows in (4, 4, 8, 12, 4):
        method(th.zeros(rows, 3))
    assert [shape[0] for shape in compiled_for] == [4, 4, 8, 4]
    assert told == [("Compiling actor_loss again, for a batch of another shape", 2)]


def test_what_cannot_be_compiled_runs_eagerly_or_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "WORTHWHILE_UPDATES", 1)
    monkeypatch.setattr(compilation, "has_fast_bfloat16", lambda device: True)
    kwargs: dict[str, Any] = dict(
        policy="CnnPolicy", reduced_precision=True, policy_kwargs=dict(net_arch=[8], denoising_steps=1)
    )
    model = make_model(Images(make_env()), verbose=1, **kwargs).learn(23)
    assert model._n_updates == 3
    # Once, and for good: in single precision, as all that is not compiled
    model.learn(3, reset_num_timesteps=False)
    out = capsys.readouterr().out
    assert "Updates are not compiled: critic_losses cannot be compiled" in out
    assert out.count("not compiled") == 1
    assert not model._compiled
    with pytest.raises(RuntimeError, match=r"cannot be compiled .*use compile=False, or 'auto'"):
        make_model(Images(make_env()), compile=True, **kwargs).learn(23)


@pytest.mark.parametrize(
    ("fast", "compiler", "updates", "said"),
    [
        (True, True, 1, None),
        (True, True, 1000, "10 of them take less time than compiling"),
        (False, True, 1, None),
        (False, True, 7, "10 of them take less time than compiling"),
        (True, False, 1, "there is no C++ compiler"),
    ],
)
def test_updates_are_compiled_where_that_pays(
    fast: bool, compiler: bool, updates: int, said: str | None, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "WORTHWHILE_UPDATES", updates)
    monkeypatch.setattr(compilation, "WORTHWHILE_IN_FLOAT32", 2 * updates)
    monkeypatch.setattr(compilation, "has_fast_bfloat16", lambda device: fast)
    monkeypatch.setattr(compilation.shutil, "which", lambda name: "/bin/c++" if compiler else None)
    monkeypatch.setattr(th, "compile", lambda function, **options: function)
    model = make_model(verbose=1, reduced_precision=True).learn(30)
    assert bool(model._compiled) == (said is None)
    out = capsys.readouterr().out
    assert said in out if said else "not compiled" not in out


@pytest.mark.parametrize(("fast", "compiled"), [(True, True), (False, True), (True, False)])
def test_bfloat16_where_it_is_faster(fast: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "has_fast_bfloat16", lambda device: fast)
    monkeypatch.setattr(th, "compile", lambda function, **options: function)
    assert make_model(compile=compiled).learn(21).uses_bfloat16 == (fast and compiled)
    assert make_model(compile=compiled, reduced_precision=True).learn(21).uses_bfloat16
    assert not make_model(compile=compiled, reduced_precision=False).learn(21).uses_bfloat16


def test_a_resumed_training_keeps_what_was_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "has_fast_bfloat16", lambda device: True)
    monkeypatch.setattr(th, "compile", lambda function, **options: function)
    monkeypatch.setattr(compilation, "WORTHWHILE_UPDATES", 25)
    model = make_model(reduced_precision=True).learn(50)
    assert model._compiled.keys() == {"_critic_losses", "_actor_loss"}
    model.learn(5, reset_num_timesteps=False)
    assert model._compiled.keys() == {"_critic_losses", "_actor_loss"}
    model.learn(30)
    assert not model._compiled


def test_compile_has_to_be_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"compile=True, but there is no C\+\+ compiler"):
        make_model(compile=True).learn(30)
    with pytest.raises(ValueError, match="`compile` must be True, False or 'auto', got 'always'"):
        make_model(compile="always")


@pytest.mark.parametrize("delay", [1, 3])
def test_the_policy_waits_for_the_critics(delay: int, algorithm: Algorithm) -> None:
    model = make_model_of(algorithm, policy_delay=delay, compile=False).learn(20)
    actor = [parameter.detach().clone() for parameter in model.actor.parameters()]
    changes = []
    for _ in range(6):
        model.train(1, 16)
        now = [parameter.detach().clone() for parameter in model.actor.parameters()]
        changes.append(any(not th.equal(a, b) for a, b in zip(actor, now, strict=True)))
        actor = now
    assert changes == [(i + 1) % delay == 0 for i in range(6)]


@pytest.mark.parametrize(("saved", "given", "compiled"), [(True, False, False), (False, True, True), (False, "auto", True)])
def test_what_is_given_at_loading_decides(saved: bool, given: Any, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "WORTHWHILE_IN_FLOAT32", 1)
    monkeypatch.setattr(th, "compile", lambda function, **options: function)
    model = make_model(compile=saved, reduced_precision=False).learn(21)
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = ALGD.load(file, env=make_env(), device="cpu", compile=given).learn(30, reset_num_timesteps=False)
    assert bool(loaded._compiled) == compiled
    model.compile = given
    assert bool(model.learn(30, reset_num_timesteps=False)._compiled) == compiled


def test_learning_goes_on_with_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []

    def note(function: Any, **options: Any) -> Any:
        compiled.append(function)
        return function

    monkeypatch.setattr(th, "compile", note)
    model = make_model(compile=True).learn(21)
    assert len(compiled) == 2
    model.learn(5, reset_num_timesteps=False).learn(21)
    assert len(compiled) == 2


def test_updates_between_episodes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "WORTHWHILE_IN_FLOAT32", 8)
    kwargs: dict[str, Any] = dict(reduced_precision=False, train_freq=(5, "episode"), gradient_steps=4, learning_starts=0)
    # 5 episodes of 20 steps for 4 updates
    assert not make_model(**kwargs)._pays_to_compile(199)
    assert make_model(**kwargs)._pays_to_compile(200)


def test_a_compiled_training_in_bfloat16_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    def envs_in_processes() -> VecEnv:
        return make_vec_env(make_env, n_envs=2, vec_env_cls=SubprocVecEnv)

    kwargs: dict[str, Any] = dict(policy_kwargs=dict(net_arch=[8], denoising_steps=1), compile=True, reduced_precision=True)
    whole, resumed = interrupted_and_resumed(ALGD, envs_in_processes, tmp_path, **kwargs)
    assert_same_training(whole, resumed)
    for model in (whole, resumed):
        assert model._compiled.keys() == {"_critic_losses", "_actor_loss"} and model.uses_bfloat16
        env = model.get_env()
        assert env is not None
        env.close()
