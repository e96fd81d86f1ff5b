"""The wire: an event loop that waits for gRPC itself, and a server of `grpc.aio`'s shape on it.

`grpc.aio` waits for gRPC on a thread of its own, hands what has come to the event loop through a socket, and makes a
future and a wake-up of every part of a message. Here the event loop's own wait is that for gRPC's completion queue, as
a server in C++ would have it, and what completes is told to whom it concerns, at once: half of the CPU time of a
message.

What it stands on, `grpc._cython.cygrpc`, is the layer that both of gRPC's servers for Python stand on. It is not a
public one. So grpcio is pinned, and `server.py` falls back to `grpc.aio` on every other event loop.
"""
