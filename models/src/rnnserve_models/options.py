"""The options of ``tf.keras.layers.RNN``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerOptions:
    """The options of a recurrent layer, with Keras's defaults.

    Attributes:
        return_sequences: an output for every time step rather than for the last.
        return_state: the final states beside the output.
        go_backwards: iterate time from its last step to its first; a returned sequence stays in that order.
        stateful: the state of one call is the initial state of the next.
        unroll: accepted for Keras's sake; never changes a result.
        time_major: time before batch in inputs, masks and output sequences; states are never time-major.
        zero_output_for_mask: zeros at masked steps, rather than the previous output.
    """

    return_sequences: bool = False
    return_state: bool = False
    go_backwards: bool = False
    stateful: bool = False
    unroll: bool = False
    time_major: bool = False
    zero_output_for_mask: bool = False
