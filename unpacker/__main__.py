"""`python -m unpacker` is `unpacker`."""

from unpacker.cli import main

main()
