"""Who waits for an answer: a future of an event loop, or a thread with a ticket; and how they are told."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from threading import Lock
from typing import Any

from rnnserve._chunks import Answer

#: Threads that are woken at once; each of them wakes another. Were all woken at once, every one of them would find the
#: interpreter busy, and have to be woken twice. One alone would have to be waited for by the processor each time.
_CHAINS = 4


class Ticket:
    """The place of one thread that waits for one answer.

    What the event loop answers in one go it answers in chains: a thread that is woken wakes the next one before it does
    anything else. Only a thread that is in `result`, or about to be, may be part of one. If it does not come that far,
    or leaves, it has to say so by `leave`; once is enough, but more do no harm.

    Args:
        waited: a thread is in `result` now or will be next; else it may come any time, and is no part of a chain.
    """

    __slots__ = ("_cancelled", "_done", "_error", "_following", "_gone", "_lock", "_released", "_value", "waited")

    def __init__(self, *, waited: bool = True) -> None:
        self.waited = waited
        self._lock = Lock()
        self._lock.acquire()
        self._done = self._cancelled = self._released = self._gone = False
        self._value: Any = None
        self._error: BaseException | None = None
        self._following: list[Ticket] | None = None  # at most one, in a list because its `pop` is atomic

    # The thread

    def result(self, timeout: float | None = None) -> Any:
        """The answer, or its error raised; TimeoutError after so many seconds."""
        if not self._lock.acquire(timeout=-1 if timeout is None else max(timeout, 0)):
            raise TimeoutError
        self._lock.release()  # for whoever asks again
        if self._following is not None:
            self._wake_following()
        if self._error is not None:
            raise self._error
        return self._value

    def leave(self) -> None:
        """The thread waits no longer."""
        self._gone = True
        if self._released:
            self._wake_following()

    # The event loop

    def done(self) -> bool:
        """Whether there is an answer, or it was cancelled."""
        return self._done

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self._cancelled

    def cancel(self) -> bool:
        """Takes no answer any more. False: it has one."""
        if self._done:
            return False
        self._done = self._cancelled = True
        return True

    def set_result(self, value: Any) -> None:
        """The answer; the thread runs on."""
        self._set(value, None)
        self._release()

    def set_exception(self, error: BaseException) -> None:
        """The error; the thread runs on."""
        self._set(None, error)
        self._release()

    def _set(self, value: Any, error: BaseException | None) -> None:
        self._value, self._error = value, error
        self._done = True

    def _release(self) -> None:
        self._released = True
        self._lock.release()
        if self._gone:
            self._wake_following()

    def _wake_following(self) -> None:
        """May be called by the thread and by whoever released it at once: one of them does it."""
        try:
            following = self._following.pop() if self._following else None
        except IndexError:
            return
        if following is not None:
            following._release()


def deliver(ticket: Any, value: Any, error: BaseException | None = None) -> None:
    """Answers a ticket or a future, unless whoever held it has stopped waiting."""
    if ticket.done():
        return
    if error is None:
        ticket.set_result(value)
    else:
        ticket.set_exception(error)


def deliver_all(answers: Iterable[Answer]) -> None:
    """Answers many at once, threads in chains."""
    threads: list[Ticket] = []
    for ticket, value, error in answers:
        if isinstance(ticket, asyncio.Future):
            if not ticket.done():
                if error is None:
                    ticket.set_result(value)
                else:
                    ticket.set_exception(error)
        elif isinstance(ticket, Ticket) and ticket.waited:
            if not ticket.done():
                ticket._set(value, error)
                threads.append(ticket)
        else:
            deliver(ticket, value, error)
    for ticket, following in zip(threads, threads[_CHAINS:], strict=False):
        ticket._following = [following]
    for ticket in threads[:_CHAINS]:
        ticket._release()
