"""Every constructor argument of every algorithm: documented, stored, and with an effect."""

import inspect
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.noise import NormalActionNoise

from sb3_algd import ALGD, CostNStepReplayBuffer, SACLag

ALGORITHMS = (ALGD, SACLag)
SMALL = dict(net_arch=[8, 8])


class CutEnv(gym.Env):
    """Random observations; ``info`` has two costs that differ, and now and then cuts the reward."""

    observation_space = spaces.Box(-1.0, 1.0, shape=(2,), dtype=np.float32)
    action_space = spaces.Box(-1.0, 1.0, shape=(1,), dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        obs = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        info = {"cost": float(action[0] ** 2), "other": 1.0, "cut": bool(obs[0] > 0)}
        return obs, float(action[0]), False, False, info


def make_model(algorithm: Any, **kwargs: Any) -> Any:
    defaults: dict[str, Any] = dict(
        policy_kwargs=SMALL,
        learning_starts=10,
        batch_size=8,
        buffer_size=100,
        # The constraint is active in every state
        cost_limit=0.5,
        # All of the constraint acts from the first step on, the budget and how it follows from the limit too
        cost_limit_discounted=True,
        cost_limit_gamma=0.9,
        penalty="pointwise",
        constraint_start=0.0,
        multiplier_kwargs=dict(init_value=0.5),
        seed=0,
        device="cpu",
    )
    return algorithm("MlpPolicy", gym.wrappers.TimeLimit(CutEnv(), 10), **{**defaults, **kwargs})


def trained(algorithm: Any, **kwargs: Any) -> dict[str, th.Tensor]:
    """:return: All weights after some updates, and what else has been learned."""
    model = make_model(algorithm, **kwargs)
    model.learn(30)
    state = {**model.policy.state_dict(), "multiplier": model.lagrange_multiplier.value}
    if isinstance(model, SACLag):
        state["ent_coef"] = model._current_ent_coef().detach()
    return state


#: Values that change what is learned
CHANGES_TRAINING: dict[str, Any] = dict(
    learning_rate=1e-2,
    buffer_size=12,
    learning_starts=15,
    batch_size=4,
    tau=0.5,
    gamma=0.5,
    train_freq=2,
    gradient_steps=2,
    action_noise=NormalActionNoise(np.zeros(1), np.ones(1)),
    replay_buffer_class=CostNStepReplayBuffer,
    replay_buffer_kwargs=dict(reward_cut_key="cut"),
    n_steps=3,
    target_update_interval=3,
    policy_kwargs=dict(**SMALL, n_critics=3),
    seed=1,
    cost_limit=0.1,
    cost_limit_discounted=False,
    cost_limit_gamma=0.5,
    episode_length=5,
    cost_gamma=0.5,
    cost_key="other",
    penalty="expectation",
    rho=0.2,
    constraint_start=0.5,
    multiplier_kwargs=dict(init_value=0.1),
    multiplier_signal="buffer",
    normalize=False,
    cost_risk_coef=0.0,
    cost_target_risk_coef=1.0,
    bound_cost_targets=False,
    actor_learning_rate=1e-2,
    cost_critic_learning_rate=1e-2,
    use_policy_at_warmup=True,
    policy_delay=3,
    reduced_precision=True,
)
ONLY_IN: dict[Any, dict[str, Any]] = {
    ALGD: dict(guidance_coef=0.0, score_coef=1.0, score_kwargs=dict(n_samples=2)),
    SACLag: dict(ent_coef=0.5, target_entropy=-5.0),
}
#: What has another effect, see the tests below
OTHERS = {
    "policy",
    "env",
    "optimize_memory_usage",
    "stats_window_size",
    "tensorboard_log",
    "verbose",
    "device",
    "compile",
    "_init_setup_model",
}


@pytest.fixture(scope="module")
def default() -> dict[Any, dict[str, th.Tensor]]:
    return {algorithm: trained(algorithm) for algorithm in ALGORITHMS}


def arguments_of(algorithm: Any) -> list[str]:
    return [name for name in inspect.signature(algorithm.__init__).parameters if name != "self"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_argument_is_forgotten_here(algorithm: Any) -> None:
    assert set(arguments_of(algorithm)) == CHANGES_TRAINING.keys() | ONLY_IN[algorithm].keys() | OTHERS


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_argument_is_documented_in_order(algorithm: Any) -> None:
    lines = inspect.getdoc(algorithm).splitlines()  # type: ignore[union-attr]
    documented = [line.split()[1].rstrip(":") for line in lines if line.startswith(":param ")]
    assert documented == arguments_of(algorithm)


def test_training_is_repeatable(default: dict[Any, dict[str, th.Tensor]]) -> None:
    """Or a difference below would mean nothing."""
    for algorithm in ALGORITHMS:
        again = trained(algorithm)
        assert all(th.equal(value, again[name]) for name, value in default[algorithm].items())


@pytest.mark.parametrize(
    "algorithm, name, value",
    [(each, *item) for each in ALGORITHMS for item in (CHANGES_TRAINING | ONLY_IN[each]).items()],
    ids=lambda value: getattr(value, "__name__", value) if isinstance(value, (type, str)) else "",
)
def test_an_argument_changes_what_is_learned(
    algorithm: Any, name: str, value: Any, default: dict[Any, dict[str, th.Tensor]]
) -> None:
    changed = trained(algorithm, **{name: value})
    expected = default[algorithm]
    assert any(changed[key].shape != expected[key].shape or not th.equal(changed[key], expected[key]) for key in expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_other_arguments(algorithm: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    no_timeouts = dict(handle_timeout_termination=False)
    model = make_model(algorithm, optimize_memory_usage=True, replay_buffer_kwargs=no_timeouts, stats_window_size=2)
    model.learn(40)
    assert not hasattr(model.replay_buffer, "next_observations")
    assert len(model.ep_info_buffer) == len(model.ep_cost_buffer) == 2
    assert capsys.readouterr().out == ""
    make_model(algorithm, verbose=1, tensorboard_log=str(tmp_path)).learn(5)
    assert "Cost limit per episode" in capsys.readouterr().out
    assert len(list(tmp_path.glob(f"{algorithm.__name__}_1/events*"))) == 1
    with pytest.raises(RuntimeError, match="device"):
        make_model(algorithm, device="nowhere")
    assert not hasattr(make_model(algorithm, _init_setup_model=False), "policy")


@pytest.mark.parametrize("name", ["use_sde", "score_space", "cuda_graph", "multiplier_init", "policy_learning_rate", "space"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_arguments_that_are_gone_are_refused(algorithm: Any, name: str) -> None:
    with pytest.raises(TypeError, match=name):
        make_model(algorithm, **{name: 1.0})


@pytest.mark.parametrize("kwargs", [dict(score_coef=1.0), dict(score_kwargs={}), dict(policy_kwargs=dict(diffusion="ve"))])
def test_sac_lagrangian_takes_nothing_of_a_diffusion(kwargs: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"score|diffusion"):
        make_model(SACLag, **kwargs)


def test_algd_takes_nothing_of_an_entropy() -> None:
    with pytest.raises(TypeError, match="ent_coef"):
        make_model(ALGD, ent_coef=0.1)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_state_dependent_exploration_is_refused(algorithm: Any) -> None:
    with pytest.raises(ValueError, match="does not support gSDE"):
        make_model(algorithm, policy_kwargs=dict(**SMALL, use_sde=True))
