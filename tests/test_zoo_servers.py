"""Tuning with real database servers: workers that start at once, and one that is killed in the middle of a trial."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rl_zoo3")

import optuna
import sqlalchemy
from optuna.trial import TrialState

from sb3_algd.zoo import storage
from sb3_algd.zoo.train import train
from tests.test_zoo_tuning import OPTIONS

#: Debian keeps the commands of PostgreSQL's server out of the path
PLACES = (*os.environ["PATH"].split(os.pathsep), *map(str, Path("/usr/lib/postgresql").glob("*/bin")), "/usr/sbin")
#: Neither server wants to run as root
USER = "nobody" if os.geteuid() == 0 else None
HEARTBEAT_SECONDS, GRACE_SECONDS = 1, 4


def find(command: str) -> str:
    """:param command: Of a server. :return: Its path; the test is skipped where there is none."""
    found = shutil.which(command, path=os.pathsep.join(PLACES))
    if found is None:
        pytest.skip(f"{command} is missing. On Debian: apt-get install postgresql mariadb-server-core mariadb-client-core")
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def postgresql(folder: Path, port: int) -> tuple[list[str], list[str], str]:
    """:return: What makes the server's files, the server, and the address of its maintenance database."""
    data = str(folder / "data")
    initdb = [find("initdb"), "-D", data, "-U", "tuner", "-A", "trust", "-E", "UTF8", "--no-sync"]
    options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": str(folder), "fsync": "off"}
    server = [find("postgres"), "-D", data, "-p", str(port)]
    server += [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
    return initdb, server, f"postgresql+psycopg://tuner@127.0.0.1:{port}/postgres"


def mariadb(folder: Path, port: int) -> tuple[list[str], list[str], str]:
    """:return: As for PostgreSQL. It takes the place of MySQL in Debian, and speaks its protocol."""
    find("my_print_defaults")  # which the next one calls
    data = f"--datadir={folder / 'data'}"
    install = [find("mariadb-install-db"), "--no-defaults", data, "--auth-root-authentication-method=normal"]
    install += ["--skip-test-db", *([] if USER is None else [f"--user={USER}"])]
    server = [find("mariadbd"), "--no-defaults", data, f"--port={port}", "--bind-address=127.0.0.1"]
    server += [f"--socket={folder / 'socket'}", f"--pid-file={folder / 'pid'}"]
    return install, server, f"mysql+pymysql://root@127.0.0.1:{port}/mysql"


@pytest.fixture(scope="module", params=[postgresql, mariadb])
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of the maintenance database of a server that runs as long as the tests of this file."""
    drivers = {postgresql: "psycopg", mariadb: "pymysql"}
    pytest.importorskip(drivers[request.param])
    # Not a folder of pytest's, which other users cannot enter
    with tempfile.TemporaryDirectory(prefix="sb3_algd_") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        if USER is not None:
            shutil.chown(folder, USER)
        prepare, command, address = request.param(folder, free_port())
        log = stack.enter_context((folder / "log").open("w"))
        options: dict[str, Any] = dict(cwd=folder, user=USER, stdout=log, stderr=subprocess.STDOUT)
        subprocess.run(prepare, check=True, **options)
        process = subprocess.Popen(command, **options)
        try:
            wait_until(lambda: can_connect(address, process, folder / "log"))
            yield address
        finally:
            # PostgreSQL then does not wait for its clients
            process.send_signal(signal.SIGQUIT)
            process.wait(timeout=30)


def can_connect(address: str, process: subprocess.Popen, log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    try:
        sqlalchemy.create_engine(address).connect().close()
    except sqlalchemy.exc.OperationalError:
        return False
    return True


@pytest.fixture
def database(server: str, request: pytest.FixtureRequest) -> str:
    """The address of an empty database."""
    name = f"studies_{os.urandom(4).hex()}"
    engine = sqlalchemy.create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return f"{server.rpartition('/')[0]}/{name}"


def wait_until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """:return: What the condition gave when it was true."""
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        if result := condition():
            return result
        time.sleep(0.1)
    raise TimeoutError


def create(database: str, start: Any, errors: Any) -> None:
    start.wait()
    try:
        storage.create_study(optuna.create_study, storage=database, study_name="s", load_if_exists=True)
    except Exception as error:  # noqa: BLE001
        errors.put(repr(error))


def start_at_once(database: str) -> None:
    context: Any = multiprocessing.get_context("fork")
    start, errors = context.Barrier(4), context.SimpleQueue()
    workers = [context.Process(target=create, args=(database, start, errors)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert errors.empty(), errors.get()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert [study.study_name for study in optuna.get_all_study_summaries(database)] == ["s"]


def test_workers_that_start_at_once_share_a_study(database: str) -> None:
    start_at_once(database)


def test_workers_that_start_at_once_share_a_file(tmp_path: Path) -> None:
    start_at_once(f"sqlite:///{tmp_path / 'study.db'}")


def start_worker(folder: Path, database: str, *options: str) -> subprocess.Popen:
    """:return: A worker that is ready, and begins when it gets a line."""
    program = (
        f"from sb3_algd.zoo import storage, train; storage.HEARTBEAT_SECONDS = {HEARTBEAT_SECONDS}; "
        f"storage.GRACE_SECONDS = {GRACE_SECONDS}; input(); train.train()"
    )
    command = [sys.executable, "-c", program, *OPTIONS, "cost_limit:1000.0", "--storage", database]
    command += ["--study-name", "s", "--max-total-trials", "3", *options]
    pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return subprocess.Popen(command, cwd=folder, text=True, bufsize=1, **pipes)


@pytest.mark.parametrize(
    "address, message",
    [
        (
            "mysql+pymysql://root:secret@127.0.0.1:1/studies",
            r"The database of --storage cannot be used: .*127\.",
        ),
        (
            "nothing://root:secret@127.0.0.1/studies",
            "`--storage` must be a .log file or the address of a database: ",
        ),
        ("studies", "`--storage` must be a .log file or the address of a database: "),
    ],
)
def test_a_storage_that_cannot_be_used_ends_in_one_line(monkeypatch: pytest.MonkeyPatch, address: str, message: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *OPTIONS, "--storage", address, "--study-name", "s"])
    with pytest.raises(SystemExit, match=f"^{message}") as error:
        train()
    assert "secret" not in str(error.value)


def begin(worker: subprocess.Popen) -> None:
    assert worker.stdin is not None
    worker.stdin.write("\n")
    worker.stdin.flush()


def test_the_trial_of_a_worker_that_was_killed_fails_and_is_made_up_for(database: str, tmp_path: Path) -> None:
    # What an earlier worker has begun
    study = storage.create_study(optuna.create_study, database, study_name="s", direction="maximize")

    def states() -> list[TrialState]:
        return [trial.state for trial in study.get_trials(deepcopy=False)]

    # The trial of the first one is longer than this test
    first, second = workers = [start_worker(tmp_path, database, "-n", steps) for steps in ("1000000", "100")]
    try:
        begin(first)
        wait_until(lambda: TrialState.RUNNING in states() or first.poll() is not None)
        assert first.poll() is None, first.communicate()[0]
        begin(second)
        wait_until(lambda: TrialState.COMPLETE in states() or second.poll() is not None)
        os.kill(first.pid, signal.SIGKILL)
        output, _ = second.communicate(timeout=120)
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    assert second.returncode == 0, output
    assert [(trial.number, trial.state.name) for trial in study.trials] == [(0, "FAIL"), *((i, "COMPLETE") for i in (1, 2, 3))]
    (report,) = (tmp_path / "logs" / "algd").glob("tuning_*.md")
    assert "4 trials: 3 complete, 0 pruned, 1 fail" in report.read_text()
