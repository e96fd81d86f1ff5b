"""A SQLite file that several processes may have open: the connection, the thread, the write-ahead log.

All that may take long is the thread's: to wait for another process, for a slow disk, and to move the log back into the
file. To append to the log is neither, and the event loop may do it itself when the thread has nothing to do with the
connection: to hand it over and back takes as long as to do it. So it is not SQLite that syncs the log within a commit,
but the thread, behind it; or, if the disk is as fast as that, the event loop, a turn later. Nothing is told before.
"""

from __future__ import annotations

import asyncio
import contextvars
import ctypes
import math
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

from rnnserve_server.store.base import StoreCorrupt, StoreError, StoreMisconfigured, StoreUnavailable, settles

PAGE_BYTES = 16384
_LOG_PAGES = 4000  # a page written many times is moved back into the file once
_CACHE_KIB = 65536
_FRAME_BYTES = PAGE_BYTES + 24  # of the log: a page and what is said of it
# What Linux keeps of a file in memory lies in pieces as large as what was first written there at once. To write to
# large ones again, and to have them on the disk, takes two thirds as long; and SQLite writes page by page.
_PIECE = bytes(131072)
_LEAST_AHEAD_BYTES = 1 << 20
_MOST_AHEAD_BYTES = 4 << 20  # written at once, in two or three milliseconds
_WRITE = 2  # of `sync_file_range`
_RETRY_SECONDS = 0.001
_PAGES_HERE = _LOG_PAGES // 2  # that the event loop writes before the thread has its turns
_TURNS = 2  # of the thread: one that may move the log, and the next, which begins it anew and waits for the disk

P = ParamSpec("P")
T = TypeVar("T")

_clock = time.perf_counter
_sync_file_range = None
with suppress(OSError, AttributeError, TypeError):
    _sync_file_range = ctypes.CDLL(None).sync_file_range


class SqliteFile:
    """A file.

    Args:
        path: where it is.
        synchronous: what a commit waits for: "full" for the disk, "normal" for the operating system.
        patience: seconds to wait for another process's transaction.
        inline_seconds: for which the event loop may wait for the disk.
        forget: called when a transaction was rolled back.

    Attributes:
        db: the connection, once there is one.
        failed: why nothing is stored any more; empty: nothing is wrong for good.
    """

    def __init__(
        self,
        path: Path,
        synchronous: Literal["full", "normal"],
        patience: float,
        inline_seconds: float,
        *,
        forget: Callable[[], None],
    ) -> None:
        self.db: sqlite3.Connection
        self._path = path
        self._full = synchronous == "full"
        self._patience = patience
        self._inline_seconds = inline_seconds
        self._forget = forget
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        # What the thread was given to do with the connection, counted by the loop, and has done, counted by the thread.
        self._given = self._done = 0
        self._log = -1  # a descriptor of the log
        self._committed = self._synced = 0  # transactions
        self._sync_seconds = math.inf  # that the disk is expected to take
        self.failed = ""
        self._moves_log = True  # a commit moves the log back into the file when it is long
        self._pages_here = 0  # written by the event loop since the thread had its turns
        self._turns = 0  # that it has had since

    # On the event loop

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What a function that uses the connection returns, on the thread, when what it has stored is on the disk. It
        is called again as long as another process has the file locked: before its first transaction it changes nothing.

        Raises:
            StoreError: SQLite failed.
        """
        result: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.begin(partial(function, *args, **kwargs), settles(result))
        return await result

    def begin(self, function: Callable[[], T], told: Callable[[T | Exception], None]) -> None:
        """As `run`, for who has no task to wait in: what came of it is told on the event loop, in nobody's context."""
        self._given += 1

        def call() -> T:
            try:
                return self._call(function)
            finally:
                self._done += 1

        self._begin(call, told)

    @property
    def is_idle(self) -> bool:
        """Whether the thread has nothing to do with the connection, nor with what describes the file."""
        return self._given == self._done and not self.failed

    def here(self, function: Callable[[], bool], pages: int) -> bool:
        """Calls a function that appends about so many pages to the log, in a transaction, now, unless the thread is to
        have its turns: whether it has done so. What it did is stored when `synced` says so.

        The file must be idle.
        """
        if self._pages_here > _PAGES_HERE:
            return False
        try:
            self._move_log(False)
            with self.transaction():
                done = function()
        except sqlite3.Error:  # the thread finds out what is wrong, and waits for another process
            return False
        self._pages_here += pages
        return done

    def synced(self, told: Callable[[Exception | None], None]) -> None:
        """Tells when all that was committed is stored, as `begin` does."""
        soon = partial(asyncio.get_running_loop().call_soon, context=contextvars.Context())
        if not self._full:
            soon(told, None)
        elif self._sync_seconds < self._inline_seconds:
            _begin_writing(self._log)  # which takes place beside what is done in this turn, and what comes in meanwhile
            soon(self._sync_here, told)
        else:
            self._begin(self._sync, told)
            time.sleep(0)  # lets the thread begin, so that what the caller does next takes place beside it

    def _sync_here(self, told: Callable[[Exception | None], None]) -> None:
        error: Exception | None = None
        try:
            self._sync()
        except Exception as failure:  # told, as of what the thread does
            error = failure
        told(error)

    async def close(self) -> None:
        """Waits for what is under way, and closes the file."""
        await asyncio.sleep(0)  # a sync may be next
        closed: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self._begin(self._close, closed.set_result)
        error = await closed
        self.shutdown()
        if error is not None:
            raise error

    def shutdown(self) -> None:
        """Ends the thread."""
        self._thread.shutdown()

    def _begin(self, function: Callable[[], T], told: Callable[[T | Exception], None]) -> None:
        loop = asyncio.get_running_loop()

        def call() -> None:
            try:
                result: T | Exception = function()
            except Exception as error:
                result = error
            loop.call_soon_threadsafe(told, result)

        self._thread.submit(call)

    # With the connection

    def connect(self) -> None:
        """Opens the file, or makes it, for its owner only, and changes nothing there."""
        try:
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            hint = "the folder must be there, and writable for this user"
            raise StoreMisconfigured(f"{self._path}: cannot be opened: {error.strerror}: {hint}") from error
        # Without a timeout, for the event loop must not wait; used by one thread at a time, see `_given`.
        self.db = sqlite3.connect(self._path, timeout=0, isolation_level=None, check_same_thread=False)

    def begin_log(self) -> None:
        """Turns the write-ahead log on."""
        self.db.execute(f"PRAGMA page_size = {PAGE_BYTES}")  # of a file that is still empty
        (mode,) = self.db.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise StoreMisconfigured(
                f"{self._path}: a write-ahead log is not possible on this file system; choose a local disk"
            )
        self.db.execute("PRAGMA synchronous = normal")  # the log is synced before it is moved, and by `_sync`
        self.db.execute(f"PRAGMA wal_autocheckpoint = {_LOG_PAGES}")
        # More than the log mostly has, or it would be cut and grow again each time it is moved.
        self.db.execute(f"PRAGMA journal_size_limit = {2 * _LOG_PAGES * PAGE_BYTES}")
        # Some builds of SQLite overwrite what is deleted, and so write every tick twice.
        self.db.execute("PRAGMA secure_delete = off")
        self.db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        self.db.execute("SELECT 1 FROM sqlite_schema").fetchone()  # there is a log from the first look on
        _, _, file = self.db.execute("PRAGMA database_list").fetchone()  # of a link, what it leads to
        self._log = os.open(f"{file}-wal", os.O_RDWR | os.O_CLOEXEC)

    def abandon(self) -> None:
        """Closes the connection."""
        try:
            self.db.close()
        finally:
            if self._log >= 0:
                os.close(self._log)
                self._log = -1

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """A transaction that writes."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            self._write_ahead()
            yield
            self.db.execute("COMMIT")
            self._committed += 1
        except BaseException:
            self._forget()
            if self.db.in_transaction:
                self.db.execute("ROLLBACK")
            raise

    def _write_ahead(self) -> None:
        """Writes zeros behind the log, in large pieces, if SQLite is about to come to its end: in a transaction, where
        nobody else writes. SQLite reads a log as far as it is whole, so that zeros are nothing to it.
        """
        # Who asks `fstat` asks for the time of the last write, too: Linux then notes the next one's, and syncs that.
        if self._log < 0 or (size := os.lseek(self._log, 0, os.SEEK_END)) >= _LOG_PAGES * _FRAME_BYTES:
            return
        near = os.pread(self._log, _FRAME_BYTES, max(size // 2, size - _LEAST_AHEAD_BYTES))
        if size and not near.strip(b"\0"):
            return
        end = size + max(len(_PIECE), min(size, _MOST_AHEAD_BYTES))
        with suppress(OSError):  # SQLite says so, if it has to
            while size < end:
                size += os.pwrite(self._log, _PIECE[size % len(_PIECE) :], size)

    def _move_log(self, may: bool) -> None:
        """Whether a commit may move a long log back into the file."""
        if self._moves_log != may:
            self.db.execute(f"PRAGMA wal_autocheckpoint = {_LOG_PAGES if may else 0}")
            self._moves_log = may

    # On the thread

    def _call(self, function: Callable[[], T]) -> T:
        if self.failed:
            raise StoreUnavailable(self.failed)
        deadline = time.monotonic() + self._patience
        while True:
            try:
                self._move_log(True)
                committed, result = self._committed, function()
            except sqlite3.Error as error:
                if _code(error) == sqlite3.SQLITE_BUSY and time.monotonic() < deadline:
                    time.sleep(_RETRY_SECONDS)
                    continue
                raise self._explained(error) from error
            if self._committed > committed:
                self._turns += 1
                if self._turns >= _TURNS:
                    self._turns = self._pages_here = 0
            if self._full:
                self._sync()
            return result

    def _sync(self) -> None:
        """Waits until all that was committed is on the disk."""
        if self.failed:
            raise StoreUnavailable(self.failed)
        committed = self._committed  # what is committed meanwhile may come too late for this one
        if committed == self._synced:
            return
        began_at = _clock()
        try:
            getattr(os, "fdatasync", os.fsync)(self._log)  # macOS has no fdatasync
        except OSError as error:
            # If it were tried again, the system might say that all is well.
            self.failed = (
                f"{self._path}: the machine failed to write the file ({error.strerror}), and nothing is stored any "
                "more; look at its disk, and start the server again"
            )
            raise StoreUnavailable(self.failed) from error
        self._synced = committed
        seconds, before = _clock() - began_at, self._sync_seconds
        self._sync_seconds = seconds if before == math.inf else before + 0.2 * (seconds - before)

    def _close(self) -> None:
        try:
            self.abandon()
        except sqlite3.Error as error:
            raise self._explained(error) from error

    def _explained(self, error: sqlite3.Error) -> StoreError:
        code, name = _code(error), getattr(error, "sqlite_errorname", "")
        what = f"{self._path}: {error}" + (f" ({name})" if name else "")
        if code == sqlite3.SQLITE_NOTADB:
            return StoreMisconfigured(f"{what}: name a file of rnnserve's own, or one that is not there yet")
        if code == sqlite3.SQLITE_CANTOPEN:
            return StoreMisconfigured(f"{what}: the folder must be there, and writable for this user")
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH):
            return StoreMisconfigured(f"{what}: the file and its folder must be writable for this user")
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return StoreUnavailable(f"{what}: another process kept the file locked for {self._patience:g} s")
        if code == sqlite3.SQLITE_FULL:
            return StoreUnavailable(f"{what}: the disk is full; make room")
        if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM):
            return StoreUnavailable(
                f"{what}: the machine failed to read or write the file; look at its disk and memory"
            )
        if code == sqlite3.SQLITE_CORRUPT:
            return StoreCorrupt(
                f"{what}: the file is damaged; stop the server and restore a copy, save what is left with "
                f"`sqlite3 {self._path} .recover | sqlite3 mended.db`, or move it away and lose its sessions"
            )
        return StoreCorrupt(f"{what}: the file does not hold what rnnserve keeps in it; move it away, or name another")


def _begin_writing(log: int) -> None:
    """Has the system write a log to the disk, and does not wait: where it can be told to, which is Linux."""
    if _sync_file_range is not None:
        _sync_file_range(log, ctypes.c_int64(0), ctypes.c_int64(0), _WRITE)


def _code(error: sqlite3.Error) -> int:
    """SQLite's own, without what says more about it."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
