"""Images that are legal and strange, each for another reason: what a publisher must take as it is.

What a reader has to refuse is in the tests of hostile layers; this is the other side of the border.
"""

from __future__ import annotations

import random
import tarfile
from collections.abc import Iterator

from tests.images import (
    BuiltImage,
    Member,
    device,
    directory,
    fifo,
    file,
    hardlink,
    image,
    layer,
    opaque,
    symlink,
    whiteout,
)

MARKER = ".cvmfscatalog"
_MIB = 1 << 20


def strange_images() -> dict[str, BuiltImage]:
    """By tag."""
    return {name: image(*layers) for name, layers in _stacks()}


def self_contained_images() -> dict[str, BuiltImage]:
    """Those whose every layer means by itself what it means in the image, so that overlayfs can stack them."""
    return {"stacked": image(*_stacked()), "names": image(_names()), "kinds": image(_kinds())}


def large_image(entries: int) -> BuiltImage:
    """Three layers, `entries` names together: many directories, small files, links, whiteouts; many contents twice."""
    base = [*_many("base", entries * 6 // 10)]
    stack = [*_many("stack", entries * 3 // 10), whiteout("base/d3"), opaque("base/d5")]
    return image(layer(*base), layer(*stack), layer(*_many("top", entries // 10), file("base/d7/f0", b"replaced")))


def _many(top: str, entries: int) -> Iterator[Member]:
    yield directory(top)
    for number in range(entries // 20):
        yield directory(f"{top}/d{number}", mode=0o750, mtime=1_500_000_000 + number)
        for f in range(17):
            content = b"%d" % (number * f % 211) * (1 + number % 90)
            yield file(f"{top}/d{number}/f{f}", content, uid=f, gid=number, mtime=1_500_000_000 + f / 4)
        yield symlink(f"{top}/d{number}/l", f"../d{number + 1}/f1")
        yield hardlink(f"{top}/d{number}/h", f"{top}/d{number}/f1")


def _stacks() -> Iterator[tuple[str, list[bytes]]]:
    yield "stacked", _stacked()
    yield "names", [_names()]
    yield "kinds", [_kinds()]
    yield "nothing", [layer()]
    yield "no-layer", []
    yield "emptied", [layer(directory("a/b"), file("a/c", b"x")), layer(whiteout("a"))]
    yield "deep", [layer(file("/".join(["d"] * 300 + ["f"]), b"bottom"), directory("/".join(["e"] * 1100)))]
    long = "/".join(["p" * 255] * 15 + ["e" * 253, "f"])
    yield "long-path", [layer(file(long, b"far"), directory("n" * 255), symlink("s" * 255, "n" * 255))]
    yield "wide", [layer(*(file(f"w/{n:05}") if n % 10 else directory(f"w/{n:05}") for n in range(2_500)))]
    yield "targets", [layer(*_targets())]
    yield "hard-links", _hard_links()
    yield "implied", [layer(file("no/parents/at/all", b"x"), symlink("also/none", "/no"))]
    yield (
        "through-links",
        [
            layer(directory("usr/lib"), symlink("lib", "usr/lib"), symlink("abs", "/usr"), symlink("up", "../../usr")),
            layer(file("lib/one", b"1"), file("abs/two", b"2"), file("up/three", b"3"), whiteout("lib/none")),
            layer(whiteout("abs/two"), hardlink("usr/again", "lib/one")),
        ],
    )
    yield (
        "replaced",
        [
            layer(directory("d"), file("d/f", b"x"), file("f", b"y"), symlink("l", "d"), fifo("p")),
            layer(file("d", b"file now"), directory("f"), file("f/g", b"in it"), directory("l"), file("l/own", b"z")),
            layer(symlink("f", "d"), file("p", b"no pipe any more"), fifo("l/own")),
        ],
    )
    yield "twice", [layer(file("a", b"1"), file("a", b"22"), directory("d", mode=0o700), directory("d", mode=0o711))]
    yield (
        "spellings",
        [
            layer(file("./dot", b"."), file("/absolute", b"/"), file("a//b///c", b"//"), file("./a/./d", b"/./")),
            layer(file("x/../y", b".."), directory("./"), directory("a/")),
        ],
    )
    yield (
        "whiteouts",
        [
            layer(*(file(f"{d}/{f}", b"low") for d in "abcd" for f in ("one", "two")), directory("e/f/g")),
            layer(whiteout("a/one"), file("a/one", b"new"), opaque("b"), file("b/three", b"only"), whiteout("c")),
            layer(file("c/again", b"x"), opaque("d"), whiteout("none/such"), whiteout("e/f")),
        ],
    )
    yield "opaque-root", [layer(file("gone", b"x"), file("d/gone", b"y")), layer(opaque("."), file("stays", b"z"))]
    yield "attributes", [layer(*_attributes())]
    yield "times", [layer(*(file(f"t{n}", mtime=t) for n, t in enumerate(_TIMES)), symlink("l", "t0", mtime=0.25))]
    yield (
        "modes",
        [layer(*(file(f"{m:04o}", mode=m) for m in _MODES), *(directory(f"d{m:04o}", mode=m) for m in _MODES))],
    )
    yield "owners", [layer(*(file(f"o{n}", uid=n, gid=n + 1) for n in (0, 1, 65534, 65535, 2**31, 2**32 - 3)))]
    yield "reserved", [layer(*_reserved())]
    yield "contents", [layer(*_contents())]
    yield "gnu", [layer(file("g" * 200 + "/" + "h" * 120, b"x"), symlink("s", "t" * 300), format=tarfile.GNU_FORMAT)]
    yield "ustar", [layer(file("u" * 90 + "/" + "v" * 90, b"x"), format=tarfile.USTAR_FORMAT)]


def _stacked() -> list[bytes]:
    return [
        layer(
            *(directory(name) for name in ("etc", "usr", "usr/lib", "old", "opt")),
            *(file(f"usr/lib/lib{n}.so", b"%d" % n * 50) for n in range(20)),
            *(file(f"old/{n}", b"old") for n in range(5)),
            file("etc/motd", b"hello"),
            symlink("lib", "usr/lib"),
        ),
        layer(
            directory("usr"),
            directory("usr/lib"),
            file("usr/lib/lib3.so", b"newer"),
            whiteout("usr/lib/lib4.so"),
            directory("old"),
            opaque("old"),
            file("old/new", b"alone"),
            whiteout("opt"),
            hardlink("usr/lib/same.so", "usr/lib/lib3.so"),
        ),
        layer(directory("etc"), whiteout("etc/motd"), directory("opt", mode=0o711), file("opt/again", b"x" * 9000)),
    ]


def _names() -> bytes:
    names = [
        "caf\udce9",
        "\udcff\udcfe",
        "é",
        "e\u0301",
        "日本",
        "new\nline",
        "tab\t",
        "back\\slash",
        "-rf",
        " ",
        "a b",
    ]
    names += [
        '"',
        "'",
        "$HOME",
        "`id`",
        "*",
        "?",
        "[x]",
        "~",
        "#",
        "%s",
        "%2e%2e",
        "con",
        "\x01\x7f",
        "a:b",
        "a,b",
        "a=b",
    ]
    names += ["..x", "...", ".hidden", "wh.", ".w", ".wha", "x.wh.y", "n" * 255, "é" * 127]
    return layer(*(file(f"names/{name}", name.encode("utf-8", "surrogateescape")) for name in names))


def _kinds() -> bytes:
    return layer(
        fifo("pipe", mode=0o600),
        device("null", 1, 3),
        device("disk", 8, 1, block=True),
        device("like-a-whiteout", 0, 0),
        file("setuid", b"#!", mode=0o4755),
        directory("tmp", mode=0o1777),
        directory("empty"),
        file("empty-file"),
        symlink("dangling", "nowhere"),
    )


def _targets() -> Iterator[Member]:
    targets = [
        ".",
        "..",
        "/",
        "//",
        "/..",
        "../../../../../../etc/passwd",
        "loop0",
        "t" * 4095,
        "caf\udce9",
        "a\nb",
        " ",
    ]
    targets += ["$HOME", "$(", "$)", "$x(y)", "a/./b/../c/", "/proc/self/fd/0", "{x}"]
    for number, target in enumerate(targets):
        yield symlink(f"loop{number}", target)


def _hard_links() -> list[bytes]:
    return [
        layer(
            file("a/one", b"1", mode=0o600), *(hardlink(f"b/{n}", "a/one") for n in range(5)), file("big", b"b" * 9000)
        ),
        layer(file("a/one", b"changed below its links"), hardlink("c/low", "b/0"), hardlink("big-too", "big")),
        layer(symlink("s", "a/one"), hardlink("s-again", "s"), fifo("p"), hardlink("p-again", "p"), whiteout("big")),
    ]


def _attributes() -> Iterator[Member]:
    yield file("one", b"x", xattrs={"user.a": b"1"})
    yield file("binary", b"x", xattrs={"user.bytes": bytes(range(1, 256)), "user.empty": b""})
    yield file("largest", b"x", xattrs={"user.value": b"v" * 255})
    yield file("many", b"x", xattrs={f"user.{n}": b"%d" % n for n in range(60)})
    yield directory("d", xattrs={"user.on-a-directory": b"y"})
    yield file("dropped", b"x", xattrs={"security.capability": b"\1\0\0\2" + bytes(16), "trusted.overlay.opaque": b"y"})
    yield directory("overlay", xattrs={"user.overlay.opaque": b"y", "user.containers.override_stat": b"0:0:0755"})


_TIMES = (0, 1, -1, -1_000_000_000.5, 1_600_000_000.123456789, 2**31, 2**32, 2**33 + 0.75, -(2**40), 2**40)
_MODES = (0o000, 0o001, 0o111, 0o200, 0o400, 0o444, 0o600, 0o640, 0o700, 0o1777, 0o2755, 0o4755, 0o6711, 0o7777)


def _reserved() -> Iterator[Member]:
    """Names that mean something to CernVM-FS, or to us, where they mean nothing."""
    for name in (".cvmfsdirtab", ".cvmfsautocatalog", ".cvmfsgraft-x", ".cvmfsbundles", ".cvmfspublished", ".unpacker"):
        yield file(name, name.encode())
    yield directory(".flat/ab")
    yield file(".flat/ab/cd", b"x")
    yield file(".layers", b"x")
    yield directory(".cvmfs")
    yield file(".cvmfs/snapshots", b"x")
    yield file("d/.cvmfscatalog.x", b"x")


def _contents() -> Iterator[Member]:
    """Around the sizes where CernVM-FS cuts files, and such as no compression helps."""
    noise = random.Random(20_201_120).randbytes(21 * _MIB)
    yield file("one-piece", noise[: 4 * _MIB])
    yield file("just-more", noise[: 4 * _MIB + 1])
    yield file("pieces", noise)
    yield file("shifted", b"s" + noise[: 12 * _MIB])
    yield file("zeros", bytes(17 * _MIB))
    yield file("empty")
    yield file("one-byte", b"1")
