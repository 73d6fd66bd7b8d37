"""When and how an update is compiled: one path for CPUs and GPUs, with the eager update as its readable reference."""

import functools
import shutil
import types
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar

import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import PyTorchObs, TrainFreq, TrainFrequencyUnit
from torch.utils._pytree import tree_leaves

from sb3_algd.common.buffers import CostReplayBufferSamples
from sb3_algd.common.cost_aware_algorithm import CostAwareAlgorithm

Result = TypeVar("Result")

#: Updates from which on compiling pays for itself, in bfloat16 and in single precision: it takes 20 to 60 seconds, and saves
#: 10 to 20 ms per update in bfloat16, half of that otherwise
WORTHWHILE_UPDATES, WORTHWHILE_IN_FLOAT32 = 5_000, 10_000
#: Shapes that one function is compiled for; others are computed eagerly
MAX_SHAPES = 2


def reason_against(device: th.device) -> str | None:
    """
    :param device: Device of the model.
    :return: Why nothing can be compiled here, None if it can.
    """
    if device.type == "cpu":
        from torch._inductor import config

        candidates = [name for name in config.cpp.cxx if name]
        if not any(shutil.which(name) for name in candidates):
            return f"there is no C++ compiler ({' or '.join(candidates)})"
    elif device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return "Triton is missing"
    else:
        return f"the device is {device.type}"
    return None


@functools.cache
def has_fast_bfloat16(device: th.device) -> bool:
    """
    :param device: Device of the model.
    :return: Whether it has units for matrix products in bfloat16: AMX or AVX512-BF16, or tensor cores of that kind
    """
    if device.type == "cuda":
        return th.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (th.cpu._is_amx_tile_supported() or th.cpu._is_avx512_bf16_supported())


class CompiledMethod(Generic[Result]):
    """
    A method that is compiled at its first call with arguments of each shape.

    Random numbers are those of the eager method.

    :param method: A bound method that looks at no value of a tensor.
    :param device: Device of its tensors.
    :param tell: Called with what a user may want to know, and the verbosity level that it takes.
    """

    def __init__(self, method: Callable[..., Result], device: th.device, tell: Callable[[str, int], None]) -> None:
        self.device = device
        self._eager = method
        self._tell = tell
        self._shapes: set[Any] = set()
        # With a code object of its own: PyTorch limits how often one is compiled, for all models of the process together
        bound: Any = method
        function = bound.__func__
        copy = types.FunctionType(
            function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__
        )
        options: dict[str, Any] = {"fallback_random": True}
        if device.type == "cuda":
            options["triton.cudagraphs"] = True
        self._compiled: Callable[..., Result] = th.compile(
            types.MethodType(copy, bound.__self__), fullgraph=True, dynamic=False, options=options
        )

    def __call__(self, *args: Any) -> Result:
        """
        :param args: Of the method.
        :return: What the method returns.
        :raises torch._dynamo.exc.TorchDynamoException: If it cannot be compiled
        """
        shapes = tuple(leaf.shape for leaf in tree_leaves(args) if isinstance(leaf, th.Tensor))
        if shapes not in self._shapes:
            if len(self._shapes) == MAX_SHAPES:
                return self._eager(*args)
            if self._shapes:
                self._tell(f"Compiling {self._eager.__name__.strip('_')} again, for a batch of another shape", 2)
            self._shapes.add(shapes)
        return self._compiled(*args)


class CompilingAlgorithm(CostAwareAlgorithm, ABC):
    """
    An algorithm whose losses are compiled where that pays.

    :param args: see :class:`~sb3_algd.ALGD`, as all that follow
    :param reduced_precision: see there
    :param compile: see there
    :param kwargs: see there
    """

    def __init__(
        self, *args: Any, reduced_precision: bool | Literal["auto"], compile: bool | Literal["auto"], **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.reduced_precision = reduced_precision
        self.compile = compile
        #: What ``"auto"`` has decided at the start of training, the same in a training that is resumed
        self._compiles: bool | None = None
        #: Compiled forms of methods, by their names
        self._compiled: dict[str, CompiledMethod[Any]] = {}

    @abstractmethod
    def _critic_losses(self, batch: CostReplayBufferSamples) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        Losses of reward and cost critics against their bootstrapped targets.

        :param batch: Transitions
        :return: The two losses, and the risk of the stored actions, detached, shape (n_constraints,)
        """

    @abstractmethod
    def _actor_loss(self, observations: PyTorchObs) -> tuple[th.Tensor, dict[str, th.Tensor], th.Tensor, th.Tensor]:
        """
        The loss that the actor is trained with.

        :param observations: States
        :return: The loss; scalars to be logged, detached; the risk of the policy's actions, shape (n_constraints,); what the
            units of the energy follow from, see :class:`~sb3_algd.common.units.EnergyUnits`
        """

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        arguments = super()._setup_learn(*args, **kwargs)
        if self.compile != "auto":
            self._compiles = None
        elif self._compiles is None or self.num_timesteps == 0:
            self._compiles = self._pays_to_compile(arguments[0])
        if self._compiles if self.compile == "auto" else self.compile:
            self._compile_losses()
        else:
            self._compiled = {}
        return arguments

    def _compile_losses(self) -> None:
        reason = reason_against(self.device)
        if reason is not None:
            if self.compile is True:
                raise RuntimeError(f"compile=True, but {reason}: install what is missing, or use compile='auto'.")
            self._go_on_eagerly(reason)
            return
        for method in (self._critic_losses, self._actor_loss):
            present = self._compiled.get(method.__name__)
            if present is None or present.device != self.device:
                self._compiled[method.__name__] = CompiledMethod(method, self.device, self._tell)

    def _go_on_eagerly(self, reason: str) -> None:
        self._tell(f"Updates are not compiled: {reason}", 1)
        # For good, or a resumed training would try again, and differ by rounding
        self._compiles = False
        self._compiled = {}

    def _pays_to_compile(self, total_timesteps: int) -> bool:
        """Whether a training of this length is faster with the time that compiling takes."""
        assert isinstance(self.train_freq, TrainFreq)
        per_rollout = self.train_freq.frequency
        if self.train_freq.unit == TrainFrequencyUnit.EPISODE:
            per_rollout *= self.episode_length
        updates = total_timesteps - self.learning_starts
        if self.gradient_steps >= 0:
            updates = updates // (per_rollout * self.n_envs) * self.gradient_steps
        in_bfloat16 = self.reduced_precision and has_fast_bfloat16(self.device)
        if updates < (WORTHWHILE_UPDATES if in_bfloat16 else WORTHWHILE_IN_FLOAT32):
            self._tell(f"Updates are not compiled: {max(updates, 0)} of them take less time than compiling", 1)
            return False
        return True

    @property
    def uses_bfloat16(self) -> bool:
        """Whether the matrix products of updates are done in bfloat16: if asked to, or where that is faster (``"auto"``)."""
        if self.reduced_precision == "auto":
            # Eager updates are those of short trainings, and the reference: bfloat16 saves a quarter there
            return bool(self._compiled) and has_fast_bfloat16(self.device)
        return self.reduced_precision

    def _call(self, name: str, *args: Any) -> Any:
        """
        :param name: Name of a method.
        :param args: Its arguments.
        :return: What it returns, computed in its compiled form where there is one
        :raises RuntimeError: If compilation is required and fails
        """
        method: Callable[..., Any] = getattr(self, name)
        compiled = self._compiled.get(name)
        if compiled is None:
            return method(*args)
        # Takes seconds to import
        from torch._dynamo.exc import TorchDynamoException

        try:
            return compiled(*args)
        except TorchDynamoException as error:
            what = f"{name.strip('_')} cannot be compiled ({type(error).__name__}: {str(error).strip().splitlines()[0]})"
            if self.compile is True:
                raise RuntimeError(f"{what}: use compile=False, or 'auto' to go on without.") from error
            self._go_on_eagerly(what)
            return method(*args)

    def _tell(self, message: str, level: int) -> None:
        if self.verbose >= level:
            print(message)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_compiled"]
