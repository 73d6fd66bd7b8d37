"""The score target: where and how the gradient of the energy's blurred Boltzmann distribution is estimated."""

from dataclasses import dataclass
from typing import Literal

import torch as th


@dataclass(frozen=True)
class ScoreMatching:
    """
    How the score network is trained; the arguments that ``score_kwargs`` may have (see :mod:`sb3_algd.common.arguments`).

    :param temperature: Temperature :math:`\\beta` of the energy
    :param n_samples: Number N of Monte-Carlo samples of the score target
    :param pairing: State that step k's score is learned at: the one ``"after"`` the step's update (the paper's code)
        or the one ``"before"`` it, where sampling evaluates the score
    :param grad_through_chain: Whether the score loss also sends gradients back through the denoising chain (the paper's does)
    """

    temperature: float = 3.0
    n_samples: int = 4
    pairing: Literal["after", "before"] = "after"
    grad_through_chain: bool = False

    def draw_states(self, latents: list[th.Tensor]) -> tuple[th.Tensor, th.Tensor]:
        """
        Draw a denoising step for each state, and pick the latent that its score is learned at.

        :param latents: A chain from its first to its last latent, K + 1 tensors of shape (batch, action_dim).
        :return: Steps k, shape (batch,), and latents, shape (batch, action_dim).
        """
        n_steps, batch_size = len(latents) - 1, latents[0].shape[0]
        step = th.randint(n_steps, (batch_size,), device=latents[0].device)
        # The chain runs from step K-1 to 0: latents[K-1-k] is the state before step k, the next one that after it
        index = n_steps - 1 - step + (1 if self.pairing == "after" else 0)
        latent = th.stack(latents)[index, th.arange(batch_size, device=step.device)]
        return step, latent if self.grad_through_chain else latent.detach()

    def draw_samples(self, action: th.Tensor, std: th.Tensor) -> th.Tensor:
        """
        Draw the Monte-Carlo samples of the score target around actions of the chain.

        :param action: Squashed latents of the chain, shape (batch, action_dim).
        :param std: Noise level of their steps, shape (batch, 1).
        :return: Sample actions, shape (N, batch, action_dim), not clipped to [-1, 1].
        """
        return action + std * th.randn((self.n_samples, *action.shape), device=action.device)

    def estimate(self, energy: th.Tensor, energy_grad: th.Tensor) -> th.Tensor:
        """
        Monte-Carlo estimate of the score of the Boltzmann distribution :math:`e^{-L/\\beta}` blurred with Gaussian noise: the
        estimator of iterated denoising energy matching (arXiv 2402.06121), the paper's score target.

        With samples :math:`a_i` around the point of interest,
        :math:`\\phi^* = -\\frac{1}{\\beta} \\sum_i w_i \\nabla L(a_i)` with :math:`w = softmax_i(-L(a_i) / \\beta)`.

        :param energy: Energies of the samples, shape (N, batch).
        :param energy_grad: Their gradients, shape (N, batch, action_dim).
        :return: Shape (batch, action_dim).
        """
        weights = th.softmax(-energy / self.temperature, dim=0).unsqueeze(-1)
        return -(weights * energy_grad).sum(dim=0) / self.temperature
