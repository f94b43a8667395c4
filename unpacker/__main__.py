"""`python -m unpacker` is `unpacker`: what a process starts with."""

import signal
from typing import NoReturn


def main() -> NoReturn:
    """The entry point of the command. Who stops it while it is still being loaded sees no traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from unpacker.cli import main as run

    run()


if __name__ == "__main__":
    main()
