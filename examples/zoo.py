"""The RL Zoo from Python: its commands, its registry, and the agent that comes with the package. Needs the extra zoo."""

from sb3_algd import evaluate_policy
from sb3_algd.cli import main as command
from sb3_algd.common.recorder import make_envs
from sb3_algd.zoo import TRAINED_AGENTS, rl_zoo3


def main(steps: int = 1_000) -> None:
    """:param steps: Environment steps."""
    command(["train", "--env", "TwoModes-v0", "-n", str(steps), "-params", "policy_kwargs:dict(net_arch=[64, 64])"])
    command(["enjoy", "--env", "TwoModes-v0", "-f", "logs", "-n", "300", "--no-render"])

    # ALGD and SACLag are in the Zoo's registry
    model = rl_zoo3.ALGOS["algd"].load(TRAINED_AGENTS / "algd" / "TwoModes-v0_1" / "TwoModes-v0.zip")
    mean_return, _, mean_cost, _ = evaluate_policy(model, make_envs("TwoModes-v0", seed=0), n_eval_episodes=10)
    print(f"the agent that comes along: return {mean_return:.1f}, cost {mean_cost:.1f}, limit 64")


if __name__ == "__main__":
    main()
