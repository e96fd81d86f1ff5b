"""HTTP/2 frames at random: mostly such as a connection survives, so that what comes behind them is looked at too."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import hpack

from fuzz.messages import UNARY, stream_request, unary_request
from raw_http2 import STREAM, headers_of, message

_DATA, _HEADERS, _PRIORITY, _RST, _SETTINGS, _PUSH, _PING, _GOAWAY, _WINDOW, _CONTINUATION = range(10)
_END_STREAM, _END_HEADERS = 1, 4
_METHODS = (STREAM, *(method for method, _ in UNARY), "/nobody/knows", "", "/", "/" + "x" * 300)


class Talk:
    """What one connection says, frame by frame, until it says something that ends it.

    Args:
        chance: decides.
        token: shown by most calls.
    """

    def __init__(self, chance: Random, token: str) -> None:
        self._chance = chance
        self._token = token
        self._stream = 1
        self._open: list[int] = []
        self._pings = 0
        self.over = False

    def frames(self, most: int) -> Iterator[bytes]:
        """At most so many; fewer if one of them ends the connection."""
        for _ in range(most):
            yield self._next()
            if self.over:
                return

    def _next(self) -> bytes:
        chance = self._chance.random
        draw = chance()
        if draw < 0.22 or not self._open:
            return self._call()
        stream = self._chance.choice(self._open)
        if draw < 0.62:
            return self._data(stream)
        if draw < 0.74:
            return self._end(stream)
        if draw < 0.82:
            return _frame(_WINDOW, 0, stream, self._number(1, 1000).to_bytes(4, "big"))
        if draw < 0.90:  # of a kind that nobody knows, to be passed over
            return _frame(self._chance.randrange(0x20, 256), self._chance.randrange(256), stream, self._some(40))
        if draw < 0.95:
            return _frame(_PRIORITY, 0, stream, self._some(5, exactly=True))
        if draw < 0.975:
            return _frame(_SETTINGS, 0, 0, self._settings())
        if draw < 0.98 and self._pings < 2:
            self._pings += 1
            return _frame(_PING, 0, 0, self._some(8, exactly=True))
        self.over = True
        return self._last()

    def _call(self) -> bytes:
        """Headers, right or nearly so. A call that is refused by its headers is not used any more."""
        chance = self._chance
        stream, self._stream = self._stream, self._stream + 2
        headers = headers_of(chance.choice(_METHODS if chance.random() < 0.3 else (STREAM, STREAM, UNARY[0][0])))
        if chance.random() < 0.9:
            headers.append(("authorization", f"Bearer {self._token}"))
        fault = chance.random()
        if fault < 0.05:
            headers.append(
                (chance.choice(("grpc-timeout", "grpc-encoding", "x-bin")), chance.choice(("1n", "9", "??")))
            )
        elif fault < 0.1:
            del headers[chance.randrange(4)]
        elif fault < 0.15:
            headers.append(("x-bomb", "y" * 20_000))
        self._open = [*self._open[-15:], stream]
        # No table, so that a block that is lost does not spoil those behind it.
        encoder = hpack.Encoder()
        block = encoder.encode([hpack.NeverIndexedHeaderTuple(*pair) for pair in headers], huffman=False)
        return _frame(_HEADERS, _END_HEADERS, stream, block)

    def _data(self, stream: int) -> bytes:
        chance = self._chance
        draw = chance.random()
        if draw < 0.6:
            content = message(stream_request(chance, 1).SerializeToString())
        elif draw < 0.8:
            content = message(unary_request(chance)[1])
        elif draw < 0.9:
            content = message(self._some(50), length=self._number(0, 2**32 - 1))
        else:
            content = self._some(50)
        return _frame(_DATA, _END_STREAM if chance.random() < 0.2 else 0, stream, content[:16384])

    def _end(self, stream: int) -> bytes:
        self._open.remove(stream)
        if self._chance.random() < 0.5:
            return _frame(_RST, 0, stream, self._number(0, 14).to_bytes(4, "big"))
        return _frame(_DATA, _END_STREAM, stream, b"")

    def _settings(self) -> bytes:
        """Some that are allowed, at random."""
        chance = self._chance
        kinds = (
            (1, 0, 4096),
            (3, 0, 1000),
            (4, 0, 2**31 - 1),
            (5, 16384, 2**24 - 1),
            (6, 0, 2**20),
            (99, 0, 2**32 - 1),
        )
        pairs = [chance.choice(kinds) for _ in range(chance.randrange(4))]
        return b"".join(
            kind.to_bytes(2, "big") + self._number(low, high).to_bytes(4, "big") for kind, low, high in pairs
        )

    def _last(self) -> bytes:
        """What no connection survives, or may not."""
        chance = self._chance
        kind = chance.randrange(12)
        length = None if chance.random() < 0.6 else self._number(0, 2**24 - 1)
        stream = chance.choice((0, 1, 2, self._stream, 2**31 - 1))
        return _frame(kind, chance.randrange(256), stream, self._some(200), length=length)

    def _number(self, low: int, high: int) -> int:
        return self._chance.choice((low, high, self._chance.randint(low, high)))

    def _some(self, most: int, *, exactly: bool = False) -> bytes:
        return self._chance.randbytes(most if exactly else self._chance.randrange(most + 1))


def _frame(kind: int, flags: int, stream: int, payload: bytes, *, length: int | None = None) -> bytes:
    size = len(payload) if length is None else length
    return size.to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload
