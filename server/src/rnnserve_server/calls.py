"""Calls whose answer somebody awaits."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from rnnserve_server.blocks import Answers, Failure, Tell


class Call:
    """The sink of one call.

    Args:
        deadline: the time of the clock after which nobody needs the answer, or None.
        session_id: the session that it is for, if there is one.
    """

    def __init__(self, deadline: float | None = None, session_id: str = "") -> None:
        self.cancelled = False
        self.deadline = deadline
        self._session_id = session_id
        self._done: asyncio.Future[Answers] = asyncio.get_running_loop().create_future()

    async def answer(self) -> Answers:
        """Waits for the answer. Whoever is cancelled meanwhile has the call dropped, if its turn has not come.

        Raises:
            ServiceError: the call failed.
        """
        try:
            return await self._done
        finally:
            self.cancelled = True

    def session_id(self, tag: int) -> str:
        """See `Sink`."""
        return self._session_id

    def result(self, answers: Answers) -> None:
        """See `Sink`."""
        if not self._done.done():
            self._done.set_result(answers)

    def ready(self, answers: Sequence[Answers]) -> Tell:
        """See `Sink`."""
        (answer,) = answers
        return partial(self.result, answer)

    def failed(self, failures: Sequence[Failure]) -> None:
        """See `Sink`."""
        if not self._done.done():
            self._done.set_exception(failures[0].error)

    def flush(self) -> None:
        """See `Sink`. What was told is all of the answer."""
