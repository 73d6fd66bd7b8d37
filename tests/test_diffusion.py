"""The reverse processes, held against closed forms."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch as th

from sb3_algd.algd.diffusion import DDPM, VESDE, AncestralVESDE, ReverseProcess, make_process

N = 200_000

Function = Callable[[th.Tensor, int], th.Tensor]


class AnalyticDenoiser:
    """Stands in for the networks: given functions of the latent (the action is its tanh)."""

    def __init__(self, score: Function, noise: Function | None = None) -> None:
        self._score = score
        self._noise = noise

    def score(self, action: th.Tensor, step: int) -> th.Tensor:
        return self._score(th.atanh(action.double()).float(), step)

    def score_and_noise(self, action: th.Tensor, latent: th.Tensor, step: int) -> tuple[th.Tensor, th.Tensor]:
        assert self._noise is not None
        assert th.equal(action, th.tanh(latent))
        return self._score(latent, step), self._noise(latent, step)


def zero(latent: th.Tensor, step: int) -> th.Tensor:
    return th.zeros_like(latent)


def test_ve_schedule_is_geometric() -> None:
    process = VESDE(5)
    np.testing.assert_allclose(process.score_std, [0.01 * 100.0 ** (k / 4) for k in range(5)], rtol=1e-6)
    np.testing.assert_allclose(VESDE(1).score_std, [1.0])


def test_ddpm_schedule() -> None:
    process = DDPM(5)
    alpha_bar = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 5))
    np.testing.assert_allclose(process.score_std, np.sqrt(1.0 - alpha_bar), rtol=1e-6)


def constant(value: th.Tensor) -> Function:
    return lambda latent, step: value


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_ve_without_score_adds_up_its_variances(steps: int) -> None:
    """The steps k > 0 add sigma_{K-1}^2 - sigma_0^2 to the starting variance sigma_{K-1}^2."""
    process = VESDE(steps)
    th.manual_seed(0)
    latent = process.denoise(AnalyticDenoiser(zero), (N, 1))[-1]
    added = 1.0 - float(process.score_std[0]) ** 2
    assert latent.var().item() == pytest.approx(1.0 + added, rel=0.02)
    assert latent.mean().item() == pytest.approx(0.0, abs=0.02)


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_ancestral_ve_with_the_exact_score_goes_from_level_to_level(steps: int) -> None:
    """With the score -(x - mu) / sigma_k^2 of one blurred action, each step ends at the next level around it."""
    process, mu = AncestralVESDE(steps), 0.4
    sigma = process.score_std.tolist()
    th.manual_seed(0)
    # The network gives sigma_k times the score
    denoiser = AnalyticDenoiser(lambda x, k: -(x - mu) / sigma[k])
    latent = mu + sigma[-1] * th.randn(N, 1)
    for k in reversed(range(steps)):
        latent = process.step(denoiser, latent, k, th.randn(N, 1))
        assert latent.mean().item() == pytest.approx(mu, abs=0.01)
        assert latent.std().item() == pytest.approx(sigma[k - 1] if k > 0 else 0.0, rel=0.02, abs=1e-5)


def test_ve_with_a_linear_score_follows_the_variance_recursion() -> None:
    """For phi = -x / v the process is linear: x' = (1 - D/v) x + sqrt(D) eps."""
    process, variance_scale = VESDE(5), 3.0
    sigma2 = process.score_std.double() ** 2
    expected = float(sigma2[-1])
    for k in reversed(range(5)):
        step = float(sigma2[k] - (sigma2[k - 1] if k > 0 else 0.0))
        expected = (1.0 - step / variance_scale) ** 2 * expected + (step if k > 0 else 0.0)
    th.manual_seed(0)
    latent = process.denoise(AnalyticDenoiser(lambda x, k: -x / variance_scale), (N, 1))[-1]
    assert latent.var().item() == pytest.approx(expected, rel=0.02)


def ddpm_tables(steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    beta = np.linspace(1e-4, 0.02, steps)
    alpha_bar = np.cumprod(1.0 - beta)
    return beta, 1.0 - beta, alpha_bar, np.concatenate([[1.0], alpha_bar[:-1]])


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_ddpm_recovers_a_gaussian(steps: int) -> None:
    """
    With the exact noise predictor of data N(mu, s^2), ancestral sampling from the exact marginal of the last step ends
    near the data's distribution: exactly in the mean, up to the discretisation in the variance.
    """
    mu, std = 0.8, 0.5
    process = DDPM(steps)
    _, _, alpha_bar, _ = ddpm_tables(steps)

    def noise(latent: th.Tensor, k: int) -> th.Tensor:
        marginal = alpha_bar[k] * std**2 + 1.0 - alpha_bar[k]
        return math.sqrt(1.0 - alpha_bar[k]) * (latent - math.sqrt(alpha_bar[k]) * mu) / marginal

    denoiser = AnalyticDenoiser(zero, noise)
    th.manual_seed(0)
    marginal_std = math.sqrt(alpha_bar[-1] * std**2 + 1.0 - alpha_bar[-1])
    latent = math.sqrt(alpha_bar[-1]) * mu + marginal_std * th.randn(N, 1)
    # The variance recursion of the linear chain, in closed form
    variance = marginal_std**2
    for k in reversed(range(steps)):
        latent = process.step(denoiser, latent, k, th.randn(N, 1) if k > 0 else None)
        beta, alpha, bar, before = (table[k] for table in ddpm_tables(steps))
        # x0_hat = E[x0 | x] is linear in x with this slope
        slope = math.sqrt(bar) * std**2 / (bar * std**2 + 1.0 - bar)
        factor = beta * math.sqrt(before) / (1 - bar) * slope + (1 - before) * math.sqrt(alpha) / (1 - bar)
        variance = factor**2 * variance + (beta * (1 - before) / (1 - bar) if k > 0 else 0.0)
    assert latent.mean().item() == pytest.approx(mu, abs=0.01)
    assert latent.var().item() == pytest.approx(variance, rel=0.02)
    # With many small steps the chain's variance is the data's
    if steps == 20:
        assert variance == pytest.approx(std**2, rel=0.1)


def test_ddpm_last_step_returns_the_predicted_clean_latent() -> None:
    process = DDPM(5)
    latent = th.randn(8, 2)
    clean = th.randn(8, 2)
    _, _, alpha_bar, _ = ddpm_tables(5)
    denoiser = AnalyticDenoiser(zero, lambda x, k: (x - math.sqrt(alpha_bar[k]) * clean) / math.sqrt(1 - alpha_bar[k]))
    th.testing.assert_close(process.step(denoiser, latent, 0, None), clean, atol=1e-5, rtol=1e-5)


def test_ddpm_guidance_pushes_by_its_scale_whatever_the_length_of_the_score() -> None:
    direction = th.tensor([3.0, -4.0])
    for length in (1e-3, 1.0, 1e3):
        denoiser = AnalyticDenoiser(constant(length * direction.unsqueeze(0)), zero)
        guided = DDPM(5).step(denoiser, th.zeros(1, 2), 2, None)
        th.testing.assert_close(guided, 0.05 * direction.unsqueeze(0) / 5.0)
    unguided = DDPM(5).step(AnalyticDenoiser(zero, zero), th.zeros(1, 2), 2, None)
    assert th.equal(unguided, th.zeros(1, 2))


@pytest.mark.parametrize("process", [VESDE(5), DDPM(5)], ids=["ve", "ddpm"])
def test_deterministic_chain_starts_at_zero_and_leaves_the_generator_alone(process: ReverseProcess) -> None:
    denoiser = AnalyticDenoiser(lambda x, k: 1.0 - x, lambda x, k: 0.1 * x - 0.2)
    state = th.get_rng_state()
    first = process.denoise(denoiser, (3, 2), deterministic=True)
    second = process.denoise(denoiser, (3, 2), deterministic=True)
    assert th.equal(th.get_rng_state(), state)
    assert th.equal(first[0], th.zeros(3, 2))
    assert all(th.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not th.equal(first[-1], first[0])
    # The same rule as the stochastic chain, without its noise
    latent = th.zeros(3, 2)
    for k in reversed(range(5)):
        latent = process.step(denoiser, latent, k, None)
    assert th.equal(first[-1], latent)


@pytest.mark.parametrize("process", [VESDE(4), DDPM(4)], ids=["ve", "ddpm"])
def test_chain_visits_the_steps_from_noisy_to_clean(process: ReverseProcess) -> None:
    visited: list[int] = []

    def record(latent: th.Tensor, step: int) -> th.Tensor:
        visited.append(step)
        return th.zeros_like(latent)

    latents = process.denoise(AnalyticDenoiser(record, zero), (2, 3))
    assert visited == [3, 2, 1, 0]
    assert len(latents) == 5 and all(latent.shape == (2, 3) for latent in latents)


def test_make_process() -> None:
    assert isinstance(make_process("ve", 3), VESDE) and isinstance(make_process("ddpm", 3), DDPM)
    assert make_process("ve", 3, sigma_max=2.0).initial_std == 2.0
    with pytest.raises(ValueError, match=r"Unknown diffusion type 'flow'.*ddpm.*ve"):
        make_process("flow", 3)


@pytest.mark.parametrize(
    "name, steps, kwargs",
    [("ve", 0, {}), ("ve", 5, dict(sigma_min=0.0)), ("ve", 5, dict(sigma_min=2.0)), ("ddpm", 5, dict(beta_max=1.0))],
)
def test_nonsense_schedules_are_refused(name: str, steps: int, kwargs: dict) -> None:
    with pytest.raises(ValueError, match="must"):
        make_process(name, steps, **kwargs)
