"""Running what a worker took from the queue."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fxopt.serving.batching import BatchLayout
from fxopt.serving.request import Outcome, Request, run_alone
from fxopt.serving.tally import Tally

log = logging.getLogger("fxopt")


def answer_all(requests: Sequence[Request], layout: BatchLayout | None, tally: Tally) -> None:
    """Run requests as one batch and answer each; those that were cancelled do not run.

    Where the batch fails, each runs once more by itself, so that it has its own error or result.
    """
    wanted = [one for one in requests if one.begin()]
    tally.add("cancelled", len(requests) - len(wanted))
    if not wanted:
        return
    tally.start(wanted)
    outcomes = None
    if layout is not None and len(wanted) > 1:
        outcomes = _run_together(wanted, layout)
        tally.run(sum(one.rows for one in wanted))
        if outcomes is None:
            tally.add("retried", len(wanted))
    if outcomes is not None:
        for request, outcome in zip(wanted, outcomes, strict=True):
            _answer(request, outcome, tally)
        return
    for request in wanted:  # each is answered at once, whatever the next one takes
        outcome = run_alone(request.model, request.flat)
        tally.run(request.rows)
        _answer(request, outcome, tally)


def _run_together(requests: Sequence[Request], layout: BatchLayout) -> list[Outcome] | None:
    """Return the outcome of each request from one run; None where that failed."""
    model = requests[0].model
    try:
        joined = layout.join([request.flat for request in requests])
        model.signature.check(joined)  # their sizes together may be none that the model takes
        parts = layout.split(model.run_flat(joined), [request.rows for request in requests])
        return [Outcome(model.signature.output.unflatten(part)) for part in parts]
    except BaseException:  # whatever it was, whoever caused it meets it again alone
        log.debug("a batch of %d requests failed", len(requests), exc_info=True)
        return None


def _answer(request: Request, outcome: Outcome, tally: Tally) -> None:
    tally.add("completed" if outcome.error is None else "failed")  # before anybody is told
    request.answer(outcome)
