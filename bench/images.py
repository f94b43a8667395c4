"""The images of the benchmark, generated from a seed: the same bytes of every layer on every machine.

The large one is shaped as images of scientific software are: many small files (the median is 2.4 kB) and a long tail
of large ones, most bytes compressible as text and code are, the rest not at all, so that gzip makes about a third of
it; directories some levels deep; symlinks; files of lower layers replaced by higher ones. It has no whiteouts, which a
loop of `tar -x` would not understand: all contenders must make the same tree. No two files are the same, so that
nobody gains by storing contents once.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import random
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from unpacker import oci

Members = Iterator[tuple[tarfile.TarInfo, "bytes | Repeated"]]

# Raised when the bytes change, so that images kept from earlier runs are made again.
GENERATOR = 1
SEED = 20_201_120
MTIME = 1_600_000_000

MEDIAN_SIZE = 2_400
SPREAD = 2.3
"""Of the logarithm of file sizes. With the median it makes about 900 MB of 27,000 files."""
TEXT_SHARE = 0.91
SEGMENT = 1 << 16
POOL = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One compressed layer in memory."""

    blob: bytes
    digest: str
    diff_id: str
    unpacked: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a layer is made of: numbers of new files, of directories, and of files of lower layers that it replaces; and
    how far apart the sizes of its files lie."""

    name: str
    files: int
    directories: int
    replaced: int = 0
    spread: float = SPREAD


APP = (
    Shape(name="base", files=16_000, directories=1_900),
    Shape(name="stack", files=8_500, directories=900, replaced=200),
    Shape(name="top", files=2_500, directories=250, replaced=60),
)
LAYERED = (
    Shape(name="base", files=17_400, directories=1_900, replaced=0, spread=2.25),
    Shape(name="stack", files=10_200, directories=2_000, replaced=200, spread=2.2),
    Shape(name="top", files=950, directories=92, replaced=20, spread=2.43),
)
"""About 34,000 entries of 0.83 GB; an update of its top layer is 1,100 entries of 40 MB."""


def scaled(shape: Shape, scale: float) -> Shape:
    return Shape(
        name=shape.name,
        files=max(1, int(shape.files * scale)),
        directories=max(3, int(shape.directories * scale)),
        replaced=int(shape.replaced * scale),
        spread=shape.spread,
    )


Listing = dict[str, tuple[str, int | str, int]]
"""What a tree holds by path: kind, size or link target, and the checksum of the contents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One version of the large image, and what an unpacked root of it holds."""

    layers: tuple[Layer, ...]
    listing: Listing


def app(scale: float, shapes: tuple[Shape, Shape, Shape] = APP) -> tuple[Version, Version]:
    """A large image, and one that differs in its top layer only."""
    base, stack, top = (scaled(shape, scale) for shape in shapes)
    paths: list[str] = []
    listing: Listing = {}
    lower = [
        build(_listed(tree(base, [], "base", paths), listing)),
        build(_listed(tree(stack, list(paths), "stack", paths), listing)),
    ]
    versions = []
    for salt in ("top-1", "top-2"):
        whole = dict(listing)
        layer = build(_listed(tree(top, paths, salt, []), whole))
        versions.append(Version(layers=(*lower, layer), listing=whole))
    return versions[0], versions[1]


def _listed(members: Members, listing: Listing) -> Members:
    for info, data in members:
        if info.isfile():
            listing[info.name] = ("file", info.size, zlib.crc32(data) if isinstance(data, bytes) else 0)
        else:
            listing[info.name] = ("symlink", info.linkname, 0) if info.issym() else ("directory", 0, 0)
        yield info, data


def tree(shape: Shape, lower: list[str], salt: str, made: list[str]) -> Members:
    """The members of one layer in the order in which builders write them; paths of new files are added to `made`."""
    names = random.Random(f"{SEED}/{shape.name}/names")
    contents = Contents(random.Random(f"{SEED}/{salt}/contents"))
    directories = _directories(shape, names)
    paths = [
        f"{names.choice(directories[3:] or directories)}/{_word(names)}_{n}.{_suffix(names)}"
        for n in range(shape.files)
    ]
    replaced = names.sample(lower, min(shape.replaced, len(lower)))
    sizes = _sizes(len(paths) + len(replaced), shape.spread, names)
    files = dict(zip([*paths, *replaced], sizes, strict=True))
    links = {f"{path}.link": path.rpartition("/")[2] for path in paths[::25]}
    programs = set(paths[::12])
    for path in sorted([*directories, *files, *links]):
        info = tarfile.TarInfo(path)
        info.mtime = MTIME + len(path)
        data = b""
        if path in files:
            data = contents.take(path, files[path])
            info.size = len(data)
            info.mode = 0o755 if path in programs else 0o644
        elif path in links:
            info.type, info.linkname, info.mode = tarfile.SYMTYPE, links[path], 0o777
        else:
            info.type, info.mode = tarfile.DIRTYPE, 0o755
        yield info, data
    made.extend(paths)


def few_large_files(size: int, count: int = 8) -> Members:
    """A layer of `count` files of together `size` bytes that compress very well, no two the same."""
    for number in range(count):
        info = tarfile.TarInfo(f"large-{number}.dat")
        info.size = size // count
        info.mtime = MTIME
        yield info, Repeated(f"{number} of {count} in {size}; ".encode())


class Contents:
    """Contents of files, cut from a pool of text and one of noise, each much larger than the window of gzip."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        words = [_word(rng) for _ in range(1_500)]
        frequencies = list(itertools.accumulate(1 / (rank + 1) for rank in range(len(words))))
        text = bytearray()
        while len(text) < POOL:
            text += " ".join(rng.choices(words, cum_weights=frequencies, k=12)).encode() + b"\n"
        self._text = bytes(text[:POOL])
        self._noise = rng.randbytes(POOL)

    def take(self, path: str, size: int) -> bytes:
        """Bytes that begin with the path and are otherwise cut at random, so that no two files are the same."""
        pieces = [f"{path}\n".encode()[:size]]
        left = size - len(pieces[0])
        while left:
            piece = min(left, SEGMENT)
            pool = self._text if self._rng.random() < TEXT_SHARE else self._noise
            start = self._rng.randrange(POOL - piece)
            pieces.append(pool[start : start + piece])
            left -= piece
        return b"".join(pieces)


class Repeated:
    """Endless bytes: one sentence over and over, with a count in every 64 kB, never held as a whole."""

    def __init__(self, sentence: bytes) -> None:
        self._block = (sentence * (SEGMENT // len(sentence) + 1))[:SEGMENT]
        self._number = 0
        self._rest = b""

    def read(self, size: int = SEGMENT, /) -> bytes:
        while len(self._rest) < size:
            self._number += 1
            self._rest += b"%016d" % self._number + self._block
        piece, self._rest = self._rest[:size], self._rest[size:]
        return piece


def build(members: Members, level: int = 6) -> Layer:
    """A gzip layer of these members."""
    sink = _Sink(level)
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data) if isinstance(data, bytes) else data)
    return sink.layer()


class _Sink(io.RawIOBase):
    """Takes a tar; hashes, compresses, hashes again."""

    def __init__(self, level: int) -> None:
        self._deflate = zlib.compressobj(level, zlib.DEFLATED, 31)
        self._diff_id = hashlib.sha256()
        self._blob = bytearray()
        self._position = 0

    def write(self, data: bytes) -> int:  # type: ignore[override]  # bytes only, from tarfile
        self._diff_id.update(data)
        self._blob += self._deflate.compress(data)
        self._position += len(data)
        return len(data)

    def tell(self) -> int:
        return self._position

    def layer(self) -> Layer:
        self._blob += self._deflate.flush()
        blob = bytes(self._blob)
        return Layer(
            blob=blob,
            digest=f"sha256:{hashlib.sha256(blob).hexdigest()}",
            diff_id=f"sha256:{self._diff_id.hexdigest()}",
            unpacked=self._position,
        )


def manifest(layers: Sequence[Layer], label: str) -> tuple[bytes, bytes]:
    """The manifest and the config of an image of these layers; another label makes another image of them."""
    config = json.dumps(
        {
            "os": "linux",
            "architecture": "amd64",
            "created": "2020-09-13T12:26:40Z",
            "config": {"Labels": {"benchmark": label}, "Cmd": ["/bin/true"]},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        }
    ).encode()
    document = {
        "schemaVersion": 2,
        "mediaType": oci.OCI_MANIFEST,
        "config": {
            "mediaType": oci.OCI_CONFIG,
            "digest": f"sha256:{hashlib.sha256(config).hexdigest()}",
            "size": len(config),
        },
        "layers": [
            {"mediaType": f"{oci.OCI_LAYER}+gzip", "digest": layer.digest, "size": len(layer.blob)} for layer in layers
        ],
    }
    return json.dumps(document).encode(), config


def _directories(shape: Shape, rng: random.Random) -> list[str]:
    """Names of directories, parents before children; all but the first three are three to seven levels deep."""
    names = ["opt", f"opt/{shape.name}", f"opt/{shape.name}/lib"]
    grown = [names[-1]]
    while len(names) < shape.directories:
        parent = min(rng.sample(grown, min(3, len(grown))), key=lambda name: name.count("/"))
        name = f"{parent}/{_word(rng)}{len(names)}"
        names.append(name)
        if name.count("/") < 6:
            grown.append(name)
    return names


def _sizes(count: int, spread: float, rng: random.Random) -> list[int]:
    """Log-normal sizes, by quantile rather than by chance: their sum does not depend on luck."""
    normal = NormalDist()
    sizes = [round(MEDIAN_SIZE * math.e ** (spread * normal.inv_cdf((n + 0.5) / count))) for n in range(count)]
    rng.shuffle(sizes)
    return sizes


def _word(rng: random.Random) -> str:
    return "".join(rng.choice("bcdfghklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 4)))


def _suffix(rng: random.Random) -> str:
    return rng.choice(("py", "py", "h", "hpp", "so", "pyc", "txt", "json", "root", "xml"))
