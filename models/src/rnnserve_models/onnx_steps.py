"""One step of each recurrent cell in ONNX, for the body of a ``Scan`` or a step written out."""

from __future__ import annotations

from collections.abc import Callable

from rnnserve_models.cell import Cell
from rnnserve_models.cells import GRUCell, LSTMCell, SimpleRNNCell
from rnnserve_models.onnx_builder import GraphBuilder


def _simple_step(body: GraphBuilder, cell: SimpleRNNCell, x: str, h: str) -> list[str]:
    z = body.add("Add", x, body.add("MatMul", h, body.weight(cell.weights["recurrent_kernel"])))
    return [body.activation(cell.activation, z)]


def _lstm_step(body: GraphBuilder, cell: LSTMCell, x: str, h: str, c: str) -> list[str]:
    z = body.add("Add", x, body.add("MatMul", h, body.weight(cell.weights["recurrent_kernel"])))
    i, f, g, o = body.split(z, cell.gates)
    i, f, o = (body.activation(cell.recurrent_activation, gate) for gate in (i, f, o))
    g = body.activation(cell.activation, g)
    c = body.add("Add", body.add("Mul", f, c), body.add("Mul", i, g))
    return [body.add("Mul", o, body.activation(cell.activation, c)), c]


def _gru_step(body: GraphBuilder, cell: GRUCell, x: str, h: str) -> list[str]:
    x_z, x_r, x_g = body.split(x, cell.gates)
    kernel = cell.weights["recurrent_kernel"]
    if cell.reset_after:
        recurrent = body.add("MatMul", h, body.weight(kernel))
        if cell.use_bias:
            recurrent = body.add("Add", recurrent, body.weight(cell.weights["bias"][1]))
        h_z, h_r, h_g = body.split(recurrent, cell.gates)
    else:
        h_z, h_r = body.split(body.add("MatMul", h, body.weight(kernel[:, : 2 * cell.units])), 2)
    z = body.activation(cell.recurrent_activation, body.add("Add", x_z, h_z))
    r = body.activation(cell.recurrent_activation, body.add("Add", x_r, h_r))
    if cell.reset_after:
        h_g = body.add("Mul", r, h_g)
    else:
        h_g = body.add("MatMul", body.add("Mul", r, h), body.weight(kernel[:, 2 * cell.units :]))
    g = body.activation(cell.activation, body.add("Add", x_g, h_g))
    kept, fresh = body.add("Mul", z, h), body.add("Mul", body.add("Sub", body.number(1), z), g)
    return [body.add("Add", kept, fresh)]


STEPS: dict[type[Cell], Callable[..., list[str]]] = {
    SimpleRNNCell: _simple_step,
    LSTMCell: _lstm_step,
    GRUCell: _gru_step,
}
"""From x W + b of a step, and the states, to the new states."""
