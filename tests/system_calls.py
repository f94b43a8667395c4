"""What a program asked the kernel to do to files, in order, as `strace` saw it; and what of it was not yet durable
when it became final.

A call that other threads' calls came between has a beginning and an end of its own. To be on the safe side a write
counts from its end on, a sync covers what had ended when it began and counts when it ends, a rename takes place when
it begins.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_CHANGES = (
    "open,openat,creat,mkdir,mkdirat,mknod,mknodat,symlink,symlinkat,link,linkat,"
    "write,writev,pwrite64,pwritev,pwritev2,copy_file_range,sendfile,splice,truncate,ftruncate,fallocate,"
    "chmod,fchmod,fchmodat,chown,fchown,lchown,fchownat,utimensat,setxattr,fsetxattr,lsetxattr"
)
_RENAMES = ("rename", "renameat", "renameat2")
_SYNCS = ("sync", "syncfs", "fsync", "fdatasync")
_LINE = re.compile(r"(\d+) +(.*)", re.DOTALL)
_CALL = re.compile(r"(\w+)\((.*)\) += (-?\w+)", re.DOTALL)
_RESUMED = re.compile(r"<\.\.\. (\w+) resumed>(.*)", re.DOTALL)
_UNFINISHED = " <unfinished ...>"
_TEXT = r'"((?:[^"\\]|\\.)*)"'
_NAMED = re.compile(rf"(?:(?:AT_FDCWD|\d+)(?:<([^>]*)>)?, )?{_TEXT}")
_DESCRIPTOR = re.compile(r"\d+<([^>]*)>")


@dataclass(frozen=True, slots=True)
class Call:
    """One successful call: what it did, to which absolute paths, and the lines at which it began and ended."""

    name: str
    paths: tuple[str, ...]
    began: int
    ended: int

    @property
    def is_sync(self) -> bool:
        return self.name in _SYNCS

    @property
    def is_rename(self) -> bool:
        return self.name in _RENAMES


def why_not() -> str:
    """Why no program can be traced here; nothing if one can."""
    if shutil.which("strace") is None:
        return "strace is not installed (apt install strace)"
    tried = subprocess.run(
        ["strace", "-f", "-o", "/dev/null", "true"], capture_output=True, text=True, timeout=30, check=False
    )
    return f"strace may not trace here: {tried.stderr.strip()}" if tried.returncode else ""


def traced(command: Sequence[str], log: Path) -> list[str]:
    """A command that does the same and leaves its calls in `log`."""
    names = ",".join((_CHANGES, *_RENAMES, *_SYNCS))
    # With the filter only these calls stop the program, which is ten times faster, where the kernel can do it.
    can_filter = "--seccomp-bpf" in subprocess.run(["strace", "--help"], capture_output=True, text=True).stdout
    options = ["--seccomp-bpf"] if can_filter else []
    # Bytes written are of no interest, names are, whole.
    return ["strace", "-f", *options, "-y", "-s", "4096", "-e", f"trace={names}", "-o", str(log), *command]


def read(log: Iterable[str]) -> list[Call]:
    """The calls of a log that succeeded and changed something."""
    pending: dict[str, tuple[int, str]] = {}
    calls = []
    for number, line in enumerate(log):
        match = _LINE.fullmatch(line.rstrip("\n"))
        if match is None:
            continue
        process, text = match.groups()
        began = number
        if text.endswith(_UNFINISHED):
            pending[process] = (number, text.removesuffix(_UNFINISHED))
            continue
        if resumed := _RESUMED.fullmatch(text):
            began, start = pending.pop(process)
            text = start + resumed[2]
        if (call := _CALL.match(text)) and not call[3].startswith("-"):
            calls += _understood(call[1], call[2], began, number)
    return calls


def _understood(name: str, arguments: str, began: int, ended: int) -> Iterator[Call]:
    if name in ("open", "openat") and "O_CREAT" not in arguments and "O_TRUNC" not in arguments:
        return
    named = [_joined(*found) for found in _NAMED.findall(arguments)]
    described = _DESCRIPTOR.findall(arguments)
    if name in ("symlink", "symlinkat"):
        # The first text is what the link says.
        paths = [_joined(*_NAMED.findall(arguments.partition('", ')[2])[0])]
    elif name in (*_RENAMES, "link", "linkat"):
        paths = named[:2] if name in _RENAMES else named[1:2]
    elif name in ("copy_file_range", "splice"):
        paths = described[1:2]
    elif name.startswith(("f", "write", "pwrite", "sendfile", "sync")) and not name.endswith("at"):
        paths = described[:1]
    else:
        paths = named[:1] or described[:1]
    if paths or name == "sync":
        yield Call(name, tuple(paths), began, ended)


def _joined(directory: str, name: str) -> str:
    return name if name.startswith("/") else f"{directory}/{name}"


@dataclass(frozen=True, slots=True)
class Final:
    """Something that got its final name: which, from which temporary one, how many syncs had ended before it began,
    and what of it could still have been lost then."""

    path: str
    source: str
    syncs: int
    lost: tuple[str, ...]


def finals(calls: Iterable[Call], root: str, temporary: re.Pattern[str]) -> list[Final]:
    """Every rename below `root` to what is not `temporary` (a pattern over paths below the root)."""
    steps: list[tuple[int, int, Call]] = []
    for call in calls:
        steps.append((call.began, 0, call))
        steps.append((call.ended, 1, call))
    unsynced: dict[str, int] = {}  # by path, when its last change ended
    syncs = 0
    found = []
    for _, at_end, call in sorted(steps, key=lambda step: step[:2]):
        inside = [path for path in call.paths if path.startswith(f"{root}/") or path == root]
        if call.is_sync and at_end:
            syncs += 1
            whole = call.name in ("sync", "syncfs")
            for path in [p for p, when in unsynced.items() if when < call.began and (whole or p in inside)]:
                del unsynced[path]
        elif call.is_rename and len(inside) == 2 and not at_end:
            source, path = inside
            lost = tuple(p for p in unsynced if p == source or p.startswith(f"{source}/"))
            if not temporary.match(path.removeprefix(f"{root}/")):
                found.append(Final(path.removeprefix(f"{root}/"), source.removeprefix(f"{root}/"), syncs, lost))
            for old in lost:
                unsynced[path + old.removeprefix(source)] = unsynced.pop(old)
        elif not call.is_sync and at_end:
            unsynced.update(dict.fromkeys(inside[-1:], call.ended))
    return found
