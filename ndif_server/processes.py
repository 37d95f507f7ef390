"""Finds and ends the processes of a stack.

Every process that the launcher starts carries the stack's id in its environment, and so does what it starts in turn,
wherever that hangs in the process tree. A few overwrite the memory in which the kernel shows their environment (Ray's
dashboard, Postgres' workers, to write a title there): they are found as descendants of one that carries the id, or in
its session, since every service is started in a session of its own.
"""

import contextlib
import ipaddress
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil


class StackError(Exception):
    """Something that the user should read, without a traceback."""


def carried(pid: int) -> dict[str, str]:
    """The stack's variables in the environment of a process; none where it is gone or not ours to read."""
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(os.fsdecode(p).split("=", 1) for p in pairs if p.startswith(b"NDIF_STACK_") and b"=" in p)


def members(stack_id: str, service: str | None = None) -> list[psutil.Process]:
    """All living processes of a stack, or of one of its services."""
    parents: dict[int, int] = {}
    sessions: dict[int, int] = {}
    found: set[int] = set()
    for process in psutil.process_iter(["pid", "ppid", "status"]):
        pid = process.pid
        if process.info["status"] == psutil.STATUS_ZOMBIE:
            continue
        try:
            parents[pid], sessions[pid] = process.info["ppid"], os.getsid(pid)
        except OSError:
            continue
        mark = carried(pid)
        if mark.get("NDIF_STACK_ID") == stack_id and service in (None, mark.get("NDIF_STACK_SERVICE")):
            found.add(pid)
    own = {os.getpid(), *(p.pid for p in psutil.Process().parents())}
    shared = {sessions[pid] for pid in found} - {os.getsid(0)}
    found |= {pid for pid, session in sessions.items() if session in shared}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    alive = []
    for pid in sorted(found - own):
        try:
            alive.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    return alive


def outer_ports(processes: list[psutil.Process]) -> list[str]:
    """Where these processes can be reached from beyond this machine."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections("tcp"):
                address = connection.laddr.ip.removeprefix("::ffff:")
                if connection.status == psutil.CONN_LISTEN and not ipaddress.ip_address(address).is_loopback:
                    found.add(f"{connection.laddr.ip} {connection.laddr.port}")
    return sorted(found)


def end(find: Callable[[], list[psutil.Process]], grace: float = 5) -> int:
    """End processes by SIGTERM, and after the grace by SIGKILL, until none is found; say how many there were."""
    seen: set[int] = set()
    deadline = time.monotonic() + grace + 20
    polite = grace > 0
    while processes := find():
        seen |= {process.pid for process in processes}
        if time.monotonic() > deadline:
            raise StackError(f"these processes do not end: {sorted(p.pid for p in processes)}")
        for process in processes:
            try:
                process.terminate() if polite else process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(processes, timeout=grace if polite else 2)
        polite = False
    return len(seen)


def spawn(
    command: list[str],
    environment: dict[str, str],
    log: Path,
    folder: Path,
    before: Callable[[], None] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, with its output in a log; before is called in it first."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=folder,
            preexec_fn=before,
        )


def tail(log: Path, lines: int = 25) -> str:
    """The end of a log, for an error message."""
    try:
        text = log.read_text(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        text = []
    return "\n".join(["", f"the end of {log}:", *(f"    {line}" for line in text or ["(empty)"])])


def wait_for(
    what: str, healthy: Callable[[], bool], log: Path, limit: float, process: subprocess.Popen[bytes] | None = None
) -> float:
    """Wait until a service answers; say how many seconds it took."""
    start = time.monotonic()
    while (waited := time.monotonic() - start) < limit:
        if process is not None and process.poll() is not None:
            raise StackError(f"{what} ended with status {process.returncode}{tail(log)}")
        try:
            if healthy():
                return waited
        except Exception:  # refused, reset, half an answer: not up yet
            pass
        time.sleep(0.2)
    raise StackError(f"{what} was not up within {limit:.0f} s{tail(log)}")
