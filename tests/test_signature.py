from __future__ import annotations

import numpy as np
import pytest

from fake_server import describe
from rnnserve._chunks import Columns
from rnnserve._signature import Signature, flat_states
from rnnserve.errors import InvalidInput, ServerError
from rnnserve.models import Model
from rnnserve.options import LayerOptions, given_options

SUM = Model.from_message(describe("sum"))
SCALAR = Model.from_message(describe("scalar"))
PAIR = Model.from_message(describe("pair"))


def signature(model=SUM, batch_size=None, **options):
    return Signature(model, LayerOptions(**options), batch_size)


@pytest.mark.parametrize(
    "given", [np.ones((2, 4, 3)), np.ones((2, 4, 3), int), np.ones((2, 4, 3), "f2"), np.ones((2, 4, 3), ">f4")]
)
def test_numbers_are_cast_as_keras_casts_them(given):
    """Integers and floats of any width and byte order become the model's float type."""
    inputs, mask, batch = signature().call(given)
    assert (inputs["x"].dtype, inputs["x"].flags.c_contiguous, mask, batch) == (np.float32, True, None, 2)
    assert (inputs["x"] == 1).all()


def test_the_right_array_is_not_copied():
    """An array that fits already goes as it is."""
    x = np.ones((2, 4, 3), "f4")
    assert signature().call(x)[0]["x"] is x


@pytest.mark.parametrize(
    ("model", "given", "expected", "got"),
    [
        (SUM, np.ones((4, 3), "f4"), "[batch, time, 3] (3 axes)", "[4, 3]"),
        (SUM, np.ones((2, 4, 5), "f4"), "[batch, time, 3]", "[2, 4, 5]"),
        (SUM, np.ones((2, 0, 3), "f4"), "at least one", "[2, 0, 3]"),
        (SUM, np.ones((2, 4, 3), complex), "float32", "complex128"),
        (SUM, np.ones((2, 4, 3), bool), "float32", "bool"),
        (SUM, [[1.0], [2.0, 3.0]], "float32", "inhomogeneous"),
        (SUM, {"z": np.ones((2, 4, 3))}, "['x']", "['z']"),
        (PAIR, np.ones((2, 4, 2)), "['a', 'b']", "ndarray"),
        (PAIR, {"a": np.ones((2, 4, 2)), "b": np.ones((2, 5), int)}, "[2, 4]", "[2, 5]"),
        (PAIR, {"a": np.ones((2, 4, 2)), "b": np.full((2, 4), 2**40)}, "fit int32", "beyond"),
        (PAIR, {"a": np.ones((2, 4, 2)), "b": np.ones((2, 4))}, "int32", "float64"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_sent(model, given, expected, got):
    """A wrong rank, extent, type or name is InvalidInput, with what was expected and what came."""
    with pytest.raises(InvalidInput) as caught:
        signature(model).call(given)
    assert expected in caught.value.metadata["expected"]
    assert got in caught.value.metadata["got"]
    assert caught.value.violations[0].field == caught.value.metadata["field"]
    assert isinstance(caught.value, ValueError)


def test_masks():
    """A mask is [batch, time], [batch, time, 1] or [1, time], of any number, and is spread over the batch."""
    x = np.ones((2, 3, 3), "f4")
    for mask in ([[1, 0, 2]], [[True, False, True]] * 2, np.array([[1.0, 0.0, -1.0]] * 2)[..., None]):
        valid = signature().call(x, mask)[1]
        assert valid.dtype == bool
        np.testing.assert_array_equal(valid, [[True, False, True]] * 2)
    timed = signature(time_major=True).call(np.ones((3, 2, 3), "f4"), [[1], [0], [1]])[1]
    np.testing.assert_array_equal(timed, [[True, True], [False, False], [True, True]])
    for mask in (np.ones((2, 4)), np.ones((3, 3)), np.ones(3), np.full((2, 3), "x"), np.ones((2, 1))):
        with pytest.raises(InvalidInput, match="mask"):
            signature().call(x, mask)


def test_time_major():
    """With time_major the batch is the second axis."""
    assert signature(time_major=True).call(np.ones((4, 2, 3)))[2] == 2
    assert signature(time_major=True, batch_size=2).chunk(np.ones((4, 2, 3))).form.timesteps == 4


def test_steps():
    """A step is without the time axis, and without the batch axis too for a batch size of 1."""
    chunk = signature(batch_size=1).step(np.ones(3))
    assert (chunk.form.shapes, chunk.form.timesteps) == (((1, 1, 3),), 1)
    assert signature(batch_size=2).step(np.ones((2, 3))).form.shapes == ((2, 1, 3),)
    assert signature(batch_size=2, time_major=True).step(np.ones((2, 3))).form.shapes == ((1, 2, 3),)
    assert signature(SCALAR, 1).step(4).form.shapes == ((1, 1),)
    for batch_size, shape in ((1, (1, 3)), (2, (3,)), (2, (3, 3)), (1, (2,))):
        with pytest.raises(InvalidInput, match=f"got shape {list(shape)}".replace("[", r"\[")):
            signature(batch_size=batch_size).step(np.ones(shape))


def test_steps_share_frames_with_chunks_of_the_same_shape():
    """What may share a frame has equal keys: the shapes, the types, the mask and the order of the axes decide."""
    one = signature(batch_size=1)
    assert one.step(np.ones(3)).form.key == one.chunk(np.ones((1, 1, 3))).form.key
    assert one.chunk(np.ones((1, 1, 3)), [[1]]).form.key != one.chunk(np.ones((1, 1, 3))).form.key
    assert signature(batch_size=1, time_major=True).step(np.ones(3)).form.key != one.step(np.ones(3)).form.key


def test_fixed_batch_size():
    """A chunk of another batch size than the session's is refused."""
    with pytest.raises(InvalidInput, match="2 rows, the fixed batch size, got 3 rows"):
        signature(batch_size=2).chunk(np.ones((3, 4, 3)))


@pytest.mark.parametrize(
    ("batch_size", "options", "sent", "shape"),
    [
        (1, {}, (5, 1, 3), (3,)),
        (1, {"return_sequences": True}, (5, 1, 1, 3), (3,)),
        (2, {}, (5, 2, 3), (2, 3)),
        (2, {"return_sequences": True}, (5, 2, 1, 3), (2, 3)),
        (2, {"return_sequences": True, "time_major": True}, (5, 1, 2, 3), (2, 3)),
    ],
)
def test_step_results(batch_size, options, sent, shape):
    """The output of a step has the axes of the step, from the row of its session."""
    y = np.arange(np.prod(sent), dtype="f4").reshape(sent)
    columns = Columns({"y": y}, {})
    output = signature(batch_size=batch_size, **options).step_result(columns, 3)
    np.testing.assert_array_equal(output, y[3].reshape(shape))
    every = signature(batch_size=batch_size, **options).step_all_result(columns)
    np.testing.assert_array_equal(every, y.reshape(5, *shape))


def test_scalars_and_states():
    """A scalar output of one row is a NumPy scalar; states keep their batch axis, so that they can be given back."""
    columns = Columns({"y": np.array([[1.0], [2.0]], "f4")}, {"total": np.array([[3.0], [4.0]], "f4")})
    output, total = signature(SCALAR, 1, return_state=True).step_result(columns, 1)
    assert isinstance(output, np.float32)
    assert output == 2
    np.testing.assert_array_equal(total, [4])


def test_several_outputs_are_named():
    """A model of several outputs gives a dict in the model's order."""
    columns = Columns({"q": np.array([[7]]), "p": np.array([[[1, 2]]])}, {})
    output = signature(PAIR, 1).step_result(columns, 0)
    assert list(output) == ["p", "q"]
    assert output["q"] == 7


def test_an_answer_that_lacks_something():
    """An answer without an output or a state that the description promises is the server's fault."""
    with pytest.raises(ServerError, match="does not fit"):
        signature(batch_size=1).step_result(Columns({"z": np.zeros((1, 1, 3))}, {}), 0)
    with pytest.raises(ServerError, match="does not fit"):
        signature(return_state=True).result({"y": np.zeros((1, 3))}, {})


def test_states_are_checked():
    """Initial states are cast, and have one row for each row of the batch."""
    assert flat_states(SUM, np.ones((2, 3), int), 2)["total"].dtype == np.float32
    with pytest.raises(InvalidInput, match=r"initial_state.total: expected shape \[2, 3\], got shape \[1, 3\]"):
        flat_states(SUM, [np.ones((1, 3))], 2)


def test_session_options():
    """Only what is given is sent; an unknown option and a value that is no boolean are refused at once."""
    message = given_options({"return_sequences": False})
    assert [field.name for field, _ in message.ListFields()] == ["return_sequences"]
    for given in ({"return_sequence": True}, {"stateful": True}, {"unroll": 1}):
        with pytest.raises(TypeError, match=next(iter(given))):
            given_options(given)
    assert len(LayerOptions().to_message().ListFields()) == 7
