"""The score target, held against closed forms."""

import numpy as np
import pytest
import torch as th

from sb3_algd.score import draw_score_samples, draw_score_states, estimate_score


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_score_estimate_of_a_quadratic_energy_is_the_gaussian_score(temperature: float) -> None:
    """
    The energy |a - m|^2 / (2 v) is that of N(m, beta v); blurred with N(0, sigma^2) its score is
    -(a - m) / (beta v + sigma^2).
    """
    mean, variance, sigma = th.tensor([0.3, -0.5], dtype=th.float64), 0.4, 0.6
    points = th.tensor([[0.0, 0.0], [0.9, -0.9], [-0.5, 0.7]], dtype=th.float64)
    exact = -(points - mean) / (temperature * variance + sigma**2)
    th.manual_seed(0)
    errors = []
    for n_samples in (4, 64, 1024, 16384):
        squares = []
        for _ in range(64):
            samples = points + sigma * th.randn(n_samples, 3, 2, dtype=th.float64)
            energy = (samples - mean).square().sum(dim=-1) / (2 * variance)
            estimate = estimate_score(energy, (samples - mean) / variance, temperature)
            squares.append((estimate - exact).square().mean())
        errors.append(th.stack(squares).mean().sqrt().item())
    # A Monte-Carlo estimator: the error falls like one over the root of the number of samples
    assert errors[0] > 2.5 * errors[1] and errors[1] > 2.5 * errors[2] and errors[2] > 2.5 * errors[3]
    assert errors[3] < 0.03


def test_score_states_are_those_after_or_before_their_step() -> None:
    latents = [th.full((1000, 2), float(i)) for i in range(6)]  # the chain's position as its value
    step, latent = draw_score_states(latents, "after")
    assert set(step.tolist()) == {0, 1, 2, 3, 4}
    # Step 0 is the last one: the state after it is the last of the chain
    th.testing.assert_close(latent[:, 0], 5.0 - step)
    step, latent = draw_score_states(latents, "before")
    th.testing.assert_close(latent[:, 0], 4.0 - step)


def test_score_samples_in_action_space() -> None:
    latent, std = th.full((3, 2), 0.5), th.tensor([[0.1], [0.5], [1.0]])
    samples, slope = draw_score_samples(latent, std, 4000, "action", clip=False)
    assert samples.shape == (4000, 3, 2) and th.equal(slope, th.ones_like(samples))
    th.testing.assert_close(samples.mean(dim=0), th.full((3, 2), float(np.tanh(0.5))), atol=0.1, rtol=0)
    th.testing.assert_close(samples.std(dim=0), std.expand(3, 2), atol=0.05, rtol=0)
    assert samples.abs().max() > 1.0
    assert draw_score_samples(latent, std, 4000, "action", clip=True)[0].abs().max() == 1.0


def test_score_samples_in_latent_space_have_the_chain_rules_factor() -> None:
    latent, std = th.full((3, 2), 0.5), th.tensor([[0.1], [0.5], [1.0]])
    samples, slope = draw_score_samples(latent, std, 4000, "latent", clip=False)
    assert samples.abs().max() < 1.0
    th.testing.assert_close(slope, 1.0 - samples.square())
    th.testing.assert_close(th.atanh(samples.double()).std(dim=0).float(), std.expand(3, 2), atol=0.05, rtol=0)
