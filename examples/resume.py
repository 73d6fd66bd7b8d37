"""Store checkpoints, and go on from the last one in a run that ends as if it had never been interrupted."""

import torch as th

from sb3_algd import ALGD
from sb3_algd.common.checkpoint import ResumableCheckpointCallback, resume
from sb3_algd.common.recorder import make_envs


def main(steps: int = 2_000) -> None:
    """:param steps: Environment steps."""

    def checkpoints() -> ResumableCheckpointCallback:
        return ResumableCheckpointCallback(steps // 2, "checkpoint")

    # Here it is left where it has stored its last checkpoint, at the end; after a crash it goes on from the one before
    model = ALGD("DiffusionPolicy", make_envs("TwoModes-v0", seed=0), policy_kwargs=dict(net_arch=[64, 64]), seed=0)
    model.learn(total_timesteps=steps, callback=checkpoints())

    resumed = resume("checkpoint", make_envs("TwoModes-v0", seed=0), callback=checkpoints())
    same = all(th.equal(one, other) for one, other in zip(model.policy.parameters(), resumed.policy.parameters(), strict=True))
    print(f"step {resumed.num_timesteps}, the same weights: {same}")


if __name__ == "__main__":
    main()
