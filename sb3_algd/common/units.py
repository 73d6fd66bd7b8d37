"""Units of rewards, costs and energy, measured in training, so that one set of defaults serves tasks of any scale."""

import numpy as np
import torch as th
from torch import nn

#: Weight of the newest measurement of the slopes once there are many: a mean over about 200 updates
SLOPE_WEIGHT = 0.005
#: Least slope of value and risk per unit of action, in units of returns
MIN_SLOPE = 1e-3
# A variance below this is no variance
TINY = 1e-16


class ReturnScale:
    """
    Root mean square of the discounted sums of rewards and of each cost, over all steps since the start (as in SB3's
    ``VecNormalize``).

    :param n_envs: Number of environments.
    :param discounts: Discount factor of rewards and of each cost, shape (1 + n_c,).
    """

    def __init__(self, n_envs: int, discounts: np.ndarray) -> None:
        self.discounts = discounts
        self._squares = np.zeros(len(discounts))
        self._count = 0
        self.start_episodes(n_envs)

    def start_episodes(self, n_envs: int) -> None:
        """:param n_envs: Number of environments, all of which were reset."""
        self._running = np.zeros((n_envs, len(self.discounts)))

    def update(self, rewards: np.ndarray, costs: np.ndarray, dones: np.ndarray) -> None:
        """
        Count one step of all environments.

        :param rewards: Shape (n_envs,).
        :param costs: Shape (n_envs, n_c).
        :param dones: Whether the episodes ended with this step, shape (n_envs,).
        """
        self._running = self._running * self.discounts + np.column_stack([rewards, costs])
        self._squares += np.square(self._running).sum(axis=0)
        self._count += len(dones)
        self._running[dones.astype(bool)] = 0.0

    @property
    def value(self) -> np.ndarray:
        """Of rewards and of each cost, shape (1 + n_c,); 1 where all were 0."""
        mean = self._squares / max(self._count, 1)
        return np.where(mean > TINY, np.sqrt(np.maximum(mean, TINY)), 1.0)


class EnergyUnits(nn.Module):
    """
    What the critics' values are divided by: first the returns' scale, in which the critics learn, then the slope of their
    values per unit of action, in which the energy is measured. With both, rewards or costs that are a hundred times larger
    change nothing, a multiplier of 1 means that cost and reward pull alike, and a temperature means the same for every task.

    :param n_constraints: Number of constraints n_c.
    """

    returns: th.Tensor
    moments: th.Tensor
    moment_weight: th.Tensor
    n_measured: th.Tensor
    acts: th.Tensor

    def __init__(self, n_constraints: int) -> None:
        super().__init__()
        #: Scale of returns and of each cost, shape (1 + n_c,)
        self.register_buffer("returns", th.ones(1 + n_constraints))
        #: Running variances over actions in the same state: of the actions, of their value and of each risk, shape (2 + n_c,)
        self.register_buffer("moments", th.ones(2 + n_constraints))
        self.register_buffer("moment_weight", th.ones(()))
        self.register_buffer("n_measured", th.zeros((), dtype=th.int64))
        #: 1 where the constraint acts, 0 before it has started
        self.register_buffer("acts", th.zeros(()))

    def measure(self, actions: th.Tensor, values: th.Tensor, risk: th.Tensor) -> th.Tensor:
        """
        :param actions: Several actions per state, shape (n, batch, action_dim).
        :param values: Their values, shape (n, batch).
        :param risk: Their risks, shape (n, batch, n_c).
        :return: Running variances with these ones among them, shape (2 + n_c,), for :meth:`slopes` and :meth:`keep`.
        """
        variances = [actions.var(dim=0).mean(dim=(0, 1)), values.var(dim=0).mean(), *risk.var(dim=0).mean(dim=0).unbind()]
        return th.lerp(self.moments, th.stack(variances), self.moment_weight)

    @staticmethod
    def slopes(moments: th.Tensor) -> th.Tensor:
        """:param moments: Shape (2 + n_c,). :return: Slopes of value and of each risk per unit of action, shape (1 + n_c,)."""
        # The critics' own noise is no slope: values of 1 per return have steeper ones as soon as there is a reward
        return (moments[1:] / moments[0].clamp_min(TINY)).clamp_min(MIN_SLOPE**2).sqrt()

    @th.no_grad()
    def keep(self, moments: th.Tensor) -> None:
        """:param moments: What :meth:`measure` gave."""
        self.moments.copy_(moments)
        self.n_measured += 1
        # A plain mean at first, so that the start is soon forgotten
        self.moment_weight.copy_((1.0 / (self.n_measured + 1)).clamp_min(SLOPE_WEIGHT))
