"""How much of images' metadata a run holds in memory at a time: what layers weigh, and how much may come together.

Pure. The weight is in entries of usual size, of which one takes about a kilobyte, in its changeset, in trees and on
the way there. One image may weigh what the operator's limits allow; all others together that are in memory, too, may
weigh the same once more; and each layer being read no more than a share, unless it is read alone.
"""

from __future__ import annotations

from unpacker.changeset import Changeset
from unpacker.limits import Limits

_USUAL = 200
"""Bytes of a usual entry of an encoded changeset before it is compressed."""
_LEAST = 45
"""Bytes of the shortest."""
_SHARES = 8
_SHARE = 500_000
"""Hardly any layer has as many entries, so that hardly any is read twice."""


def weight(changeset: Changeset, written: int) -> int:
    """What a changeset weighs that is so long written out: entries, or as many as its names have room for."""
    count = len(changeset.entries) + len(changeset.whiteouts) + len(changeset.opaque)
    return max(count, written // _USUAL)


def at_most(written: int) -> int:
    """What a changeset can weigh that is so long written out."""
    return written // _LEAST


def together(limits: Limits) -> int:
    """What may be in memory beside the image that is next to be done."""
    return limits.image_entries


def heaviest(limits: Limits) -> int:
    """What one image may weigh: names may be longer than usual, but not those of all entries that it may have."""
    return 2 * limits.image_entries


def share(limits: Limits) -> int:
    """How many entries a layer may have that is read beside others."""
    return max(_SHARE, limits.image_entries // _SHARES)
