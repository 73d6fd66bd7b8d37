"""What makes updates fast must not change what they compute."""

import gc
import io
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sb3_algd import ALGD
from sb3_algd.acceleration import GraphedFunction, _make_capturable, move_batch, set_learning_rate, split_batch
from sb3_algd.buffers import CostReplayBufferSamples
from sb3_algd.networks import EnsembleCritic
from tests.test_algd import make_env, make_model, same, weights
from tests.test_buffers import CostlyBitFlipping


def make_critic(n_outputs: int, activation_fn: Any = th.nn.SiLU, net_arch: tuple[int, ...] = (8, 8)) -> EnsembleCritic:
    obs_space, action_space = spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,))
    extractor = FlattenExtractor(obs_space)
    return EnsembleCritic(
        obs_space, action_space, list(net_arch), extractor, 3, activation_fn, n_critics=3, n_outputs=n_outputs
    )


@pytest.mark.parametrize("n_outputs", [1, 3])
@pytest.mark.parametrize("net_arch", [(), (8,), (8, 8), (8, 4, 8)])
@pytest.mark.parametrize("activation_fn", [th.nn.ReLU, th.nn.SiLU, th.nn.Tanh, th.nn.PReLU, partial(th.nn.ELU, inplace=True)])
@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("members_alike", [True, False])
def test_the_gradient_by_hand_is_autograds(
    n_outputs: int,
    net_arch: tuple[int, ...],
    activation_fn: Any,
    skips: bool,
    members_alike: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sb3_algd.networks.skips_rows", lambda device: skips)
    critic = make_critic(n_outputs, activation_fn, net_arch)
    features, actions = th.randn(7, 3), th.randn(4, 7, 2, requires_grad=True)
    weights = th.randn(3, 4, 7, n_outputs)
    some = th.rand(4, 7) < 0.5
    if members_alike:
        weights[:, some] = 0.0
    else:
        # All rows of one member, some of another, none of the third
        weights[1, some] = 0.0
        weights[2] = 0.0
    one_by_one = th.stack([critic(features, action) for action in actions], dim=1)
    (expected,) = th.autograd.grad((weights * one_by_one).sum(), actions)
    with th.no_grad():
        bound = critic.bind(features)
        th.testing.assert_close(bound.values(actions), one_by_one)
        gradient = bound.action_gradient(weights)
    th.testing.assert_close(gradient, expected)
    assert all(parameter.grad is None for parameter in critic.parameters())


def test_several_actions_per_state_meet_their_own_state() -> None:
    critic = make_critic(1)
    obs, actions = th.randn(7, 3), th.randn(4, 7, 2)
    several = critic.bind(obs).values(actions)
    for index in range(4):
        th.testing.assert_close(several[:, index], critic(obs, actions[index]))


def batch_of(rows: int) -> CostReplayBufferSamples:
    def numbers(*shape: int) -> th.Tensor:
        return th.rand(rows, *shape)

    image = th.arange(rows * 4, dtype=th.uint8).view(rows, 2, 2)
    return CostReplayBufferSamples(
        {"image": image, "state": numbers(3)}, numbers(2), {"image": image + 1, "state": numbers(3)},
        numbers(1), numbers(1), None, numbers(2), numbers(1), None,
    )  # fmt: skip


def flat(batch: CostReplayBufferSamples) -> list[th.Tensor]:
    tensors: list[th.Tensor] = []
    for field in batch:
        tensors += field.values() if isinstance(field, dict) else [] if field is None else [field]
    return tensors


def test_a_batch_is_split_row_by_row() -> None:
    batch = batch_of(6)
    parts = split_batch(batch, 3)
    assert [len(part.actions) for part in parts] == [2, 2, 2]
    assert parts[0].discounts is None
    for whole, *pieces in zip(flat(batch), *map(flat, parts), strict=True):
        for first, piece in enumerate(pieces):
            th.testing.assert_close(whole[first::3], piece, rtol=0, atol=0)


def test_a_moved_batch_is_the_same_batch() -> None:
    batch = batch_of(5)
    moved = move_batch(batch, th.device("cpu"))
    assert moved.cost_discounts is None
    for before, after in zip(flat(batch), flat(moved), strict=True):
        assert before.dtype == after.dtype
        th.testing.assert_close(before, after, rtol=0, atol=0)
    # One transfer: the tensors of a data type share one memory
    assert moved.actions.untyped_storage().data_ptr() == moved.costs.untyped_storage().data_ptr()


def test_batches_drawn_at_once_are_as_many_as_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(learning_starts=60, buffer_size=60)
    model.learn(60)
    assert model.replay_buffer is not None
    drawn: list[int] = []
    sample = model.replay_buffer.sample

    def noted(n: int, env: Any = None) -> Any:
        drawn.append(n)
        return sample(n, env)

    monkeypatch.setattr(model.replay_buffer, "sample", noted)
    # 16 observations and next observations of 3 numbers of 4 bytes
    monkeypatch.setattr("sb3_algd.algd.BYTES_AT_ONCE", 10 * 16 * 2 * 3 * 4)
    batches = list(model._sample_batches(35, 16))
    assert [len(batch.actions) for batch in batches] == [16] * 35
    assert drawn == [160, 160, 160, 80]


def test_every_batch_of_goals_has_its_share_of_new_ones() -> None:
    env = CostlyBitFlipping(n_bits=8, continuous=True)
    arguments: dict[str, Any] = dict(
        replay_buffer_class=HerReplayBuffer, learning_starts=200, cost_limit=5.0, episode_length=8
    )
    model = ALGD("MultiInputPolicy", env, seed=0, device="cpu", **arguments)
    model.learn(200)
    for batch in model._sample_batches(8, 20):
        goals = batch.observations["desired_goal"]  # type: ignore[index]
        # The environment's own goal is all ones; new ones, 4 of 5, hardly ever are
        assert 14 <= int((goals != 1).any(dim=1).sum()) <= 16


class Recorder:
    """Stands in for CUDA's: calls the function once for the recording, and tells how often it was replayed."""

    def __init__(self) -> None:
        self.recorded, self.replayed = 0, 0

    def __call__(self, function: Any) -> tuple[Any, dict[str, th.Tensor]]:
        self.recorded += 1
        outputs = {name: value.clone() for name, value in function().items()}

        def replay() -> None:
            self.replayed += 1
            for name, value in function().items():
                outputs[name].copy_(value)

        return replay, outputs


def test_each_kind_of_input_is_warmed_up_before_it_is_recorded() -> None:
    recorder, calls = Recorder(), 0

    def function(x: th.Tensor, risk: th.Tensor | None) -> dict[str, th.Tensor]:
        nonlocal calls
        calls += 1
        return {"sum": x.sum() if risk is None else x.sum() + risk}

    graphed = GraphedFunction(function, [], recorder)
    for number in range(5):
        assert graphed(th.full((2,), float(number)), None)["sum"].item() == 2.0 * number
    assert (recorder.recorded, recorder.replayed) == (1, 2)
    # The first cost of an episode: what is stepped with it has no state yet
    calls = 0
    for _ in range(3):
        assert graphed(th.ones(2), th.tensor(1.0))["sum"].item() == 3.0
    assert (recorder.recorded, calls) == (1, 3)
    assert graphed(th.ones(2), th.tensor(2.0))["sum"].item() == 4.0
    assert (recorder.recorded, recorder.replayed) == (2, 3)


class Readings(TorchDispatchMode):
    """Notes operations that make the processor wait for the device, which no recording can hold."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(function) for name in self.FORBIDDEN):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        dict(policy_kwargs=dict(net_arch=[8], diffusion="ddpm"), multiplier_signal="policy", rho=0.0),
        dict(score_pairing="before", score_space="latent", clip_score_samples=True, multiplier_space="projected"),
    ],
)
def test_an_update_never_reads_from_the_device(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_algd.networks.skips_rows", lambda device: False)
    # Let an optimizer on the CPU step as it does in a recording
    module = sys.modules[th.optim.Adam.__module__]
    monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *args, **kwargs: ["cpu"])
    model = make_model(learning_starts=60, **arguments)
    model.learn(60)
    batch = next(iter(model._sample_batches(1, 16)))
    for optimizer in model._optimizers():
        _make_capturable(optimizer, th.device("cpu"))
    with Readings() as readings:
        model._update(batch, None)
    assert readings.found == []


class Tape(TorchDispatchMode):
    """Writes down what a function does and does it again on the same memory, as a CUDA graph would: the recorder of tests."""

    def __init__(self) -> None:
        super().__init__()
        self.recordings = 0
        self._done: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self._done.append((function, (args, kwargs or {}), result))
        return result

    def record(self, model: ALGD, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """A recording computes nothing, so what writing down has changed is undone."""
        tensors = [*model.policy.state_dict().values(), *model.lagrange_multiplier.state_dict().values()]
        tensors += [
            value for optimizer in model._optimizers() for state in optimizer.state.values() for value in state.values()
        ]
        before, random_state = [tensor.clone() for tensor in tensors], th.get_rng_state()
        with self:
            outputs = function()
        for tensor, value in zip(tensors, before, strict=True):
            tensor.detach().copy_(value)
        th.set_rng_state(random_state)
        self.recordings += 1
        done, self._done = self._done, []
        return lambda: self._replay(done), outputs

    @staticmethod
    @th.no_grad()
    def _replay(done: list[tuple[Any, Any, Any]]) -> None:
        for function, inputs, result in done:
            args, kwargs = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, th.Tensor) else leaf, inputs)
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                # Views, and what was changed in place, already are where they were
                if isinstance(old, th.Tensor) and old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new)


@pytest.mark.parametrize("as_prepared", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        dict(policy_kwargs=dict(net_arch=[8], diffusion="ddpm"), multiplier_space="log"),
        dict(multiplier_signal="policy", score_grad_through_chain=True, score_pairing="before", score_space="latent"),
    ],
)
def test_a_replayed_update_is_the_update(
    arguments: dict[str, Any], as_prepared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sb3_algd.networks.skips_rows", lambda device: False)
    module = sys.modules[th.optim.Adam.__module__]
    monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *args, **kwargs: ["cpu"])
    results = []
    for recorded in (False, True):
        # A learning rate that changes: a replay must not go on with the one of the recording
        model = make_model(learning_starts=60, learning_rate=lambda progress: 1e-3 * (0.1 + progress), **arguments)
        model.learn(60)
        for optimizer in model._optimizers() if as_prepared else []:
            _make_capturable(optimizer, th.device("cpu"))
        tape = Tape()
        if recorded:
            record = partial(tape.record, model)
            model._graphed_update = GraphedFunction(model._update, model._optimizers(), record)
        th.manual_seed(1)
        np.random.seed(1)
        for progress in (1.0, 0.8, 0.6, 0.4):
            model._current_progress_remaining = progress
            model.train(3, 16)
        assert tape.recordings == int(recorded)
        results.append(weights(model))
    # The tape notices a number that was fixed at the recording: learning rates of optimizers that were not prepared
    assert same(*results) == as_prepared


def test_memory_does_not_grow_with_updates() -> None:
    model = make_model(stats_window_size=2)
    model.learn(60)
    counts = []
    for _ in range(2):
        model.train(100, 16)
        gc.collect()
        counts.append(len(gc.get_objects()))
    assert counts[1] - counts[0] < 50


def test_what_was_recorded_can_be_trained_elsewhere() -> None:
    model = make_model()
    model.learn(30)
    for optimizer in model._optimizers():
        _make_capturable(optimizer, th.device("cpu"))
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = ALGD.load(file, env=make_env(), device="cpu")
    for optimizer in loaded._optimizers():
        assert isinstance(optimizer.param_groups[0]["lr"], float)
        assert optimizer.param_groups[0]["capturable"] is False
    loaded.learn(30)
    assert loaded._n_updates > model._n_updates


def test_new_parameters_drop_what_was_recorded() -> None:
    model = make_model(cuda_graph=True)
    model.learn(30)
    before = model._graphed_update
    model.set_parameters(model.get_parameters())
    assert model._graphed_update is not None
    assert model._graphed_update is not before


def test_an_optimizer_that_cannot_be_recorded_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="SGD cannot be recorded"):
        make_model(cuda_graph=True, policy_kwargs=dict(net_arch=[8], optimizer_class=th.optim.SGD))


def test_a_loaded_replay_buffer_is_sampled_in_cpu_memory(tmp_path: Path) -> None:
    model = make_model()
    model.learn(30)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    model.load_replay_buffer(tmp_path / "buffer.pkl")
    assert model.replay_buffer is not None
    model.replay_buffer.device = th.device("meta")  # as SB3 sets it for a model on an accelerator
    model.learn(30, reset_num_timesteps=False)
    assert model.replay_buffer.device.type == "cpu"


def test_other_forms_of_adam_stay_possible() -> None:
    model = make_model(policy_kwargs=dict(net_arch=[8], optimizer_kwargs=dict(foreach=True)))
    model.learn(30)
    assert model.actor.optimizer.defaults["foreach"] is True
    assert make_model().actor.optimizer.defaults["fused"] is True


@pytest.mark.parametrize("diffusion", ["ve", "ddpm"])
@pytest.mark.parametrize("signal", ["buffer", "episodes"])
def test_the_recorded_path_computes_the_same_without_being_recorded(diffusion: str, signal: Any) -> None:
    results = []
    for cuda_graph in (False, True):
        model = make_model(
            make_env(),
            cuda_graph=cuda_graph,
            multiplier_signal=signal,
            policy_kwargs=dict(net_arch=[16, 16], diffusion=diffusion),
        )
        model.learn(50)
        assert (model._graphed_update is not None) == cuda_graph
        results.append(weights(model))
    assert same(*results)


def test_a_graphed_function_gets_its_inputs_and_returns_tensors_of_its_own() -> None:
    buffers: list[th.Tensor] = []

    def function(batch: dict[str, th.Tensor], extra: th.Tensor | None) -> dict[str, th.Tensor]:
        buffers.append(batch["x"])
        return {"x": batch["x"], "sum": batch["x"].sum() + (0 if extra is None else extra)}

    graphed = GraphedFunction(function, [])
    first, second = graphed({"x": th.tensor([1.0, 2.0])}, None), graphed({"x": th.tensor([3.0, 4.0])}, None)
    assert (first["sum"].item(), second["sum"].item()) == (3.0, 7.0)
    assert first["x"].tolist() == [1.0, 2.0]
    # The same memory each time, as a recorded graph needs it
    assert buffers[0] is buffers[1]
    assert graphed({"x": th.tensor([1.0])}, th.tensor(5.0))["sum"].item() == 6.0


def test_a_learning_rate_that_is_a_tensor_changes_in_place() -> None:
    parameter = th.nn.Parameter(th.zeros(1))
    rate = th.tensor(0.1)
    captured = th.optim.Adam([parameter], lr=rate, capturable=True)
    set_learning_rate(captured, 0.5)
    assert captured.param_groups[0]["lr"] is rate
    assert rate.item() == 0.5
    plain = th.optim.Adam([parameter], lr=0.1)
    set_learning_rate(plain, 0.5)
    assert plain.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("diffusion", ["ve", "ddpm"])
def test_reduced_precision_rounds_the_update_but_keeps_single_precision_weights(diffusion: str) -> None:
    losses = []
    for reduced_precision in (False, True):
        model = make_model(
            reduced_precision=reduced_precision, policy_kwargs=dict(net_arch=[16, 16], diffusion=diffusion), learning_starts=60
        )
        model.learn(60)
        batch = next(iter(model._sample_batches(1, 16)))
        losses.append({name: value.numpy() for name, value in model._update(batch, None).items()})
        assert all(value.dtype == th.float32 for value in weights(model).values())
        assert all(parameter.grad is not None for parameter in model.actor.parameters())
    assert losses[0]["critic_loss"] != losses[1]["critic_loss"]
    for name, value in losses[0].items():
        np.testing.assert_allclose(losses[1][name], value, rtol=0.1, atol=0.02, err_msg=name)


def test_reduced_precision_sees_the_newest_critics(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(reduced_precision=True, learning_rate=0.05, learning_starts=60)
    model.learn(60)
    energies = []
    energy_of = model._energy

    def noted(observations: th.Tensor, actions: th.Tensor) -> Any:
        result = energy_of(observations, actions)
        energies.append((actions.detach().clone(), result[0]))
        return result

    monkeypatch.setattr(model, "_energy", noted)
    batch = next(iter(model._sample_batches(1, 16)))
    model._update(batch, None)
    actions, during = energies[0]
    with th.autocast("cpu", th.bfloat16):
        # The critics have not changed since; the multiplier has, a little
        afterwards = energy_of(batch.observations, actions)[0]
    th.testing.assert_close(during, afterwards, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_stays_in_the_process_unless_the_user_says_otherwise() -> None:
    code = """
import resource, torch
from sb3_algd.acceleration import keep_freed_memory
keep_freed_memory()
def work():
    kept = [torch.ones(500_000) for _ in range(10)]
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {}
    for setting in ({}, {"MALLOC_TRIM_THRESHOLD_": "100000"}):
        result = subprocess.run([sys.executable, "-c", code], env={"PATH": "", **setting}, capture_output=True, check=True)
        faults[bool(setting)] = int(result.stdout)
    # 20 MB in pages of 4 KB are 5,000 faults each time where the memory was given back
    assert 3 * faults[False] < faults[True]
