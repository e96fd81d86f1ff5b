"""Where sessions are kept, so that they outlive memory, a process or a machine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from rnnserve_server.store.base import (
    REMEMBERED,
    End,
    Ended,
    Head,
    Meta,
    Record,
    Reply,
    Store,
    StoreCorrupt,
    StoreError,
    StoreMisconfigured,
    StoreUnavailable,
    Write,
    first_epoch,
)

__all__ = [
    "End",
    "Ended",
    "Head",
    "Meta",
    "Record",
    "Reply",
    "Store",
    "StoreCorrupt",
    "StoreError",
    "StoreMisconfigured",
    "StoreUnavailable",
    "Write",
    "first_epoch",
    "open_store",
]


async def open_store(
    url: str,
    *,
    synchronous: Literal["full", "normal"] = "full",
    prefix: str = "rnnserve:",
    remember: float = REMEMBERED,
    patience: float = 5.0,
    inline_seconds: float = 0.0005,
) -> Store:
    """Opens a store.

    Args:
        url: ``memory``; ``sqlite:///absolute/path``, ``sqlite:relative/path`` or a path with a slash or a dot in it;
            ``redis://host:port/database``, ``rediss://...`` (TLS) or ``unix://path``, as `RedisStore.open` has them.
        synchronous: of SQLite: what a commit waits for, "full" for the disk, "normal" for the operating system.
        prefix: of Redis: what all keys begin with.
        remember: seconds for which it is remembered why a session ended.
        patience: seconds to wait for Redis, or for another process that writes to the file.
        inline_seconds: of SQLite: for which the event loop may be kept to append ticks to the file, and to wait for the
            disk.

    Raises:
        StoreMisconfigured: there is no such store; the message says what is.
        StoreCorrupt: the file is damaged.
        StoreUnavailable: it does not answer.
    """
    scheme, _, rest = url.partition(":")
    if url == "memory":
        from rnnserve_server.store.memory import MemoryStore

        return MemoryStore(remember=remember)
    if scheme in ("redis", "rediss", "valkey", "valkeys", "unix"):
        from rnnserve_server.store.redis import RedisStore

        return await RedisStore.open(url, prefix=prefix, remember=remember, patience=patience)
    path = url
    if scheme == "sqlite":
        path = unquote(rest.removeprefix("//"))
        if rest.startswith("//") and not path.startswith("/"):
            path = ""
    if not path or "://" in path or (scheme != "sqlite" and not {"/", "."} & set(path)):
        raise StoreMisconfigured(
            f"a store is memory, sqlite:///absolute/path, sqlite:relative/path, ./a/path, redis://host:port/database, "
            f"rediss://... or unix://path; got {url!r}"
        )
    from rnnserve_server.store.sqlite import SqliteStore

    return await SqliteStore.open(
        Path(path), synchronous=synchronous, remember=remember, patience=patience, inline_seconds=inline_seconds
    )
