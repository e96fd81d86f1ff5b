"""A request that was sent on its way: the sink of its chunk, and what there is to say when it comes back."""

from __future__ import annotations

from collections.abc import Sequence

from rnnserve_models.engine.base import Arrays
from rnnserve_models.load import LoadedModel
from rnnserve_server.api.oip.asked import Asked
from rnnserve_server.api.oip.face import Face
from rnnserve_server.blocks import Answers, Failure
from rnnserve_server.calls import Call
from rnnserve_server.meter import Meter, ModelTally
from rnnserve_server.sessions import Session

_NOTHING = Asked()


class Pending(Call):
    """One request under way.

    Args:
        meter: knows of it until it is answered.
        received: when it was read, by the monotonic clock.
        deadline: when nobody needs the answer any more, or None.

    Attributes:
        asked: its parameters.
        model: the version that runs it.
        tally: of that version.
        session: its sequence's session, or None.
        face: how clients see it.
        states_asked: whether states are among the outputs that are asked for.
        timed: whether its inputs had a time axis.
        rows: its batch size.
        states: of the session after it, where the answer does not bring them and they were asked for.
        submitted: when it was queued.
        began: when the engine first ran it; None: it has not, for it was answered from memory or failed.
        computed: seconds in the engine.
        batch_rows: the most rows that the engine ran at once with it.
        done: when the engine last had run it.
        succeeded: whether there is an answer.
    """

    def __init__(self, meter: Meter, received: float, deadline: float | None) -> None:
        super().__init__(deadline)
        self._meter = meter
        self.received = received
        self.asked = _NOTHING
        self.model: LoadedModel | None = None
        self.tally: ModelTally | None = None
        self.session: Session | None = None
        self.face: Face | None = None
        self.states_asked = False
        self.timed = True
        self.rows = 0
        self.states: Arrays | None = None
        self.submitted = received
        self.began: float | None = None
        self.computed = 0.0
        self.batch_rows = 0
        self.done = received
        self.succeeded = False
        meter.waiting.add(self)

    def session_id(self, tag: int) -> str:
        """See `Sink`."""
        return "" if self.session is None else self.session.id

    def ran(self, started: float, ended: float, rows: int) -> None:
        """See `Metered`."""
        if self.began is None:
            self.began = started
        self.computed += ended - started
        self.batch_rows = max(self.batch_rows, rows)
        self.done = ended

    def result(self, answers: Answers) -> None:
        """See `Sink`."""
        self.succeeded = True
        self._meter.waiting.discard(self)
        super().result(answers)

    def failed(self, failures: Sequence[Failure]) -> None:
        """See `Sink`."""
        self._meter.waiting.discard(self)
        super().failed(failures)

    def forget(self) -> None:
        """Nobody waits for it any more."""
        self.cancelled = True
        self._meter.waiting.discard(self)
        if self._done.done():
            if not self._done.cancelled():
                self._done.exception()  # it was heard
        else:
            self._done.cancel()
