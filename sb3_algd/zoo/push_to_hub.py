"""
The Zoo's ``push_to_hub``: evaluate a trained agent and upload it to the Hugging Face Hub.

    python -m sb3_algd.zoo push_to_hub --env Safexp-PointButton1-v0 -f logs -orga my_organization
"""

import importlib
import json
import runpy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import huggingface_hub.repocard
import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm
from sb3_algd.common.evaluation import evaluate_policy
from sb3_algd.common.verdict import constraint_verdict
from sb3_algd.export import export_policy
from sb3_algd.zoo import ALGO
from sb3_algd.zoo.commandline import (
    agent_played,
    default_option,
    default_to_stochastic,
)

# Not by an import statement, which finds the function of that name
hub = importlib.import_module("huggingface_sb3.push_to_hub")


def _generate_metadata(*args: Any) -> dict[str, Any]:
    # rl_zoo3 2.9.2 imports this under its old name, and expects the dictionary that it returned then
    # (sb3-team-hf-integration 3.2 has renamed it)
    metadata: dict[str, Any] = hub._generate_metadata(*args).to_dict()
    return metadata


def _add_costs(folder: Path, costs: dict[str, Any]) -> None:
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    (folder / "results.json").write_text(json.dumps({**results, **costs}), encoding="utf-8")


def _add_policy(model: ConstrainedOffPolicyAlgorithm, folder: Path, results: dict[str, Any]) -> str:
    """:return: What the model card says of the files without pickle, nothing if there are none."""
    try:
        export_policy(model, folder, results=results)
    except ValueError as error:
        print(f"Only the zip file is uploaded, which is loaded with pickle. {error}")
        return ""
    return (
        "\nLoading the zip file can run code of whoever uploaded it. `policy.safetensors` and `config.json`, the actor alone, "
        "cannot:\n```python\nfrom sb3_algd.export import load_policy\n\n"
        'action, _ = load_policy("folder of the two files").predict(observation)\n```\n'
    )


def _describe(costs: dict[str, Any]) -> str:
    mean, std, limit = (", ".join(f"{x:.2f}" for x in costs[key]) for key in ("mean_cost", "std_cost", "cost_limit"))
    unit = " (discounted sums)" if costs["cost_limit_discounted"] else ""
    return (
        f"Evaluated over {costs['n_eval_episodes']} episodes: cost {mean} +/- {std} per episode, limit {limit}{unit}.\n\n"
        f"Verdict: {costs['verdict']}.\n"
    )


def push_to_hub() -> None:
    """Run the Zoo's command with our default algorithm; the model card says what the agent costs."""
    card_notes: list[str] = []
    evaluate_agent = hub._evaluate_agent
    metadata_save = huggingface_hub.repocard.metadata_save

    def evaluate_with_costs(
        model: Any, eval_env: VecEnv, n_eval_episodes: int, is_deterministic: bool, local_path: Path
    ) -> tuple[float, float]:
        rewards: tuple[float, float] = evaluate_agent(model, eval_env, n_eval_episodes, is_deterministic, local_path)
        if isinstance(model, ConstrainedOffPolicyAlgorithm):
            _, _, costs = evaluate_policy(model, eval_env, n_eval_episodes, is_deterministic, return_episode_rewards=True)
            evaluated = dict(
                n_eval_episodes=n_eval_episodes,
                mean_cost=costs.mean(axis=0).tolist(),
                std_cost=costs.std(axis=0).tolist(),
                verdict=str(constraint_verdict(costs, model.cost_limit)),
                cost_limit=np.asarray(model.cost_limit).tolist(),
                cost_limit_discounted=model.cost_limit_discounted,
            )
            _add_costs(local_path, evaluated)
            card_notes.append(_describe(evaluated) + _add_policy(model, local_path, evaluated))
        return rewards

    def save_card(path: Path, metadata: dict[str, Any]) -> None:
        # The Zoo's own commands do not know our algorithms
        card = Path(path).read_text(encoding="utf-8").replace("-m rl_zoo3.", "-m sb3_algd.zoo ")
        card = card.replace("pip install rl_zoo3", 'pip install "sb3_algd[zoo]"')
        for note in card_notes:
            card = card.replace("\n## Usage", f"\n{note}\n## Usage", 1)
        Path(path).write_text(card, encoding="utf-8")
        metadata_save(path, metadata)

    default_option("--algo", ALGO)
    default_to_stochastic()
    with (
        agent_played(),
        patch.object(hub, "generate_metadata", _generate_metadata, create=True),
        patch.object(hub, "_evaluate_agent", evaluate_with_costs),
        patch.object(huggingface_hub.repocard, "metadata_save", save_card),
    ):
        # rl_zoo3 2.9.2 has this command outside any function
        runpy.run_module("rl_zoo3.push_to_hub", run_name="__main__")


if __name__ == "__main__":
    push_to_hub()
