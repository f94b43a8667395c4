"""Whose credentials are known for which repository: docker's config.json and helpers, podman's, DUCC's variables.

Credentials belong to a host (or to a path below it) and are found by comparing whole names, never parts of them, so
that no repository elsewhere gets them because of how it is called.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from unpacker.errors import RegistryError, SettingsError
from unpacker.reference import DOCKER_HUB_API, DOCKER_HUB_SPELLINGS

_DOCKER_HUB_KEY = "https://index.docker.io/v1/"
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HELPER_TIMEOUT = 60
_HELPER_KEEPS = 900.0
"""Seconds for which a helper's answer is used again: those of clouds live for hours, and a helper costs a process."""
_HELPER_FOUND_NOTHING = "credentials not found in native keychain"
_LABEL = re.compile(r"[A-Za-z0-9_]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """User and password, or the identity token (an OAuth2 refresh token) that stands for both."""

    user: str
    password: str = field(default="", repr=False)
    identity_token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mirror:
    """A pull-through cache: repositories of another registry below a path of its own."""

    scheme: str
    host: str
    path: str


@dataclass(frozen=True, slots=True)
class _Place:
    """A host, or the repositories below a path of it."""

    host: str
    path: str

    @classmethod
    def parse(cls, text: str) -> _Place:
        """Reads `[scheme://]host[:port][/path]`; all spellings of Docker Hub, and its `/v1/`, are one host."""
        rest = text.rpartition("://")[2]
        host, _, path = rest.partition("/")
        path = path.strip("/")
        host = host.lower()
        if host in DOCKER_HUB_SPELLINGS:
            host = DOCKER_HUB_API
        return cls(host, "" if path in ("v1", "v2") else path)

    def covers(self, host: str, name: str) -> bool:
        return host == self.host and self.covers_name(name)

    def covers_name(self, name: str) -> bool:
        return not self.path or name == self.path or name.startswith(self.path + "/")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Labelled:
    """What the variables of one DUCC label say."""

    place: _Place
    credentials: Credentials | None
    mirror: Mirror | None

    def covers(self, host: str, name: str) -> bool:
        # DUCC looks for IDENT anywhere in the URL. But who may write the wishlist chooses the host, and in a large
        # domain has one: `cern.ch` must not give the password to every machine there.
        return self.place.covers(host, name)


class Keychain:
    """All credentials known to this process. Safe from many threads; read once, when made.

    SettingsError if a file or variable that should say them does not make sense: what cannot be read is not the same
    as having none. A helper that fails is a RegistryError for the hosts it serves.
    """

    def __init__(self, docker_config: str | None, environment: Mapping[str, str]) -> None:
        self._entries: list[tuple[_Place, Credentials]] = []
        self._helpers: dict[str, str] = {}
        self._store: str | None = None
        self._labelled = _labelled(environment)
        self._lock = threading.Lock()
        self._helped: dict[tuple[str, str], tuple[float, Credentials | None]] = {}
        for path in [docker_config] if docker_config is not None else _default_files(environment):
            self._read(path, required=docker_config is not None)

    def find(self, host: str, name: str) -> Credentials | None:
        """The credentials for a repository `name` at an API host `host[:port]`, None if there are none."""
        for labelled in self._labelled:
            if labelled.credentials is not None and labelled.covers(host, name):
                return labelled.credentials
        helper = self._helpers.get(host)
        if helper is not None:
            return self._ask(helper, host)
        if self._store is not None and (found := self._ask(self._store, host)) is not None:
            return found
        covering = [(place, c) for place, c in self._entries if place.covers(host, name)]
        return max(covering, key=lambda entry: len(entry[0].path))[1] if covering else None

    def mirror(self, host: str, name: str) -> Mirror | None:
        """The pull-through cache that the operator set for a repository, if any."""
        for labelled in self._labelled:
            if labelled.mirror is not None and labelled.covers(host, name):
                return labelled.mirror
        return None

    def _read(self, path: str, *, required: bool) -> None:
        try:
            with open(path, encoding="utf-8") as file:
                document = json.load(file)
        except FileNotFoundError:
            if required:
                raise SettingsError(f"{path}: no such file (it should hold the credentials for registries)") from None
            return
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not JSON"
            raise SettingsError(f"{path}: cannot read the credentials for registries: {reason}") from None
        if not isinstance(document, dict):
            raise SettingsError(f"{path}: not a JSON object")
        for key, entry in _mapping(document, "auths", path).items():
            credentials = _credentials(entry, f"{path}: auths: {key!r}")
            if credentials is not None:
                self._entries.append((_Place.parse(key), credentials))
        for key, helper in _mapping(document, "credHelpers", path).items():
            self._helpers.setdefault(_Place.parse(key).host, _helper_name(helper, f"{path}: credHelpers: {key!r}"))
        if document.get("credsStore") and self._store is None:
            self._store = _helper_name(document["credsStore"], f"{path}: credsStore")

    def _ask(self, helper: str, host: str) -> Credentials | None:
        with self._lock:
            known = self._helped.get((helper, host))
            if known is None or known[0] < time.monotonic():
                known = (time.monotonic() + _HELPER_KEEPS, _run_helper(helper, host))
                self._helped[helper, host] = known
            return known[1]


def _default_files(environment: Mapping[str, str]) -> list[str]:
    home = environment.get("HOME") or os.path.expanduser("~")
    docker = environment.get("DOCKER_CONFIG") or os.path.join(home, ".docker")
    files = [os.path.join(docker, "config.json")]
    if environment.get("REGISTRY_AUTH_FILE"):
        files.append(environment["REGISTRY_AUTH_FILE"])
    if environment.get("XDG_RUNTIME_DIR"):
        files.append(os.path.join(environment["XDG_RUNTIME_DIR"], "containers", "auth.json"))
    configuration = environment.get("XDG_CONFIG_HOME") or os.path.join(home, ".config")
    files.append(os.path.join(configuration, "containers", "auth.json"))
    return files


def _mapping(document: dict[str, Any], key: str, path: str) -> dict[str, Any]:
    value = document.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise SettingsError(f"{path}: {key} is not an object")
    return value


def _credentials(entry: Any, where: str) -> Credentials | None:
    if not isinstance(entry, dict):
        raise SettingsError(f"{where} is not an object")
    user, password = entry.get("username") or "", entry.get("password") or ""
    if entry.get("auth"):
        try:
            decoded = base64.b64decode(str(entry["auth"]), validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            raise SettingsError(f"{where}: auth is not the base64 of user:password") from None
        user, colon, password = decoded.partition(":")
        if not colon:
            raise SettingsError(f"{where}: auth is not the base64 of user:password")
        password = password.strip("\0")  # old versions of docker padded it
    token = entry.get("identitytoken") or None
    if token is None and not (user and password):
        return None  # `docker login` leaves an empty entry where a helper holds the secret
    return Credentials(user=str(user), password=str(password), identity_token=str(token) if token else None)


def _helper_name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not _HELPER_NAME.fullmatch(value):
        raise SettingsError(f"{where}: not the name of a credential helper: {value!r}")
    return value


def _run_helper(helper: str, host: str) -> Credentials | None:
    program = f"docker-credential-{helper}"
    key = _DOCKER_HUB_KEY if host == DOCKER_HUB_API else host
    advice = f"to see why: echo {key} | {program} get"
    try:
        done = subprocess.run(
            [program, "get"], input=key.encode(), capture_output=True, timeout=_HELPER_TIMEOUT, check=False
        )
    except OSError as error:
        raise RegistryError(f"cannot run the credential helper {program} for {host}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise RegistryError(
            f"the credential helper {program} gave no answer for {host} in {_HELPER_TIMEOUT} s"
        ) from None
    if done.returncode != 0:
        if _HELPER_FOUND_NOTHING.encode() in done.stdout + done.stderr:
            return None
        raise RegistryError(f"the credential helper {program} failed for {host} (exit {done.returncode}); {advice}")
    try:
        answer = json.loads(done.stdout)
        user, secret = answer["Username"], answer["Secret"]
    except (ValueError, KeyError, TypeError):
        raise RegistryError(
            f"the credential helper {program} gave no Username and Secret for {host}; {advice}"
        ) from None
    if user == "<token>":
        return Credentials(user="", identity_token=str(secret))
    return Credentials(user=str(user), password=str(secret))


def _labelled(environment: Mapping[str, str]) -> list[_Labelled]:
    labels = [label.strip() for label in environment.get("DUCC_AUTH_REGISTRIES", "").split(",")]
    return [_one_labelled(label, environment) for label in labels if label]


def _one_labelled(label: str, environment: Mapping[str, str]) -> _Labelled:
    if not _LABEL.fullmatch(label):
        raise SettingsError(f"DUCC_AUTH_REGISTRIES: not a label: {label!r} (letters, digits and _)")
    prefix = f"DUCC_{label}_"
    ident, user, password, proxy = (environment.get(prefix + key, "") for key in ("IDENT", "USER", "PASS", "PROXY"))
    if not ident or not (proxy or (user and password)):
        raise SettingsError(f"{prefix}IDENT and either {prefix}USER with {prefix}PASS or {prefix}PROXY must be set")
    place = _Place.parse(ident)
    if "." not in place.host and ":" not in place.host and place.host != "localhost":
        raise SettingsError(f"{prefix}IDENT: {ident!r} is no registry's host (write it whole, as registry.example.org)")
    if not proxy:
        return _Labelled(place=place, credentials=Credentials(user=user, password=password), mirror=None)
    scheme, separator, rest = proxy.partition("://")
    if separator and scheme not in ("https", "http"):
        raise SettingsError(f"{prefix}PROXY: not https:// or http://: {scheme}://")
    host, _, path = (rest if separator else proxy).partition("/")
    if not host:
        raise SettingsError(f"{prefix}PROXY names no host")
    # As in DUCC, user and password are not for the cache: its own come from docker's files.
    mirror = Mirror(scheme=scheme if separator else "https", host=host.lower(), path=path.strip("/"))
    return _Labelled(place=place, credentials=None, mirror=mirror)
