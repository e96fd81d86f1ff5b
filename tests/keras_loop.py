"""Keras's recurrence loop, as dumb as it can be written: a row at a time, a step at a time. The tests' oracle."""

from __future__ import annotations

import numpy as np


def with_random_weights(cell, input_dim, dtype="float32", seed=0):
    """The cell with weights that keep its states of the order of 1."""
    rng = np.random.default_rng(seed)
    shapes = cell.weight_shapes(input_dim)
    return cell.with_weights({k: rng.uniform(-1, 1, s) / np.sqrt(s[0]) for k, s in shapes.items()}, input_dim, dtype)


def keras_loop(cell, x, mask, states, options):
    """Keras's loop over x [T, R, D], mask bool [T, R] or None, flat states each [R, ...].

    Returns the output, [T, R, ...] or [R, ...], and the flat final states.
    """
    steps, rows = x.shape[:2]
    outputs, finals = [], []
    for row in range(rows):
        state = [s[row : row + 1] for s in states]
        previous = np.zeros(cell.output_size, cell.dtype)
        sequence = []
        for t in range(steps - 1, -1, -1) if options.go_backwards else range(steps):
            if mask is None or mask[t, row]:
                output, new = cell.call(x[t, row : row + 1], cell.nest_states(state))
                output, state = output[0], cell.flat_states(new)
            elif options.zero_output_for_mask:
                output = np.zeros(cell.output_size, cell.dtype)
            else:
                output = previous
            previous = output
            sequence.append(output)
        outputs.append(sequence if options.return_sequences else sequence[-1])
        finals.append(state)
    y = np.array(outputs)
    return (
        y.swapaxes(0, 1) if options.return_sequences else y,
        [np.concatenate([final[index] for final in finals]) for index in range(len(states))],
    )
