"""The keys of a repository: the master key signs whitelists, the repository key signs manifests.

    <name>.masterkey   RSA, private; needed to make and to resign a repository, may be kept elsewhere
    <name>.pub         its public key; goes to clients
    <name>.key         RSA, private; needed to publish
    <name>.crt         its self-signed certificate; a whitelist admits it, nobody looks at its dates

A manifest's signature is RSA PKCS#1 v1.5 with SHA-1, whatever hash the repository uses; a whitelist's is the same
padding over the bare text, without the usual note of a digest algorithm. Clients know no other form.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import NoDigestInfo
from cryptography.x509.oid import NameOID

from unpacker.cvmfs import files
from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.signing import Letter
from unpacker.errors import PublishError, SettingsError
from unpacker.publish import posix

_BITS = 2048
_LIMIT = 1 << 16
_TRIAL = b"whether this key signs"
_CERTIFICATE_DAYS = 365
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_NAME_LIMIT = 60
_COMMON_NAME_LIMIT = 30
_PRIVATE, _PUBLIC = 0o400, 0o444


def check_name(name: str) -> str:
    """Gives a repository's name back; SettingsError if no client could mount it."""
    parts = name.split(".")
    if len(name) > _NAME_LIMIT or not _NAME.fullmatch(name) or len(parts) < 2 or not all(parts):
        raise SettingsError(
            f"not a repository name: {name[:100]!r}; it is at most {_NAME_LIMIT} letters, digits, '.', '-' and '_' "
            "with a dot inside, such as unpacked.example.org"
        )
    return name


def default_directory(repository: str) -> str:
    """Where the keys of the repository in this directory are unless somebody says otherwise: beside it."""
    return f"{os.path.abspath(repository)}.keys"


def check_outside(directory: str, repository: str) -> None:
    """SettingsError if keys in `directory` would be served with the repository."""
    keys, served = os.path.realpath(directory), os.path.realpath(repository)
    if os.path.commonpath([keys, served]) == served:
        raise SettingsError(f"the keys would be served to everybody: {directory} lies in {repository}; choose another")


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A master key's public half: what clients have."""

    _key: rsa.RSAPublicKey

    @classmethod
    def open(cls, directory: str, name: str) -> PublicKey:
        """From `<name>.pub`."""
        path = f"{directory}/{name}.pub"
        data = _read(path, "the public master key that clients have")
        try:
            key = serialization.load_pem_public_key(data)
        except ValueError:
            raise PublishError(f"{path} is not a public key in PEM form: restore it") from None
        if not isinstance(key, rsa.RSAPublicKey):
            raise PublishError(f"{path} is not an RSA key; clients know no others")
        return cls(key)

    def verify(self, letter: Letter, what: str) -> None:
        """PublishError unless the master key signed this whitelist."""
        try:
            # The bare text comes back: nothing in it says which digest it is.
            found = self._key.recover_data_from_signature(letter.signature, padding.PKCS1v15(), None)
            if found != letter.signed:
                raise InvalidSignature
        except InvalidSignature:
            raise PublishError(
                f"{what} was not signed by the master key at hand: clients with that public key refuse it; "
                "use the directory of the right keys"
            ) from None


@dataclass(frozen=True, slots=True)
class MasterKey:
    """Signs whitelists."""

    _key: rsa.RSAPrivateKey

    @classmethod
    def open(cls, directory: str, name: str) -> MasterKey:
        """From `<name>.masterkey`, which must fit `<name>.pub` if that is there."""
        path = f"{directory}/{name}.masterkey"
        key = cls(_private(path, "the master key, which signs the whitelist; run this where it is kept"))
        if os.path.exists(f"{directory}/{name}.pub") and PublicKey.open(directory, name) != key.public:
            raise PublishError(f"{path} and {name}.pub beside it are no pair: clients would refuse what it signs")
        return key

    @property
    def public(self) -> PublicKey:
        return PublicKey(self._key.public_key())

    def sign(self, text: bytes) -> bytes:
        return self._key.sign(text, padding.PKCS1v15(), NoDigestInfo())


@dataclass(frozen=True, slots=True)
class Certificate:
    """The public half of a repository key, as a whitelist admits it. `pem` is what the repository stores."""

    pem: bytes
    _certificate: x509.Certificate

    @classmethod
    def parse(cls, pem: bytes, what: str) -> Certificate:
        """From PEM; PublishError names `what`."""
        try:
            certificate = x509.load_pem_x509_certificate(pem)
            key = certificate.public_key()
        except ValueError:
            raise PublishError(f"{what} is not a certificate in PEM form: restore it") from None
        if not isinstance(key, rsa.RSAPublicKey):
            raise PublishError(f"{what} is not of an RSA key; clients know no others")
        return cls(pem, certificate)

    @classmethod
    def open(cls, directory: str, name: str) -> Certificate:
        """From `<name>.crt`."""
        path = f"{directory}/{name}.crt"
        return cls.parse(_read(path, "the certificate of the repository key"), path)

    @property
    def key(self) -> rsa.RSAPublicKey:
        return cast(rsa.RSAPublicKey, self._certificate.public_key())

    def fingerprint(self, algorithm: str = "sha1") -> str:
        """As whitelists have it."""
        name = ContentHash.of(self._certificate.public_bytes(serialization.Encoding.DER), algorithm)
        return ":".join(f"{byte:02X}" for byte in name.digest) + name.hex[2 * len(name.digest) :].upper()

    def verify(self, letter: Letter, what: str) -> None:
        """PublishError unless this certificate's key signed this manifest."""
        try:
            self.key.verify(letter.signature, letter.signed, padding.PKCS1v15(), hashes.SHA1())
        except InvalidSignature:
            raise PublishError(
                f"{what} was not signed by the repository's key: somebody changed it, or signed it with another key"
            ) from None


@dataclass(frozen=True, slots=True)
class RepositoryKey:
    """Signs manifests."""

    certificate: Certificate
    _key: rsa.RSAPrivateKey

    @classmethod
    def open(cls, directory: str, name: str) -> RepositoryKey:
        """From `<name>.key` and `<name>.crt`, which must be a pair."""
        path = f"{directory}/{name}.key"
        key = _private(path, "the repository key, which signs what is published", is_tried=True)
        certificate = Certificate.open(directory, name)
        if certificate.key.public_numbers() != key.public_key().public_numbers():
            raise PublishError(f"{path} and {name}.crt are no pair: clients would refuse what it signs")
        opened = cls(certificate, key)
        try:
            certificate.key.verify(opened.sign(_TRIAL), _TRIAL, padding.PKCS1v15(), hashes.SHA1())
        except (InvalidSignature, ValueError):
            raise PublishError(f"{path} is damaged, clients would refuse what it signs: restore it") from None
        return opened

    def sign(self, text: bytes) -> bytes:
        return self._key.sign(text, padding.PKCS1v15(), hashes.SHA1())


def create(directory: str, name: str, *, now: int) -> None:
    """Makes the four files of a repository's keys, or those that are missing; what exists is never replaced.

    A private half that is missing while its public half is there is kept elsewhere, so it is a PublishError. Killed
    anywhere, the next call goes on. `now` (Unix seconds) dates the certificate.
    """
    check_name(name)
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        files.sweep(directory)
        for private, public, use in (("masterkey", "pub", "resign"), ("key", "crt", "publish")):
            private_path, public_path = f"{directory}/{name}.{private}", f"{directory}/{name}.{public}"
            if not os.path.lexists(private_path):
                if os.path.lexists(public_path):
                    raise PublishError(f"{public_path} is there, {name}.{private} is not: to {use}, put it there, too")
                files.replace(private_path, _generate(), mode=_PRIVATE)
            if not os.path.lexists(public_path):
                data = _certificate(directory, name, now) if public == "crt" else _public(directory, name)
                files.replace(public_path, data, mode=_PUBLIC)
    except OSError as error:
        raise posix.failure(error, f"making the keys of {name} in {directory}") from error


def _generate() -> bytes:
    key = rsa.generate_private_key(public_exponent=65537, key_size=_BITS)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )


def _public(directory: str, name: str) -> bytes:
    return MasterKey.open(directory, name).public._key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _certificate(directory: str, name: str, now: int) -> bytes:
    key = _private(f"{directory}/{name}.key", "the repository key")
    shown = name if len(name) <= _COMMON_NAME_LIMIT else name[:_COMMON_NAME_LIMIT] + "[...]"
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{shown} CernVM-FS Release Managers")])
    start = datetime.fromtimestamp(now, UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(start).not_valid_after(start + timedelta(days=_CERTIFICATE_DAYS))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _private(path: str, what: str, *, is_tried: bool = False) -> rsa.RSAPrivateKey:
    """A private key from its file. `is_tried` where the caller tries it at once: that takes a millisecond, where
    OpenSSL's own tests of the numbers take most of the time of a small publish."""
    data = _read(path, what)
    try:
        key = serialization.load_pem_private_key(data, password=None, unsafe_skip_rsa_key_validation=is_tried)
    except TypeError:
        raise PublishError(
            f"{path} is encrypted with a passphrase, which nobody is there to type: decrypt it"
        ) from None
    except ValueError:
        raise PublishError(f"{path} is not a private key in PEM form: restore it") from None
    if not isinstance(key, rsa.RSAPrivateKey):
        raise PublishError(f"{path} is not an RSA key; clients know no others")
    return key


def _read(path: str, what: str) -> bytes:
    try:
        data = files.read(path, _LIMIT)
    except FileNotFoundError:
        raise PublishError(f"there is no {path}: {what}") from None
    except OSError as error:
        raise posix.failure(error, f"reading {what}") from error
    if len(data) > _LIMIT:
        raise PublishError(f"{path} is too long for a key")
    return data
