"""Where a stack lives, which ports it takes, and the environments of its services and of its clients."""

import dataclasses
import json
import os
import sys
import tempfile
import uuid
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
PLUGIN = HERE / "plugin"
MODELS = REPOSITORY / "build" / "ndif" / "hub"
BIN = Path(sys.executable).parent  # of the server's environment; not resolved, since a venv's python is a link

# Ray takes more, at random, from 10002 upward.
PORTS = {
    "hub": 8090,
    "redis": 6399,
    "s3": 9000,
    "api": 8001,
    "postgres": 5499,
    "ray": 6385,
    "ray_client": 10001,
    "ray_objects": 8076,
    "ray_metrics": 8089,
    "ray_dashboard": 8265,
    "ray_agent": 52366,
    "ray_agent_http": 52365,
}
ACTORS = {"process": "ndif_cpu.actor.CPUProcessActor", "sandbox": "ndif_cpu.actor.CPUSandboxActor"}
LOOPBACK = "127.0.0.1,localhost"
# The caller's settings for a client, or for another server, must not reach these services; nor may a proxy.
NOT_INHERITED = ("NDIF_", "RAY_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "PYTHON", "AWS_", "VIRTUAL_ENV")
PROXIES = {"http_proxy", "https_proxy", "all_proxy", "no_proxy", "ftp_proxy"}


def default_state() -> Path:
    """The state folder where none is named."""
    return Path(os.environ.get("NDIF_STACK_DIR") or REPOSITORY / "build" / "ndif" / "run")


def default_threads() -> str:
    """Threads for torch's sums: what the caller allows, else up to four."""
    return os.environ.get("OMP_NUM_THREADS") or str(min(4, os.cpu_count() or 1))


def network_namespace() -> int:
    """A number that tells this process's network namespace from others."""
    return os.stat("/proc/self/ns/net").st_ino


def ports_from(base: int | None) -> dict[str, int]:
    """The usual ports, or so many in a row from base on."""
    return PORTS if base is None else {name: base + i for i, name in enumerate(PORTS)}


def short_temp(stack_id: str) -> str:
    """A folder for Ray, which makes sockets deep inside it: a socket's path may have 107 bytes."""
    temp = tempfile.gettempdir()
    return f"{temp if len(temp) <= 24 else '/tmp'}/ndif_{stack_id[:8]}"


@dataclass
class Settings:
    """One stack's settings; they lie in the state folder from before its first process starts until it is stopped."""

    state: Path
    models: Path = MODELS
    actor: str = "process"
    dtype: str = "float32"
    ports: dict[str, int] = field(default_factory=lambda: dict(PORTS))
    extra: dict[str, str] = field(default_factory=dict)  # for every service
    auth: dict[str, str] | None = None  # the key and the database's address, while keys are asked for
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    network: int = field(default_factory=network_namespace)
    ray_temp: str = ""
    ray_token: str = field(default_factory=lambda: uuid.uuid4().hex * 2)  # Ray runs what it is sent

    def __post_init__(self) -> None:
        """Make the paths absolute: services run in the state folder."""
        self.state, self.models = Path(self.state).absolute(), Path(self.models).absolute()
        self.ray_temp = self.ray_temp or short_temp(self.id)

    @staticmethod
    def load(state: Path) -> "Settings | None":
        """The settings of the stack that was started in this folder, if any."""
        try:
            return Settings(**json.loads((state / "stack.json").read_text()))
        except FileNotFoundError:
            return None

    def save(self) -> None:
        """Write the settings, all or nothing."""
        self.state.mkdir(parents=True, exist_ok=True)
        draft = self.state / f"stack.json.{os.getpid()}"
        draft.touch(mode=0o600)  # it holds Ray's token, and the database's password
        draft.write_text(json.dumps(dataclasses.asdict(self), default=str, indent=1))
        draft.replace(self.state / "stack.json")

    def url(self, name: str, scheme: str = "http") -> str:
        """The address of a service."""
        return f"{scheme}://127.0.0.1:{self.ports[name]}"

    def log(self, name: str) -> Path:
        """A service's log."""
        return self.state / "logs" / f"{name}.log"

    def server_environment(self, service: str) -> dict[str, str]:
        """The whole environment of a service."""
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith(NOT_INHERITED) and k.lower() not in PROXIES
        }
        return inherited | {
            "NDIF_STACK_ID": self.id,
            "NDIF_STACK_SERVICE": service,
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "PYTHONPATH": str(PLUGIN),  # and not the repository: the server must lack the project's package
            "PYTHONUNBUFFERED": "1",
            "NO_PROXY": LOOPBACK,
            "no_proxy": LOOPBACK,
            "OMP_NUM_THREADS": default_threads(),
            "HF_ENDPOINT": self.url("hub"),
            "HF_HOME": str(self.state / "hf_server"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NDIF_HOME": str(self.state / "ndif"),
            "NDIF_REDIS_URL": self.url("redis", "redis"),
            "NDIF_OBJECT_STORE_URL": self.url("s3"),
            "NDIF_API_URL": self.url("api"),
            "NDIF_API_PORT": str(self.ports["api"]),
            "NDIF_RAY_ADDRESS": self.url("ray_client", "ray"),
            "NDIF_RAY_HEAD_PORT": str(self.ports["ray"]),
            "NDIF_DEFAULT_MODEL_ACTOR_CLASS": ACTORS[self.actor],
            "NDIF_CONTROLLER_IMPORT_PATH": "ndif_cpu.controller.CPUController",
            "NDIF_DEFAULT_DTYPE": self.dtype,
            "NDIF_DEFAULT_EXECUTION_TIMEOUT_SECONDS": "600",
            "NDIF_DEFAULT_PADDING_BIAS": "0",  # half a GiB for CUDA's own needs
            "NDIF_MINIMUM_DEPLOYMENT_TIME_SECONDS": "0",  # a model may make room for the next at once
            "NDIF_AUTOSCALING_MAX_REPLICAS": "1",  # a second copy of a model would share the same cores
            "NDIF_SANDBOX_POOL_SIZE": "2",  # each waiting sandbox is a process that imports torch
            "NDIF_STATUS_TTL_S": "2",  # else a model that was just loaded is missing from the list for a minute
            "NDIF_QUEUE_FETCH_TIMEOUT_S": "2",  # how soon the queue notices, when idle, that Ray is gone
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray takes 127.0.0.1 for the machine's outer address
            "RAY_AUTH_MODE": "token",  # set by itself, or not, by whether the user has used Ray before
            "RAY_AUTH_TOKEN": self.ray_token,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
            "RAY_memory_monitor_refresh_ms": "0",  # it would end model actors for other programs' memory
            "GRPC_ENABLE_FORK_SUPPORT": "0",  # with it, Ray's client server often dies at its fork
            **({"TMPDIR": self.ray_temp} if service == "ray" else {}),  # removed with what its workers leave
            **({"NDIF_POSTGRES_URL": self.auth["url"]} if self.auth and service == "api" else {}),
            **self.extra,
        }

    def client_environment(self) -> dict[str, str]:
        """What a client needs in order to reach this stack, and nothing beyond it."""
        return {
            "NDIF_HOST": self.url("api"),
            "HF_ENDPOINT": self.url("hub"),
            "HF_HOME": str(self.state / "hf_client"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": LOOPBACK,
            "no_proxy": LOOPBACK,
        }
