"""nnsight's remote backend with retries and a limit on waiting; made by `Remote.backend`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any

import httpx
import websocket
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status

from ._ndif_http import BROKEN, CONNECT_SECONDS, LOADING, UNREACHED, Lost, RemoteFailure, detail, model_key, send
from .plan_file import library_versions

if TYPE_CHECKING:
    from .remote import Remote

_SEND_SECONDS = 120.0
_LARGE = 64 << 20  # a request of this many bytes may be more than a server takes
# what two jobs say that run in one model at the same time: NDIF gives it the next one while a job whose API died still runs
_BUSY = ("Cannot invoke while the model is already running", "a different thread")


class Backend(RemoteBackend):
    """Sends a traced block until its result is here, within the limits of a `Remote`."""

    def __init__(self, model: Any, remote: Remote, say: Callable[[str], Any] | None = None) -> None:
        super().__init__(model_key(model), host=remote.address, api_key=remote.key, env=model._remoteable_get_env())
        self.remote = remote
        self._lost = False  # an earlier try of this job may still be running
        if say is not None:
            self.display: Any = _Display(say)

    def request(self, request: RequestModel, tracer: Any) -> Any:
        """Sends the traced block, again where it was lost.

        Raises:
            RemoteFailure: the server could not be reached, refused the request, or took longer than the limit.
            RemoteError: the block failed by an error of its own; the message is the server's traceback.
        """
        blob = self._serialize(tracer)
        until = time.monotonic() + self.remote.timeout
        self._lost = False
        return self.remote.retried(lambda: self._once(request, blob, until), self._say, until)

    def _say(self, text: str) -> None:
        if isinstance(self.display, _Display):
            self.display.say(text)
        elif self.display.enabled:
            print(text, file=sys.stderr)  # noqa: T201 - nnsight's own display cannot show it

    def _once(self, request: RequestModel, blob: bytes, until: float) -> Any:
        address = f"{self.ws_host}/subscribe"
        header = [f"ndif-api-key: {self.api_key}"] if self.api_key else None
        try:
            connection = websocket.create_connection(address, timeout=CONNECT_SECONDS, header=header)
        except (OSError, websocket.WebSocketException) as error:
            raise Lost(f"no connection: {error}", UNREACHED) from error
        with closing(connection):
            try:
                request.session_id = json.loads(connection.recv())["session_id"]
            except (OSError, ValueError, KeyError, TypeError, websocket.WebSocketException) as error:
                raise Lost(f"no session: {error}", UNREACHED) from error
            response = self._post(request, blob)
            self.note(response)
            while True:
                response = self._next(connection, until, response.status)
                if response.status == Status.ERROR:
                    self._judge(response.description)
                try:
                    result = self.handle(response)
                except httpx.HTTPError as error:
                    raise Lost(f"the result could not be downloaded: {error}", BROKEN) from error
                if response.status == Status.COMPLETED:
                    return result

    def _next(self, connection: Any, until: float, state: Status) -> ResponseModel:
        """The job's next status."""
        while (left := until - time.monotonic()) > 0:
            connection.settimeout(min(1.0, left))
            try:
                message = connection.recv()
            except websocket.WebSocketTimeoutException:
                self.display.refresh()
                continue
            except (OSError, websocket.WebSocketException) as error:
                self._lost = True
                raise Lost(f"connection lost: {error}", UNREACHED) from error
            if not message:
                self._lost = True
                raise Lost("connection closed by the server", UNREACHED)
            return self.parse(message)
        raise RemoteFailure(
            f"No result from {self.remote.address} in {self.remote.timeout:g} s (last state of the job: {state.value}): "
            f"call again later, or wait longer with Remote(timeout=...)."
        )

    def _judge(self, told: str) -> None:
        """Raises where a job's ERROR is the server's failure: NDIF ends those alike, and a job's own has a traceback.

        Raises:
            Lost: that.
        """
        if any(text in told.strip().splitlines()[-1] for text in _BUSY):
            raise Lost("the model is still busy with a lost job", BROKEN, None if self._lost else 2)
        if "try again later" not in told or "Traceback" in told or told.startswith("Could not deploy"):
            return
        loading = "ing model" in told  # provisioning or starting it
        raise Lost(told, LOADING if loading else BROKEN, 4 if loading else None)

    def _post(self, request: RequestModel, blob: bytes) -> ResponseModel:
        headers = {
            **self.remote.headers,
            "ndif-timestamp": repr(time.time()),
            "nnsight-version": library_versions()["nnsight"],
            "python-version": sys.version,
        }
        files = {"blob": ("request", blob, "application/octet-stream")}
        call = {"data": {"data": request.metadata()}, "files": files, "headers": headers}

        def too_large(told: object) -> RemoteFailure:
            return RemoteFailure(
                f"{self.remote.address} does not take a request of {len(blob) / 1e6:.0f} MB ({told}): send fewer texts in one "
                f"(batch_size=) or smaller tensors."
            )

        try:
            answer = send(httpx.post, f"{self.remote.address}/request", _SEND_SECONDS, **call)
        except Lost as lost:
            if len(blob) > _LARGE:
                raise too_large(lost) from lost
            raise
        self.remote.traffic.jobs += 1
        self.remote.traffic.sent += len(blob)
        if answer.status_code == 413 or (answer.status_code >= 500 and len(blob) > _LARGE):
            raise too_large(detail(answer))
        if answer.status_code >= 500 or answer.status_code == 429:
            raise Lost(detail(answer), BROKEN)
        self.remote.refuse(answer)
        if answer.status_code != 200:
            raise RemoteFailure(f"{self.remote.address} refuses the request ({answer.status_code}: {detail(answer)}).")
        return ResponseModel.model_validate_json(answer.text)

    def finalize(self, content: bytes) -> Any:
        """Loads a result."""
        self.remote.traffic.received += len(content)
        return super().finalize(content)


class _Display:
    """Hands a job's state to whoever shows it."""

    enabled = True

    def __init__(self, say: Callable[[str], Any]) -> None:
        self.say = say

    def update(self, response: ResponseModel) -> None:
        if response.status == Status.LOG:
            return  # what the block printed or warned of on the server
        queued = response.status == Status.QUEUED and response.description
        self.say(response.description.strip().rstrip(".") if queued else response.status.value.lower())

    def refresh(self) -> None:
        pass
