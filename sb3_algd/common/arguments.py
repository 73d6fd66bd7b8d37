"""
What the arguments of the algorithms may be: one table, one check, and one form of message. An algorithm with further arguments
extends ``argument_rules``.
"""

import difflib
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import TrainFrequencyUnit

from sb3_algd.common.buffers import CostNStepReplayBuffer, cost_buffer_class
from sb3_algd.common.legacy import MERGED, refuse_old_arguments

SelfChecked = TypeVar("SelfChecked", bound="CheckedAlgorithm")
#: Above this a number of steps or samples is a mistake
MANY = 10**9
MAX_SCORE_SAMPLES = 1000
#: Where a schedule is looked at. One that falls to 0 at a rounder number may be a rounding error below 0 there
_PROGRESS = [remaining / 7 for remaining in range(7, -1, -1)]


class Rule(NamedTuple):
    """
    What an argument may be.

    :param must_be: What it must be, for the message
    :param holds: Whether a value is that
    """

    must_be: str
    holds: Callable[[Any], bool]


# --- kinds of values -------------------------------------------------------------------------------------------------


def is_number(value: Any) -> bool:
    """:param value: Anything. :return: Whether it is a finite number, and no truth value."""
    if not isinstance(value, numbers.Real) or isinstance(value, (bool, np.bool_)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        # A whole number may be larger than any that can be calculated with
        return False


def number(low: float, high: float = math.inf, above: bool = False) -> Rule:
    """:param low: Lowest value. :param high: Highest value. :param above: Whether ``low`` is excluded. :return: Rule."""
    if high == math.inf:
        text = f"a finite number {'>' if above else '>='} {low:g}"
    else:
        text = f"a number in {'(' if above else '['}{low:g}, {high:g}]"
    return Rule(text, lambda value: is_number(value) and (low < value if above else low <= value) and value <= high)


def whole(low: int, high: int = MANY) -> Rule:
    """:param low: Lowest value. :param high: Highest value. :return: Rule of a whole number."""
    is_whole = lambda value: isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_))  # noqa: E731
    return Rule(f"a whole number from {low} to {high}", lambda value: is_whole(value) and low <= int(value) <= high)


def one_of(*choices: str) -> Rule:
    """:param choices: Texts. :return: Rule."""
    listed = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
    return Rule(listed, lambda value: isinstance(value, str) and value in choices)


def optional(rule: Rule) -> Rule:
    """:param rule: A rule. :return: The same, or None."""
    return Rule(f"{rule.must_be}, or None", lambda value: value is None or rule.holds(value))


def either(rule: Rule, *others: Rule) -> Rule:
    """:param rule: A rule. :param others: More of them. :return: Rule that one of them holds."""
    rules = (rule, *others)
    return Rule(" or ".join(each.must_be for each in rules), lambda value: any(each.holds(value) for each in rules))


def of_class(text: str, *classes: type) -> Rule:
    """:param text: What it must be. :param classes: One of them. :return: Rule."""
    return Rule(text, lambda value: isinstance(value, classes))


def keywords(**rules: Rule) -> Rule:
    """:param rules: Rules of the entries, all of which may be missing. :return: Rule of a dictionary, or None."""
    entries = "; ".join(f"{name!r}: {rule.must_be}" for name, rule in rules.items())

    def holds(value: Any) -> bool:
        return value is None or (
            isinstance(value, Mapping) and all(name in rules and rules[name].holds(item) for name, item in value.items())
        )

    return Rule(f"None or a dictionary that may have the entries {entries}", holds)


def _is_per_constraint(value: Any) -> bool:
    if isinstance(value, (list, tuple, np.ndarray)):
        return len(value) > 0 and all(is_number(item) and item >= 0 for item in value)
    return is_number(value) and value >= 0


def _is_schedule(value: Any) -> bool:
    try:
        rates = [value(progress) for progress in _PROGRESS] if callable(value) else [value]
    except (TypeError, ValueError, ArithmeticError, LookupError):
        return False
    return all(is_number(rate) and rate >= 0 for rate in rates)


def _is_train_freq(value: Any) -> bool:
    if isinstance(value, tuple):
        return (
            len(value) == 2
            and whole(1).holds(value[0])
            and isinstance(value[1], (str, TrainFrequencyUnit))
            and value[1] in ("step", "episode", *TrainFrequencyUnit)
        )
    return whole(1).holds(value)


def _is_net_arch(value: Any) -> bool:
    if isinstance(value, dict):
        return set(value) == {"pi", "qf"} and all(not isinstance(each, dict) and _is_net_arch(each) for each in value.values())
    return isinstance(value, (list, tuple)) and all(whole(1, 10**6).holds(width) for width in value)


def _is_ent_coef(value: Any) -> bool:
    if not isinstance(value, str):
        return is_number(value) and value >= 0
    try:
        start = 1.0 if value == "auto" else float(value.removeprefix("auto_"))
        return 0 <= start < math.inf and (start > 0 or not value.startswith("auto"))
    except ValueError:
        return False


FLAG = Rule("True or False", lambda value: isinstance(value, (bool, np.bool_)))
TRUE_FALSE_AUTO = Rule(
    "True, False or 'auto'", lambda value: FLAG.holds(value) or (isinstance(value, str) and value == "auto")
)
PER_CONSTRAINT = Rule("a finite number >= 0, or a flat sequence with one per constraint", _is_per_constraint)
SCHEDULE = Rule("a finite number >= 0, or a function that returns one for every remaining progress from 1 to 0", _is_schedule)
COST_KEY = Rule("a key of info, or a function of info", lambda value: isinstance(value, str) or callable(value))
TRAIN_FREQ = Rule("a whole number >= 1, or a tuple of one and 'step' or 'episode'", _is_train_freq)
BUFFER_CLASS = Rule("a subclass of ReplayBuffer", lambda value: isinstance(value, type) and issubclass(value, ReplayBuffer))
ANY_KEYWORDS = of_class("a dictionary", dict)
FACTORY = Rule("a class (or a function that makes one), not a text", callable)

# --- the table -------------------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, Rule] = {
    # Stable-Baselines3's
    "learning_rate": SCHEDULE,
    "buffer_size": whole(1),
    "learning_starts": whole(0),
    "batch_size": whole(1, 10**6),
    "tau": number(0, 1),
    "gamma": number(0, 1),
    "train_freq": TRAIN_FREQ,
    "gradient_steps": whole(-1, 10**6),
    "action_noise": optional(of_class("an ActionNoise", ActionNoise)),
    "replay_buffer_class": optional(BUFFER_CLASS),
    "replay_buffer_kwargs": optional(ANY_KEYWORDS),
    "optimize_memory_usage": FLAG,
    "n_steps": whole(1, 10**4),
    "stats_window_size": whole(1),
    "policy_kwargs": optional(ANY_KEYWORDS),
    "verbose": either(whole(0), FLAG),
    "seed": optional(whole(0, 2**32 - 1)),
    # The constraint
    "cost_limit": optional(PER_CONSTRAINT),
    "cost_limit_discounted": optional(FLAG),
    "cost_limit_gamma": number(0, 1, above=True),
    "episode_length": optional(whole(1)),
    "cost_gamma": number(0, 1, above=True),
    "cost_key": COST_KEY,
    "use_policy_at_warmup": FLAG,
    # The update
    "target_update_interval": whole(1),
    "penalty": one_of("expectation", "pointwise"),
    "rho": PER_CONSTRAINT,
    "constraint_start": number(0, 1),
    "normalize": FLAG,
    "multiplier_kwargs": keywords(
        init_value=PER_CONSTRAINT, learning_rate=SCHEDULE, max_value=number(0, above=True), confidence=number(0)
    ),
    "multiplier_signal": one_of("episodes", "buffer"),
    "cost_risk_coef": number(0),
    "cost_target_risk_coef": number(0),
    "bound_cost_targets": FLAG,
    "actor_learning_rate": optional(SCHEDULE),
    "cost_critic_learning_rate": optional(SCHEDULE),
    "policy_delay": whole(1),
    "reduced_precision": TRUE_FALSE_AUTO,
    "compile": TRUE_FALSE_AUTO,
    # ALGD
    "guidance_coef": number(0),
    "score_coef": number(0),
    "score_kwargs": keywords(
        temperature=number(0, above=True),
        n_samples=whole(1, MAX_SCORE_SAMPLES),
        pairing=one_of("after", "before"),
        grad_through_chain=FLAG,
    ),
    # SAC-Lagrangian
    "ent_coef": Rule("a finite number >= 0, 'auto' or 'auto_<number > 0>'", _is_ent_coef),
    "target_entropy": Rule(
        "a finite number or 'auto'", lambda value: is_number(value) or (isinstance(value, str) and value == "auto")
    ),
}

#: Entries of ``policy_kwargs``. What a policy class of the user has besides is its own affair
POLICY_ARGUMENTS: dict[str, Rule] = {
    "net_arch": optional(Rule("a list of widths, or a dictionary of 'pi' and 'qf' with one each", _is_net_arch)),
    "activation_fn": FACTORY,
    "cost_activation_fn": FACTORY,
    "n_critics": whole(1, 1000),
    "n_cost_critics": whole(1, 1000),
    "n_candidates": whole(1, 10**6),
    "layer_norm": FLAG,
    "features_extractor_class": FACTORY,
    "features_extractor_kwargs": optional(ANY_KEYWORDS),
    "normalize_images": FLAG,
    "optimizer_class": FACTORY,
    "optimizer_kwargs": optional(ANY_KEYWORDS),
    "share_features_extractor": FLAG,
    # ALGD
    "diffusion": one_of("ve", "ve-ancestral", "ddpm"),
    "denoising_steps": whole(1, 10**4),
    "diffusion_kwargs": optional(ANY_KEYWORDS),
}


def check_arguments(values: Mapping[str, Any], rules: Mapping[str, Rule] = ARGUMENTS) -> None:
    """
    Refuse arguments that cannot work.

    :param values: Arguments by name; those without a rule are left alone
    :param rules: What each may be
    :raises ValueError: If one may not be what it is
    """
    for name, value in values.items():
        if name in rules and not rules[name].holds(value):
            raise ValueError(f"`{name}` must be {rules[name].must_be}, got {value!r}.")


def constructor_arguments(cls: type) -> list[str]:
    """:param cls: A class. :return: Names of all arguments of its constructor, those that it hands on among them."""
    names: list[str] = []
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        named = [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
        names += [name for name in named[1:] if name not in names]
        if not any(each.kind == each.VAR_KEYWORD for each in parameters):
            break
    return names


def check_entries(argument: str, entries: Iterable[str], cls: type) -> None:
    """
    Refuse entries that one of our classes does not take. Those of others may take what their constructors do not name.

    :param argument: The argument, a dictionary
    :param entries: Its entries
    :param cls: Class that gets them
    :raises TypeError: If there is no such entry
    """
    known = constructor_arguments(cls)
    for entry in entries:
        if entry not in known and cls.__module__.partition(".")[0] == __name__.partition(".")[0]:
            listed = ", ".join(known)
            raise TypeError(f"`{argument}` must have entries that {cls.__name__} takes ({listed}), got {entry!r}.")


class CheckedAlgorithm(OffPolicyAlgorithm):
    """
    An off-policy algorithm that refuses arguments which cannot work, before anything is built.

    :param args: Arguments of SB3's ``OffPolicyAlgorithm``
    :param kwargs: Keyword arguments of SB3's ``OffPolicyAlgorithm``
    """

    #: What each argument may be
    argument_rules: ClassVar[Mapping[str, Rule]] = ARGUMENTS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # SB3 reads some of its own here
        check_arguments(kwargs, self.argument_rules)
        super().__init__(*args, **kwargs)

    def _check_arguments(self) -> None:
        """Refuse arguments that cannot work. They are attributes now, some of which may have been given to ``load()``."""
        names = constructor_arguments(type(self))
        check_arguments({name: getattr(self, name) for name in names if hasattr(self, name)}, self.argument_rules)
        buffer_class = (
            CostNStepReplayBuffer if self.replay_buffer_class is None else cost_buffer_class(self.replay_buffer_class)
        )
        check_entries("replay_buffer_kwargs", self.replay_buffer_kwargs, buffer_class)
        # The algorithm says itself why it has no gSDE
        check_entries("policy_kwargs", [name for name in self.policy_kwargs if name != "use_sde"], self.policy_class)
        for name, value in self.policy_kwargs.items():
            if name in POLICY_ARGUMENTS and not POLICY_ARGUMENTS[name].holds(value):
                must_be = POLICY_ARGUMENTS[name].must_be
                raise ValueError(f"`policy_kwargs` must have {must_be} as {name!r}, got {value!r}.")

    @classmethod
    def load(cls: type[SelfChecked], path: Any, *args: Any, **kwargs: Any) -> SelfChecked:
        """
        Load a model from a zip file, see SB3. Arguments of the constructor that are given here replace those that were saved.
        Of ``multiplier_kwargs`` and ``score_kwargs`` the entries that are given do, the others stay; None resets all of them.

        Like SB3's, this runs code that the file contains: load only files that you trust, and use :meth:`set_parameters` on a
        new model for all others.

        :param path: Path of the file, or the file
        :param args: See SB3: ``env``, ``device``, ``custom_objects``, ``print_system_info``, ``force_reset``
        :param kwargs: The same by name, and arguments of the constructor
        :return: The model
        :raises TypeError: If there is no such argument
        :raises ValueError: If an argument cannot work, or does not go with what was saved
        """
        refuse_old_arguments(kwargs)
        known = [name for name in constructor_arguments(cls) if name not in ("policy", "_init_setup_model")]
        known += ["custom_objects", "print_system_info", "force_reset"]
        for name in kwargs:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                meant = f", did you mean {close[0]!r}?" if close else f" (there are {', '.join(known)})."
                raise TypeError(f"{cls.__name__}.load() has no argument {name!r}{meant}")
        # SB3 builds the networks last
        check_arguments(kwargs, cls.argument_rules)
        if "init_value" in (kwargs.get("multiplier_kwargs") or {}):
            raise ValueError(
                "`multiplier_kwargs` must have no 'init_value' in load(), where the multiplier goes on from its saved value, "
                f"got {kwargs['multiplier_kwargs']!r}. Leave it out, or train a new model, which starts from it."
            )
        # SB3 would replace the saved ones as a whole
        replacing = {name: value for name, value in kwargs.items() if name not in MERGED or value is None}
        try:
            # What was given comes before what is made of an old file
            return super().load(path, *args, _given_to_load=kwargs, **replacing)
        except KeyError as error:
            # SB3 takes any ValueError of the parameters for one of old versions, and fails with this one
            if isinstance(error.__context__, ValueError):
                raise error.__context__ from None
            raise
