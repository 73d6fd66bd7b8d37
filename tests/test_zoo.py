"""The Zoo's commands, run as a user runs them."""

import csv
import json
import re
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

from sb3_algd import ALGD, SACLag, cli
from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm
from sb3_algd.envs.wrappers import EpisodeCost
from sb3_algd.export import load_policy
from sb3_algd.zoo import TRAINED_AGENTS, is_constrained, plot_costs, register
from sb3_algd.zoo.commandline import agents_to_show
from sb3_algd.zoo.manager import CostExperimentManager
from tests.conftest import run_cli

ENV = "TwoModes-v0"
ALGORITHMS: dict[str, type[ConstrainedOffPolicyAlgorithm]] = {"algd": ALGD, "sac_lag": SACLag}
# Small enough for a second of training
TINY = ["learning_starts:60", "batch_size:16"]
TINY_POLICY = {
    "algd": "policy_kwargs:dict(net_arch=[8], denoising_steps=2)",
    "sac_lag": "policy_kwargs:dict(net_arch=[8])",
}


def run(command: str, *options: object, cwd: Path) -> str:
    """Run a command in a new process and return what it printed."""
    arguments = [sys.executable, "-m", "sb3_algd.zoo", command, *map(str, options)]
    result = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module", params=ALGORITHMS)
def algo(request: pytest.FixtureRequest) -> str:
    """Name of an algorithm."""
    return str(request.param)


@pytest.fixture(scope="module")
def logs(algo: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs of a short training run, made by the command."""
    folder = tmp_path_factory.mktemp("zoo")
    options = ["--env", ENV, "-n", 220, "--eval-freq", 110, "--eval-episodes", 2, "--seed", 1, "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        options += ["-tb", "tb", "--save-replay-buffer", "-params", *TINY, TINY_POLICY[algo]]
        run_cli("train", "--algo", algo, *options)
    return folder / "logs"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_importing_registers_the_algorithms(name: str) -> None:
    assert rl_zoo3.ALGOS[name] is ALGORITHMS[name]
    assert is_constrained(name)
    assert name in HYPERPARAMS_SAMPLER
    assert name in HYPERPARAMS_CONVERTER


def test_other_algorithms_have_no_limit() -> None:
    assert not is_constrained("sac")
    assert not is_constrained("none of the zoo's")


def test_the_core_does_not_import_the_zoo() -> None:
    code = "import sys, sb3_algd; assert not [m for m in sys.modules if m.startswith(('rl_zoo3', 'sb3_algd.zoo', 'optuna'))]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_training_leaves_costs_where_people_look(algo: str, logs: Path) -> None:
    folder = logs / algo / f"{ENV}_1"
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


def test_enjoy_reports_costs_and_verdict(algo: str, logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--algo", algo, "--env", ENV, "-f", logs, "-n", 200, "--no-render", "--device", "cpu"]
    reports = []
    for actions in ([], ["--stochastic"], ["--deterministic"]):
        run_cli("enjoy", *options, *actions)
        out = capsys.readouterr().out
        assert len(re.findall(r"^Episode Cost: \d+\.\d\d \(limit 64\)$", out, re.MULTILINE)) == 2
        reports.append(out[out.index("2 episodes\n") :].splitlines())
    assert reports[0][0] == "2 episodes"
    assert reports[0][1].startswith("Return: ")
    assert reports[0][2].startswith("Cost: ")
    # Two episodes decide nothing
    assert "limit 64: undecided" in reports[0][2]
    # The policy whose cost is limited is the stochastic one
    assert reports[0] == reports[1] != reports[2]


def test_training_goes_on_from_an_agent(algo: str, logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[ConstrainedOffPolicyAlgorithm] = []
    monkeypatch.setattr(CostExperimentManager, "save_trained_model", lambda self, model: kept.append(model))
    monkeypatch.chdir(logs.parent)
    agent = logs / algo / f"{ENV}_1" / f"{ENV}.zip"
    options = ["-n", 20, "-i", agent, "-f", logs.parent / "more", "--eval-freq", -1, "--device", "cpu"]
    run_cli("train", "--algo", algo, "--env", ENV, *options)
    # The replay buffer came along, so that learning starts at once
    assert kept[0].learning_starts == 0
    assert kept[0].replay_buffer is not None
    assert kept[0].replay_buffer.size() == 240
    assert kept[0]._n_updates > 160


def test_plots(algo: str, logs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    monkeypatch.chdir(logs.parent)
    # ALGD is the default
    algos = [] if algo == "algd" else ["-a", algo]
    run_cli("all_plots", *algos, "-e", ENV, "-f", logs, "-k", "costs", "-o", "costs", "--no-display")
    assert ENV in capsys.readouterr().out
    assert Path("costs.pkl").is_file()
    run_cli("plot_train", *algos, "-e", ENV, "-f", logs, "-w", 1)
    run_cli("plot_costs", *algos, "-e", ENV, "-f", logs, "-o", "costs.png")
    assert "Drawn from 1 run(s)" in capsys.readouterr().out
    assert Path("costs.png").stat().st_size > 10_000
    assert plot_costs.read_cost_limit(logs / algo / f"{ENV}_1") == (64, False)
    with pytest.raises(SystemExit, match=f"No evaluated run .*{algo}"):
        run_cli("plot_costs", *algos, "-e", "Safexp-PointPush1-v0", "-f", logs)


def test_algorithms_are_drawn_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(plot_costs, "plot_learning_curves", lambda curves, *rest: drawn.update(curves))
    for name, cost in (("algd", 1.0), ("sac_lag", 2.0)):
        run_folder = tmp_path / name / f"{ENV}_1"
        run_folder.mkdir(parents=True)
        np.savez(run_folder / "evaluations.npz", timesteps=[10], results=[[5.0, 7.0]], costs=[[cost, cost]])
    run_cli("plot_costs", "-a", "algd", "sac_lag", "-e", ENV, "-f", tmp_path)
    assert {label: curves[0]["cost_mean"].tolist() for label, curves in drawn.items()} == {
        "ALGD": [1.0],
        "SAC-Lagrangian": [2.0],
    }
    with pytest.raises(SystemExit):
        run_cli("plot_costs", "-a", "algd", "sac_lag", "-e", ENV, "-f", tmp_path, "-l", "one")


def test_the_zoos_commands_get_our_default_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[list[str]] = []
    monkeypatch.setattr(cli.runpy, "run_module", lambda *args, **kwargs: lines.append([*args, *sys.argv[1:]]))
    run_cli("load_from_hub", "--env", ENV)
    assert lines == [["rl_zoo3.load_from_hub", "--algo", "algd", "--env", ENV]]


def test_push_to_hub_tells_the_costs(algo: str, logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    run_cli("push_to_hub", "--algo", algo, "--env", ENV, "-f", logs, "-orga", "nobody", "--no-render", "--device", "cpu")
    repo = Path("hub") / f"{algo}-{ENV}"
    results = json.loads((repo / "results.json").read_text())
    assert results["cost_limit"] == [64]
    assert results["mean_cost"][0] > 0
    assert not results["is_deterministic"]
    card = (repo / "README.md").read_text()
    assert "limit 64.00." in card
    assert f"**{ALGORITHMS[algo].__name__}** Agent" in card
    assert f"python -m sb3_algd.zoo enjoy --algo {algo}" in card
    assert "-m rl_zoo3" not in card
    assert f"Verdict: {results['verdict']}." in card
    # What a stranger may load
    assert "from sb3_algd.export import load_policy" in card
    policy = load_policy(repo)
    assert policy.config["task"] == ENV and policy.config["results"]["mean_cost"] == results["mean_cost"]
    model = ALGORITHMS[algo].load(logs / algo / f"{ENV}_1" / f"{ENV}.zip", device="cpu")
    observation = np.full(1, 0.3, dtype=np.float32)
    for action in (
        policy.predict(observation, deterministic=True)[0],
        policy.predict(observation[None], deterministic=True)[0][0],
    ):
        np.testing.assert_allclose(action, model.predict(observation, deterministic=True)[0], atol=1e-6)


def test_an_algorithm_of_others_is_trained_and_enjoyed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Mine(SACLag):
        """An algorithm that is not in this package."""

    for table in (rl_zoo3.ALGOS, HYPERPARAMS_SAMPLER, HYPERPARAMS_CONVERTER):
        monkeypatch.setitem(table, "mine", None)
    register("mine", Mine)
    monkeypatch.chdir(tmp_path)
    Path("mine.yml").write_text(f"{ENV}:\n  n_timesteps: 120\n  policy: MlpPolicy\n")
    run_cli("train", "--algo", "mine", "--env", ENV, "--conf-file", "mine.yml", "--device", "cpu", "-params", *TINY)
    run_cli("enjoy", "--algo", "mine", "--env", ENV, "-f", "logs", "-n", 100, "--no-render", "--device", "cpu")
    assert "limit 64: " in capsys.readouterr().out


def test_an_agent_to_show_takes_no_memory(algo: str, logs: Path) -> None:
    path = logs / algo / f"{ENV}_1" / f"{ENV}.zip"
    loaded: list[ConstrainedOffPolicyAlgorithm] = []
    with agents_to_show(loaded.append):
        model = rl_zoo3.ALGOS[algo].load(path, device="cpu")
    assert loaded == [model]
    assert type(model) is ALGORITHMS[algo]
    assert loaded[0].replay_buffer is not None
    assert loaded[0].replay_buffer.buffer_size == 1
    assert ALGORITHMS[algo].load(path, device="cpu").buffer_size > 1


def test_the_agent_that_comes_along_is_played_and_recorded(tmp_path: Path) -> None:
    (agent,) = TRAINED_AGENTS.glob("algd/*/*.zip")
    assert agent.stat().st_size < 600_000
    for actions in ([], ["--deterministic"]):
        out = run("enjoy", "--env", agent.stem, "-n", 1200, "--no-render", "--device", "cpu", *actions, cwd=tmp_path)
        assert f"Loading {agent}" in out
        assert "limit 64: within the limit" in out
    run("record_video", "--env", agent.stem, "-n", 5, cwd=tmp_path)
    assert list((tmp_path / "videos").glob("*.mp4"))


def test_commands_are_told_and_checked(capsys: pytest.CaptureFixture[str]) -> None:
    run_cli()
    told = capsys.readouterr().out
    assert all(command in told for command in cli.COMMANDS)
    with pytest.raises(SystemExit, match="choose one of envs, train"):
        run_cli("trian")


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
    for name in (*ALGORITHMS, "algd_paper"):
        file = f"zoo_configs/{name}.yml"
        assert (packaged / file).read_text() == (root / file).read_text()
    assert list((packaged / "trained_agents").glob("algd/*/*.zip"))


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


@pytest.mark.parametrize("limit, feasible", [(0.001, False), (1000.0, True)])
def test_the_best_model_is_called_feasible_only_where_it_is(
    limit: float, feasible: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--env", ENV, "-n", 100, "--eval-freq", 100, "--eval-episodes", 1, "--device", "cpu"]
    run_cli("train", *options, "-params", *TINY, TINY_POLICY["algd"], f"cost_limit:{limit}")
    out = capsys.readouterr().out
    assert ("best feasible model, 20" in out) == feasible
    assert ("No evaluation was within the limit; best_model.zip is the one that exceeds it least." in out) != feasible
