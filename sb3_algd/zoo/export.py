"""
Export a trained agent to files that need neither PyTorch nor pickle.

    sb3-algd export --env Safexp-PointButton1-v0 -f logs --load-best -o agent.onnx
    sb3-algd enjoy --onnx agent.onnx
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import rl_zoo3
import yaml
from huggingface_sb3 import EnvironmentName
from rl_zoo3.utils import StoreDict, create_test_env, get_model_path, get_saved_hyperparams
from stable_baselines3.common.utils import set_random_seed

from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm
from sb3_algd.common.evaluation import evaluate_policy
from sb3_algd.common.verdict import constraint_verdict
from sb3_algd.export import export_onnx, export_policy
from sb3_algd.train import at_least
from sb3_algd.zoo import ALGO, is_constrained
from sb3_algd.zoo.commandline import (
    agents_to_show,
    default_to_trained_agents,
    mistakes_in_one_line,
    show_missing_agent,
)


def parse_arguments() -> argparse.Namespace:
    """:return: Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=EnvironmentName, required=True, help="environment ID")
    parser.add_argument("--algo", default=ALGO, choices=[name for name in rl_zoo3.ALGOS if is_constrained(name)])
    parser.add_argument("-f", "--folder", required=True, help="log folder; without it an agent that comes with the package")
    parser.add_argument("--exp-id", default=0, type=int, help="experiment ID (default: 0: latest)")
    parser.add_argument("--load-best", action="store_true", help="the best model within the limit instead of the last one")
    parser.add_argument("--load-checkpoint", type=int, help="the checkpoint of this number of timesteps instead")
    parser.add_argument("--load-last-checkpoint", action="store_true", help="the last checkpoint instead")
    parser.add_argument("-o", "--output", type=Path, help="the ONNX file, <env>.onnx by default")
    parser.add_argument(
        "--policy-folder", type=Path, metavar="FOLDER", help="also leave policy.safetensors and config.json in this folder"
    )
    parser.add_argument("--deterministic", action="store_true", help="the file always acts deterministically")
    parser.add_argument("--n-candidates", type=int, help="number of actions among which the critics choose; the agent's own")
    parser.add_argument(
        "--eval-episodes",
        type=at_least(0),
        default=0,
        metavar="N",
        help="play so many episodes first; the file has the outcome",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of these episodes")
    parser.add_argument("--env-kwargs", nargs="+", action=StoreDict, default={}, help="arguments of the environment")
    args = parser.parse_args()
    args.output = args.output or Path(f"{args.env}.onnx")
    # Said before anything is loaded or played
    if args.policy_folder is not None and args.n_candidates not in (None, 1):
        raise SystemExit("--policy-folder holds no critics, which would choose among candidates: leave out --n-candidates.")
    if not args.output.parent.is_dir() or args.output.is_dir():
        raise SystemExit(f"-o {args.output}: name a file in a folder that is there.")
    return args


def load_agent(args: argparse.Namespace) -> ConstrainedOffPolicyAlgorithm:
    """
    :param args: Which agent
    :return: The model with its environment, which has the statistics of the training if it has any
    """
    try:
        _, model_path, log_path = get_model_path(
            args.exp_id, args.folder, args.algo, args.env, args.load_best, args.load_checkpoint, args.load_last_checkpoint
        )
    except (AssertionError, ValueError) as error:
        raise show_missing_agent(error) from error
    print(f"Loading {model_path}")
    settings = Path(log_path) / args.env
    hyperparams, stats_path = get_saved_hyperparams(str(settings), test_mode=True)
    env_kwargs = dict(hyperparams.pop("env_kwargs", {}))
    if (settings / "args.yml").is_file():
        stored = yaml.load((settings / "args.yml").read_text(encoding="utf-8"), Loader=yaml.UnsafeLoader)
        env_kwargs = stored["env_kwargs"] or env_kwargs
    env = create_test_env(
        args.env.gym_id,
        stats_path=stats_path,
        seed=args.seed,
        should_render=False,
        hyperparams=hyperparams,
        env_kwargs={**env_kwargs, **args.env_kwargs},
    )
    with agents_to_show():
        model = rl_zoo3.ALGOS[args.algo].load(model_path, env=env, device="cpu")
    assert isinstance(model, ConstrainedOffPolicyAlgorithm)
    return model


def measure(model: ConstrainedOffPolicyAlgorithm, n_episodes: int, deterministic: bool) -> dict[str, Any]:
    """
    :param model: The model with its environment
    :param n_episodes: How many episodes are played
    :param deterministic: Whether actions are deterministic
    :return: Return and cost, and the verdict on the limit, for the metadata
    """
    assert model.env is not None
    returns, _, costs = evaluate_policy(model, model.env, n_episodes, deterministic, return_episode_rewards=True, warn=False)
    return {
        "n_episodes": n_episodes,
        "deterministic": deterministic,
        "mean_return": float(np.mean(returns)),
        "std_return": float(np.std(returns)),
        "mean_cost": costs.mean(axis=0).tolist(),
        "std_cost": costs.std(axis=0).tolist(),
        "verdict": str(constraint_verdict(costs, model.cost_limit)),
    }


def export() -> None:
    """Load the agent that the command line names, and leave its files."""
    default_to_trained_agents()
    with mistakes_in_one_line():
        args = parse_arguments()
        set_random_seed(args.seed)
        model = load_agent(args)
    if args.n_candidates is not None:
        model.policy.n_candidates = args.n_candidates
    results: dict[str, Any] = {}
    if args.eval_episodes > 0:
        results = measure(model, args.eval_episodes, args.deterministic)
        print(f"Return {results['mean_return']:.2f}; cost {results['verdict']}")
    try:
        difference = export_onnx(model, args.output, deterministic=args.deterministic, task=args.env.gym_id, results=results)
        print(
            f"Left {args.output} ({args.output.stat().st_size / 1000:.0f} kB). Its actions differ from those of predict() by "
            f"{difference:.1g} at most. Play it with: sb3-algd enjoy --onnx {args.output}"
        )
        if args.policy_folder is not None:
            export_policy(model, args.policy_folder, task=args.env.gym_id, results=results)
            print(f"Left policy.safetensors and config.json in {args.policy_folder}.")
    except (ValueError, ImportError, OSError) as error:
        raise SystemExit(" ".join(str(error).split())) from error


if __name__ == "__main__":
    export()
