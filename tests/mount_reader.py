"""A reader in a process of its own, which believes nothing: compares published roots with their own word.

    python -m tests.mount_reader DIRECTORY OF-NAMES REMEMBERED

Below a root of such a publish the file `sums` says what else is there, and its SHA-256. Each round resolves every name
below DIRECTORY, reads all of that root, and again all of the last few roots that it ever reached, however their names
changed. Ends with its standard input; prints what it saw as JSON, faults among it.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import sys
from pathlib import Path

MARKER = ".cvmfscatalog"
SUMS = "sums"
_PAUSE = 0.02
"""Between rounds: others want to get on, too."""


def main() -> None:
    place, kept = Path(sys.argv[1]), int(sys.argv[2])
    reached: list[str] = []
    seen: set[str] = set()
    faults: list[str] = []
    rounds = 0
    while not faults and not select.select([sys.stdin], [], [], _PAUSE)[0]:
        rounds += 1
        for name in sorted(os.listdir(place)):
            if name == MARKER:
                continue
            try:
                target = os.readlink(place / name)
            except FileNotFoundError:
                continue  # A name may go between the two looks; what it led to may not.
            root = os.path.normpath(place / target)
            seen.add(root)
            reached = [*(r for r in reached if r != root), root][-kept:]
        for root in reached:
            fault = fault_of(root)
            if fault is not None:
                faults.append(f"{root} in round {rounds}: {fault}")
    print(json.dumps({"rounds": rounds, "roots": len(seen), "faults": faults}))


def sums(contents: dict[str, bytes]) -> bytes:
    """What such a root says of the rest of it."""
    return json.dumps({path: hashlib.sha256(data).hexdigest() for path, data in contents.items()}).encode()


def fault_of(root: str) -> str | None:
    """What is not as the root itself says, if anything is not."""
    try:
        wanted = json.loads((Path(root) / SUMS).read_bytes())
        found = {
            os.path.relpath(path, root): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in Path(root).rglob("*")
            if not path.is_dir() and path.name not in (MARKER, SUMS)
        }
    except (OSError, ValueError) as error:
        return repr(error)
    different = {path for path in found.keys() | wanted.keys() if found.get(path) != wanted.get(path)}
    return f"other than it should be: {sorted(different)[:5]}" if different else None


if __name__ == "__main__":
    main()
