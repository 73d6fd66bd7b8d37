"""Studies that several workers share: their tables, and trials whose worker has died."""

import random
import time
import warnings
from collections.abc import Callable
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.study import MaxTrialsCallback
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import ArgumentError, IntegrityError, OperationalError, ProgrammingError

#: How often to try to make the tables of a new database, and the longest pause in between
ATTEMPTS, PAUSE_SECONDS = 10, 2.0
#: How often a worker writes into the database that its trial is alive
HEARTBEAT_SECONDS = 20
#: After how long a silence the trial has failed
GRACE_SECONDS = 120
#: What takes a place of ``--max-total-trials``, as in the Zoo
COUNTED = (TrialState.COMPLETE, TrialState.RUNNING, TrialState.PRUNED)


def create_study(create: Callable[..., optuna.Study], storage: str | BaseStorage | None, **kwargs: Any) -> optuna.Study:
    """
    Create a study, or load it. In a database, workers say that they are alive.

    :param create: ``optuna.create_study``
    :param storage: Where the study is: nowhere else, the address of a database, or a storage
    :param kwargs: Other arguments of ``create``
    :return: The study
    :raises ConnectionError: If the database cannot be used
    :raises ValueError: If this is no address of a database
    """
    # Not the generator that --seed sets, or all workers would come again at the same time
    pause = random.Random()
    attempt = 1
    while True:
        try:
            return create(storage=_with_heartbeat(storage), **kwargs)
        except ArgumentError as error:
            raise ValueError(f"`--storage` must be a .log file or the address of a database: {error}") from error
        except (IntegrityError, OperationalError, ProgrammingError) as error:
            # Of workers that start at once on an empty database only one can make each of Optuna 5.0's tables: PostgreSQL
            # says so with the first and the last of these, SQLite and MySQL with the second
            if error.statement is None or attempt == ATTEMPTS:
                # Without the address, which may have a password in it
                raise ConnectionError(f"The database of --storage cannot be used: {error.orig}") from error
            attempt += 1
            time.sleep(pause.uniform(0, PAUSE_SECONDS))


def _with_heartbeat(storage: str | BaseStorage | None) -> BaseStorage | None:
    if not isinstance(storage, str):
        return storage
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return RDBStorage(storage, heartbeat_interval=HEARTBEAT_SECONDS, grace_period=GRACE_SECONDS)


def fail_dead_trials(study: optuna.Study) -> None:
    """:param study: A study. Trials whose workers have died fail, where the storage knows of it: a journal file does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)


def is_full(study: optuna.Study, max_trials: int) -> bool:
    """
    Whether a study has all its trials. If some of them are running, this waits for as long as it takes to tell the dead.

    :param study: The study
    :param max_trials: How many trials it is to have
    :return: Whether it has as many
    """
    deadline = time.monotonic() + GRACE_SECONDS + HEARTBEAT_SECONDS
    while True:
        fail_dead_trials(study)
        states = [trial.state for trial in study.get_trials(deepcopy=False, states=COUNTED)]
        if len(states) < max_trials:
            return False
        if TrialState.RUNNING not in states or not isinstance(study._storage, BaseHeartbeat) or time.monotonic() > deadline:
            return True
        time.sleep(HEARTBEAT_SECONDS / 4)


class MaxLiveTrialsCallback(MaxTrialsCallback):
    """Stops a worker where the study has all its trials, without those of workers that have died."""

    def __call__(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """
        :param study: The study
        :param trial: The trial that has ended
        """
        if is_full(study, self._n_trials):
            study.stop()
