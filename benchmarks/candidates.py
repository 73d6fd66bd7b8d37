"""
What the best of several candidates does: return, cost and time of an action of saved models.

    python -m benchmarks.candidates --env TwoModes-v0 --models trained_agents/algd/TwoModes-v0_1/TwoModes-v0.zip

``python -m benchmarks.run --save`` leaves models of other tasks. Each row of the table is appended to a CSV file when it is
measured, and never measured again: models may come one by one, and a command that was interrupted can be given again.
"""

import argparse
import csv
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch as th

from benchmarks.deployment import microseconds, print_row
from benchmarks.settings import RESULTS
from benchmarks.toy import TASK, mode_shares
from sb3_algd import constraint_verdict, evaluate_policy
from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm
from sb3_algd.common.recorder import make_envs
from sb3_algd.export import export_onnx
from sb3_algd.train import ALGORITHMS
from sb3_algd_runtime import Agent

DETERMINISTIC = "deterministic"
COLUMNS = (
    "model",
    "actions",
    "episodes",
    "return_mean",
    "return_std",
    "cost_mean",
    "cost_std",
    "cost_lower",
    "cost_upper",
    "cost_limit",
    "verdict",
    "predict_us",
    "exported_us",
    # TwoModes-v0 only
    "left_mode",
    "right_mode",
)


def measure(model: ConstrainedOffPolicyAlgorithm, args: argparse.Namespace, deterministic: bool) -> dict[str, Any]:
    """
    :param model: A model with its number of candidates
    :param args: The options
    :param deterministic: Whether actions are deterministic
    :return: What was measured, by column
    """
    env = make_envs(args.env, min(args.episodes, args.n_envs), seed=args.seed)
    th.manual_seed(args.seed)
    returns, _, costs = evaluate_policy(model, env, args.episodes, deterministic, return_episode_rewards=True, warn=False)
    raw = np.asarray(env.reset())[0]
    env.close()
    verdict = constraint_verdict(costs, model.cost_limit)
    with tempfile.TemporaryDirectory() as folder:
        # The models of the benchmarks are trained without VecNormalize
        export_onnx(model, Path(folder) / "agent.onnx", deterministic=deterministic, vec_normalize=None)
        agent = Agent.load(Path(folder) / "agent.onnx", seed=0)
    times = microseconds(
        partial(model.predict, raw, deterministic=deterministic), partial(agent.act, raw, deterministic=deterministic)
    )
    bounds = (verdict.mean, verdict.std, verdict.lower, verdict.upper, verdict.limit)
    numbers = [np.mean(returns), np.std(returns), *(bound.item() for bound in bounds)]
    row = dict(zip(COLUMNS[3:10], (f"{number:.4f}" for number in numbers), strict=True))
    row |= {"verdict": verdict.outcome, "predict_us": f"{times[0]:.0f}", "exported_us": f"{times[1]:.0f}"}
    if args.env == TASK and not deterministic:
        row |= dict(zip(COLUMNS[-2:], (f"{share:.2f}" for share in mode_shares(model)), strict=True))
    return row


def measure_missing(path: Path, args: argparse.Namespace, table: Path) -> None:
    """
    :param path: A saved model
    :param args: The options
    :param table: The CSV file that rows are appended to
    """
    name = f"{path.parent.name}/{path.stem}"
    there = {(row["model"], row["actions"]) for row in read(table)}
    algorithm: Any = ALGORITHMS[args.algo][0]
    model: ConstrainedOffPolicyAlgorithm = algorithm.load(path, device="cpu", buffer_size=1, optimize_memory_usage=False)
    if model.n_constraints > 1:
        raise SystemExit(f"{path} has several constraints: models are compared under one limit.")
    kinds = [(f"stochastic, N = {n}", n) for n in args.candidates] + [(DETERMINISTIC, 1)]
    for actions, model.policy.n_candidates in kinds:
        if (name, actions) in there:
            continue
        row = {"model": name, "actions": actions, "episodes": args.episodes, **measure(model, args, actions == DETERMINISTIC)}
        table.parent.mkdir(parents=True, exist_ok=True)
        with table.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)


def read(table: Path) -> list[dict[str, str]]:
    """:param table: The CSV file. :return: Its rows, none if there is no such file yet."""
    if not table.exists():
        return []
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def print_table(rows: list[dict[str, str]]) -> None:
    """:param rows: Rows of the CSV file."""
    modes = ["left mode", "right mode"] if any(row["left_mode"] for row in rows) else []
    print_row("model", "actions", "episodes", "return", "cost (95 %)", "verdict", "`predict`, µs", "exported, µs", *modes)
    print_row(*["---"] * (8 + len(modes)))
    for row in rows:
        mean, low, high = (float(row[f"cost_{what}"]) for what in ("mean", "lower", "upper"))
        print_row(
            row["model"],
            row["actions"],
            row["episodes"],
            f"{float(row['return_mean']):.2f} +/- {float(row['return_std']):.2f}",
            f"{mean:.2f} ({low:.2f} to {high:.2f})",
            row["verdict"],
            row["predict_us"],
            row["exported_us"],
            *([row["left_mode"], row["right_mode"]] if modes else []),
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """:param arguments: Those of the command line if None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, nargs="+", required=True, metavar="FILE", help="saved models")
    parser.add_argument("--env", required=True, help="their task")
    parser.add_argument("--algo", default="algd", choices=list(ALGORITHMS))
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 4, 16, 32], metavar="N")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--n-envs", type=int, default=20, help="environments that are played at once")
    parser.add_argument("--seed", type=int, default=1000, help="of the episodes, the same ones for every row")
    parser.add_argument("--out", type=Path, default=RESULTS / "candidates", help="folder of the CSV files, one for each task")
    args = parser.parse_args(arguments)
    th.set_num_threads(1)
    table = args.out / f"{args.env}.csv"
    for path in args.models:
        measure_missing(path, args, table)
    print_table(read(table))


if __name__ == "__main__":
    main()
