"""Whose the sessions in memory are: what is counted is what is there, however sessions come and go."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from house import Clock, loaded, table
from rnnserve_models.options import LayerOptions
from rnnserve_server.errors import SessionClosed
from rnnserve_server.owners import Owners, scope_of

SCOPES = ("alice/", "al/", "")
BYTES = 8  # of a session of one row


@pytest.mark.parametrize("seed", range(5))
def test_what_is_counted_is_what_is_there(seed: int):
    """Through creations, ends, expiry, and sessions that leave memory for a store and come back."""
    chance, clock = Random(seed), Clock()
    sessions, model = table(clock), loaded()
    sessions.owners = owners = Owners(lambda name: 0, lambda name: 0)
    rested: list[str] = []
    for _ in range(300):
        live = [each for scope in SCOPES for each in sorted(owners.of(scope))]
        draw = chance.random()
        if draw < 0.4 or not live:
            scope = chance.choice(SCOPES)
            idle = chance.choice((5.0, 50.0))
            count = chance.randrange(1, 4)
            sessions.create_many(
                model, 1, LayerOptions(stateful=True), count, initial_states=None, idle_lifetime=idle, scope=scope
            )
        elif draw < 0.55:
            sessions.delete(chance.choice(live))
        elif draw < 0.7:
            session = sessions.get(chance.choice(live))
            sessions.forget(session.group, np.array([session.slot]))
            rested.append(session.id)
        elif draw < 0.8:
            session = sessions.get(chance.choice(live))
            sessions.lose(session.group, np.array([session.slot]), SessionClosed)
        elif draw < 0.9 and rested:
            back = rested.pop()
            scope = scope_of(back)
            options = LayerOptions(stateful=True)
            sessions.create_many(
                model, 1, options, 1, initial_states=None, idle_lifetime=5.0, session_ids=[back], scope=scope, new=False
            )
        else:
            clock.now += chance.choice((1.0, 4.0))
            sessions.expire()
        there = [each.id for each in sessions.after(0)]
        for scope in SCOPES[:2]:
            mine = {each for each in there if each.startswith(scope)}
            assert owners.of(scope) == mine
            assert [each.id for each in sessions.of(scope, 0)] == [each for each in there if each in mine]
            limited = Owners(lambda name: 0, lambda name: 10**6)
            limited.add(mine, BYTES)
            sessions.owners._state_bytes = limited._state_bytes
            assert owners.room(scope, BYTES, None, new=True)[0] == limited.room(scope, BYTES, None, new=True)[0]
        assert owners.of("") == set()


@pytest.mark.parametrize(
    ("session_id", "scope"), [("x", ""), ("alice/x", "alice/"), ("alice/x/y", "alice/"), ("/x", "/"), ("", "")]
)
def test_the_scope_of_an_id(session_id: str, scope: str):
    assert scope_of(session_id) == scope


def test_room_is_what_both_quotas_leave():
    """Of those in the store too; those that come back from it are not new, but take memory."""
    owners = Owners(lambda name: 5, lambda name: 4 * BYTES)
    assert owners.room("", BYTES, None, new=True)[1] is None
    owners.add(["a/1", "a/2"], BYTES)
    for stored, new, room, field in [
        (None, True, 2, "state_bytes"),
        (2, True, 2, "state_bytes"),
        (4, True, 1, "sessions"),
        (9, True, 0, "sessions"),
        (9, False, 2, "state_bytes"),
    ]:
        left, error = owners.room("a/", BYTES, stored, new=new)
        assert (left, error.metadata["field"]) == (room, field)
