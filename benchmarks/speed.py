"""
How fast ALGD updates and acts, as ratios to SB3's SAC measured in the same run.

    make benchmark                                    # with one thread and with two; writes benchmarks/results/speed
    python -m benchmarks.speed --parts updates --rounds 15 --threads 1
    python -m benchmarks.speed --trained runs/Safexp-PointButton1-v0_1/model.zip   # updates in an actual training

The setting is that of the paper's Safety Gym tasks: 76 observations, 2 actions, batches of 256, 4 cost critics, 4 score
samples, 5 denoising steps. SAC has two hidden layers of 256, as ALGD's critics. Each model has a process of its own, as in a
training, and they take turns, so that a machine that slows down slows all of them; the figures are medians over the rounds.
"""

import argparse
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch as th
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.compiled_sac import CompiledSAC
from benchmarks.plot import fill_page
from benchmarks.plot import table as markdown_table
from sb3_algd import ALGD, SACLag

BATCH_SIZE = 256
#: Changes of the standard setting for the table of growth: name -> (keyword arguments, batch size, number of constraints)
VARIANTS: dict[str, tuple[dict[str, Any], int, int]] = {
    "standard": ({}, 256, 1),
    "batch 64": ({}, 64, 1),
    "batch 1024": ({}, 1024, 1),
    "10 denoising steps": (dict(policy_kwargs=dict(denoising_steps=10)), 256, 1),
    "16 score samples": (dict(score_kwargs=dict(n_samples=16)), 256, 1),
    "8 cost critics": (dict(policy_kwargs=dict(n_cost_critics=8)), 256, 1),
    "critics 512, 512": (dict(policy_kwargs=dict(net_arch=dict(pi=[128] * 3, qf=[512, 512]))), 256, 1),
    "3 constraints": ({}, 256, 3),
}


class RandomEnv(gym.Env[np.ndarray, np.ndarray]):
    """Random observations and costs: an environment that takes no time.

    :param n_constraints: Number of costs per step.
    """

    observation_space: spaces.Space = spaces.Box(-1.0, 1.0, (76,), np.float32)
    action_space: spaces.Space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, n_constraints: int = 1) -> None:
        # Every action counts as too costly: where the constraint is not active, updates are faster
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


def make_model(kind: str, device: str, n_constraints: int = 1, n_envs: int = 1, **kwargs: Any) -> OffPolicyAlgorithm:
    """
    :param kind: ``sac``, ``compiled_sac``, ``sac_lag``, ``ve`` or ``ddpm``.
    :param device: Device.
    :param n_constraints: Number of constraints.
    :param n_envs: Number of environments.
    :param kwargs: Keyword arguments of the algorithm.
    :return: A model with a filled replay buffer, after a few updates.
    """
    env = DummyVecEnv([lambda: gym.wrappers.TimeLimit(RandomEnv(n_constraints), 400)] * n_envs)
    common: dict[str, Any] = dict(learning_starts=1200, buffer_size=2000, seed=0, device=device)
    model: OffPolicyAlgorithm
    if kind == "sac":
        model = SAC("MlpPolicy", env, policy_kwargs=dict(net_arch=[256, 256]), **common)
    elif kind == "compiled_sac":
        model = CompiledSAC("MlpPolicy", env, policy_kwargs=dict(net_arch=[256, 256]), **common, **kwargs)
    elif kind == "sac_lag":
        model = SACLag("MlpPolicy", env, policy_kwargs=dict(layer_norm=True), **common, **kwargs)
    else:
        policy_kwargs = {"diffusion": kind, "layer_norm": True, **kwargs.pop("policy_kwargs", {})}
        model = ALGD("DiffusionPolicy", env, policy_kwargs=policy_kwargs, **common, **kwargs)
    model.learn(1205)
    return model


def load_model(path: Path, task: str, device: str) -> OffPolicyAlgorithm:
    """
    :param path: A saved ALGD model.
    :param task: Id of the environment that it was trained in.
    :param device: Device.
    :return: The model, its replay buffer filled with what it does now, after a few updates.
    """
    model = ALGD.load(path, env=gym.make(task), device=device, custom_objects={"learning_starts": 0, "train_freq": 2000})
    model.learn(2000)
    return model


def wait_for(device: str) -> None:
    """Wait until the device has done what was asked of it."""
    if device == "cuda":
        th.cuda.synchronize()


def rate(function: Callable[[], Any], count: int, device: str) -> float:
    """
    :param function: Does ``count`` things.
    :param count: How many.
    :param device: Device that works on them.
    :return: Things per second.
    """
    wait_for(device)
    start = time.perf_counter()
    function()
    wait_for(device)
    return count / (time.perf_counter() - start)


class ModelProcess:
    """
    A model in a process of its own, which does nothing until it is asked.

    :param make: Makes the model.
    :param device: Device.
    """

    def __init__(self, make: Callable[[], OffPolicyAlgorithm], device: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        context.Process(target=_serve, args=(theirs, make, device, th.get_num_threads()), daemon=True).start()
        # Or a process that ends would leave this one waiting for ever
        theirs.close()
        self._connection.recv()

    def rate(self, work: Callable[[OffPolicyAlgorithm, int], None], count: int) -> float:
        """
        :param work: Does something with the model that many times.
        :param count: How many times.
        :return: Times per second.
        """
        self._connection.send((work, count))
        return self._connection.recv()


def _serve(connection: Connection, make: Callable[[], OffPolicyAlgorithm], device: str, threads: int) -> None:
    """What runs in the process of a model."""
    th.set_num_threads(threads)
    model = make()
    connection.send(None)
    # Until the other side is closed
    with suppress(EOFError):
        while True:
            work, count = connection.recv()
            connection.send(rate(partial(work, model, count), count, device))


def train(model: OffPolicyAlgorithm, count: int) -> None:
    """Updates in one call."""
    model.train(count, BATCH_SIZE)


def predict(n_observations: int, model: OffPolicyAlgorithm, count: int) -> None:
    """Actions for several observations at once, or for a single one."""
    obs = np.random.default_rng(0).uniform(-1.0, 1.0, (n_observations, 76)).astype(np.float32)
    obs = obs[0] if n_observations == 1 else obs
    for _ in range(count):
        model.predict(obs)


def learn(gradient_steps: int, model: OffPolicyAlgorithm, count: int) -> None:
    """Environment steps in one call of ``learn``, with so many updates after each step of all environments."""
    model.gradient_steps = gradient_steps
    model.learn(count, reset_num_timesteps=False)


def compare(tasks: Mapping[str, Callable[[], float]], rounds: int, reference: str) -> pd.DataFrame:
    """
    :param tasks: Name -> one measurement of its rate.
    :param rounds: How often all take a turn.
    :param reference: Name of the task that the others are divided by.
    :return: One row a task: median rate, and median over the rounds of the ratio to the reference.
    """
    rates = pd.DataFrame([{name: measure() for name, measure in tasks.items()} for _ in range(rounds)])
    ratios = rates.div(rates[reference], axis=0)
    return pd.DataFrame(
        {
            "per second": rates.median(),
            f"ratio to {reference}": ratios.median(),
            "lowest": ratios.min(),
            "highest": ratios.max(),
        }
    ).rename_axis("what")


def measure_updates(rounds: int, device: str, chosen: list[str] | None = None) -> pd.DataFrame:
    """Gradient updates per second, at the standard setting; of the chosen models, beside SAC, or of all."""
    makers: dict[str, Callable[[], OffPolicyAlgorithm]] = {
        "sac": partial(make_model, "sac", device),
        "sac, compiled, bfloat16": partial(make_model, "compiled_sac", device, bfloat16=True),
    }
    for kind in ("ve", "ddpm"):
        # Policy and critics in every update, but for the last row
        make = partial(make_model, kind, device, policy_delay=1)
        for how, kwargs in (
            ("eager", dict(compile=False, reduced_precision=False)),
            ("compiled, float32", dict(compile=True, reduced_precision=False)),
            ("compiled, bfloat16", dict(compile=True, reduced_precision=True)),
        ):
            makers[f"algd-{kind}, {how}"] = partial(make, **kwargs)
            if how != "compiled, float32":
                makers[f"algd-{kind}, {how}, constraint not active"] = partial(make, cost_limit=1e6, **kwargs)
        makers[f"algd-{kind}, compiled, bfloat16, policy every second update"] = partial(
            make_model, kind, device, policy_delay=2, compile=True, reduced_precision=True
        )
    names = [name for name in makers if chosen is None or name in ("sac", *chosen)]
    models = {name: ModelProcess(makers[name], device) for name in names}
    count = 200 if device == "cuda" else 20
    return compare({name: partial(model.rate, train, count) for name, model in models.items()}, rounds, "sac")


def measure_trained(paths: list[Path], task: str, rounds: int, device: str) -> pd.DataFrame:
    """Gradient updates per second of trained models, in what they have come to."""
    makers: dict[str, Callable[[], OffPolicyAlgorithm]] = {"sac": partial(make_model, "sac", device)}
    makers |= {f"model {i}, {path.stem}": partial(load_model, path, task, device) for i, path in enumerate(paths)}
    models = {name: ModelProcess(make, device) for name, make in makers.items()}
    return compare({name: partial(model.rate, train, 20) for name, model in models.items()}, rounds, "sac")


def measure_predictions(rounds: int, device: str) -> pd.DataFrame:
    """Calls of ``predict`` per second, for several numbers of observations at once."""
    kinds = {"sac": partial(make_model, "sac", device)}
    kinds |= {f"algd-{kind}": partial(make_model, kind, device, compile=False) for kind in ("ve", "ddpm")}
    models = {name: ModelProcess(make, device) for name, make in kinds.items()}
    tables = []
    for n_observations in (1, 8, 64, 1024):
        count = 200 if n_observations < 1024 else 40
        work = partial(predict, n_observations)
        table = compare({name: partial(model.rate, work, count) for name, model in models.items()}, rounds, "sac")
        tables.append(table.reset_index().assign(observations=n_observations))
    return pd.concat(tables).set_index(["observations", "what"])


def measure_learning(rounds: int, device: str) -> pd.DataFrame:
    """Environment steps of ``learn`` per second with several environments, without updates and with one for each step."""
    kinds = {"sac": "sac", "algd-ve": "ve", "algd-ddpm": "ddpm"}
    tables = []
    for n_envs in (1, 8, 32):
        models = {name: ModelProcess(partial(make_model, kind, device, 1, n_envs), device) for name, kind in kinds.items()}
        for what, gradient_steps, count in (("no updates", 0, 640), ("gradient_steps=-1", -1, 64)):
            work = partial(learn, gradient_steps)
            table = compare({name: partial(model.rate, work, count) for name, model in models.items()}, rounds, "sac")
            tables.append(table.reset_index().assign(environments=n_envs, updates=what))
    return pd.concat(tables).set_index(["environments", "updates", "what"])


def measure_growth(rounds: int, device: str) -> pd.DataFrame:
    """Time of a compiled update as one quantity of the setting changes (VE type), with the floor that its operations set."""
    products = measure_products(device, th.bfloat16)
    count = 10
    rows = []
    for name, (kwargs, batch_size, n_constraints) in VARIANTS.items():
        model = make_model("ve", device, n_constraints, compile=True, reduced_precision=True, policy_delay=1, **kwargs)
        update = partial(model.train, count, batch_size)
        # Compiled here where the batch is not that of learn()
        update()
        seconds = np.median([1.0 / rate(update, count, device) for _ in range(rounds)])
        model._compiled = {}
        with FlopCounterMode(display=False) as counter:
            model.train(1, batch_size)
        operations = counter.get_total_flops()
        rows.append(
            {
                "setting": name,
                "ms per update": 1e3 * seconds,
                "GFLOP per update": operations / 1e9,
                "floor, ms": 1e3 * operations / products,
            }
        )
    table = pd.DataFrame(rows).set_index("setting")
    table.insert(1, "ratio to standard", table["ms per update"] / table.loc["standard", "ms per update"])
    table["time / floor"] = table["ms per update"] / table["floor, ms"]
    return table


def measure_products(device: str, dtype: th.dtype) -> float:
    """Floating-point operations per second of a batched matrix product of the size that updates have."""
    a, b = th.rand(4, 5 * BATCH_SIZE, 256, device=device, dtype=dtype), th.rand(4, 256, 256, device=device, dtype=dtype)
    count = 50
    rates = [rate(lambda: [a @ b for _ in range(count)], count, device) for _ in range(7)]
    return float(np.median(rates)) * 2 * a.numel() * 256


def describe_machine(device: str, rounds: int) -> pd.DataFrame:
    """What the figures were measured on."""
    processor = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        processor = next(
            (line.split(": ")[1] for line in cpu_info.read_text().splitlines() if "model name" in line), processor
        )
    facts = {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads of PyTorch": th.get_num_threads(),
        "vector unit": th.backends.cpu.get_cpu_capability(),
        "device": th.cuda.get_device_name() if device == "cuda" else "cpu",
        "PyTorch": th.__version__,
        "Python": platform.python_version(),
        "AMX": th.cpu._is_amx_tile_supported(),
        "GFLOP/s of the critics' products in float32": round(measure_products(device, th.float32) / 1e9),
        "GFLOP/s of the critics' products in bfloat16": round(measure_products(device, th.bfloat16) / 1e9),
        "load of the machine before": os.getloadavg()[0],
        "rounds": rounds,
    }
    return pd.DataFrame({"value": facts}).rename_axis("fact")


PARTS: dict[str, Callable[[int, str], pd.DataFrame]] = {
    "updates": measure_updates,
    "predictions": measure_predictions,
    "growth": measure_growth,
    "learning": measure_learning,
}


def read_tables(results: Path) -> dict[str, str]:
    """
    :param results: Folder with a folder for each device and number of threads.
    :return: Markdown tables of everything in it, by ``<folder>, <part>``.
    """
    tables = {}
    for file in sorted(results.glob("*/*.csv")):
        content = pd.read_csv(file)
        rows = [
            "| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row) + " |"
            for row in content.itertuples(index=False)
        ]
        tables[f"{file.parent.name}, {file.stem}"] = markdown_table(f"| {' | '.join(content.columns)} |", rows)
    return tables


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=["updates", "predictions", "growth"])
    parser.add_argument("--rounds", type=int, default=9, help="Number of alternating rounds")
    parser.add_argument("--threads", type=int, default=1, help="Threads of PyTorch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "speed")
    parser.add_argument("--models", nargs="+", help="Measure updates of these rows only, and of SAC")
    parser.add_argument("--trained", nargs="+", type=Path, default=[], help="Measure updates of these saved models instead")
    parser.add_argument("--task", default="Safexp-PointButton1-v0", help="What the models of --trained were trained in")
    parser.add_argument("--page", type=Path, help="Markdown page whose tables are replaced by those of --out at the end")
    args = parser.parse_args()
    th.set_num_threads(args.threads)
    out = args.out / f"{args.device}-{args.threads}thread{'s' if args.threads > 1 else ''}"
    out.mkdir(parents=True, exist_ok=True)
    parts = {part: partial(PARTS[part], args.rounds, args.device) for part in args.parts}
    if args.models:
        parts = {"updates": partial(measure_updates, args.rounds, args.device, args.models)}
    if args.trained:
        parts = {"trained": partial(measure_trained, args.trained, args.task, args.rounds, args.device)}
    for part, measure in parts.items():
        # Anew for each part, because the machine may be a shared one
        machine = describe_machine(args.device, args.rounds)
        result = measure()
        for name, content in ((f"{part}-machine", machine), (part, result)):
            content.to_csv(out / f"{name}.csv", float_format="%.4g")
            print(f"\n{name}\n{content.to_string(float_format='{:.3g}'.format)}", flush=True)
    if args.page:
        fill_page(args.page, read_tables(args.out))


if __name__ == "__main__":
    main()
