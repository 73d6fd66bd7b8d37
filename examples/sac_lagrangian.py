"""SAC-Lagrangian, the usual baseline, beside ALGD on the same task."""

from sb3_algd import ALGD, SACLag, evaluate_policy


def main(steps: int = 2_000) -> None:
    """:param steps: Environment steps."""
    models = {
        "ALGD": ALGD("DiffusionPolicy", "TwoModes-v0", policy_kwargs=dict(net_arch=[64, 64]), seed=0),
        "SACLag": SACLag("MlpPolicy", "TwoModes-v0", policy_kwargs=dict(net_arch=[64, 64]), seed=0),
    }
    for name, model in models.items():
        model.learn(total_timesteps=steps)
        env = model.get_env()
        assert env is not None
        mean_return, _, mean_cost, _ = evaluate_policy(model, env, n_eval_episodes=20)
        print(f"{name}: return {mean_return:.1f}, cost {mean_cost:.1f}, limit {model.cost_limit.item():g}")


if __name__ == "__main__":
    main()
