"""What makes updates fast must not change what they compute."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_algd.acceleration import GraphedFunction, move_batch, set_learning_rate, split_batch
from sb3_algd.buffers import CostReplayBufferSamples
from sb3_algd.networks import EnsembleCritic
from tests.test_algd import make_env, make_model, same, weights


def make_critic(n_outputs: int) -> EnsembleCritic:
    obs_space, action_space = spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,))
    extractor = FlattenExtractor(obs_space)
    return EnsembleCritic(
        obs_space, action_space, [8, 8], extractor, 3, th.nn.SiLU, n_critics=3, n_outputs=n_outputs, narrow_init=True
    )


@pytest.mark.parametrize("n_outputs", [1, 3])
def test_stacked_and_single_products_give_the_same_values_and_gradients(
    n_outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    critic = make_critic(n_outputs)
    features, actions = th.randn(7, 3), th.randn(4, 7, 2, requires_grad=True)
    results = []
    for stacked in (True, False):
        monkeypatch.setattr("sb3_algd.networks.computes_stacked", lambda device, stacked=stacked: stacked)
        several = critic.bind(features).values(actions)
        one = critic(features, actions[0])
        gradients = th.autograd.grad(several.square().sum() + one.pow(3).sum(), [actions, *critic.weights, *critic.biases])
        results.append([several, one, *gradients])
    assert results[0][0].shape == (3, 4, 7, n_outputs)
    for a, b in zip(*results, strict=True):
        th.testing.assert_close(a, b)


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
        th.testing.assert_close(whole, th.cat(pieces), rtol=0, atol=0)


def test_a_moved_batch_is_the_same_batch() -> None:
    batch = batch_of(5)
    moved = move_batch(batch, th.device("cpu"))
    assert moved.cost_discounts is None
    for before, after in zip(flat(batch), flat(moved), strict=True):
        assert before.dtype == after.dtype
        th.testing.assert_close(before, after, rtol=0, atol=0)
    # One transfer: the tensors of a data type share one memory
    assert moved.actions.untyped_storage().data_ptr() == moved.costs.untyped_storage().data_ptr()


def test_batches_drawn_at_once_are_all_used_once() -> None:
    model = make_model(gradient_steps=1, learning_starts=60, buffer_size=60)
    model.learn(60)
    batches = list(model._sample_batches(35, 16))
    assert [len(batch.actions) for batch in batches] == [16] * 35
    assert len({batch.observations.data_ptr() for batch in batches}) == 35  # type: ignore[union-attr]


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
    assert losses[0]["critic_loss"] != losses[1]["critic_loss"]
    for name, value in losses[0].items():
        np.testing.assert_allclose(losses[1][name], value, rtol=0.1, atol=0.02, err_msg=name)


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
    assert faults[False] < 1000 < faults[True]
