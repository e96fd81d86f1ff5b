"""Frames as columns are what protobuf makes of the same bytes, or are left to it."""

import itertools
import tracemalloc

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from rnnserve.codec import DTYPES, TensorError, decode_named, encode, encode_named
from rnnserve.frames import FrameReader, FrameWriter, outlined, varint
from rnnserve.v1 import inference_pb2 as pb
from rnnserve.v1 import tensor_pb2

STEPS = st.one_of(st.integers(0, 300), st.integers(0, 2**64 - 1))


@st.composite
def arrays(draw, lanes):
    """Tensors of N lanes, by their names."""
    found = {}
    for name in draw(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=3, unique=True)):
        dtype = draw(st.sampled_from(list(DTYPES.values())))
        shape = (lanes, *draw(st.lists(st.integers(1, 5), max_size=3)))
        numbers = np.frombuffer(draw(st.binary(min_size=1, max_size=64)) * 16384, np.uint8)
        size = int(np.prod(shape)) * dtype.itemsize
        numbers = numbers[:size] & 1 if dtype.kind == "b" else numbers[:size]
        found[name] = numbers.view(dtype).reshape(shape)
    return found


@st.composite
def requests(draw):
    """Messages as clients send them."""
    lanes = draw(st.lists(st.one_of(st.integers(0, 200), st.integers(0, 2**32 - 1)), min_size=1, max_size=9))
    steps = draw(st.one_of(st.just([]), STEPS.map(lambda step: [step] * len(lanes)), st.lists(STEPS, max_size=9)))
    frame = pb.StepFrame(lanes=lanes, first_steps=steps, inputs=encode_named(draw(arrays(len(lanes)))))
    if draw(st.booleans()):
        frame.mask.CopyFrom(encode(np.ones((len(lanes), 1, 2), bool)))
    frame.traceparent = draw(st.sampled_from(["", "", "00-abc"]))
    message = pb.StreamRequest(frames=[frame] * draw(st.sampled_from([1, 1, 1, 2])))
    if draw(st.integers(0, 5)) == 0:
        message.closes.add(lane=3)
    return message


def flat(axes):
    """A tensor of one element with so many axes."""
    return tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_UINT8, shape=[1] * axes, data=b"\1")


def same(one, other):
    """Whether arrays by name are alike, bit for bit."""
    return list(one) == list(other) and all(
        (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
        for a, b in zip(one.values(), other.values(), strict=True)
    )


def agrees(content, outline):
    """What is read as columns is a message of one plain frame, and says what protobuf says."""
    try:
        message = pb.StreamRequest.FromString(content)
    except DecodeError:  # its first steps are no numbers, which are not looked at before
        with pytest.raises(ValueError, match=r"."):
            outline.first_steps(content)
        return
    (frame,) = message.frames
    assert (list(message.opens), list(message.closes), frame.HasField("mask"), frame.traceparent) == ([], [], False, "")
    assert outline.lanes == tuple(frame.lanes)
    try:
        steps = outline.first_steps(content)
    except ValueError:
        assert len(frame.first_steps) not in (0, len(frame.lanes))
    else:
        assert (steps is None) == (not frame.first_steps)
        assert steps is None or steps.tolist() == list(frame.first_steps)
    try:
        read = outline.arrays(content, 3)
    except ValueError:
        with pytest.raises(TensorError, match="bool"):
            decode_named(frame.inputs)
        return
    assert same(read, decode_named(frame.inputs))
    assert all(array.flags.aligned and not array.flags.writeable for array in read.values())


@given(requests())
def test_a_plain_frame_is_read_as_protobuf_reads_it(message):
    """Every message with one frame, no mask and no trace is read as columns, and says the same; no other is."""
    content = message.SerializeToString()
    outline = outlined(content)
    (frame, *more) = message.frames
    plain = not (more or message.closes or frame.HasField("mask") or frame.traceparent)
    assert (outline is not None) == plain
    if outline is not None:
        assert outline.fits(content)
        agrees(content, outline)


@given(requests(), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=3), st.data())
def test_bytes_that_nobody_should_send(message, changes, data):
    """Whatever is changed in a message, it is left to protobuf, or read as protobuf reads it: an outline of what came
    before included.
    """
    content = message.SerializeToString()
    reader = FrameReader()
    reader.read(content)
    changed = bytearray(content)
    for at, byte in changes:
        changed[at % len(changed)] = byte
    cut = bytes(changed[: data.draw(st.integers(0, len(changed)))])
    for odd in (bytes(changed), cut, content + cut):
        outline = reader.read(odd)
        if outline is not None:
            agrees(odd, outline)


@given(st.lists(STEPS, min_size=3, max_size=3), st.lists(STEPS, min_size=3, max_size=3), st.integers(0, 255))
def test_a_frame_like_one_before(before, after, byte):
    """Of a frame that an outline fits, its own first steps and numbers are read, not those of the one before."""
    reader = FrameReader()
    for steps, number in ((before, 1), (after, byte)):
        x = np.full((3, 1, 1, 2), number, np.uint8)
        content = pb.StreamRequest(
            frames=[pb.StepFrame(lanes=[5, 6, 700], first_steps=steps, inputs=encode_named({"x": x}))]
        ).SerializeToString()
        outline = reader.read(content)
        assert outline is not None
        assert outline.first_steps(content).tolist() == steps
        assert same(outline.arrays(content, 3), {"x": x})


@given(st.data(), st.integers(1, 9), st.integers(1, 2**27))
def test_results_are_written_as_protobuf_writes_them(data, lanes, timesteps):
    """A message in pieces is byte for byte what protobuf makes of the same frame; two end to end have both frames."""
    tags = data.draw(st.lists(st.integers(0, 2**31), min_size=lanes, max_size=lanes))
    steps = data.draw(
        st.one_of(STEPS.map(lambda step: [step] * lanes), st.lists(STEPS, min_size=lanes, max_size=lanes))
    )
    outputs, states = data.draw(arrays(lanes)), data.draw(st.one_of(st.just({}), arrays(lanes)))
    writer = FrameWriter()
    expected = pb.ResultFrame(
        lanes=tags,
        first_steps=steps,
        timesteps=timesteps,
        outputs=encode_named(outputs),
        states=encode_named(states),
    )
    tensors = [(4, name, y) for name, y in outputs.items()] + [(5, name, state) for name, state in states.items()]
    written = [
        b"".join(map(bytes, writer.write(np.array(tags), np.array(steps, np.uint64), timesteps, tensors)))
        for _ in range(2)
    ]
    assert written[0] == written[1] == pb.StreamResponse(frames=[expected]).SerializeToString()
    assert list(pb.StreamResponse.FromString(b"".join(written)).frames) == [expected] * 2
    outline = outlined(written[0], timesteps=True)
    if len({*outputs, *states}) == len(outputs) + len(states):
        assert outline is not None
        assert (outline.lanes, outline.timesteps) == (tuple(tags), timesteps)
        assert same(outline.arrays(written[0], 4), outputs)
        assert same(outline.arrays(written[0], 5), states)


@pytest.mark.parametrize(
    "frame",
    [
        pb.StepFrame(lanes=[0] * 400_000, inputs=encode_named({"x": np.ones(1, np.uint8)})),
        pb.StepFrame(lanes=[0], inputs=[tensor_pb2.NamedTensor(name="x", tensor=flat(1_000_000))]),
        pb.StepFrame(lanes=[0], inputs=encode_named({str(n): np.ones(1, np.uint8) for n in range(20_000)})),
    ],
    ids=["lanes", "axes", "tensors"],
)
def test_what_would_take_long_is_left_to_protobuf(frame):
    """Lanes, axes and tensors beyond all use are not counted one by one by Python."""
    assert outlined(pb.StreamRequest(frames=[frame]).SerializeToString()) is None


def test_small_frames_of_many_lanes_are_each_like_one_before():
    """A stream on which each session steps for itself sends frames that differ by their lane alone: none is outlined
    twice.
    """
    reader, told = FrameReader(), []
    for step in (5, 6):
        frames = [
            pb.StepFrame(lanes=[lane], first_steps=[step], inputs=encode_named({"x": np.ones((1, 1, 5), np.float32)}))
            for lane in (*range(100), *range(200, 250))
        ]
        told.append([reader.read(pb.StreamRequest(frames=[frame]).SerializeToString()) for frame in frames])
    assert all(first is second is not None for first, second in zip(*told, strict=True))


def test_large_frames_that_begin_alike_are_each_like_one_before():
    """A client whose sessions come in two cohorts sends frames that differ by lanes far behind their beginning: none is
    outlined twice.
    """
    reader, told = FrameReader(), []
    for step in (5, 6):
        frames = [
            pb.StepFrame(
                lanes=range(first, first + 128),
                first_steps=[step] * 128,
                inputs=encode_named({"x": np.ones((128, 1, 64), np.float32)}),
            )
            for first in (128, 256)
        ]
        told.append([reader.read(pb.StreamRequest(frames=[frame]).SerializeToString()) for frame in frames])
    assert all(first is second is not None for first, second in zip(*told, strict=True))


def test_a_reader_keeps_no_more_than_a_bound():
    """Outlines of ever new frames of many lanes take no more memory than those of a few; the last one is kept."""
    reader, lanes = FrameReader(), list(range(60_000))
    tracemalloc.start()
    try:
        for number in range(40):
            frame = pb.StepFrame(lanes=lanes, inputs=encode_named({"x" * (number + 1): np.ones(1, np.uint8)}))
            content = pb.StreamRequest(frames=[frame]).SerializeToString()
            outline = reader.read(content)
            assert outline is not None
            assert reader.read(content) is outline
        del frame, content, outline
        assert tracemalloc.get_traced_memory()[0] < 24 << 20
    finally:
        tracemalloc.stop()


def test_an_array_of_any_strides_and_byte_order_is_written():
    """As the codec writes it: C order, little-endian."""
    x = np.arange(24, dtype=">f4").reshape(2, 3, 4)
    for array in (x, x.transpose(0, 2, 1), x[:, ::-1]):
        written = b"".join(map(bytes, FrameWriter().write(np.arange(2), None, 0, [(3, "x", array)])))
        (frame,) = pb.StreamRequest.FromString(written).frames
        assert same(decode_named(frame.inputs), {"x": array.astype("<f4")})
    with pytest.raises(TensorError, match="a data type among"):
        FrameWriter().write(np.arange(2), None, 0, [(3, "x", np.zeros(2, complex))])


def test_numbers():
    """A number is as many bytes as protobuf takes for it."""
    for value in itertools.chain(range(300), (2**bits + more for bits in range(8, 64) for more in (-1, 0, 1))):
        assert varint(value) == pb.StepFrame(first_steps=[value]).SerializeToString()[2:]
