"""OSG's docker_images.txt read as a wishlist: one image per line, `#` at the start of a line is a comment.

Its rules, as cvmfs-singularity-sync has them: one part is an image in Docker Hub's `library`; two are namespace and
repository on Docker Hub; of three and more, the first is the registry. Without a tag it is `latest`. A tag may be a
glob.
"""

from __future__ import annotations

from dataclasses import replace

from unpacker.claims import Claims
from unpacker.document import Findings, Scalar, shown
from unpacker.oci import Platform
from unpacker.reference import TagPattern
from unpacker.wish import read_image

DEFAULT_REGISTRY = "registry.hub.docker.com"
DEFAULT_TAG = "latest"


def read_imagelist(text: str, platform: Platform, claims: Claims, findings: Findings) -> None:
    """Reads every line of a list."""
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1):
        image = line.strip(" \t")
        if image and not line.startswith("#"):
            at = Scalar(line=number, column=line.index(image) + 1, text=image)
            _read_line(at, platform, claims, findings)


def _read_line(at: Scalar, platform: Platform, claims: Claims, findings: Findings) -> None:
    if at.text.startswith("#"):
        findings.warn(at, "a comment starts with # at the very start of its line; read as one all the same")
        return
    if "://" in at.text:
        findings.fault(at, f"a list has no schemes: {shown(at.text)} (write registry/namespace/repository:tag)")
        return
    parts = at.text.split("/")
    if len(parts) == 2 and any(c in parts[0] for c in ".:@"):
        findings.fault(
            at,
            f"two parts are read as a namespace and a repository on Docker Hub, which {shown(parts[0])} is not "
            f"(with a registry write all of registry/namespace/repository:tag)",
        )
        return
    prefix = {1: f"{DEFAULT_REGISTRY}/library/", 2: f"{DEFAULT_REGISTRY}/"}.get(len(parts), "")
    wish = read_image(prefix + at.text, at, findings, platform)
    if wish is not None and not wish.tags and wish.digest is None:
        wish = replace(wish, tags=(TagPattern.parse(DEFAULT_TAG),))
    if wish is not None:
        claims.admit(wish, findings)
