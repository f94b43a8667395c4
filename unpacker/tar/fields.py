"""The fields of tar headers as numbers and times, in every spelling that writers have for them."""

from __future__ import annotations

_OWNER_LIMIT = 2**32 - 2
"""The highest owner; chown takes 2³² - 1 as "leave it"."""
_SECONDS_LIMIT = 2**63 // 10**9


class Malformed(Exception):
    """What is wrong with a piece of an archive. The reader, which knows where that is, makes an ImageError of it."""


def octal(field: bytes) -> int:
    """A numeric field as nearly all are: digits, then one or two blanks or NULs. -1 for any other."""
    digits = field.rstrip(b"\0 ")
    if digits.isdigit():
        try:
            return int(digits, 8)
        except ValueError:
            return -1
    return -1


def number(field: bytes, what: str) -> int:
    """A numeric field: octal digits between blanks and NULs, nothing at all (0), or GNU's base 256."""
    first = field[0]
    if first & 0x80:
        value = int.from_bytes(field, "big")
        bits = 8 * len(field)
        return value - (1 << bits) if first & 0x40 else value - (1 << (bits - 1))
    digits = field.strip(b" \0").partition(b"\0")[0].rstrip(b" ")
    if not digits:
        return 0
    value = octal(digits)
    if value < 0:
        raise Malformed(f"{what} is {shown(field)}")
    return value


def decimal(text: bytes, what: str) -> int:
    """A number as pax records and sparse maps have it."""
    if not text.isdigit() or len(text) > 20:
        raise Malformed(f"{what} is {shown(text)}")
    return int(text)


def as_size(value: int) -> int:
    if not 0 <= value < 2**63:
        raise Malformed(f"a size of {value} bytes")
    return value


def as_owner(value: int, what: str) -> int:
    if not 0 <= value <= _OWNER_LIMIT:
        raise Malformed(f"{what} is {value}")
    return value


def as_nanoseconds(seconds: int) -> int:
    """Whole seconds in nanoseconds; what 64 bits of them cannot hold is 0."""
    return seconds * 10**9 if -_SECONDS_LIMIT < seconds < _SECONDS_LIMIT else 0


def decimal_time(text: bytes) -> int:
    """Decimal seconds with any fraction, exactly to the nanosecond (further digits are cut off)."""
    digits = text.removeprefix(b"-")
    seconds, _, fraction = digits.partition(b".")
    if not seconds.isdigit() or (fraction and not fraction.isdigit()) or len(seconds) > 20:
        raise Malformed(f"mtime is {shown(text)}")
    whole = int(seconds)
    if whole >= _SECONDS_LIMIT:
        return 0
    nanoseconds = whole * 10**9 + int(fraction[:9].ljust(9, b"0"))
    return -nanoseconds if text != digits else nanoseconds


def device_numbers(major: bytes, minor: bytes) -> tuple[int, int]:
    numbers = number(major, "major device number"), number(minor, "minor device number")
    if not all(0 <= each < 2**32 for each in numbers):
        raise Malformed(f"a device number of {numbers}")
    return numbers


def shown(value: bytes) -> str:
    """A piece of the archive for a message, short."""
    return repr(value[:40])
