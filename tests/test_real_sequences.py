"""Long random sequences of what operators do, judged after every step by the official tools, at a stratum 1, too.

Publishes, updates, names moved to known images, removals, collections of garbage by us and by the official tools; the
repository must be sound to `cvmfs_swissknife check -c`, hold what a model of it says, and replicate. A sample here; a
longer one with `--torture`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cvmfs_repositories import NAME as REPOSITORY
from tests.cvmfs_repositories import needs_swissknife, served
from tests.cvmfs_tools import BWRAP, collected, judged, replicated, scrubbed
from tests.publisher_contract import Contents, release, stored
from unpacker.cvmfs.reader import Reader, node
from unpacker.cvmfs.repository import Repository
from unpacker.publish import unreferenced
from unpacker.publish.stratum0 import Stratum0Publisher
from unpacker.record import Published
from unpacker.tree import File, Symlink

pytestmark = [needs_swissknife, pytest.mark.usefixtures("no_sync")]
STEPS = 20
LONG = 300
NAMES = [f"registry.example.org/{team}/tool:{tag}" for team in ("one", "two", "deep/er") for tag in range(4)]


class Model:
    """A repository, and what ought to be in it: the contents of each public name."""

    def __init__(self, path: Path, url: str, seed: int) -> None:
        self.path, self.url = path, url
        self.repository = path / "repository"
        self.key = f"{self.repository}.keys/{REPOSITORY}.pub"
        self.random = random.Random(seed)
        self.wanted: dict[str, tuple[str, Contents]] = {}
        """By name: the seed of its image, and the contents of that."""
        self.images: dict[str, Contents] = {}
        Repository.create(str(self.repository), REPOSITORY, now=int(time.time()))
        self.publisher = self.open()

    def open(self) -> Stratum0Publisher:
        return Stratum0Publisher(
            str(self.repository), index=f"{self.path}/index", spool_root="/nowhere", configuration="/nowhere"
        )

    # What may happen.

    def publish(self) -> str:
        """One transaction with one to three names, each of a new image, or of one that is known."""
        said = []
        with self.publisher.lock():
            chosen = {}
            for name in self.random.sample(NAMES, self.random.randint(1, 3)):
                seed = self.random.choice([*self.images, "new"])
                if seed == "new":
                    seed = f"{len(self.images)}-{self.random.random()}"
                    self.images[seed] = self.contents()
                # As the reconcile loop does: what exists is not composed again.
                chosen[name] = seed, stored(self.publisher, self.images[seed])
            with self.publisher.transaction("publish") as transaction:
                for name, (seed, tree) in chosen.items():
                    exists = self.publisher.root(release(name, tree, seed=seed).record.image_id, "rules") is not None
                    transaction.publish(release(name, None if exists else tree, seed=seed))
                    said.append(f"{name} = {seed}")
        self.wanted |= {name: (seed, self.images[seed]) for name, (seed, _) in chosen.items()}
        return f"publish {said}"

    def contents(self) -> Contents:
        pieces = [f"{n}".encode() * self.random.choice([1, 100, 5000]) for n in range(5)]
        found: dict[str, bytes | str | None] = {"always/here": b"x"}
        for number in range(self.random.choice([0, 3, 40, 1_500])):
            path = f"d{number % 7}/e{number % 3}/f{number}"
            found[path] = self.random.choice([*pieces, b"", f"../f{number + 1}", None])
        return found

    def remove(self) -> str:
        if not self.wanted:
            return "nothing to remove"
        names = self.random.sample(sorted(self.wanted), self.random.randint(1, min(3, len(self.wanted))))
        with self.publisher.transaction("remove") as transaction:
            transaction.remove(names, now=int(time.time()))
        for name in names:
            del self.wanted[name]
        return f"remove {names}"

    def collect(self) -> str:
        keep, grace = self.random.choice([(0, 0), (0, 0), (1, 0), (1000, 1000)])
        unreferenced.collect(self.publisher, grace=grace, keep=keep, now=time.time() + 1, dry_run=False)
        # A root is taken out by one collection, and its image has to be composed again after that.
        return f"gc, keeping {keep} s, with {grace} s of grace"

    def collect_officially(self) -> str:
        if BWRAP is None:
            return "no bwrap for the official collection"
        checksum = self.path / "checksum"
        log = Repository.open(str(self.repository)).manifest().reflog
        checksum.write_text(f"{log}")
        keys = f"{self.repository}.keys"
        arguments = (str(self.repository), self.url, REPOSITORY, keys, str(checksum), str(self.path))
        verdict = collected(*arguments, younger=int(time.time()) + 1)
        assert verdict.is_sound, verdict.said
        # Only they know the new hash of the reference log; the next transaction puts it right.
        with self.publisher.transaction("mend"):
            pass
        return "official gc"

    def forget(self) -> str:
        """What another host would begin with: no index of known contents, nothing in memory."""
        (self.path / "index").unlink(missing_ok=True)
        self.publisher = self.open()
        return "another host"

    # What must hold.

    def check(self) -> None:
        verdict = judged(str(self.repository))
        assert verdict.is_sound, verdict.said
        standing = self.open().published()
        assert set(standing) == set(self.wanted)
        repository = Repository.open(str(self.repository))
        with Reader(repository.objects, repository.manifest().root) as reader:
            for name, record in standing.items():
                assert isinstance(record, Published)
                assert self.seen(reader, record.root) == self.files(self.wanted[name][1]), name

    def seen(self, reader: Reader, root: str) -> dict[str, bytes | str]:
        found: dict[str, bytes | str] = {}
        for each in reader.walk(f"/{root}"):
            what = node(each)
            path = each.path[len(root) + 2 :]
            if isinstance(what, Symlink):
                found[path] = what.target
            elif isinstance(what, File) and not path.endswith(".cvmfscatalog"):
                with self.publisher.contents.open(what.token) as stream:
                    found[path] = stream.read(100_000)
        return found

    def files(self, contents: Contents) -> dict[str, bytes | str]:
        return {path: what for path, what in contents.items() if what is not None}

    def replicate(self, name: str = "replica") -> str:
        """A stratum 1 comes by; what it has then is sound and what we published."""
        replica = f"{self.path}/{name}"
        url = f"{self.url.removesuffix('repository')}{name}"
        verdict = replicated(self.url, REPOSITORY, self.key, replica, url, str(self.path))
        assert verdict.is_sound, verdict.said
        assert Repository.open(replica).manifest() == Repository.open(str(self.repository)).manifest()
        return "replicated"


@pytest.fixture
def model(tmp_path: Path, pytestconfig: pytest.Config) -> Iterator[Callable[[int], Model]]:
    with served(tmp_path) as url:
        yield lambda seed: Model(tmp_path, f"{url}/repository", seed)


@pytest.mark.timeout(3000)
def test_every_step_of_a_random_sequence_leaves_a_sound_repository(
    model: Callable[[int], Model], pytestconfig: pytest.Config
) -> None:
    torture = pytestconfig.getoption("--torture")
    seed = random.randrange(1 << 30) if torture else 20_201_120
    one = model(seed)
    steps = [one.publish] * 8 + [one.remove] * 3 + [one.collect] * 2 + [one.collect_officially, one.forget]
    done = [f"seed {seed}"]
    try:
        for number in range(LONG if torture else STEPS):
            done.append(one.random.choice(steps)())
            one.check()
            if number % 5 == 0:
                done.append(one.replicate())
                assert scrubbed(str(one.repository)).is_sound
        one.replicate()
        assert scrubbed(f"{one.path}/replica").is_sound
    except BaseException:
        print(*done, sep="\n")
        raise


def test_a_replica_follows_a_first_publish_an_update_a_removal_and_our_collection(
    model: Callable[[int], Model], tmp_path: Path
) -> None:
    """One that came by each time, and one that begins only then."""
    one = model(0)
    for number, change in enumerate((one.publish, one.publish, one.remove, one.collect, one.publish, one.collect)):
        change()
        one.check()
        for name in ("follows", f"begins-{number}"):
            one.replicate(name)
            assert scrubbed(f"{tmp_path}/{name}").is_sound


def test_a_replica_that_missed_revisions_which_were_collected_catches_up(model: Callable[[int], Model]) -> None:
    """It looks for the former revisions of every catalog, and stops where one that is named is gone."""
    one = model(0)
    for _ in range(2):
        for _ in range(4):
            one.publish()
        unreferenced.collect(one.publisher, grace=0, keep=0, now=time.time() + 1, dry_run=False)
        one.replicate()
