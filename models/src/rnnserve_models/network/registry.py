"""Layers by the names of their Keras classes."""

from __future__ import annotations

from rnnserve_models.network.config import Config
from rnnserve_models.network.convolution import Conv1D, MaxPooling1D
from rnnserve_models.network.core import Activation, Dense, Embedding, Identity, Masking
from rnnserve_models.network.graph import Network
from rnnserve_models.network.layer import Layer
from rnnserve_models.network.norm import BatchNormalization, LayerNormalization
from rnnserve_models.network.recurrent import Recurrent
from rnnserve_models.network.shaping import Flatten, GlobalPooling1D, Permute, RepeatVector, Reshape
from rnnserve_models.network.wrappers import Bidirectional, TimeDistributed

LAYER_CLASSES: dict[str, type[Layer]] = {
    **dict.fromkeys(("RNN", "SimpleRNN", "LSTM", "GRU"), Recurrent),
    "Bidirectional": Bidirectional,
    "TimeDistributed": TimeDistributed,
    "Embedding": Embedding,
    "Masking": Masking,
    "Dense": Dense,
    **dict.fromkeys(("Activation", "ReLU", "LeakyReLU", "ELU", "Softmax"), Activation),
    **dict.fromkeys(("Dropout", "SpatialDropout1D", "GaussianDropout", "GaussianNoise", "AlphaDropout"), Identity),
    **dict.fromkeys(("ActivityRegularization", "Identity"), Identity),
    "LayerNormalization": LayerNormalization,
    "BatchNormalization": BatchNormalization,
    "Flatten": Flatten,
    "Reshape": Reshape,
    "RepeatVector": RepeatVector,
    "Permute": Permute,
    **dict.fromkeys(("Conv1D", "Convolution1D"), Conv1D),
    **dict.fromkeys(("MaxPooling1D", "MaxPool1D"), MaxPooling1D),
    **dict.fromkeys(("GlobalAveragePooling1D", "GlobalAvgPool1D"), GlobalPooling1D),
    **dict.fromkeys(("GlobalMaxPooling1D", "GlobalMaxPool1D"), GlobalPooling1D),
    **dict.fromkeys(("Sequential", "Functional", "Model"), Network),
}
"""What `make_layer` knows."""


def make_layer(config: Config) -> Layer:
    """The layer that a config describes, without weights.

    Raises:
        ModelError: there is no such class, or the config is wrong; the message names the layer.
    """
    if config.class_name not in LAYER_CLASSES:
        raise config.error(f"unknown layer class; the classes are {', '.join(LAYER_CLASSES)}")
    return LAYER_CLASSES[config.class_name](config)
