"""Evaluate return and cost during training, and keep the best model within the limit."""

from sb3_algd import ALGD, evaluate_policy
from sb3_algd.common.callbacks import CostEvalCallback
from sb3_algd.common.recorder import make_envs


def main(steps: int = 2_000) -> None:
    """:param steps: Environment steps."""
    eval_env = make_envs("TwoModes-v0", 4, seed=1)
    callback = CostEvalCallback(
        eval_env, eval_freq=max(steps // 10, 1), n_eval_episodes=8, best_model_save_path="logs", log_path="logs"
    )
    model = ALGD("DiffusionPolicy", "TwoModes-v0", policy_kwargs=dict(net_arch=[64, 64]), seed=0)
    model.learn(total_timesteps=steps, callback=callback)

    best = ALGD.load("logs/best_model.zip")
    for name, candidate in (("last", model), ("best feasible", best)):
        mean_return, _, mean_cost, _ = evaluate_policy(candidate, eval_env, n_eval_episodes=20)
        print(f"{name}: return {mean_return:.1f}, cost {mean_cost:.1f}, limit {model.cost_limit.item():g}")


if __name__ == "__main__":
    main()
