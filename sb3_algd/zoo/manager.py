"""The Zoo's experiment manager, with costs."""

import argparse
import dataclasses
import os
import re
import time
from collections import OrderedDict
from pathlib import Path
from pprint import pprint
from typing import Any
from unittest.mock import patch

import gymnasium as gym
import optuna
from gymnasium.envs.registration import WrapperSpec
from optuna.samplers import BaseSampler
from rl_zoo3 import exp_manager
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_SAMPLER
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv, sync_envs_normalization

from sb3_algd.common.callbacks import CostEvalCallback, CostProgressBarCallback, RemainingTimeCallback
from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm
from sb3_algd.common.constraint import declared_by_env
from sb3_algd.common.evaluation import describe_evaluation
from sb3_algd.common.legacy import refuse_old_arguments
from sb3_algd.zoo import CONFIGS, is_constrained, storage
from sb3_algd.zoo.commandline import given_options
from sb3_algd.zoo.hyperparams import merge_arguments
from sb3_algd.zoo.tuning import BROKEN_OFF, TrialCostEvalCallback, best_feasible_trial, write_report

#: Column of monitor.csv, from the wrapper of that name
EPISODE_COST = "episode_cost"
#: How often a training is evaluated where the command line does not say it
N_EVALUATIONS = 20
#: Schedules besides the Zoo's own ``learning_rate``, as ``lin_3e-4`` in a configuration
SCHEDULES = ("actor_learning_rate", "cost_critic_learning_rate")


def _evaluate_kwargs(hyperparams: dict[str, Any]) -> dict[str, Any]:
    """Evaluate dictionaries that a configuration has as strings, as the Zoo does with some of them."""
    return {
        name: eval(value, vars(exp_manager)) if name.endswith("_kwargs") and isinstance(value, str) else value
        for name, value in hyperparams.items()
    }


def _check_schedule(value: Any, name: str) -> None:
    """Refuse a string that the Zoo would read as a schedule and stumble over."""
    if isinstance(value, str) and re.fullmatch(r"[a-z]+_[-+.e\d]+", value) is None:
        raise ValueError(f"`{name}` must be a number, or 'lin_3e-4' for a linear schedule from it, got {value!r}.")


def _make_schedule(kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    """Make a schedule of a string: rl_zoo3 2.9.2 knows four names of schedules and leaves any other one as it is."""
    if not isinstance(kwargs.get(name), str):
        return kwargs
    _check_schedule(kwargs[name], name)
    return {**kwargs, name: ExperimentManager._preprocess_schedules({"learning_rate": kwargs[name]})["learning_rate"]}


class CostExperimentManager(ExperimentManager):
    """
    The Zoo's experiment manager, with our configuration, costs in its files, and tuning under the constraint.

    :param args: The options of the command line
    :param algo: Name of the algorithm
    :param rest: See the Zoo's
    :param kwargs: See the Zoo's; ``config`` is the file of hyperparameters, ours for our algorithms if None, or the name of
        one of ours
    """

    def __init__(self, args: argparse.Namespace, algo: str, *rest: Any, **kwargs: Any) -> None:
        given = kwargs.get("config")
        ours = CONFIGS / (f"{algo}.yml" if given is None else given)
        if (given is None or not os.path.exists(given)) and ours.is_file():
            kwargs["config"] = str(ours)
        elif given is not None and str(given).endswith(".yml") and not os.path.exists(given):
            names = ", ".join(sorted(path.name for path in CONFIGS.glob("*.yml")))
            raise ValueError(f"--conf-file {given}: there is no such file. Those of the package are {names}.")
        super().__init__(args, algo, *rest, **kwargs)
        self.is_constrained = is_constrained(algo)
        if self.is_constrained:
            # The policy whose cost is limited is the stochastic one: it may exceed the limit where its mean actions do not
            self.deterministic_eval = False
        self._costs_reported = False
        self._limit_given = True
        #: Whether training or tuning has begun
        self.started = False
        #: The folder of results and those around it, as far as this run has made them, innermost first
        self.made_folders: list[Path] = []

    def create_log_folder(self) -> None:
        """Create the folder of results."""
        folder = Path(self.save_path)
        self.made_folders = [path for path in (folder, *folder.parents) if not path.exists()]
        super().create_log_folder()

    def learn(self, model: BaseAlgorithm) -> None:
        """:param model: The model to train."""
        if self.tensorboard_log is not None:
            # TensorBoard would fail in the middle of the start
            os.makedirs(self.tensorboard_log, exist_ok=True)
        self.started = True
        super().learn(model)

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """:return: Hyperparameters, and those that are saved with the run"""
        trial_id = self.trial_id
        if self.is_constrained:
            # rl_zoo3 2.9.2 takes trial 0 for no trial, and would drop what else the configuration says of the policy
            self.trial_id = None
        hyperparams, saved_hyperparams = super().read_hyperparameters()
        if self.is_constrained:
            hyperparams = _evaluate_kwargs(hyperparams)
            if self.storage and self.study_name and trial_id is not None:
                hyperparams = merge_arguments(hyperparams, self.load_trial(self.storage, self.study_name, trial_id))
                hyperparams = merge_arguments(hyperparams, self.custom_hyperparams or {})
                saved_hyperparams = OrderedDict(sorted(hyperparams.items()))
                print(f"With the parameters of trial {trial_id}:")
                pprint(saved_hyperparams)
            refuse_old_arguments(hyperparams)
            self._limit_given = self.continue_training or "cost_limit" in hyperparams
        cost_key = hyperparams.get("cost_key", "cost")
        if isinstance(cost_key, str):
            self._report_episode_costs(cost_key)
        return hyperparams, saved_hyperparams

    def _report_episode_costs(self, cost_key: str) -> None:
        # The Zoo applies an env_wrapper outside the Monitor; what belongs to the environment's specification is inside
        spec = gym.spec(self.env_name.gym_id)
        wrapper = WrapperSpec("EpisodeCost", "sb3_algd.envs.wrappers:EpisodeCost", {"cost_key": cost_key})
        others = tuple(present for present in spec.additional_wrappers if present.name != wrapper.name)
        gym.registry[spec.id] = dataclasses.replace(spec, additional_wrappers=(*others, wrapper))
        self._costs_reported = True

    def create_envs(self, n_envs: int, eval_env: bool = False, no_log: bool = False) -> VecEnv:
        """
        :param n_envs: How many environments
        :param eval_env: Whether they are for evaluation
        :param no_log: Whether to leave out monitor.csv
        :return: The environments, whose monitor.csv has a column of costs
        :raises ValueError: If there is no cost limit
        """
        keywords = tuple(self.monitor_kwargs.get("info_keywords", ()))
        if EPISODE_COST not in keywords and self._costs_reported:
            self.monitor_kwargs = {**self.monitor_kwargs, "info_keywords": (*keywords, EPISODE_COST)}
        env = super().create_envs(n_envs, eval_env, no_log)
        if not self._limit_given and declared_by_env(env, "cost_limit") is None:
            # The algorithm would warn and take Safety-Gymnasium's
            env.close()
            raise ValueError(f"{self.env_name.gym_id} declares no cost limit: give one with -params cost_limit:10.")
        return env

    def create_callbacks(self) -> None:
        """Create the Zoo's callbacks, with one that evaluates costs."""
        if not self.is_constrained:
            return super().create_callbacks()
        if given_options().eval_freq is None:
            self.eval_freq = self._default_eval_freq()
        with (
            patch.object(exp_manager, "EvalCallback", CostEvalCallback),
            patch.object(exp_manager, "ProgressBarCallback", CostProgressBarCallback),
        ):
            super().create_callbacks()
        if not self.optimize_hyperparameters:
            self.callbacks.append(RemainingTimeCallback())
        return None

    def _default_eval_freq(self) -> int:
        """:return: Steps between evaluations for 20 of them, but no less than an episode, and for one of them at least."""
        n_timesteps = int(self.n_timesteps)
        episode = gym.spec(self.env_name.gym_id).max_episode_steps or 1
        return max(min(max(n_timesteps // N_EVALUATIONS, episode), n_timesteps), 1)

    def save_trained_model(self, model: BaseAlgorithm) -> None:
        """
        Save the model and print return and cost of it and of the best one, beside the limit.

        :param model: The model
        """
        super().save_trained_model(model)
        evaluations = [callback for callback in self.callbacks if isinstance(callback, CostEvalCallback)]
        if not evaluations or not isinstance(model, ConstrainedOffPolicyAlgorithm):
            return
        env = evaluations[0].eval_env
        if self.normalize:
            sync_envs_normalization(model.get_vec_normalize_env(), env)  # type: ignore[arg-type]
        print(describe_evaluation("last model", model, env))
        best = Path(self.save_path) / "best_model.zip"
        if best.is_file() and evaluations[0].best_violation > 0.0:
            print("No evaluation was within the limit; best_model.zip is the one that exceeds it least.")
            return
        # Its own statistics of observations are another file's
        if best.is_file() and not self.normalize:
            print(describe_evaluation("best feasible model", type(model).load(best, buffer_size=1), env))

    @staticmethod
    def _preprocess_schedules(hyperparams: dict[str, Any]) -> dict[str, Any]:
        _check_schedule(hyperparams.get("learning_rate"), "learning_rate")
        hyperparams = ExperimentManager._preprocess_schedules(hyperparams)
        for key in SCHEDULES:
            hyperparams = _make_schedule(hyperparams, key)
        if "multiplier_kwargs" in hyperparams:
            hyperparams["multiplier_kwargs"] = _make_schedule(hyperparams["multiplier_kwargs"], "learning_rate")
        return hyperparams

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        if hyperparams.get("multiplier_kwargs"):
            # A configuration has it for new agents; this one's multiplier goes on from its value
            kept = {name: value for name, value in hyperparams["multiplier_kwargs"].items() if name != "init_value"}
            hyperparams = {**hyperparams, "multiplier_kwargs": kept}
        model = super()._load_pretrained_agent(hyperparams, env)
        if isinstance(model, ConstrainedOffPolicyAlgorithm):
            # rl_zoo3 2.9.2 starts to count steps anew, and with them the warm-up. A trained policy acts itself then,
            # and needs no warm-up if it brought its replay buffer along.
            model.use_policy_at_warmup = True
            if model.replay_buffer is not None and model.replay_buffer.size() > 0:
                model.learning_starts = 0
        return model

    def _create_sampler(self, sampler_method: str) -> BaseSampler:
        sampler = super()._create_sampler(sampler_method)
        if self.storage is not None:
            # Workers that share a study and a seed would all try the same parameters
            sampler.reseed_rng()
        return sampler

    def _sample(self, trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
        sampled = self._sampler_of_algo(trial, n_actions, n_envs, additional_args)
        # The Zoo would drop what the configuration says of the policy, the type of its diffusion among it
        return merge_arguments(self._hyperparams, sampled)

    def objective(self, trial: optuna.Trial) -> float:
        """
        :param trial: Optuna's trial
        :return: Mean return of the last evaluation; the trial holds the constraint
        :raises SystemExit: If another worker has taken this one for dead
        """
        if not self.is_constrained:
            return super().objective(trial)
        try:
            return super().objective(trial)
        except optuna.exceptions.UpdateFinishedTrialError as error:
            raise SystemExit(
                f"Trial {trial.number} gave no sign of life for {storage.GRACE_SECONDS} s, so it counts as failed: was this "
                "process or its machine suspended? Start the worker again."
            ) from error
        except (optuna.TrialPruned, FloatingPointError, RuntimeError) as error:
            # rl_zoo3 2.9.2 lets what is no ValueError end the whole study, though it is the parameters of this trial that
            # training diverged with, or that did not fit into memory
            if not isinstance(error, optuna.TrialPruned):
                print(f"Trial {trial.number} broke off: {error}")
            if len(trial.constraints) == 0:
                trial.set_constraint("cost", BROKEN_OFF)
            raise optuna.TrialPruned from error

    def hyperparameters_optimization(self) -> None:
        """Search for the hyperparameters with the highest return within the limit, and report all trials."""
        if not self.is_constrained:
            self.started = True
            return super().hyperparameters_optimization()
        studies: list[optuna.Study] = []
        create_study = optuna.create_study
        self._sampler_of_algo = HYPERPARAMS_SAMPLER[self.algo]

        def create_and_keep(**kwargs: Any) -> optuna.Study:
            studies.append(storage.create_study(create_study, **kwargs))
            self.started = True
            if self.max_total_trials is not None:
                # The Zoo counts what runs, also where its worker died long ago
                storage.is_full(studies[-1], self.max_total_trials)
            return studies[-1]

        with (
            patch.object(exp_manager.optuna, "create_study", create_and_keep),
            patch.object(exp_manager, "MaxTrialsCallback", storage.MaxLiveTrialsCallback),
            patch.object(exp_manager, "TrialEvalCallback", TrialCostEvalCallback),
            patch.dict(HYPERPARAMS_SAMPLER, {self.algo: self._sample}),
        ):
            try:
                super().hyperparameters_optimization()
            except ValueError:
                # rl_zoo3 2.9.2 asks for the best trial before it writes its report, and there may be no feasible one
                if not studies or best_feasible_trial(studies[0]) is not None:
                    raise
            finally:
                if studies:
                    storage.fail_dead_trials(studies[0])
                    self._write_tuning_report(studies[0])
        return None

    def _write_tuning_report(self, study: optuna.Study) -> None:
        # Those who share a study write one report, which each brings up to date
        name = study.study_name if self.storage is not None else str(int(time.time()))
        path = Path(self.log_folder) / self.algo / f"tuning_{self.env_name}_{name}"
        given = {name: value for name, value in self._hyperparams.items() if name.endswith("_kwargs")}
        title = f"Tuning on {self.env_name.gym_id}, {self.n_timesteps} steps per trial"
        best = write_report(study, path, title, {**given, **(self.custom_hyperparams or {})})
        if best is None:
            print("No trial kept the limit.")
        else:
            print(f"Best trial within the limit: {best.number}, {best.user_attrs}")
        print(f"Return, cost and parameters of every trial: {path}.md and .csv")
