"""Actions of a policy: fast where that is safe, and without a trace in the networks that training goes on with."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

from sb3_algd import ALGD, SACLag


class CachingExtractor(BaseFeaturesExtractor):
    """Makes a tensor at its first use and keeps it, as position encodings do."""

    def __init__(self, observation_space: gym.spaces.Box) -> None:
        super().__init__(observation_space, features_dim=4)
        self.linear = th.nn.Linear(1, 4)
        self.scale: th.Tensor | None = None

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """:param observations: Shape (batch, 1). :return: Shape (batch, 4)."""
        if self.scale is None:
            self.scale = th.linspace(0.5, 1.0, 4, device=observations.device)
        return self.linear(observations) * self.scale


def make_model(algorithm: Any, **policy_kwargs: Any) -> Any:
    return algorithm(
        "MlpPolicy",
        "TwoModes-v0",
        learning_starts=5,
        batch_size=8,
        buffer_size=100,
        policy_kwargs=dict(net_arch=[8, 8], **policy_kwargs),
        seed=0,
        device="cpu",
    )


@pytest.mark.parametrize("algorithm", [ALGD, SACLag])
@pytest.mark.parametrize("share_features_extractor", [False, True])
def test_training_uses_an_extractor_that_predicting_has_used_first(algorithm: Any, share_features_extractor: bool) -> None:
    model = make_model(algorithm, features_extractor_class=CachingExtractor, share_features_extractor=share_features_extractor)
    model.predict(np.zeros(1, dtype=np.float32))
    before = model.actor.features_extractor.linear.weight.clone()
    model.learn(20)
    assert not model.actor.features_extractor.scale.is_inference()
    assert not th.equal(model.actor.features_extractor.linear.weight, before)


@pytest.mark.parametrize("algorithm", [ALGD, SACLag])
def test_networks_that_keep_nothing_predict_in_inference_mode(algorithm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(algorithm)
    modes: list[bool] = []
    predict = model.policy._predict

    def watched(*args: Any, **kwargs: Any) -> th.Tensor:
        modes.append(th.is_inference_mode_enabled())
        return predict(*args, **kwargs)

    monkeypatch.setattr(model.policy, "_predict", watched)
    observation = np.full((3, 1), 0.1, dtype=np.float32)
    actions, state = model.predict(observation, deterministic=True)
    assert modes == [True] and not th.is_inference_mode_enabled()
    assert actions.shape == (3, 2) and state is None
    with th.no_grad():
        expected = predict(th.as_tensor(observation), deterministic=True)
    # SB3 scales them to the action space and back
    np.testing.assert_allclose(actions, expected.numpy(), atol=1e-6)
