"""An event loop whose wait is that for gRPC's completion queue."""

from __future__ import annotations

import asyncio
import contextvars
import os
import select
import selectors
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import structlog
from grpc._cython import cygrpc

from rnnserve_server.wire.bell import Bell

log = structlog.get_logger(__name__)

# In one turn, so much is told of what has completed; timers and tasks have theirs then:
_TOLD_EVENTS = 1024
_TOLD_SECONDS = 0.005
_BEHIND_SECONDS = 0.001  # without a wait, after which connections may wait that nobody has looked at
_LOOKS = 8  # at connections, before it is taken for certain that nothing has completed

_clock = time.monotonic

Tell = Callable[[BaseException], None]


class CompletionLoop(asyncio.SelectorEventLoop):
    """asyncio's event loop, for whom sockets are the exception and gRPC is the rule.

    The tag of every operation that is started on `queue` is a function, which is called with the event when the
    operation completes: on the loop's thread, as the first thing of a turn.

    Args:
        queue: gRPC's completion queue.
        bell: what wakes whoever waits for it.
    """

    def __init__(self, queue: Any, bell: Bell) -> None:
        self.queue = queue
        self._bell = bell
        self._completions = _Completions(queue, bell.ring, self._tell)
        self._nobodys = contextvars.Context()
        super().__init__(self._completions)

    def at_turns_end(self, callback: Callable[[], object]) -> None:
        """Has a function called, in nobody's context, once all that has completed so far was told: in this turn of the
        loop, if called while that is told, else in its next one. On the loop's thread.
        """
        if self._completions.telling:
            self._completions.ends.append(callback)
        else:
            self.call_soon(callback, context=self._nobodys)

    def close(self) -> None:
        """See `asyncio.AbstractEventLoop.close`. Servers on it must have stopped."""
        if not self.is_closed():
            super().close()
            self.queue.shutdown()
            while self.queue.poll().completion_type != cygrpc.CompletionType.queue_shutdown:
                pass

    def _write_to_self(self) -> None:  # what asyncio calls to wake itself from another thread
        self._bell.ring()

    def _tell(self, error: BaseException) -> None:
        self.call_exception_handler({"message": "what waited for an operation of gRPC failed", "exception": error})


def new_event_loop(kind: Literal["completion", "uvloop"]) -> asyncio.AbstractEventLoop:
    """An event loop to serve on: uvloop's with ``uvloop``, and where gRPC or the system lacks what `CompletionLoop`
    stands on.
    """
    if kind == "completion":
        try:
            queue = cygrpc.CompletionQueue()
            return CompletionLoop(queue, Bell(queue))
        except (OSError, AttributeError, TypeError) as error:
            log.warning("serving with grpc.aio, which is slower", reason=str(error))
    import uvloop

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def at_turns_end(callback: Callable[[], object]) -> None:
    """See `CompletionLoop.at_turns_end`; in any other loop that runs, in its next turn."""
    loop = asyncio.get_running_loop()
    if isinstance(loop, CompletionLoop):
        loop.at_turns_end(callback)
    else:
        loop.call_soon(callback, context=contextvars.Context())


class _Completions(selectors.DefaultSelector):
    """Waits for a completion queue, and for files as `selectors.DefaultSelector` does.

    gRPC does not tell the files that it waits for, nor takes others. So a thread waits for ours, and rings when one is
    ready: once, until the loop finds none ready any more.

    Attributes:
        telling: it tells what has completed.
        ends: what to call when all of that was told.
    """

    def __init__(self, queue: Any, ring: Callable[[], None], tell: Tell) -> None:
        super().__init__()
        self._queue = queue
        self._ring = ring
        self._tell = tell
        self.telling = False
        self.ends: list[Callable[[], object]] = []
        self._waited_at = 0.0  # when it waited last
        self._seen = False  # a file was ready, and one may still be
        self._looking = threading.Lock()  # held: nobody looks out; not a semaphore, which is written in Python
        self._looking.acquire()
        self._ends, self._end = os.pipe()
        self._lookout = threading.Thread(target=self._look_out, name="files", daemon=True)
        self._lookout.start()
        self._looking.release()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """See `selectors.BaseSelector.select`; also tells what has completed, before anything else of the turn."""
        ready: list[tuple[selectors.SelectorKey, int]] = []
        if self._seen:
            ready = super().select(0)
            if ready:
                timeout = 0
            else:
                self._seen = False
                self._looking.release()
        work_waits = timeout is not None and timeout <= 0
        if work_waits:
            event = self._look(2)
        else:
            event = self._queue.poll(deadline=None if timeout is None else time.time() + timeout)
            self._waited_at = _clock()
        looks = 2 if work_waits else 1
        left, until = _TOLD_EVENTS, _clock() + _TOLD_SECONDS
        self.telling = True
        try:
            while event.tag is not None or self.ends:
                while (told := event.tag) is not None and left:
                    try:
                        told(event)
                    except (SystemExit, KeyboardInterrupt):
                        raise
                    except BaseException as error:
                        self._tell(error)
                    left = left - 1 if _clock() < until else 0
                    event = self._look(looks) if left else event
                if not self.ends:
                    break
                ends, self.ends = self.ends, []
                for end in ends:
                    try:
                        end()
                    except (SystemExit, KeyboardInterrupt):
                        raise
                    except BaseException as error:
                        self._tell(error)
                if not left:
                    break
                event = self._look(looks)  # what they have sent may be on its way already
        finally:
            self.telling = False
        return ready

    def _look(self, looks: int) -> Any:
        """What has completed, without a wait; an event without a tag if nothing has, for all of so many looks.

        Where work waits gRPC is to be asked twice: what this thread itself has completed, as by sending, makes gRPC's
        next look a short one that reads no socket. And it reads from one connection whenever it is asked, and says that
        nothing has completed if that made nothing complete. While the loop has no time to wait, somebody who sends
        halves of messages, or frames of no call, on a few connections would so have others' messages lie where they are
        for several turns.
        """
        poll = self._queue.poll
        event = poll(deadline=0.0)
        if event.tag is None:
            if _clock() - self._waited_at > _BEHIND_SECONDS:
                looks = _LOOKS
            for _ in range(looks - 1):
                event = poll(deadline=0.0)
                if event.tag is not None:
                    break
        return event

    def close(self) -> None:
        """See `selectors.BaseSelector.close`."""
        os.close(self._end)
        if self._looking.locked():
            self._looking.release()
        self._lookout.join()
        os.close(self._ends)
        super().close()

    def _look_out(self) -> None:
        waiting = select.poll()
        waiting.register(self.fileno(), select.POLLIN)
        waiting.register(self._ends, select.POLLIN)
        while True:
            self._looking.acquire()
            if any(number == self._ends for number, _ in waiting.poll()):
                return
            self._seen = True
            self._ring()
