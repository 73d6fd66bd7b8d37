"""A first safe agent, without any extra. Half a minute on one core."""

from sb3_algd import ALGD, evaluate_policy


def main(steps: int = 2000) -> None:
    """:param steps: Environment steps."""
    model = ALGD(
        "DiffusionPolicy",
        "TwoModes-v0",
        # A small task with few episodes: small networks, little noise, a short horizon, a fast multiplier
        policy_kwargs=dict(net_arch=[64, 64], diffusion_kwargs=dict(sigma_max=0.2)),
        score_kwargs=dict(temperature=0.015, pairing="before"),
        multiplier_kwargs=dict(learning_rate=0.15),
        learning_rate=3e-3,
        batch_size=64,
        gamma=0.5,
        cost_gamma=0.5,
        learning_starts=200,
        policy_delay=1,
        seed=0,
    )
    model.learn(total_timesteps=steps)
    env = model.get_env()
    assert env is not None
    mean_return, _, mean_cost, _ = evaluate_policy(model, env, n_eval_episodes=20)
    print(f"return {mean_return:.1f} (best possible: 80), cost {mean_cost:.1f} (limit: {model.cost_limit.item():g})")
    model.save("two_modes")


if __name__ == "__main__":
    main()
