"""A layer, or a stack of them, called as Keras calls one: what the `RNN` of both clients stands on."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rnnserve import nest
from rnnserve._connection import Connection
from rnnserve._live import Live, Wish
from rnnserve._signature import Signature, flat_states, zero_states
from rnnserve.codec import Array, decode_named, encode_into, encode_named
from rnnserve.errors import ChunkLost, DeadlineExceeded, InvalidInput, RequestError, Unavailable
from rnnserve.models import Model
from rnnserve.options import LayerOptions, Terms
from rnnserve.v1 import inference_pb2


class Layer:
    """Models run one after the other under one set of options, each over the whole sequence.

    That is Keras's RNN over stacked cells: every layer but the last returns its sequence, all take the same mask, and
    only the first one turns time around, because what it returns is in the order of iteration already.
    """

    def __init__(
        self,
        connection: Connection,
        model: str | Sequence[str],
        version: str | Sequence[str],
        options: LayerOptions,
        terms: Terms,
    ) -> None:
        self.names = [model] if isinstance(model, str) else list(model)
        versions = [version] * len(self.names) if isinstance(version, str) else list(version)
        if not self.names or len(versions) != len(self.names):
            raise ValueError(f"one version for each model: got {len(versions)} for {len(self.names)} models")
        self.options = options
        self.stacked = not isinstance(model, str)
        self.batch_size: int | None = None
        self.states: list[nest.Nest] | None = None
        self._versions = versions
        self._connection = connection
        self._terms = terms
        self._signatures: list[Signature] = []
        self._live: list[Live] = []
        self._undo: list[tuple[Live, nest.Nest]] = []  # what a call that failed has moved, and where it was
        self._initial: nest.Nest = None
        self._turn = asyncio.Lock()  # calls of a stateful layer follow one another
        self._closed = False

    # Description

    async def build(self, limit: float | None = None) -> None:
        """Fetches the descriptions of the models, once."""
        if self._signatures:
            return
        fetches = [
            self._connection.newest(name, version, limit)
            for name, version in zip(self.names, self._versions, strict=True)
        ]
        models = await asyncio.gather(*fetches)
        last = len(models) - 1
        for upper in models[1:]:
            if len(upper.inputs) != 1:
                raise InvalidInput.of("model", "models of one input above the first", f"{upper.name!r} in the stack")
        for lower in models[:-1]:
            if len(lower.outputs) != 1:
                raise InvalidInput.of("model", "models of one output below the last", f"{lower.name!r} in the stack")
        self._signatures = [
            Signature(
                model,
                replace(
                    self.options,
                    return_sequences=self.options.return_sequences or place < last,
                    go_backwards=self.options.go_backwards and place == 0,
                ),
            )
            for place, model in enumerate(models)
        ]

    @property
    def models(self) -> list[Model]:
        """The models, lowest first. RuntimeError before `build`."""
        if not self._signatures:
            raise RuntimeError("the layer is not built: call it, or await build(), first")
        return [signature.model for signature in self._signatures]

    @property
    def state_size(self) -> list[nest.Nest]:
        """The size of each state for one row, nested as Keras nests it: an int, or a tuple for several axes."""
        return self._nested([nest.pack(model.states, lambda spec: _size(spec.shape)) for model in self.models])

    @property
    def output_size(self) -> Any:
        """The size of the output at one step of one row; by name when there are several outputs."""
        outputs = self.models[-1].outputs
        return _size(outputs[0].shape) if len(outputs) == 1 else {each.name: _size(each.shape) for each in outputs}

    def get_initial_state(self, batch_size: int) -> list[nest.Nest]:
        """Zeros, as Keras's layers give them: each state [batch_size, ...], nested."""
        return self._nested([zero_states(model.states, batch_size) for model in self.models])

    def compute_output_shape(self, shape: Any) -> Any:
        """The shape of what a call with an input of that shape returns."""
        if isinstance(shape, Mapping):
            shape = shape[self.models[0].inputs[0].name]
        first, second = shape[0], shape[1]
        batch = second if self.options.time_major else first
        lead = (first, second) if self.options.return_sequences else (batch,)
        outputs = self.models[-1].outputs
        named = {each.name: (*lead, *each.shape) for each in outputs}
        output = named if len(outputs) > 1 else named[outputs[0].name]
        if not self.options.return_state:
            return output
        return [output, *self._nested([nest.pack(m.states, lambda spec: (batch, *spec.shape)) for m in self.models])]

    # Calls

    async def call(self, x: Any, mask: Any, initial_state: nest.Nest, limit: float | None) -> Any:
        """One call."""
        await self.build(limit)
        if not self.options.stateful:
            return await self._call_stateless(x, mask, initial_state, limit)
        async with self._turn:
            return await self._call_stateful(x, mask, initial_state, limit)

    async def reset_states(self, states: nest.Nest, limit: float | None) -> None:
        """Puts the recorded states to given values, or back to the model's default."""
        if not self.options.stateful:
            raise AttributeError("Layer must be stateful.")
        await self.build(limit)
        async with self._turn:
            if self._live:
                await self._reset(states, limit)
            else:
                self._initial = states

    async def close(self) -> None:
        """Ends the sessions of a stateful layer."""
        self._closed = True
        live, self._live = self._live, []
        for each in live:
            await each.close(delete=True)

    async def _call_stateless(self, x: Any, mask: Any, initial_state: nest.Nest, limit: float | None) -> Any:
        split = self._split(initial_state)
        found: list[nest.Nest] = []
        for place, signature in enumerate(self._signatures):
            inputs, valid, batch = signature.call(x, mask)
            request = inference_pb2.PredictRequest(
                model=signature.model.name,
                version=signature.model.version,
                options=signature.options.to_message(),
                inputs=encode_named(inputs),
            )
            if valid is not None:
                encode_into(request.mask, valid)
            if split[place] is not None:
                states = flat_states(signature.model, split[place], batch)
                request.initial_states.extend(encode_named(states))
            response = await self._connection.predict(request, limit)
            result = signature.result(
                decode_named(response.outputs, "outputs"), decode_named(response.states, "states")
            )
            x = result
            if self.options.return_state:
                x, *states_after = result
                found.append(states_after)
            mask = self._mask_above(valid, place)
        return [x, *self._nested(found)] if self.options.return_state else x

    async def _call_stateful(self, x: Any, mask: Any, initial_state: nest.Nest, limit: float | None) -> Any:
        if self._closed:
            raise RuntimeError("the layer was closed")
        if not self._live:
            await self._start(self._signatures[0].batch_of(x), initial_state, limit)
        elif initial_state is not None:
            await self._reset(initial_state, limit)
        while self._undo:
            live, states = self._undo[-1]
            await live.reset(states, limit)
            self._undo.pop()
        before = self._split(self.states)
        found: list[nest.Nest] = []
        for place, live in enumerate(self._live):
            try:
                chunk = live.signature.chunk(x, mask, asyncio.get_running_loop().create_future())
                live.submit(chunk)
                result = live.signature.chunk_result(*await live.answer(chunk, limit))
            except BaseException as error:
                self._undo = self._moved(place, before, error)
                raise
            x = result
            if live.signature.options.return_state:
                x, *states_after = result
                found.append(states_after)
            mask = self._mask_above(chunk.mask, place)
        self.states = self._nested(found) if len(found) == len(self._live) else None
        return [x, *(self.states or [])] if self.options.return_state else x

    def _moved(self, place: int, before: list[nest.Nest], error: BaseException) -> list[tuple[Live, nest.Nest]]:
        """The sessions that have moved on, or may have, when the one at `place` failed, each with where it was.

        They are put back before the next call: a call that failed, or was not answered, is as if it had not been. Not
        so where a model cannot show its states.
        """
        if not all(live.signature.options.return_state for live in self._live):
            return []
        unknown = not isinstance(error, RequestError) or isinstance(error, (ChunkLost, DeadlineExceeded, Unavailable))
        count = place + 1 if unknown else place
        return list(zip(self._live[:count], before[:count], strict=True))

    async def _start(self, batch_size: int, initial_state: nest.Nest, limit: float | None) -> None:
        """Makes the sessions. They always return their states, which `states` shows, if the model can."""
        split = self._split(self._initial if initial_state is None else initial_state)
        live: list[Live] = []
        try:
            for signature, states in zip(self._signatures, split, strict=True):
                model = signature.model
                shows = "return_state" in model.settable_options or model.default_options.return_state
                options = replace(signature.options, return_state=shows or self.options.return_state)
                wish = Wish(
                    model=model.name,
                    version=model.version,
                    batch_size=batch_size,
                    initial_state=states,
                    options=options.to_message(),
                    terms=self._terms,
                )
                live.append(await Live.create(self._connection, wish, limit))
        except BaseException:
            for each in live:
                await each.close(delete=True)
            raise
        self._live, self.batch_size = live, batch_size
        self.states = self._initial if initial_state is None else initial_state
        self._initial = None

    async def _reset(self, states: nest.Nest, limit: float | None) -> None:
        for live, part in zip(self._live, self._split(states), strict=True):
            await live.reset(part, limit)
        self.states = states
        self._undo.clear()

    def _mask_above(self, mask: Array | None, place: int) -> Array | None:
        """The mask of the next layer, in the order in which this one returned its sequence."""
        if mask is None or not self._signatures[place].options.go_backwards:
            return mask
        return np.flip(mask, 0 if self.options.time_major else 1)

    def _nested(self, states: list[nest.Nest]) -> list[nest.Nest]:
        return states if self.stacked else states[0]

    def _split(self, states: nest.Nest) -> list[nest.Nest]:
        """States for each model; None for each when there are none."""
        if states is None:
            return [None] * len(self._signatures)
        if not self.stacked:
            return [states]
        if not isinstance(states, (list, tuple)) or len(states) != len(self._signatures):
            got = f"{len(states)}" if isinstance(states, (list, tuple)) else type(states).__name__
            raise InvalidInput.of("initial_state", f"a list of {len(self._signatures)}, one for each model", got)
        return list(states)


def _size(shape: tuple[int, ...]) -> int | tuple[int, ...]:
    return shape[0] if len(shape) == 1 else shape
