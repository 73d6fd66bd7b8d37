"""The Zoo's commands, run as a user runs them."""

import argparse
import csv
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml

pytest.importorskip("rl_zoo3")

import huggingface_hub
import rl_zoo3
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

from sb3_algd import ALGD
from sb3_algd.envs.catalogue import OWN, SPEED, entries
from sb3_algd.envs.wrappers import EpisodeCost
from sb3_algd.zoo import CONFIG_FILE, TRAINED_AGENTS, __main__, all_plots, plot_costs, plot_train, push_to_hub
from sb3_algd.zoo.commandline import ALGDToShow
from sb3_algd.zoo.manager import CostExperimentManager

ENV = "TwoModes-v0"
# Small enough for a second of training
TINY = ["learning_starts:60", "batch_size:16", "policy_kwargs:dict(net_arch=[8], denoising_steps=2)"]


def run(command: str, *options: object, cwd: Path) -> str:
    """Run a command in a new process and return what it printed."""
    arguments = [sys.executable, "-m", f"sb3_algd.zoo.{command}", *map(str, options)]
    result = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs of a short training run, made by the command."""
    folder = tmp_path_factory.mktemp("zoo")
    options = ["--env", ENV, "-n", 220, "--eval-freq", 110, "--eval-episodes", 2, "--seed", 1, "--device", "cpu"]
    run("train", *options, "-tb", "tb", "--save-replay-buffer", "-params", *TINY, cwd=folder)
    return folder / "logs"


@pytest.fixture
def argv(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the command line."""

    def set_argv(*options: object) -> None:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, options)])

    return set_argv


def test_importing_registers_algd() -> None:
    assert rl_zoo3.ALGOS["algd"] is ALGD
    assert "algd" in HYPERPARAMS_SAMPLER
    assert "algd" in HYPERPARAMS_CONVERTER


def test_the_core_does_not_import_the_zoo() -> None:
    code = "import sys, sb3_algd; assert not [m for m in sys.modules if m.startswith(('rl_zoo3', 'sb3_algd.zoo', 'optuna'))]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_training_leaves_costs_where_people_look(logs: Path) -> None:
    folder = logs / "algd" / f"{ENV}_1"
    with (folder / "0.monitor.csv").open() as file:
        file.readline()
        rows = list(csv.DictReader(file))
    # A push costs its square, at most 1 a step
    assert all(0 < float(row["episode_cost"]) < 100 for row in rows)
    evaluations = np.load(folder / "evaluations.npz")
    assert evaluations["costs"].shape == evaluations["results"].shape == (2, 2)
    assert (folder / "best_model.zip").is_file()
    assert list((logs.parent / "tb").rglob("events.out.tfevents.*"))
    assert yaml.unsafe_load((folder / ENV / "config.yml").read_text())["cost_limit"] == 64


def test_enjoy_reports_costs_and_verdict(logs: Path) -> None:
    out = run("enjoy", "--env", ENV, "-f", logs, "-n", 200, "--no-render", cwd=logs)
    assert "2 episodes" in out
    assert "Return: " in out
    assert "limit 64: " in out


def test_enjoy_names_the_way_out_where_there_is_no_agent(tmp_path: Path, argv: Any) -> None:
    from sb3_algd.zoo.enjoy import enjoy

    argv("--env", ENV, "-f", tmp_path, "--no-render")
    with pytest.raises(SystemExit, match="Name the log folder"):
        enjoy()


def test_training_goes_on_from_an_agent(logs: Path, argv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sb3_algd.zoo.train import train

    kept: list[ALGD] = []
    monkeypatch.setattr(CostExperimentManager, "save_trained_model", lambda self, model: kept.append(model))
    monkeypatch.chdir(logs.parent)
    # As a script would have found them
    monkeypatch.setattr(rl_zoo3.train, "ExperimentManager", rl_zoo3.train.ExperimentManager)
    agent = logs / "algd" / f"{ENV}_1" / f"{ENV}.zip"
    argv("--env", ENV, "-n", 20, "-i", agent, "-f", logs.parent / "more", "--eval-freq", -1, "--device", "cpu")
    train()
    # The replay buffer came along, so that learning starts at once
    assert kept[0].learning_starts == 0
    assert kept[0].replay_buffer is not None
    assert kept[0].replay_buffer.size() == 240
    assert kept[0]._n_updates > 160


def test_plots(logs: Path, argv: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    monkeypatch.chdir(logs.parent)
    argv("-e", ENV, "-f", logs, "-k", "costs", "-o", "costs", "--no-display")
    all_plots.all_plots()
    assert ENV in capsys.readouterr().out
    assert Path("costs.pkl").is_file()
    argv("-e", ENV, "-f", logs, "-w", 1)
    plot_train.plot_train()
    argv("-e", ENV, "-f", logs, "-o", "costs.png")
    plot_costs.plot_costs()
    assert Path("costs.png").stat().st_size > 10_000
    assert plot_costs.read_cost_limit(logs / "algd" / f"{ENV}_1") == 64
    argv("-e", "Safexp-PointPush1-v0", "-f", logs)
    with pytest.raises(SystemExit, match="No evaluated run"):
        plot_costs.plot_costs()


def test_push_to_hub_tells_the_costs(logs: Path, argv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeApi:
        """Takes what the Hub would."""

        def create_repo(self, **kwargs: Any) -> str:
            return "url"

        def snapshot_download(self, local_dir: Path, **kwargs: Any) -> None:
            local_dir.mkdir(parents=True)

        def upload_folder(self, **kwargs: Any) -> None:
            pass

    monkeypatch.chdir(logs.parent)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    argv("--env", ENV, "-f", logs, "-orga", "nobody", "--no-render", "--device", "cpu")
    push_to_hub.push_to_hub()
    repo = Path("hub") / f"algd-{ENV}"
    results = json.loads((repo / "results.json").read_text())
    assert results["cost_limit"] == [64]
    assert results["mean_cost"][0] > 0
    card = (repo / "README.md").read_text()
    assert "limit 64.00." in card
    assert "python -m sb3_algd.zoo.enjoy --algo algd" in card
    assert "-m rl_zoo3" not in card


def test_an_agent_to_show_takes_no_memory(logs: Path) -> None:
    model = ALGDToShow.load(logs / "algd" / f"{ENV}_1" / f"{ENV}.zip", device="cpu")
    assert model.replay_buffer is not None
    assert model.replay_buffer.buffer_size == 1


def test_every_task_has_an_entry_that_fits() -> None:
    config = yaml.safe_load(CONFIG_FILE.read_text())
    accepted = {*inspect.signature(ALGD).parameters, "n_timesteps"}
    for entry in entries():
        hyperparams = config[entry.id]
        assert set(hyperparams) <= accepted, entry.id
        declared = gym.make(entry.id).get_wrapper_attr("cost_limit") if entry.track == OWN else 25.0
        assert hyperparams["cost_limit"] == entry.kwargs.get("cost_limit", declared), entry.id
        assert hyperparams.get("cost_limit_discounted", False) == (entry.track == SPEED), entry.id
        assert float(hyperparams["n_timesteps"]) > 0
    assert set(config) == {"default", *(entry.id for entry in entries())}


def test_the_agent_that_comes_along_is_played_and_recorded(tmp_path: Path) -> None:
    (agent,) = TRAINED_AGENTS.glob("algd/*/*.zip")
    assert agent.stat().st_size < 500_000
    for noise in ([], ["--stochastic"]):
        out = run("enjoy", "--env", agent.stem, "-n", 500, "--no-render", "--device", "cpu", *noise, cwd=tmp_path)
        assert f"Loading {agent}" in out
        assert "limit 64: the limit holds" in out
    run("record_video", "--env", agent.stem, "-n", 5, cwd=tmp_path)
    assert list((tmp_path / "videos").glob("*.mp4"))


def test_commands_are_told_and_checked(argv: Any, capsys: pytest.CaptureFixture[str]) -> None:
    argv()
    __main__.main()
    told = capsys.readouterr().out
    assert all(command in told for command in __main__.COMMANDS)
    argv("trian")
    with pytest.raises(SystemExit, match="choose one of train"):
        __main__.main()


def test_data_is_packaged_from_the_top_level(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)],
        cwd=root,
        check=True,
        capture_output=True,
        timeout=300,
    )
    packaged = tmp_path / "sb3_algd" / "zoo"
    assert (packaged / "zoo_configs" / "algd.yml").read_text() == (root / "zoo_configs" / "algd.yml").read_text()
    assert list((packaged / "trained_agents").glob("algd/*/*.zip"))


def test_algd_is_evaluated_with_its_noise(tmp_path: Path) -> None:
    for algo, deterministic in (("algd", False), ("sac", True)):
        manager = CostExperimentManager(argparse.Namespace(), algo, ENV, str(tmp_path))
        assert manager.deterministic_eval == deterministic


def test_schedules_of_all_learning_rates() -> None:
    hyperparams = CostExperimentManager._preprocess_schedules(
        {"learning_rate": "lin_1e-3", "multiplier_learning_rate": "lin_2e-3", "policy_learning_rate": 1e-4}
    )
    assert hyperparams["learning_rate"](0.5) == 5e-4
    assert hyperparams["multiplier_learning_rate"](0.5) == 1e-3
    assert hyperparams["policy_learning_rate"] == 1e-4


def test_episode_costs_are_summed_up() -> None:
    env = EpisodeCost(gym.make(ENV))
    for _ in range(2):
        env.reset(seed=0)
        infos = [env.step(np.array([0.5, 0.0]))[-1] for _ in range(4)]
        assert [info["episode_cost"] for info in infos] == [0.25, 0.5, 0.75, 1.0]


def test_the_tiny_task_draws_what_was_done() -> None:
    env = gym.make(ENV, render_mode="rgb_array")
    env.reset(seed=0)
    pictures = []
    for push in (0.5, -0.5, 1.0):
        env.step(np.array([push, 0.0]))
        pictures.append(np.asarray(env.render()))
    blue, red = (0, 114, 178), (178, 24, 43)
    middle = pictures[0].shape[1] // 2
    for picture, side, color in zip(pictures, (1, -1, 1), (blue, blue, red), strict=True):
        assert tuple(picture[45, middle + 20 * side]) == color
        assert tuple(picture[45, middle - 20 * side]) == (255, 255, 255)
