"""What ``-optimize`` may choose: the search spaces of the algorithms' hyperparameters."""

from typing import Any

import optuna
from rl_zoo3.hyperparams_opt import sample_her_params

#: Widths by name, since a list cannot be a choice of Optuna's
NET_ARCHS: dict[str, dict[str, list[int]]] = {
    "tiny": dict(pi=[32, 32], qf=[32, 32]),
    "small": dict(pi=[64, 64], qf=[128, 128]),
    "paper": dict(pi=[128, 128, 128], qf=[256, 256]),
    "big": dict(pi=[256, 256, 256], qf=[400, 300]),
}


def sample_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sample what all constrained algorithms have. In Optuna, ``multiplier_kwargs.learning_rate`` is the name of the item
    ``learning_rate`` of the argument ``multiplier_kwargs``.

    Not tuned, for reasons: the limit and its unit, which are the task; what moves the multipliers, whose two kinds take steps
    of different units; the number of updates per step, where more costs time and mostly helps.

    :param trial: Optuna's trial
    :param n_actions: Dimension of the actions, not used
    :param n_envs: Number of environments, not used
    :param additional_args: What the Zoo says of a HER replay buffer
    :return: Keyword arguments of the algorithm
    """
    params: dict[str, Any] = {
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.003, 0.05, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 3e-3, log=True),
        "batch_size": trial.suggest_categorical("batch_size", [64, 128, 256, 512]),
        "tau": trial.suggest_float("tau", 0.002, 0.05, log=True),
        "target_update_interval": trial.suggest_int("target_update_interval", 1, 2),
        "policy_delay": trial.suggest_int("policy_delay", 1, 4),
        # The constraint
        "cost_gamma": trial.suggest_categorical("cost_gamma", [0.9, 0.95, 0.975, 0.99]),
        "penalty": trial.suggest_categorical("penalty", ["expectation", "pointwise"]),
        "rho": trial.suggest_float("rho", 0.05, 5.0, log=True),
        "constraint_start": trial.suggest_float("constraint_start", 0.0, 0.4),
        "cost_risk_coef": trial.suggest_float("cost_risk_coef", 0.0, 2.0),
    }
    multiplier = "multiplier_kwargs"
    params[f"{multiplier}.learning_rate"] = trial.suggest_float(f"{multiplier}.learning_rate", 0.01, 0.5, log=True)
    params[f"{multiplier}.confidence"] = trial.suggest_float(f"{multiplier}.confidence", 0.0, 2.0)
    # The policy
    params["policy_kwargs.net_arch"] = trial.suggest_categorical("policy_kwargs.net_arch", list(NET_ARCHS))
    params["policy_kwargs.n_cost_critics"] = trial.suggest_int("policy_kwargs.n_cost_critics", 2, 4)
    if additional_args["using_her_replay_buffer"]:
        params = sample_her_params(trial, params, additional_args["her_kwargs"])
    return convert_params(params)


def sample_algd_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sample the hyperparameters of ALGD. The type of the diffusion is not tuned: it is a question of its own.

    :param trial: Optuna's trial
    :param n_actions: Dimension of the actions, not used
    :param n_envs: Number of environments, not used
    :param additional_args: What the Zoo says of a HER replay buffer
    :return: Keyword arguments of ALGD
    """
    own = {
        "score_coef": trial.suggest_float("score_coef", 0.01, 1.0, log=True),
        "score_kwargs.temperature": trial.suggest_float("score_kwargs.temperature", 0.01, 10.0, log=True),
        "score_kwargs.n_samples": trial.suggest_categorical("score_kwargs.n_samples", [2, 4, 8]),
        "score_kwargs.pairing": trial.suggest_categorical("score_kwargs.pairing", ["after", "before"]),
        "policy_kwargs.denoising_steps": trial.suggest_int("policy_kwargs.denoising_steps", 3, 10),
    }
    return merge_arguments(sample_params(trial, n_actions, n_envs, additional_args), convert_params(own))


def sample_sac_lag_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sample the hyperparameters of SACLag.

    :param trial: Optuna's trial
    :param n_actions: Dimension of the actions, not used
    :param n_envs: Number of environments, not used
    :param additional_args: What the Zoo says of a HER replay buffer
    :return: Keyword arguments of SACLag
    """
    own = {"ent_coef": trial.suggest_categorical("ent_coef", ["auto", "auto_0.1", "auto_0.01"])}
    return merge_arguments(sample_params(trial, n_actions, n_envs, additional_args), convert_params(own))


def convert_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    Turn sampled parameters, as Optuna stores them, into arguments.

    :param sampled_params: Parameters of a trial
    :return: Keyword arguments of the algorithm
    """
    params: dict[str, Any] = {}
    for name, value in sampled_params.items():
        argument, _, item = name.rpartition(".")
        (params.setdefault(argument, {}) if argument else params)[item] = value
    if "one_minus_gamma" in params:
        # Four digits: the report shows them, and nobody can tell gamma = 0.98 from 0.9800123
        params["gamma"] = round(1 - params.pop("one_minus_gamma"), 4)
    policy_kwargs = params.get("policy_kwargs", {})
    if "net_arch" in policy_kwargs:
        policy_kwargs["net_arch"] = NET_ARCHS[policy_kwargs["net_arch"]]
    her_kwargs = {name: params.pop(name) for name in ("n_sampled_goal", "goal_selection_strategy") if name in params}
    if her_kwargs:
        params["replay_buffer_kwargs"] = {**params.get("replay_buffer_kwargs", {}), **her_kwargs}
    return params


def merge_arguments(given: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """
    Join arguments, and the items of those that are dictionaries in both.

    :param given: Keyword arguments
    :param over: Others, which count where both have the same
    :return: Keyword arguments
    """
    merged = {**given, **over}
    for name, items in over.items():
        if isinstance(items, dict) and isinstance(given.get(name), dict):
            merged[name] = {**given[name], **items}
    return merged
