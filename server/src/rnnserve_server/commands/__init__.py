"""Commands that ask a server something."""
