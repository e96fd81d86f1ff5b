"""``rnnserve top``: what servers are doing, live in a terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rnnserve_server.commands.scrape import Interval, Joined, Scrape, fetch

_MOST = 8  # reasons shown
_WIDTH = 200  # columns, where there is no terminal


class Watched:
    """The last two scrapes of some servers.

    Args:
        addresses: host:port of their metrics, or URLs.
        get: fetches the text of one.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        get: Callable[[str], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.addresses = addresses
        self.intervals: dict[str, Interval | None] = dict.fromkeys(addresses)
        self.troubles: dict[str, str] = {}
        self._get = get
        self._clock = clock
        self._last: dict[str, Scrape] = {}

    def look(self) -> None:
        """Scrapes them all, at the same time. One that does not answer is a trouble, not an error."""
        with ThreadPoolExecutor(max(1, len(self.addresses))) as pool:
            for address, found in zip(self.addresses, pool.map(self._scrape, self.addresses), strict=True):
                if isinstance(found, str):
                    self.troubles[address] = found
                    self.intervals[address] = None
                    self._last.pop(address, None)
                    continue
                self.troubles.pop(address, None)
                if address in self._last:
                    self.intervals[address] = Interval(self._last[address], found)
                self._last[address] = found

    def _scrape(self, address: str) -> Scrape | str:
        try:
            return Scrape.parse(self._get(address), self._clock())
        except (OSError, ValueError) as error:
            return str(getattr(error, "reason", error))


def frame(watched: Watched) -> Group:
    """What is shown of them: each server, and models, store and rejections of all together."""
    seen = {address: interval for address, interval in watched.intervals.items() if interval is not None}
    every = Joined(list(seen.values()))
    parts: list[RenderableType] = [_servers(watched, seen)]
    parts += [Text(f"{address}: {trouble}", "red") for address, trouble in watched.troubles.items()]
    parts += [_models(every), _latencies(every)]
    if every.total("rnnserve_store_seconds_count"):
        parts.append(_stores(every))
    parts.append(_rejections(every))
    return Group(*parts)


def _servers(watched: Watched, seen: Mapping[str, Interval]) -> Table:
    table = _table("server", "state", "sessions", "streams", "steps/s", "CPU", "memory", "errors/s")
    for address in watched.addresses:
        interval = seen.get(address)
        if interval is None:
            table.add_row(address, Text("no answer", "red") if address in watched.troubles else "...")
            continue
        after = interval.after
        table.add_row(
            address,
            Text("draining", "yellow") if after.total("rnnserve_draining") else Text("serving", "green"),
            _count(after.total("rnnserve_sessions")),
            _count(after.total("rnnserve_streams")),
            _count(interval.rate("rnnserve_steps_total")),
            f"{interval.rate('process_cpu_seconds_total'):.0%}",
            _bytes(after.total("process_resident_memory_bytes")),
            _count(interval.rate("rnnserve_rejections_total")),
        )
    return table


def _models(every: Joined) -> Table:
    table = _table("model", "sessions", "busy", "states", "queued", "replay", "replays/s", "chunks/s")
    for name, here in _named(every):
        table.add_row(
            name,
            _count(every.total("rnnserve_sessions", **here)),
            _count(every.total("rnnserve_sessions", **here, state="busy")),
            _bytes(every.total("rnnserve_state_bytes", **here)),
            _bytes(every.total("rnnserve_queue_bytes", **here)),
            _bytes(every.total("rnnserve_replay_bytes", **here)),
            _number(every.rate("rnnserve_replays_total", **here)),
            _count(every.rate("rnnserve_chunks_total", **here)),
        )
    return table


def _latencies(every: Joined) -> Table:
    table = _table("ticks", "steps/s", "rows", "p50", "p99", "queue p99", "engine p99")
    for name, here in _named(every):
        table.add_row(
            name,
            _count(every.rate("rnnserve_steps_total", **here)),
            _number(every.mean("rnnserve_tick_rows", **here)),
            _seconds(every.quantile(0.5, "rnnserve_tick_seconds", **here)),
            _seconds(every.quantile(0.99, "rnnserve_tick_seconds", **here)),
            _seconds(every.quantile(0.99, "rnnserve_queue_seconds", **here)),
            _seconds(every.quantile(0.99, "rnnserve_engine_seconds", **here)),
        )
    return table


def _named(every: Joined) -> Iterator[tuple[str, dict[str, str]]]:
    """Every model version, and the labels that tell it."""
    for model in every.values("rnnserve_model_info", "model"):
        for version in every.values("rnnserve_model_info", "version"):
            here = {"model": model, "version": version}
            if every.total("rnnserve_model_info", **here):
                yield f"{model} {version}", here


def _stores(every: Joined) -> Table:
    table = _table("store", "calls/s", "p50", "p99", "errors/s")
    for store in every.values("rnnserve_store_seconds_count", "store"):
        for operation in every.values("rnnserve_store_seconds_count", "operation"):
            here = {"store": store, "operation": operation}
            table.add_row(
                f"{store} {operation}",
                _number(every.rate("rnnserve_store_seconds_count", **here)),
                _seconds(every.quantile(0.5, "rnnserve_store_seconds", **here)),
                _seconds(every.quantile(0.99, "rnnserve_store_seconds", **here)),
                _number(every.rate("rnnserve_store_errors_total", **here)),
            )
    return table


def _rejections(every: Joined) -> Table:
    table = _table("error", "in all", "a second")
    name = "rnnserve_rejections_total"
    counts = {reason: every.total(name, reason=reason) for reason in every.values(name, "reason")}
    for reason in sorted(filter(counts.get, counts), key=counts.__getitem__, reverse=True)[:_MOST]:
        table.add_row(reason, _count(counts[reason]), _number(every.rate(name, reason=reason)))
    if not table.row_count:
        table.add_row("none", "", "")
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column(first, no_wrap=True, min_width=18)
    for each in others:
        table.add_column(each, justify="left" if each == "state" else "right", no_wrap=True, min_width=7)
    return table


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:,.1f}"


def _seconds(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2g} ms" if value < 0.01 else f"{value * 1e3:.0f} ms"


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def show(addresses: Sequence[str], interval: float, *, once: bool, timeout: float) -> dict[str, str]:
    """Shows servers until Ctrl-C, or once.

    Args:
        addresses: where they tell their metrics.
        interval: seconds between two looks.
        once: print one frame, not live.
        timeout: seconds to wait for an answer.

    Returns:
        Of a single frame, why servers could not be asked.
    """
    watched = Watched(addresses, lambda address: fetch(address, timeout))
    watched.look()
    if once:
        if len(watched.troubles) < len(addresses):
            time.sleep(interval)
            watched.look()
        console = Console()
        if not console.is_terminal:
            console = Console(width=_WIDTH)
        console.print(frame(watched))
        return watched.troubles
    with suppress(KeyboardInterrupt), Live(frame(watched), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            watched.look()
            title = Text(f"{datetime.now():%H:%M:%S}, every {interval:g} s; Ctrl-C ends", "dim")
            live.update(Group(title, frame(watched)), refresh=True)
    return {}
