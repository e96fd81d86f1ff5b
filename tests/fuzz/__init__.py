"""Frames that nobody should send, by the million, while others work: `make fuzz`."""
