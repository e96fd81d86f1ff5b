"""A session as one blob that says what it is: a safetensors file, as ExportSessionResponse describes it."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from rnnserve_models.engine.base import Arrays
from rnnserve_models.options import LayerOptions
from rnnserve_server.errors import BlobInvalid
from rnnserve_server.replay import Limits
from rnnserve_server.resets import NO_RULES, ResetRules

FORMAT = "rnnserve-session"
VERSION = 2

_WITHOUT_RULES = 1  # the version of a blob that servers can read which know no reset rules

_LENGTH_BYTES = 8  # of a safetensors file's header, in front of it
_MAX_HEADER_BYTES = 1 << 20
_NO_CHECKSUM = "0" * 64
_MOST = 2**62  # a session that has come so far can still go on


@dataclass(frozen=True, slots=True)
class Exported:
    """What a blob holds of a session.

    Attributes:
        model: its model's name.
        version: its model's version.
        digest: its model's digest: what the states are good for.
        batch_size: rows of every call.
        options: the layer's options.
        step: time steps consumed.
        idle_lifetime: seconds.
        lifetime: seconds, or None.
        replay: how much its replay window held.
        states: every state, [batch_size, *shape], and what the rules need beside them.
        rules: when its states are reset by themselves.
    """

    model: str
    version: str
    digest: str
    batch_size: int
    options: dict[str, bool]
    step: int
    idle_lifetime: float
    lifetime: float | None
    replay: Limits
    states: Arrays
    rules: ResetRules = NO_RULES


def pack(session: Exported, now: float) -> bytes:
    """Writes a blob; ``now`` is the time, in seconds since the epoch."""
    metadata = {
        "format": FORMAT,
        "version": str(_WITHOUT_RULES if session.rules == NO_RULES else VERSION),
        "model": session.model,
        "model_version": session.version,
        "digest": session.digest,
        "batch_size": str(session.batch_size),
        "step": str(session.step),
        "options": json.dumps(session.options, sort_keys=True),
        "idle_lifetime": repr(session.idle_lifetime),
        "replay_chunks": str(session.replay.replies),
        "replay_bytes": str(session.replay.bytes),
        "created": datetime.fromtimestamp(now, UTC).isoformat(),
        "checksum": _NO_CHECKSUM,
    }
    if session.lifetime is not None:
        metadata["lifetime"] = repr(session.lifetime)
    if session.rules != NO_RULES:
        metadata["reset_every_steps"] = str(session.rules.every_steps)
        metadata["reset_masked_steps"] = str(session.rules.masked_steps)
    tensors = {name: np.ascontiguousarray(state) for name, state in session.states.items()}
    blob = bytes(save(tensors, metadata))
    return blob.replace(_NO_CHECKSUM.encode(), hashlib.sha256(blob).hexdigest().encode(), 1)


def unpack(blob: bytes) -> Exported:
    """Reads what `pack` wrote. Takes time and memory in proportion to the blob, whatever it claims to hold.

    Raises:
        BlobInvalid: it wrote something else, or the blob is damaged.
    """
    metadata = _metadata(blob)
    if metadata.get("format") != FORMAT:
        raise BlobInvalid(f"an exported session (format {FORMAT!r})", f"format {metadata.get('format')!r:.80}")
    version = metadata.get("version")
    if version is None or not version.isdecimal() or len(version) > 9:
        raise BlobInvalid("a version in decimals", f"{version!r:.80}")
    if not 0 < int(version) <= VERSION:
        raise BlobInvalid(
            f"version {VERSION} or older", f"version {version}", "a newer server wrote it: import it there"
        )
    said = str(metadata.get("checksum")).encode(errors="surrogatepass")
    if len(said) != len(_NO_CHECKSUM) or blob.count(said) != 1:
        raise BlobInvalid("one checksum of 64 hexadecimal digits", f"{said[:80]!r}")
    if hashlib.sha256(blob.replace(said, _NO_CHECKSUM.encode(), 1)).hexdigest().encode() != said:
        raise BlobInvalid("the bytes that were exported", "others", "the blob was damaged on its way: export it again")
    try:
        return Exported(
            model=metadata["model"],
            version=metadata["model_version"],
            digest=metadata["digest"],
            batch_size=_number(metadata["batch_size"], 1),
            options=_options(json.loads(metadata["options"])),
            step=_number(metadata["step"]),
            idle_lifetime=_seconds(metadata["idle_lifetime"]),
            lifetime=_seconds(metadata["lifetime"]) if "lifetime" in metadata else None,
            replay=Limits(_number(metadata["replay_chunks"]), _number(metadata["replay_bytes"])),
            states=load(blob),
            rules=ResetRules(
                _number(metadata.get("reset_every_steps", "0")), _number(metadata.get("reset_masked_steps", "0"))
            ),
        )
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise BlobInvalid("an exported session", f"one that cannot be read ({error!r:.200})") from error


def _metadata(blob: bytes) -> dict[str, str]:
    length = int.from_bytes(blob[:_LENGTH_BYTES], "little")
    if length > min(_MAX_HEADER_BYTES, len(blob) - _LENGTH_BYTES):
        raise BlobInvalid("a safetensors file", f"{len(blob)} bytes with a header of {length}")
    try:
        header = json.loads(blob[_LENGTH_BYTES : _LENGTH_BYTES + length])
    except (ValueError, RecursionError) as error:
        raise BlobInvalid("a safetensors file", f"{len(blob)} bytes whose header is not JSON") from error
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise BlobInvalid("a safetensors file with metadata", "none")
    if others := sorted(name for name, value in metadata.items() if not isinstance(value, str)):
        raise BlobInvalid("metadata that are texts", f"others as {', '.join(others)[:200]!r}")
    return metadata


def _number(text: str, least: int = 0) -> int:
    number = int(text)
    if not least <= number <= _MOST:
        raise ValueError(f"{text[:40]!r} is not a number from {least} to 2**62")
    return number


def _options(said: dict[str, Any]) -> dict[str, bool]:
    return dict(vars(LayerOptions(**{name: bool(value) for name, value in said.items()})))


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise ValueError(f"{text[:40]!r} are not seconds")
    return seconds
