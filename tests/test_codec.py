from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from rnnserve import codec
from rnnserve.codec import TensorError
from rnnserve.v1 import tensor_pb2
from rnnserve.v1.tensor_pb2 import NamedTensor, Tensor

FLOAT32 = tensor_pb2.DATA_TYPE_FLOAT32
BOOL = tensor_pb2.DATA_TYPE_BOOL
DTYPES = st.sampled_from(["f2", "f4", "f8", "i4", "i8", "?", "u1", ">f4", ">i8"])
ARRAYS = DTYPES.flatmap(lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=0, max_dims=4, min_side=0)))


@given(ARRAYS)
def test_round_trip(array):
    """Every array of a type of the contract, of any shape, comes back with its bits, its shape and its type."""
    tensor = Tensor.FromString(codec.encode(array).SerializeToString())
    back = codec.decode(tensor)
    assert back.shape == array.shape
    assert back.dtype == array.dtype.newbyteorder("=")
    assert back.tobytes() == array.astype(back.dtype).tobytes()


@given(ARRAYS.filter(lambda array: array.ndim > 0))
def test_strides_do_not_matter(array):
    """A transposed or reversed view is sent as what it shows."""
    for view in (array.T, array[::-1]):
        np.testing.assert_array_equal(codec.decode(codec.encode(view)), view)


def test_wire_form():
    """Elements are little-endian, in C order."""
    tensor = codec.encode(np.array([[1, 2], [3, 258]], ">i4").T)
    assert (list(tensor.shape), tensor.data_type) == ([2, 2], tensor_pb2.DATA_TYPE_INT32)
    assert tensor.data == b"".join(number.to_bytes(4, "little") for number in (1, 3, 2, 258))


def test_decoding_copies_nothing_and_is_read_only():
    """What arrived cannot be changed by accident."""
    array = codec.decode(codec.encode(np.arange(4.0)))
    assert not array.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


@given(npst.array_shapes(min_dims=0, max_dims=3), st.integers(0, 64))
def test_wrong_length(shape, length):
    """Data of another length than the shape needs is refused, and the error names both lengths."""
    needed = int(np.prod(shape)) * 4
    tensor = Tensor(data_type=FLOAT32, shape=shape, data=bytes(length))
    if length == needed:
        assert codec.decode(tensor).shape == shape
        return
    with pytest.raises(TensorError) as caught:
        codec.decode(tensor, "inputs.x")
    assert str(needed) in caught.value.expected
    assert str(length) in caught.value.got
    assert caught.value.field == "inputs.x"
    assert str(caught.value).startswith("inputs.x: expected ")


@pytest.mark.parametrize(
    ("tensor", "got"),
    [
        (Tensor(shape=[0]), "none"),
        (Tensor(data_type=99, shape=[0]), "99"),
        (Tensor(data_type=FLOAT32, shape=[-1], data=b""), "[-1]"),
        (Tensor(data_type=FLOAT32, shape=[-1, -1], data=bytes(4)), "[-1, -1]"),
        (Tensor(data_type=BOOL, shape=[2], data=b"\x01\x02"), "2"),
        (Tensor(data_type=FLOAT32, shape=[2**62, 4], data=b""), "0 bytes"),
        (Tensor(data_type=FLOAT32, shape=[2**32, 2**32], data=bytes(4)), "4 bytes"),
        (Tensor(data_type=FLOAT32, shape=[2**40], data=bytes(4)), "4 bytes"),
        (Tensor(data_type=FLOAT32, shape=[0, 2**62, 2**62], data=b""), str(2**62)),
        (Tensor(data_type=FLOAT32, shape=[1] * 65, data=bytes(4)), "65 axes"),
    ],
)
def test_bad_tensors(tensor, got):
    """A tensor that breaks a rule is a TensorError that says what came; huge shapes cost no memory."""
    with pytest.raises(TensorError) as caught:
        codec.decode(tensor)
    assert got in caught.value.got


@pytest.mark.parametrize("extent", [0, 1, 2**62])
def test_axes_without_end_are_refused_before_they_are_multiplied(extent):
    """A million extents of 2^62 are an error, not an hour's work; and what needs no data has no more of them."""
    with pytest.raises(TensorError, match="at most 64 axes, got 1000000 axes"):
        codec.decode(Tensor(data_type=FLOAT32, shape=[extent] * 1_000_000))


def test_more_tensors_than_any_model_has_are_refused():
    many = (NamedTensor(name=str(n), tensor=codec.encode(np.zeros(1, np.uint8))) for n in itertools.count())
    with pytest.raises(TensorError, match="inputs: expected at most 4096 tensors"):
        codec.decode_named(many, "inputs")


def test_unknown_dtype():
    """A dtype that the contract lacks is refused, never converted."""
    with pytest.raises(TensorError, match=r"expected a data type among .*float32.*, got complex128"):
        codec.encode(np.zeros(2, complex))


def test_names():
    """Names keep their order; a name that comes twice is refused; errors name the field by its prefix."""
    tensors = codec.encode_named({"b": np.zeros(2), "a": np.ones(1)})
    assert list(codec.decode_named(tensors)) == ["b", "a"]
    with pytest.raises(TensorError, match=r"inputs\.b: expected distinct names, got 'b' twice"):
        codec.decode_named([*tensors, tensors[0]], "inputs")
    with pytest.raises(TensorError, match=r"inputs\.c"):
        codec.decode_named([NamedTensor(name="c")], "inputs")
    with pytest.raises(TensorError, match=r"^x: "):
        codec.encode_named({"x": np.zeros(2, "M8[s]")})


@given(DTYPES, st.integers(1, 5), npst.array_shapes(max_dims=3, min_side=0))
def test_joined(dtype, count, shape):
    """Parts written end to end are the tensor of the parts stacked."""
    parts = [np.full(shape, number % 2).astype(dtype) for number in range(count)]
    tensor = Tensor()
    codec.encode_joined(tensor, parts, (count, *shape))
    assert tensor == codec.encode(np.stack(parts))


def test_data_types_map_both_ways():
    """Each number of the contract has one dtype and each such dtype that number."""
    numbers = [number for number in tensor_pb2.DataType.values() if number]
    assert sorted(codec.DTYPES) == numbers
    assert [codec.DATA_TYPES[codec.DATA_TYPES[number]] for number in numbers] == numbers
