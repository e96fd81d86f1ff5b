"""`rnnserve top` and `rnnserve sessions`, against real servers; and the reckoning behind top, against Prometheus's."""

from __future__ import annotations

import json
import math
import re
import threading

import numpy as np
import pytest
from structlog.testing import capture_logs
from typer.testing import CliRunner

import rnnserve
from rnnserve_server.api.errors import rejections
from rnnserve_server.cli import app
from rnnserve_server.commands.scrape import Interval, Joined, Scrape, quantile
from rnnserve_server.commands.top import Watched
from serving import running_server


def invoke(*arguments, **variables):
    return CliRunner().invoke(app, list(map(str, arguments)), env=variables)


# top


def test_top_shows_what_servers_do(tmp_path):
    """One frame has every server, model, store operation and error; rates are those of the interval. A server that does
    not answer is told, the others are shown all the same, and the exit code says so.
    """
    rejections.clear()  # the process counts them; `top` shows the most frequent
    with (
        running_server(metrics_port=0, store=f"sqlite:///{tmp_path}/s.db") as one,
        running_server(metrics_port=0) as two,
        rnnserve.Client(one.address) as client,
        client.session_group("lstm-4", 32) as group,
    ):
        stop = threading.Event()

        def load():
            while not stop.is_set():
                group.step(np.zeros((32, *group.model.inputs[0].shape), np.float32))

        thread = threading.Thread(target=load)
        thread.start()
        addresses = [f"127.0.0.1:{server.server.metrics_port}" for server in (one, two)]
        try:
            with pytest.raises(rnnserve.SessionNotFound):
                client.attach("nobody")
            shown = invoke("top", *addresses, "--once", "--interval", "0.3")
            assert shown.exit_code == 0, shown.output
            lines = shown.stdout.splitlines()
            servers = [next(line for line in lines if line.startswith(address)).split() for address in addresses]
            assert [words[1:4] for words in servers] == [["serving", "32", "1"], ["serving", "0", "0"]]
            steps = [float(words[4].replace(",", "")) for words in servers]
            assert steps[0] > 0
            assert steps[1] == 0
            model, ticks = (line.split() for line in lines if line.startswith("lstm-4 1"))
            assert model[2] == "32"
            assert float(ticks[2].replace(",", "")) == pytest.approx(steps[0], abs=1)
            assert ticks[3] == "32.0"
            assert re.search(r"\d m?s", " ".join(ticks[4:]))
            assert float(next(line for line in lines if line.startswith("sqlite commit")).split()[2]) > 0
            assert "SESSION_UNKNOWN" in shown.stdout

            shown = invoke("top", addresses[0], "127.0.0.1:1", "--once", "--interval", "0.1")
            assert shown.exit_code == 1
            assert "32" in next(line for line in shown.stdout.splitlines() if line.startswith("lstm-4 1"))
            assert "no answer" in shown.stdout
            assert "127.0.0.1:1: [Errno 111] Connection refused; does it serve with --metrics-port?" in shown.stderr
            shown = invoke("top", "--once", RNNSERVE_METRICS_PORT=str(one.server.metrics_port))
            assert shown.exit_code == 0
        finally:
            stop.set()
            thread.join()


def scrape(at, **samples):
    text = "# TYPE h histogram\n# TYPE c counter\n"
    for bound, count in samples.get("h", {}).items():
        text += f'h_bucket{{model="m",le="{bound}"}} {count}\n'
    for model, value in samples.get("c", {}).items():
        text += f'c_total{{model="{model}"}} {value}\n'
    return Scrape.parse(text, at)


def test_rates_survive_a_restart():
    """A counter that fell was one of a server that was started again: what it counts since is what rose. Servers and
    label values add up.
    """
    first = Interval(scrape(10.0, c={"m": 100, "n": 7}), scrape(12.0, c={"m": 140, "n": 7}))
    assert (first.rate("c_total"), first.rate("c_total", model="m"), first.rate("c_total", model="n")) == (20, 20, 0)
    again = Interval(scrape(10.0, c={"m": 100}), scrape(12.0, c={"m": 6}))
    assert again.rate("c_total") == 3
    assert Joined([first, again]).rate("c_total", model="m") == 23
    buckets = Interval(scrape(0.0, h={"1": 5, "+Inf": 9}), scrape(1.0, h={"1": 1, "+Inf": 2}))
    assert buckets.buckets("h") == {1.0: 1, math.inf: 2}


@pytest.mark.parametrize(
    ("share", "buckets", "expected"),
    [
        (0.5, {1.0: 0, 2.0: 10, math.inf: 10}, 1.5),
        (0.9, {1.0: 5, 2.0: 10, math.inf: 10}, 1.8),
        (1.0, {1.0: 5, 2.0: 10, math.inf: 10}, 2.0),
        (0.99, {1.0: 5, 2.0: 6, math.inf: 10}, 2.0),
        (0.5, {1.0: 0, math.inf: 0}, math.nan),
        (0.5, {}, math.nan),
    ],
)
def test_quantiles_are_prometheuss(share, buckets, expected):
    """As histogram_quantile documents: even within a bucket, the largest bound for what is beyond, NaN for nothing."""
    assert quantile(share, buckets) == pytest.approx(expected, nan_ok=True)


def test_a_server_that_comes_back_is_shown_again():
    """After a server did not answer, its rates begin anew with its second answer; nonsense is a trouble too."""
    answers = iter(
        ['c_total{model="m"} 1\n', OSError("gone"), 'c_total{model="m"} 5\n', 'c_total{model="m"} 7\n', "<html>"]
    )
    now = iter(range(100))

    def get(address):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    watched = Watched(["a"], get, lambda: float(next(now)))
    seen = []
    for _ in range(5):
        watched.look()
        interval = watched.intervals["a"]
        seen.append((interval and interval.rise("c_total"), bool(watched.troubles)))
    assert seen == [(None, False), (None, True), (None, False), (2, False), (None, True)]


# sessions


def test_sessions_are_listed_shown_saved_and_ended(tmp_path):
    """ls, show, save and rm do what the API does, for people and, with --json, for programs; a saved session goes on
    where it was; what does not work ends with 1 and the reason.
    """
    with capture_logs(), running_server() as server, rnnserve.Client(server.address) as client:  # no lines among ours
        at = ("--address", server.address)
        session = client.session("lstm-4", session_id="mine")
        client.session("lstm-32-64", session_id="other")
        x = np.ones(session.model.inputs[0].shape, np.float32)
        session.step(x)

        listed = invoke("sessions", "ls", *at)
        assert listed.exit_code == 0
        words = [line.split() for line in listed.stdout.splitlines()]
        assert words[0][:4] == ["session", "model", "batch", "step"]
        assert [line[:5] for line in words[1:]] == [
            ["mine", "lstm-4", "1", "1", "1"],
            ["other", "lstm-32-64", "1", "1", "0"],
        ]
        for more, expected in (([], ["mine", "other"]), (["--model", "lstm-4"], ["mine"]), (["--limit", 1], ["mine"])):
            lines = invoke("sessions", "ls", "--json", *more, *at).stdout.splitlines()
            assert [json.loads(line)["session_id"] for line in lines] == expected

        shown = invoke("sessions", "show", "mine", *at)
        facts = dict(line.split(maxsplit=1) for line in shown.stdout.splitlines())
        assert (facts["session_id"], facts["model"], facts["step"], facts["options"]) == (
            "mine",
            "lstm-4",
            "1",
            "stateful",
        )
        assert json.loads(invoke("sessions", "show", "mine", "--json", *at).stdout)["step"] == 1

        path = tmp_path / "mine.session"
        saved = invoke("sessions", "save", "mine", path, *at)
        assert (saved.exit_code, saved.stdout) == (0, f"{path}: {path.stat().st_size} bytes\n")
        expected = session.step(x)
        with client.restore(path) as restored:
            assert restored.next_step == 1
            np.testing.assert_array_equal(restored.step(x), expected)

        ended = invoke("sessions", "rm", "mine", "nobody", "other", *at)
        assert ended.exit_code == 1
        assert ended.stdout == "mine: ended\nother: ended\n"
        assert ended.stderr == "nobody: session 'nobody' is unknown here\n"
        assert [each.session_id for each in client.sessions()] == []

        gone = invoke("sessions", "show", "mine", *at)
        assert (gone.exit_code, gone.stderr) == (1, f"{server.address}: session 'mine' was deleted\n")
    down = invoke("sessions", "ls", "--address", "127.0.0.1:1")
    assert down.exit_code == 1
    assert down.stderr.startswith("127.0.0.1:1: ")
