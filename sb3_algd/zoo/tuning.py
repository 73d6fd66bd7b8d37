"""Tuning under the constraint: what a trial tells Optuna, and the report of a study."""

import csv
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState
from stable_baselines3.common.vec_env import VecEnv

from sb3_algd.common.callbacks import CostEvalCallback, relative_excess
from sb3_algd.common.verdict import constraint_verdict
from sb3_algd.zoo.hyperparams import convert_params, merge_arguments

#: Below every return that an environment could give
WORSE_THAN_ANY_RETURN = -1e12
#: Excess over the limit of a trial that broke off, more than any that was measured
BROKEN_OFF = 1e9


def pruning_value(mean_return: float, violation: float) -> float:
    """
    What pruners compare: every safe evaluation is worth more than every unsafe one, whatever its return.

    :param mean_return: Mean return of an evaluation
    :param violation: By how much it exceeds its limits, 0 if it is within them
    :return: The return of a safe evaluation; the more negative the further an unsafe one is outside
    """
    return mean_return if violation <= 0 else WORSE_THAN_ANY_RETURN * (1 + violation)


class TrialCostEvalCallback(CostEvalCallback):
    """
    Evaluates a trial's policy, reports to the pruner, and at the end states the constraint.

    Takes the place of ``rl_zoo3.callbacks.TrialEvalCallback``.

    :param eval_env: The environment used for evaluation
    :param trial: Optuna's trial
    :param verbose: Verbosity level
    :param kwargs: Keyword arguments of ``EvalCallback``
    """

    def __init__(self, eval_env: VecEnv, trial: optuna.Trial, verbose: int = 0, **kwargs: Any) -> None:
        super().__init__(eval_env, verbose=verbose, **kwargs)
        self.trial = trial
        self.eval_idx = 0
        self.is_pruned = False
        #: Mean costs of the last evaluation, one per constraint, and by which share they exceed the limits
        self.last_mean_costs: np.ndarray | None = None
        self.last_excess = np.zeros(0)

    def _on_step(self) -> bool:
        continue_training = super()._on_step()
        if self.eval_freq > 0 and self.n_calls % self.eval_freq == 0:
            self.eval_idx += 1
            self.last_mean_costs = np.mean(self._counter.episode_costs, axis=0)
            # As shares, because Optuna adds them up
            self.last_excess = relative_excess(self.last_mean_costs, np.asarray(self.model.cost_limit))
            violation = float(np.sum(np.maximum(self.last_excess, 0.0)))
            self.trial.report(pruning_value(self.last_mean_reward, violation), self.eval_idx)
            if self.trial.should_prune():
                self.is_pruned = True
                return False
        return continue_training

    def _on_training_end(self) -> None:
        # Once per trial, as Optuna wants it, and for pruned trials too
        if self.last_mean_costs is None:
            return
        for i, excess in enumerate(self.last_excess):
            self.trial.set_constraint("cost" if len(self.last_excess) == 1 else f"cost_{i}", float(excess))
        self.trial.set_user_attr("return", float(self.last_mean_reward))
        self.trial.set_user_attr("cost", self.last_mean_costs.tolist())
        limits = np.asarray(self.model.cost_limit)
        self.trial.set_user_attr("cost_limit", limits.tolist())
        self.trial.set_user_attr("verdict", ", ".join(constraint_verdict(np.stack(self._counter.episode_costs), limits).each))


def is_feasible(trial: FrozenTrial) -> bool:
    """:param trial: A trial. :return: Whether it was evaluated and kept every limit."""
    return len(trial.constraints) > 0 and all(excess <= 0 for excess in trial.constraints.values())


def best_feasible_trial(study: optuna.Study) -> FrozenTrial | None:
    """:param study: A study. :return: The complete trial with the highest return within the limits, None if there is none."""
    feasible = [trial for trial in study.get_trials(states=[TrialState.COMPLETE]) if is_feasible(trial)]
    return max(feasible, key=lambda trial: trial.value or 0.0, default=None)


def as_options(params: dict[str, Any], given: dict[str, Any]) -> str:
    """
    :param params: Sampled parameters
    :param given: Arguments that the search was given
    :return: Both as options of the Zoo's ``train``, the sampled ones to four digits.
    """
    rounded = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in params.items()}
    arguments = merge_arguments(given, convert_params(rounded))
    words = [f"{name}:{_literal(value)}" for name, value in sorted(arguments.items())]
    # There is nothing in them that a shell would see inside double quotes
    return "-params " + " ".join(word if shlex.quote(word) == word else f'"{word}"' for word in words)


def _literal(value: Any) -> str:
    if isinstance(value, dict):
        return f"dict({', '.join(f'{name}={_literal(item)}' for name, item in value.items())})"
    # An activation function, which the Zoo reads as nn.ReLU
    return f"nn.{value.__name__}" if isinstance(value, type) else repr(value)


def write_report(study: optuna.Study, path: Path, title: str, given: dict[str, Any] | None = None) -> FrozenTrial | None:
    """
    Write what each trial was and reached, as ``<path>.csv`` and for reading as ``<path>.md``.

    :param study: The study, also one without any feasible trial
    :param path: Where to, without the ending
    :param title: First line of the report
    :param given: Arguments that the search was given, which the best trial's options repeat
    :return: The best feasible trial, if there is one
    """
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    best = best_feasible_trial(study)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_csv(trials, path.with_name(f"{path.name}.csv"))
    _replace(path.with_name(f"{path.name}.md"), lambda file: file.write(_describe(trials, best, title, given or {})))
    return best


def _describe(trials: list[FrozenTrial], best: FrozenTrial | None, title: str, given: dict[str, Any]) -> str:
    limits = next((trial.user_attrs["cost_limit"] for trial in trials if "cost_limit" in trial.user_attrs), None)
    counts = ", ".join(
        f"{sum(trial.state == state for trial in trials)} {state.name.lower()}"
        for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    )
    n_feasible = sum(map(is_feasible, trials))
    lines = [f"# {title}", "", f"Cost limit {_number(limits)}. {len(trials)} trials: {counts}; {n_feasible} within the limit."]
    unsafe = [trial for trial in trials if "return" in trial.user_attrs and not is_feasible(trial)]
    if best is not None:
        lines += ["", f"Best trial: **{best.number}**, return {_number(best.value)}, cost {_number(best.user_attrs['cost'])}."]
        better = [trial for trial in unsafe if trial.user_attrs["return"] > best.user_attrs["return"]]
        if better:
            numbers = ", ".join(str(trial.number) for trial in better)
            lines += [f"Its return was exceeded outside the limit only, by {len(better)} trial(s): {numbers}."]
        lines += ["", "Options of `train` with its parameters:", "", "```bash", as_options(best.params, given), "```"]
    else:
        lines += ["", "**No complete trial kept the limit.**"]
        if unsafe:
            closest = min(unsafe, key=lambda trial: sum(max(excess, 0.0) for excess in trial.constraints.values()))
            lines[-1] += (
                f" Closest came trial {closest.number}: return {_number(closest.user_attrs['return'])}, "
                f"cost {_number(closest.user_attrs['cost'])}."
            )
        lines += ["Train longer (`-n`), or run more trials."]
    lines += ["", "Return and cost are means of the last evaluation.", ""]
    lines += ["| trial | state | return | cost | within the limit | with 95 % confidence |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]

    def rank(trial: FrozenTrial) -> tuple[bool, bool, float]:
        complete = trial.state == TrialState.COMPLETE
        return (not is_feasible(trial), not complete, -trial.user_attrs.get("return", -np.inf))

    for trial in sorted(trials, key=rank):
        reached = [_number(trial.user_attrs.get(key)) for key in ("return", "cost")]
        verdict = ("yes" if is_feasible(trial) else "**no**") if "cost" in trial.user_attrs else "broke off"
        mark = " (best)" if best is not None and trial.number == best.number else ""
        cells = [f"{trial.number}{mark}", trial.state.name.lower(), *reached, verdict, trial.user_attrs.get("verdict", "-")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return ", ".join(f"{number:.2f}" for number in np.atleast_1d(value))


def _write_csv(trials: list[FrozenTrial], path: Path) -> None:
    names = sorted({name for trial in trials for name in trial.params})

    def write(file: Any) -> None:
        writer = csv.writer(file)
        writer.writerow(["trial", "state", "return", "cost", "cost_limit", "feasible", "seconds", *names])
        for trial in trials:
            reached = [_number(trial.user_attrs.get(key)) for key in ("return", "cost", "cost_limit")]
            seconds = "" if trial.duration is None else f"{trial.duration.total_seconds():.1f}"
            values = [trial.params.get(name, "") for name in names]
            writer.writerow([trial.number, trial.state.name, *reached, is_feasible(trial), seconds, *values])

    _replace(path, write)


def _replace(path: Path, write: Callable[[Any], object]) -> None:
    # Several workers may write the same report: each one's is there as a whole, or not at all
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        write(file)
    partial.replace(path)
