"""Hyperparameters of each task, as the Zoo reads them."""

import argparse
import inspect
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import yaml

pytest.importorskip("rl_zoo3")

from benchmarks import toy
from sb3_algd import ALGD, SACLag
from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm
from sb3_algd.envs.catalogue import OWN, SPEED, STOCK, entries
from sb3_algd.zoo import CONFIGS
from sb3_algd.zoo.manager import CostExperimentManager

ENV = "TwoModes-v0"
ALGORITHMS: dict[str, type[ConstrainedOffPolicyAlgorithm]] = {"algd": ALGD, "sac_lag": SACLag}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_entry_fits_its_task(name: str) -> None:
    config = yaml.safe_load((CONFIGS / f"{name}.yml").read_text())
    accepted = {*inspect.signature(ALGORITHMS[name]).parameters, "n_timesteps"}
    for entry in entries():
        hyperparams = config.pop(entry.id)
        assert set(hyperparams) <= accepted, entry.id
        declared = gym.make(entry.id).get_wrapper_attr("cost_limit") if entry.track == OWN else 25.0
        assert hyperparams["cost_limit"] == entry.kwargs.get("cost_limit", declared), entry.id
        assert hyperparams.get("cost_limit_discounted", False) == (entry.track == SPEED), entry.id
        assert float(hyperparams["n_timesteps"]) > 0
    assert set(config) == {"default"}


def papers_entries(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """What the Zoo makes of the entries of ``algd_paper.yml``."""
    entries_of = {}
    for task in yaml.safe_load((CONFIGS / "algd_paper.yml").read_text()):
        # By its name
        manager = CostExperimentManager(argparse.Namespace(), "algd", task, str(tmp_path), config="algd_paper.yml")
        entries_of[task], _ = manager.read_hyperparameters()
    return entries_of


def test_the_papers_entries_are_the_papers_arguments(tmp_path: Path) -> None:
    of_the_task = {"n_timesteps", "policy", "cost_limit", "cost_limit_discounted"}
    found = papers_entries(tmp_path)
    tasks = {entry.id: entry for entry in entries() if entry.track not in (STOCK, OWN)}
    assert found.keys() == tasks.keys()
    for task, hyperparams in found.items():
        arguments = {name: value for name, value in hyperparams.items() if name not in of_the_task}
        expected = ALGD.paper_kwargs(safety_gym=tasks[task].track != SPEED)
        assert arguments == {name: value for name, value in expected.items() if value is not None}, task
        assert hyperparams["cost_limit"] == tasks[task].kwargs["cost_limit"], task
        assert hyperparams["cost_limit_discounted"] == (tasks[task].track == SPEED), task


def test_the_tiny_task_has_the_arguments_of_its_benchmark(tmp_path: Path) -> None:
    hyperparams, _ = CostExperimentManager(argparse.Namespace(), "algd", ENV, str(tmp_path)).read_hyperparameters()
    expected = toy.ARGUMENTS["algd-ve"]
    assert {name: hyperparams[name] for name in expected} == expected
    assert hyperparams["n_timesteps"] == toy.STEPS["algd-ve"]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_tasks_of_the_zoo_have_the_defaults(name: str) -> None:
    of_the_task = {"n_timesteps", "policy", "cost_limit", "cost_limit_discounted"}
    config = yaml.safe_load((CONFIGS / f"{name}.yml").read_text())
    # Which is far smaller than the others
    del config[ENV]
    for entry in entries():
        if entry.track == SPEED:
            # Costs of every step, and legs
            assert config[entry.id].pop("penalty") == "pointwise"
            assert name != "algd" or config[entry.id].pop("policy_kwargs") == "dict(diffusion='ve-ancestral')"
    assert all(set(hyperparams) <= of_the_task for hyperparams in config.values())


def test_schedules_of_all_learning_rates() -> None:
    hyperparams = CostExperimentManager._preprocess_schedules(
        {
            "learning_rate": "lin_1e-3",
            "cost_critic_learning_rate": "lin_3e-3",
            "multiplier_kwargs": {"learning_rate": "lin_2e-3", "max_value": 5.0},
            "actor_learning_rate": 1e-4,
        }
    )
    assert hyperparams["learning_rate"](0.5) == 5e-4
    assert hyperparams["cost_critic_learning_rate"](0.5) == 1.5e-3
    assert hyperparams["multiplier_kwargs"].pop("learning_rate")(0.5) == 1e-3
    assert hyperparams["multiplier_kwargs"] == {"max_value": 5.0}
    assert hyperparams["actor_learning_rate"] == 1e-4


def test_dictionaries_in_a_configuration_may_be_strings(tmp_path: Path) -> None:
    config = tmp_path / "mine.yml"
    config.write_text(f'{ENV}:\n  n_timesteps: 10\n  multiplier_kwargs: "dict(max_value=5.0)"\n')
    manager = CostExperimentManager(argparse.Namespace(), "sac_lag", ENV, str(tmp_path), config=str(config))
    assert manager.read_hyperparameters()[0]["multiplier_kwargs"] == {"max_value": 5.0}


@pytest.mark.parametrize(
    ("old", "today"),
    [("multiplier_init", r"multiplier_kwargs=dict\(init_value=...\)"), ("policy_learning_rate", "actor_learning_rate")],
)
def test_old_arguments_name_those_of_today(old: str, today: str, tmp_path: Path) -> None:
    manager = CostExperimentManager(argparse.Namespace(), "algd", ENV, str(tmp_path), hyperparams={old: 1.0})
    with pytest.raises(ValueError, match=f"{old} is .* {today}"):
        manager.read_hyperparameters()


@pytest.mark.parametrize(("name", "deterministic"), [("algd", False), ("sac_lag", False), ("sac", True)])
def test_constrained_algorithms_are_evaluated_with_their_noise(name: str, deterministic: bool, tmp_path: Path) -> None:
    manager = CostExperimentManager(argparse.Namespace(), name, ENV, str(tmp_path))
    assert manager.deterministic_eval == deterministic
