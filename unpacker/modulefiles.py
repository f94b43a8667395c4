"""Lmod modulefiles for published images, and the wrapper that runs programs in the image that a module chose. Pure.

    modulefiles/<image>/<tag>.lua    sets what the wrapper needs
    bin/singularity_wrapper          shell [SHELL], exec COMMAND, run [PARAMETERS]

An image is called as users call it: its repository, with the registry in front unless that is Docker Hub, whose own
`library/` is left out. A tag is the version.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unpacker.reference import DOCKER_HUB_SPELLINGS

WRAPPER = "bin/singularity_wrapper"
MODULEFILES = "modulefiles"
_TEXT_LIMIT = 2_000
_PLAIN = re.compile(r"[^ !#-\[\]-~]")
_DESCRIPTION = ("org.opencontainers.image.description", "description", "org.opencontainers.image.title")
_PAGE = ("org.opencontainers.image.documentation", "org.opencontainers.image.url", "org.opencontainers.image.source")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loadable:
    """A published image: its public name, the absolute path that users open, what it says of itself."""

    name: str
    path: str
    gpu: bool = False
    labels: Mapping[str, str]


def module_name(public_name: str) -> str:
    """What to load: `alpine/3.10`, `ghcr.io/org/tool/1.0`."""
    head, _, last = public_name.rpartition("/")
    repository, _, tag = last.partition(":")
    registry, _, below = f"{head}/{repository}".partition("/")
    # Everywhere in a module's name a colon would be a surprise to one tool or another.
    version = tag.replace(":", "-")
    if registry in DOCKER_HUB_SPELLINGS:
        return f"{below.removeprefix('library/')}/{version}"
    return f"{registry.replace(':', '-')}/{below}/{version}"


def files(images: Sequence[Loadable], wrapper: str, wrapper_directory: str) -> dict[str, str]:
    """The modulefiles of images by their paths, and the wrapper; `wrapper_directory` is where that will lie. Of two
    images that are called alike, which only the spellings of Docker Hub and tags spelled like a digest bring about, the
    one by digest has it, else the first by its name."""
    found = {WRAPPER: wrapper}
    for image in sorted(images, key=lambda image: (not _is_by_digest(image.name), image.name)):
        path = f"{MODULEFILES}/{module_name(image.name)}.lua"
        found.setdefault(path, modulefile(image, wrapper_directory))
    return found


def _is_by_digest(public_name: str) -> bool:
    return ":" in public_name.rpartition("/")[2].partition(":")[2]


def modulefile(image: Loadable, wrapper_directory: str) -> str:
    """One modulefile, in Lua."""
    name, _, version = module_name(image.name).rpartition("/")
    description = _label(image.labels, _DESCRIPTION)
    page = _label(image.labels, _PAGE)
    told = [
        f"Runs programs in the container image {image.name}.",
        *((description,) if description else ()),
        *((f"See {page}",) if page else ()),
        "singularity_wrapper run [PARAMETERS]   what the image is made to run",
        "singularity_wrapper exec COMMAND ...   a command in it",
        "singularity_wrapper shell [SHELL]      a shell in it",
    ]
    lines = [
        "-- Written by `unpacker modules`, which overwrites and removes it.",
        f"help({lua(chr(10).join(told))})",
        f"whatis({lua(f'Name: {name}')})",
        f"whatis({lua(f'Version: {version}')})",
        *((f"whatis({lua(f'Description: {description}')})",) if description else ()),
        *((f"whatis({lua(f'URL: {page}')})",) if page else ()),
        'family("container_image")',
        f'setenv("SING_IMAGE", {lua(image.path)})',
        f'setenv("SING_GPU", {lua("1" if image.gpu else "0")})',
        f'prepend_path("PATH", {lua(wrapper_directory)})',
    ]
    return "\n".join(lines) + "\n"


def _label(labels: Mapping[str, str], keys: Sequence[str]) -> str:
    return next((text for key in keys if (text := _on_one_line(labels.get(key, "")[:_TEXT_LIMIT]))), "")


def _on_one_line(text: str) -> str:
    # Whoever made the image wrote it: it must not move the cursor of who asks for help on a module.
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def lua(text: str) -> str:
    """A string of Lua that is this text, byte for byte, whatever is in it."""
    data = text.encode("utf-8", "surrogateescape").decode("latin-1")
    return '"' + _PLAIN.sub(lambda match: f"\\{ord(match[0]):03d}", data) + '"'


def labels_of(data: bytes | None) -> dict[str, str]:
    """The labels in the bytes of an image's `labels.json`; none if that is not what it should be."""
    try:
        value = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return {k: v for k, v in value.items() if isinstance(v, str)} if isinstance(value, dict) else {}


def wrapper(apptainer: str, binds: Sequence[str], gpu_options: Sequence[str]) -> str:
    """The shell script `singularity_wrapper`, with a site's paths, command and options in it."""
    bound = "".join(
        f'[ ! -e {shlex.quote(bind.partition(":")[0])} ] || set -- --bind {shlex.quote(bind)} "$@"\n'
        for bind in reversed(binds)
    )
    gpu = " ".join(map(shlex.quote, gpu_options))
    return _WRAPPER.format(apptainer=shlex.quote(apptainer), binds=bound, gpu=gpu)


_WRAPPER = """\
#!/bin/sh
# Runs programs in the image that a module chose. Written by `unpacker modules`, which overwrites it.
#
#   SING_IMAGE   the image: a module sets it
#   SING_GPU     1 if it wants a GPU: a module sets it
#   SING_FLAGS   further options for {apptainer}, separated by blanks
set -u

usage() {{
    cat >&2 <<'END'
usage: singularity_wrapper run [PARAMETERS]     what the image is made to run
       singularity_wrapper exec COMMAND [...]   a command in the image
       singularity_wrapper shell [SHELL [...]]  a shell in the image
END
    exit 2
}}

[ $# -ge 1 ] || usage
verb=$1
shift
case $verb in
run) ;;
exec) [ $# -ge 1 ] || usage ;;
shell) [ $# -eq 0 ] || verb='exec' ;;
*) usage ;;
esac
if [ -z "${{SING_IMAGE:-}}" ]; then
    echo "singularity_wrapper: no image: load the module of one first" >&2
    exit 2
fi

set -- "$SING_IMAGE" "$@"
set -f
# shellcheck disable=SC2086
set -- ${{SING_FLAGS:-}} "$@"
[ "${{SING_GPU:-0}}" != 1 ] || set -- {gpu} "$@"
{binds}exec {apptainer} "$verb" --pwd "$PWD" "$@"
"""
