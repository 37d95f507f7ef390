"""The command line: SERVER_PY -m ndif_server COMMAND, from the root of the repository."""

# ruff: noqa: T201 (a program for the command line prints)

import argparse
import ctypes
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from . import namespace, stack
from .processes import StackError
from .services import SERVICES
from .settings import ACTORS, MODELS, Settings, default_state, ports_from

SET_PDEATHSIG = 1


def assignment(text: str) -> tuple[str, str]:
    """A NAME=VALUE of the command line."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m ndif_server", description="A real NDIF server on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--state", type=Path, default=default_state(), metavar="DIR", help="default: %(default)s")
        return command

    def add_start(name: str, text: str) -> argparse.ArgumentParser:
        command = add(name, text)
        command.add_argument("--actor", choices=list(ACTORS), default="process", help="where a request's code runs")
        command.add_argument("--dtype", default="float32", help="number format of the models (default: %(default)s)")
        command.add_argument("--models", type=Path, default=MODELS, metavar="DIR", help="default: %(default)s")
        command.add_argument("--port-base", type=int, metavar="N", help="take ports in a row from N on")
        add_set(command)
        return command

    def add_set(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--set", type=assignment, action="append", default=[], metavar="NAME=VALUE", help="environment for services"
        )

    add_start("start", "start a stack, and leave it running")
    add("stop", "stop the stack")
    add("status", "services, processes, memory")
    add("env", "shell commands that point a client to the stack")
    add("kill", "end a service at once").add_argument("name", choices=[*SERVICES, "postgres"])
    command = add("restart", "start a service again")
    command.add_argument("name", choices=list(SERVICES))
    add_set(command)
    add("auth", "ask for keys or not; prints a valid key").add_argument("switch", choices=["on", "off"])
    command = add_start("run", "start a stack in a network of its own, run a command with it, and stop it")
    command.add_argument("--no-namespace", action="store_true", help="stay in the machine's network")
    command.add_argument("client", nargs="+", metavar="COMMAND", help="after --")
    # all behind the first -- is the command's own
    head, tail = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    return parser.parse_args([*head, "--", *tail] if tail else head)


def end_on(signum: int, _frame: FrameType | None) -> None:
    """Leave through every finally."""
    raise SystemExit(128 + signum)


def follow_parent() -> None:
    """Be told to end when the launcher is killed. It runs in the client's process before the client."""
    ctypes.CDLL(None).prctl(SET_PDEATHSIG, signal.SIGTERM)


def run_client(settings: Settings, command: list[str]) -> int:
    """Run the command with a client's environment, and return its exit status."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "NDIF_API_KEY")
    }
    environment |= settings.client_environment()
    environment |= {"NDIF_STACK_DIR": str(settings.state), "NDIF_SERVER_PYTHON": sys.executable}
    try:
        process = subprocess.Popen(command, env=environment, preexec_fn=follow_parent)
    except OSError as error:
        raise StackError(f"cannot run {command[0]}: {error.strerror}") from None
    try:
        status = process.wait()
    except BaseException:  # a signal to the launcher
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
    return 128 - status if status < 0 else status


def run(args: argparse.Namespace, settings: Settings) -> int:
    """Start, run the command, stop."""
    stack.start(settings)
    try:
        return run_client(settings, args.client)
    finally:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)
        stack.stop(settings.state)


def settings_for(args: argparse.Namespace) -> Settings:
    """A new stack's settings, made where it will run: they note the network."""
    if not (args.command == "run" and not args.no_namespace and namespace.enter()):
        stack.say(
            "warning: not in a network namespace: every user of this machine can reach the server, and run code in it"
        )
    return Settings(args.state, args.models, args.actor, args.dtype, dict(ports_from(args.port_base)), dict(args.set))


def main(argv: list[str]) -> int:
    """Do what the command line says."""
    args = parse(argv)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, end_on)
    if args.command == "run":
        return run(args, settings_for(args))
    if args.command == "start":
        settings = settings_for(args)
        stack.start(settings)
        print(settings.url("api"))
    elif args.command == "stop":
        print(f"stopped {stack.stop(args.state)} processes")
    elif args.command == "status":
        print(stack.status(args.state))
    elif args.command == "env":
        for name, value in stack.running(args.state).client_environment().items():
            print(f"export {name}={shlex.quote(value)}")
    elif args.command == "kill":
        print(f"killed {stack.kill(args.state, args.name)} processes")
    elif args.command == "restart":
        stack.restart(args.state, args.name, dict(args.set))
    elif args.command == "auth":
        print(stack.auth(args.state, args.switch == "on") or "no key is asked for")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except StackError as error:
        sys.exit(f"ndif_server: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
