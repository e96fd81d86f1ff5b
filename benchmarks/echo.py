"""A gRPC server that does nothing, as `grpc.aio` does it best: what rnnserve would be if it were free.

It answers rnnserve's own stream, so that rows of both use the same client. The first message of a stream is the answer
to all the others: no message is decoded, looked at or made here.

    python -m benchmarks.echo       prints its port, and echoes until it is killed
"""

from __future__ import annotations

from typing import Any

import grpc
import uvloop

SERVICE, METHOD = "rnnserve.v1.InferenceService", "Stream"


async def echo(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    reply = await context.read()
    while await context.read() is not grpc.aio.EOF:
        await context.write(reply)


async def main() -> None:
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)])
    handler: Any = grpc.stream_stream_rpc_method_handler(echo)  # without serializers: bytes in, bytes out
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(main())
