"""The lines that run a published image, for each system that users run images with. Pure.

Each consumer's own syntax, as its documents describe it; what stands in a line is quoted as that syntax quotes it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from xml.sax.saxutils import quoteattr


@dataclass(frozen=True, slots=True, kw_only=True)
class Usable:
    """A published image as its users have it: the absolute `path` that they open, and what it needs.

    `apptainer` is the command that a site has for it, `module` how `unpacker modules` calls the image, if it does.
    """

    path: str
    gpu: bool = False
    apptainer: str = "apptainer"
    module: str = ""


def lines(consumer: str, image: Usable) -> tuple[str, ...]:
    """What to write for one consumer; ValueError if its syntax cannot express the path."""
    if not image.path.isprintable():
        raise ValueError(f"a path with control characters: {image.path!r}")
    return CONSUMERS[consumer](image)


def _command(image: Usable, verb: str) -> str:
    return f"{image.apptainer} {verb}{' --nv' if image.gpu else ''} {shlex.quote(image.path)}"


def _apptainer(image: Usable) -> tuple[str, ...]:
    return (
        _command(image, "run"),
        f"{_command(image, 'exec')} cat /etc/os-release",
        _command(image, "shell"),
    )


def _prun(image: Usable) -> tuple[str, ...]:
    path = shlex.quote(image.path)
    return (f'prun --containerImage {path} --exec "cat /etc/os-release" --outDS "user.$RUCIO_ACCOUNT.test"',)


def _ganga(image: Usable) -> tuple[str, ...]:
    return (
        f"j.virtualization = Singularity({image.path!r})",
        *(("j.virtualization.mounts = {'/cvmfs': '/cvmfs'}",) if image.path.startswith("/cvmfs/") else ()),
        *(("j.virtualization.options = ['--nv']",) if image.gpu else ()),
    )


def _htcondor(image: Usable) -> tuple[str, ...]:
    # A dollar sign begins a macro in both files; in the second one the value is a string of ClassAds besides.
    path = image.path.replace("$", "$(DOLLAR)")
    text = path.replace("\\", "\\\\").replace('"', '\\"')
    return (
        "# in the submit file of a job",
        "universe = container",
        f"container_image = {path}",
        *(("request_gpus = 1",) if image.gpu else ()),
        "# or in the configuration of an execution point, for all of its jobs",
        "SINGULARITY_JOB = true",
        f'SINGULARITY_IMAGE_EXPR = "{text}"',
        "SINGULARITY_TARGET_DIR = /srv",
        "MOUNT_UNDER_SCRATCH = /tmp, /var/tmp",
    )


def _glideinwms(image: Usable) -> tuple[str, ...]:
    if "," in image.path:
        raise ValueError(f"GlideinWMS takes no path with a comma: {image.path!r}")
    value = quoteattr(f"default:{image.path}")
    text = image.path.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$(DOLLAR)")
    return (
        "<!-- in the configuration of the frontend or a group, for all jobs -->",
        '<attr name="SINGULARITY_IMAGES_DICT" glidein_publish="True" job_publish="True" parameter="True" type="string" '
        f"value={value}/>",
        "# or in the submit file of a job",
        f'+SingularityImage = "{text}"',
    )


def _parsl(image: Usable) -> tuple[str, ...]:
    prepend = _command(image, "exec")
    return (
        "from parsl.executors import HighThroughputExecutor",
        "from parsl.launchers import WrappedLauncher",
        "from parsl.providers import LocalProvider",
        f"launcher = WrappedLauncher(prepend={prepend!r})",
        "executor = HighThroughputExecutor(label='image', provider=LocalProvider(launcher=launcher))",
    )


def _reana(image: Usable) -> tuple[str, ...]:
    # Text in JSON's form is text in YAML's.
    return (
        f"environment: {json.dumps(image.path)}",
        "unpacked_img: true",
        "compute_backend: htcondorcern  # or slurmcern",
    )


def _podman(image: Usable) -> tuple[str, ...]:
    gpu = " --device nvidia.com/gpu=all" if image.gpu else ""
    # The root itself and not the link to it: a colon in the path would be read as the beginning of options.
    return (f'podman run --rm -it{gpu} --rootfs "$(readlink -f {shlex.quote(image.path)})":O sh',)


def _module(image: Usable) -> tuple[str, ...]:
    if not image.module:
        raise ValueError(f"there are modules of images, but not of one platform of them: {image.path!r}")
    return (
        f"module load {shlex.quote(image.module)}",
        "singularity_wrapper run",
        "singularity_wrapper exec cat /etc/os-release",
        "singularity_wrapper shell sh",
    )


CONSUMERS: Mapping[str, Callable[[Usable], tuple[str, ...]]] = {
    "apptainer": _apptainer,
    "prun": _prun,
    "ganga": _ganga,
    "htcondor": _htcondor,
    "glideinwms": _glideinwms,
    "parsl": _parsl,
    "reana": _reana,
    "podman": _podman,
    "module": _module,
}
"""By the name that users give, in the order in which all are shown."""
