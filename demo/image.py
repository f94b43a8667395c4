"""The images of the demonstration: a few layers on a base that this machine can get, under several tags.

1.0   base + the first release of `hello`
1.1   the same + a layer that changes one file, hides another and empties a directory
1.2   the same as 1.1 + one more file (pushed later)
2.0   base + another program
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import Any

from demo import debian
from tests.images import BuiltImage, Member, directory, file, image, layer, opaque, symlink, whiteout

HELLO = """\
#!/bin/sh
echo "$(cat /usr/share/hello/greeting)"
echo "I am hello $(cat /usr/share/hello/version), process $$, in a root with these names: $(echo /*)"
echo "My system is $(. /etc/os-release; echo "$PRETTY_NAME"); may I write here? $(
    if (: >/probe) 2>/dev/null; then echo yes; else echo "no, the root is read-only"; fi)"
"""

MOUNT_POINTS = ("dev", "proc", "sys", "tmp")


class NoBase(Exception):
    """Nothing on this machine can serve as a base layer."""


def base(packages: str) -> tuple[bytes, str]:
    """The base layer and what it was made of: Debian's static busybox, else this machine's shell and its libraries."""
    unpacked = debian.unpack("busybox-static", packages)
    busybox = os.path.join(unpacked, "bin", "busybox") if unpacked else shutil.which("busybox")
    if busybox and _is_static(busybox):
        origin = "Debian's package busybox-static" if unpacked else f"this machine's {busybox}"
        return layer(*_skeleton(), *_busybox(busybox)), origin
    return layer(*_skeleton(), *_own_shell()), "this machine's own shell, cat and ls, and the libraries they load"


def releases(base_layer: bytes, architecture: str) -> dict[str, BuiltImage]:
    """The images by tag, for this machine's architecture."""
    first = layer(
        file("usr/bin/hello", HELLO.encode(), mode=0o755),
        directory("usr/share/hello"),
        file("usr/share/hello/version", b"1.0\n"),
        file("usr/share/hello/greeting", b"Hello.\n"),
        file("usr/share/hello/old-notes", b"Hidden by 1.1.\n"),
        directory("usr/share/hello/examples"),
        file("usr/share/hello/examples/one", b"1\n"),
        file("usr/share/hello/examples/two", b"2\n"),
    )
    second = layer(
        file("usr/share/hello/version", b"1.1\n"),
        file("usr/share/hello/greeting", b"Hello from an unpacked image.\n"),
        whiteout("usr/share/hello/old-notes"),
        opaque("usr/share/hello/examples"),
        file("usr/share/hello/examples/only", b"Alone since 1.1.\n"),
    )
    third = layer(file("usr/share/hello/version", b"1.2\n"))
    other = layer(file("usr/bin/goodbye", b"#!/bin/sh\necho Goodbye.\n", mode=0o755))
    start: dict[str, Any] = {
        "architecture": architecture,
        "Entrypoint": ["/usr/bin/hello"],
        "Env": ["PATH=/usr/bin:/bin"],
    }
    return {
        "1.0": image(base_layer, first, **start),
        "1.1": image(base_layer, first, second, **start),
        "1.2": image(base_layer, first, second, third, **start),
        "2.0": image(base_layer, other, **start | {"Entrypoint": ["/usr/bin/goodbye"]}),
    }


def _skeleton() -> list[Member]:
    release = 'NAME="unpacker demo"\nPRETTY_NAME="the unpacker demo"\nID=demo\n'
    return [
        *(directory(name) for name in ("bin", "etc", "usr", "usr/bin", "usr/share", *MOUNT_POINTS)),
        file("etc/os-release", release.encode()),
        file("etc/passwd", b"root:x:0:0:root:/:/bin/sh\n"),
        file("etc/group", b"root:x:0:\n"),
    ]


def _busybox(path: str) -> list[Member]:
    applets = subprocess.run([path, "--list"], capture_output=True, text=True, check=True).stdout.split()
    with open(path, "rb") as program:
        members = [file("bin/busybox", program.read(), mode=0o755)]
    return members + [symlink(f"bin/{applet}", "busybox") for applet in applets if applet != "busybox"]


def _is_static(path: str) -> bool:
    return not _libraries(path)


def _libraries(path: str) -> list[str]:
    """The shared libraries that a program loads, the loader among them; none for a static one."""
    answer = subprocess.run(["ldd", path], capture_output=True, text=True)
    return re.findall(r"(?:^\s+|=> )(/\S+) \(0x", answer.stdout, re.MULTILINE)


def _own_shell() -> list[Member]:
    contents: dict[str, str] = {}
    for name in ("sh", "cat", "ls"):
        path = shutil.which(name)
        if path is None or shutil.which("ldd") is None:
            raise NoBase(
                "no base layer to be had: neither Debian's busybox-static (apt-get update; it needs a network)"
                " nor this machine's own shell and ldd"
            )
        contents[f"bin/{name}"] = path
        contents |= {library.lstrip("/"): library for library in _libraries(path)}
    parents = sorted({parent for path in contents for parent in _parents(path)} - {"bin", "usr"})
    members = [directory(parent) for parent in parents]
    for name, path in contents.items():
        with open(path, "rb") as source:
            members.append(file(name, source.read(), mode=0o755))
    return members


def _parents(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[: n + 1]) for n in range(len(parts))]
