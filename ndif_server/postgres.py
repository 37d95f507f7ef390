"""The database of keys, without which NDIF's API asks for none: a Postgres from the wheel of pgserver."""

import contextlib
import ctypes
import importlib.util
import os
import secrets
import shutil
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path

from . import namespace
from .processes import StackError, spawn, tail, wait_for
from .settings import Settings

NOBODY = 65534
IPC_RMID = 0
# The columns that NDIF's query for a key reads.
TABLES = """
CREATE TABLE users (user_id uuid PRIMARY KEY, email text);
CREATE TABLE user_tags (user_tag_id uuid PRIMARY KEY, name text UNIQUE NOT NULL);
CREATE TABLE keys (key_id uuid PRIMARY KEY, user_id uuid NOT NULL REFERENCES users);
CREATE TABLE key_user_tag_assignments (
    key_id uuid REFERENCES keys, user_tag_id uuid REFERENCES user_tags, PRIMARY KEY (key_id, user_tag_id)
);
"""


def executable(name: str) -> str:
    """A program in pgserver's wheel. The package is not imported: that makes folders and locks outside the state's."""
    spec = importlib.util.find_spec("pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise StackError("the server's environment lacks pgserver, which the database of keys comes from")
    return str(Path(next(iter(spec.submodule_search_locations))) / "pginstall" / "bin" / name)


def become_nobody() -> None:
    """Look like an ordinary user, who owns what root owns."""
    namespace.unshare_user(NOBODY, NOBODY)


def drop_rights() -> None:
    """Be an ordinary user."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def disguise(data: Path) -> Callable[[], None] | None:
    """What a new process must do so that Postgres, which refuses to run as root, runs in it."""
    if os.geteuid() != 0:
        return None
    if namespace.works(become_nobody):
        return become_nobody
    os.chown(data, NOBODY, NOBODY)  # here the database's folder and programs must be within everyone's reach
    return drop_rights


def forget(settings: Settings) -> None:
    """Give back the shared memory of a database that was killed: unlike all else, the kernel keeps it."""
    with contextlib.suppress(OSError, IndexError, ValueError):  # it stopped by itself, or never ran
        note = (settings.state / "postgres" / "postmaster.pid").read_text().splitlines()
        ctypes.CDLL(None).shmctl(int(note[6].split()[1]), IPC_RMID, None)


def start(settings: Settings) -> dict[str, str]:
    """Start a new database with one known key, and return the key and the database's address."""
    data, log = settings.state / "postgres", settings.log("postgres")
    port, password, key = settings.ports["postgres"], secrets.token_hex(16), str(uuid.uuid4())
    environment = settings.server_environment("postgres")
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True, mode=0o700)
    hook = disguise(data)

    def run(command: list[str], text: str, before: Callable[[], None] | None = None) -> None:
        with log.open("ab") as out:
            done = subprocess.run(
                command, env=environment, cwd=data, input=text.encode(), stdout=out, stderr=out, preexec_fn=before
            )
        if done.returncode:
            raise StackError(f"{Path(command[0]).name} ended with status {done.returncode}{tail(log)}")

    run(
        [executable("initdb"), "-D", str(data), "-U", "ndif", "-A", "scram-sha-256", "--pwfile=/dev/stdin"],
        password,
        hook,
    )
    options = {
        "listen_addresses": "127.0.0.1",
        "port": port,
        "unix_socket_directories": "",
        "dynamic_shared_memory_type": "mmap",  # in its folder, so that nothing stays in /dev/shm when it is killed
        "fsync": "off",
    }
    command = [executable("postgres"), "-D", str(data), *(x for k, v in options.items() for x in ("-c", f"{k}={v}"))]
    process = spawn(command, environment, log, data, hook)
    ready = [executable("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
    wait_for("postgres", lambda: subprocess.run(ready, env=environment).returncode == 0, log, 60, process)

    url, user = f"postgresql://ndif:{password}@127.0.0.1:{port}/postgres", uuid.uuid4()
    rows = f"INSERT INTO users VALUES ('{user}', 'someone@example.org'); INSERT INTO keys VALUES ('{key}', '{user}');"
    run([executable("psql"), "-v", "ON_ERROR_STOP=1", "-q", url], TABLES + rows)
    return {"key": key, "url": url}
