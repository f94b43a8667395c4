"""pax headers: their records, what they may set for all that follows, and the extended attributes in them."""

from __future__ import annotations

import base64
import binascii
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from unpacker.changeset import Xattrs
from unpacker.tar.fields import Malformed, shown


class Records(NamedTuple):
    """The records of one header. `sparse` has the two keys that format 0.0 of sparse files repeats, in turn."""

    values: dict[bytes, bytes]
    sparse: list[bytes]


def parse(data: bytes) -> Records:
    """Splits `<length> <key>=<value>\\n` records; an empty value takes the key away again (POSIX `pax`)."""
    values: dict[bytes, bytes] = {}
    sparse: list[bytes] = []
    pos = 0
    # Some writers fill the rest with NUL.
    while pos < len(data) and data[pos]:
        space = data.find(b" ", pos, pos + 10)
        digits = data[pos:space]
        if space < 0 or not digits.isdigit():
            raise Malformed("malformed pax record")
        end = pos + int(digits)
        equals = data.find(b"=", space, end)
        if end > len(data) or equals <= space + 1 or data[end - 1] != 0x0A:
            raise Malformed("malformed pax record")
        key, value = data[space + 1 : equals], data[equals + 1 : end - 1]
        if b"\0" in key:
            raise Malformed("a pax key with NUL in it")
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            if (key == b"GNU.sparse.offset") != (len(sparse) % 2 == 0):
                raise Malformed("malformed sparse map")
            sparse.append(value)
        values[key] = value
        pos = end
    return Records(values, sparse)


def for_all(records: Records) -> dict[bytes, bytes]:
    """What a global header sets for every later member."""
    kept = {}
    for key, value in records.values.items():
        if key in (b"path", b"linkpath", b"size") or key.startswith(b"GNU.sparse."):
            raise Malformed(f"a global header that sets {shown(key)} of all that follows")
        if key in (b"uid", b"gid", b"mtime") or b".xattr." in key:
            kept[key] = value
    return kept


def xattrs(values: dict[bytes, bytes]) -> Xattrs:
    """star's and GNU tar's `SCHILY.xattr.*`, raw; libarchive's own spelling where only that is there."""
    found: dict[str, bytes] = {}
    for key, value in values.items():
        vendor, dot, name = key.partition(b".xattr.")
        if not dot or vendor not in (b"SCHILY", b"LIBARCHIVE"):
            continue
        # GNU tar spells = and % so, because a pax key ends at the first =; libarchive quotes as in a URL.
        is_raw = vendor == b"SCHILY"
        name = name.replace(b"%3D", b"=").replace(b"%25", b"%") if is_raw else unquote_to_bytes(name)
        if not name or b"\0" in name:
            raise Malformed("an extended attribute without a name, or with NUL in it")
        text = str(name, "utf-8", "surrogateescape")
        if is_raw:
            found[text] = value
        elif text not in found:
            try:
                found[text] = base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
            except binascii.Error:
                raise Malformed(f"extended attribute {text!r} is not base64") from None
    return tuple(sorted(found.items())) if found else ()
