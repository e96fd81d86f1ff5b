"""Layers and models of Keras: every recurrent layer and what surrounds it, in NumPy and in ONNX."""

from rnnserve_models.network.build import Source
from rnnserve_models.network.graph import Network
from rnnserve_models.network.layer import Info, Layer, Masked
from rnnserve_models.network.local import LocalLayer, layer_from_config
from rnnserve_models.network.registry import LAYER_CLASSES

__all__ = ["LAYER_CLASSES", "Info", "Layer", "LocalLayer", "Masked", "Network", "Source", "layer_from_config"]
