"""The command ``rnnserve``, from its first moment: what it is made of takes a second to load."""

from __future__ import annotations

import faulthandler
import sys

from rnnserve_server.process import end_when_told


def main() -> None:
    """Runs the command."""
    if sys.argv[1:2] == ["serve"]:
        faulthandler.enable()  # a server that dies within a library says where
        end_when_told()
    from rnnserve_server.cli import app

    app()


if __name__ == "__main__":
    main()
