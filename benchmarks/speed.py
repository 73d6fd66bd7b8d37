"""
How fast ALGD updates and acts, beside SB3's SAC in the same process.

    make benchmark                                                        # everything, 10 to 15 minutes
    OMP_NUM_THREADS=1 python -m benchmarks.speed --parts updates          # a part of it
    python -m benchmarks.speed --parts --page docs/performance.md         # only print the tables, and fill the page

Models take turns, so that a machine that slows down slows all of them. Each measurement is a line of a CSV as soon as it is
made, and is not made again: a benchmark that was stopped goes on, and ``rm -r benchmarks/results/speed`` starts anew.

The setting is that of the paper's Safety Gym tasks: 76 observations, 2 actions, batches of 256, and ALGD's defaults. SAC has
two hidden layers of 256, as ALGD's critics. The constraint acts, and pulls, unless a row says otherwise.
"""

import argparse
import csv
import os
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.compiled_sac import CompiledSAC
from benchmarks.plot import fill_page
from benchmarks.speed_tables import KEYS, make_tables
from sb3_algd import ALGD, SACLag
from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm

#: What one measurement does again and again: takes a model, returns how many things were done
Work = Callable[[Any], float]

#: How updates are computed: ending of a model's name -> keyword arguments
WAYS: dict[str, dict[str, Any]] = {
    "": dict(compile=False, reduced_precision=False),
    "-bf16": dict(compile=False, reduced_precision=True),
    "-compiled": dict(compile=True, reduced_precision=False),
    "-compiled-bf16": dict(compile=True, reduced_precision=True),
}
#: Variants of an update: name -> whether the constraint acts, policy_delay
VARIANTS = {"default": (True, 2), "inactive": (False, 2), "delay 1": (True, 1)}
#: Changes of the default setting for the table of growth: name -> keyword arguments
GROWTH: dict[str, dict[str, Any]] = {
    "standard": {},
    "batch 64": dict(batch_size=64),
    "batch 1024": dict(batch_size=1024),
    "10 denoising steps": dict(policy_kwargs=dict(denoising_steps=10)),
    "16 score samples": dict(score_kwargs=dict(n_samples=16)),
    "8 cost critics": dict(policy_kwargs=dict(n_cost_critics=8)),
    "critics 512, 512": dict(policy_kwargs=dict(net_arch=dict(pi=[128] * 3, qf=[512, 512]))),
    "3 constraints": dict(n_constraints=3),
}
N_OBSERVATIONS = (1, 64)
#: Random steps before the first update, three episodes of them
WARMUP = 1200


class RandomEnv(gym.Env[np.ndarray, np.ndarray]):
    """Random observations and costs, all over the limit: an environment that takes no time.

    :param n_constraints: Number of costs per step.
    """

    observation_space: spaces.Space = spaces.Box(-1.0, 1.0, (76,), np.float32)
    action_space: spaces.Space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, n_constraints: int = 1) -> None:
        self.cost_limit = [0.0] * n_constraints
        self.cost_limit_discounted = False

    def _observe(self) -> np.ndarray:
        return self.np_random.uniform(-1.0, 1.0, 76).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """See Gymnasium."""
        super().reset(seed=seed)
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """See Gymnasium."""
        costs = self.np_random.uniform(0.0, 0.05, len(self.cost_limit))
        return self._observe(), float(action.sum()), False, False, {"cost": costs}


def make_model(kind: str, device: str, n_constraints: int = 1, **kwargs: Any) -> OffPolicyAlgorithm:
    """
    :param kind: ``sac``, ``compiled_sac``, ``sac_lag``, ``ve`` or ``ddpm``.
    :param device: Device.
    :param n_constraints: Number of constraints.
    :param kwargs: Keyword arguments of the algorithm.
    :return: A model with a filled replay buffer, after a few updates.
    """
    env = gym.wrappers.TimeLimit(RandomEnv(n_constraints), WARMUP // 3)
    common: dict[str, Any] = dict(learning_starts=WARMUP, buffer_size=2 * WARMUP, seed=0, device=device, **kwargs)
    model: OffPolicyAlgorithm
    if kind == "sac":
        model = SAC("MlpPolicy", env, policy_kwargs=dict(net_arch=[256, 256]), **common)
    elif kind == "compiled_sac":
        model = CompiledSAC("MlpPolicy", env, policy_kwargs=dict(net_arch=[256, 256]), **common)
    elif kind == "sac_lag":
        model = SACLag("MlpPolicy", env, **common)
    else:
        policy_kwargs = {"diffusion": kind, **common.pop("policy_kwargs", {})}
        model = ALGD("DiffusionPolicy", env, policy_kwargs=policy_kwargs, **common)
    # Whatever is compiled is compiled here
    model.learn(WARMUP + 5)
    return model


def model_makers(device: str) -> dict[str, Callable[[], OffPolicyAlgorithm]]:
    """:param device: Device. :return: What makes the models of the tables of updates and of acting, by their names."""
    makers: dict[str, Callable[[], OffPolicyAlgorithm]] = {"sac": partial(make_model, "sac", device)}
    for ending, bfloat16 in (("-compiled", False), ("-compiled-bf16", True)):
        makers[f"sac{ending}"] = partial(make_model, "compiled_sac", device, bfloat16=bfloat16)
    for ending in ("", "-compiled-bf16"):
        makers[f"sac_lag{ending}"] = partial(make_model, "sac_lag", device, **WAYS[ending])
    for kind in ("ve", "ddpm"):
        makers |= {f"{kind}{ending}": partial(make_model, kind, device, **kwargs) for ending, kwargs in WAYS.items()}
    return makers


def update(acts: bool, policy_delay: int, model: OffPolicyAlgorithm) -> int:
    """
    Two updates in calls of their own, as with ``gradient_steps=1``.

    :param acts: Whether the constraint acts, where there is one.
    :param policy_delay: See :class:`~sb3_algd.ALGD`.
    :param model: The model.
    :return: Number of updates.
    """
    if isinstance(model, ConstrainedOffPolicyAlgorithm):
        model.units.acts.fill_(float(acts))
        model.policy_delay = policy_delay
    for _ in range(2):
        model.train(1, model.batch_size)
    return 2


def predict(n_observations: int, model: OffPolicyAlgorithm) -> int:
    """:param n_observations: How many at once. :param model: The model. :return: Number of calls."""
    obs = np.full((n_observations, 76), 0.5, np.float32)
    for _ in range(10):
        model.predict(obs[0] if n_observations == 1 else obs)
    return 10


def multiply(a: th.Tensor, b: th.Tensor, model: None) -> float:
    """:param a: Rows. :param b: Weights. :param model: None. :return: GFLOP of ten products."""
    for _ in range(10):
        th.bmm(a, b)
    return 10 * 2 * a.numel() * b.shape[-1] / 1e9


def count_operations(model: ConstrainedOffPolicyAlgorithm) -> float:
    """:param model: A model, which is no longer compiled after this. :return: GFLOP of an update's matrix products."""
    model._compiled = {}
    with FlopCounterMode(display=False) as counter:
        n_updates = update(*VARIANTS["default"], model)
    return counter.get_total_flops() / n_updates / 1e9


class Row(NamedTuple):
    """One row of a table, or a cell of it."""

    what: str
    variant: str
    #: Makes the model, and what is done with it
    make: Callable[[], Any]
    work: Work


def update_rows(device: str) -> list[Row]:
    """:param device: Device. :return: What the tables of updates are of, and the products that are their floor."""
    rows = []
    for name, make in model_makers(device).items():
        variants = ("default",) if name.startswith("sac-") or name == "sac" else VARIANTS
        rows += [Row(name, variant, make, partial(update, *VARIANTS[variant])) for variant in variants]
    a, b = th.rand(4, 5 * 256, 256, device=device), th.rand(4, 256, 256, device=device)
    for dtype in (th.float32, th.bfloat16):
        # The critics' largest product: four of them, five actions per state
        work = partial(multiply, a.to(dtype), b.to(dtype))
        rows.append(Row("products", str(dtype).removeprefix("torch."), lambda: None, work))
    return rows


def acting_rows(device: str) -> list[Row]:
    """:param device: Device. :return: What the table of acting is of."""
    makers = model_makers(device)
    return [Row(name, str(n), makers[name], partial(predict, n)) for name in ("sac", "ve", "ddpm") for n in N_OBSERVATIONS]


def growth_rows(device: str) -> list[Row]:
    """:param device: Device. :return: What the table of growth is of."""
    make = partial(make_model, "ve", device, **WAYS["-compiled-bf16"])
    return [
        Row("ve-compiled-bf16", name, partial(make, **kwargs), partial(update, *VARIANTS["default"]))
        for name, kwargs in GROWTH.items()
    ]


PARTS = {"updates": update_rows, "acting": acting_rows, "growth": growth_rows}


def rate(work: Callable[[], float], seconds: float) -> float:
    """
    :param work: Does things, and says how many.
    :param seconds: How long to go on.
    :return: Things per second.
    """
    done = 0.0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or done == 0:
        done += work()
        if th.cuda.is_available():
            th.cuda.synchronize()
    return done / elapsed


class Measurements:
    """
    All that was measured, a line of a CSV each.

    :param folder: Where it is kept.
    :param place: Device, threads, and what waiting threads do.
    """

    def __init__(self, folder: Path, place: tuple[str, int, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file, self._place = folder / "measurements.csv", tuple(map(str, place))
        if not self._file.exists():
            self._append([*KEYS, "value"])
        with self._file.open() as file:
            self._known = {tuple(line[:-1]) for line in csv.reader(file)}

    def _append(self, line: Sequence[str]) -> None:
        with self._file.open("a") as file:
            csv.writer(file, lineterminator="\n").writerow(line)

    def has(self, *key: str) -> bool:
        """:param key: Part, what, variant and round. :return: Whether it was measured here."""
        return (*self._place, *key) in self._known

    def add(self, *key: str, value: float) -> None:
        """:param key: Part, what, variant and round. :param value: What was measured."""
        self._append([*self._place, *key, f"{value:.6g}"])


def measure(part: str, rows: list[Row], rounds: int, seconds: float, results: Measurements) -> None:
    """
    Measure what is missing, in turns.

    :param part: Part of the benchmark.
    :param rows: What it is of.
    :param rounds: How often each takes a turn.
    :param seconds: Length of a turn.
    :param results: What is there, and where the rest goes.
    """
    missing = [(row, str(n)) for n in range(rounds) for row in rows if not results.has(part, row.what, row.variant, str(n))]
    models: dict[Callable[[], Any], Any] = {}
    for row, _ in missing:
        if row.make not in models:
            start = time.perf_counter()
            models[row.make] = row.make()
            # Or what it is slowed down by at first would count for the first round
            row.work(models[row.make])
            print(f"{part}: {row.what}, {row.variant} made in {time.perf_counter() - start:.0f} s", flush=True)
    for row, n in missing:
        results.add(part, row.what, row.variant, n, value=rate(partial(row.work, models[row.make]), seconds))
    for row in rows if part == "growth" else []:
        if row.make in models and not results.has("GFLOP", row.what, row.variant, "0"):
            results.add("GFLOP", row.what, row.variant, "0", value=count_operations(models[row.make]))


def describe_machine(device: str) -> dict[str, str]:
    """:param device: Device. :return: What the figures were measured on."""
    cpu_info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(": ")[1] for line in cpu_info if "model name" in line]
    units = [
        "AMX" if th.cpu._is_amx_tile_supported() else "no AMX",
        *(["AVX512-BF16"] if th.cpu._is_avx512_bf16_supported() else []),
        th.backends.cpu.get_cpu_capability(),
    ]
    return {
        "processor": f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores",
        "units": ", ".join(units),
        "device": th.cuda.get_device_name() if device == "cuda" else "cpu",
        "PyTorch": f"{th.__version__}, Python {platform.python_version()}",
        f"load of the machine before, OMP_NUM_THREADS={th.get_num_threads()}": f"{os.getloadavg()[0]:.2f}",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """:param arguments: Those of the command line if None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--models", nargs="+", help="measure these only, all if left out")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.3, help="length of a measurement")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "speed")
    parser.add_argument("--page", type=Path, help="Markdown page whose tables are replaced by those of --out")
    args = parser.parse_args(arguments)
    waiting = os.environ.get("OMP_WAIT_POLICY", "default").lower()
    results = Measurements(args.out, (args.device, th.get_num_threads(), waiting))
    if args.parts:
        machine = args.out / "machine.csv"
        facts = pd.read_csv(machine, index_col=0)["value"].to_dict() if machine.exists() else {}
        pd.Series({**facts, **describe_machine(args.device)}, name="value").rename_axis("fact").to_csv(machine)
    for part in args.parts:
        rows = [row for row in PARTS[part](args.device) if args.models is None or row.what in args.models]
        measure(part, rows, args.rounds, args.seconds, results)
    tables = make_tables(args.out)
    for heading, text in tables.items():
        print(f"{heading}\n\n{text}\n")
    if args.page:
        fill_page(args.page, tables)


if __name__ == "__main__":
    main()
