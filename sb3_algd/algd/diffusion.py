"""
The reverse (denoising) processes of ALGD behind one interface.

A process turns noise into an action in K steps. It works on an unbounded latent ``x`` of shape (batch, action_dim); the
action is ``tanh(x)``, in SB3's scaled space [-1, 1]. Step indices k run from K-1 (noisiest) down to 0.
Each process only knows its noise schedule: the networks are handed over as functions.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch as th
from torch import nn

# A score shorter than this is not stretched to the guidance's full length
MIN_LENGTH = 1e-12


class Denoiser(Protocol):
    """What a reverse process needs of the actor's network, already bound to a batch of states."""

    def score(self, action: th.Tensor, step: int) -> th.Tensor:
        """Score phi(s, a, k) at the squashed ``action``, times the process's ``score_unit``, shape (batch, action_dim)."""

    def score_and_noise(self, action: th.Tensor, latent: th.Tensor, step: int) -> tuple[th.Tensor, th.Tensor]:
        """Score phi(s, a, k), as above, and predicted noise eps(s, x, k), each of shape (batch, action_dim)."""


class ReverseProcess(nn.Module, ABC):
    """
    Interface of a reverse process.

    :param denoising_steps: Number of steps K.
    """

    #: Whether the process needs the network's second head, which predicts noise
    predicts_noise: bool = False
    #: Standard deviation of the latent that a new chain starts from
    initial_std: float = 1.0
    #: (K,) noise level sigma_k at which the score of step k is learned
    score_std: th.Tensor
    #: (K,) what the network gives is the score times this
    score_unit: th.Tensor

    def __init__(self, denoising_steps: int) -> None:
        super().__init__()
        if denoising_steps < 1:
            raise ValueError(f"denoising_steps must be at least 1, got {denoising_steps}.")
        self.denoising_steps = denoising_steps

    @abstractmethod
    def step(self, denoiser: Denoiser, latent: th.Tensor, step: int, noise: th.Tensor | None) -> th.Tensor:
        """
        One denoising update.

        :param denoiser: The networks, bound to a batch of states.
        :param latent: Latent before the update, shape (batch, action_dim).
        :param step: Index k of the step.
        :param noise: Standard normal noise of the latent's shape, None for none.
        :return: Latent after the update.
        """

    def denoise(
        self,
        denoiser: Denoiser,
        batch_shape: tuple[int, int],
        deterministic: bool = False,
        noise: Sequence[th.Tensor] | None = None,
    ) -> list[th.Tensor]:
        """
        Run the whole chain.

        A deterministic chain starts at 0, adds no noise, and does not touch the random generator.

        :param denoiser: The networks, bound to a batch of states.
        :param batch_shape: (batch, action_dim)
        :param deterministic: Whether to leave out all noise.
        :param noise: Standard normal noise to use, K tensors of shape ``batch_shape``: the first makes the initial latent,
            number k is what step k adds. Drawn if None.
        :return: The K + 1 latents in the order in which they are made: the initial one first, the result last.
        """
        device, dtype = self.score_std.device, self.score_std.dtype
        if deterministic:
            latents = [th.zeros(batch_shape, device=device, dtype=dtype)]
            for k in reversed(range(self.denoising_steps)):
                latents.append(self.step(denoiser, latents[-1], k, None))
            return latents

        # noise[0] is the starting point, noise[k] is what step k adds; the last step (k = 0) adds none
        if noise is None:
            noise = th.randn((self.denoising_steps, *batch_shape), device=device, dtype=dtype).unbind()
        latents = [self.initial_std * noise[0]]
        for k in reversed(range(self.denoising_steps)):
            latents.append(self.step(denoiser, latents[-1], k, noise[k] if k > 0 else None))
        return latents


class VESDE(ReverseProcess):
    """
    Variance-exploding process: annealed Langevin-like steps along the learned score.

    With :math:`\\sigma_k` geometric from ``sigma_min`` (k = 0) to ``sigma_max`` (k = K-1) and
    :math:`D_k = \\sigma_k^2 - \\sigma_{k-1}^2` (:math:`\\sigma_{-1} = 0`), a step is
    :math:`x \\leftarrow x + D_k \\phi(s, \\tanh x, k) + [k > 0] \\sqrt{D_k} \\epsilon`,
    from :math:`x \\sim N(0, \\sigma_{K-1}^2)`.

    :param denoising_steps: Number of steps K.
    :param sigma_min: Lowest noise level.
    :param sigma_max: Highest noise level.
    """

    _ancestral = False

    def __init__(self, denoising_steps: int = 5, sigma_min: float = 0.01, sigma_max: float = 1.0) -> None:
        super().__init__(denoising_steps)
        if not 0.0 < sigma_min <= sigma_max:
            raise ValueError(f"The noise levels must satisfy 0 < sigma_min <= sigma_max, got {sigma_min} and {sigma_max}.")
        sigma = th.logspace(0.0, 1.0, denoising_steps, base=sigma_max / sigma_min, dtype=th.float64) * sigma_min
        if denoising_steps == 1:
            sigma.fill_(sigma_max)
        cleaner = th.cat([th.zeros(1, dtype=th.float64), sigma[:-1]])
        variance_step = sigma.square() - cleaner.square()
        unit, noise_left = (sigma, cleaner / sigma) if self._ancestral else (th.ones_like(sigma), 1.0)
        self.register_buffer("score_std", sigma.float(), persistent=False)
        self.register_buffer("score_unit", unit.float(), persistent=False)
        if self._ancestral:
            self.register_buffer("ancestral", th.tensor(True))
        self.initial_std = sigma_max
        # Plain floats: an operation with a python number costs less than one with a 0-d tensor
        self._drift = (variance_step / unit).tolist()
        self._diffusion = (variance_step.sqrt() * noise_left).tolist()

    def step(self, denoiser: Denoiser, latent: th.Tensor, step: int, noise: th.Tensor | None) -> th.Tensor:
        """See :meth:`ReverseProcess.step`."""
        latent = th.add(latent, denoiser.score(th.tanh(latent), step), alpha=self._drift[step])
        if noise is not None:
            latent = th.add(latent, noise, alpha=self._diffusion[step])
        return latent


class AncestralVESDE(VESDE):
    """
    Ancestral sampling (arXiv 2011.13456, appendix F): a step adds :math:`\\sqrt{D_k} \\sigma_{k-1} / \\sigma_k \\epsilon`,
    the noise that belongs to the level it goes to. And the network gives :math:`\\sigma_k \\phi`, as is usual for scores
    (arXiv 1907.05600): a step's length falls with its noise instead of the square of it, and later steps move as well.
    """

    #: What tells its files from those of :class:`VESDE`
    ancestral: th.Tensor
    _ancestral = True


class DDPM(ReverseProcess):
    """
    Denoising diffusion process with guidance: ancestral sampling with a learned noise predictor, pushed along the score.

    With :math:`\\beta` linear over the steps, :math:`\\alpha = 1 - \\beta`, :math:`\\bar\\alpha` its cumulative product,
    a step predicts :math:`x_0 = (x - \\sqrt{1 - \\bar\\alpha_k} \\epsilon(s, x, k)) / \\sqrt{\\bar\\alpha_k}`, takes
    the mean of the posterior :math:`q(x_{k-1} | x_k, x_0)`, adds ``guidance_scale`` times the normalised score, and
    posterior noise if k > 0.

    :param denoising_steps: Number of steps K.
    :param beta_min: First :math:`\\beta`.
    :param beta_max: Last :math:`\\beta`.
    :param guidance_scale: Length of the push along the score at each step.
    """

    predicts_noise = True

    def __init__(
        self, denoising_steps: int = 5, beta_min: float = 1e-4, beta_max: float = 0.02, guidance_scale: float = 0.05
    ) -> None:
        super().__init__(denoising_steps)
        if not 0.0 < beta_min <= beta_max < 1.0:
            raise ValueError(f"The noise schedule must satisfy 0 < beta_min <= beta_max < 1, got {beta_min} and {beta_max}.")
        beta = th.linspace(beta_min, beta_max, denoising_steps, dtype=th.float64)
        alpha = 1.0 - beta
        alpha_bar = th.cumprod(alpha, dim=0)
        previous = th.cat([th.ones(1, dtype=th.float64), alpha_bar[:-1]])
        self.guidance_scale = guidance_scale
        self.register_buffer("score_std", (1.0 - alpha_bar).sqrt().float(), persistent=False)
        # Only its direction counts
        self.register_buffer("score_unit", th.ones(denoising_steps), persistent=False)
        # The posterior mean is linear in the latent and the predicted noise, with x_0 filled in
        mean_from_clean = beta * previous.sqrt() / (1.0 - alpha_bar)
        self._mean_from_latent = (
            (1.0 - previous) * alpha.sqrt() / (1.0 - alpha_bar) + mean_from_clean * alpha_bar.rsqrt()
        ).tolist()
        self._mean_from_noise = (-mean_from_clean * ((1.0 - alpha_bar) / alpha_bar).sqrt()).tolist()
        self._posterior_std = (beta * (1.0 - previous) / (1.0 - alpha_bar)).sqrt().tolist()

    def step(self, denoiser: Denoiser, latent: th.Tensor, step: int, noise: th.Tensor | None) -> th.Tensor:
        """See :meth:`ReverseProcess.step`."""
        score, predicted_noise = denoiser.score_and_noise(th.tanh(latent), latent, step)
        mean = th.add(self._mean_from_latent[step] * latent, predicted_noise, alpha=self._mean_from_noise[step])
        length = th.linalg.vector_norm(score, dim=-1, keepdim=True).clamp_min(MIN_LENGTH)
        mean = th.addcdiv(mean, score, length, value=self.guidance_scale)
        if noise is not None:
            mean = th.add(mean, noise, alpha=self._posterior_std[step])
        return mean


#: Names that ``policy_kwargs=dict(diffusion=...)`` accepts
PROCESSES: dict[str, type[ReverseProcess]] = {"ve": VESDE, "ve-ancestral": AncestralVESDE, "ddpm": DDPM}


def make_process(name: str, denoising_steps: int, **kwargs: Any) -> ReverseProcess:
    """
    Build a reverse process from its name.

    :param name: A key of :data:`PROCESSES`.
    :param denoising_steps: Number of steps K.
    :param kwargs: Constants of its noise schedule.
    :return: The process.
    :raises ValueError: If the name is unknown.
    """
    if name not in PROCESSES:
        raise ValueError(
            f"Unknown diffusion type {name!r}: use one of {sorted(PROCESSES)} in policy_kwargs=dict(diffusion=...)."
        )
    return PROCESSES[name](denoising_steps, **kwargs)
