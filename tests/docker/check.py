"""Uses a running server as a client does: ``python tests/docker/check.py localhost:50051``.

Needs nothing but the installed client. Prints a line for each check, and ends with status 1 if one failed. With
``hold`` as a second argument it opens a stream instead, and keeps it open until its standard input ends. ``remember``
begins a session and prints its id, and ``recall ID`` goes on with it.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

import grpc
import numpy as np

import rnnserve

MODEL = "lstm-32-64"
rng = np.random.default_rng(7)


def health_is_serving(address: str) -> None:
    with grpc.insecure_channel(address) as channel:
        # The bytes of HealthCheckRequest() and of HealthCheckResponse(status=SERVING): the client's requirements do not
        # include the health stubs.
        reply = channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=10)
    assert reply == b"\x08\x01", f"health answered {reply!r}, expected SERVING"


def layer_returns_sequences_and_states(address: str) -> None:
    with rnnserve.Client(address) as client:
        rnn = client.RNN(MODEL, return_sequences=True, return_state=True)
        y, *states = rnn(np.zeros((8, 10, 5), np.float32))
    assert y.shape == (8, 10, 64), y.shape
    assert len(states) == 2, len(states)
    assert np.isfinite(y).all()


def two_halves_equal_one_call(address: str) -> None:
    x = rng.standard_normal((8, 10, 5), np.float32)
    with rnnserve.Client(address) as client:
        whole = client.RNN(MODEL, return_sequences=True)(x)
        live = client.RNN(MODEL, return_sequences=True, stateful=True)
        halves = np.concatenate([live(x[:, :5]), live(x[:, 5:])], axis=1)
        live.close()
    np.testing.assert_array_equal(halves, whole)
    assert not np.array_equal(whole[:, :5], whole[:, 5:]), "the outputs do not depend on the inputs"


def reset_states_starts_again(address: str) -> None:
    x = rng.standard_normal((2, 4, 5), np.float32)
    with rnnserve.Client(address) as client:
        live = client.RNN(MODEL, stateful=True)
        first = live(x)
        second = live(x)
        live.reset_states()
        third = live(x)
        live.close()
    assert not np.array_equal(first, second), "the second call did not start from the state that the first one left"
    np.testing.assert_array_equal(third, first)


def silero_gives_probabilities(address: str) -> None:
    frames = (0.1 * rng.standard_normal((20, 512))).astype(np.float32)
    with rnnserve.Client(address) as client, client.session("silero-vad") as vad:
        probabilities = np.asarray(list(vad.stream(frames)), np.float32)
    assert probabilities.size == len(frames), probabilities.shape
    assert ((probabilities >= 0) & (probabilities <= 1)).all(), probabilities


CHECKS: list[Callable[[str], None]] = [
    health_is_serving,
    layer_returns_sequences_and_states,
    two_halves_equal_one_call,
    reset_states_starts_again,
    silero_gives_probabilities,
]


def hold(address: str) -> None:
    """Keeps a stream open until standard input ends, so that a server can be stopped under it."""
    with rnnserve.Client(address) as client:
        live = client.RNN(MODEL, stateful=True)
        live(np.zeros((2, 4, 5), np.float32))
        print("holding", flush=True)
        sys.stdin.read()


TEN = np.random.default_rng(8).standard_normal((10, 5), np.float32)


def remember(address: str) -> None:
    """Begins a session."""
    with rnnserve.Client(address) as client:
        session = client.session(MODEL)
        for x in TEN[:5]:
            session.step(x)
        print(session.session_id)


def recall(address: str, session_id: str) -> None:
    """Goes on with it: the server must be where it was left."""
    with rnnserve.Client(address) as client, client.attach(session_id) as session:
        assert session.next_step == 5, session.next_step
        y = [session.step(x) for x in TEN[5:]]
        np.testing.assert_array_equal(y, client.RNN(MODEL, return_sequences=True)(TEN[None])[0, 5:])


def main(address: str) -> int:
    failed = 0
    for check in CHECKS:
        name = check.__name__.replace("_", " ")
        try:
            check(address)
        except Exception as error:
            # An image that was built without a network lacks this graph, and says so; every other model must work.
            if check is silero_gives_probabilities and getattr(error, "reason", "") in {
                "MODEL_UNKNOWN",
                "MODEL_UNAVAILABLE",
            }:
                print(f"skipped  {name}: {error}", flush=True)
                continue
            traceback.print_exc()
            print(f"FAILED   {name}", flush=True)
            failed += 1
        else:
            print(f"passed   {name}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[2] == "hold":
        hold(sys.argv[1])
    elif len(sys.argv) == 3 and sys.argv[2] == "remember":
        remember(sys.argv[1])
    elif len(sys.argv) == 4 and sys.argv[2] == "recall":
        recall(sys.argv[1], sys.argv[3])
    elif len(sys.argv) == 2:
        sys.exit(main(sys.argv[1]))
    else:
        sys.exit("usage: check.py HOST:PORT [hold | remember | recall ID]")
