"""Models that version 0.1.0 has saved: their arguments have other names today."""

import json
import zipfile
from collections import deque
from collections.abc import Iterable
from typing import Any

from stable_baselines3.common.save_util import open_path

from sb3_algd.common.episode_costs import RECENT_EPISODES, EpisodeCostTracker
from sb3_algd.common.guards import warn_user

# Old name: (argument that holds it today, its name there)
_IN_KWARGS = {
    "multiplier_init": ("multiplier_kwargs", "init_value"),
    "multiplier_learning_rate": ("multiplier_kwargs", "learning_rate"),
    "multiplier_max": ("multiplier_kwargs", "max_value"),
    "multiplier_space": ("multiplier_kwargs", "space"),
    "score_temperature": ("score_kwargs", "temperature"),
    "n_score_samples": ("score_kwargs", "n_samples"),
    "score_pairing": ("score_kwargs", "pairing"),
    "score_grad_through_chain": ("score_kwargs", "grad_through_chain"),
}
#: Dictionaries whose entries are given to ``load()`` one by one
MERGED = ("multiplier_kwargs", "score_kwargs")
_GONE = ("cuda_graph", "_cost_reported", "_missing_episode_reported", "policy_lr_schedule")
# Options that no measurement supported, and the values that training has today
_REMOVED_OPTIONS = {"score_space": "action", "clip_score_samples": False}

# What its energy was, and that its constraint acted from the start
_LEARNED_IN = {
    "penalty": "pointwise",
    "normalize": False,
    "constraint_start": 0.0,
    "policy_delay": 1,
    "_constraint_acts": True,
    "_return_scale": None,
}


def refuse_old_arguments(arguments: Iterable[str]) -> None:
    """
    Name what takes the place of arguments of version 0.1.0.

    :param arguments: Names of arguments.
    :raises ValueError: If one of them has another name today.
    """
    today = {old: f"{place}=dict({new}=...)" for old, (place, new) in _IN_KWARGS.items()}
    today["policy_learning_rate"] = "actor_learning_rate"
    # The paper's is in log space, the other one is not
    today["multiplier_space"] = "multiplier_signal"
    for name in arguments:
        if name in today:
            raise ValueError(f"{name} is an argument of version 0.1.0, today it is {today[name]}.")


class DeclaredConstraint:
    """Takes the place of version 0.1.0's class of this name where a saved model holds one."""

    values: dict[str, list[Any]]


def saved_space(path: Any) -> str:
    """
    Tell the space of a multiplier from the readable part of a file; nothing of the file is run.

    :param path: Path of a model's file.
    :return: ``"projected"`` or ``"log"``, which is also what files of today have.
    """
    with zipfile.ZipFile(open_path(path, "r", verbose=0, suffix="zip")) as archive:
        return str(json.loads(archive.read("data")).get("multiplier_space", "log"))


def adopt_saved(attributes: dict[str, Any]) -> None:
    """
    Give the attributes of a loaded model the entries that were given to ``load()``, and their names of today, in place; those
    of a new model stay as they are.

    :param attributes: ``__dict__`` of a model.
    :raises ValueError: If one discount factor was given, which the file does not tell from another.
    """
    given_to_load = attributes.pop("_given_to_load", {})
    merged = [name for name in MERGED if given_to_load.get(name) is not None]
    attributes.update({name: {**(attributes[name] or {}), **given_to_load[name]} for name in merged})
    if "multiplier_init" not in attributes:
        return
    if "cost_gamma" in given_to_load and "cost_limit_gamma" not in given_to_load:
        raise ValueError(
            "`cost_limit_gamma` must be given with `cost_gamma`: this model of version 0.1.0 has one discount factor for "
            "both, and its limit keeps its meaning only with the old one."
        )
    signal = attributes["multiplier_signal"]
    for name in MERGED:
        saved = {new: attributes.pop(old) for old, (place, new) in _IN_KWARGS.items() if place == name}
        given = attributes.get(name) or {}
        if name == "multiplier_kwargs":
            # The file does not say it of the multiplier itself
            attributes["_saved_space"] = saved.pop("space")
            if signal != "buffer":
                # A step of another unit
                saved.pop("learning_rate")
        # What was given to load() comes first
        attributes[name] = {**saved, **given}
    actor_learning_rate = attributes.pop("policy_learning_rate")
    if attributes["actor_learning_rate"] is None:
        attributes["actor_learning_rate"] = actor_learning_rate
    if signal != "buffer":
        attributes["multiplier_signal"] = "episodes"
        # Who only lets it act has nothing to know
        if attributes.get("env") is not None:
            warn_user(
                f"This model's multiplier was updated another way (multiplier_signal={signal!r}): it goes on from its value, "
                "from the costs of episodes."
            )
    learned_in = {**_LEARNED_IN, "cost_limit_gamma": attributes["cost_gamma"]}
    attributes.update({name: value for name, value in learned_in.items() if name not in given_to_load})
    # Layers without parameters, which nothing would miss
    attributes["policy_kwargs"] = {**attributes["policy_kwargs"], "layer_norm": False}
    for name, today in _REMOVED_OPTIONS.items():
        value = attributes.pop(name)
        if value != today:
            warn_user(f"This model was trained with {name}={value!r}, which is no longer there: training goes on without it.")
    for name in _GONE:
        attributes.pop(name, None)
    declared = attributes.get("_declared")
    if isinstance(declared, DeclaredConstraint):
        attributes["_declared"] = declared.values
    tracker = attributes.get("_cost_tracker")
    if isinstance(tracker, EpisodeCostTracker) and not hasattr(tracker, "_recent"):
        tracker._recent = deque(zip(tracker.episode_costs, tracker.discounted_costs, strict=True), maxlen=RECENT_EPISODES)
        tracker.start_episodes(len(tracker._running))
