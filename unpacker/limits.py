"""How much of anything an image or a registry may make us take; the operator's settings, with defaults.

Whoever opens a merge request may name any image, so every size that an image or a registry chooses has a bound.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

MIB = 1 << 20
GB = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds in bytes unless the name says otherwise."""

    # Read by pydantic when the settings are parsed: a misspelt limit must not silently stay at its default.
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    tags_per_wish: int = 500
    image_compressed: int = 100 * GB
    image_unpacked: int = 200 * GB
    image_entries: int = 5_000_000
    manifest: int = 4 * MIB
    config: int = 8 * MIB
    pax_record: int = 1 * MIB
    path: int = 4096
    """Of a path inside an image; the kernel's PATH_MAX counts the final NUL, so 4,096 is what can be opened."""
    name: int = 255
    """Of one component of a path; NAME_MAX of every file system in use."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise ValueError(f"{field.name} must be more than 0")
