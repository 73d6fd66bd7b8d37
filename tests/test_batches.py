"""Batches: drawn several at once, split and moved, without a change of what they hold."""

from pathlib import Path
from typing import Any

import pytest
import torch as th
from stable_baselines3 import HerReplayBuffer

from sb3_algd import ALGD
from sb3_algd.common.batches import move_batch, sample_batches, split_batch
from sb3_algd.common.buffers import CostReplayBufferSamples
from tests.conftest import CostlyBitFlipping, make_model


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
    monkeypatch.setattr("sb3_algd.common.batches.BYTES_AT_ONCE", 10 * 16 * 2 * 3 * 4)
    batches = list(sample_batches(model.replay_buffer, 35, 16, th.device("cpu"), None))
    assert [len(batch.actions) for batch in batches] == [16] * 35
    assert drawn == [160, 160, 160, 80]


def test_every_batch_of_goals_has_its_share_of_new_ones() -> None:
    env = CostlyBitFlipping(n_bits=8, continuous=True)
    arguments: dict[str, Any] = dict(
        replay_buffer_class=HerReplayBuffer, learning_starts=200, cost_limit=5.0, episode_length=8
    )
    model = ALGD("MultiInputPolicy", env, seed=0, device="cpu", **arguments)
    model.learn(200)
    assert model.replay_buffer is not None
    for batch in sample_batches(model.replay_buffer, 8, 20, th.device("cpu"), None):
        goals = batch.observations["desired_goal"]  # type: ignore[index]
        # The environment's own goal is all ones; new ones, 4 of 5, hardly ever are
        assert 14 <= int((goals != 1).any(dim=1).sum()) <= 16


def test_a_loaded_replay_buffer_is_sampled_in_cpu_memory(tmp_path: Path) -> None:
    model = make_model()
    model.learn(30)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    model.load_replay_buffer(tmp_path / "buffer.pkl")
    assert model.replay_buffer is not None
    model.replay_buffer.device = th.device("meta")  # as SB3 sets it for a model on an accelerator
    model.learn(30, reset_num_timesteps=False)
    assert model.replay_buffer.device.type == "cpu"
