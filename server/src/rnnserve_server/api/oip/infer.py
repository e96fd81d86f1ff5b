"""Requests of the Open Inference Protocol on the road that all requests take: session, scheduler, engine, session."""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from rnnserve_models.engine.base import Array, Arrays
from rnnserve_models.load import LoadedModel
from rnnserve_models.options import LayerOptions
from rnnserve_server.access.caller import caller
from rnnserve_server.api.oip import service_pb2 as pb
from rnnserve_server.api.oip.asked import Asked
from rnnserve_server.api.oip.face import Face
from rnnserve_server.api.oip.pending import Pending
from rnnserve_server.api.oip.sequences import Sequences
from rnnserve_server.api.oip.tensors import decode_inputs, encode_outputs
from rnnserve_server.blocks import Answers, Sessions
from rnnserve_server.core import Core, resolve_options
from rnnserve_server.errors import (
    InvalidInput,
    InvalidRequest,
    ModelUnknown,
    SequenceNotLive,
    ServiceError,
    SessionError,
    StoreDown,
)
from rnnserve_server.intake import Frame
from rnnserve_server.layout import check_call, check_states, faults, to_call
from rnnserve_server.meter import Meter
from rnnserve_server.sessions import Session
from rnnserve_server.states import states_of

_TAG = np.zeros(1, np.int64)
_MASK = "mask"
_FACES = 1024  # models come and go
_REMEMBERED_BYTES = 16 << 20  # of answers to the last requests of sequences


class Inference:
    """Takes requests and answers them."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self.meter = core.meter or Meter()
        self._sequences = Sequences(core)
        self._last = _LastAnswers()
        self._under_way: Counter[int] = Counter()  # requests of each session, by its number
        self._faces: dict[tuple[str, str, str, bool], Face] = {}

    async def answer(self, request: pb.ModelInferRequest, deadline: float | None) -> pb.ModelInferResponse:
        """One request from its beginning to its end.

        Args:
            request: the request.
            deadline: the time of the core's clock after which nobody needs the answer, or None.

        Raises:
            ServiceError, TensorError: it failed; what changed is what the contract says.
        """
        pending = Pending(self.meter, self._core.clock(), deadline)
        try:
            await self.send(request, pending)
            return await self.receive(request, pending)
        finally:
            pending.forget()

    async def send(self, request: pb.ModelInferRequest, pending: Pending) -> None:
        """Sends a request on its way; those of one sequence keep the order in which they are sent.

        Raises:
            ServiceError, TensorError: nothing is on its way.
        """
        try:
            await self._send(request, pending)
        except ServiceError:
            self._count_failure(request, pending)
            raise

    async def receive(self, request: pb.ModelInferRequest, pending: Pending) -> pb.ModelInferResponse:
        """Waits for a request that was sent, and answers it.

        Raises:
            ServiceError: it failed.
        """
        asked, session = pending.asked, pending.session
        try:
            if (remembered := self._remembered(request, pending)) is not None:
                return remembered
            try:
                answers = await pending.answer()
            except SessionError as error:  # it ended while the request waited for its turn
                raise self._sequences.told(request.model_name, asked, error) from error
            finally:
                if session is not None:
                    self._under_way[session.number] -= 1
                    if not self._under_way[session.number]:
                        del self._under_way[session.number]
            response = self._response(request, pending, answers)
        except ServiceError:
            self._count_failure(request, pending)
            raise
        if asked.end and session is not None:
            if asked.step is not None and asked.sequence is not None:
                self._last.put(session.id, asked.step, _digest(request), response)
            with suppress(StoreDown):  # it is told later
                await self._core.settle()
        self._count(pending)
        return response

    def _face(self, model: LoadedModel, *, time_major: bool) -> Face:
        """How clients see a model."""
        key = (model.name, model.version, model.digest, time_major)
        face = self._faces.get(key)
        if face is None:
            if len(self._faces) > _FACES:
                self._faces.clear()
            face = self._faces[key] = Face(model, time_major=time_major)
        return face

    # Sending

    async def _send(self, request: pb.ModelInferRequest, pending: Pending) -> None:
        core = self._core
        asked = pending.asked = Asked.of(request)
        if asked.timeout is not None:
            until = pending.received + asked.timeout
            pending.deadline = until if pending.deadline is None else min(until, pending.deadline)
        arrays = decode_inputs(request)
        if asked.sequence is None:
            self._send_alone(request, pending, arrays)
        elif asked.start:
            await self._send_first(request, pending, arrays)
        else:
            try:
                session = await self._sequences.find(request.model_name, asked, request.model_version)
            except SequenceNotLive:
                if self._is_remembered(request, asked):
                    return
                raise
            except ModelUnknown as error:
                raise _unknown(error) from error
            given = self._given(session.group.model, session.group.options, request, arrays, pending)
            if given.states:
                name = next(iter(given.states))
                raise InvalidInput(
                    f"inputs.{name}", "no state, unless the sequence starts", "a state",
                    "only the first request of a sequence may set states; rnnserve.v1 can set them later",
                )  # fmt: skip
            self._submit(pending, session, given, asked.step)
        pending.submitted = core.clock()

    def _send_alone(self, request: pb.ModelInferRequest, pending: Pending, arrays: Arrays) -> None:
        """A request without a sequence: state is the default, or what is given, and is forgotten."""
        core, asked = self._core, pending.asked
        model = self._model(request)
        options = resolve_options(model, self._options(model, request, asked), stateful=False)
        given = self._given(model, options, request, arrays, pending)
        states = self._initial(model, given, pending, None)
        trace = None if core.tracing is None else core.tracing.received()
        core.submit_call(model, options, given.inputs, given.mask, states, pending, trace)

    async def _send_first(self, request: pb.ModelInferRequest, pending: Pending, arrays: Arrays) -> None:
        """The first request of a sequence. What is wrong with it is found before the sequence begins anew."""
        core, asked = self._core, pending.asked
        assert asked.sequence is not None
        model = self._model(request)
        wanted = self._options(model, request, asked)
        options = resolve_options(model, wanted, stateful=True)
        given = self._given(model, options, request, arrays, pending)
        _check(model, options, given, pending.rows)
        states = self._initial(model, given, pending, asked.sequence)
        live = self._sequences.live(model.name, asked)
        if live is not None and asked.step is not None and await self._is_same_start(live, model, given):
            self._submit(pending, live, given, 0)
            return
        session = await self._sequences.begin(model, asked, pending.rows, wanted, states)
        self._last.forget(session.id)
        try:
            self._submit(pending, session, given, None)
        except BaseException:
            _end(core, session)
            raise

        def undo() -> None:
            if not pending.succeeded:
                _end(core, session)

        core.when_idle(session.group, session.slot, undo)

    async def _is_same_start(self, live: Session, model: LoadedModel, given: _Given) -> bool:
        """Whether a live sequence has had one request, which is this one sent again."""
        group = live.group
        if group.model is not model:
            return False
        inputs, mask = given.columns()
        steps = next(iter(inputs.values())).shape[1 if group.options.time_major else 2]
        with suppress(ServiceError):  # it ends meanwhile, or the request does not fit it
            check_call(model.engine, group.options, inputs, mask, batch_size=group.batch_size)
            async with self._core.turn(live):
                columns = np.array([live.slot]), np.array([live.generation]), np.zeros(1, np.uint64)
                found = group.window.find(group, *columns) if live.step == steps else {}
                if found:
                    round_, index = found[0]
                    return round_.is_of(index, to_call(model.engine, group.options, inputs, mask), 0, 1)
        return False

    def _submit(self, pending: Pending, session: Session, given: _Given, step: int | None) -> None:
        core, group = self._core, session.group
        pending.session = session
        inputs, mask = given.columns()
        if session.number in self._under_way:
            core.worker(group.model).line_up()  # chunks of other shapes that came together may change their order
        core.submit_frame(
            Frame(
                pending,
                _TAG,
                Sessions(
                    group,
                    np.array([session.slot]),
                    np.array([session.generation]),
                    None if step is None else np.array([step], np.uint64),
                    distinct=True,
                ),
                inputs,
                mask,
                None if core.tracing is None else core.tracing.received(),
            )
        )
        self._under_way[session.number] += 1
        if pending.states_asked and not group.options.return_state:

            def look() -> None:
                if pending.succeeded:
                    pending.states = states_of(session)

            core.when_idle(group, session.slot, look)
        if pending.asked.end:

            def end() -> None:
                if pending.succeeded:
                    _end(core, session)

            core.when_idle(group, session.slot, end)

    # What was given

    def _model(self, request: pb.ModelInferRequest) -> LoadedModel:
        try:
            return self._core.repository.get(request.model_name, request.model_version)
        except ModelUnknown as error:
            raise _unknown(error) from error

    def _given(
        self,
        model: LoadedModel,
        options: LayerOptions,
        request: pb.ModelInferRequest,
        arrays: Arrays,
        pending: Pending,
    ) -> _Given:
        """Sorts tensors: inputs, states, a mask; and feeds what the protocol knows.

        Args:
            model: the model.
            options: of the layer.
            request: the request.
            arrays: its tensors.
            pending: is told what is found.
        """
        asked, time_major = pending.asked, options.time_major
        face = self._face(model, time_major=time_major)
        pending.model, pending.face, pending.tally = model, face, self.meter.of(model)
        pending.states_asked = face.check_outputs(request, typed=asked.typed)
        states: Arrays = {}
        mask = None
        if arrays.keys() != face.inputs:
            for name in face.controls.hidden & arrays.keys():
                raise InvalidInput(f"inputs.{name}", "no tensor: the server feeds it", "a tensor")
            states = {name: arrays.pop(name) for name in face.states & arrays.keys()}
            if _MASK not in face.inputs:
                mask = arrays.pop(_MASK, None)
        inputs, pending.timed = face.view.take(arrays)
        first = inputs.get(model.engine.inputs[0].name)
        if first is None or first.ndim < 2:
            first = np.zeros((0, 0))  # the core says what is missing
        pending.rows = first.shape[1 if time_major else 0]
        if (bucket := caller().bucket) is not None:
            bucket.take(first.shape[0] * first.shape[1])
        if face.controls.end:
            spec = next(spec for spec in model.engine.inputs if spec.name == face.controls.end)
            end = np.full((*first.shape[:2], *spec.shape), face.controls.values[0], spec.dtype)
            if (asked.end or asked.sequence is None) and end.size:  # one without a sequence is all of one
                end[(-1,) if time_major else (slice(None), -1)] = face.controls.values[1]
            inputs[face.controls.end] = end
        if mask is not None and not pending.timed:
            mask = mask[None] if time_major else mask[:, None]
        return _Given(inputs, mask, states)

    def _options(self, model: LoadedModel, request: pb.ModelInferRequest, asked: Asked) -> dict[str, bool]:
        """The layer options of a new sequence or of a request alone: states that are asked for are to be returned."""
        options = dict(asked.options)
        states = self._face(model, time_major=False).check_outputs(request, typed=asked.typed)
        if states and "return_state" in model.spec.settable_options:
            options["return_state"] = True
        return options

    def _initial(self, model: LoadedModel, given: _Given, pending: Pending, sequence: int | str | None) -> Arrays:
        """The states that a sequence begins with: those given, else the defaults; empty if nothing is said."""
        assert pending.face is not None
        controls, states, rows = pending.face.controls, dict(given.states), pending.rows
        if controls.corrid and sequence is not None:
            if not isinstance(sequence, int):
                raise InvalidRequest(
                    "parameters.sequence_id", "a number, which the model's graph is told", repr(sequence[:80])
                )
            spec = next(spec for spec in model.engine.states if spec.name == controls.corrid)
            number = np.array(sequence & (1 << 64) - 1, np.uint64).astype(np.int64)
            states[controls.corrid] = np.full((rows, *spec.shape), number, np.int64)
        if not states:
            return {}
        complete = {
            spec.name: states[spec.name] if spec.name in states else spec.initial(rows) for spec in model.engine.states
        }
        check_states(model.engine.states, complete, rows, "inputs")
        return complete

    # Answering

    def _response(self, request: pb.ModelInferRequest, pending: Pending, answers: Answers) -> pb.ModelInferResponse:
        model, session, face = pending.model, pending.session, pending.face
        assert model is not None
        assert face is not None
        replayed = session is not None and pending.began is None
        states, timed = answers.states, pending.timed
        names = [output.name for output in request.outputs]
        if not names:
            names = [*face.outputs, *(name for name in states if name in face.states)]
        shown: list[tuple[str, Array]] = []
        for name in names:
            if name in face.outputs:
                shown.append((name, face.shown(name, answers.outputs[name][0], timed=timed)))
            elif name in states:
                shown.append((name, states[name][0]))
            elif pending.states is not None and not replayed:
                shown.append((name, pending.states[name]))
            else:
                raise InvalidRequest(
                    f"outputs.{name}", "an output", "a state",
                    "the request was applied before, and states are remembered only if the first request of the "
                    "sequence asked for them",
                )  # fmt: skip
        response = pb.ModelInferResponse(model_name=model.name, model_version=model.version, id=request.id)
        encode_outputs(response, shown, typed=pending.asked.typed)
        said = response.parameters
        if session is not None:
            assert answers.first_steps is not None
            said["sequence_id"].CopyFrom(request.parameters["sequence_id"])
            said["rnnserve_session_id"].string_param = caller().shown(session.id)
            said["rnnserve_replayed"].bool_param = replayed
            said["rnnserve_step"].uint64_param = int(answers.first_steps[0]) + answers.timesteps
        if pending.began is not None:
            said["rnnserve_queue_ns"].int64_param = round((pending.began - pending.submitted) * 1e9)
            said["rnnserve_compute_ns"].int64_param = round(pending.computed * 1e9)
            said["rnnserve_batch_rows"].int64_param = pending.batch_rows
        return response

    def _is_remembered(self, request: pb.ModelInferRequest, asked: Asked) -> bool:
        assert asked.sequence is not None
        named = self._sequences.named(request.model_name, asked.sequence)
        return asked.step is not None and self._last.get(named, asked.step, _digest(request)) is not None

    def _remembered(self, request: pb.ModelInferRequest, pending: Pending) -> pb.ModelInferResponse | None:
        """The answer to the last request of a sequence that has ended, sent again."""
        asked = pending.asked
        if pending.session is not None or asked.sequence is None or asked.step is None:
            return None
        named = self._sequences.named(request.model_name, asked.sequence)
        before = self._last.get(named, asked.step, _digest(request))
        if before is None:
            return None
        response = pb.ModelInferResponse()
        response.CopyFrom(before)
        response.id = request.id
        response.parameters["rnnserve_replayed"].bool_param = True
        for name in ("rnnserve_queue_ns", "rnnserve_compute_ns", "rnnserve_batch_rows"):
            response.parameters.pop(name, None)
        return response

    # Statistics

    def _count(self, pending: Pending) -> None:
        tally, now = pending.tally, self._core.clock()
        if tally is None:
            return
        tally.success.add(now - pending.received)
        tally.last = self._core.wall_clock()
        if pending.began is None:
            return
        tally.rows += pending.rows
        tally.compute_input.add(pending.submitted - pending.received)
        tally.queue.add(pending.began - pending.submitted)
        tally.compute_infer.add(pending.computed)
        tally.compute_output.add(now - pending.done)

    def _count_failure(self, request: pb.ModelInferRequest, pending: Pending) -> None:
        tally = pending.tally
        if tally is None:
            try:
                tally = self.meter.of(self._core.repository.get(request.model_name, request.model_version))
            except ServiceError:
                return  # nobody's
        tally.fail.add(self._core.clock() - pending.received)


@dataclass(slots=True)
class _Given:
    """The tensors of a request as the core takes them."""

    inputs: Arrays
    mask: Array | None
    states: Mapping[str, Array]

    def columns(self) -> tuple[Arrays, Array | None]:
        """The inputs and the mask of one chunk."""
        return {name: x[None] for name, x in self.inputs.items()}, None if self.mask is None else self.mask[None]


class _LastAnswers:
    """What the last requests of sequences were answered, for when the answer was lost and the session is gone."""

    def __init__(self) -> None:
        self._answers: OrderedDict[str, tuple[int, bytes, pb.ModelInferResponse, int]] = OrderedDict()
        self._nbytes = 0

    def put(self, named: str, step: int, digest: bytes, response: pb.ModelInferResponse) -> None:
        """Remembers one."""
        self.forget(named)
        size = response.ByteSize()
        self._answers[named] = step, digest, response, size
        self._nbytes += size
        while self._nbytes > _REMEMBERED_BYTES and len(self._answers) > 1:
            self.forget(next(iter(self._answers)))

    def get(self, named: str, step: int, digest: bytes) -> pb.ModelInferResponse | None:
        """Finds the answer to a request."""
        found = self._answers.get(named)
        return found[2] if found is not None and found[:2] == (step, digest) else None

    def forget(self, named: str) -> None:
        """Forgets the one of a sequence."""
        if found := self._answers.pop(named, None):
            self._nbytes -= found[3]


def _digest(request: pb.ModelInferRequest) -> bytes:
    """What tells a request's tensors from others."""
    hashed = hashlib.blake2b(digest_size=16)
    for tensor in request.inputs:
        hashed.update(tensor.SerializeToString(deterministic=True))
    for raw in request.raw_input_contents:
        hashed.update(raw)
    return hashed.digest()


def _end(core: Core, session: Session) -> None:
    """Ends a session, if it is live."""
    if session.live:
        core.sessions.delete_many(session.group, np.array([session.slot]))


def _check(model: LoadedModel, options: LayerOptions, given: _Given, rows: int) -> None:
    """Finds out what is wrong with the tensors of a request before anything is done for it."""
    inputs, mask = given.columns()
    check_call(model.engine, options, inputs, mask, batch_size=None)
    for fault in faults(model.engine.inputs, to_call(model.engine, options, inputs, mask), rows).values():
        raise fault


def _unknown(error: ModelUnknown) -> ModelUnknown:
    """The error for an unknown model, which begins as Triton's does."""
    return ModelUnknown(f"Request for unknown model: {error}", metadata=error.metadata)
