"""What a connection may ask of the server before any of our code is asked."""

from __future__ import annotations

from typing import Any

from rnnserve_server.config import Settings

_STRIKES = 2  # pings that come too soon, before the connection is closed
_NEVER = 2**31 - 1  # milliseconds


def grpc_options(settings: Settings) -> list[tuple[str, Any]]:
    """The options of gRPC's server that the settings mean."""
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),  # a second server on the port is a mistake, not a way to share the load
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.max_concurrent_streams", settings.max_streams),
        # Of metadata between the two, gRPC would refuse some by chance.
        ("grpc.max_metadata_size", settings.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_metadata_bytes),
        ("grpc.server_handshake_timeout_ms", _milliseconds(settings.handshake_seconds)),
        ("grpc.max_connection_idle_ms", _milliseconds(settings.connection_idle_seconds)),
        ("grpc.max_connection_age_ms", _milliseconds(settings.connection_age_seconds)),
        ("grpc.max_connection_age_grace_ms", _milliseconds(settings.connection_grace_seconds)),
        ("grpc.keepalive_time_ms", _milliseconds(settings.keepalive_seconds)),
        ("grpc.keepalive_timeout_ms", _milliseconds(settings.keepalive_timeout_seconds)),
        ("grpc.http2.ping_timeout_ms", _milliseconds(settings.keepalive_timeout_seconds)),  # of its own pings too
        ("grpc.http2.max_pings_without_data", 0),  # while a stream is silent it asks again and again
        ("grpc.keepalive_permit_without_calls", 1),  # of clients too, which may keep a connection open between calls
        ("grpc.http2.min_ping_interval_without_data_ms", int(settings.min_ping_seconds * 1000)),
        ("grpc.http2.max_ping_strikes", _STRIKES),
    ]


def _milliseconds(seconds: float) -> int:
    return min(int(seconds * 1000), _NEVER) or _NEVER
