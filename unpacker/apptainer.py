"""What Apptainer and Singularity read in a root: `.singularity.d` from an image's config, as for a docker:// image.

Pure: from a config to the texts of files. The names, the variables and the form of the environment script are
Apptainer's, because it treats `10-docker2singularity.sh`, `99-base.sh` and a runscript with the line that evaluates
SINGULARITY_OCI_RUN apart from others. Every text runs in any POSIX shell, and nothing of the config is ever evaluated
by it: not in the environment, not in ENTRYPOINT or CMD.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from unpacker.additions import Addition, directory, file, symlink
from unpacker.oci import ImageConfig

HOME = ".singularity.d"

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_QUOTED = str.maketrans({"\\": "\\\\", '"': '\\"', "`": "\\`", "$": "\\$", "\0": None})
"""Within double quotes. A NUL can be in no variable and no argument; shells leave it out when they read a script."""

_SHEBANG = "#!/bin/sh\n"

_ENVIRONMENT = """\
for file in /.singularity.d/env/*.sh; do
    if [ -f "$file" ]; then . "$file"; fi
done
"""
"""What an action begins with, where it is the image's own: releases of Singularity before 3.6."""


def _of_app_or_image(script: str) -> str:
    """Runs a script of the application that is asked for, if one is, else the image's, if it has one."""
    return f"""
if [ -n "${{SINGULARITY_APPNAME:-}}" ]; then
    for app in "$SINGULARITY_APPNAME" singularity; do
        if [ -x "/scif/apps/$app/scif/{script}" ]; then exec "/scif/apps/$app/scif/{script}" "$@"; fi
    done
    echo "This container has no {script} for the application $SINGULARITY_APPNAME" >&2
    exit 1
fi
if [ -x /.singularity.d/{script} ]; then exec /.singularity.d/{script} "$@"; fi
"""


_ACTIONS = {
    "exec": """
exec "$@"
""",
    "run": _of_app_or_image("runscript") + 'exec /bin/sh "$@"\n',
    "shell": """
if [ -n "${SINGULARITY_SHELL:-}" ] && [ -x "$SINGULARITY_SHELL" ]; then exec "$SINGULARITY_SHELL" "$@"; fi
if [ -x /bin/bash ]; then
    SHELL=/bin/bash
    export SHELL
    exec /bin/bash --norc "$@"
fi
SHELL=/bin/sh
export SHELL
exec /bin/sh "$@"
""",
    # The instance's first process waits for this signal before it says that the instance has started.
    "start": """
kill -CONT 1
if [ -x /.singularity.d/startscript ]; then exec /.singularity.d/startscript "$@"; fi
""",
    "test": _of_app_or_image("test"),
}

_APPS = """\
# The environment of one application (--app) of an image with applications as SCIF has them.
if [ -n "${SINGULARITY_APPNAME:-}" ]; then
    SCIF_APPS=/scif/apps
    SCIF_APPROOT="$SCIF_APPS/$SINGULARITY_APPNAME"
    if [ ! -d "$SCIF_APPROOT" ]; then
        echo "This container has no application $SINGULARITY_APPNAME" >&2
        exit 1
    fi
    PATH="$SCIF_APPROOT:$SCIF_APPS/singularity:$PATH"
    for SCIF_PART in "$SCIF_APPROOT" "$SCIF_APPS/singularity"; do
        if [ -d "$SCIF_PART/bin" ]; then PATH="$SCIF_PART/bin:$PATH"; break; fi
    done
    for SCIF_PART in "$SCIF_APPROOT" "$SCIF_APPS/singularity"; do
        if [ -d "$SCIF_PART/lib" ]; then
            LD_LIBRARY_PATH="$SCIF_PART/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
            export LD_LIBRARY_PATH
            break
        fi
    done
    for SCIF_PART in 01-base 90-environment; do
        if [ -f "$SCIF_APPROOT/scif/env/$SCIF_PART.sh" ]; then
            . "$SCIF_APPROOT/scif/env/$SCIF_PART.sh"
        elif [ -f "$SCIF_APPS/singularity/scif/env/$SCIF_PART.sh" ]; then
            . "$SCIF_APPS/singularity/scif/env/$SCIF_PART.sh"
        fi
    done
    unset SCIF_PART
    export SINGULARITY_APPNAME SCIF_APPS SCIF_APPROOT PATH
fi
"""

_BASE = """\
# Libraries that the host lends to the container (--nv, --rocm) are found last.
LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/.singularity.d/libs"
PS1="${PS1:-Apptainer> }"
export LD_LIBRARY_PATH PS1
"""

_RUNTIME_VARIABLES = """\
# What the user set with SINGULARITYENV_PREPEND_PATH and the like; newer releases bring this file themselves.
PATH="${SING_USER_DEFINED_PREPEND_PATH:+$SING_USER_DEFINED_PREPEND_PATH:}$PATH"
PATH="$PATH${SING_USER_DEFINED_APPEND_PATH:+:$SING_USER_DEFINED_APPEND_PATH}"
PATH="${SING_USER_DEFINED_PATH:-$PATH}"
unset SING_USER_DEFINED_PREPEND_PATH SING_USER_DEFINED_APPEND_PATH SING_USER_DEFINED_PATH
export PATH
"""

_LINKS = {
    "singularity": "runscript",
    ".run": "actions/run",
    ".exec": "actions/exec",
    ".test": "actions/test",
    ".shell": "actions/shell",
    "environment": "env/90-environment.sh",
}


def additions(config: ImageConfig) -> Iterator[Addition]:
    """`.singularity.d` and the links to it. Where an image has some of it, built from a definition, that wins."""
    yield directory(f"{HOME}/libs")
    for name, text in _ACTIONS.items():
        yield _script(f"actions/{name}", _ENVIRONMENT + text)
    yield _script("env/01-base.sh", "")
    yield _script("env/10-docker2singularity.sh", _environment(config.env))
    yield _script("env/90-environment.sh", "# What an image built from a definition sets in %environment.\n")
    yield _script("env/95-apps.sh", _APPS)
    yield _script("env/99-base.sh", _BASE)
    yield _script("env/99-runtimevars.sh", _RUNTIME_VARIABLES)
    yield _script("runscript", _runscript(config.entrypoint, config.cmd))
    yield _script("startscript", "")
    yield file(f"{HOME}/labels.json", _labels(config).encode("ascii"))
    for name, target in _LINKS.items():
        yield symlink(name, f"{HOME}/{target}")


def _script(name: str, text: str) -> Addition:
    # JSON can bring half a surrogate pair by way of its encoding, too; it shall not cost the image.
    return file(f"{HOME}/{name}", (_SHEBANG + text).encode("utf-8", "surrogatepass"), mode=0o755)


def _environment(variables: Sequence[str]) -> str:
    """The image's variables, in their order. What is set already stays, so the first of two of a name counts; but PATH
    is always the image's. What no shell can name is left out."""
    lines = []
    for variable in variables:
        name, equals, value = variable.partition("=")
        if not _VARIABLE.fullmatch(name):
            continue
        quoted = f'"{value.translate(_QUOTED)}"' if equals else ""
        lines.append(
            f"export PATH={quoted}\n" if name == "PATH" and equals else f'export {name}="${{{name}:-{quoted}}}"\n'
        )
    return "".join(lines)


_RUNSCRIPT = """\
# ENTRYPOINT and CMD of the image; arguments take the place of CMD.
OCI_ENTRYPOINT={entrypoint}
OCI_CMD={cmd}

if [ -n "${{SINGULARITY_NO_EVAL:-}}" ]; then
    if [ $# -eq 0 ]; then set -- {cmd_words}; fi
    set -- {entrypoint_words} "$@"
    exec "$@"
fi

# Unless told not to (--no-eval), Apptainer has the shell evaluate the user's arguments once more, in double quotes.
SINGULARITY_OCI_RUN="-- ${{OCI_ENTRYPOINT}}"
if [ $# -eq 0 ]; then SINGULARITY_OCI_RUN="${{SINGULARITY_OCI_RUN}} ${{OCI_CMD}}"; fi
for SINGULARITY_OCI_ARGUMENT in "$@"; do
    SINGULARITY_OCI_RUN="${{SINGULARITY_OCI_RUN}} \\"${{SINGULARITY_OCI_ARGUMENT}}\\""
done
# By this line Apptainer knows that it may run this script itself, in an image without a shell.
eval "set ${{SINGULARITY_OCI_RUN}}"
exec "$@"
"""


def _runscript(entrypoint: Sequence[str], cmd: Sequence[str]) -> str:
    """Runs ENTRYPOINT with CMD or with arguments."""
    return _RUNSCRIPT.format(
        entrypoint=_single(_in_double_quotes(entrypoint)),
        cmd=_single(_in_double_quotes(cmd)),
        entrypoint_words=" ".join(map(_single, entrypoint)),
        cmd_words=" ".join(map(_single, cmd)),
    )


def _in_double_quotes(words: Sequence[str]) -> str:
    return " ".join(f'"{word.translate(_QUOTED)}"' for word in words)


def _single(text: str) -> str:
    """One word of a shell, whatever is in it."""
    return "'" + text.replace("\0", "").replace("'", "'\"'\"'") + "'"


def _labels(config: ImageConfig) -> str:
    """The image's labels, and what Apptainer adds to them as far as the config tells it."""
    labels = {
        "org.label-schema.schema-version": "1.0",
        "org.label-schema.build-arch": config.platform.architecture,
        "org.label-schema.usage.singularity.deffile.bootstrap": "docker",
    }
    if config.created:
        labels["org.label-schema.build-date"] = config.created
    return json.dumps(labels | dict(config.labels), indent="\t", sort_keys=True)
