"""The exception tree, sorted by who must act; each class carries the exit code of the command line.

    UnpackerError
      WishlistError          fix the wishlist (or the arguments)                2
        SettingsError        fix the settings
      RegistryError          wait, or get access                                3
        NotFound             the registry answered: there is no such thing
        Denied               the registry answered: not for you
      ImageError             malformed or unsupported image                     4
        IntegrityError       bytes differ from their digest
      PublishError           look at the target                                 5
        Busy                 somebody else's transaction
        NoRoom               its disk is full, or its quota used up
      UnsafePlan             a person must look                                 6

Messages name what was being done and never contain a secret, a token or a query string.
"""

from __future__ import annotations


class UnpackerError(Exception):
    """Anything that this program reports without a traceback."""

    exit_code = 1


class WishlistError(UnpackerError):
    """The wishlist or the arguments are wrong: fix the file."""

    exit_code = 2


class SettingsError(WishlistError):
    """A setting of the operator is wrong: fix unpacker.toml, the environment or the flag."""


class RegistryError(UnpackerError):
    """A registry did not give what was asked for.

    `status` is the HTTP status, or None if the registry never answered. `temporary` says whether waiting may help.
    """

    exit_code = 3

    def __init__(self, message: str, *, status: int | None = None, temporary: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.temporary = temporary


class NotFound(RegistryError):
    """The registry answered that it has no such repository, tag, manifest or blob."""


class Denied(RegistryError):
    """The registry answered that these credentials (or none) may not read this."""


class ImageError(UnpackerError):
    """The image is malformed, unsupported or beyond a limit: distrust it."""

    exit_code = 4


class IntegrityError(ImageError):
    """Bytes are not what their digest or size says."""


class PublishError(UnpackerError):
    """The target failed: look at its disk, its permissions, its state."""

    exit_code = 5


class NoRoom(PublishError):
    """The target's disk is full, or would be."""


class Busy(PublishError):
    """Somebody else holds the target; the message names the holder and its age."""


class UnsafePlan(UnpackerError):
    """The plan would remove more than a program should decide alone: a person must look."""

    exit_code = 6
