"""The accelerated track: every number of its tables is compared with the world that MuJoCo simulates."""

from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import pytest

import sb3_algd  # noqa: F401

Places = list[tuple[float, float]]

BUTTONS_1: Places = [(-1.3, -1.3), (1.3, -1.3), (-1.3, 1.3), (1.3, 1.3)]
BUTTONS_2: Places = [(-1.1, -1.3), (1.8, -1.5), (-1.4, 0.6), (1.0, 1.3)]
HAZARDS_1: Places = [(0, -1.9), (0, 1.9), (0, 0), (1.9, 0), (-1.9, 0)]
HAZARDS_2: Places = [(0.1, -1.9), (-0.2, 1.7), (0.3, 0.1), (2, -0.1), (-1.8, 0.2), (-0.1, -1.2), (0, 1.3), (1.1, 0), (-1, 0)]
HAZARDS_2 += [(0.2, -0.9), (-1.1, 1.1)]
GREMLINS_1: Places = [(0, -1.3), (0, 1.3), (1.3, 0), (-1.3, 0)]
HAZARDS_PUSH: Places = [(0.5, -0.5), (-0.5, -0.5), (1.8, 0.8), (-1.8, 0.8)]
PILLARS_PUSH: Places = [(-2, 0), (2, 0), (0, 0), (1, 1), (-1, 1)]

# For each kind of object: name of the bodies, size of the geoms, positions.
WORLDS: dict[str, dict[str, tuple[str, float, Places]]] = {
    "Button1": {
        "buttons": ("button{}", 0.1, BUTTONS_1),
        "hazards": ("hazard{}", 0.17, HAZARDS_1),
        "gremlins": ("gremlin{}obj", 0.1, GREMLINS_1),
    },
    "Button2": {"buttons": ("button{}", 0.1, BUTTONS_2), "hazards": ("hazard{}", 0.22, HAZARDS_2)},
    "Push1": {
        "push_box": ("push_box", 0.2, [(0, -1.5)]),
        "hazards": ("hazard{}", 0.3, HAZARDS_PUSH),
        "pillars": ("pillar{}", 0.2, PILLARS_PUSH),
    },
}
# (x, y) and heading of the agent, observation size of Point and Car.
STARTS = {
    "Button1": ((-0.72467, 0.95375), 2.23438, {"Point": 76, "Car": 88}),
    "Button2": ((0.13668, 0.60253), 2.86608, {"Point": 60, "Car": 72}),
    "Push1": ((-1.0, -2.0), 1.04015, {"Point": 76}),
}
KEEPOUTS = {
    "Button1": {"buttons": 0.2, "hazards": 0, "gremlins": 0.35},
    "Button2": {"buttons": 0.2, "hazards": 0},
    "Push1": {"hazards": 0.4},
}
CASES = [("Point", "Button1"), ("Point", "Button2"), ("Car", "Button1"), ("Car", "Button2"), ("Point", "Push1")]
TIMESTEP = {"Point": 0.006, "Car": 0.01}


def make(agent: str, task: str) -> tuple[gym.Env, Any]:
    env = gym.make(f"Safexp-{agent}{task}-v0")
    return env, env.unwrapped.task  # type: ignore[attr-defined]


@pytest.mark.parametrize(("agent", "task"), CASES)
def test_objects(agent: str, task: str) -> None:
    env, world = make(agent, task)
    env.reset(seed=0)
    for kind, (name, size, places) in WORLDS[task].items():
        for i, place in enumerate(places):
            assert world.data.body(name.format(i)).xpos[:2] == pytest.approx(place, abs=2e-9), (kind, i)
            assert world.model.geom(name.format(i)).size[0] == size, (kind, i)
        assert getattr(world, kind).is_constrained == (kind != "push_box")
        with pytest.raises(KeyError):
            world.data.body(name.format(len(places)) + ("" if "{}" in name else "1"))
    kinds = {obstacle.name for obstacle in world._obstacles}
    assert kinds == {*WORLDS[task], "goal"}
    for kind, keepout in KEEPOUTS[task].items():
        assert getattr(world, kind).keepout == keepout
    if task == "Button1":
        assert world.gremlins.travel == 0.3
    if task == "Push1":
        assert (world.push_box.null_dist, world.goal.size, world.goal.placements) == (0, 0.3, [(-2, -0.5, 2, 2)])
    extent = 1.8 if task == "Button2" else 2
    assert world.placements_conf.extents == [-extent, -extent, extent, extent]
    lidar = world.lidar_conf
    assert (lidar.num_bins, lidar.max_dist, world.sim_conf.frameskip_binom_n) == (16, 3, 10)


@pytest.mark.parametrize(("agent", "task"), CASES)
def test_every_episode_starts_alike(agent: str, task: str) -> None:
    env, world = make(agent, task)
    position, heading, sizes = STARTS[task]
    first = None
    for seed in (None, 3, 4, None):
        obs, _ = env.reset(seed=seed)
        first = obs if first is None else first
        np.testing.assert_array_equal(obs, first)
        assert obs.shape == (sizes[agent],)
        body = world.data.body("agent")
        assert body.xpos[:2] == pytest.approx(position, abs=5e-6)
        x_axis = body.xmat.reshape(3, 3)[:, 0]
        assert np.arctan2(x_axis[1], x_axis[0]) == pytest.approx(heading, abs=5e-6)
        if task == "Push1":
            assert world.data.body("goal").xpos[:2] == pytest.approx((-1.02976, 0.19099), abs=5e-6)
        else:
            button = {"Button1": 0, "Button2": 2}[task]
            assert world.buttons.goal_button == button
            assert world.data.body("goal").xpos[:2] == pytest.approx(WORLDS[task]["buttons"][2][button], abs=2e-9)
        # Each reset builds a new model with the timestep of the agent's file. Ours has to hold after the reset and a step.
        assert world.model.opt.timestep == TIMESTEP[agent]
        env.step(np.zeros(2))
        assert world.data.time == pytest.approx(10 * TIMESTEP[agent])


@pytest.mark.parametrize(("agent", "task"), [("Point", "Button2"), ("Car", "Button1")])
def test_an_episode_has_400_steps_and_its_costs_are_indicators(agent: str, task: str) -> None:
    env, _ = make(agent, task)
    unwrapped: Any = env.unwrapped
    assert (unwrapped.cost_limit, unwrapped.cost_limit_discounted) == (10, False)
    env.reset(seed=0)
    env.action_space.seed(0)
    costs = []
    for step in range(1, 401):
        *_, terminated, truncated, info = env.step(env.action_space.sample())
        costs.append(info["cost"])
        assert not terminated
        assert truncated == (step == 400)
    assert set(costs) == {0.0, 1.0}


def put_on(world: Any, place: np.ndarray) -> None:
    """Put the Point at (x, y) and stop it. Its two slide joints follow the axes of its start pose."""
    axes = world.data.xaxis[[world.model.joint(name).id for name in ("x", "y")], :2]
    world.data.qpos[:2] += axes @ (place - world.data.body("agent").xpos[:2])
    world.data.qvel[:3] = 0
    mujoco.mj_forward(world.model, world.data)
    assert world.data.body("agent").xpos[:2] == pytest.approx(place, abs=1e-9)


def press(env: gym.Env, button: int) -> tuple[Any, ...]:
    """Put the Point in front of a button so that it touches, and drive forward for a step."""
    world: Any = env.unwrapped.task  # type: ignore[attr-defined]
    heading = world.data.body("agent").xmat.reshape(3, 3)[:2, 0]
    put_on(world, world.data.body(f"button{button}").xpos[:2] - 0.245 * heading)
    return env.step(np.array([1.0, 0.0]))


def test_a_pressed_target_makes_buttons_free_and_invisible_for_ten_steps() -> None:
    env, world = make("Point", "Button1")
    env.reset(seed=0)
    buttons = slice(12, 28)
    assert env.step(np.zeros(2))[0][buttons].any()

    # The wrong button costs while it is touched.
    *_, info = press(env, 1)
    assert (info["cost"], info["cost_buttons"], info["goal_met"]) == (1.0, 1.0, False)

    draws = np.random.RandomState(0)
    draws.set_state(world.random_generator.random_generator.get_state())
    obs, reward, *_, info = press(env, 0)
    assert (info["cost"], info["goal_met"]) == (0.0, True)
    assert reward > 0.9
    # One draw for the substeps of the step, then one for the next target.
    draws.binomial(10, 1.0)
    target = draws.choice(4)
    assert world.buttons.goal_button == target
    wrong = next(button for button in range(4) if button != target)
    for _ in range(10):
        assert not obs[buttons].any()
        obs, *_, info = press(env, wrong)
        assert (info["cost"], "cost_buttons" in info) == (0.0, False)
    assert obs[buttons].any()
    assert press(env, wrong)[-1]["cost"] == 1.0


def test_hazards_gremlins_and_pillars_cost() -> None:
    for task, kinds in (("Button1", ("hazards", "gremlins")), ("Push1", ("hazards", "pillars"))):
        env, world = make("Point", task)
        for kind in kinds:
            env.reset(seed=0)
            name = WORLDS[task][kind][0].format(0)
            put_on(world, world.data.body(name).xpos[:2])
            *_, info = env.step(np.zeros(2))
            assert (info["cost"], info[f"cost_{kind}"]) == (1.0, 1.0), kind


def test_a_box_in_the_goal_is_rewarded_and_gets_a_new_goal() -> None:
    env, world = make("Point", "Push1")
    env.reset(seed=0)
    box = world.model.joint("push_box").qposadr[0]
    old = world.data.body("goal").xpos[:2].copy()
    world.data.qpos[box : box + 2] = old
    *_, info = env.step(np.zeros(2))
    new = world.data.body("goal").xpos[:2]
    assert info["goal_met"]
    assert np.linalg.norm(new - old) > 0.1
    assert -2 <= new[0] <= 2
    assert -0.5 <= new[1] <= 2
