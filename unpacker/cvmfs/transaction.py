"""The switch of a repository from one revision to the next, in the order that never breaks a reader.

    objects durable → history, certificate → sync → reference log → its checksum → manifest

Only the last is seen by clients. A kill before it leaves objects that nobody refers to, and a reference log that lists
more than was published and that neither checksum fits; the next transaction accepts it, because it is sound and lists
what is published, and sets the checksums right. One that is not sound is made anew from what can be reached.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from unpacker.cvmfs import files, manifest, objects, reflog
from unpacker.cvmfs.catalog import Catalog
from unpacker.cvmfs.hash import ContentHash
from unpacker.cvmfs.history import History, Tag
from unpacker.cvmfs.keys import RepositoryKey
from unpacker.cvmfs.manifest import Manifest
from unpacker.cvmfs.reflog import Kind, Ref, Reflog
from unpacker.cvmfs.repository import CATALOG_LIMIT, Repository, published_bytes
from unpacker.errors import PublishError
from unpacker.publish import posix


@contextmanager
def transaction(repository: Repository, *, now: int, wait: float = 0) -> Iterator[Transaction]:
    """The right to change a repository, against every other process of ours and the official tools on this host.

    Leaving it without a `publish` changes nothing, except that what a killed process left out of step is mended (at
    `now`, Unix seconds). Busy after at most `wait` seconds of waiting for each of the two locks.
    """
    if repository.key is None:
        raise PublishError(f"the repository {repository.name} was opened without its keys, so only to be read")
    with repository.lock(wait):
        if repository.spool is None:
            yield Transaction(repository, repository.key, now)
        else:
            with repository.spool.held(wait):
                yield Transaction(repository, repository.key, now)


class Transaction:
    """Made by `transaction`, usable only inside its `with`. `base` is what is published; `reflog` fits it."""

    def __init__(self, repository: Repository, key: RepositoryKey, now: int) -> None:
        self._repository = repository
        self._key = key
        self._now = now
        self._published = published_bytes(repository.directory)
        self.base = repository.manifest()
        if self.base.alternative_paths:
            raise PublishError(
                f"{repository.name} restricts access with alternative paths, which unpacker cannot write"
            )
        self.reflog = self._mended(now)

    @property
    def next_revision(self) -> int:
        """What the root catalog to publish must say that it is."""
        return self.base.revision + 1

    def publish(
        self,
        root: ContentHash,
        root_size: int,
        *,
        now: int,
        tags: Mapping[str, str] | None = None,
        untag: Sequence[str] = (),
    ) -> Manifest:
        """Makes `root` what the repository stands at. The objects that it reaches are stored already.

        `tags` (name: description) are put on the new revision, `untag` are taken away. A root catalog that does not
        follow the published one is a PublishError, and then nothing has changed.
        """
        repository = self._repository
        stamp = max(now, self.base.published)  # Clients refuse a manifest older than the one they have.
        self._check_follows(root, root_size)
        head = Tag(name="", root=root, root_size=root_size, revision=self.next_revision, timestamp=stamp)
        history = _tagged(repository.history(self.base).advanced(head), head, tags or {}, untag)
        if self.base.history is not None:
            history = history.following(self.base.history)
        stored_history = repository.store(history.data, objects.HISTORY)
        certificate = self.base.certificate
        if repository.objects.read(certificate, objects.CERTIFICATE) != self._key.certificate.pem:
            certificate = repository.store(self._key.certificate.pem, objects.CERTIFICATE)
        refs = [Ref(root, Kind.CATALOG, now), Ref(stored_history, Kind.HISTORY, now)]
        refs.append(Ref(certificate, Kind.CERTIFICATE, now))
        if self.base.meta_info is not None:
            refs.append(Ref(self.base.meta_info, Kind.META_INFO, now))
        repository.sync()
        following = replace(
            self.base,
            root=root,
            root_size=root_size,
            revision=self.next_revision,
            published=stamp,
            certificate=certificate,
            history=stored_history,
        )
        return self._switch(following, self.reflog.with_refs(refs))

    def tag(self, tags: Mapping[str, str], untag: Sequence[str] = ()) -> Manifest:
        """Names what is published (name: description), and takes names away, at the same revision."""
        repository = self._repository
        head = Tag(
            name="",
            root=self.base.root,
            root_size=self.base.root_size,
            revision=self.base.revision,
            timestamp=self.base.published,
        )
        history = _tagged(repository.history(self.base), head, tags, untag)
        if self.base.history is not None:
            history = history.following(self.base.history)
        stored = repository.store(history.data, objects.HISTORY)
        repository.sync()
        return self._switch(
            replace(self.base, history=stored), self.reflog.with_refs([Ref(stored, Kind.HISTORY, self._now)])
        )

    def replace_reflog(self, log: Reflog) -> Manifest:
        """Puts another reference log in place, at the same revision: for garbage collection. It must list all that the
        manifest names."""
        for needed in (self.base.root, self.base.certificate, self.base.history, self.base.meta_info):
            if needed is not None and not log.lists(needed):
                raise PublishError(f"a reference log without {needed}, which is published, was not written")
        return self._switch(self.base, log)

    def _switch(self, following: Manifest, log: Reflog) -> Manifest:
        repository = self._repository
        checksum = log.checksum(repository.algorithm)
        following = replace(following, reflog=checksum)
        data = following.sealed(self._key)
        manifest.verified(data, self._key.certificate, f"the new manifest of {repository.name}")
        self._check_alone()
        try:
            repository.write(reflog.FILE, log.data)
            if repository.spool is not None:
                repository.spool.write_checksum(checksum)
            self._check_alone()
            repository.write(manifest.FILE, data)
        except OSError as error:
            raise posix.failure(error, f"publishing revision {following.revision} of {repository.name}") from error
        self.base, self.reflog, self._published = following, log, data
        return following

    def _check_alone(self) -> None:
        if self._repository.spool is not None:
            self._repository.spool.check_held()
        if published_bytes(self._repository.directory) != self._published:
            raise PublishError(
                f"somebody published in {self._repository.name} without regard to its locks; nothing of ours was "
                "published: run again, and keep others out of the directory"
            )

    def _check_follows(self, root: ContentHash, root_size: int) -> None:
        what = f"the root catalog {root}"
        data = self._repository.objects.read(root, objects.CATALOG, limit=CATALOG_LIMIT)
        with Catalog.load(data, what) as catalog:
            found = (catalog.revision, catalog.previous, catalog.prefix, len(data))
        if found != (self.next_revision, self.base.root, "", root_size):
            raise PublishError(f"{what} does not follow revision {self.base.revision} of {self._repository.name}")

    # Mending ---------------------------------------------------------------------------------------------------------

    def _mended(self, now: int) -> Reflog:
        """The reference log, in step with the manifest and with the official tools' checksum."""
        repository = self._repository
        log = self._found()
        authority = repository.spool.checksum() if repository.spool is not None else self.base.reflog
        if log is not None and authority is not None and log.checksum(authority.algorithm) == authority:
            return log
        if log is None or not log.is_sound() or not log.lists(self.base.root):
            log = self._rebuilt(now)
        self._switch(self.base, log)
        return log

    def _found(self) -> Reflog | None:
        path = f"{self._repository.directory}/{reflog.FILE}"
        try:
            data = files.read(path, reflog.LIMIT)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise posix.failure(error, f"reading {path}") from error
        if len(data) > reflog.LIMIT:
            raise PublishError(f"{path} is longer than {reflog.LIMIT} bytes: collect garbage with cvmfs_server gc")
        return Reflog(self._repository.name, data, path)

    def _rebuilt(self, now: int) -> Reflog:
        """All root objects that can be reached: the chain of revisions, of histories, and what tags name.

        All count as listed now, so that garbage collection keeps them for a full term rather than take one too early.
        """
        found = {self.base.certificate: Kind.CERTIFICATE}
        if self.base.meta_info is not None:
            found[self.base.meta_info] = Kind.META_INFO
        roots = [self.base.root]
        history: ContentHash | None = self.base.history
        while history is not None and history not in found and self._has(history, objects.HISTORY):
            found[history] = Kind.HISTORY
            opened = self._repository.history(replace(self.base, history=history))
            roots += [tag.root for tag in opened.tags()]
            history = opened.previous
        while roots:
            root = roots.pop()
            if root not in found and self._has(root, objects.CATALOG):
                found[root] = Kind.CATALOG
                data = self._repository.objects.read(root, objects.CATALOG, limit=CATALOG_LIMIT)
                with Catalog.load(data, f"the root catalog {root}") as catalog:
                    if catalog.previous is not None:
                        roots.append(catalog.previous)
        log = Reflog.create(self._repository.name)
        return log.with_refs(Ref(name, kind, now) for name, kind in found.items())

    def _has(self, name: ContentHash, suffix: str) -> bool:
        # What garbage collection took is gone for good; what is published must be there, or reading it raises.
        published = name in (self.base.root, self.base.history)
        return published or self._repository.objects.has(name, suffix)


def _tagged(history: History, head: Tag, tags: Mapping[str, str], untag: Sequence[str]) -> History:
    for name in untag:
        history = history.without(name)
    for name, description in tags.items():
        history = history.with_tag(replace(head, name=name, description=description))
    return history
