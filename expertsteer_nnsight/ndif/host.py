"""Models hosted on NDIF: where the host is, whether it can do the job, and sending a job until its result is here.

`remote=True` (the host and key that nnsight is configured with), `remote="http://..."` or `remote=Remote(...)` mean the
same thing in every function of the package. In a trace of your own, nnsight's `remote=True` works as ever;
`backend=Remote(...).backend(model)` adds the checks and retries of this module.

A job is the source of a traced block with the values that it uses; it changes nothing on the server, so one that was
lost is sent again. One that failed by its own error is not.
"""

from __future__ import annotations

import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from nnsight import CONFIG
from nnsight.intervention.backends.remote import RemoteError
from nnsight.schema.config import ApiConfig
from nnsight.schema.request import RequestModel
from tqdm.auto import tqdm

from .backend import Backend
from .checks import compare_versions, state_of
from .http import BROKEN, Lost, RemoteFailure, detail, message_of, model_key, send

_PUBLIC = ApiConfig().HOST
_answered: set[str] = set()  # hosts that were there before in this process: worth waiting for if they go away
_checked: set[tuple[str, str | None, str]] = set()


@dataclass
class Traffic:
    """What went over the network for a `Remote`: jobs sent, bytes of their requests, bytes of their results."""

    jobs: int = 0
    sent: int = 0
    received: int = 0


@dataclass(frozen=True)
class Remote:
    """An NDIF host, and how patiently to use it.

    Attributes:
        host: such as `http://127.0.0.1:8001`; None for the one nnsight is configured with (`NDIF_HOST`, `nnsight.CONFIG`;
            the public service by default).
        api_key: None for the configured one (`NDIF_API_KEY`), which goes to whatever host is named; "" for none.
        timeout: the longest to wait for one job, in seconds, with its time in the queue and all its retries.
        retries: how often a job is sent again after the connection was refused or lost, the server had an error of its own
            (5xx), or lost the job. The waits between double from 1 s to 60 s.
        traffic: jobs and bytes so far.

    Raises:
        ValueError: an address without http:// or https://, or a key of other characters than a key has.
    """

    host: str | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout: float | int = 1800
    retries: int = 8
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"https?://[^\s/]+\S*", self.address):
            raise ValueError(f"An NDIF host starts with http:// or https://, got {self.address!r}.")
        if self.key is not None and not re.fullmatch(r"[!-~]+", self.key):
            raise ValueError(
                "The API key holds other characters than letters, digits and signs: check how it was read."
            )

    @classmethod
    def of(cls, remote: bool | str | Remote | None) -> Remote | None:
        """What a `remote=` argument means; None for a local model.

        Raises:
            ValueError: neither a bool, nor an address, nor a `Remote`.
        """
        if remote is None or remote is False:
            return None
        if isinstance(remote, cls):
            return remote
        if remote is True:
            return cls()
        if isinstance(remote, str):
            return cls(remote)
        raise ValueError(f'remote= takes True, "http://...", or a Remote, got {remote!r}.')

    def __call__(self, *_: Any) -> None:
        """What nnsight does with a backend.

        Raises:
            TypeError: always; a `Remote` is none.
        """
        raise TypeError(
            "nnsight's trace and generate take backend=remote.backend(model), or remote=True for the configured host."
        )

    @property
    def address(self) -> str:
        """The host's address."""
        return (CONFIG.API.HOST if self.host is None else self.host).rstrip("/")

    @property
    def key(self) -> str | None:
        """The API key that is sent, if any."""
        return (CONFIG.API.APIKEY if self.api_key is None else self.api_key.strip()) or None

    def backend(self, model: Any, say: Callable[[str], Any] | None = None) -> Backend:
        """What to pass to nnsight: `with model.trace(prompt, backend=remote.backend(model))`.

        Checks the host and the model first, once a process, and says so if the model is not running there.

        Args:
            model: a `TransformersModel` made from a hub id.
            say: gets the job's state as it changes; None for nnsight's own display.

        Raises:
            RemoteFailure: the host, the key or the model cannot be used.
        """
        asked = (self.address, self.key, model_key(model))
        if asked not in _checked:
            found = self.check(model, say)
            _checked.add(asked)
            if not found.endswith("is running."):
                tqdm.write(found, file=sys.stderr)
        return Backend(model, self, say)

    def check(self, model: Any, say: Callable[[str], Any] | None = None) -> str:
        """Asks the host whether it is there, takes the key, has fitting versions, and runs the model.

        Returns one sentence about the model: running, being deployed, or unknown to the host, and what to do.

        Raises:
            RemoteFailure: the host, the key or the model cannot be used.

        Warns:
            UserWarning: torch or transformers differ from those here.
        """
        name = model_key(model)
        self._get("/ping", say)
        _answered.add(self.address)
        self._check_key(say)
        self._check_versions()
        return self._state_of(model, name)

    def models(self) -> list[dict[str, Any]]:
        """What the host lists as deployed or downloaded: `repo_id`, `task`, `revision`, `application_state` and more, each.

        The list may be a minute old.

        Raises:
            RemoteFailure: the host cannot be reached, or does not tell.
        """
        return list(self._get("/status").get("deployments", {}).values())

    @property
    def headers(self) -> dict[str, str]:
        """What identifies the caller to the server."""
        return {"ndif-api-key": self.key} if self.key else {}

    def _asked(
        self, method: Callable[..., httpx.Response], path: str, say: Callable[[str], Any] | None, **call: Any
    ) -> httpx.Response:
        """An answer that is no failure of the server's, retried while there is none."""

        def ask() -> httpx.Response:
            answer = send(method, self.address + path, 60, headers=self.headers, **call)
            if answer.status_code >= 500:
                raise Lost(detail(answer), BROKEN)
            return answer

        return self.retried(ask, say)

    def _get(self, path: str, say: Callable[[str], Any] | None = None) -> Any:
        """JSON of a GET.

        Raises:
            RemoteFailure: the host does not answer, or is no NDIF server.
        """
        answer = self._asked(httpx.get, path, say)
        try:
            if answer.status_code == 200:
                return answer.json()
        except ValueError:
            pass
        raise RemoteFailure(
            f"{self.address}{path} answers ({answer.status_code}), but not as an NDIF server does: check the address."
        )

    def retried(
        self, do: Callable[[], Any], say: Callable[[str], Any] | None = None, until: float | None = None
    ) -> Any:
        """`do()`, again after each loss, up to the limits of this `Remote` (two retries for a host that never answered).

        Args:
            do: what is tried; it raises `Lost` where it may be tried again.
            say: is told of each wait.
            until: a time of `time.monotonic` in seconds after which nothing is tried again; None: `timeout` from now.

        Raises:
            RemoteFailure: every try was lost.
        """
        until = time.monotonic() + self.timeout if until is None else until
        patience = self.retries if self.address in _answered else min(2, self.retries)
        attempt = 0
        while True:
            try:
                return do()
            except Lost as lost:
                limit = patience if lost.limit is None else min(patience, lost.limit)
                wait = min(60.0, 2.0**attempt) * random.uniform(0.8, 1.2)
                attempt += 1
                if attempt > limit or time.monotonic() + wait > until:
                    tried = "once" if attempt == 1 else f"{attempt} times"
                    default = (
                        ""
                        if self.address != _PUBLIC
                        else " (the public service, which is meant where NDIF_HOST is not set)"
                    )
                    raise RemoteFailure(
                        f"{self.address}{default} was tried {tried} without success ({lost}): {lost.advice}."
                    ) from lost
                if say is not None:
                    say(f"{lost}; try {attempt + 1} of {limit + 1} in {wait:.0f} s")
                time.sleep(wait)

    def _check_key(self, say: Callable[[str], Any] | None) -> None:
        """A request without a job is refused for its key, if for nothing else (422 means that the key was taken)."""
        envelope = {"data": RequestModel(model_key="").metadata()}
        self.refuse(self._asked(httpx.post, "/request", say, data=envelope))

    def refuse(self, answer: httpx.Response) -> None:
        """Raises where the server did not take the key, or the request.

        Raises:
            RemoteFailure: that.
        """
        told = detail(answer) if self.key is None else detail(answer).replace(self.key, "...")
        if answer.status_code in (401, 403) or (answer.status_code == 400 and "API key" in told):
            shown = "a request without a key" if self.key is None else "the key"
            raise RemoteFailure(
                f"{self.address} refuses {shown} ({told}): set NDIF_API_KEY, or pass Remote(api_key=...)."
            )
        if answer.status_code not in (200, 422):
            raise RemoteFailure(f"{self.address} refuses the request (status {answer.status_code}: {told}).")

    def _check_versions(self) -> None:
        try:
            answer = send(httpx.get, f"{self.address}/env", 90, headers=self.headers)
            theirs = answer.json()["packages"] if answer.status_code == 200 else {}
        except (Lost, ValueError, KeyError, TypeError):
            return  # an old or a busy server does not tell; that is no reason not to try
        compare_versions(self.address, theirs)

    def _state_of(self, model: Any, name: str) -> str:
        shown = model.repo_id
        try:
            deployed = self.models()
        except RemoteFailure:
            return f"{self.address} does not tell whether it runs {shown}."
        return state_of(self.address, deployed, shown, name)

    @contextmanager
    def explained(self, what: str, less: str, after: str = "") -> Iterator[None]:
        """Turns a job's own error, a server's traceback, into one sentence with the traceback as its cause.

        Args:
            what: what the job was for; the beginning of the sentence.
            less: how to ask for less in one job, if it was too much.
            after: what to add to the end of every failure's sentence.

        Raises:
            RemoteFailure: the job failed.
        """
        try:
            yield
        except RemoteError as error:
            told = message_of(str(error))
            limit = any(word in told.lower() for word in ("execution timeout", "out of memory"))
            hint = f"; ask for less in one job ({less})" if limit else ""
            raise RemoteFailure(f"{what} failed on {self.address}: {told}{hint}{after}.") from error
        except RemoteFailure as failure:
            failure.args = (f"{str(failure).rstrip('.')}{after}.",)
            raise
        except KeyboardInterrupt as stop:
            if after:
                stop.add_note(after.removeprefix("; "))
            raise
