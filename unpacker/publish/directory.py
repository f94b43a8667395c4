"""The directory target: roots of hard links below `.flat`, records below `.metadata`, public names as symlinks.

What changes is ordered so that a kill at any point leaves every public link equal to its record:

    bytes → sync → roots → sync → records → sync → links → sync

A record says what its name stood for before (`replaces`); which of the two is in force, the link tells. Everything is
written under temporary names (`.unpacker/txn`, and `.flat/xx/.<root>.<txn>` for roots) and renamed. A root is staged
beside its final name because only its owner may move a read-only directory, and only within its parent.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from unpacker import listing, lock
from unpacker.contracts import Release
from unpacker.digest import Digest
from unpacker.errors import PublishError, UnpackerError
from unpacker.publish import posix
from unpacker.publish.pool import ContentPool, PoolLinks
from unpacker.record import Published, Unreadable

FLAT = ".flat"
METADATA = ".metadata"
OURS = ".unpacker"
UNREFERENCED = f"{METADATA}/unreferenced.json"

_RECORD_LIMIT = 4 << 20
_SPARE_BYTES = 64 << 20
_SPARE_INODES = 1000
_NOTE = re.compile(r"[a-z0-9][a-z0-9._-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class RootFacts:
    """What is known of one root, in `.unpacker/roots/<name>.json`. A directory in `.flat` without facts is not ours.

    `damaged`: verify found it changed; it stays as it is while names refer to it, and is never published again.
    """

    image_id: str
    rules: str
    entries: int
    size: int
    altered: Mapping[str, int] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    damaged: bool = False

    def serialise(self) -> bytes:
        return (json.dumps(asdict(self), indent=1) + "\n").encode("ascii")

    @classmethod
    def parse(cls, data: bytes) -> RootFacts:
        """ValueError says what is wrong."""
        try:
            value = json.loads(data)
            return cls(
                image_id=str(value["image_id"]),
                rules=str(value["rules"]),
                entries=int(value["entries"]),
                size=int(value["size"]),
                altered={str(k): int(v) for k, v in value["altered"].items()},
                layers=tuple(str(d) for d in value["layers"]),
                damaged=bool(value["damaged"]),
            )
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not the facts of a root: {type(error).__name__} {error}") from None


class DirectoryPublisher:
    """The Publisher whose target is the directory `root` of this host; it is made by the first lock."""

    def __init__(self, root: str) -> None:
        self.path = os.path.abspath(root)
        self._contents = ContentPool(self.path)
        self._guard = threading.Lock()
        self._depth = 0
        self._in_transaction = False

    @property
    def contents(self) -> ContentPool:
        return self._contents

    @property
    def keeps_owners(self) -> bool:
        """Whether files get the owners they have in the image, instead of the user who publishes."""
        return posix.keeps_owners()

    @contextmanager
    def lock(self, wait: float = 0) -> Iterator[None]:
        """Excludes every other run and gc on this target; Busy names the holder. Cleans what a killed one left."""
        with self._guard:
            outermost = self._depth == 0
            self._depth += 1
        try:
            if not outermost:
                yield
                return
            try:
                self._prepare()
            except OSError as error:
                raise posix.failure(error, f"preparing the target {self.path}") from error
            with self._exclusive(wait):
                try:
                    self._clean()
                except OSError as error:
                    raise posix.failure(error, f"clearing away what a killed run left in {self.path}") from error
                yield
        finally:
            with self._guard:
                self._depth -= 1

    @contextmanager
    def _exclusive(self, wait: float) -> Iterator[None]:
        holding = lock.exclusive(f"{self.path}/{OURS}/lock", f"the target {self.path}", wait)
        try:
            holding.__enter__()
        except OSError as error:
            raise posix.failure(error, f"locking the target {self.path}") from error
        try:
            yield
        finally:
            holding.__exit__(None, None, None)

    def _prepare(self) -> None:
        os.makedirs(self.path, 0o755, exist_ok=True)
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in (FLAT, METADATA):
                os.close(posix.open_directory(name, fd, create=True))
        finally:
            os.close(fd)
        for name in (OURS, f"{OURS}/pool", f"{OURS}/roots", f"{OURS}/txn", f"{OURS}/trash"):
            # Not for others: contents lie here before their image is public.
            os.makedirs(f"{self.path}/{name}", 0o700, exist_ok=True)

    def _clean(self) -> None:
        """Removes temporaries of a killed run. Whoever holds the lock knows that nobody is using them."""
        for group in _names(f"{self.path}/{FLAT}"):
            for name in _names(f"{self.path}/{FLAT}/{group}") if len(group) == 2 else ():
                if name.startswith("."):
                    self._remove_tree(f"{FLAT}/{group}", name)
        for place in (f"{OURS}/txn", f"{OURS}/trash"):
            for name in _names(f"{self.path}/{place}"):
                self._remove_tree(place, name)

    def _remove_tree(self, place: str, name: str) -> None:
        fd = self.open(place)
        try:
            posix.remove_tree(name, fd)
        finally:
            os.close(fd)

    def open(self, path: str = "", *, create: bool = False) -> int:
        """A descriptor of a directory below the target's root, no symlink followed on the way. OSError as it comes."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return posix.open_directory(path, fd, create=create)
        finally:
            os.close(fd)

    # What stands published -----------------------------------------------------------------------------------------

    def published(self) -> Mapping[str, Published | Unreadable]:
        """What stands published, by public path, read from links and records. A record without its link is what an
        interrupted run left, not a published name; a link without its record is Unreadable."""
        try:
            result: dict[str, Published | Unreadable] = {}
            for public_path in self._public_names():
                found = self._in_force(public_path)
                if found is not None:
                    result[public_path] = found
        except OSError as error:
            raise posix.failure(error, f"reading what is published in {self.path}") from error
        return dict(sorted(result.items()))

    def _public_names(self) -> Iterator[str]:
        # A public path is <registry>/<name…>:<tag>. Other names, such as an operator's own symlinks, are not ours.
        for registry in _names(self.path):
            if registry[0] == "." or not ("." in registry or ":" in registry or registry == "localhost"):
                continue
            pending = [registry]
            while pending:
                directory = pending.pop()
                try:
                    with os.scandir(f"{self.path}/{directory}") as found:
                        for entry in found:
                            name = entry.name
                            if name[0] == ".":
                                continue
                            if ":" in name:
                                yield f"{directory}/{name}"
                            elif entry.is_dir(follow_symlinks=False):
                                pending.append(f"{directory}/{name}")
                except (FileNotFoundError, NotADirectoryError):
                    # Its last name was removed meanwhile; or, at the top, it is no directory.
                    continue

    def _in_force(self, public_path: str) -> Published | Unreadable | None:
        problem = ""
        for _ in range(3):
            root = self.link_root(public_path)
            if root is None:
                return None
            found = self._record(public_path) if root else "a directory or file stands where its link belongs"
            if isinstance(found, Published):
                if found.root == root:
                    return found
                if found.replaces is not None and found.replaces.root == root:
                    return found.replaces
                found = f"its link leads to {root}, its record names {found.root}"
            problem = found
            # A run may be changing this name right now: it is only at odds with itself if nothing moved.
            if self.link_root(public_path) == root:
                break
        return Unreadable(public_path, problem)

    def link_root(self, public_path: str) -> str | None:
        """The path below the target's root that a public link leads to; None without a link, "" if it is no link."""
        try:
            target = os.readlink(f"{self.path}/{public_path}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if os.path.lexists(f"{self.path}/{public_path}") and not os.path.islink(f"{self.path}/{public_path}"):
                return ""
            raise error
        return posixpath.normpath(posixpath.join(posixpath.dirname(public_path), target))

    def _record(self, public_path: str) -> Published | str:
        try:
            data = _read(f"{self.path}/{METADATA}/{public_path}/record.json")
        except (FileNotFoundError, NotADirectoryError):
            return "it has no record.json (published by another tool?)"
        try:
            record = Published.parse(data)
        except (ValueError, RecursionError) as error:
            return f"its record.json is damaged: {error}"
        if record.public_path != public_path:
            return f"its record.json is that of {record.public_path}"
        return record

    # Roots -----------------------------------------------------------------------------------------------------------

    def root(self, image_id: str, rules: str) -> str | None:
        """The complete root of this image composed under these rules, if the target has one that is sound."""
        try:
            for name in self._roots_of(image_id):
                facts = self.facts(name)
                if facts is not None and (facts.image_id, facts.rules, facts.damaged) == (image_id, rules, False):
                    return f"{FLAT}/{name[:2]}/{name}"
        except OSError as error:
            raise posix.failure(error, f"looking for the root of {image_id} in {self.path}") from error
        return None

    def _roots_of(self, image_id: str) -> list[str]:
        hexadecimal = Digest.parse(image_id).hex
        own = re.compile(rf"{hexadecimal}(?:-([0-9]+))?")
        found = (own.fullmatch(name) for name in _names(f"{self.path}/{FLAT}/{hexadecimal[:2]}"))
        matches = sorted((int(match[1] or 1), match[0]) for match in found if match)
        return [name for _, name in matches]

    def facts(self, name: str) -> RootFacts | None:
        """What is known of the root of this name; None if it is not ours or its facts are damaged: then it is never
        used again. OSError as it comes."""
        try:
            return RootFacts.parse(_read(f"{self.path}/{OURS}/roots/{name}.json"))
        except (FileNotFoundError, ValueError):
            return None

    def distrust(self, root: str, tokens: Sequence[str] = ()) -> None:
        """Marks a root that verify found damaged, and discards the damaged contents: when published next, its image
        is composed anew under another name, from contents read anew. Names that refer to it keep doing so."""
        name = posixpath.basename(root)
        with self.lock():
            try:
                facts = self.facts(name)
                if facts is not None:
                    self.replace_file(f"{OURS}/roots/{name}.json", replace(facts, damaged=True).serialise())
            except OSError as error:
                raise posix.failure(error, f"marking {root} in {self.path} as damaged") from error
            self._contents.discard(tokens)

    def room(self, size: int, entries: int) -> None:
        """Raises PublishError if the file system cannot take this many bytes and inodes more, with some to spare."""
        place = self.path
        while not os.path.exists(place) and place != "/":
            place = os.path.dirname(place)
        try:
            now = os.statvfs(place)
        except OSError as error:
            raise posix.failure(error, f"asking for free space in {self.path}") from error
        free = now.f_bavail * now.f_frsize
        if free < size + _SPARE_BYTES:
            raise PublishError(
                f"no room in {self.path}: {(size + _SPARE_BYTES) / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free; "
                "free space (unpacker gc may help) or enlarge the file system"
            )
        # Some file systems (btrfs) make inodes as they need them, and say that they have none.
        if now.f_files and now.f_favail < entries + _SPARE_INODES:
            raise PublishError(
                f"no room in {self.path}: {entries + _SPARE_INODES:,} inodes needed, {now.f_favail:,} free; "
                "remove files (unpacker gc may help) or make a file system with more inodes"
            )

    # Changes ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self, message: str) -> Iterator[DirectoryTransaction]:
        """Exclusive change in preparation; leaving cleanly publishes all of it, by exception nothing."""
        with self.lock():
            with self._guard:
                if self._in_transaction:
                    raise PublishError(f"a transaction of this run on {self.path} is still open")
                self._in_transaction = True
            try:
                try:
                    transaction = DirectoryTransaction(self)
                except OSError as error:
                    raise posix.failure(error, f"opening a transaction on {self.path} ({message})") from error
                try:
                    yield transaction
                    try:
                        transaction.commit()
                    except OSError as error:
                        raise posix.failure(error, f"publishing in {self.path} ({message})") from error
                finally:
                    transaction.close()
            finally:
                self._in_transaction = False

    def replace_file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Writes one file of ours beside and renames it, durable before it is visible. OSError as it comes."""
        temporary = f"{self.path}/{OURS}/txn/file-{secrets.token_hex(6)}"
        fd = os.open(temporary, posix.CREATE_FLAGS, 0o600)
        try:
            posix.write_all(fd, data)
            os.fchmod(fd, mode)
            os.fsync(fd)
        except OSError:
            os.unlink(temporary)
            raise
        finally:
            os.close(fd)
        os.rename(temporary, f"{self.path}/{path}")

    def unreferenced(self) -> dict[str, int]:
        """When each root lost its last name, as recorded. OSError as it comes; ValueError if the file is damaged."""
        try:
            value: Any = json.loads(_read(f"{self.path}/{UNREFERENCED}"))
        except FileNotFoundError:
            return {}
        if not isinstance(value, dict) or not all(type(v) is int for v in value.values()):
            raise ValueError(f"{self.path}/{UNREFERENCED} is no mapping of roots to Unix seconds")
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class _Staged:
    """A root written under a temporary name, not yet in place."""

    name: str
    temporary: str
    facts: RootFacts
    listing: bytes

    @property
    def root(self) -> str:
        return f"{FLAT}/{self.name[:2]}/{self.name}"


class DirectoryTransaction:
    """One transaction on a directory target; see the order of `commit`."""

    def __init__(self, publisher: DirectoryPublisher) -> None:
        self._publisher = publisher
        self._name = f"publish-{os.getpid()}-{secrets.token_hex(6)}"
        self._before = dict(publisher.published())
        self._staged: dict[tuple[str, str], _Staged] = {}
        self._records: dict[str, tuple[Published, bytes]] = {}
        self._removed: dict[str, int] = {}
        self._notes: dict[str, bytes] = {}
        self._fds: list[int] = []
        try:
            # The root's descriptor is open before anything is written, so that its sync hears of every lost page.
            self._root_fd = self._opened("")
            self._pool_fd = self._opened(f"{OURS}/pool")
            self._roots_fd = self._opened(f"{OURS}/roots")
            txn_fd = self._opened(f"{OURS}/txn")
            os.mkdir(self._name, 0o700, dir_fd=txn_fd)
            self._txn_fd = self._opened(f"{OURS}/txn/{self._name}")
        except OSError:
            self.close()
            raise
        self._links = PoolLinks(publisher.path, self._pool_fd, self._txn_fd)

    def _opened(self, path: str, *, create: bool = False) -> int:
        fd = self._publisher.open(path, create=create)
        self._fds.append(fd)
        return fd

    def publish(self, release: Release) -> Published:
        """Composes the root (unless it exists) where nobody sees it, and completes the record. If it raises, the
        transaction is as it was before."""
        record = release.record
        key = (record.image_id, record.rules)
        staged = self._staged.get(key)
        try:
            root = self._publisher.root(*key) if staged is None else staged.root
            if root is None:
                staged = self._staged[key] = self._compose(release)
                root = staged.root
            facts = self._publisher.facts(posixpath.basename(root)) if staged is None else staged.facts
        except OSError as error:
            raise posix.failure(error, f"composing the root of {record.reference} in {self._publisher.path}") from error
        if facts is None:
            raise PublishError(f"{root} in {self._publisher.path} vanished while it was being published")
        before = self._before.get(record.public_path)
        completed = replace(
            record,
            root=root,
            entries=facts.entries,
            size=facts.size,
            altered=facts.altered,
            replaces=replace(before, replaces=None) if isinstance(before, Published) else None,
        )
        self._records[record.public_path] = (completed, release.image.manifest.raw)
        self._removed.pop(record.public_path, None)
        return completed

    def _compose(self, release: Release) -> _Staged:
        record, tree = release.record, release.tree
        if tree is None:
            raise PublishError(f"the target {self._publisher.path} has no sound root of {record.image_id}; run again")
        name = self._free_name(record.image_id)
        temporary = f".{name}.{self._name}"
        parent = self._publisher.open(f"{FLAT}/{name[:2]}", create=True)
        try:
            entries, size = posix.write_tree(tree, temporary, parent, self._links.link, self._publisher.keeps_owners)
        except (OSError, UnpackerError):
            posix.remove_tree(temporary, parent)
            raise
        finally:
            os.close(parent)
        facts = RootFacts(
            image_id=record.image_id,
            rules=record.rules,
            entries=entries,
            size=size,
            altered=dict(record.altered),
            layers=record.layers,
        )
        return _Staged(name=name, temporary=temporary, facts=facts, listing=listing.listing(tree))

    def _free_name(self, image_id: str) -> str:
        # Whatever is there, ours or foreign, is left alone: a root is never changed once it has its name.
        taken = {*_names(f"{self._publisher.path}/{FLAT}/{Digest.parse(image_id).hex[:2]}")}
        taken.update(staged.name for staged in self._staged.values())
        name = hexadecimal = Digest.parse(image_id).hex
        n = 1
        while name in taken:
            n += 1
            name = f"{hexadecimal}-{n}"
        return name

    def remove(self, public_paths: Sequence[str], *, now: int) -> None:
        """Takes public names away; PublishError if one of them does not exist, and then none is taken."""
        unknown = [p for p in public_paths if p not in self._before and p not in self._records]
        if unknown:
            raise PublishError(f"not published in {self._publisher.path}: {', '.join(unknown)}")
        for public_path in public_paths:
            self._records.pop(public_path, None)
            if public_path in self._before:
                self._removed[public_path] = now

    def note(self, name: str, data: bytes) -> None:
        """Writes `.metadata/<name>` with everything else."""
        if not _NOTE.fullmatch(name) or f"{METADATA}/{name}" == UNREFERENCED:
            raise PublishError(f"not a name for a note: {name!r}")
        self._notes[name] = data

    def commit(self) -> None:
        """Publishes, in the order that this module promises. OSError as it comes."""
        if not (self._staged or self._records or self._removed or self._notes):
            return
        self._stage("roots")
        posix.syncfs(self._root_fd)
        self._links.settle()
        self._place_roots()
        self._stage("records")
        posix.syncfs(self._root_fd)
        self._place_records()
        posix.syncfs(self._root_fd)
        self._switch_links()
        self._unpublish()
        for name in self._notes:
            os.rename(f"note.{name}", f"{METADATA}/{name}", src_dir_fd=self._txn_fd, dst_dir_fd=self._root_fd)
        posix.syncfs(self._root_fd)

    def _stage(self, what: str) -> None:
        # Everything is written under temporary names before a sync, so that the renames after it say what is durable.
        if what == "roots":
            for staged in self._staged.values():
                posix.write_file(f"{staged.name}.zst", self._txn_fd, staged.listing)
                posix.write_file(f"{staged.name}.json", self._txn_fd, staged.facts.serialise())
            return
        for i, (public_path, (record, manifest)) in enumerate(self._records.items()):
            posix.write_file(f"{i}.manifest", self._txn_fd, manifest)
            posix.write_file(f"{i}.record", self._txn_fd, record.serialise())
            os.symlink("../" * public_path.count("/") + record.root, f"{i}.link", dir_fd=self._txn_fd)
        posix.write_file("unreferenced", self._txn_fd, _json(self._unreferenced()))
        for name, data in self._notes.items():
            posix.write_file(f"note.{name}", self._txn_fd, data)

    def _place_roots(self) -> None:
        for key, staged in list(self._staged.items()):
            # The facts first: a root without facts counts as another tool's.
            for suffix in ("zst", "json"):
                name = f"{staged.name}.{suffix}"
                os.rename(name, name, src_dir_fd=self._txn_fd, dst_dir_fd=self._roots_fd)
            parent = self._publisher.open(f"{FLAT}/{staged.name[:2]}")
            try:
                os.rename(staged.temporary, staged.name, src_dir_fd=parent, dst_dir_fd=parent)
            finally:
                os.close(parent)
            del self._staged[key]

    def _place_records(self) -> None:
        for i, (public_path, (record, _)) in enumerate(self._records.items()):
            fd = self._publisher.open(f"{METADATA}/{public_path}", create=True)
            try:
                self._place_listing(posixpath.basename(record.root), f"{i}.listing", fd)
                for name in ("manifest", "record"):
                    os.rename(f"{i}.{name}", f"{name}.json", src_dir_fd=self._txn_fd, dst_dir_fd=fd)
            finally:
                os.close(fd)
        os.rename("unreferenced", UNREFERENCED, src_dir_fd=self._txn_fd, dst_dir_fd=self._root_fd)

    def _place_listing(self, root: str, temporary: str, fd: int) -> None:
        try:
            os.link(
                f"{root}.zst", temporary, src_dir_fd=self._roots_fd, dst_dir_fd=self._txn_fd, follow_symlinks=False
            )
        except OSError:
            # No links here, or no more of this one: a copy is as good, once it is durable.
            data = _read(f"{self._publisher.path}/{OURS}/roots/{root}.zst", None)
            posix.write_file(temporary, self._txn_fd, data)
            posix.syncfs(self._root_fd)
        os.rename(temporary, "listing.zst", src_dir_fd=self._txn_fd, dst_dir_fd=fd)

    def _switch_links(self) -> None:
        for i, public_path in enumerate(self._records):
            directory, name = posixpath.split(public_path)
            fd = self._publisher.open(directory, create=True)
            try:
                os.rename(f"{i}.link", name, src_dir_fd=self._txn_fd, dst_dir_fd=fd)
            finally:
                os.close(fd)

    def _unpublish(self) -> None:
        for public_path in self._removed:
            directory, name = posixpath.split(public_path)
            fd = self._publisher.open(directory)
            try:
                os.unlink(name, dir_fd=fd)
            finally:
                os.close(fd)
            remove_record(self._publisher, public_path)
            _remove_empty(self._publisher.path, directory, self._root_fd)

    def _unreferenced(self) -> dict[str, int]:
        try:
            recorded = self._publisher.unreferenced()
        except ValueError:
            # Damaged: roots without a name get the time of the next gc, so the grace period only starts later.
            recorded = {}
        before = {path: root for path in self._before if (root := self._publisher.link_root(path))}
        after = {path: root for path, root in before.items() if path not in self._removed}
        after.update((path, record.root) for path, (record, _) in self._records.items())
        names = set(after.values())
        result = {root: time for root, time in recorded.items() if root not in names}
        for path, root in before.items():
            if root.startswith(f"{FLAT}/") and root not in names:
                time = self._removed[path] if path in self._removed else self._records[path][0].published
                result[root] = max(time, result[root]) if root in result and root not in recorded else time
        return result

    def close(self) -> None:
        """Takes away what is left under temporary names, and closes. A failure here is the next holder's to clean."""
        try:
            for staged in self._staged.values():
                self._publisher._remove_tree(f"{FLAT}/{staged.name[:2]}", staged.temporary)
            self._publisher._remove_tree(f"{OURS}/txn", self._name)
        except OSError:
            pass  # What stopped the transaction must be heard, not what stopped the sweeping.
        while self._fds:
            os.close(self._fds.pop())


def remove_record(publisher: DirectoryPublisher, public_path: str) -> None:
    """Removes the record of a name that has no link any more, and directories that are empty then. OSError as it comes.

    record.json goes last but for the directory: what has lost a part only is still told from another tool's.
    """
    fd = publisher.open(f"{METADATA}/{public_path}")
    try:
        for name in ("manifest.json", "listing.zst", "record.json"):
            try:
                os.unlink(name, dir_fd=fd)
            except FileNotFoundError:
                pass
    finally:
        os.close(fd)
    root_fd = publisher.open()
    try:
        _remove_empty(publisher.path, f"{METADATA}/{public_path}", root_fd)
    finally:
        os.close(root_fd)


def _remove_empty(root: str, directory: str, root_fd: int) -> None:
    # From below upwards, as far as they are empty; the target's own directories are kept.
    while directory not in ("", METADATA):
        if _names(f"{root}/{directory}"):
            return
        os.rmdir(directory, dir_fd=root_fd)
        directory = posixpath.dirname(directory)


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _read(path: str, limit: int | None = _RECORD_LIMIT) -> bytes:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
        data = file.readall() if limit is None else file.read(limit)
    return data or b""


def _json(value: Mapping[str, int]) -> bytes:
    return (json.dumps(dict(sorted(value.items())), indent=1) + "\n").encode("ascii")
