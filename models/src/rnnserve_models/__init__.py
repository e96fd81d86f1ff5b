"""Recurrent cells and layers with the semantics of Keras, in NumPy, and what a served model is.

`rnnserve_models.export` (ONNX graphs of cells) and `rnnserve_models.weights` (safetensors) are imported by name.
"""

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
