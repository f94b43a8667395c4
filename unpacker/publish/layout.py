"""Where a directory target has what: public names, their records, roots and what is known of them.

    <root>/<registry>/<repository>:<tag>              the public name, a relative symlink to a root
    <root>/.metadata/<registry>/<repository>:<tag>/   record.json, manifest.json, listing.zst
    <root>/.multiarch/<arch[:variant]>/<registry>/…   names of one platform of several; their records are below
                                                      .metadata/.multiarch/<arch[:variant]>/
    <root>/.metadata/unreferenced.json                when roots lost their last name
    <root>/.flat/<id[:2]>/<id>[-<n>]/                 roots
    <root>/.unpacker/                                 ours alone: lock, pool/, txn/, trash/, roots/<id>[-<n>].{json,zst}

Everything here gives OSError as it comes; who calls knows what was being done.
"""

from __future__ import annotations

import errno
import os
import posixpath
import secrets
import stat
from collections.abc import Iterator

from unpacker.digest import Digest
from unpacker.multiarch import MULTIARCH, leads_to
from unpacker.publish import posix
from unpacker.publish.roots import (
    FLAT,
    METADATA,
    UNREFERENCED,
    RootFacts,
    foreign,
    is_public_name,
    may_be_registry,
    names_of,
    parse_unreferenced,
    root_path,
)
from unpacker.record import Published, Unreadable

OURS = ".unpacker"
LOCK = f"{OURS}/lock"
POOL = f"{OURS}/pool"
ROOTS = f"{OURS}/roots"
TXN = f"{OURS}/txn"
TRASH = f"{OURS}/trash"

_RECORD_LIMIT = 4 << 20


class Layout:
    """The directory target at `path`, as it lies on disk. Holds nothing open."""

    def __init__(self, path: str) -> None:
        self.path = path

    def open(self, path: str = "", *, create: bool = False) -> int:
        """A descriptor of a directory below the target, no symlink followed on the way."""
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return posix.open_directory(path, fd, create=create)
        finally:
            os.close(fd)

    def names(self, directory: str) -> list[str]:
        """What is in a directory below the target; nothing if it does not exist."""
        try:
            return os.listdir(f"{self.path}/{directory}")
        except FileNotFoundError:
            return []

    def read(self, path: str, limit: int | None = _RECORD_LIMIT) -> bytes:
        """The bytes of one of our files, cut at the limit: no record is that long. None is for what grows with the
        target."""
        fd = os.open(f"{self.path}/{path}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            return file.read() if limit is None else file.read(limit)

    def replace_file(self, path: str, data: bytes) -> None:
        """Writes one of our files beside and renames it, durable before it is visible."""
        temporary = f"{self.path}/{TXN}/file-{secrets.token_hex(6)}"
        fd = os.open(temporary, posix.CREATE_FLAGS, 0o600)
        try:
            posix.write_all(fd, data)
            os.fchmod(fd, 0o644)
            os.fsync(fd)
        except OSError:
            os.unlink(temporary)
            raise
        finally:
            os.close(fd)
        os.rename(temporary, f"{self.path}/{path}")

    # Public names ----------------------------------------------------------------------------------------------------

    def public_names(self) -> Iterator[str]:
        """Every name that could be a public path, `<registry>/<name…>:<tag>`, whatever stands there. Other names, such
        as an operator's own symlinks, are not ours."""
        return (path for path, into in self._walk("") if not into and is_public_name(path))

    def records(self) -> list[str]:
        """The public path of everything that may be a record, whether or not its name is published."""
        return [path for path, into in self._walk(METADATA) if not into and is_public_name(path)]

    def empty_directories(self) -> list[str]:
        """Directories on the way to names and to records that have nothing in them."""
        places = [(place, path) for place in ("", METADATA) for path, into in self._walk(place) if into]
        paths = [posixpath.join(place, path) for place, path in places]
        return [path for path in paths if not self.names(path)]

    def _walk(self, place: str) -> Iterator[tuple[str, bool]]:
        """What is below the registries in `place`, down to names, and whether it is a directory on the way to one; then
        the same of each platform."""
        yield from self._walk_registries(place)
        for entry in self._entries(f"{place}/{MULTIARCH}"):
            if entry.name[0] != "." and entry.is_dir(follow_symlinks=False):
                platform = f"{MULTIARCH}/{entry.name}"
                yield platform, True
                for path, into in self._walk_registries(f"{place}/{platform}"):
                    yield f"{platform}/{path}", into

    def _walk_registries(self, place: str) -> Iterator[tuple[str, bool]]:
        pending = [""]
        while pending:
            directory = pending.pop()
            for entry in self._entries(f"{place}/{directory}"):
                path = f"{directory}/{entry.name}" if directory else entry.name
                if entry.name[0] == "." or not (directory or may_be_registry(path)):
                    continue
                into = not is_public_name(path) and entry.is_dir(follow_symlinks=False)
                if into:
                    pending.append(path)
                yield path, into

    def _entries(self, directory: str) -> list[os.DirEntry[str]]:
        """What is in a directory; nothing if its last name was removed meanwhile."""
        try:
            with os.scandir(f"{self.path}/{directory}") as found:
                return list(found)
        except FileNotFoundError:
            return []

    def link_root(self, public_path: str) -> str | None:
        """The path below the target that a public link leads to; None without a link, "" where something else is."""
        try:
            target = os.readlink(f"{self.path}/{public_path}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno == errno.EINVAL:
                return ""
            raise
        return posixpath.normpath(posixpath.join(posixpath.dirname(public_path), target))

    def obstacle(self, public_path: str) -> str | None:
        """What keeps a public link from being made: the first of the names on the way to it that is no directory."""
        path = ""
        for name in public_path.split("/")[:-1]:
            path = posixpath.join(path, name)
            try:
                if not stat.S_ISDIR(os.lstat(f"{self.path}/{path}").st_mode):
                    return path
            except FileNotFoundError:
                return None
        return None

    def in_force(self, public_path: str) -> Published | Unreadable | None:
        """What stands published under a name: of its record and the one that this replaces, that to which the link
        leads. None without a link, whatever record an interrupted run left."""
        problem = ""
        for _ in range(3):
            root = self.link_root(public_path)
            if root is None:
                return None
            if not root:
                return foreign(public_path, self.path)
            found = self._record(public_path)
            if isinstance(found, Published):
                if leads_to(found.root, root, public_path):
                    return found
                if found.replaces is not None and leads_to(found.replaces.root, root, public_path):
                    return found.replaces
                found = f"its link leads to {root}, its record names {found.root}"
            problem = found
            # A run may be changing this name right now: it is at odds with itself only if nothing moved meanwhile.
            if self.link_root(public_path) == root:
                break
        return Unreadable(public_path, problem)

    def listing(self, record: Published) -> bytes:
        """The listing of the root that a record in force names; OSError as it comes.

        While a transaction is under way, or was killed, what lies beside a record that is not yet in force may be of
        its next root already. The root's own copy is not, but only who publishes can read that.
        """
        beside = self._record(record.public_path)
        if isinstance(beside, Published) and beside.root != record.root:
            return self.read(f"{ROOTS}/{posixpath.basename(record.root)}.zst", None)
        return self.read(f"{METADATA}/{record.public_path}/listing.zst", None)

    def _record(self, public_path: str) -> Published | str:
        try:
            data = self.read(f"{METADATA}/{public_path}/record.json")
        except (FileNotFoundError, NotADirectoryError):
            return "it has no record.json (published by another tool?)"
        try:
            record = Published.parse(data)
        except (ValueError, RecursionError) as error:
            return f"its record.json is damaged: {error}"
        if record.public_path != public_path:
            return f"its record.json is that of {record.public_path}"
        return record

    def is_leftover(self, public_path: str) -> bool:
        """Whether a record is what an interrupted run of ours left: no link, and files that only we write, or none."""
        if self.link_root(public_path) is not None:
            return False
        names = self.names(f"{METADATA}/{public_path}")
        return not names or "record.json" in names or "listing.zst" in names

    def remove_record(self, public_path: str) -> None:
        """Removes the record of a name without a link, and the directories that are empty then.

        record.json goes last: what has lost a part only is still told from another tool's.
        """
        try:
            fd = self.open(f"{METADATA}/{public_path}")
        except FileNotFoundError:
            return
        try:
            for name in ("manifest.json", "listing.zst", "record.json"):
                try:
                    os.unlink(name, dir_fd=fd)
                except FileNotFoundError:
                    pass
        finally:
            os.close(fd)
        self.remove_empty(f"{METADATA}/{public_path}")

    def remove_empty(self, directory: str) -> None:
        """Removes a directory and its parents as far as they are empty; the target's own are kept."""
        while directory not in ("", METADATA):
            parent, name = posixpath.split(directory)
            fd = self.open(parent)
            try:
                os.rmdir(name, dir_fd=fd)
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    return
                raise
            finally:
                os.close(fd)
            directory = parent

    # Roots -----------------------------------------------------------------------------------------------------------

    def root(self, image_id: str, rules: str) -> str | None:
        """The path of a sound root of this image composed under these rules."""
        for name in names_of(image_id, self.names(f"{FLAT}/{Digest.parse(image_id).hex[:2]}")):
            facts = self.facts(name)
            if facts is not None and (facts.image_id, facts.rules, facts.damaged) == (image_id, rules, False):
                return root_path(name)
        return None

    def facts(self, name: str) -> RootFacts | None:
        """What is known of a root; None if it is not ours, or its facts are damaged: then it is never used again."""
        try:
            return RootFacts.parse(self.read(f"{ROOTS}/{name}.json"))
        except (FileNotFoundError, ValueError):
            return None

    def unreferenced(self) -> dict[str, int]:
        """When each root lost its last name, as recorded; ValueError if that is damaged."""
        try:
            data = self.read(UNREFERENCED, None)
        except FileNotFoundError:
            return {}
        return parse_unreferenced(data)
