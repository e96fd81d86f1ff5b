"""The trace context of the caller, if it traces with OpenTelemetry.

OpenTelemetry is no requirement and is never loaded from here. Whoever is within a span has loaded it.
"""

from __future__ import annotations

import sys

#: Loaded by whoever traces.
MODULE = "opentelemetry.trace"


def active() -> bool:
    """Whether there may be a span."""
    return MODULE in sys.modules


def headers() -> list[tuple[str, str]]:
    """The caller's trace context, as the metadata of a call; empty outside of any span."""
    if MODULE not in sys.modules:
        return []
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return [(name.lower(), value) for name, value in carrier.items()]


def traceparent() -> str:
    """The span that the caller is within, as W3C Trace Context has it; empty if there is none or it is not sampled."""
    if MODULE not in sys.modules:
        return ""
    span = sys.modules[MODULE].get_current_span().get_span_context()
    if not (span.is_valid and span.trace_flags.sampled):
        return ""
    return f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"
