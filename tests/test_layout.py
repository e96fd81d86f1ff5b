"""From the wire's axes to the engine's and back."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rnnserve_models.options import LayerOptions
from rnnserve_models.spec import StateSpec, TensorSpec
from rnnserve_server.errors import InvalidInput
from rnnserve_server.layout import check_call, check_states, not_finite, to_call, to_wire

F32 = np.dtype(np.float32)
ONE = (TensorSpec("x", F32, (3,)),)
TWO = (TensorSpec("x", F32, (3,)), TensorSpec("n", np.dtype(np.int64), ()))
STATES = (StateSpec("h", F32, (4,), (0,)), StateSpec("c", F32, (4, 2), (1,)))


def taking(specs, *, whole=False):
    """What `laid` wants to know of an engine."""
    return SimpleNamespace(inputs=specs, whole=whole, timesteps=None)


def laid(engine, layer, arrays, mask, batch_size):
    """Inputs of N chunks, checked and laid out."""
    check_call(engine, layer, arrays, mask, batch_size=batch_size)
    return to_call(engine, layer, arrays, mask)


def options(**values):
    return LayerOptions(return_sequences=True, return_state=True, **values)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.booleans(), st.booleans())
def test_there_and_back(chunks, batch, steps, time_major, masked):
    """An engine that echoes gives the client what it sent, in the client's axes, rows in order of chunk then batch."""
    layer = options(time_major=time_major)
    shape = (chunks, steps, batch, 3) if time_major else (chunks, batch, steps, 3)
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    n = x[..., 0].astype(np.int64)
    mask = np.ones(shape[:3], bool) if masked else None
    call = laid(taking(TWO), layer, {"x": x, "n": n}, mask, batch)
    assert call.inputs["x"].shape == (steps, chunks * batch, 3)
    assert call.inputs["n"].shape == (steps, chunks * batch)
    for chunk in range(chunks):
        for row in range(batch):
            for t in range(steps):
                sent = x[chunk, t, row] if time_major else x[chunk, row, t]
                np.testing.assert_array_equal(call.inputs["x"][t, chunk * batch + row], sent)
    states = {"h": np.arange(chunks * batch * 4).reshape(-1, 4)}
    outputs, shown = to_wire({"y": np.stack([call.inputs["x"]] * 2)}, {"h": states["h"][None]}, layer, chunks)
    np.testing.assert_array_equal(outputs["y"], np.stack([x, x]))
    assert shown["h"].shape == (1, chunks, batch, 4)
    assert shown["h"][0, -1, -1].tolist() == states["h"][-1].tolist()


@pytest.mark.parametrize("time_major", [False, True])
def test_last_output_has_no_time_axis(time_major):
    """Without return_sequences an output is [N, batch, ...], time_major or not; without return_state no state."""
    last = {"y": np.arange(24).reshape(2, 6, 2)}
    outputs, states = to_wire(last, {"h": np.zeros((2, 6, 4))}, LayerOptions(time_major=time_major), 3)
    assert outputs["y"].tolist() == last["y"].reshape(2, 3, 2, 2).tolist()
    assert states == {}


@pytest.mark.parametrize("time_major", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_mask_selects_steps(time_major, backwards):
    """A mask moves each row's valid steps to the front, in the order of iteration; one row of it may mean all."""
    x = np.arange(2 * 2 * 4, dtype=np.float32).reshape(2, 2, 4, 1).repeat(3, axis=3)  # [N, B, T, 3]
    mask = np.array([[[1, 0, 1, 1]], [[0, 0, 0, 1]]], bool)  # [N, 1, T]
    if time_major:
        x, mask = x.swapaxes(1, 2), mask.swapaxes(1, 2)
    layer = options(time_major=time_major, go_backwards=backwards)
    call = laid(taking(ONE), layer, {"x": x}, mask, None)
    assert call.lengths.tolist() == [3, 3, 1, 1]
    assert call.timesteps == 4
    rows = [[0, 2, 3], [4, 6, 7], [11], [15]]
    for row, steps in enumerate(rows):
        assert call.inputs["x"][: len(steps), row, 0].tolist() == (steps[::-1] if backwards else steps)
        assert not call.inputs["x"][len(steps) :, row].any()


F = np.zeros


@pytest.mark.parametrize(
    ("arrays", "field", "expected", "got"),
    [
        ({}, "inputs.x", "a tensor", "none"),
        ({"x": F((2, 2, 5, 3), "f4")}, "inputs.n", "a tensor", "none"),
        ({"x": F((2, 2, 5, 3), "f4"), "n": F((2, 2, 5), "i8"), "z": F(1)}, "inputs.z", "one of ['x', 'n']", "'z'"),
        ({"x": F((2, 2, 5, 3), "f8"), "n": F((2, 2, 5), "i8")}, "inputs.x", "dtype float32", "float64"),
        ({"x": F((2, 2, 5), "f4"), "n": F((2, 2, 5), "i8")}, "inputs.x", "shape [2, time, 3]", "shape [2, 5]"),
        ({"x": F((2, 2, 5, 4), "f4"), "n": F((2, 2, 5), "i8")}, "inputs.x", "shape [2, time, 3]", "shape [2, 5, 4]"),
        ({"x": F((2, 3, 5, 3), "f4"), "n": F((2, 3, 5), "i8")}, "inputs.x", "shape [2, time, 3]", "shape [3, 5, 3]"),
        ({"x": F((2, 2, 0, 3), "f4"), "n": F((2, 2, 0), "i8")}, "inputs.x", "none of them 0", "shape [2, 0, 3]"),
        ({"x": F((2, 2, 5, 3), "f4"), "n": F((2, 2, 4), "i8")}, "inputs.n", "shape [2, 5]", "shape [2, 4]"),
        ({"x": F((2, 2, 5, 3), "f4"), "n": F((2, 2, 5, 1), "i8")}, "inputs.n", "shape [2, 5]", "shape [2, 5, 1]"),
        ({"x": F(2, "f4"), "n": F((2, 2, 5), "i8")}, "inputs.x", "shape [2, time, 3]", "shape []"),
    ],
)
def test_every_misfit_is_named(arrays, field, expected, got):
    """An input that does not fit is refused by its name, what would fit, and what came."""
    with pytest.raises(InvalidInput) as caught:
        laid(taking(TWO), options(), arrays, None, 2)
    facts = caught.value.metadata
    assert facts["field"] == field
    assert expected in facts["expected"]
    assert facts["got"] == got
    assert caught.value.violations[0][0] == field
    assert str(caught.value).startswith(f"{field}: expected ")


def test_axes_are_named_in_the_order_that_the_client_uses():
    """With time_major the expected shape begins with time; without a session any batch will do, but not none."""
    with pytest.raises(InvalidInput) as caught:
        laid(taking(ONE), options(time_major=True), {"x": F((1, 2, 5, 4), "f4")}, None, 5)
    assert caught.value.metadata["expected"] == "shape [time, 5, 3], none of them 0"
    with pytest.raises(InvalidInput) as caught:
        laid(taking(ONE), options(), {"x": F((1, 0, 5, 3), "f4")}, None, None)
    assert caught.value.metadata["expected"] == "shape [batch, time, 3], none of them 0"


@pytest.mark.parametrize(
    ("mask", "expected", "got"),
    [
        (F((2, 2, 5), "u1"), "dtype bool", "uint8"),
        (F((2, 2), bool), "shape [2, 5]", "shape [2]"),
        (F((2, 3, 5), bool), "shape [2, 5]", "shape [3, 5]"),
        (F((2, 2, 4), bool), "shape [2, 5]", "shape [2, 4]"),
        (F((2, 2, 1), bool), "shape [2, 5]", "shape [2, 1]"),
        (F((1, 2, 5), bool), "shape [2, 5]", "shape [2, 5]"),
    ],
)
def test_every_misfit_of_a_mask_is_named(mask, expected, got):
    """So is a mask."""
    with pytest.raises(InvalidInput) as caught:
        laid(taking(ONE), options(), {"x": F((2, 2, 5, 3), "f4")}, mask, 2)
    assert (caught.value.metadata["field"], caught.value.metadata["got"]) == ("mask", got)
    assert caught.value.metadata["expected"].startswith(expected)


def test_not_finite_names_the_chunks_to_blame():
    """Only chunks with a NaN or an infinity in a valid step of a finite input are named, with the input's name."""
    specs = (TensorSpec("a", F32, (2,), finite=True), TensorSpec("b", F32, (), finite=True), TensorSpec("c", F32, ()))
    a, b, c = np.zeros((5, 2, 3, 2), F32), np.zeros((5, 2, 3), F32), np.full((5, 2, 3), np.nan, F32)
    a[1, 0, 2, 1] = np.nan
    a[3, 1, 0] = np.inf
    b[3, 1, 2] = -np.inf
    b[4, 1, 2] = np.nan
    mask = np.ones((5, 2, 3), bool)
    call = laid(taking(specs), options(), {"a": a, "b": b, "c": c}, None, 2)
    assert not_finite(specs, call, 2) == {1: "a", 3: "a", 4: "b"}
    mask[1, 0, 2] = mask[4, 1] = False
    call = laid(taking(specs), options(), {"a": a, "b": b, "c": c}, mask, 2)
    assert not_finite(specs, call, 2) == {3: "a"}
    call = laid(taking(specs), options(), {"a": a, "b": b, "c": c}, np.zeros_like(mask), 2)
    assert not_finite(specs, call, 2) == {}


def test_check_states():
    """States that a client gives are held against the model's, and against each other where the batch is free."""
    good = {"h": F((2, 4), "f4"), "c": F((2, 4, 2), "f4")}
    check_states(STATES, good, 2, "initial_states")
    check_states(STATES, good, None, "initial_states")
    for wrong, field, expected, got in (
        ({"h": good["h"]}, "initial_states.c", "a tensor", "none"),
        ({**good, "z": good["h"]}, "initial_states.z", "one of ['h', 'c']", "'z'"),
        ({**good, "c": F((2, 4, 2), "f8")}, "initial_states.c", "dtype float32", "float64"),
        ({**good, "c": F((2, 2, 4), "f4")}, "initial_states.c", "shape [2, 4, 2]", "shape [2, 2, 4]"),
        ({**good, "c": F((3, 4, 2), "f4")}, "initial_states.c", "shape [2, 4, 2]", "shape [3, 4, 2]"),
        ({**good, "h": F((), "f4")}, "initial_states.h", "shape [2, 4]", "shape []"),
    ):
        with pytest.raises(InvalidInput) as caught:
            check_states(STATES, wrong, 2, "initial_states")
        assert caught.value.metadata == {"field": field, "expected": expected, "got": got}
    with pytest.raises(InvalidInput) as caught:
        check_states(STATES, {**good, "h": F((), "f4")}, None, "states")
    assert caught.value.metadata["expected"] == "shape [batch, 4]"


def test_an_engine_that_wants_calls_whole_gets_the_mask_as_an_input():
    """Nothing is moved for it: it has every step, in the client's order, and the mask beside the inputs."""
    x = np.arange(12, dtype=np.float32).reshape(1, 2, 2, 3)
    mask = np.array([[[True, False], [False, True]]])
    call = laid(taking(ONE, whole=True), options(), {"x": x}, mask, 2)
    np.testing.assert_array_equal(call.inputs["x"], x[0].swapaxes(0, 1))
    np.testing.assert_array_equal(call.inputs["mask"], mask[0].T)
    assert call.mask is None
    assert call.lengths.tolist() == [2, 2]
