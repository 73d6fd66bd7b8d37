"""What the critics expect is compared with what is paid, of the same steps."""

from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml

from benchmarks import calibration, plot
from sb3_algd import ALGD
from sb3_algd.common.calibration import newest_transitions, paid_costs
from sb3_algd.common.recorder import make_envs
from tests.conftest import CostlyEnv

COST_GAMMA = 0.9
#: Longer than 2 / (1 - COST_GAMMA)
N_STEPS = 24


class SteadyCostEnv(CostlyEnv):
    """Every step costs 1. An episode ends by itself after N_STEPS, and one step earlier with every other reset."""

    n_resets = 0

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        self.left = N_STEPS - self.n_resets % 2
        SteadyCostEnv.n_resets += 1
        return super().reset(**kwargs)

    def step(self, action: np.ndarray) -> Any:
        observation, reward, _, _, info = super().step(action)
        self.left -= 1
        return observation, reward, self.left == 0, False, info | {"cost": 1.0}


gym.register("SteadyCost-v0", lambda **kwargs: SteadyCostEnv())
# Ends with a truncation
gym.register("SteadyCostLimited-v0", lambda **kwargs: SteadyCostEnv(), max_episode_steps=N_STEPS - 2)
gym.register("SteadyCostMixed-v0", lambda **kwargs: SteadyCostEnv(), max_episode_steps=N_STEPS)


def test_what_was_paid_is_the_sum_to_the_end_of_the_episode() -> None:
    costs = np.array([[1.0, 0.0], [2.0, 4.0], [8.0, 0.0], [16.0, 1.0]])
    # An episode ends with the second step; the last one is cut off by what is given
    paid = paid_costs(costs, np.array([0.0, 1.0, 0.0, 0.0]), 0.5)
    np.testing.assert_array_equal(paid, [[1 + 0.5 * 2, 0.5 * 4], [2, 4], [8 + 0.5 * 16, 0.5 * 1], [16, 1]])


def test_the_newest_transitions_of_a_buffer_that_went_around() -> None:
    model = ALGD("MlpPolicy", gym.make("SteadyCost-v0"), buffer_size=10, learning_starts=99, cost_limit=1.0, episode_length=9)
    model.learn(4)
    assert model.replay_buffer is not None
    assert newest_transitions(model.replay_buffer, 9).tolist() == [0, 1, 2, 3]
    model.learn(9, reset_num_timesteps=False)
    assert newest_transitions(model.replay_buffer, 5).tolist() == [8, 9, 0, 1, 2]
    assert newest_transitions(model.replay_buffer, 99).tolist() == [3, 4, 5, 6, 7, 8, 9, 0, 1, 2]


class RecordingEnv(CostlyEnv):
    """Each step costs what the first number of its observation is, from 0 to 1; keeps the costs and the actions it gets."""

    made: ClassVar[list["RecordingEnv"]] = []

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict]:
        if not hasattr(self, "given"):
            self.given: list[tuple[float, float]] = []
            self.made.append(self)
        return super().reset(**kwargs)

    def step(self, action: np.ndarray) -> Any:
        cost = float(abs(self.state[0]))
        self.given.append((cost, float(action[0])))
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, terminated, truncated, info | {"cost": cost}


gym.register("Recording-v0", lambda **kwargs: RecordingEnv(), max_episode_steps=N_STEPS)


def make_model(task: str) -> ALGD:
    kwargs: dict[str, Any] = dict(cost_limit=7.0, cost_gamma=COST_GAMMA, episode_length=N_STEPS, learning_starts=1000, seed=0)
    return ALGD("DiffusionPolicy", make_envs(task), policy_kwargs=dict(net_arch=[8]), **kwargs).learn(30)


def expecting(model: ALGD, values: list[float]) -> ALGD:
    """:return: The model, whose cost critics expect the values of every action, one each."""
    layer = [module for module in model.cost_critic.parameters() if module.shape[-1] == 1][-1]
    with th.no_grad():
        for parameter in model.cost_critic.parameters():
            parameter.zero_()
        layer.copy_(th.tensor(values).view_as(layer))
    return model


def place(model: ALGD, folder: Path, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.yaml").write_text(yaml.safe_dump({"algorithm": "algd-ve"}))
    model.save(folder / f"seed{seed}")


def to_come(n_left: np.ndarray) -> np.ndarray:
    """:return: The discounted cost of so many steps."""
    return np.asarray((1 - COST_GAMMA**n_left) / (1 - COST_GAMMA))


@pytest.mark.parametrize(
    ("task", "n_left"),
    [
        ("SteadyCost-v0", np.r_[1 : N_STEPS + 1, 1:N_STEPS]),
        ("SteadyCostLimited-v0", np.r_[20 : N_STEPS - 1, 20 : N_STEPS - 1]),
        # One ends with the limit, the other by itself, one step before it
        ("SteadyCostMixed-v0", np.r_[20 : N_STEPS + 1, 19:N_STEPS]),
    ],
)
def test_the_same_steps_are_expected_and_paid(
    tmp_path: Path, task: str, n_left: np.ndarray, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibration, "N_EPISODES", 2)
    folder = tmp_path / task / "algd-ve"
    place(expecting(make_model(task), [1.0, 2.0, 3.0, 6.0]), folder)
    calibration.main(["--tasks", task, "--results", str(tmp_path)])
    (line,) = calibration.read_lines(folder / "calibration.csv")
    assert line["seed"] == 0
    assert line["step"] == 30
    # What 7 per episode is per step, for as long as the discount lets it count
    assert line["budget"] == pytest.approx(7.0 / N_STEPS * to_come(np.array(N_STEPS)), rel=1e-4)
    assert line["expected"] == pytest.approx(3.0, rel=1e-4)
    assert line["risk"] == pytest.approx(3.0 + np.std([1.0, 2.0, 3.0, 6.0], ddof=1), rel=1e-4)
    assert line["n_steps"] == len(n_left)
    assert line["paid"] == pytest.approx(to_come(n_left).mean(), rel=1e-4)
    parts = np.split(to_come(n_left), np.flatnonzero(np.diff(n_left) < 0) + 1)
    assert line["paid_error"] == pytest.approx(calibration.error_of_mean(parts), rel=1e-3, abs=1e-6)

    # A line is kept, one of another seed is added
    capsys.readouterr()
    place(expecting(make_model(task), [0.0] * 4), folder, seed=1)
    (folder / "seed0.zip").write_text("not a model")
    calibration.main(["--tasks", task, "--results", str(tmp_path)])
    assert "seed0" not in capsys.readouterr().out
    first, second = calibration.read_lines(folder / "calibration.csv")
    assert first == line
    assert (second["seed"], second["expected"]) == (1, 0)

    table = plot.calibration_table(tmp_path, {task: ["algd-ve", "sac"]})
    paid = ", ".join([f"{line['paid']:.2f} ± {line['paid_error']:.2f}"] * 2)
    row = f"| {task} | algd-ve | 0, 1 | {line['budget']:.2f} | 3.00, 0.00 | 5.16, 0.00 | {paid} |"
    assert table is not None
    assert table.splitlines()[2:] == [row]


def test_every_step_has_its_own_state_action_and_cost() -> None:
    model = make_model("Recording-v0")

    def expect(obs: th.Tensor, actions: th.Tensor) -> th.Tensor:
        # Actions are in [-1, 1] here
        return th.stack([obs[:, :1].abs() + k + 10 * actions[:, :1] for k in (0.0, 2.0)])

    model.cost_critic.forward = expect  # type: ignore
    model.cost_risk_coef = 0.5
    env = make_envs("Recording-v0", 3)
    RecordingEnv.made.clear()
    played = calibration.Episodes(model, n_counted=7)
    calibration.evaluate_policy(model, env, 3, deterministic=False, callback=played)
    assert len(played.episodes) == 3
    for episode, source in zip(played.episodes, RecordingEnv.made, strict=True):
        costs, actions = np.array(source.given[:N_STEPS]).T
        expected = costs + 1 + 10 * actions / 2
        paid = [np.sum(costs[step:] * COST_GAMMA ** np.arange(N_STEPS - step)) for step in range(7)]
        assert episode == pytest.approx(np.stack([expected[:7], expected[:7] + 0.5 * np.sqrt(2), paid], axis=1), rel=1e-3)


def test_a_measurement_is_of_stochastic_actions_and_depends_on_the_seed_alone(tmp_path: Path) -> None:
    model = make_model("Recording-v0")
    # Without noise, no action is anything but 0
    with th.no_grad():
        for parameter in model.actor.parameters():
            parameter.zero_()
    model.save(tmp_path / "model")
    RecordingEnv.made.clear()
    first, again, other = (calibration.measure(tmp_path / "model", "Recording-v0", "algd-ve", seed, 3) for seed in (0, 0, 1))
    actions = [np.array(source.given)[:, 1] for source in RecordingEnv.made]
    assert all(np.std(given) > 0.01 for given in actions)
    assert first == again
    assert first["paid"] != other["paid"]


def test_the_error_is_that_of_the_mean_over_all_steps() -> None:
    alike = [np.full(4, value) for value in (1.0, 2.0, 6.0)]
    assert calibration.error_of_mean(alike) == pytest.approx(np.std([1, 2, 6], ddof=1) / np.sqrt(3))
    # A short episode counts for as little in the error as in the mean
    assert calibration.error_of_mean([np.zeros(801)] * 19 + [np.ones(1)]) < 1e-3
    assert np.isnan(calibration.error_of_mean([np.ones(3)]))


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    task = "SteadyCostLimited-v0"
    arguments = ["--tasks", task, "--results", str(tmp_path)]
    with pytest.raises(SystemExit, match="--save"):
        calibration.main(arguments)
    model = make_model(task)
    place(model, tmp_path / task / "sac")
    (tmp_path / task / "sac" / "settings.yaml").write_text("algorithm: sac")
    with pytest.raises(SystemExit, match="no cost critic"):
        calibration.main([*arguments, "--algorithms", "sac"])
    model.cost_gamma = 0.99
    place(model, tmp_path / task / "algd-ve")
    with pytest.raises(SystemExit, match="shorter than"):
        calibration.main(arguments)
    model.cost_gamma = 1.0
    place(model, tmp_path / task / "algd-ve")
    with pytest.raises(SystemExit, match="discounted"):
        calibration.main(arguments)
    assert not (tmp_path / task / "algd-ve" / "calibration.csv").exists()
    assert plot.calibration_table(tmp_path, {task: ["algd-ve"]}) is None
