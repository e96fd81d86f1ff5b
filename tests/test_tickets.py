"""How threads hear of their answers: each of its own, and whoever stops waiting holds up nobody."""

import threading

import pytest

from rnnserve._chunks import Answer
from rnnserve._tickets import Ticket, deliver, deliver_all

LONG = 20.0  # seconds, until a test that would hang fails


def wait_in_threads(tickets):
    """Threads that wait, each for its ticket; and what they hear, by their places."""
    heard = {}

    def wait(place, ticket):
        try:
            heard[place] = ticket.result(LONG)
        except Exception as error:
            heard[place] = error

    threads = [threading.Thread(target=wait, args=each, daemon=True) for each in enumerate(tickets)]
    for thread in threads:
        thread.start()
    return threads, heard


def join(threads):
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive()


def test_every_thread_hears_its_own_answer():
    """Of many that are answered at once, with errors among them."""
    tickets = [Ticket() for _ in range(50)]
    threads, heard = wait_in_threads(tickets)
    errors = {place: ValueError(str(place)) for place in range(0, 50, 7)}
    deliver_all([Answer(ticket, place, errors.get(place)) for place, ticket in enumerate(tickets)])
    join(threads)
    assert heard == {**{place: place for place in range(50)}, **errors}


@pytest.mark.parametrize("when", ["before", "after"])
def test_who_leaves_holds_up_nobody(when):
    """Threads that left, before or after the answers came, wake the next ones all the same."""
    tickets = [Ticket() for _ in range(40)]
    leavers, stayers = tickets[:30], tickets[30:]
    threads, heard = wait_in_threads(stayers)
    if when == "before":
        for ticket in leavers:
            with pytest.raises(TimeoutError):
                ticket.result(0)
            ticket.leave()
    deliver_all([Answer(ticket, place) for place, ticket in enumerate(tickets)])
    for ticket in leavers:
        ticket.leave()
        ticket.leave()
    join(threads)
    assert sorted(heard.values()) == list(range(30, 40))


def test_leaving_while_answers_come():
    """Half of the threads give up just as they are answered: the others hear of theirs."""
    for _ in range(200):
        tickets = [Ticket() for _ in range(16)]
        go = threading.Barrier(9)
        threads, heard = wait_in_threads(tickets[1::2])

        def leave(ticket, go=go):
            go.wait()
            ticket.leave()

        leavers = [threading.Thread(target=leave, args=(ticket,), daemon=True) for ticket in tickets[::2]]
        for thread in leavers:
            thread.start()
        go.wait()
        deliver_all([Answer(ticket, place) for place, ticket in enumerate(tickets)])
        join(leavers + threads)
        assert sorted(heard.values()) == list(range(1, 16, 2))


def test_a_thread_that_may_be_elsewhere_is_waited_for_by_nobody():
    """A ticket that is to be asked for later is answered by itself, and may be asked for twice."""
    ahead = [Ticket(waited=False) for _ in range(10)]
    ticket = Ticket()
    threads, heard = wait_in_threads([ticket])
    deliver_all([*[Answer(each, place) for place, each in enumerate(ahead)], Answer(ticket, "now")])
    join(threads)
    assert heard == {0: "now"}
    assert [each.result(0) for each in ahead] == [each.result() for each in ahead] == list(range(10))


def test_only_the_first_answer_counts():
    """A ticket is answered or cancelled once."""
    ticket, cancelled = Ticket(), Ticket()
    deliver(ticket, 1)
    deliver(ticket, 2)
    assert cancelled.cancel()
    assert not ticket.cancel()
    deliver_all([Answer(ticket, 3), Answer(cancelled, 4)])
    assert (ticket.result(0), ticket.cancelled(), cancelled.cancelled()) == (1, False, True)
    with pytest.raises(TimeoutError):
        cancelled.result(0)
