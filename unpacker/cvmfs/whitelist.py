"""The whitelist `.cvmfswhitelist`: which certificates may sign a repository's manifests, and until when.

    20261120101010                 when it was signed, UTC
    E20261220101010                when it expires
    N<name>
    <fingerprint>[ # comment]      one or more

A letter signed by the master key. Clients mount no repository whose whitelist has expired.
"""

from __future__ import annotations

import re
import time
from calendar import timegm
from dataclasses import dataclass

from unpacker.cvmfs.hash import ALGORITHMS
from unpacker.cvmfs.keys import Certificate, MasterKey, PublicKey
from unpacker.cvmfs.signing import Letter, seal
from unpacker.errors import PublishError

FILE = ".cvmfswhitelist"
DAYS = 30
"""How long a whitelist is good for unless somebody says otherwise, as the official tools have it."""

_TIME = re.compile(r"[0-9]{14}")
_FINGERPRINT = re.compile(r"(?:[0-9A-F]{2}:){19}[0-9A-F]{2}(?:-RMD160|-SHAKE128)?")
_DAY = 86400


@dataclass(frozen=True, slots=True, kw_only=True)
class Whitelist:
    """What a whitelist says; times in Unix seconds."""

    name: str
    issued: int
    expires: int
    fingerprints: tuple[str, ...]

    @classmethod
    def parse(cls, data: bytes, what: str, *, key: PublicKey | None = None) -> Whitelist:
        """Reads a whitelist, verified with the master key's public half if that is at hand; PublishError otherwise."""
        letter = Letter.parse(data, what)
        if key is not None:
            key.verify(letter, what)
        lines = letter.text.decode("utf-8", "surrogateescape").splitlines()
        name = expires = None
        fingerprints = []
        for line in lines[1:]:
            if line.startswith("N"):
                name = line[1:]
            # A fingerprint may start with E, too, but has a colon after its first pair.
            elif line.startswith("E") and _TIME.fullmatch(line[1:]):
                expires = _parse_time(line[1:], what)
            elif _FINGERPRINT.fullmatch(found := line.partition("#")[0].strip()):
                fingerprints.append(found)
        if name is None or expires is None:
            raise PublishError(f"{what} lacks its {'name' if name is None else 'expiry'}: resign the repository")
        return cls(name=name, issued=_parse_time(lines[0], what), expires=expires, fingerprints=tuple(fingerprints))

    def text(self) -> bytes:
        """What is signed."""
        lines = [_format_time(self.issued), f"E{_format_time(self.expires)}", f"N{self.name}", *self.fingerprints]
        return "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")

    def sealed(self, key: MasterKey, algorithm: str) -> bytes:
        """The file: signed by the master key, hashed as the repository hashes."""
        return seal(self.text(), algorithm, key.sign)

    def admits(self, certificate: Certificate) -> bool:
        """Whether manifests signed by this certificate's key are good."""
        return any(certificate.fingerprint(algorithm) in self.fingerprints for algorithm in ALGORITHMS)

    def days_left(self, now: int) -> int:
        """Whole days until clients refuse the repository; negative once they do."""
        return (self.expires - now) // _DAY


def issue(name: str, certificate: Certificate, *, algorithm: str, days: int, now: int) -> Whitelist:
    """A whitelist for one certificate, from now on."""
    return Whitelist(
        name=name, issued=now, expires=now + days * _DAY, fingerprints=(certificate.fingerprint(algorithm),)
    )


def renew(old: Whitelist, certificate: Certificate | None, *, algorithm: str, days: int, now: int) -> Whitelist:
    """The same whitelist from now on; a certificate that it does not admit yet is added."""
    fingerprints = old.fingerprints
    if certificate is not None and not old.admits(certificate):
        fingerprints += (certificate.fingerprint(algorithm),)
    return Whitelist(name=old.name, issued=now, expires=now + days * _DAY, fingerprints=fingerprints)


def _format_time(seconds: int) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.gmtime(seconds))


def _parse_time(text: str, what: str) -> int:
    try:
        if not _TIME.fullmatch(text):
            raise ValueError
        return timegm(time.strptime(text, "%Y%m%d%H%M%S"))
    except ValueError:
        raise PublishError(f"{what}: not a time: {text[:30]!r}; resign the repository") from None
