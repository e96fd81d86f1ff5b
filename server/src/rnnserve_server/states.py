"""State in hand: what a session holds may be looked at, copied, carried elsewhere and taken back.

Everything waits for the session's turn, behind the chunks that came before, and is of one moment.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rnnserve_models.engine.base import Array, Arrays
from rnnserve_models.masking import Compacted
from rnnserve_server.blob import Exported, pack, unpack
from rnnserve_server.blocks import Block
from rnnserve_server.calls import Call
from rnnserve_server.core import Core
from rnnserve_server.errors import InvalidRequest, NotRemembered, SessionExists, StepAhead
from rnnserve_server.layout import check_states
from rnnserve_server.resets import MASKED_RUN, NO_RULES, resets
from rnnserve_server.sessions import Group, Session


def states_of(session: Session) -> Arrays:
    """A copy of the states of a session's model as they are: each [batch_size, *shape]."""
    states = all_states_of(session)
    return {spec.name: states[spec.name] for spec in session.group.model.engine.states}


def all_states_of(session: Session) -> Arrays:
    """A copy of them, and of what the session remembers for its reset rules."""
    return session.group.arena.gather(np.array([session.slot]))


async def get_state(core: Core, session_id: str) -> tuple[Session, Arrays]:
    """A session and a copy of its states, each [batch_size, *shape]; see GetState for the rules.

    The session is still at that step until the caller awaits something.

    Raises:
        ServiceError: as GetState says.
    """
    session = await core.session(session_id, sure=True)
    async with core.turn(session):
        return session, states_of(session)


async def fork(core: Core, session_id: str, count: int, session_ids: Sequence[str], scope: str = "") -> list[Session]:
    """Makes sessions that go on where one is, and are of the principal of that scope; see ForkSession for the rules.

    Raises:
        ServiceError: as ForkSession says. None was made.
    """
    if session_ids and (count not in (0, len(session_ids)) or len(set(session_ids)) < len(session_ids)):
        raise InvalidRequest("session_ids", f"{count or 'some'} distinct ids", f"{len(session_ids)}")
    core.check_new(session_ids, scope)
    stored = await core.stored(scope)
    session = await core.session(session_id, sure=True)
    async with core.turn(session):
        rules = session.group.rules or NO_RULES
        await core.make_room(session.group.model, session.group.batch_size, len(session_ids) or count or 1, rules)
        core.check_alive(session)
        group, slots, full = core.sessions.create_many(
            session.group.model,
            session.group.batch_size,
            session.group.options,
            len(session_ids) or count or 1,
            initial_states=all_states_of(session) or None,
            idle_lifetime=session.idle_lifetime,
            lifetime=session.lifetime,
            replay=session.group.window.limits,
            rules=rules,
            session_ids=session_ids,
            scope=scope,
            stored=stored,
        )
        if full is not None:
            core.sessions.forget(group, slots)
            raise full
        core.sessions.follow(session, slots)
        return await _kept(core, group, slots, session.step)


async def export_session(core: Core, session_id: str) -> bytes:
    """A session as a blob; see ExportSession for the rules.

    Raises:
        ServiceError: as ExportSession says.
    """
    session, _ = await get_state(core, session_id)
    group = session.group
    exported = Exported(
        model=group.model.name,
        version=group.model.version,
        digest=group.model.digest,
        batch_size=group.batch_size,
        options=dict(vars(group.options)),
        step=session.step,
        idle_lifetime=session.idle_lifetime,
        lifetime=session.lifetime if session.lifetime < math.inf else None,
        replay=group.window.limits,
        rules=group.rules or NO_RULES,
        states=all_states_of(session),
    )
    return await asyncio.to_thread(pack, exported, core.wall_clock())


async def import_session(core: Core, blob: bytes, session_id: str, scope: str = "") -> Session:
    """Makes a session of a blob, of the principal of that scope; see ImportSession for the rules.

    Raises:
        ServiceError: as ImportSession says. Nothing was made.
    """
    exported = await asyncio.to_thread(unpack, blob)
    core.repository.get(exported.model, exported.version)
    model = core.repository.with_digest(exported.model, exported.version, exported.digest)
    check_states((*model.engine.states, *exported.rules.states), exported.states, exported.batch_size, "blob")
    group, slots, full = await core.create_sessions(
        exported.model,
        exported.version,
        exported.batch_size,
        exported.options,
        initial_states={name: state for name, state in exported.states.items() if name != MASKED_RUN},
        idle_lifetime=exported.idle_lifetime,
        lifetime=exported.lifetime,
        replay=exported.replay,
        rules=exported.rules,
        session_ids=[session_id] if session_id else (),
        scope=scope,
    )
    if full is not None:
        raise full
    group.arena.reset(slots, exported.states)  # what it remembers for its rules too
    (session,) = await _kept(core, group, slots, exported.step)
    return session


async def rewind(core: Core, session_id: str, step: int) -> Session:
    """Takes a session back to where a chunk began; see RewindSession for the rules.

    Raises:
        ServiceError: as RewindSession says. Nothing changed.
    """
    session = await core.session(session_id, sure=True)
    group, slot = session.group, session.slot
    async with core.turn(session):
        here = session.step
        if step > here:
            raise StepAhead(here, step)
        if step == here:
            return session
        places = {int(round_.first_steps[index]): (round_, index) for round_, index in group.window.of(group, slot)}
        began = {at: found for at, (round_, index) in places.items() if (found := round_.began(index)) is not None}
        if step not in began:
            raise NotRemembered(here, step, sorted(began))
        states, ran = began[step]
        if ran is not None:
            states = await _run(core, group, states, ran, step - ran.timesteps)
            core.check_alive(session)
        core.sessions.rewind(session, step, states)
        await core.save(session)
    return session


async def _run(core: Core, group: Group, states: Arrays, call: Compacted, first_step: int) -> Arrays:
    """The states that a call leads to, and what is remembered for reset rules: each [batch_size, *shape]."""
    done = Call()
    options = replace(group.options, return_state=True, return_sequences=False)
    block = Block(call, group.batch_size, options, [(done, 1)], np.zeros(1, np.int64), states=states)
    remembered: Arrays = {}
    if group.rules is not None:
        block.resets = resets(group.rules, call, np.array([first_step], np.uint64), states)
        block.states = {spec.name: states[spec.name] for spec in group.model.engine.states}
        remembered = block.resets.remembered
    core.worker(group.model).submit(block)
    return {name: state[0] for name, state in (await done.answer()).states.items()} | remembered


async def _kept(core: Core, group: Group, slots: Array, step: int) -> list[Session]:
    """New sessions at a step, once they are in the store too, if there is one.

    Raises:
        SessionExists: one of their ids is that of a session in the store. None was made.
        StoreDown: the store cannot be reached. None was made, as far as this server knows.
    """
    group.step[slots] = step
    made = [core.sessions.at(group, slot) for slot in slots.tolist()]
    kept = await core.keep(group, slots)
    if not kept.all():
        core.sessions.delete_many(group, slots[kept])
        await core.settle()
        raise SessionExists(made[int(np.argmin(kept))].id)
    return made
