"""The score target, held against closed forms."""

import numpy as np
import pytest
import torch as th

from sb3_algd.algd.score import ScoreMatching


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_score_estimate_of_a_quadratic_energy_is_the_gaussian_score(temperature: float) -> None:
    """
    The energy |a - m|^2 / (2 v) is that of N(m, beta v); blurred with N(0, sigma^2) its score is
    -(a - m) / (beta v + sigma^2).
    """
    mean, variance, sigma = th.tensor([0.3, -0.5], dtype=th.float64), 0.4, 0.6
    points = th.tensor([[0.0, 0.0], [0.9, -0.9], [-0.5, 0.7]], dtype=th.float64)
    exact = -(points - mean) / (temperature * variance + sigma**2)
    score_matching = ScoreMatching(temperature=temperature)
    th.manual_seed(0)
    errors = []
    for n_samples in (4, 64, 1024, 16384):
        squares = []
        for _ in range(64):
            samples = points + sigma * th.randn(n_samples, 3, 2, dtype=th.float64)
            energy = (samples - mean).square().sum(dim=-1) / (2 * variance)
            estimate = score_matching.estimate(energy, (samples - mean) / variance)
            squares.append((estimate - exact).square().mean())
        errors.append(th.stack(squares).mean().sqrt().item())
    # A Monte-Carlo estimator: the error falls like one over the root of the number of samples
    assert errors[0] > 2.5 * errors[1] and errors[1] > 2.5 * errors[2] and errors[2] > 2.5 * errors[3]
    assert errors[3] < 0.03


def test_score_states_are_those_after_or_before_their_step() -> None:
    latents = [th.full((1000, 2), float(i)) for i in range(6)]  # the chain's position as its value
    step, latent = ScoreMatching(pairing="after").draw_states(latents)
    assert set(step.tolist()) == {0, 1, 2, 3, 4}
    # Step 0 is the last one: the state after it is the last of the chain
    th.testing.assert_close(latent[:, 0], 5.0 - step)
    step, latent = ScoreMatching(pairing="before").draw_states(latents)
    th.testing.assert_close(latent[:, 0], 4.0 - step)


def test_only_an_option_sends_gradients_through_the_chain() -> None:
    latents = [th.full((8, 2), float(i), requires_grad=True) for i in range(6)]
    assert not ScoreMatching().draw_states(latents)[1].requires_grad
    assert ScoreMatching(grad_through_chain=True).draw_states(latents)[1].requires_grad


def test_score_samples_spread_around_the_action() -> None:
    action, std = th.full((3, 2), float(np.tanh(0.5))), th.tensor([[0.1], [0.5], [1.0]])
    samples = ScoreMatching(n_samples=4000).draw_samples(action, std)
    assert samples.shape == (4000, 3, 2)
    th.testing.assert_close(samples.mean(dim=0), action, atol=0.1, rtol=0)
    th.testing.assert_close(samples.std(dim=0), std.expand(3, 2), atol=0.05, rtol=0)
    # Not clipped to the box
    assert samples.abs().max() > 1.0
