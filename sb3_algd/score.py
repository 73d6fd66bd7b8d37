"""
The score target: where and how the gradient of the energy's blurred Boltzmann distribution is estimated.
"""

from typing import Literal

import torch as th

#: ``score_pairing``: state that the score of a step is learned at
ScorePairing = Literal["after", "before"]
#: ``score_space``: variable that the score is a gradient in
ScoreSpace = Literal["action", "latent"]


def draw_score_states(latents: list[th.Tensor], pairing: ScorePairing) -> tuple[th.Tensor, th.Tensor]:
    """
    Draw a denoising step for each state, and pick the latent that its score is learned at.

    :param latents: A chain from its first to its last latent, K + 1 tensors of shape (batch, action_dim).
    :param pairing: ``"after"`` for the latent after the update of the drawn step k (so that k = 0 gives the last one, as the
        paper's code does), ``"before"`` for the one before it, where sampling evaluates the score.
    :return: Steps k, shape (batch,), and latents, shape (batch, action_dim).
    """
    n_steps, batch_size = len(latents) - 1, latents[0].shape[0]
    step = th.randint(n_steps, (batch_size,), device=latents[0].device)
    # The chain runs from step K-1 to 0: latents[K-1-k] is the state before step k, the next one that after it
    index = n_steps - 1 - step + (1 if pairing == "after" else 0)
    return step, th.stack(latents)[index, th.arange(batch_size, device=step.device)]


def draw_score_samples(
    latent: th.Tensor, std: th.Tensor, n_samples: int, space: ScoreSpace, clip: bool
) -> tuple[th.Tensor, th.Tensor]:
    """
    Draw the Monte-Carlo samples of the score target around states of the chain.

    :param latent: States, shape (batch, action_dim).
    :param std: Their noise level, shape (batch, 1).
    :param n_samples: Number of samples N.
    :param space: ``"action"`` blurs the tanh of the latent, ``"latent"`` the latent itself.
    :param clip: Whether sample actions are clipped to [-1, 1].
    :return: Sample actions, shape (N, batch, action_dim), and their slope with respect to the variable that was blurred.
    """
    noise = std * th.randn((n_samples, *latent.shape), device=latent.device)
    if space == "latent":
        samples = th.tanh(latent + noise)
        return samples, 1.0 - samples.square()
    samples = th.tanh(latent) + noise
    if clip:
        samples = samples.clamp(-1.0, 1.0)
    return samples, th.ones_like(samples)


def estimate_score(energy: th.Tensor, energy_grad: th.Tensor, temperature: float) -> th.Tensor:
    """
    Monte-Carlo estimate of the score of the Boltzmann distribution :math:`e^{-L/\\beta}` blurred with Gaussian noise: the
    estimator of iterated denoising energy matching (arXiv 2402.06121), the paper's score target.

    The samples :math:`a_i` are drawn around the point of interest with the noise's standard deviation; then
    :math:`\\phi^* = -\\frac{1}{\\beta} \\sum_i w_i \\nabla L(a_i)` with :math:`w = softmax_i(-L(a_i) / \\beta)`.

    :param energy: Energies of the samples, shape (n_samples, batch).
    :param energy_grad: Their gradients, shape (n_samples, batch, action_dim).
    :param temperature: Temperature :math:`\\beta`.
    :return: Shape (batch, action_dim).
    """
    weights = th.softmax(-energy / temperature, dim=0).unsqueeze(-1)
    return -(weights * energy_grad).sum(dim=0) / temperature
