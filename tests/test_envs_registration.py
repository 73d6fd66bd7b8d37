"""Registration: the catalogue, a run of every id, and Gymnasium's and SB3's tools."""

import multiprocessing
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize, VecVideoRecorder

import sb3_algd  # noqa: F401
from sb3_algd.envs import register_envs
from sb3_algd.envs.catalogue import Entry, entries

DOCUMENTED = (Path(__file__).parents[1] / "docs" / "environments.md").read_text(encoding="utf-8").splitlines()
ENTRIES = {entry.id: entry for entry in entries()}
# For each agent the number of its sensor values and of its actuators.
AGENTS = {"Point": (12, 2), "Car": (24, 2), "Doggo": (56, 12), "Racecar": (12, 2), "Ant": (40, 8)}
# For each task the number of lidars, each with 16 values.
LIDARS = {"Goal0": 1, "Goal1": 3, "Goal2": 3, "Button0": 2, "Button1": 4, "Button2": 4, "Push0": 2, "Push1": 4, "Push2": 4}
LIDARS |= {"Circle0": 1, "Circle1": 1, "Circle2": 1, "Run0": 0}
WALKERS = {"Ant": 27, "HalfCheetah": 17, "Hopper": 11, "Humanoid": 376, "Swimmer": 8, "Walker2d": 17}
# One of each family.
FAMILIES = [
    "SafetyPointGoal1-v0",
    "SafetyCarButton1-v0",
    "SafetyAntPush1-v0",
    "SafetyDoggoCircle1-v0",
    "SafetyRacecarRun0-v0",
    "SafetyHopperVelocity-v1",
    "Safexp-PointButton1-v0",
    "HumanoidSpeed-v0",
]


def test_the_ids() -> None:
    navigation = {f"Safety{agent}{task}-v0" for agent in AGENTS for task in LIDARS}
    assert len(navigation) == 65
    velocity = {f"Safety{walker}Velocity-v1" for walker in WALKERS}
    accelerated = {f"Safexp-{agent}{task}-v0" for agent in ("Point", "Car") for task in ("Button1", "Button2")}
    speed = {f"{walker}Speed-v0" for walker in ("Ant", "HalfCheetah", "Hopper", "Humanoid")}
    assert set(ENTRIES) == navigation | velocity | accelerated | {"Safexp-PointPush1-v0"} | speed | {"TwoModes-v0"}
    assert set(ENTRIES) <= set(gym.registry)


def test_registering_twice_changes_nothing() -> None:
    before = dict(gym.registry)
    register_envs()
    assert gym.registry == before


def expected_size(entry: Entry) -> tuple[int, int] | None:
    """Sizes of observation and action of the stock navigation tasks. None for the others, which have tests of their own."""
    task = re.fullmatch(r"Safety(Point|Car|Doggo|Racecar|Ant)(\w+\d)-v0", entry.id)
    if task is None:
        return None
    agent, actions = AGENTS[task[1]]
    return agent + 16 * LIDARS[task[2]], actions


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_every_id_runs(entry: Entry) -> None:
    env: Any = gym.make(entry.id)
    obs: Any = env.reset(seed=0)[0]
    env.action_space.seed(0)
    assert env.observation_space.contains(obs)
    if expected_size(entry) is not None:
        assert (obs.size, env.action_space.shape[0]) == expected_size(entry)
    for _ in range(3):
        obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
        assert env.observation_space.contains(obs)
        assert (type(reward), type(terminated), type(truncated), type(info["cost"])) == (float, bool, bool, float)
        if terminated:
            break
    assert isinstance(env.unwrapped.cost_limit, float)
    discounted = "yes" if env.unwrapped.cost_limit_discounted else "no"
    sizes = [obs.size, env.action_space.shape[0], env.spec.max_episode_steps]
    cells = [entry.id, entry.track, f"{env.unwrapped.cost_limit:g}", discounted, *(f"{size:d}" for size in sizes)]
    assert "| " + " | ".join(cells) + " |" in DOCUMENTED
    assert env.unwrapped.cost_limit_discounted is (entry.track == "speed")
    if entry.track == "stock":
        assert env.unwrapped.cost_limit == 25.0
        assert info["cost"] in (0.0, 1.0)
        assert env.spec.max_episode_steps == (500 if re.search("Circle|Run", entry.id) else 1000)
    env.close()


@pytest.mark.parametrize("env_id", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_checkers(env_id: str) -> None:
    env: Any = gym.make(env_id)
    gymnasium_check_env(env.unwrapped)
    sb3_check_env(env, warn=False)
    env.close()


@pytest.mark.parametrize("env_id", FAMILIES)
def test_rendering(env_id: str) -> None:
    env: Any = gym.make(env_id, render_mode="rgb_array")
    env.reset(seed=0)
    image = env.render()
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.std() > 5, "an empty picture: does libEGL with a software renderer (libegl1, libgl1-mesa-dri) exist here?"
    env.close()
    env.close()


def test_two_environments_draw_in_turn_and_one_outlives_the_other() -> None:
    ids = ("SafetyPointGoal1-v0", "SafetyHopperVelocity-v1", "AntSpeed-v0")
    envs = [gym.make(env_id, render_mode="rgb_array") for env_id in ids]
    for env in envs:
        env.reset(seed=0)
    first: list[Any] = [env.render() for env in envs]
    for env, image in zip(envs, first, strict=True):
        np.testing.assert_array_equal(env.render(), image)
    while len(envs) > 1:
        envs.pop(0).close()
        first.pop(0)
        np.testing.assert_array_equal(envs[0].render(), first[0])
    envs[0].close()


def test_size_and_camera_of_a_picture() -> None:
    env: Any = gym.make("SafetyPointGoal1-v0", render_mode="rgb_array", width=160, height=96, camera_name="fixedfar")
    env.reset(seed=0)
    assert env.render().shape == (96, 160, 3)
    env.close()


def test_a_seed_decides_the_layouts() -> None:
    def layouts(env: Any, seed: int) -> list[np.ndarray]:
        return [env.reset(seed=seed)[0], env.reset()[0]]

    one, two = gym.make("SafetyCarPush2-v0"), gym.make("SafetyCarPush2-v0")
    for first, second in zip(layouts(one, 3), layouts(two, 3), strict=True):
        np.testing.assert_array_equal(first, second)
    assert np.abs(layouts(one, 3)[0] - layouts(two, 4)[0]).max() > 0.01
    assert np.abs(layouts(one, 3)[0] - layouts(one, 3)[1]).max() > 0.01


def test_workers_and_normalisation(tmp_path: Path) -> None:
    venv = make_vec_env(
        "Safexp-PointButton1-v0", n_envs=2, seed=0, vec_env_cls=SubprocVecEnv, monitor_dir=str(tmp_path)  # With Monitor.
    )
    assert venv.get_attr("cost_limit") == [10.0, 10.0]
    assert venv.get_attr("cost_limit_discounted") == [False, False]
    venv = VecNormalize(venv)
    obs: Any = venv.reset()
    assert obs.shape == (2, 76)
    for _ in range(401):
        obs, _, dones, infos = venv.step(np.zeros((2, 2), np.float32))
        assert all(info["cost"] == 0.0 for info in infos)
        if dones.any():
            break
    assert dones.all()
    assert [info["episode"]["l"] for info in infos] == [400, 400]
    assert np.isfinite(obs).all()
    venv.close()
    assert len(list(tmp_path.glob("*.monitor.csv"))) == 2


LOADED = """
import multiprocessing
from multiprocessing import forkserver

def loaded(*names):
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        modules = pool.apply(eval, ("list(__import__('sys').modules)",))
    return [name in modules for name in names]
"""


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="there is no forkserver here")
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        # Nothing else imports tabnanny. The server ignores a module that is missing
        (
            """
multiprocessing.set_forkserver_preload(["tabnanny", "__main__", "a_missing_module"])
import sb3_algd
sb3_algd.register_envs()
print(forkserver._forkserver._preload_modules, loaded("tabnanny", "sb3_algd"))
""",
            "['tabnanny', '__main__', 'a_missing_module', 'sb3_algd'] [True, True]",
        ),
        ("import sb3_algd; print(forkserver._forkserver._preload_modules)", "['__main__', 'sb3_algd']"),
        # The server already runs: it keeps its modules, and new workers still start
        (
            """
multiprocessing.set_forkserver_preload(["tabnanny"])
before = loaded("tabnanny", "sb3_algd")
import sb3_algd
print(before, loaded("tabnanny", "sb3_algd"))
""",
            "[True, False] [True, False]",
        ),
        # A Python without this private attribute
        (
            """
del forkserver._forkserver._preload_modules
import sb3_algd
print(vars(forkserver._forkserver).get("_preload_modules"))
""",
            "None",
        ),
    ],
    ids=["users_list", "default", "running", "unreadable"],
)
def test_the_forkserver_preloads_the_users_modules_and_ours(code: str, expected: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", LOADED + code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, expected), result.stderr


def test_videos(tmp_path: Path) -> None:
    venv = make_vec_env("SafetyPointGoal1-v0", env_kwargs={"render_mode": "rgb_array", "width": 64, "height": 64})
    recorder = VecVideoRecorder(venv, str(tmp_path), record_video_trigger=lambda step: step == 0, video_length=5)
    recorder.reset()
    for _ in range(6):
        recorder.step(np.zeros((1, 2), np.float32))
    recorder.close()
    (video,) = tmp_path.glob("*.mp4")
    assert video.stat().st_size > 500


def listed(monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["python -m sb3_algd.envs", *options])
    runpy.run_module("sb3_algd.envs", run_name="__main__")


def test_the_list(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    listed(monkeypatch, "Speed")
    lines = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["id", "track", "cost limit", "discounted", "observation", "action", "steps"]
    assert lines[1] == ["AntSpeed-v0", "speed", "103.115", "yes", "27", "8", "1000"]
    assert len(lines) == 5


def test_the_list_in_markdown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    listed(monkeypatch, "Button1", "--markdown")
    out = capsys.readouterr().out.splitlines()
    assert out[1] == "| --- | --- | --- | --- | --- | --- | --- |"
    assert "| SafetyDoggoButton1-v0 | stock | 25 | no | 120 | 12 | 1000 |" in out
    assert "| Safexp-CarButton1-v0 | accelerated | 10 | no | 88 | 2 | 400 |" in out


def test_the_list_without_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> None:
        raise ImportError("not installed: pip install it")

    monkeypatch.setattr("sb3_algd.envs.safety.navigation.load", missing)
    listed(monkeypatch, "Safexp-Point")
    out = capsys.readouterr().out
    assert out.count("accelerated  -") == 3
    assert out.count("tasks need: pip install") == 1


def test_the_list_of_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        listed(monkeypatch, "Pointt")
    assert "no id contains 'Pointt'" in capsys.readouterr().err
