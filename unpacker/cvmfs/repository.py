"""A repository in a local directory: made, opened, locked, resigned. `transaction` publishes in it.

Of ours, in the directory beside what the format has:

    .unpacker.json   the compression and the hash of new objects, which must stay what they are for sharing to work
    .unpacker.lock   one holder at a time among the processes of this program

Neither holds a secret, so it does no harm that they are served. A repository without the first was made by the
official tools, and is written to as they would.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from unpacker.cvmfs import files, keys, manifest, objects, reflog
from unpacker.cvmfs import spool as spools
from unpacker.cvmfs import whitelist as whitelists
from unpacker.cvmfs.catalog import Catalog
from unpacker.cvmfs.counters import Counters, Tally
from unpacker.cvmfs.deflation import COMPRESSIONS, check_zlib, compressor
from unpacker.cvmfs.hash import ALGORITHMS, ContentHash
from unpacker.cvmfs.history import History, Tag
from unpacker.cvmfs.keys import Certificate, MasterKey, PublicKey, RepositoryKey
from unpacker.cvmfs.manifest import Manifest
from unpacker.cvmfs.objects import ObjectStore
from unpacker.cvmfs.reflog import Kind, Ref, Reflog
from unpacker.cvmfs.row import DIRECTORY, DIRECTORY_SIZE, Row, key
from unpacker.cvmfs.signing import LIMIT, Letter
from unpacker.cvmfs.spool import Spool
from unpacker.cvmfs.whitelist import Whitelist
from unpacker.errors import PublishError, SettingsError
from unpacker.lock import exclusive
from unpacker.publish import posix

SETTINGS = ".unpacker.json"
LOCK = ".unpacker.lock"
SCRATCH = "data/txn"
REPLICABLE = ".cvmfs_master_replica"
"""A file whose presence allows stratum 1 servers to copy the repository."""

CATALOG_LIMIT = 1 << 30
_CERTIFICATE_LIMIT = 1 << 16
_DAYS_LIMIT = 3650
_SETTINGS_VERSION = 1
_COMPRESSED_AGAIN = {objects.CERTIFICATE, objects.META_INFO}
"""What a stratum 1 does not copy but compresses anew, under the name that it has here: made by anything but zlib, it is
a damaged object there, and no client accepts what the certificate signed."""
_OWN = {SETTINGS, LOCK, "data", whitelists.FILE, reflog.FILE, REPLICABLE}
"""What an unfinished `create` may have left."""


class Repository:
    """One repository. `key` is None where it was opened to read only.

    Holds nothing open between calls. PublishError for everything that is wrong with it; SettingsError for what was
    asked for.
    """

    def __init__(
        self,
        directory: str,
        name: str,
        *,
        compression: str,
        algorithm: str,
        key: RepositoryKey | None,
        spool: Spool | None,
    ) -> None:
        self.directory = directory
        self.name = name
        self.compression = compression
        self.algorithm = algorithm
        self.key = key
        self.spool = spool
        self.objects = ObjectStore(directory, algorithm)
        self._depth = 0

    @classmethod
    def create(
        cls,
        directory: str,
        name: str,
        keys_directory: str | None = None,
        *,
        compression: str = "dense",
        hash: str = "sha1",
        days: int = whitelists.DAYS,
        info: bytes | None = None,
        now: int,
    ) -> Repository:
        """An empty repository that stock clients mount, with keys (made if there are none) in `keys_directory`.

        `info` is its meta info, which clients show: a JSON object, of which the official tools know the keys
        administrator, email, organisation, description, url, recommended-stratum0, recommended-stratum1s and custom.
        Killed anywhere, the same call goes on; where a repository stands already, or anything else, it is an error.
        """
        keys.check_name(name)
        _check_days(days)
        _check_info(info)
        if compression not in COMPRESSIONS or hash not in ALGORITHMS:
            raise SettingsError(f"compression is one of {', '.join(COMPRESSIONS)}; hash one of {', '.join(ALGORITHMS)}")
        keys_directory = keys_directory or keys.default_directory(directory)
        keys.check_outside(keys_directory, directory)
        compressor(compression)
        check_zlib()
        try:
            ContentHash.of(b"", hash)
        except ValueError:
            raise SettingsError(f"this machine's OpenSSL has no {hash}; use another hash") from None
        try:
            os.makedirs(directory, exist_ok=True)
            os.chmod(directory, 0o755 | stat.S_IMODE(os.stat(directory).st_mode))
            _check_vacant(directory)
            with exclusive(f"{directory}/{LOCK}", f"the repository in {directory}"):
                _check_vacant(directory)
                keys.create(keys_directory, name, now=now)
                repository = cls(
                    directory,
                    name,
                    compression=compression,
                    algorithm=hash,
                    key=RepositoryKey.open(keys_directory, name),
                    spool=None,
                )
                repository._found(keys_directory, days, info, now)
        except OSError as error:
            raise posix.failure(error, f"making a repository in {directory}") from error
        return repository

    @classmethod
    def open(
        cls,
        directory: str,
        keys_directory: str | None = None,
        *,
        spool_root: str = spools.SPOOLS,
        configuration: str = spools.CONFIGURATION,
    ) -> Repository:
        """An existing repository, native or of the official tools. Without keys it can only be read.

        With keys, everything that would make clients refuse what they sign is an error now: files that are missing or
        no pair, a certificate that the whitelist does not admit, a whitelist of another master key.
        """
        found = _manifest(directory, ObjectStore(directory))
        name = found.name
        compression, algorithm = _settings(directory) or ("stock", found.root.algorithm)
        key = None
        spool = None
        if keys_directory is not None:
            keys.check_outside(keys_directory, directory)
            key = RepositoryKey.open(keys_directory, name)
            spool = Spool.find(directory, name, spools=spool_root, configuration=configuration)
        repository = cls(directory, name, compression=compression, algorithm=algorithm, key=key, spool=spool)
        if keys_directory is not None and key is not None:
            public = PublicKey.open(keys_directory, name) if os.path.exists(f"{keys_directory}/{name}.pub") else None
            if not repository.whitelist(public).admits(key.certificate):
                raise PublishError(
                    f"the whitelist of {name} does not admit {keys_directory}/{name}.crt, so clients would refuse what "
                    f"its key signs: run unpacker resign with the master key, or use the right keys"
                )
        return repository

    # Reading ---------------------------------------------------------------------------------------------------------

    def manifest(self) -> Manifest:
        """What is published now, the signature verified."""
        found = _manifest(self.directory, self.objects)
        if found.name != self.name:
            raise PublishError(f"{self.directory} held the repository {self.name}, and holds {found.name} now")
        return found

    def history(self, of: Manifest) -> History:
        """The tags as of a manifest; an empty history if it has none."""
        if of.history is None:
            return History.create(self.name)
        data = self.objects.read(of.history, objects.HISTORY, limit=reflog.LIMIT)
        return History(self.name, data, f"the history {of.history} of {self.name}")

    def whitelist(self, public: PublicKey | None = None) -> Whitelist:
        """The whitelist as it stands, its signature verified if the master key's public half is given."""
        path = f"{self.directory}/{whitelists.FILE}"
        found = Whitelist.parse(_read(path, "no client can mount it: run unpacker resign"), path, key=public)
        if found.name != self.name:
            raise PublishError(f"{path} is of the repository {found.name!r}, not of {self.name}")
        return found

    def days_left(self, now: int) -> int:
        """Whole days until clients refuse the repository because nobody resigned it; negative once they do."""
        return self.whitelist().days_left(now)

    # Acting ----------------------------------------------------------------------------------------------------------

    def resign(self, keys_directory: str, *, days: int = whitelists.DAYS, now: int) -> Whitelist:
        """Signs the whitelist again, good for so many days from now. Needs the master key, not the repository's.

        It admits what it admitted, and the certificate in `keys_directory` if there is one. A whitelist that the
        master key did not sign is an error: it may admit anybody. One that is gone is made anew.
        """
        _check_days(days)
        keys.check_outside(keys_directory, self.directory)
        master = MasterKey.open(keys_directory, self.name)
        certificate = None
        if os.path.exists(f"{keys_directory}/{self.name}.crt"):
            certificate = Certificate.open(keys_directory, self.name)
        if certificate is not None and not os.path.exists(f"{self.directory}/{whitelists.FILE}"):
            renewed = whitelists.issue(self.name, certificate, algorithm=self.algorithm, days=days, now=now)
        else:
            old = self.whitelist(master.public)
            renewed = whitelists.renew(old, certificate, algorithm=self.algorithm, days=days, now=now)
        try:
            self.write(whitelists.FILE, renewed.sealed(master, self.algorithm))
        except OSError as error:
            raise posix.failure(error, f"writing the whitelist of {self.name}") from error
        return renewed

    @contextmanager
    def lock(self, wait: float = 0) -> Iterator[None]:
        """Excludes every other process of this program; Busy names the holder after at most `wait` seconds.

        Clears what a killed holder left. Reentrant in one object, for one thread. Does not keep the official tools
        out: `transaction` does.
        """
        if self._depth:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
            return
        with ExitStack() as stack:
            try:
                what = f"the repository {self.name} in {self.directory}"
                stack.enter_context(exclusive(f"{self.directory}/{LOCK}", what, wait))
                self.objects.sweep()
                files.sweep(f"{self.directory}/{SCRATCH}")
            except OSError as error:
                raise posix.failure(error, f"locking {self.directory}") from error
            self._depth = 1
            try:
                yield
            finally:
                self._depth = 0

    def write(self, name: str, data: bytes) -> None:
        """Replaces a small file of the repository in one durable step. OSError as it comes."""
        files.replace(f"{self.directory}/{name}", data, scratch=f"{self.directory}/{SCRATCH}")

    def sync(self) -> None:
        """Makes all objects stored so far durable, names included."""
        try:
            fd = os.open(self.directory, posix.DIRECTORY_FLAGS)
            try:
                posix.syncfs(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise posix.failure(error, f"making {self.directory} durable") from error

    def store(self, data: bytes, suffix: str) -> ContentHash:
        """Stores an object that is no file's content: those are always compressed."""
        compression = "stock" if suffix in _COMPRESSED_AGAIN else self.compression
        return self.objects.put(compressor(compression)(data), suffix)

    def _found(self, keys_directory: str, days: int, info: bytes | None, now: int) -> None:
        """Writes everything that a repository has, the manifest last."""
        assert self.key is not None
        certificate = self.key.certificate
        ObjectStore.create(self.directory, self.algorithm)
        files.sweep(f"{self.directory}/{SCRATCH}")
        settings = {"version": _SETTINGS_VERSION, "compression": self.compression, "hash": self.algorithm}
        self.write(SETTINGS, json.dumps(settings).encode("ascii") + b"\n")
        admitting = whitelists.issue(self.name, certificate, algorithm=self.algorithm, days=days, now=now)
        self.write(whitelists.FILE, admitting.sealed(MasterKey.open(keys_directory, self.name), self.algorithm))
        self.write(REPLICABLE, b"replication of this repository is allowed\n")
        data = empty_root(now)
        root = self.store(data, objects.CATALOG)
        head = Tag(name="", root=root, root_size=len(data), revision=1, timestamp=now)
        stored_history = self.store(History.create(self.name).advanced(head).data, objects.HISTORY)
        stored_certificate = self.store(certificate.pem, objects.CERTIFICATE)
        stored_info = None if info is None else self.store(info, objects.META_INFO)
        self.sync()
        refs = [
            Ref(root, Kind.CATALOG, now),
            Ref(stored_certificate, Kind.CERTIFICATE, now),
            Ref(stored_history, Kind.HISTORY, now),
        ]
        if stored_info is not None:
            refs.append(Ref(stored_info, Kind.META_INFO, now))
        log = Reflog.create(self.name).with_refs(refs)
        self.write(reflog.FILE, log.data)
        first = Manifest(
            name=self.name,
            root=root,
            root_size=len(data),
            revision=1,
            published=now,
            certificate=stored_certificate,
            history=stored_history,
            meta_info=stored_info,
            reflog=log.checksum(self.algorithm),
        )
        self.write(manifest.FILE, first.sealed(self.key))


def empty_root(now: int) -> bytes:
    """The root catalog of a repository with nothing in it."""
    with Catalog.create("", last_modified=now) as catalog:
        own = Row(
            hardlinks=2,
            hash=None,
            size=DIRECTORY_SIZE,
            mode=stat.S_IFDIR | 0o755,
            mtime=now,
            mtimens=None,
            flags=DIRECTORY,
            name="",
            symlink="",
            uid=0,
            gid=0,
            xattr=None,
        )
        catalog.insert([(key(b""), (0, 0), own)])
        catalog.counters = Counters(own=Tally(dir=1))
        return catalog.serialise()


def published_bytes(directory: str) -> bytes:
    """The manifest as it stands, byte for byte."""
    return _read(
        f"{directory}/{manifest.FILE}", "there is no repository there: make one with unpacker init, or mount its disk"
    )


def _manifest(directory: str, store: ObjectStore) -> Manifest:
    path = f"{directory}/{manifest.FILE}"
    letter = Letter.parse(published_bytes(directory), path)
    found = Manifest.parse(letter, path)
    pem = store.read(found.certificate, objects.CERTIFICATE, limit=_CERTIFICATE_LIMIT)
    Certificate.parse(pem, f"the certificate {found.certificate} of {found.name}").verify(letter, path)
    return found


def _check_vacant(directory: str) -> None:
    if os.path.lexists(f"{directory}/{manifest.FILE}"):
        raise PublishError(f"there is a repository in {directory} already: use it, or give another directory")
    others = sorted(set(os.listdir(directory)) - _OWN)
    if others:
        raise PublishError(f"{directory} is not empty ({others[0]!a}): give a directory of its own to the repository")


def _check_days(days: int) -> None:
    if not 1 <= days <= _DAYS_LIMIT:
        raise SettingsError(f"a whitelist is good for 1 to {_DAYS_LIMIT} days, not for {days}")


def _check_info(info: bytes | None) -> None:
    if info is None:
        return
    try:
        is_object = isinstance(json.loads(info), dict)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"the meta info of a repository is JSON, but: {error}") from None
    if not is_object or len(info) > LIMIT:
        raise SettingsError(f"the meta info of a repository is one JSON object of at most {LIMIT} bytes")


def _settings(directory: str) -> tuple[str, str] | None:
    """The compression and the hash that a native repository was made with; None for one of the official tools."""
    path = f"{directory}/{SETTINGS}"
    if not os.path.lexists(path):
        return None
    try:
        value = json.loads(_read(path, ""))
        version, compression, algorithm = value["version"], value["compression"], value["hash"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise PublishError(f"{path} is damaged; restore it: it says how contents are compressed") from None
    if version != _SETTINGS_VERSION or compression not in COMPRESSIONS or algorithm not in ALGORITHMS:
        raise PublishError(f"{path} was written by another version of unpacker: use that version, or a newer one")
    return compression, algorithm


def _read(path: str, advice: str) -> bytes:
    try:
        data = files.read(path, LIMIT)
    except FileNotFoundError:
        raise PublishError(f"there is no {path}{': ' + advice if advice else ''}") from None
    except OSError as error:
        raise posix.failure(error, f"reading {path}") from error
    if len(data) > LIMIT:
        raise PublishError(f"{path} is longer than {LIMIT} bytes, so it is not what it should be")
    return data
