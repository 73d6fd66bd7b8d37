"""Every value of every argument trains, or is refused by a message that names the argument, before anything is built."""

import contextlib
import inspect
import math
import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stable_baselines3.common.noise import NormalActionNoise

from sb3_algd import ALGD, SACLag
from sb3_algd.common.arguments import ARGUMENTS, Rule, check_arguments, constructor_arguments, whole
from sb3_algd.common.buffers import CostReplayBuffer
from sb3_algd.common.lagrange import EpisodeController
from tests.conftest import Algorithm, make_env, make_model, make_model_of, same, weights

#: Not values but objects, of which SB3 says what they must be
WITHOUT_RULE = {"policy", "env", "tensorboard_log", "device", "_init_setup_model"}
#: Values of any argument that come from mistakes
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.integers(-(10**30), 10**30),
    st.integers(-3, 3),
    st.floats(),
    st.sampled_from(
        [
            math.nan,
            math.inf,
            -1.0,
            0.0,
            1e30,
            1e-300,
            "auto",
            "auto_0.1",
            "log",
            [],
            {},
            (),
            10**400,
            [[1.0], [1.0, 2.0]],
            object(),
            lambda _: -1.0,
        ]
    ),
    st.lists(st.floats(width=32), max_size=3),
    st.dictionaries(
        st.sampled_from(["confidence", "n_samples", "max_value", "init_value", "x"]), st.floats() | st.none(), max_size=2
    ),
)
SCHEDULES = st.floats(0, 1e-2) | st.just(lambda progress: 1e-3 * progress)
LIMITS = st.floats(0, 1e6) | st.lists(st.floats(0, 100), min_size=1, max_size=1)
#: Values that should work
GOOD: dict[str, st.SearchStrategy[Any]] = dict(
    learning_rate=SCHEDULES,
    buffer_size=st.integers(1, 200),
    learning_starts=st.integers(0, 60),
    batch_size=st.integers(1, 8),
    tau=st.floats(0, 1),
    gamma=st.floats(0, 1),
    train_freq=st.integers(1, 9) | st.sampled_from([(2, "step"), (1, "episode")]),
    gradient_steps=st.integers(-1, 3),
    action_noise=st.just(NormalActionNoise(np.zeros(1), np.ones(1))),
    replay_buffer_class=st.just(CostReplayBuffer),
    replay_buffer_kwargs=st.just({"reward_cut_key": "cut"}),
    optimize_memory_usage=st.just(False),
    n_steps=st.integers(1, 4),
    stats_window_size=st.integers(1, 9),
    policy_kwargs=st.just({"net_arch": [4]}),
    verbose=st.just(0),
    seed=st.integers(0, 2**32 - 1),
    cost_limit=LIMITS,
    cost_limit_discounted=st.booleans(),
    cost_limit_gamma=st.floats(0, 1, exclude_min=True),
    episode_length=st.integers(1, 10**9),
    cost_gamma=st.floats(0, 1, exclude_min=True),
    cost_key=st.sampled_from(["cost", "none", lambda info: 0.0]),
    use_policy_at_warmup=st.booleans(),
    target_update_interval=st.integers(1, 10**9),
    penalty=st.sampled_from(["expectation", "pointwise"]),
    rho=LIMITS,
    constraint_start=st.floats(0, 1),
    normalize=st.booleans(),
    multiplier_kwargs=st.fixed_dictionaries(
        {},
        optional=dict(
            init_value=st.floats(0, 200), learning_rate=SCHEDULES, max_value=st.floats(0, 100), confidence=st.floats(0, 5)
        ),
    ),
    multiplier_signal=st.sampled_from(["episodes", "buffer"]),
    cost_risk_coef=st.floats(0, 10),
    cost_target_risk_coef=st.floats(0, 10),
    bound_cost_targets=st.booleans(),
    actor_learning_rate=SCHEDULES,
    cost_critic_learning_rate=SCHEDULES,
    policy_delay=st.integers(1, 5),
    reduced_precision=st.booleans() | st.just("auto"),
    compile=st.just(False),
    guidance_coef=st.floats(0, 10),
    score_coef=st.floats(0, 10),
    score_kwargs=st.fixed_dictionaries(
        {},
        optional=dict(
            temperature=st.floats(0.1, 10), n_samples=st.integers(1, 8), pairing=st.sampled_from(["after", "before"])
        ),
    ),
    ent_coef=st.floats(0, 1) | st.sampled_from(["auto", "auto_0.1"]),
    target_entropy=st.floats(-9, 9) | st.just("auto"),
)
ARGUMENTS_OF = [(algorithm, name) for algorithm in (ALGD, SACLag) for name in constructor_arguments(algorithm)]


#: How many values of each argument are tried; `make faults` tries more
EXAMPLES = int(os.environ.get("SB3_ALGD_EXAMPLES", "8"))
#: File that gets a line of counts for each argument; `make faults` shows it
TABLE = os.environ.get("SB3_ALGD_TABLE")
#: Of a large one the test would only see that it takes long
SIZES = ("batch_size", "buffer_size", "gradient_steps", "n_steps", "train_freq")


class OneStateEnv(gym.Env):
    """As cheap as can be."""

    observation_space = spaces.Box(-1.0, 1.0, shape=(1,), dtype=np.float32)
    action_space = spaces.Box(-1.0, 1.0, shape=(1,), dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return np.zeros(1, dtype=np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        return np.zeros(1, dtype=np.float32), 0.0, False, False, {"cost": 0.5, "cut": False}


@pytest.mark.parametrize("algorithm", [ALGD, SACLag])
def test_every_argument_has_its_rule(algorithm: Algorithm) -> None:
    names = set(constructor_arguments(algorithm))
    assert names == set(inspect.signature(algorithm.__init__).parameters) - {"self"}
    assert names - WITHOUT_RULE == names & ARGUMENTS.keys() == names & GOOD.keys()


@pytest.mark.parametrize("algorithm, name", [each for each in ARGUMENTS_OF if each[1] not in WITHOUT_RULE])
def test_a_value_trains_or_is_refused_by_name(algorithm: Algorithm, name: str) -> None:
    outcomes: Counter[str] = Counter()

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(GOOD[name] | ODD)
    def check(value: Any) -> None:
        model: Any = algorithm.__new__(algorithm)
        small = dict(
            policy_kwargs=dict(net_arch=[4]), learning_starts=40, batch_size=4, buffer_size=50, cost_limit=1.0, seed=0
        )
        refused = None
        try:
            model.__init__("MlpPolicy", gym.wrappers.TimeLimit(OneStateEnv(), 10), device="cpu", **{**small, name: value})
        except (ValueError, TypeError) as error:
            refused = str(error)
        if refused is not None:
            assert name in refused or (name == "multiplier_kwargs" and "`init_value`" in refused), refused
            assert not hasattr(model, "policy") and getattr(model, "replay_buffer", None) is None
            outcomes["refused"] += 1
        elif name not in SIZES or (value[0] if isinstance(value, tuple) else value) < 1000:
            if name == "cost_limit" and np.size(value) > 1:
                # How many costs there are, only a step tells
                with pytest.raises(ValueError, match="give cost_limit one number per cost"):
                    model.learn(50)
                outcomes["refused"] += 1
                return
            # What diverges says so
            with contextlib.suppress(FloatingPointError):
                model.learn(50)
            outcomes["trained"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check()
    if TABLE is not None:
        with open(TABLE, "a") as file:
            file.write(f"| {algorithm.__name__} | `{name}` | {outcomes['trained']} | {outcomes['refused']} |\n")


@pytest.mark.parametrize(
    "name, values",
    [
        ("actor_learning_rate", [-1e-3, math.nan, "x", lambda _: -1e-3, lambda progress: progress - 0.5]),
        ("cost_critic_learning_rate", [-1e-3, math.inf, True, lambda progress: 1e-3 / progress]),
        ("learning_rate", [-1e-3, None, "lin_3e-4", lambda progress: [1e-3, 1e-4][int(2 - 2 * progress)]]),
        # Wrong at the end, and wrong in between
        ("learning_rate", [lambda progress: progress - 1e-3, lambda progress: math.nan if 0.3 < progress < 0.7 else 1e-3]),
        ("cost_limit_discounted", ["x", "False", 1]),
        ("cost_limit_gamma", [0.0, 1.1, None, "x"]),
        ("penalty", ["hinge", None, True]),
        ("constraint_start", [-0.1, 1.1, None, "x", True]),
        ("normalize", ["False", None, 1]),
        ("bound_cost_targets", ["False", None, 0]),
        ("use_policy_at_warmup", ["x"]),
        ("reduced_precision", ["False"]),
        ("episode_length", [1e30, 10**30, 0, "x", True, 2.5]),
        ("score_kwargs", [dict(n_samples=10**6), dict(n_samples="x"), dict(temperature=math.nan), dict(beta=1.0), "x"]),
        ("multiplier_kwargs", [dict(max_value=math.inf), dict(confidence=-1.0), dict(init_value=-1.0), dict(init=1.0), []]),
        ("multiplier_kwargs", [dict(learning_rate=lambda progress: progress - 0.5)]),
        ("cost_key", [None, 3]),
        ("cost_risk_coef", [None, "x", math.nan, -1.0]),
        ("target_update_interval", [0, 1.5, None, "x"]),
        ("rho", [-1.0, math.inf, "x", [], [[1.0]]]),
        ("cost_limit", ["x", "5", True, -1.0, math.nan, [], [[1.0]], {}]),
        ("train_freq", [0, "x", (1, "steps"), (1,), None]),
        ("seed", [-1, 2**32, "x", 1.5]),
    ],
)
@pytest.mark.parametrize("algorithm", [ALGD, SACLag])
def test_what_makes_no_sense_is_refused_in_one_form(algorithm: Algorithm, name: str, values: list[Any]) -> None:
    if name not in constructor_arguments(algorithm):
        return
    for value in values:
        with pytest.raises(ValueError, match=rf"^`{name}` must be .*, got "):
            make_model_of(algorithm, **{name: value})


@pytest.mark.parametrize("name", ["policy_kwargs", "replay_buffer_kwargs"])
def test_an_unknown_entry_is_named_with_its_argument(algorithm: Algorithm, name: str) -> None:
    with pytest.raises(TypeError, match=rf"^`{name}` must have entries that .* takes \(.*\), got 'net_ach'"):
        make_model_of(algorithm, **{name: {"net_ach": 1}})

    class Buffer(CostReplayBuffer):
        """One of others, which may take what it does not name."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.unnamed = kwargs.pop("unnamed")
            super().__init__(*args, **kwargs)

    model = make_model_of(algorithm, replay_buffer_class=Buffer, replay_buffer_kwargs=dict(unnamed=3))
    assert isinstance(model.replay_buffer, Buffer) and model.replay_buffer.unnamed == 3


@pytest.mark.parametrize(
    "name, values",
    [
        ("net_arch", ["64", 64, [0], [64.5], [True], dict(pi=[64]), dict(pi=[64], vf=[64]), dict(pi=[64], qf=dict(pi=[4]))]),
        ("activation_fn", ["relu", None]),
        ("n_critics", [0, 1.5, "2", None]),
        ("n_candidates", [0, 1.5, "a"]),
        ("layer_norm", ["no", 1]),
        ("normalize_images", ["no"]),
        ("share_features_extractor", ["no"]),
        ("features_extractor_class", ["CNN"]),
        ("features_extractor_kwargs", [3, "x"]),
        ("optimizer_class", ["Adam"]),
        ("optimizer_kwargs", [[1]]),
        ("diffusion", ["vp", None]),
        ("denoising_steps", [0, 2.5, "5"]),
        ("diffusion_kwargs", [3]),
    ],
)
def test_what_a_policy_cannot_be_made_of_is_named(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"^`policy_kwargs` must have .* as '{name}', got "):
            make_model(policy_kwargs={name: value})
    # A policy class of the user may call something else that
    assert make_model(policy_kwargs=dict(net_arch=dict(pi=[4], qf=[8, 8]), optimizer_kwargs=None, layer_norm=False))


def test_an_algorithm_can_add_rules() -> None:
    with pytest.raises(ValueError, match="`mine` must be a whole number from 1 to 3, got 4"):
        check_arguments({"mine": 4, "other": None}, {"mine": whole(1, 3)})

    class Mine(ALGD):
        argument_rules: ClassVar[dict[str, Rule]] = {**ARGUMENTS, "gamma": Rule("0.9", lambda value: value == 0.9)}

        def __init__(self, *args: Any, extra: int = 0, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    assert "extra" in constructor_arguments(Mine) and "cost_limit" in constructor_arguments(Mine)
    make_model_of(Mine, gamma=0.9)
    with pytest.raises(ValueError, match=r"`gamma` must be 0.9, got 0.5"):
        make_model_of(Mine, gamma=0.5)


# --- loading ---------------------------------------------------------------------------------------------------------


def test_a_misspelt_argument_of_load_is_refused(tmp_path: Path, algorithm: Algorithm) -> None:
    make_model_of(algorithm).save(tmp_path / "model")
    with pytest.raises(TypeError, match=r"load\(\) has no argument 'cost_limt', did you mean 'cost_limit'\?"):
        algorithm.load(tmp_path / "model", cost_limt=3.0)
    with pytest.raises(TypeError, match=r"load\(\) has no argument 'nothing_like_it' \(there are learning_rate|env"):
        algorithm.load(tmp_path / "model", nothing_like_it=3.0)
    with pytest.raises(ValueError, match=r"an argument of version 0\.1\.0, today it is multiplier_kwargs"):
        algorithm.load(tmp_path / "model", multiplier_init=1.0)
    with pytest.raises(ValueError, match=r"`cost_limit` must be .*, got 'x'"):
        algorithm.load(tmp_path / "model", cost_limit="x")
    assert algorithm.load(tmp_path / "model", make_env(), "cpu", None, False, True, cost_limit=3.0).cost_limit == [3.0]


def test_what_moves_the_multiplier_can_be_changed_to_episodes_but_not_back(tmp_path: Path, algorithm: Algorithm) -> None:
    paper = make_model_of(algorithm, multiplier_signal="buffer", multiplier_kwargs=dict(init_value=2.0, max_value=5.0))
    paper.save(tmp_path / "paper")
    with pytest.raises(ValueError, match=r"`max_value` must be at least 2, the saved multiplier, got 0\.5"):
        algorithm.load(tmp_path / "paper", multiplier_kwargs=dict(max_value=0.5))
    loaded = algorithm.load(tmp_path / "paper", multiplier_kwargs=dict(max_value=2.5))
    assert same(weights(loaded), weights(paper)) and loaded.lagrange_multiplier.max_value == 2.5
    controlled = algorithm.load(tmp_path / "paper", make_env(), multiplier_signal="episodes")
    assert isinstance(controlled.lagrange_multiplier, EpisodeController)
    assert controlled.lagrange_multiplier.value.tolist() == pytest.approx([2.0])
    controlled.learn(30).save(tmp_path / "controlled")
    with pytest.raises(ValueError, match="`multiplier_signal` must be 'episodes', as the multiplier was saved"):
        algorithm.load(tmp_path / "controlled", multiplier_signal="buffer")
    with pytest.raises(ValueError, match="`multiplier_signal` must be 'episodes', as the multiplier was saved"):
        paper.set_parameters(str(tmp_path / "controlled"))


def test_entries_that_are_given_to_load_leave_the_others(tmp_path: Path) -> None:
    kwargs = dict(init_value=1.0, learning_rate=1e-3, confidence=3.0)
    make_model(multiplier_kwargs=kwargs, score_kwargs=dict(temperature=0.5)).save(tmp_path / "model")
    given = dict(max_value=8.0)
    loaded = ALGD.load(tmp_path / "model", multiplier_kwargs=given, score_kwargs=dict(n_samples=2))
    assert loaded.multiplier_kwargs == {**kwargs, **given} and given == dict(max_value=8.0)
    assert loaded.score_kwargs == dict(temperature=0.5, n_samples=2)
    assert isinstance(loaded.lagrange_multiplier, EpisodeController) and loaded.lagrange_multiplier.confidence == 3.0
    assert ALGD.load(tmp_path / "model", multiplier_kwargs=None).multiplier_kwargs is None
    with pytest.raises(ValueError, match=r"`multiplier_kwargs` must have no 'init_value' in load\(\).* Leave it out"):
        ALGD.load(tmp_path / "model", multiplier_kwargs=dict(init_value=3.0))


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(policy_kwargs=dict(net_arch=[8], layer_norm=False)),
        dict(multiplier_kwargs=dict(max_value=0.5)),
        dict(multiplier_signal="buffer"),
    ],
)
def test_parameters_that_are_refused_change_nothing(kwargs: dict[str, Any]) -> None:
    parameters = make_model(multiplier_kwargs=dict(init_value=1.0), policy_kwargs=dict(net_arch=[8]), seed=1).get_parameters()
    other = make_model(**{"policy_kwargs": dict(net_arch=[8]), **kwargs})
    before = weights(other)
    with pytest.raises(ValueError, match=r"must (have|be)"):
        other.set_parameters(parameters)
    assert same(before, weights(other))


def test_a_whole_number_starts_the_multiplier(algorithm: Algorithm) -> None:
    for signal in ("episodes", "buffer"):
        model = make_model_of(algorithm, multiplier_signal=signal, multiplier_kwargs=dict(init_value=1, max_value=50))
        assert model.lagrange_multiplier.value.tolist() == [1.0]
        assert model.lagrange_multiplier.value.dtype == th.float32
        model.learn(30)
