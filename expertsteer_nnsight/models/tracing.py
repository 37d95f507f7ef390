"""What traces need of nnsight's internals: which step a trace is in, and which rows an invoke owns.

Checked with nnsight 0.8.1 and ndif 0.1.2. Everything here also runs on a server, so it needs nnsight and greenlet alone.

An NDIF server may run a block in a *sandbox*: a process without the model, which asks the model's process for one value
at a time. There nobody in the block's process counts how often the model came by a place, so what has been passed is
known only from the step that a loop pins, until its first read.
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


def sandboxed(what: str) -> bool:
    """Whether the block runs apart from the model, in an NDIF sandbox."""
    return hasattr(mediator(what).interleaver, "connection")


def current_step(model: Any, what: str) -> int:
    """Which forward pass of the run the block is in: 0 is the prompt, s the s-th decode step.

    A loop over `tracer.iter` pins the worker to its step until the first read; after that the count of the root's
    outputs tells: as many as there were forwards before this one.

    Raises:
        RuntimeError: in a sandbox, after the step's first read.
    """
    worker = mediator(what)
    if worker.iteration is not None:
        return worker.iteration
    if sandboxed(what):
        raise RuntimeError(
            f"{what} comes after another read in this step, and this server's sandbox cannot tell which step that is: "
            f"put it first in the step, or read positions = Positions.read(model) first and pass them to plan.apply."
        )
    return worker.occurrence(f"{model.path}.output")


def pin(step: int, what: str) -> None:
    """In a sandbox, makes the next read ask for `step`, and not for whichever comes next; elsewhere counts do that."""
    if sandboxed(what):
        mediator(what).iteration = step


def passed(envoy: Any, kind: str, step: int, what: str) -> bool:
    """Whether the model has already run past `envoy`'s input or output in `step` (a later read is the *next* step's).

    Always False in a sandbox: there a read that is pinned to its step fails at the end of the run (`in_step`).
    """
    return mediator(what).occurrence(f"{envoy.path}.{kind}") > step


def _batcher(what: str) -> Any:
    """What put the invokes of the current run into one batch; None where nothing did, and in a sandbox."""
    return getattr(mediator(what).interleaver, "batcher", None)


def _groups(what: str) -> list[Any]:
    """(first row, rows) of every invoke of the run that has rows of its own."""
    every = getattr(mediator(what).interleaver, "mediators", None) or []
    return [m.batch_group for m in every if m.batch_group is not None]


def invoke_rows(what: str) -> int | None:
    """How many rows the current invoke owns, where several share the batch; None where the block sees every row."""
    batcher, group = _batcher(what), mediator(what).batch_group
    several = batcher.batching if batcher is not None else len(_groups(what)) > 1
    return group[1] if several and group is not None else None


def batch_rows(what: str) -> int | None:
    """How many rows the prompts of the whole batch have; None where nnsight does not count them."""
    batcher = _batcher(what)
    total = batcher.total if batcher is not None else max((start + rows for start, rows in _groups(what)), default=0)
    return total or None


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


class in_step:
    """A step's reads: ends the worker without nnsight's warning when a loop asks for a step that the run did not make.

    An open loop over `tracer.iter` always ends so: its last request is unwound by `OutOfOrderError`. In step 0, or after
    something has been read in the step (`begun`), the same error means that the model has run past what was asked for.
    """

    def __init__(self, step: int, begun: bool, late: str) -> None:
        self.step = step
        self.begun = begun
        self.late = late

    def __enter__(self) -> in_step:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is OutOfOrderError:
            if self.step > 0 and not self.begun:
                raise GreenletExit
            raise RuntimeError(self.late) from None
