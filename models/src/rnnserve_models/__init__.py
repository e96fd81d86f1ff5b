"""Recurrent cells and layers with the semantics of Keras, in NumPy and ONNX, and what a served model is.

`layer_from_config` and `model_from_file` make a layer or a model to call in this process, the twin of a served one.
`rnnserve_models.export` (ONNX graphs of cells) and `rnnserve_models.weights` (safetensors) are imported by name.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# onnxruntime reports its use to its maker unless it is told not to before it is loaded. What is computed, and by whom,
# is nobody else's business.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from rnnserve_models.activations import activation
    from rnnserve_models.cell import Cell, run_cell
    from rnnserve_models.cells import CELL_CLASSES, DenseCell, GRUCell, LSTMCell, SimpleRNNCell, cells_from_specs
    from rnnserve_models.errors import InputError, ModelError
    from rnnserve_models.importers import model_from_file
    from rnnserve_models.layers import RNN
    from rnnserve_models.masking import Compacted, compact
    from rnnserve_models.network import LocalLayer, layer_from_config
    from rnnserve_models.options import LayerOptions
    from rnnserve_models.spec import ModelSpec, StateSpec, TensorSpec, read_spec
    from rnnserve_models.stack import StackedRNNCells
    from rnnserve_models.twin import LocalModel

_HOME = {
    "activations": ("activation",),
    "cell": ("Cell", "run_cell"),
    "cells": ("CELL_CLASSES", "DenseCell", "GRUCell", "LSTMCell", "SimpleRNNCell", "cells_from_specs"),
    "errors": ("InputError", "ModelError"),
    "importers": ("model_from_file",),
    "layers": ("RNN",),
    "masking": ("Compacted", "compact"),
    "network": ("LocalLayer", "layer_from_config"),
    "options": ("LayerOptions",),
    "spec": ("ModelSpec", "StateSpec", "TensorSpec", "read_spec"),
    "stack": ("StackedRNNCells",),
    "twin": ("LocalModel",),
}
_MODULES = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "CELL_CLASSES",
    "RNN",
    "Cell",
    "Compacted",
    "DenseCell",
    "GRUCell",
    "InputError",
    "LSTMCell",
    "LayerOptions",
    "LocalLayer",
    "LocalModel",
    "ModelError",
    "ModelSpec",
    "SimpleRNNCell",
    "StackedRNNCells",
    "StateSpec",
    "TensorSpec",
    "activation",
    "cells_from_specs",
    "compact",
    "layer_from_config",
    "model_from_file",
    "read_spec",
    "run_cell",
]


def __getattr__(name: str) -> Any:
    """Imports on first use: a server needs onnx only when a model is made, and a reader of errors needs nothing."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
