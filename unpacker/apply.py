"""Applies the changeset of a layer to the tree of the layers below it.

Bottom-up as the OCI image specification has it (`layer.md`, "Applying Changesets"): a pure function on names. The
directories along the paths that a layer touches are copied, all others shared with the tree below. Nothing recurses,
because an image chooses how deep its tree is.
"""

from __future__ import annotations

from typing import NamedTuple

from unpacker.changeset import Changeset, Kind
from unpacker.errors import ImageError
from unpacker.limits import Limits
from unpacker.tree import MOST_LINKS, Directory, File, Node, Special, Symlink, Tree, find, name_bytes, resolve

_LINK_STEPS = 20_000_000
"""Components of symlink targets followed in one layer. Forty links of 2,000 components each for every entry would
take hours; real layers stay a thousand times below this."""
_PATH = 4096
"""PATH_MAX. A path as written is bounded by the layer reader; through symlinks its entry could lie deeper still."""

_DIRECTORY, _FILE, _SYMLINK, _HARDLINK = Kind.DIRECTORY, Kind.FILE, Kind.SYMLINK, Kind.HARDLINK
_DEFAULTS = Limits()


def apply(tree: Tree, changeset: Changeset, limits: Limits = _DEFAULTS) -> Tree:
    """The tree with one layer applied on it; `tree` itself stays as it is.

    First the whiteouts and opaque directories, on what `tree` has, whatever their order in the layer; then the entries
    in order. ImageError for what no file system could hold: link loops, links to nothing or to a directory.
    """
    merge = _Merge(tree, limits)
    merge.hide(changeset)
    merge.place(changeset)
    merge.link_deferred()
    return merge.result()


class _Place(NamedTuple):
    """A directory of the tree in the making: its children, ours to change, the directory above, its path's length."""

    children: dict[str, Node]
    above: _Place | None
    length: int


class _Deferred(NamedTuple):
    """A hard link whose target was not there yet. `stand_in` keeps its name, so that what comes later replaces it."""

    path: str
    target: str
    children: dict[str, Node]
    name: str
    stand_in: File


class _Merge:
    """One application of a changeset.

    Children dictionaries in `_ours` were made here and may be changed; those of the lower tree are copied first. (By
    id: the lower tree is alive throughout, so an id that is used again belongs to a dictionary made here.) `_places`
    remembers where paths lead, and is forgotten whenever a directory or a symlink on some path may have gone.
    """

    def __init__(self, tree: Tree, limits: Limits) -> None:
        self._lower = tree
        self._root = tree.root
        self._ours: set[int] = set()
        self._places: dict[str, _Place] = {}
        self._places_through_links = False
        self._link_steps = 0
        self._deferred: dict[int, _Deferred] = {}
        self._implied = tree.implied
        self._most_implied = limits.image_entries

    def result(self) -> Tree:
        if self._root is self._lower.root:
            return self._lower
        return Tree(self._root, self._implied)

    # Phase 1: what the layer hides of the lower tree.

    def hide(self, changeset: Changeset) -> None:
        lower = self._lower.root
        gone: set[str] | None = None
        # All are resolved in the lower tree before any of them acts, which makes their order meaningless.
        for path, is_opaque in [(p, False) for p in changeset.whiteouts] + [(p, True) for p in changeset.opaque]:
            parent, _, name = ("", "", "") if is_opaque else path.rpartition("/")
            found = resolve(lower, path if is_opaque else parent, self._count_link_steps)
            if found is None:
                continue
            if found.followed:
                gone = self._replaced_links(changeset) if gone is None else gone
                if not gone.isdisjoint(found.followed):
                    continue
            if is_opaque and found.directory.children:
                self._empty(found.trail)
            elif name in found.directory.children:
                self._remove(found.trail, name)

    def _replaced_links(self, changeset: Changeset) -> set[str]:
        """The symlinks of the lower tree that this layer hides or replaces by a directory of its own.

        A whiteout below such a name is about the layer's own directory, in which the lower layers have nothing; it is
        not about what the symlink pointed at.
        """
        links = set()
        for path in (*(e.path for e in changeset.entries if e.kind is _DIRECTORY), *changeset.whiteouts):
            parent, _, name = path.rpartition("/")
            found = resolve(self._lower.root, parent, self._count_link_steps)
            if found is not None and type(found.directory.children.get(name)) is Symlink:
                links.add("/".join((*found.trail, name)))
        return links

    def _remove(self, trail: list[str], name: str) -> None:
        children = self._descend(trail)
        if children is not None:
            children.pop(name, None)

    def _empty(self, trail: list[str]) -> None:
        children: dict[str, Node] = {}
        if not trail:
            self._root = self._root._replace(children=children)
        else:
            above = self._descend(trail[:-1])
            node = None if above is None else above.get(trail[-1])
            if above is None or type(node) is not Directory:
                return  # another whiteout took it away already
            above[trail[-1]] = node._replace(children=children)
        self._ours.add(id(children))

    def _descend(self, trail: list[str]) -> dict[str, Node] | None:
        """The children, ours to change, of a directory of the lower tree, unless it is hidden already."""
        children = self._own_root()
        for name in trail:
            node = children.get(name)
            if type(node) is not Directory:
                return None
            children = self._own(children, name, node)
        return children

    # Phase 2: what the layer brings.

    def place(self, changeset: Changeset) -> None:
        places = self._places
        ours = self._ours
        for entry in changeset.entries:
            path, kind, mode, uid, gid, mtime_ns, size, target, device, xattrs, token, change = entry
            if not path:
                if kind is not _DIRECTORY:
                    raise ImageError("the layer has an entry for the root of the image that is not a directory")
                self._root = Directory(mode, uid, gid, mtime_ns, xattrs, self._root.children, change)
                continue
            parent, _, name = path.rpartition("/")
            node: Node
            linked: Node | None = None
            if kind is _HARDLINK:
                # Before the parents are made: they may take the place of the very file that is linked.
                linked = self._link_target(path, target)
            place = places.get(parent)
            if place is None:
                place = self._enter(parent)
            children = place.children
            if not name or name == "." or name == ".." or place.length + len(name) > _PATH:
                raise ImageError(f"no file system can hold this path of the image: {_shown(path)}")
            old = children.get(name)
            if kind is _FILE:
                node = File(mode, uid, gid, mtime_ns, xattrs, size, token, change)
            elif kind is _DIRECTORY:
                if type(old) is Directory:
                    children[name] = Directory(mode, uid, gid, mtime_ns, xattrs, old.children, change)
                    continue
                inside: dict[str, Node] = {}
                ours.add(id(inside))
                node = Directory(mode, uid, gid, mtime_ns, xattrs, inside, change)
            elif kind is _SYMLINK:
                node = Symlink(mode, uid, gid, mtime_ns, xattrs, target, change)
            elif kind is not _HARDLINK:
                node = Special(mode, uid, gid, mtime_ns, xattrs, kind, device, change)
            elif linked is not None:
                node = linked
            else:
                node = self._defer(path, target, children, name)
            children[name] = node
            if type(old) is Directory or (type(old) is Symlink and self._places_through_links):
                self._forget_places()

    def _enter(self, path: str) -> _Place:
        """The place of a directory, by a path as an entry has it; what is missing or no directory is made one."""
        places = self._places
        if len(places) > 10_000:  # entries come directory by directory: an old place is seldom asked for again
            self._forget_places()
        root = places.setdefault("", _Place(self._own_root(), None, 0))
        above, _, name = path.rpartition("/")
        place = places.get(above)
        # A stack: the next component is the last one.
        names = [name] if place is not None else path.split("/")[::-1]
        place = place or root
        links = 0
        while names:
            name = names.pop()
            if name == ".." or name == "." or not name:
                if name == "..":
                    place = place.above or place
                continue
            node = place.children.get(name)
            if type(node) is Directory:
                children = self._own(place.children, name, node)
            elif type(node) is Symlink:
                links += 1
                if links > MOST_LINKS:
                    raise ImageError(f"too many symbolic links (a loop?) on the way to {_shown(path)}")
                self._places_through_links = True
                self._count_link_steps(node.target.count("/") + 1)
                if node.target.startswith("/"):
                    place = root
                names.extend(node.target.split("/")[::-1])
                continue
            else:
                children = self._imply(place, name)
            place = _Place(children, place, place.length + len(name_bytes(name)) + 1)
            if place.length > _PATH:
                raise ImageError(f"no file system can hold this path of the image: {_shown(path)}")
        places[path] = place
        return place

    def _imply(self, place: _Place, name: str) -> dict[str, Node]:
        self._implied += 1
        if self._implied > self._most_implied:
            raise ImageError(f"paths of the image go through more than {self._most_implied} unlisted directories")
        children: dict[str, Node] = {}
        self._ours.add(id(children))
        place.children[name] = Directory(0o755, 0, 0, 0, (), children)
        return children

    def _forget_places(self) -> None:
        self._places.clear()
        self._places_through_links = False

    def _count_link_steps(self, steps: int) -> None:
        self._link_steps += steps
        if self._link_steps > _LINK_STEPS:
            raise ImageError("the symbolic links on the paths of a layer take too long to follow")

    # Hard links: other names for what their target is at that point of the layer.

    def _link_target(self, path: str, target: str) -> Node | None:
        """What a hard link names: now in the merged tree, else in the lower tree before this layer hid it."""
        parent, _, name = target.rpartition("/")
        place = self._places.get(parent)
        node = place.children.get(name) if place is not None and name else self._find(self._root, target)
        if type(node) is Directory:
            raise ImageError(f"{_shown(path)} is a hard link to a directory: {_shown(target)}")
        if node is None:
            node = self._find(self._lower.root, target)
            # A hidden directory is nothing to link to, but the layer may yet bring a file of that name.
            return None if type(node) is Directory else node
        # A stand-in is not there yet either; what links to it waits with it.
        return None if id(node) in self._deferred else node

    def _defer(self, path: str, target: str, children: dict[str, Node], name: str) -> File:
        stand_in = File(0, 0, 0, 0, (), 0, "")
        self._deferred[id(stand_in)] = _Deferred(path, target, children, name, stand_in)
        return stand_in

    def link_deferred(self) -> None:
        """Every name has its node or a stand-in now, so one look tells what a deferred link is or waits for."""
        waiting: dict[int, list[_Deferred]] = {}
        for link in list(self._deferred.values()):
            node = self._find(self._root, link.target)
            if node is None or type(node) is Directory:
                what = "a directory" if node else "nothing in the image"
                raise ImageError(f"{_shown(link.path)} is a hard link to {what}: {_shown(link.target)}")
            if id(node) in self._deferred:
                waiting.setdefault(id(node), []).append(link)
                continue
            ready = [link]
            while ready:
                link = ready.pop()
                if link.children.get(link.name) is link.stand_in:
                    link.children[link.name] = node
                del self._deferred[id(link.stand_in)]
                ready.extend(waiting.pop(id(link.stand_in), ()))
        for link in self._deferred.values():
            raise ImageError(f"{_shown(link.path)} is a hard link to nothing but itself: {_shown(link.target)}")

    def _find(self, root: Directory, path: str) -> Node | None:
        return find(root, path, self._count_link_steps)

    # Ownership of dictionaries.

    def _own_root(self) -> dict[str, Node]:
        if id(self._root.children) not in self._ours:
            children = self._root.children.copy()
            self._ours.add(id(children))
            self._root = self._root._replace(children=children)
        return self._root.children

    def _own(self, above: dict[str, Node], name: str, directory: Directory) -> dict[str, Node]:
        """The children of `directory`, which is `above[name]`, ours to change."""
        if id(directory.children) in self._ours:
            return directory.children
        children = directory.children.copy()
        self._ours.add(id(children))
        above[name] = directory._replace(children=children)
        return children


def _shown(path: str) -> str:
    """A path for a message: escaped, and not longer than a line or two of it."""
    return ascii(path if len(path) <= 200 else path[:200] + "…")
