"""The only place that touches nnsight's internals: which step a trace is in, and which rows an invoke owns.

Checked with nnsight 0.8.1. Everything here also runs on a server, so it needs nnsight and greenlet alone.
"""

from __future__ import annotations

from typing import Any

from greenlet import GreenletExit, getcurrent
from nnsight.intervention.interleaver import OutOfOrderError
from nnsight.intervention.iterator import Iterations


def mediator(what: str) -> Any:
    """The worker that runs the current block.

    Raises:
        RuntimeError: called outside a trace.
    """
    reference = getattr(getcurrent(), "mediator", None)
    if reference is None:
        raise RuntimeError(
            f"{what} works inside a trace: put it in a `with model.trace(...)` or `generate(...)` block."
        )
    return reference()


def current_step(model: Any, what: str) -> int:
    """Which forward pass of the run the block is in: 0 is the prompt, s the s-th decode step.

    A loop over `tracer.iter` pins the worker to its step until the first read; after that the count of the root's
    inputs tells, because they come first in every forward.
    """
    worker = mediator(what)
    if worker.iteration is not None:
        return worker.iteration
    return worker.occurrence(f"{model.path}.input") - 1


def passed(envoy: Any, kind: str, step: int, what: str) -> bool:
    """Whether the model has already run past `envoy`'s input or output in `step` (a later read is the *next* step's)."""
    return mediator(what).occurrence(f"{envoy.path}.{kind}") > step


def _batcher(what: str) -> Any:
    """What put the invokes of the current run into one batch; None where nothing did."""
    return getattr(mediator(what).interleaver, "batcher", None)


def invoke_rows(what: str) -> int | None:
    """How many rows the current invoke owns, where several share the batch; None where the block sees every row."""
    batcher, group = _batcher(what), mediator(what).batch_group
    return None if batcher is None or not batcher.batching or group is None else group[1]


def batch_rows(what: str) -> int | None:
    """How many rows the prompts of the whole batch have; None where nnsight does not count them."""
    batcher = _batcher(what)
    return None if batcher is None or not batcher.total else batcher.total


def run_option(name: str, what: str) -> Any:
    """A keyword that the run was called with, such as `prefill_chunk_size` of `generate`; None if it was not."""
    batcher = _batcher(what)
    if batcher is None:
        return None
    given = [kwargs for _, kwargs in batcher.invokes] + [batcher.kwargs, batcher.extra_kwargs]
    return next((kwargs[name] for kwargs in given if kwargs.get(name) is not None), None)


def every_step() -> Any:
    """What to loop over in an edit so that its block runs in every forward; unlike a tracer, it can be sent to a server."""
    return Iterations()[:]


class quiet_end:
    """Ends the worker without nnsight's warning when a loop over steps asks for one that the run did not make.

    An open loop over `tracer.iter` always ends so: its last request is unwound by `OutOfOrderError`. Anything that
    happens in step 0 is a real mistake and passes through.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def __enter__(self) -> quiet_end:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> bool:
        if kind is OutOfOrderError and self.step > 0:
            raise GreenletExit
        return False
