"""Tuning under the constraint."""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy.exc

pytest.importorskip("rl_zoo3")

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.utils import StoreDict
from torch import nn

from sb3_algd import ALGD, SACLag
from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm
from sb3_algd.common.evaluation import evaluate_policy
from sb3_algd.common.recorder import make_envs
from sb3_algd.zoo import storage
from sb3_algd.zoo.__main__ import main
from sb3_algd.zoo.hyperparams import sample_algd_params
from sb3_algd.zoo.manager import CostExperimentManager
from sb3_algd.zoo.tuning import (
    TrialCostEvalCallback,
    as_options,
    best_feasible_trial,
    is_feasible,
    pruning_value,
    write_report,
)

ENV = "TwoModes-v0"
# As small as a trial can be; what is tuned overrides what it can
OPTIONS = ["--env", ENV, "-n", "100", "-optimize", "--n-evaluations", "1", "--eval-episodes", "1", "--device", "cpu"]
OPTIONS += ["--no-optim-plots", "-f", "logs", "-params", "learning_starts:90"]


def finish(study: optuna.Study, returns: float, cost: float | None, pruned: bool = False) -> None:
    """Add a trial as the callback leaves it, with a limit of 10."""
    trial = study.ask()
    sample_algd_params(trial, 1, 1, {"using_her_replay_buffer": False})
    if cost is not None:
        trial.set_constraint("cost", (cost - 10) / 10)
        trial.set_user_attr("return", returns)
        trial.set_user_attr("cost", [cost])
        trial.set_user_attr("cost_limit", [10.0])
    state = TrialState.PRUNED if pruned else TrialState.COMPLETE
    study.tell(trial, None if pruned else returns, state=state)


def test_an_unsafe_trial_with_a_higher_return_loses(tmp_path: Path) -> None:
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(0))
    finish(study, 100.0, 50.0)
    finish(study, 5.0, 9.0)
    finish(study, 3.0, 0.0)
    finish(study, 90.0, 11.0, pruned=True)
    best = best_feasible_trial(study)
    assert best is not None
    assert best.number == study.best_trial.number == 1
    write_report(study, tmp_path / "deep" / "report", "Title")
    text = (tmp_path / "deep" / "report.md").read_text()
    assert "Best trial: **1**" in text
    assert "| 0 | complete | 100.00 | 50.00 | **no** | - |" in text
    assert "exceeded outside the limit only, by 2 trial(s): 0, 3" in text
    assert len((tmp_path / "deep" / "report.csv").read_text().splitlines()) == 5


def test_the_report_is_written_when_no_trial_is_feasible(tmp_path: Path) -> None:
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(0))
    finish(study, 100.0, 50.0)
    finish(study, 5.0, 12.0)
    assert write_report(study, tmp_path / "report", "Title") is None
    text = (tmp_path / "report.md").read_text()
    assert "No complete trial kept the limit" in text
    assert "Closest came trial 1" in text


@pytest.mark.parametrize("pruner", [optuna.pruners.MedianPruner(2, 0), optuna.pruners.SuccessiveHalvingPruner()])
def test_pruning_never_favours_an_unsafe_trial(pruner: optuna.pruners.BasePruner) -> None:
    study = optuna.create_study(direction="maximize", pruner=pruner)
    for _ in range(6):
        unsafe = study.ask()
        unsafe.report(pruning_value(1000.0, 0.1), 1)
        study.tell(unsafe, 1000.0)
    safe = study.ask()
    safe.report(pruning_value(-1000.0, 0.0), 1)
    assert not safe.should_prune()
    study.tell(safe, -1000.0)
    for _ in range(6):
        safer = study.ask()
        safer.report(pruning_value(0.0, 0.0), 1)
        study.tell(safer, 0.0)
    unsafe = study.ask()
    unsafe.report(pruning_value(1000.0, 0.1), 1)
    assert unsafe.should_prune()


def test_pruning_values_are_in_order() -> None:
    values = [pruning_value(1e6, 2.0), pruning_value(-5.0, 0.5), pruning_value(-1e6, 0.0), pruning_value(3.0, 0.0)]
    assert values == sorted(values)


@pytest.mark.parametrize("cost_limit", [0.0, 100.0])
def test_a_trial_states_the_constraint_once(cost_limit: float) -> None:
    study = optuna.create_study(direction="maximize")
    trial = study.ask()
    model = ALGD("DiffusionPolicy", ENV, cost_limit=cost_limit, learning_starts=1000, policy_kwargs=dict(net_arch=[8]))
    callback = TrialCostEvalCallback(make_envs(ENV, seed=3), trial, n_eval_episodes=2, eval_freq=50, deterministic=True)
    model.learn(100, callback=callback)
    expected = evaluate_policy(model, make_envs(ENV, seed=3), 2, deterministic=True)
    # Targets differ from evaluation to evaluation
    assert trial.user_attrs["cost"][0] == pytest.approx(expected[2], abs=5)
    scale = cost_limit or 1.0
    assert trial.constraints["cost"] == pytest.approx((trial.user_attrs["cost"][0] - cost_limit) / scale)
    study.tell(trial, callback.last_mean_reward)
    assert is_feasible(study.trials[0]) == (cost_limit == 100)
    assert sorted(study.trials[0].intermediate_values) == [1, 2]


@pytest.mark.parametrize("algo", ["algd", "sac_lag"])
def test_sampled_parameters_make_a_model(algo: str) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    for her in (False, True):
        trial = study.ask()
        args: dict[str, Any] = {"using_her_replay_buffer": her, "her_kwargs": {}}
        sampled = HYPERPARAMS_SAMPLER[algo](trial, 1, 1, args)
        # --trial-id reads them back
        assert HYPERPARAMS_CONVERTER[algo](trial.params) == sampled
        her_kwargs = sampled.pop("replay_buffer_kwargs", {})
        assert (len(her_kwargs) > 0) == her
        algorithms: dict[str, type[ConstrainedOffPolicyAlgorithm]] = {"algd": ALGD, "sac_lag": SACLag}
        model = algorithms[algo]("MlpPolicy", ENV, learning_starts=10, buffer_size=100, **sampled)
        model.learn(12)


@pytest.mark.parametrize("algo", ["algd", "sac_lag"])
def test_options_of_a_report_give_the_parameters_of_the_trial(algo: str) -> None:
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(0)).ask()
    sampled = HYPERPARAMS_SAMPLER[algo](trial, 1, 1, {"using_her_replay_buffer": False})
    given = {"cost_limit": 151.98912, "policy_kwargs": {"activation_fn": nn.Tanh}, "cost_key": "my cost"}
    words = shlex.split(as_options(trial.params, given))
    parser = argparse.ArgumentParser()
    parser.add_argument("-params", nargs="+", action=StoreDict)
    read = parser.parse_args(words).params
    assert (read.pop("cost_limit"), read.pop("cost_key")) == (151.98912, "my cost")
    assert read["policy_kwargs"].pop("activation_fn") is nn.Tanh

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: rounded(item) for name, item in value.items()}
        return pytest.approx(value, rel=1e-3) if isinstance(value, float) else value

    assert read == rounded(sampled)


@pytest.fixture
def optimize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command in this process."""
    monkeypatch.chdir(tmp_path)

    def run(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["sb3-algd", "train", *OPTIONS, *options])
        main()

    return run


def test_no_feasible_trial_ends_with_a_report(optimize: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optimize("cost_limit:0.0", "policy_kwargs:dict(diffusion='ddpm')", "--n-trials", "2", "--optimization-log-path", "best")
    assert "No trial kept the limit" in capsys.readouterr().out
    (report,) = (tmp_path / "logs" / "algd").glob("tuning_*.md")
    assert "2 complete" in report.read_text()
    # One episode is enough: no cost is below 0
    assert report.read_text().count("| over the limit |") == 2
    # What the configuration says of the policy stays
    model = ALGD.load(next((tmp_path / "best").glob("trial_*/best_model.zip")))
    assert model.actor.diffusion == "ddpm"


@pytest.mark.parametrize("error", [FloatingPointError("train/risk became [nan]"), RuntimeError("out of memory")])
def test_a_trial_that_breaks_off_does_not_end_the_study(
    error: Exception, optimize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(self: ALGD, gradient_steps: int, batch_size: int = 256) -> None:
        raise error

    monkeypatch.setattr(ALGD, "train", diverge)
    optimize("cost_limit:1000.0", "--n-trials", "2")
    (report,) = (tmp_path / "logs" / "algd").glob("tuning_*.md")
    assert "2 pruned" in report.read_text()
    assert report.read_text().count("broke off") == 2


def test_any_constrained_algorithm_is_tuned(optimize: Any, tmp_path: Path) -> None:
    optimize("cost_limit:999.5", "--n-trials", "1", "--algo", "sac_lag")
    (report,) = (tmp_path / "logs" / "sac_lag").glob("tuning_*.md")
    text = report.read_text()
    assert "Best trial: **0**" in text
    # What was given is among the options, so that they are the whole trial
    assert "cost_limit:999.5" in text
    assert "learning_starts:90" in text


def test_two_workers_share_a_study(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sb3_algd.zoo", "train", *OPTIONS, "cost_limit:1000.0", "--seed", "0"]
    command += ["--storage", "study.log", "--study-name", "shared", "--max-total-trials", "4"]
    workers = [
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)
    ]
    outputs = [worker.communicate(timeout=600)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    journal = JournalStorage(JournalFileBackend(str(tmp_path / "study.log")))
    study = optuna.load_study(study_name="shared", storage=journal)
    trials = study.trials
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert 4 <= len(trials) <= 5
    assert all(len(trial.constraints) == 1 for trial in trials)
    # The same seed does not make them try the same
    assert len({trial.params["learning_rate"] for trial in trials}) == len(trials)
    assert all(np.isfinite(trial.user_attrs["return"]) for trial in trials)
    report = (tmp_path / "logs" / "algd" / f"tuning_{ENV}_shared.md").read_text()
    assert "Best trial: **" in report


def test_the_first_trial_can_be_loaded(tmp_path: Path) -> None:
    path = str(tmp_path / "study.log")
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(path)), study_name="s", direction="maximize", load_if_exists=True
    )
    finish(study, 5.0, 9.0)
    options: dict[str, Any] = dict(storage=path, study_name="s", trial_id=0, hyperparams={"tau": 0.5})
    manager = CostExperimentManager(argparse.Namespace(), "algd", ENV, str(tmp_path), **options)
    hyperparams, saved = manager.read_hyperparameters()
    assert dict(saved) == hyperparams
    assert hyperparams["rho"] == study.trials[0].params["rho"]
    # Between the task's configuration and the command line
    assert hyperparams["policy_kwargs"]["denoising_steps"] == study.trials[0].params["policy_kwargs.denoising_steps"]
    assert hyperparams["policy_kwargs"]["diffusion_kwargs"] == {"sigma_max": 0.2}
    assert hyperparams["tau"] == 0.5


@pytest.mark.parametrize("error", ["IntegrityError", "OperationalError", "ProgrammingError"])
def test_a_worker_that_comes_second_at_making_the_tables_tries_again(
    optimize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    create_study, calls = optuna.create_study, []

    def failing_once(*args: Any, **kwargs: Any) -> optuna.Study:
        calls.append(kwargs)
        if len(calls) == 1:
            raise getattr(sqlalchemy.exc, error)("CREATE TABLE studies", {}, Exception("table studies already exists"))
        return create_study(*args, **kwargs)

    monkeypatch.setattr(optuna, "create_study", failing_once)
    monkeypatch.setattr("sb3_algd.zoo.storage.PAUSE_SECONDS", 0)
    optimize("cost_limit:999.5", "--n-trials", "1", "--storage", f"sqlite:///{tmp_path / 'study.db'}", "--study-name", "s")
    assert len(calls) == 2
    assert len(optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path / 'study.db'}").trials) == 1


def test_a_worker_whose_trial_was_given_up_says_so(optimize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = f"sqlite:///{tmp_path / 'study.db'}"

    def train_for_too_long(self: ALGD, gradient_steps: int, batch_size: int = 256) -> None:
        study = optuna.load_study(study_name="s", storage=database)
        if study.trials[0].state == TrialState.RUNNING:
            study.tell(0, state=TrialState.FAIL)

    monkeypatch.setattr(ALGD, "train", train_for_too_long)
    with pytest.raises(SystemExit, match=r"Trial 0 gave no sign of life for 120 s, so it counts as failed: .* suspended"):
        optimize("cost_limit:999.5", "--n-trials", "1", "--storage", database, "--study-name", "s")


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_worker_that_comes_back_makes_up_for_the_trial_it_died_in(
    optimize: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(storage, "GRACE_SECONDS", 1)
    database = f"sqlite:///{tmp_path / 'study.db'}"
    study = storage.create_study(optuna.create_study, database, study_name="s", direction="maximize")
    cached: Any = study._storage
    cached.record_heartbeat(study.ask()._trial_id)
    optimize("cost_limit:999.5", "--max-total-trials", "1", "--storage", database, "--study-name", "s")
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
