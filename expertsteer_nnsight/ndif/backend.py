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

from ..files import library_versions
from .http import (
    BROKEN,
    CONNECT_SECONDS,
    LOADING,
    SMALLER,
    UNREACHED,
    Lost,
    RemoteFailure,
    detail,
    model_key,
    one_line,
    send,
)

if TYPE_CHECKING:
    from .host import Remote

_SEND_SECONDS = 120.0
_LARGE = 64 << 20  # a request of this many bytes may be more than a server takes
# what two jobs say that run in one model at the same time: NDIF gives it the next one while a job whose API died still runs
_BUSY = ("Cannot invoke while the model is already running", "a different thread")


class Backend(RemoteBackend):
    """Sends a traced block until its result is here, within the limits of a `Remote`."""

    def __init__(self, model: Any, remote: Remote, say: Callable[[str], Any] | None = None) -> None:
        super().__init__(model_key(model), host=remote.address, api_key=remote.key, env=model._remoteable_get_env())
        self.api_key = remote.key  # nnsight takes the configured one for none
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
        with closing(self._connection()) as connection:
            try:
                request.session_id = json.loads(connection.recv())["session_id"]
            except (OSError, ValueError, KeyError, TypeError, websocket.WebSocketException) as error:
                raise Lost(f"no session: {one_line(str(error))}", UNREACHED) from error
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

    def _connection(self) -> Any:
        header = [f"ndif-api-key: {self.api_key}"] if self.api_key else None
        try:
            return websocket.create_connection(f"{self.ws_host}/subscribe", timeout=CONNECT_SECONDS, header=header)
        except websocket.WebSocketBadStatusException as error:
            # its text holds the whole answer, which may be a proxy's page
            if error.status_code >= 500 or error.status_code == 429:
                raise Lost(f"no connection: status {error.status_code}", BROKEN) from error
            raise RemoteFailure(
                f"{self.remote.address}/subscribe answers {error.status_code} to a websocket, which jobs need: check the "
                f"address, and that nothing between here and there blocks websockets."
            ) from error
        except (OSError, websocket.WebSocketException) as error:
            raise Lost(f"no connection: {one_line(str(error))}", UNREACHED) from error

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
        if self._lost and any(text in told.rstrip().rpartition("\n")[2] for text in _BUSY):
            raise Lost("the model is still busy with a lost job", BROKEN)
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
        size = f"the request has {len(blob) / 1e6:.0f} MB, which may be more than the server takes; {SMALLER}"
        large = len(blob) > _LARGE
        try:
            answer = send(httpx.post, f"{self.remote.address}/request", _SEND_SECONDS, **call)
        except Lost as lost:
            self._lost = True  # the server may have it
            if large and not isinstance(lost.__cause__, httpx.ConnectError):
                raise Lost(str(lost), size, 1) from lost
            raise
        self.remote.traffic.jobs += 1
        self.remote.traffic.sent += len(blob)
        if answer.status_code == 413:
            raise RemoteFailure(f"{self.remote.address} refuses the job ({detail(answer)}): {size}.")
        if answer.status_code in (429, 503, 504):
            raise Lost(detail(answer), BROKEN)
        if answer.status_code >= 500:
            raise Lost(detail(answer), size, 1) if large else Lost(detail(answer), BROKEN)
        self.remote.refuse(answer)
        if answer.status_code != 200:
            raise RemoteFailure(
                f"{self.remote.address} cannot read the request ({detail(answer)}): compare the versions."
            )
        return ResponseModel.model_validate_json(answer.text)

    def finalize(self, content: bytes) -> Any:
        """Loads a result."""
        self.remote.traffic.received += len(content)
        return super().finalize(content)


class _Display:
    """Hands a job's state to whoever shows it."""

    enabled = False  # no bar of nnsight's own for a large download beside ours

    def __init__(self, say: Callable[[str], Any]) -> None:
        self.say = say

    def update(self, response: ResponseModel) -> None:
        if response.status == Status.LOG:
            return  # what the block printed or warned of on the server
        queued = response.status == Status.QUEUED and response.description
        self.say(response.description.strip().rstrip(".") if queued else response.status.value.lower())

    def refresh(self) -> None:
        pass
