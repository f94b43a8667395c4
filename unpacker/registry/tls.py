"""Whom to trust over TLS: by the usual variables, the system's authorities, and docker's files for one registry.

- `SSL_CERT_FILE` and `SSL_CERT_DIR`, else `REQUESTS_CA_BUNDLE`, name the only authorities;
- else those of the system, among which a site's own usually is, and certifi's where a system has none;
- `/etc/docker/certs.d/<host[:port]>/*.crt` (or containers') add authorities for that registry alone. A client's
  certificate there is not used: with one, no request would be anonymous, and we could not tell what is public.
"""

from __future__ import annotations

import functools
import glob
import os
import ssl
from collections.abc import Mapping

import certifi

from unpacker.errors import SettingsError

CERTIFICATE_DIRECTORIES = ("/etc/containers/certs.d", "/etc/docker/certs.d")


def context(environment: Mapping[str, str]) -> ssl.SSLContext:
    """For all hosts without files of their own. SettingsError if a variable names what cannot be read."""
    file, directory = environment.get("SSL_CERT_FILE") or None, environment.get("SSL_CERT_DIR") or None
    if file is None and directory is None and (bundle := environment.get("REQUESTS_CA_BUNDLE")):
        file, directory = (None, bundle) if os.path.isdir(bundle) else (bundle, None)
    return _shared(file, directory)


@functools.lru_cache(maxsize=8)
def _shared(file: str | None, directory: str | None) -> ssl.SSLContext:
    # To read all authorities takes longer than many a request, and a context may serve any number of clients.
    return _load(file, directory)


def _load(file: str | None, directory: str | None) -> ssl.SSLContext:
    if file is None and directory is None:
        trusting = ssl.create_default_context()
        defaults = ssl.get_default_verify_paths()
        if defaults.cafile is None and not (defaults.capath and os.listdir(defaults.capath)):
            trusting.load_verify_locations(cafile=certifi.where())
        return trusting
    try:
        return ssl.create_default_context(cafile=file, capath=directory)
    except OSError as error:
        named = file if file is not None else directory
        raise SettingsError(f"{named}: cannot read certificate authorities from it ({error.strerror})") from None


def context_for(host: str, environment: Mapping[str, str]) -> ssl.SSLContext | None:
    """For one `host[:port]` with files of its own, None without. SettingsError if they cannot be read."""
    directories = [os.path.join(directory, host) for directory in CERTIFICATE_DIRECTORIES]
    authorities = sorted(f for d in directories for f in glob.glob(os.path.join(glob.escape(d), "*.crt")))
    if not authorities:
        return None
    trusting = _load(environment.get("SSL_CERT_FILE") or None, environment.get("SSL_CERT_DIR") or None)
    for authority in authorities:
        try:
            trusting.load_verify_locations(cafile=authority)
        except OSError as error:
            raise SettingsError(f"{authority}: cannot read a certificate from it ({error.strerror})") from None
    return trusting
