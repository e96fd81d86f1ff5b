"""Weights of cells in safetensors files.

A tensor is named by the index of its cell and by Keras's name for the weight: ``0.kernel``, ``0.recurrent_kernel``,
``0.bias``, ``1.kernel``. A single cell is cell 0.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import load, save

from rnnserve_models.cell import Cell, check_weights, float_dtype
from rnnserve_models.errors import ModelError
from rnnserve_models.stack import StackedRNNCells


def save_weights(path: Path, cell: Cell) -> None:
    """Writes a cell's weights in its dtype.

    Raises:
        ModelError: the cell has no weights yet.
    """
    if cell.input_dim is None:
        raise ModelError(f"{type(cell).__name__} has no weights to save; give it some by with_weights")
    prefix = _prefix(cell)
    path.write_bytes(save({f"{prefix}{name}": np.ascontiguousarray(array) for name, array in cell.weights.items()}))


def load_weights(path: Path, cell: Cell, input_dim: int, dtype: DTypeLike = np.float32) -> Cell:
    """The cell with the weights in a file, which must be of ``dtype``.

    Raises:
        ModelError: the file cannot be read, is not safetensors, or its tensors are not the cell's: missing,
            unexpected, or of another shape or dtype. The message names the file and the tensor.
    """
    dtype = float_dtype(dtype)
    tensors = load_tensors(path)
    prefix = _prefix(cell)
    shapes = {f"{prefix}{name}": shape for name, shape in cell.weight_shapes(input_dim).items()}
    check_weights(str(path), shapes, tensors)
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise ModelError(f"{path}: {name}: expected dtype {dtype}, got {tensor.dtype}")
    return cell.with_weights({name.removeprefix(prefix): tensors[name] for name in shapes}, input_dim, dtype)


def load_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, by name.

    Raises:
        ModelError: the file cannot be read, or is not safetensors of NumPy's dtypes.
    """
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    except (SafetensorError, KeyError, ValueError) as error:  # NumPy has no such dtype, or no such shape
        raise ModelError(f"{path}: is not a safetensors file of NumPy's dtypes: {error}") from error


def _prefix(cell: Cell) -> str:
    """What a tensor's name has before the cell's own name for the weight; a stack's names begin with an index."""
    return "" if isinstance(cell, StackedRNNCells) else "0."
