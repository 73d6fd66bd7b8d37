"""
Checkpoints from which training goes on exactly: after :func:`resume` every weight is, bit for bit on a CPU, what it would have
been without the interruption.

Running environments cannot be stored. So storing a checkpoint ends the running episodes, as a time limit would, and resets the
environments with a seed that is stored too, whether or not training is interrupted later.

A checkpoint is a folder::

    checkpoint.json             names the files that belong together, with their SHA-256; replaced last, in one step
    checkpoint.copy.json        the same once more
    checkpoint.lock             locked by the running training
    model_<run>_<n>.zip         what ``model.save()`` stores
    state_<run>_<n>.pkl         random generators, VecNormalize, callbacks, what changes inside the replay buffer
    buffer_<run>_<n>.pkl        transitions that are new since the checkpoint before; all of these make up the replay buffer
    buffer_<run>_<n>.pkl.parity what a damaged one is repaired from

The checkpoint before is kept too, for the case that the newest is damaged. Like every file that Stable-Baselines3 loads, these
contain pickled objects: open only those that you trust.
"""

import pickle
import pydoc
import uuid
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback, CallbackList
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback

from sb3_algd.common.arguments import check_arguments, whole
from sb3_algd.common.buffers import CostStorage
from sb3_algd.common.checkpoint_files import (
    PARITY,
    choose_checkpoint,
    files_of,
    manifest_content,
    read_manifest,
    remove_others,
    replace_manifest,
    write_durably,
    write_parity,
)
from sb3_algd.common.checkpoint_state import (
    as_list,
    buffer_rows,
    buffer_state,
    callbacks_in,
    load_buffer,
    original_observation,
    plain_attributes,
    plain_values,
    plan_buffer,
    restart_episodes,
    same_observation,
    saved_model,
)
from sb3_algd.common.constrained_off_policy_algorithm import ConstrainedOffPolicyAlgorithm
from sb3_algd.common.guards import all_finite, warn_user
from sb3_algd.common.random_state import get_random_state, set_random_state
from sb3_algd.common.run_lock import RunLock

#: What the logger will write at its next dump
_LOGGER_STATE = ("name_to_value", "name_to_count", "name_to_excluded")


class ResumableCheckpointCallback(BaseCallback):
    """
    Store checkpoints for :func:`resume` in ``save_path``: the newest one and the one before.

    The folder belongs to one run, which locks it while it trains: a second one, or a second :func:`resume`, is refused. A
    kill at any moment, also while a checkpoint is being stored, leaves a complete one behind. Episodes that run when a
    checkpoint is stored end there (see the module), so make ``save_freq`` many times the length of an episode.
    Other callbacks are told of it by a call of their method ``episodes_restarted()``, if they have one.

    :param save_freq: Environment steps of all environments together between two checkpoints. One more is stored at the end.
    :param save_path: Folder of the checkpoint.
    :param verbose: Verbosity level: 0 for no output, 2 for indicating when a checkpoint was stored
    """

    model: ConstrainedOffPolicyAlgorithm

    def __init__(self, save_freq: int, save_path: str | Path, verbose: int = 0) -> None:
        super().__init__(verbose)
        check_arguments({"save_freq": save_freq}, {"save_freq": whole(1)})
        self.save_freq = save_freq
        self.save_path = Path(save_path)
        #: What resume() leaves to be done when training is about to go on
        self._pending: dict[str, Any] | None = None
        self._manifest: dict[str, Any] | None = None
        #: The replay buffer that the manifest's files belong to
        self._stored_buffer: CostStorage | None = None
        self._number = 0
        #: Part of the names of all files that this object writes
        self._run = uuid.uuid4().hex[:8]
        self._lock = RunLock(self.save_path)
        #: The manifest that should be there when the next checkpoint is stored
        self._expected: bytes | None = None
        #: Data of the other callbacks, as they were at the start and where that has changed
        self._initial_states: dict[str, dict[str, Any]] = {}
        self._kept_states: dict[str, dict[str, Any]] = {}

    def _init_callback(self) -> None:
        if not isinstance(self.model, ConstrainedOffPolicyAlgorithm):
            raise ValueError(
                f"{type(self).__name__} stores the algorithms of sb3_algd only; use Stable-Baselines3's CheckpointCallback "
                f"for {type(self.model).__name__}."
            )
        self.save_path.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        self._started = False
        if self._manifest is None:
            self._expected = manifest_content(self.save_path)
            if self._expected is not None:
                # Its files stay until it is replaced
                warn_user(
                    f"{self.save_path} holds a checkpoint of an earlier run, which the first one of this run will replace. "
                    "To go on with the earlier run: sb3_algd.common.checkpoint.resume(...)."
                )

    def _on_training_start(self) -> None:
        self._last_stored = self.num_timesteps

    def _on_rollout_start(self) -> None:
        # Between the updates and the next step: everything that was seen is stored and learned from
        if not self._started:
            self._started = True
            # Now, because others prepare themselves when training starts
            for name, callback in self._others().items():
                self._initial_states.setdefault(name, plain_attributes(callback))
            if self._pending is not None:
                self._finish_resuming(self._pending)
        if self.model.num_timesteps - self._last_stored >= self.save_freq:
            self.store()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        if self._pending is not None:
            # A resumed run that was complete already has not started again
            self._finish_resuming(self._pending)
        if self._started and self._last_stored < self.model.num_timesteps:
            self.store()
        self._lock.release()

    def store(self) -> None:
        """
        Store a checkpoint now, between two rollouts.

        :raises FloatingPointError: If the model's weights are not finite; the checkpoint before stays
        :raises OSError: If it cannot be written, for instance on a full disk; the checkpoint before stays
        :raises RuntimeError: If another run has stored a checkpoint in the folder, which stays
        """
        model = self.model
        assert model.replay_buffer is not None
        if not all_finite(model.get_parameters()):
            raise FloatingPointError(
                f"The weights are not finite at step {model.num_timesteps}: training has diverged. {self._stays()}"
            )
        model.replay_buffer.end_episodes()
        seed = int(np.random.randint(2**31))
        restart_episodes(model, seed)
        for callback in self._others().values():
            # One that adds up over an episode would not notice, because no episode is done
            if hasattr(callback, "episodes_restarted"):
                callback.episodes_restarted()
        state = {
            "seed": seed,
            "observation": original_observation(model),
            "last_obs": model._last_obs,
            "vec_normalize": None if model._vec_normalize_env is None else model._vec_normalize_env.__getstate__(),
            "buffer": buffer_state(model.replay_buffer),
            "callbacks": self._callback_states(),
            "logger": {name: plain_values(getattr(self.logger, name)) for name in _LOGGER_STATE},
            "random": get_random_state(model.device),
        }
        number = self._number + 1
        stored = None if self._manifest is None else self._manifest["buffer"]
        buffer, new_rows = plan_buffer(
            model.replay_buffer,
            stored if self._stored_buffer is model.replay_buffer else None,
            f"buffer_{self._run}_{number}.pkl",
        )
        manifest: dict[str, Any] = {
            "number": number,
            "num_timesteps": model.num_timesteps,
            "n_envs": model.n_envs,
            # Its name, because a class that was defined in the training program is found nowhere else
            "model_class": f"{type(model).__module__}.{type(model).__qualname__}",
            "save_freq": self.save_freq,
            "run": self._run,
            "model": f"model_{self._run}_{number}.zip",
            "state": f"state_{self._run}_{number}.pkl",
            "buffer": buffer,
        }
        writers: dict[str, Callable[[Any], Any]] = {
            manifest["model"]: lambda file: file.write(saved_model(model)),
            manifest["state"]: lambda file: pickle.dump(state, file, protocol=5),
        }
        if len(new_rows) > 0:
            rows = {key: array[new_rows] for key, array in buffer_rows(model.replay_buffer).items()}
            writers[buffer["files"][-1]["name"]] = lambda file: pickle.dump((new_rows, rows), file, protocol=5)
        self._write(manifest, writers)
        self._number, self._manifest, self._stored_buffer = number, manifest, model.replay_buffer
        self._last_stored = model.num_timesteps
        if self.verbose >= 2:
            print(f"Stored checkpoint at {model.num_timesteps} steps in {self.save_path}")

    def _write(self, manifest: dict[str, Any], writers: dict[str, Callable[[Any], Any]]) -> None:
        """Write the files, then the manifest that makes them the checkpoint, then remove what is no longer needed."""
        if self._lock.lost or manifest_content(self.save_path) != self._expected:
            raise RuntimeError(
                f"The checkpoint in {self.save_path} is no longer the one of this run: another run has stored its own in this "
                f"folder, or it was removed. Nothing was stored at step {manifest['num_timesteps']}. Give each run a "
                "save_path of its own."
            )
        before = self._manifest or {}
        described: dict[str, dict[str, Any]] = before.get("files", {})
        manifest["files"] = {name: described[name] for name in files_of(manifest) if name in described}
        manifest["previous"] = {name: value for name, value in before.items() if name not in ("previous", "digest")} or None
        written: list[Path] = []
        try:
            for name, writer in writers.items():
                path = self.save_path / name
                written.append(path)
                manifest["files"][name] = {"sha256": write_durably(path, writer), "size": path.stat().st_size}
                if name.startswith("buffer_"):
                    # The checkpoint before, which replaces a damaged one, needs the same rows
                    written.append(self.save_path / f"{name}{PARITY}")
                    write_durably(written[-1], partial(write_parity, path))
            replace_manifest(self.save_path, manifest, written)
        except OSError as error:
            for path in written:
                path.unlink(missing_ok=True)
            raise OSError(
                error.errno,
                f"Could not store the checkpoint of step {manifest['num_timesteps']} in {self.save_path}: {error.strerror}. "
                f"{self._stays()} Make room, then resume.",
            ) from error
        self._expected = manifest_content(self.save_path)
        remove_others(self.save_path, manifest, None if self._lock.held else self._run)

    def _stays(self) -> str:
        if self._manifest is None:
            return "There is no earlier checkpoint of this run."
        return f"The checkpoint of step {self._manifest['num_timesteps']} stays."

    def _take_up(
        self,
        env: GymEnv,
        device: th.device | str,
        custom_objects: dict[str, Any] | None,
        model_class: type[ConstrainedOffPolicyAlgorithm] | None,
    ) -> ConstrainedOffPolicyAlgorithm:
        """Load the model of the newest checkpoint that is not damaged, see :func:`resume`; the rest follows in ``learn()``."""
        path = self.save_path
        manifest = choose_checkpoint(path)
        # Version 0.1.0 has not noted the class
        name = manifest.get("model_class", "")
        found: Any = model_class or (pydoc.locate(name) if name else None)
        if found is None:
            raise ValueError(
                f"The class of the model in {path}, {name or 'which is not noted'}, cannot be found: give model_class."
            )
        model: ConstrainedOffPolicyAlgorithm = found.load(
            path / manifest["model"], env, device, custom_objects, force_reset=False
        )
        if model.n_envs != manifest["n_envs"]:
            raise ValueError(f"The interrupted run had {manifest['n_envs']} environment(s), not {model.n_envs}: give as many.")
        with (path / manifest["state"]).open("rb") as file:
            state = pickle.load(file)
        assert model.replay_buffer is not None
        load_buffer(model.replay_buffer, state["buffer"], [path / file["name"] for file in manifest["buffer"]["files"]])
        self._pending, self._number = state, manifest["number"]
        self._manifest, self._stored_buffer = manifest, model.replay_buffer
        self._expected = manifest_content(path)
        return model

    # --- the other callbacks ---------------------------------------------------------------------------------------------

    def _others(self) -> dict[str, BaseCallback]:
        """All other callbacks of this training, by class and order."""
        found: dict[str, BaseCallback] = {}
        counts: Counter[str] = Counter()
        for callback in callbacks_in(self.locals["callback"]):
            name = type(callback).__qualname__
            if callback is not self:
                found[f"{name}_{counts[name]}"] = callback
                counts[name] += 1
        return found

    def _callback_states(self) -> dict[str, dict[str, Any]]:
        """What has changed in the other callbacks since the very start: counts and results, not the user's settings."""
        for name, callback in self._others().items():
            initial = self._initial_states.get(name, {})
            kept = self._kept_states.setdefault(name, {})
            for key, value in plain_attributes(callback).items():
                if key in kept or pickle.dumps(value) != pickle.dumps(initial.get(key)):
                    kept[key] = value
        return self._kept_states

    def _finish_resuming(self, state: dict[str, Any]) -> None:
        """Bring everything outside the model to where it was when the checkpoint was stored."""
        model = self.model
        vec_normalize = model._vec_normalize_env
        if (vec_normalize is None) != (state["vec_normalize"] is None):
            raise ValueError(
                f"The environment of the interrupted run was {'not ' if vec_normalize is not None else ''}wrapped in "
                "VecNormalize: wrap it the same way. (The statistics are in the checkpoint.)"
            )
        restart_episodes(model, state["seed"])
        if same_observation(original_observation(model), state["observation"]):
            model._last_obs = state["last_obs"]
        else:
            warn_user(
                "After a reset with the stored seed the environment starts elsewhere than in the interrupted run. Training "
                "goes on, but not exactly as without the interruption: make the environment as before, and let it draw from "
                "its own generator (self.np_random) only."
            )
        if vec_normalize is not None:
            vec_normalize.__dict__.update(state["vec_normalize"])
            model._last_original_obs = vec_normalize.get_original_obs()
        self._pending, self._kept_states = None, state["callbacks"]
        others = self._others()
        for name, attributes in self._kept_states.items():
            if name in others:
                others[name].__dict__.update(pickle.loads(pickle.dumps(attributes)))
        for name, values in state["logger"].items():
            getattr(self.logger, name).update(values)
        set_random_state(state["random"], model.device)


def resume(
    path: str | Path,
    env: GymEnv,
    callback: MaybeCallback = None,
    total_timesteps: int | None = None,
    log_interval: int = 4,
    tb_log_name: str | None = None,
    progress_bar: bool = False,
    device: th.device | str = "auto",
    custom_objects: dict[str, Any] | None = None,
    model_class: type[ConstrainedOffPolicyAlgorithm] | None = None,
) -> ConstrainedOffPolicyAlgorithm:
    """
    Go on with a training that was interrupted, from its last checkpoint to its end.

    The rest of the training is the same as without the interruption if everything given here is as it was in the interrupted
    run. Callbacks take up their counts and results again (numbers, texts, arrays, and lists or dictionaries of these).

    :param path: Folder of the checkpoint, ``save_path`` of the :class:`ResumableCheckpointCallback`
    :param env: The environment, made and wrapped as in the interrupted run
    :param callback: The callbacks of the interrupted run. A :class:`ResumableCheckpointCallback` for ``path`` is added where
        there is none: further checkpoints are part of what happened without the interruption.
    :param total_timesteps: Number of steps of the whole training. None for what the interrupted ``learn()`` was to reach
    :param log_interval: see ``learn()``
    :param tb_log_name: see ``learn()``. None for the name of the algorithm
    :param progress_bar: see ``learn()``
    :param device: Device of the model
    :param custom_objects: see ``load()``
    :param model_class: Class of the model. None for the class that the interrupted run had
    :return: The trained model
    :raises FileNotFoundError: If there is no checkpoint
    :raises RuntimeError: If another run uses the folder
    :raises ValueError: If the checkpoint and the one before are damaged, the number of environments is another one, or the
        class of the model is not known
    """
    path = Path(path)
    manifest = read_manifest(path)
    callbacks = as_list(callback)
    mine = [
        candidate
        for given in callbacks
        for candidate in callbacks_in(given)
        if isinstance(candidate, ResumableCheckpointCallback) and candidate.save_path.resolve() == path.resolve()
    ]
    if not mine:
        mine = [ResumableCheckpointCallback(manifest["save_freq"], path)]
        callbacks += mine
    mine[0]._lock.acquire()
    try:
        model = mine[0]._take_up(env, device, custom_objects, model_class)
        if total_timesteps is None:
            total_timesteps = model._total_timesteps
        return model.learn(
            max(int(total_timesteps) - model.num_timesteps, 0),
            CallbackList(callbacks),
            log_interval,
            tb_log_name or type(model).__name__,
            reset_num_timesteps=False,
            progress_bar=progress_bar,
        )
    finally:
        mine[0]._lock.release()
