"""
What a checkpoint takes: bytes, CPU time, and how much of that is spent on hashes and parity.

    python -m benchmarks.checkpoints

Observations of 60 numbers. The first checkpoint stores all transitions, the second the new ones. CPU time, because waiting
for the disk depends on the disk; the least of several rounds. Prints a Markdown table.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.env_util import make_vec_env

from sb3_algd import ALGD
from sb3_algd.common.buffers import CostStorage
from sb3_algd.common.checkpoint import ResumableCheckpointCallback
from sb3_algd.common.checkpoint_files import PARITY, choose_checkpoint, file_hash, write_parity

HEADER = (
    "| what | transitions | MB | CPU time, s | of that hashes, s | of that parity, s |\n| --- | --- | --- | --- | --- | --- |"
)


class WideEnv(gym.Env[np.ndarray, np.ndarray]):
    """Observations of 60 numbers, and nothing to do."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (60,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """:param seed: Seed. :param options: Not used. :return: A random observation, and an empty info."""
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 60).astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """:param action: Not used. :return: A random observation, without reward and cost."""
        return self.np_random.uniform(-1, 1, 60).astype(np.float32), 0.0, False, False, {"cost": 0.0}


def seconds(what: Callable[[], object]) -> float:
    """:param what: Anything. :return: Its CPU time."""
    start = time.process_time()
    what()
    return time.process_time() - start


def write_parity_of(path: Path) -> None:
    """:param path: A file, whose parity is written beside it."""
    with path.with_name("parity").open("wb") as file:
        write_parity(path, file)


class Measure(BaseCallback):
    """
    Fills the replay buffer and stores checkpoints.

    :param checkpoint: Stores them.
    :param sizes: How many transitions come before each.
    """

    def __init__(self, checkpoint: ResumableCheckpointCallback, sizes: Sequence[int]) -> None:
        super().__init__()
        self.checkpoint, self.sizes = checkpoint, sizes
        #: MB, CPU time, that of the hashes and that of the parity, for each checkpoint and for the check before a resume
        self.rows: list[np.ndarray] = []

    def _on_rollout_start(self) -> None:
        if self.rows:
            return
        buffer = self.model.replay_buffer  # type: ignore[attr-defined]
        assert isinstance(buffer, CostStorage)
        folder, rng = self.checkpoint.save_path, np.random.default_rng(0)
        for size in self.sizes:
            before = set(folder.iterdir())
            for name in ("observations", "next_observations", "actions"):
                array = getattr(buffer, name)
                rows = array[buffer.pos : buffer.pos + size]
                rows[:] = rng.uniform(-1, 1, rows.shape)
            buffer.pos += size
            buffer.n_added += size
            total = seconds(self.checkpoint.store)
            new = sorted(set(folder.iterdir()) - before)
            hashes = sum(seconds(partial(file_hash, path)) for path in new)
            parts = [path for path in new if path.with_name(path.name + PARITY) in new]
            parity = sum(seconds(partial(write_parity_of, path)) for path in parts)
            # Each file is hashed as it is written, and as it is read back
            self.rows.append(np.array([sum(path.stat().st_size for path in new) / 1e6, total, 2 * hashes, parity]))
        check = seconds(lambda: choose_checkpoint(folder))
        self.rows.append(np.array([sum(path.stat().st_size for path in folder.iterdir()) / 1e6, check, check, 0.0]))

    def _on_step(self) -> bool:
        return False


def measure(sizes: Sequence[int]) -> np.ndarray:
    """:param sizes: How many transitions come before each checkpoint. :return: A row for each, and one for the check."""
    model = ALGD(
        "DiffusionPolicy",
        make_vec_env(WideEnv),
        learning_starts=10**9,
        buffer_size=sum(sizes) + 10,
        cost_limit=1.0,
        episode_length=1000,
        device="cpu",
    )
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = ResumableCheckpointCallback(10**9, folder)
        measured = Measure(checkpoint, sizes)
        model.learn(1, CallbackList([checkpoint, measured]))
    return np.stack(measured.rows)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100_000, 5_000], help="transitions before each checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    th.set_num_threads(1)
    table = np.min([measure(args.sizes) for _ in range(args.rounds)], axis=0)
    names = [f"checkpoint {number + 1}" for number in range(len(args.sizes))] + ["check before a resume"]
    print(HEADER)
    for name, size, row in zip(names, [*args.sizes, sum(args.sizes)], table, strict=True):
        print(f"| {name} | {size:,} | {row[0]:.1f} | {' | '.join(f'{value:.3f}' for value in row[1:])} |")


if __name__ == "__main__":
    main()
