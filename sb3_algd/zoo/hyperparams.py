"""What ``-optimize`` may choose: the search space of ALGD's hyperparameters."""

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
#: Parameters that are not ALGD's own but its policy's
POLICY_PARAMS = ("denoising_steps", "n_cost_critics")


def sample_algd_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sample the hyperparameters of a trial.

    Not tuned, for reasons: the limit and ``cost_gamma``, which are part of the task (a limit may be a sum discounted with it);
    the number of updates per step, where more costs time and mostly helps; ``guidance_coef``, because Adam takes away the
    common scale of the two losses; the type of the diffusion, which is a question of its own.

    :param trial: Optuna's trial
    :param n_actions: Dimension of the actions, not used
    :param n_envs: Number of environments, not used
    :param additional_args: What the Zoo says of a HER replay buffer
    :return: Keyword arguments of ALGD
    """
    params: dict[str, Any] = {
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.003, 0.05, log=True),
        "learning_rate": trial.suggest_float("learning_rate", 1e-4, 3e-3, log=True),
        "batch_size": trial.suggest_categorical("batch_size", [64, 128, 256, 512]),
        "tau": trial.suggest_float("tau", 0.002, 0.05, log=True),
        "target_update_interval": trial.suggest_int("target_update_interval", 1, 2),
        # The constraint
        "rho": trial.suggest_float("rho", 0.1, 10.0, log=True),
        "cost_risk_coef": trial.suggest_float("cost_risk_coef", 0.0, 2.0),
        "multiplier_init": trial.suggest_float("multiplier_init", 0.1, 3.0, log=True),
        "multiplier_learning_rate": trial.suggest_float("multiplier_learning_rate", 3e-5, 3e-2, log=True),
        "multiplier_space": trial.suggest_categorical("multiplier_space", ["log", "projected"]),
        "multiplier_signal": trial.suggest_categorical("multiplier_signal", ["buffer", "policy", "episodes"]),
        # The score
        "score_temperature": trial.suggest_float("score_temperature", 0.01, 10.0, log=True),
        "n_score_samples": trial.suggest_categorical("n_score_samples", [2, 4, 8]),
        "score_coef": trial.suggest_float("score_coef", 0.01, 1.0, log=True),
        "score_pairing": trial.suggest_categorical("score_pairing", ["after", "before"]),
        # The policy
        "net_arch": trial.suggest_categorical("net_arch", list(NET_ARCHS)),
        "denoising_steps": trial.suggest_int("denoising_steps", 3, 10),
        "n_cost_critics": trial.suggest_int("n_cost_critics", 2, 4),
    }
    if additional_args["using_her_replay_buffer"]:
        params = sample_her_params(trial, params, additional_args["her_kwargs"])
    return convert_algd_params(params)


def convert_algd_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    Turn sampled parameters, as Optuna stores them, into arguments.

    :param sampled_params: Parameters of a trial
    :return: Keyword arguments of ALGD
    """
    params = dict(sampled_params)
    # Four digits: the report shows them, and nobody can tell gamma = 0.98 from 0.9800123
    params["gamma"] = round(1 - params.pop("one_minus_gamma"), 4)
    params["policy_kwargs"] = {
        "net_arch": NET_ARCHS[params.pop("net_arch")],
        **{name: params.pop(name) for name in POLICY_PARAMS},
    }
    her_kwargs = {name: params.pop(name) for name in ("n_sampled_goal", "goal_selection_strategy") if name in params}
    if her_kwargs:
        params["replay_buffer_kwargs"] = {**params.get("replay_buffer_kwargs", {}), **her_kwargs}
    return params
