"""Starts, stops, breaks and mends a stack."""

# ruff: noqa: T201 (a program for the command line prints)

import contextlib
import fcntl
import shutil
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from . import postgres
from .processes import StackError, end, members, outer_ports, spawn, tail, wait_for
from .services import SERVICES, controller_command, redis_client, status_is_fresh, taken_ports
from .settings import BIN, Settings, network_namespace

VOLATILE = ("ndif", "postgres", "stack.json")  # the logs and the caches of models stay


def say(text: str) -> None:
    """Tell what goes on; the output proper is for what was asked for."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def locked(state: Path) -> Iterator[None]:
    """One change at a time."""
    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def running(state: Path, here: bool = False) -> Settings:
    """The settings of the stack in this folder; with here, only if this process could reach what it starts there."""
    settings = Settings.load(state)
    if settings is None:
        raise StackError(f"no stack is running in {state}")
    if here and settings.network != network_namespace():
        raise StackError("this stack runs in a network namespace of its own: only the command it was started for can")
    return settings


def end_members(settings: Settings, service: str | None = None, grace: float = 5) -> int:
    """End the processes of the stack or of a service; say how many there were."""
    sockets: set[str] = set()

    def find() -> list[psutil.Process]:
        processes = members(settings.id, service)
        for process in processes:
            with contextlib.suppress(psutil.Error):  # NDIF's sandboxes: their sockets lie in /tmp, whatever TMPDIR says
                sockets.update(word for word in process.cmdline() if word.startswith("/tmp/sbx-"))
        return processes

    count = end(find, grace)
    for socket in sockets:
        Path(socket).unlink(missing_ok=True)
    return count


def check(settings: Settings) -> None:
    """Refuse to start what cannot work."""
    old = Settings.load(settings.state)
    if old is not None and members(old.id):
        raise StackError(f"a stack is running in {settings.state}; stop it first")
    if not any(settings.models.glob("*/*/config.json")):
        raise StackError(
            f"{settings.models} holds no model (ORG/NAME/config.json); `python -m ndif_server.models DIR` makes some"
        )
    if missing := [name for name in ("ray", "gunicorn", "moto_server") if not (BIN / name).exists()]:
        raise StackError(f"{BIN} lacks {', '.join(missing)}: run this with the Python of the server's environment")
    taken = [str(port) for service in SERVICES.values() for port in taken_ports(settings, service)]
    if taken:
        raise StackError(f"ports in use: {', '.join(taken)}; another stack? --port-base takes others")


def launch(settings: Settings, name: str, extra: dict[str, str]) -> Callable[[], None]:
    """Start a service, and return what waits until it is up."""
    begin = time.monotonic()
    service, log = SERVICES[name], settings.log(name)
    environment = settings.server_environment(name) | extra
    Path(settings.ray_temp).mkdir(mode=0o700, exist_ok=True)
    process = spawn(service.command(settings), environment, log, settings.state)

    def wait() -> None:
        wait_for(name, lambda: service.healthy(settings), log, service.limit, process)
        if name == "s3":
            make_bucket(settings)
        if name == "ray":
            start_controller(settings, environment)
        say(f"  {name:<8} up after {time.monotonic() - begin:5.1f} s")

    return wait


def make_bucket(settings: Settings) -> None:
    """Make the bucket of results. NDIF's processes make it once in their life, and S3 may be started again after that."""
    request = urllib.request.Request(f"{settings.url('s3')}/ndif-results", method="PUT")
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10).close()


def start_controller(settings: Settings, environment: dict[str, str]) -> None:
    """Have Ray run NDIF's controller."""
    log = settings.log("controller")
    address = f"127.0.0.1:{settings.ports['ray']}"
    process = spawn(controller_command(settings), environment | {"RAY_ADDRESS": address}, log, settings.state)
    wait_for("controller", lambda: process.poll() is not None, log, 180)
    if process.returncode:
        raise StackError(f"the controller was not started{tail(log)}")


def start(settings: Settings) -> None:
    """Start everything; what was started is stopped again if something fails."""
    with locked(settings.state):
        check(settings)
        begin = time.monotonic()
        shutil.rmtree(settings.state / "logs", ignore_errors=True)
        (settings.state / "ndif").mkdir(exist_ok=True)
        settings.save()
        try:
            for wait in [launch(settings, name, {}) for name in SERVICES]:  # side by side: most of it is imports
                wait()
        except BaseException:
            stop(settings.state)
            raise
        say(f"NDIF is up after {time.monotonic() - begin:.1f} s")
        if outer := outer_ports(members(settings.id)):
            say(
                f"warning: these ports are open to the network on this machine, and whoever reaches them may run programs "
                f"here: {', '.join(outer)}. Close them in the firewall for all but loopback"
            )


def stop(state: Path) -> int:
    """Stop all processes of the stack in this folder, and remove what it leaves but for logs and caches of models."""
    settings = Settings.load(state)
    if settings is None:
        return 0
    count = end_members(settings)
    postgres.forget(settings)
    shutil.rmtree(settings.ray_temp, ignore_errors=True)
    for name in VOLATILE:
        path = settings.state / name
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return count


def kill(state: Path, name: str) -> int:
    """End a service and what it started, with no chance to tidy up."""
    with locked(state):
        settings = running(state)
        return end_members(settings, name, grace=0)


def restart(state: Path, name: str, extra: dict[str, str]) -> None:
    """Start a service again, with more environment until the next time."""
    with locked(state):
        settings = running(state, here=True)
        replace(settings, name, extra)
        if name == "redis":  # the API says only when it connects that Ray is there: a new Redis does not know
            replace(settings, "api", {})
        if name == "ray":
            wait_for("the API's way to Ray", lambda: status_is_fresh(settings), settings.log("api"), 180)


def replace(settings: Settings, name: str, extra: dict[str, str]) -> None:
    """End a service if it runs, and start it."""
    end_members(settings, name)
    if name == "ray":  # else it reads there where it ran, and takes another stack's Ray for its own, still running
        shutil.rmtree(settings.ray_temp, ignore_errors=True)
    if name == "api":  # what the API before it left there would speak for this one
        redis_client(settings).delete("ray:connected")
    launch(settings, name, extra)()


def auth(state: Path, on: bool) -> str | None:
    """Have the API ask for keys, and return one that it knows; or have it ask no more."""
    with locked(state):
        settings = running(state, here=True)
        end_members(settings, "postgres")
        postgres.forget(settings)
        settings.auth = postgres.start(settings) if on else None
        settings.save()
        replace(settings, "api", {})
        return settings.auth["key"] if settings.auth else None


def status(state: Path) -> str:
    """A table of services, their processes and their memory."""
    settings = running(state)
    lines, total = [], 0.0
    for name in (*SERVICES, "postgres"):
        processes, memory = members(settings.id, name), 0.0
        for process in processes:
            with contextlib.suppress(psutil.Error):
                memory += process.memory_full_info().uss / 2**20
        total += memory
        if processes or name != "postgres":
            pids = " ".join(str(process.pid) for process in processes)
            lines.append(f"{name:<9}{'up' if processes else 'down':<6}{memory:6.0f} MiB  {pids}")
    return "\n".join([settings.url("api"), *lines, f"{'total':<15}{total:6.0f} MiB"])
