"""The Zoo's experiment manager, with costs."""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gymnasium as gym
import optuna
from gymnasium.envs.registration import WrapperSpec
from optuna.samplers import BaseSampler
from rl_zoo3 import exp_manager
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_SAMPLER
from sqlalchemy.exc import IntegrityError, ProgrammingError
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from sb3_algd.algd import ALGD
from sb3_algd.callbacks import CostEvalCallback
from sb3_algd.zoo import ALGO, CONFIG_FILE
from sb3_algd.zoo.tuning import BROKEN_OFF, TrialCostEvalCallback, best_feasible_trial, write_report

#: Column of monitor.csv, from the wrapper of that name
EPISODE_COST = "episode_cost"
#: How long another worker may take to make the tables of a new database
TABLES_SECONDS = 5
#: Schedules besides the Zoo's own ``learning_rate``, as ``lin_3e-4`` in a configuration
SCHEDULES = ("policy_learning_rate", "cost_critic_learning_rate", "multiplier_learning_rate")


class CostExperimentManager(ExperimentManager):
    """
    The Zoo's experiment manager, with our configuration, costs in its files, and tuning under the constraint.

    :param args: The options of the command line
    :param algo: Name of the algorithm
    :param rest: See the Zoo's
    :param kwargs: See the Zoo's; ``config`` is the file of hyperparameters, ours for ALGD if None
    """

    def __init__(self, args: argparse.Namespace, algo: str, *rest: Any, **kwargs: Any) -> None:
        if algo == ALGO and kwargs.get("config") is None:
            kwargs["config"] = str(CONFIG_FILE)
        super().__init__(args, algo, *rest, **kwargs)
        if algo == ALGO:
            # The noise is part of a diffusion policy: without it an agent may be safe that is not safe as it acts in training
            self.deterministic_eval = False
        self._costs_reported = False

    def read_hyperparameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """:return: Hyperparameters, and those that are saved with the run"""
        if self.storage and self.study_name and self.trial_id == 0:
            # rl_zoo3 2.9.2 takes trial 0 for no trial, and would train with the default hyperparameters
            self.custom_hyperparams = {
                **self.load_trial(self.storage, self.study_name, 0),
                **(self.custom_hyperparams or {}),
            }
        hyperparams, saved_hyperparams = super().read_hyperparameters()
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
        """
        keywords = tuple(self.monitor_kwargs.get("info_keywords", ()))
        if EPISODE_COST not in keywords and self._costs_reported:
            self.monitor_kwargs = {**self.monitor_kwargs, "info_keywords": (*keywords, EPISODE_COST)}
        return super().create_envs(n_envs, eval_env, no_log)

    def create_callbacks(self) -> None:
        """Create the Zoo's callbacks, with one that evaluates costs."""
        if self.algo != ALGO:
            return super().create_callbacks()
        with patch.object(exp_manager, "EvalCallback", CostEvalCallback):
            return super().create_callbacks()

    @staticmethod
    def _preprocess_schedules(hyperparams: dict[str, Any]) -> dict[str, Any]:
        hyperparams = ExperimentManager._preprocess_schedules(hyperparams)
        for key in SCHEDULES:
            # rl_zoo3 2.9.2 knows four names of schedules and leaves any other one a string
            if isinstance(hyperparams.get(key), str):
                as_learning_rate = ExperimentManager._preprocess_schedules({"learning_rate": hyperparams[key]})
                hyperparams[key] = as_learning_rate["learning_rate"]
        return hyperparams

    def _load_pretrained_agent(self, hyperparams: dict[str, Any], env: VecEnv) -> BaseAlgorithm:
        model = super()._load_pretrained_agent(hyperparams, env)
        if isinstance(model, ALGD):
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
        given = self._hyperparams.get("policy_kwargs") or {}
        return {**sampled, "policy_kwargs": {**given, **sampled["policy_kwargs"]}}

    def objective(self, trial: optuna.Trial) -> float:
        """
        :param trial: Optuna's trial
        :return: Mean return of the last evaluation; the trial holds the constraint
        """
        if self.algo != ALGO:
            return super().objective(trial)
        try:
            return super().objective(trial)
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
        if self.algo != ALGO:
            return super().hyperparameters_optimization()
        studies: list[optuna.Study] = []
        create_study = optuna.create_study
        self._sampler_of_algo = HYPERPARAMS_SAMPLER[ALGO]

        def create_and_keep(*args: Any, **kwargs: Any) -> optuna.Study:
            try:
                studies.append(create_study(*args, **kwargs))
            except (IntegrityError, ProgrammingError):
                # Of workers that start at once on an empty PostgreSQL database only one can make Optuna 5.0's tables
                time.sleep(TABLES_SECONDS)
                studies.append(create_study(*args, **kwargs))
            return studies[-1]

        with (
            patch.object(exp_manager.optuna, "create_study", create_and_keep),
            patch.object(exp_manager, "TrialEvalCallback", TrialCostEvalCallback),
            patch.dict(HYPERPARAMS_SAMPLER, {ALGO: self._sample}),
        ):
            try:
                super().hyperparameters_optimization()
            except ValueError:
                # rl_zoo3 2.9.2 asks for the best trial before it writes its report, and there may be no feasible one
                if not studies or best_feasible_trial(studies[0]) is not None:
                    raise
            finally:
                if studies:
                    self._write_tuning_report(studies[0])
        return None

    def _write_tuning_report(self, study: optuna.Study) -> None:
        # Those who share a study write one report, which each brings up to date
        name = study.study_name if self.storage is not None else str(int(time.time()))
        path = Path(self.log_folder) / self.algo / f"tuning_{self.env_name}_{name}"
        best = write_report(study, path, f"Tuning on {self.env_name.gym_id}, {self.n_timesteps} steps per trial")
        if best is None:
            print("No trial kept the limit.")
        else:
            print(f"Best trial within the limit: {best.number}, {best.user_attrs}")
        print(f"Return, cost and parameters of every trial: {path}.md and .csv")
