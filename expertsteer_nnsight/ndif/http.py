"""What the host, its checks and the backend share: the errors, what may be tried again, and how an answer is read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import httpx

CONNECT_SECONDS = 10.0
UNREACHED = "check that the address is right and the server is up, then call again"
BROKEN = "the server answers, but failed each time; call again later, or ask those who run it"
LOADING = "the server may be unable to load this model; try another one, or call again later"
SMALLER = "send fewer texts in one (batch_size=) or smaller tensors"


class RemoteFailure(RuntimeError):
    """A remote model could not be used; the message says what was asked, what was found, and what to do."""


class Lost(Exception):
    """What failed may work if it is tried again, at most `limit` times; `advice` is for when it does not."""

    def __init__(self, told: str, advice: str, limit: int | None = None) -> None:
        super().__init__(told.strip().rstrip("."))
        self.advice = advice
        self.limit = limit


def send(method: Callable[..., httpx.Response], address: str, seconds: float | int, **call: Any) -> httpx.Response:
    """`httpx.get` or `httpx.post`, with a limit on waiting.

    Raises:
        Lost: no connection, or one that broke.
        RemoteFailure: an address or a header that HTTP does not know.
    """
    try:
        return method(address, timeout=httpx.Timeout(CONNECT_SECONDS, read=seconds, write=seconds), **call)
    except (httpx.UnsupportedProtocol, httpx.LocalProtocolError, httpx.InvalidURL) as error:
        raise RemoteFailure(
            f"{address} cannot be asked ({type(error).__name__}): check the address and the key."
        ) from None
    except httpx.TransportError as error:
        raise Lost(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__, UNREACHED) from error


def detail(answer: httpx.Response) -> str:
    """What a server says about an error, in one line."""
    try:
        body = answer.json()
        told = body.get("detail") if isinstance(body, dict) else body
    except ValueError:
        told = re.sub(r"<[^>]*>", " ", answer.text)
    return one_line(str(told))[:200].rstrip(". ") if told else f"status {answer.status_code}"


def one_line(text: str) -> str:
    """A text without line breaks, never empty."""
    return " ".join(text.split()) or "no message"


def message_of(told: str) -> str:
    """The message of the exception that ends a traceback, in one line; the whole text where there is none."""
    lines = told.strip().splitlines()
    if "Traceback" in told:
        starts = [i for i, line in enumerate(lines) if re.match(r"[A-Za-z_][\w.]*(: |$)", line)]
        lines = lines[starts[-1] :] if starts else lines[-1:]
    return one_line(" ".join(lines))[:400].rstrip(". ")


def model_key(model: Any) -> str:
    """The name by which a server knows a model.

    Raises:
        ValueError: the model has none.
        RemoteFailure: the hub does not know it.
    """
    name = getattr(model, "repo_id", None)
    if not hasattr(model, "to_model_key") or not isinstance(name, str) or not name:
        raise ValueError(
            f"A remote model is named by its hub id, which this {type(model).__name__} has not: make it as "
            f'TransformersModel("org/name", task="text-generation").'
        )
    if os.path.isdir(name):
        raise ValueError(f"A remote model is named by its hub id, and {name!r} is a folder on this machine.")
    try:
        return model.to_model_key()
    except NotImplementedError:
        raise ValueError(f"nnsight cannot run a {type(model).__name__} remotely: use a TransformersModel.") from None
    except Exception as error:  # the hub client has many: no such repository, no network, an id that is no id
        raise RemoteFailure(
            f"The hub does not tell of a model {name!r} ({type(error).__name__}: {one_line(str(error))[:200]}): "
            f"a remote model needs the id of a hub repository, and the hub must be reachable from here."
        ) from error
