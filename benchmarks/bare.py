"""The least that a server of this model can do: the wire, the engine, and nothing else.

It decodes a frame, runs the graph and encodes the answer, in the handler of the stream. The states are those of the
stream's lanes, whatever lanes a frame names: there are no sessions, so nothing is looked up, checked, numbered,
remembered, batched across streams or told when it fails. Between it and the sum of its parts is what gRPC, the
interpreter and an engine cost one another when they take turns on one core; between rnnserve and it is what rnnserve
does.

    python -m benchmarks.bare       prints its port, and serves until it is killed
"""

from __future__ import annotations

from typing import Any

import uvloop

from rnnserve_server.process import tune

tune()  # before gRPC is loaded, as rnnserve does, so that what is between them is not this

import grpc  # noqa: E402

from benchmarks.echo import METHOD, SERVICE  # noqa: E402
from benchmarks.engine import Engine  # noqa: E402
from rnnserve.codec import decode, encode_into  # noqa: E402
from rnnserve.v1 import inference_pb2 as pb  # noqa: E402


async def stream(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    opens = (await context.read()).opens
    await context.write(pb.StreamResponse(opened=[pb.LaneOpened(lane=opening.lane) for opening in opens]))
    engine: Engine | None = None
    while (request := await context.read()) is not grpc.aio.EOF:
        frame = request.frames[0]
        x = decode(frame.inputs[0].tensor)  # [N, 1, T, features]
        lanes, _one, steps, _features = x.shape
        engine = engine or Engine(lanes, steps)
        y = engine.run(x[:, 0].swapaxes(0, 1))  # [T, N, units]
        response = pb.StreamResponse()
        result = response.frames.add(lanes=frame.lanes, first_steps=frame.first_steps, timesteps=steps)
        encode_into(result.outputs.add(name="output").tensor, y.swapaxes(0, 1)[:, None])
        await context.write(response)


async def main() -> None:
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)])
    handler: Any = grpc.stream_stream_rpc_method_handler(
        stream,
        request_deserializer=pb.StreamRequest.FromString,
        response_serializer=pb.StreamResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(main())
