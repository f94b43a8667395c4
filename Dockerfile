# unpacker in a container:
#
#   buildah build -t unpacker .
#   podman run --rm --userns=keep-id -v /srv/unpacked:/srv/unpacked -v "$PWD:/wishlist:ro" -w /wishlist \
#       unpacker reconcile wishlist.yaml --target /srv/unpacked --wishlist-id https://git.example.org/lists
#
# The last says who the wishlist is, as a small BASE has no git to ask.
#
# BASE is any image with Python 3.11 or later and its venv module; on Debian these are python3 and python3-venv.
ARG BASE=docker.io/library/python:3.12-slim

FROM ${BASE} AS build
# For a build without a network: a mounted directory of wheels (PIP_FIND_LINKS) and no index (PIP_NO_INDEX=1), or a
# mirror of the index. pip reads all of these from the environment.
ARG PIP_FIND_LINKS
ARG PIP_INDEX_URL
ARG PIP_NO_INDEX
COPY pyproject.toml README.md /src/
COPY unpacker /src/unpacker
# An environment of its own leaves the base's Python alone, and is one directory to take into the final image. pip is
# not needed there. The byte code is, since the user who runs this can write none.
RUN python3 -m venv /opt/unpacker \
 && /opt/unpacker/bin/pip install --no-cache-dir --disable-pip-version-check /src \
 && /opt/unpacker/bin/pip uninstall --yes --quiet pip setuptools

FROM ${BASE}
COPY --from=build /opt/unpacker /opt/unpacker
# Any uid may run this (--user, --userns=keep-id, a random one as OpenShift gives): the state directory takes them all.
RUN install -d -m 1777 /var/lib/unpacker
ENV PATH=/opt/unpacker/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
ENTRYPOINT ["unpacker"]
CMD ["--help"]
