"""
Make the agents that come with the package of models that ``benchmarks.run --save`` has left: policies alone, without pickle.

    python -m benchmarks.agents benchmarks/results/Safexp-PointButton1-v0/algd-ve/seed3.zip

Each is played for 100 stochastic episodes first. Only one that is within its limit is kept, in
``trained_agents/<algorithm>/<task>_1/``. ``sb3-algd enjoy --env <task>`` finds it there, and ``README.md`` has its row.
Whole models there, ``<task>.zip``, are played anew for theirs. Without arguments only ``README.md`` is written.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from sb3_algd import ALGD
from sb3_algd.common.recorder import make_envs
from sb3_algd.export import export_policy
from sb3_algd.export.policy_file import CONFIG
from sb3_algd.zoo import ALGO, TRAINED_AGENTS
from sb3_algd.zoo.export import measure

N_EPISODES, N_ENVS = 100, 20
#: Of the episodes; training and its evaluations have others
SEED = 2_000_000
HEADING = f"""# Agents that come with the package

Policies alone, loaded without pickle, but for TwoModes-v0, which is a whole model. `sb3-algd enjoy --env <task>` plays
them. They were trained with ALGD (VE) and its defaults of the time; seeds from 10 on have those of today. From seed 24
on, those of the speed tasks have the RL Zoo's settings (another penalty, whose `rho` it is). TwoModes-v0 is
the best feasible model of `sb3-algd train --env TwoModes-v0 --seed 2`, whose settings are in `zoo_configs/algd.yml`.
Return and cost are those of {N_EPISODES} stochastic episodes, with seeds of their own.

| task | steps, seed, `rho` | return | cost |
| --- | --- | --- | --- |
"""


def play(path: Path, task: str) -> tuple[ALGD, dict[str, Any]]:
    """:param path: A model's file. :param task: Its task. :return: The model, and what its row says."""
    model = ALGD.load(path, make_envs(task, N_ENVS, seed=SEED), device="cpu", buffer_size=1)
    results = measure(model, N_EPISODES, deterministic=False)
    results.update(steps=model.num_timesteps, seed=model.seed, rho=float(np.max(model.rho)))
    return model, results


def keep(path: Path, folder: Path) -> None:
    """
    Keep the policy of a model, if it is within its limit.

    :param path: The model's file, ``<task>/<algorithm>/seed<k>.zip``
    :param folder: Where agents go
    """
    task = path.parts[-3]
    model, results = play(path, task)
    print(f"{path}: return {results['mean_return']:.1f}, cost {results['verdict']}", flush=True)
    if not str(results["verdict"]).startswith("within"):
        return
    export_policy(model, folder / ALGO / f"{task}_1", task=task, results=results)


def table(folder: Path) -> str:
    """:param folder: Where agents are. :return: One row for each of them."""
    policies = [json.loads(config.read_text(encoding="utf-8")) for config in folder.glob(f"*/*/{CONFIG}")]
    agents = {policy["task"]: policy["results"] for policy in policies}
    agents |= {path.stem: play(path, path.stem)[1] for path in folder.glob(f"{ALGO}/*/*.zip")}
    rows = [
        f"| {task} | {results['steps']:,}, {results['seed']}, {results['rho']:g} "
        f"| {results['mean_return']:.1f} ± {results['std_return']:.1f} | {results['verdict']} |"
        for task, results in sorted(agents.items())
    ]
    return HEADING + "\n".join(rows) + "\n"


def main() -> None:
    """Keep what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, help="files of models, <task>/<algorithm>/seed<k>.zip")
    parser.add_argument("--out", type=Path, default=TRAINED_AGENTS)
    args = parser.parse_args()
    for path in args.models:
        keep(path.resolve(), args.out)
    (args.out / "README.md").write_text(table(args.out), encoding="utf-8")


if __name__ == "__main__":
    main()
