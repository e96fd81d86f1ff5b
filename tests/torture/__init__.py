"""Servers are killed, wires are cut and sessions taken away, and every session's history must be the oracle's."""
