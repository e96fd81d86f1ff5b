"""Makes the ONNX files of this folder, and what the frameworks that they came from compute.

    python make_exports.py torch      # needs torch, onnxscript and safetensors
    python make_exports.py keras3     # needs tensorflow, tf2onnx and safetensors
    python make_exports.py keras2     # needs tensorflow, tf_keras, tf2onnx and safetensors

Beside each ``<name>.onnx`` stands ``<name>.safetensors``: the inputs ``in.<i>`` and the framework's outputs
``out.<i>``, in the order of the graph's.
``torch_*.safetensors`` without a graph are state dicts, with inputs and outputs of the module in
``expected_*.safetensors``. Tests read the files and need none of the frameworks.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
BATCH, STEPS, FEATURES, UNITS = 3, 7, 3, 4


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def keep(name, inputs, outputs):
    tensors = {f"in.{index}": np.ascontiguousarray(array) for index, array in enumerate(inputs)}
    tensors |= {f"out.{index}": np.ascontiguousarray(array) for index, array in enumerate(outputs)}
    save_file(tensors, HERE / f"{name}.safetensors")


# ---------------------------------------------------------------------------------------------------------- PyTorch


def make_torch():
    import torch
    from torch import nn
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    class Tagger(nn.Module):
        """A recurrent layer and a dense one; ``pick`` says what of the sequence is kept."""

        def __init__(self, kind, pick="all", **options):
            super().__init__()
            self.rnn = getattr(nn, kind)(FEATURES, UNITS, **options)
            self.head = nn.Linear(UNITS * (2 if options.get("bidirectional") else 1), 2)
            self.pick = pick
            self.batch_first = options.get("batch_first", False)

        def forward(self, x):
            y, _ = self.rnn(x)
            if self.pick == "last":
                y = y[:, -1] if self.batch_first else y[-1]
            return self.head(y)

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(FEATURES, UNITS, batch_first=True)

        def forward(self, x, lengths):
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            y, (h, _) = self.rnn(packed)
            y, _ = pad_packed_sequence(y, batch_first=True)
            return y, h

    class Learned(nn.Module):
        """Begins from a state that was learned."""

        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(FEATURES, UNITS)
            self.start = nn.Parameter(torch.randn(1, 1, UNITS))

        def forward(self, x):
            return self.rnn(x, self.start.expand(1, x.shape[1], UNITS).contiguous())[0]

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, FEATURES)
            self.rnn = nn.LSTM(FEATURES, UNITS, batch_first=True)

        def forward(self, ids):
            return self.rnn(self.embed(ids))[0]

    class Explicit(nn.Module):
        """Takes its states and gives them."""

        def __init__(self, layers, direct=False):
            super().__init__()
            self.rnn = nn.LSTM(FEATURES, UNITS, num_layers=layers, batch_first=True)

        def forward(self, x, h0, c0):
            y, (h, c) = self.rnn(x, (h0, c0))
            return y, h, c

    def export(name, module, inputs, *, dynamo=False, fixed=False, axes=None):
        torch.manual_seed(len(name))
        module = module.eval()
        for parameter in module.parameters():
            nn.init.uniform_(parameter, -0.6, 0.6)
        path = HERE / f"{name}.onnx"
        tensors = tuple(torch.from_numpy(array) for array in inputs)
        labels = [f"in{index}" if index else "x" for index in range(len(inputs))]
        batch_first = getattr(getattr(module, "rnn", module), "batch_first", False)
        first = {0: "batch", 1: "time"} if batch_first else {0: "time", 1: "batch"}
        axes = axes or {0: first}
        with torch.no_grad():
            found = module(*tensors)
        flat = [found] if isinstance(found, torch.Tensor) else []
        for part in () if flat else found:
            flat += [part] if isinstance(part, torch.Tensor) else list(part)
        names = ["y", "hn", "cn"][: len(flat)]
        if dynamo:
            shapes = None if fixed else tuple(dict.fromkeys(axes[i], torch.export.Dim.AUTO) for i in range(len(inputs)))
            program = torch.onnx.export(
                module,
                tensors,
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=labels,
                output_names=names,
                verbose=False,
            )
            for node in program.model.graph:
                node.metadata_props.clear()
            program.save(str(path), external_data=False)
        else:
            dynamic = None if fixed else {labels[i]: axes[i] for i in axes}
            torch.onnx.export(
                module, tensors, str(path), dynamo=False, dynamic_axes=dynamic, input_names=labels, output_names=names
            )
        _strip(path)
        keep(name, inputs, [tensor.numpy() for tensor in flat])

    x, xt = random(BATCH, STEPS, FEATURES), random(STEPS, BATCH, FEATURES)
    state = random(1, BATCH, UNITS, seed=1)
    jobs = {
        "script_lstm": lambda n: export(n, nn.LSTM(FEATURES, UNITS, batch_first=True), [x]),
        "script_gru": lambda n: export(n, Tagger("GRU"), [xt]),
        "script_rnn": lambda n: export(n, Tagger("RNN", batch_first=True), [x]),
        "script_rnn_relu": lambda n: export(n, Tagger("RNN", nonlinearity="relu"), [xt]),
        "script_lstm_stacked": lambda n: export(n, Tagger("LSTM", num_layers=2, batch_first=True), [x]),
        "script_gru_stacked_states": lambda n: export(n, nn.GRU(FEATURES, UNITS, num_layers=2), [xt]),
        "script_lstm_last": lambda n: export(n, Tagger("LSTM", pick="last", batch_first=True), [x]),
        "script_lstm_bidirectional": lambda n: export(n, Tagger("LSTM", bidirectional=True, batch_first=True), [x]),
        "script_gru_bidirectional_stacked": lambda n: export(
            n, Tagger("GRU", bidirectional=True, num_layers=2, batch_first=True), [x]
        ),
        "script_gru_learned": lambda n: export(n, Learned(), [xt]),
        "script_lstm_tokens": lambda n: export(n, Tokens(), [np.arange(BATCH * STEPS).reshape(BATCH, STEPS) % 11]),
        "script_lstm_explicit": lambda n: export(
            n,
            Explicit(1),
            [x, state, 2 * state],
            axes={0: {0: "batch", 1: "time"}, 1: {1: "batch"}, 2: {1: "batch"}},
        ),
        "script_lstm_explicit_stacked": lambda n: export(
            n,
            Explicit(2),
            [x, random(2, BATCH, UNITS, seed=2), random(2, BATCH, UNITS, seed=3)],
            axes={0: {0: "batch", 1: "time"}, 1: {1: "batch"}, 2: {1: "batch"}},
        ),
        "script_lstm_batch_fixed": lambda n: export(n, Tagger("LSTM", batch_first=True), [x], axes={0: {1: "time"}}),
        "script_lstm_fixed": lambda n: export(n, Tagger("LSTM", batch_first=True), [x], fixed=True),
        "script_lstm_packed": lambda n: export(
            n, Packed(), [x, np.array([4, 7, 2])], axes={0: {0: "batch", 1: "time"}, 1: {0: "batch"}}
        ),
        "dynamo_lstm": lambda n: export(n, nn.LSTM(FEATURES, UNITS, batch_first=True), [x], dynamo=True),
        "dynamo_gru": lambda n: export(n, Tagger("GRU", batch_first=True), [x], dynamo=True),
        "dynamo_lstm_stacked": lambda n: export(n, Tagger("LSTM", num_layers=2), [xt], dynamo=True),
        "dynamo_lstm_bidirectional": lambda n: export(
            n, Tagger("LSTM", bidirectional=True, batch_first=True), [x], dynamo=True
        ),
        "dynamo_lstm_fixed": lambda n: export(n, Tagger("LSTM", batch_first=True), [x], dynamo=True, fixed=True),
        "dynamo_rnn": lambda n: export(n, Tagger("RNN", batch_first=True), [x], dynamo=True),
        "dynamo_rnn_fixed": lambda n: export(n, Tagger("RNN", batch_first=True), [x], dynamo=True, fixed=True),
    }
    _run(jobs)

    def state_dict(name, kind, prefix="", **options):
        torch.manual_seed(len(name))
        module = getattr(nn, kind)(FEATURES, UNITS, batch_first=True, **options).eval()
        save_file({prefix + key: t.numpy() for key, t in module.state_dict().items()}, HERE / f"{name}.safetensors")
        with torch.no_grad():
            y, states = module(torch.from_numpy(x))
        states = states if isinstance(states, tuple) else (states,)
        keep(f"expected_{name}", [x], [y.numpy(), *(s.numpy() for s in states)])

    state_dict("torch_lstm", "LSTM")
    state_dict("torch_lstm_2", "LSTM", prefix="encoder.rnn.", num_layers=2)
    state_dict("torch_lstm_bidirectional", "LSTM", bidirectional=True, num_layers=2)
    state_dict("torch_lstm_projected", "LSTM", proj_size=2)
    state_dict("torch_gru_2", "GRU", num_layers=2, bias=False)
    state_dict("torch_gru_bidirectional", "GRU", bidirectional=True)
    state_dict("torch_rnn_relu", "RNN", nonlinearity="relu")
    state_dict("torch_rnn_bidirectional", "RNN", bidirectional=True)


# ------------------------------------------------------------------------------------------------------------ Keras


def make_keras(version):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import tensorflow as tf
    import tf2onnx

    if version == 2:
        import tf_keras as keras
    else:
        import keras
    L = keras.layers

    def export(name, layers, *, x=None, batch=None, steps=None, warm=None, stateful=False):
        x = random(BATCH, STEPS, FEATURES) if x is None else x
        keras.utils.set_random_seed(len(name))
        shape = {"shape": (steps, *x.shape[2:])} if batch is None else {"batch_shape": (batch, steps, *x.shape[2:])}
        source = keras.Input(**shape, dtype=x.dtype.name)
        y = source
        for layer in layers:
            y = layer(y)
        model = keras.Model(source, y)
        values = np.random.default_rng(len(name))
        model.set_weights(
            [values.uniform(-0.6, 0.6, weight.shape).astype(weight.dtype) for weight in model.get_weights()]
        )
        if stateful:
            for layer in model.layers:
                if hasattr(layer, "reset_states"):
                    layer.reset_states()
            if warm is not None:
                model(warm)
        expected = None
        specs = [tf.TensorSpec((batch, steps, *x.shape[2:]), x.dtype.name, name="x")]
        function = tf.function(lambda x: model(x, training=False), input_signature=specs, autograph=False)
        tf2onnx.convert.from_function(function, input_signature=specs, opset=17, output_path=str(HERE / f"{name}.onnx"))
        _strip(HERE / f"{name}.onnx")
        expected = model(x, training=False)
        expected = expected if isinstance(expected, (list, tuple)) else [expected]
        keep(name, [x], [np.asarray(part) for part in expected])

    masked = random(BATCH, STEPS, FEATURES)
    masked[0, 5:] = 0
    masked[1, :2] = 0
    masked[2, 3] = 0
    ids = np.array([[1, 2, 3, 0, 0], [0, 4, 5, 6, 1], [7, 0, 8, 9, 2]], np.int32)
    p = f"keras{version}_"
    seq = {"return_sequences": True}
    jobs = {
        "lstm": lambda n: export(n, [L.LSTM(UNITS, **seq), L.Dense(2)]),
        "lstm_last": lambda n: export(n, [L.LSTM(UNITS)]),
        "lstm_stacked": lambda n: export(n, [L.LSTM(UNITS, **seq), L.LSTM(5, **seq)]),
        "lstm_relu": lambda n: export(n, [L.LSTM(UNITS, activation="relu", **seq)]),
        "lstm_state": lambda n: export(n, [L.LSTM(UNITS, return_state=True, **seq)]),
        "lstm_reversed": lambda n: export(n, [L.LSTM(UNITS, go_backwards=True, **seq)]),
        "gru": lambda n: export(n, [L.GRU(UNITS, **seq)]),
        "gru_reset_before": lambda n: export(n, [L.GRU(UNITS, reset_after=False, **seq)]),
        "simple": lambda n: export(n, [L.SimpleRNN(UNITS, **seq)]),
        "simple_last": lambda n: export(n, [L.SimpleRNN(UNITS)]),
        "cells": lambda n: export(n, [L.RNN([L.LSTMCell(UNITS), L.GRUCell(5)], **seq)]),
        "rnn_lstm_cell": lambda n: export(n, [L.RNN(L.LSTMCell(UNITS), **seq)]),
        "bidirectional": lambda n: export(n, [L.Bidirectional(L.LSTM(UNITS, **seq))]),
        "bidirectional_gru": lambda n: export(n, [L.Bidirectional(L.GRU(UNITS, **seq))]),
        "masked": lambda n: export(n, [L.Masking(), L.LSTM(UNITS, **seq)], x=masked),
        "masked_gru": lambda n: export(n, [L.Masking(), L.GRU(UNITS)], x=masked),
        "masked_bidirectional": lambda n: export(n, [L.Masking(), L.Bidirectional(L.LSTM(UNITS, **seq))], x=masked),
        "embedding": lambda n: export(n, [L.Embedding(11, FEATURES, mask_zero=True), L.GRU(UNITS, **seq)], x=ids),
        "stateful": lambda n: export(
            n,
            [L.LSTM(UNITS, stateful=True, **seq)],
            batch=BATCH,
            stateful=True,
            warm=random(BATCH, 4, FEATURES, seed=5),
        ),
        "stateful_simple": lambda n: export(
            n,
            [L.SimpleRNN(UNITS, stateful=True, **seq)],
            batch=1,
            x=random(1, STEPS, FEATURES),
            stateful=True,
            warm=random(1, 4, FEATURES, seed=5),
        ),
        "stateful_fresh": lambda n: export(n, [L.GRU(UNITS, stateful=True, **seq)], batch=BATCH, stateful=True),
        "unrolled": lambda n: export(n, [L.LSTM(UNITS, unroll=True, **seq)], steps=STEPS),
        "fixed": lambda n: export(n, [L.LSTM(UNITS, **seq)], steps=STEPS),
        "conv": lambda n: export(n, [L.Conv1D(4, 3, padding="same"), L.LSTM(UNITS, **seq)]),
    }
    _run({p + name: job for name, job in jobs.items()})


# ------------------------------------------------------------------------------------------------------------- both


def _strip(path):
    """Leaves out the traces of this machine: where nodes come from, and notes."""
    import onnx

    model = onnx.load(path)

    def clean(graph):
        graph.doc_string = ""
        for node in graph.node:
            node.doc_string = ""
            del node.metadata_props[:]
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    clean(attribute.g)
        for value in [*graph.value_info, *graph.input, *graph.output]:
            value.doc_string = ""
            del value.metadata_props[:]
        del graph.metadata_props[:]

    clean(model.graph)
    del model.metadata_props[:]
    if model.ByteSize() > 20_000:
        _shorten(model.graph, {value.name: value.name for value in [*model.graph.input, *model.graph.output]})
    onnx.save(model, path)


def _shorten(graph, names):
    """Gives tensors and nodes short names, which is most of what a large export is made of."""

    def short(name):
        return names.setdefault(name, f"t{len(names)}") if name else ""

    for value in [*graph.input, *graph.output, *graph.value_info, *graph.initializer]:
        value.name = short(value.name)
    for node in graph.node:
        node.name = ""
        node.input[:] = [short(name) for name in node.input]
        node.output[:] = [short(name) for name in node.output]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _shorten(attribute.g, names)


def _run(jobs):
    chosen = sys.argv[2:]
    for name, job in jobs.items():
        if chosen and name not in chosen:
            continue
        try:
            job(name)
        except Exception as error:  # an exporter that cannot do one of these does the others
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
        else:
            print(name, (HERE / f"{name}.onnx").stat().st_size)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    kind = sys.argv[1] if len(sys.argv) > 1 else ""
    if kind == "torch":
        make_torch()
    elif kind in ("keras2", "keras3"):
        make_keras(int(kind[-1]))
    else:
        sys.exit(__doc__)
