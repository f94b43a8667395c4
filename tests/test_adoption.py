"""Taking over a directory that DUCC or cvmfs-singularity-sync published: what users find there afterwards."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.cvmfs_repositories import NAME as REPOSITORY
from tests.cvmfs_repositories import NOW, SWISSKNIFE, swissknife_check
from tests.fake_registry import FakeRegistry
from tests.images import file, image, layer
from tests.predecessor_trees import DuccTree, Generation, OsgTree
from tests.test_inherited import APP, BOTH, OTHER
from tests.test_publish_stratum0 import edit_by_hand
from tests.test_reconcile import Site, done
from unpacker.audit import audit
from unpacker.changeset import Entry, Kind
from unpacker.cvmfs.compose import Composition
from unpacker.cvmfs.contents import ContentsBatch
from unpacker.cvmfs.deflation import compressor
from unpacker.cvmfs.edit import Change, edit
from unpacker.cvmfs.repository import Repository
from unpacker.cvmfs.row import MARKER
from unpacker.cvmfs.transaction import transaction as cvmfs_transaction
from unpacker.errors import PublishError
from unpacker.gc import collect
from unpacker.plan import Verb
from unpacker.publish import unreferenced
from unpacker.publish.directory import DirectoryPublisher
from unpacker.publish.index import DIRECTORY as INDEX
from unpacker.publish.stratum0 import Stratum0Publisher
from unpacker.publish.view import DirectoryView
from unpacker.reconcile import Result, exit_code, reconcile
from unpacker.record import Published
from unpacker.survey import Request, survey
from unpacker.tree import Directory, File, Node, Symlink
from unpacker.verify import verify

THIRD = image(layer(file("third", b"3")))


class Adopting(Site):
    """A site whose target another tool published before."""

    def ducc(self, generation: Generation = "2.14") -> DuccTree:
        return DuccTree(self.target, generation)

    def request(self, *images: str, text: str | None = None, **options: Any) -> Request:
        if not images:
            text = "version: 2\nimages: []\n"
        view = DirectoryView(str(self.target))
        return super().request(*images, text=text, **{"predecessors": view, **options})

    def published(self, name: str) -> Published:
        found = DirectoryPublisher(str(self.target)).published()[f"{self.fake.host}/{name}"]
        assert isinstance(found, Published)
        return found

    def remove(self, name: str) -> DirectoryPublisher:
        publisher = DirectoryPublisher(str(self.target))
        with publisher.transaction("remove") as transaction:
            transaction.remove([f"{self.fake.host}/{name}"], now=1000)
        return publisher

    def files(self, root: str) -> dict[str, bytes]:
        top = self.target / root
        return {
            str(p.relative_to(top)): p.read_bytes()
            for p in sorted(top.rglob("*"))
            if p.is_file() and not p.is_symlink()
        }


@pytest.fixture
def site(tmp_path: Path, registry: FakeRegistry) -> Adopting:
    return Adopting(tmp_path, registry)


def verbs(result: Result) -> dict[str, Verb]:
    return {a.public_path.partition("/")[2]: a.verb for a in result.survey.plan.actions}


@pytest.mark.parametrize("generation", BOTH)
def test_what_is_sound_is_adopted_without_a_layer_being_read_and_its_root_stays_as_it_is(
    site: Adopting, generation: Generation
) -> None:
    site.fake.add("org/app", "1.0", APP)
    ducc = site.ducc(generation)
    ducc.publish(f"{site.fake.host}/org/app:1.0", APP)
    before, link = site.files(ducc.flat(APP)), os.readlink(site.root("org/app:1.0"))
    result = site.run("HOST/org/app:1.0")
    assert done(result) == {"org/app:1.0": "adopted"}
    assert exit_code(result, sound=True) == 0
    assert site.files(ducc.flat(APP)) == before
    assert os.readlink(site.root("org/app:1.0")) == link
    layers = {digest for digest in APP.blobs if digest != APP.image_id}
    assert not [r for r in site.fake.requests if r.path.rpartition("/")[2] in layers]


def test_an_adopted_name_has_a_record_without_an_owner(site: Adopting) -> None:
    site.fake.add("org/app", "1.0", APP)
    ducc = site.ducc()
    ducc.publish(f"{site.fake.host}/org/app:1.0", APP)
    site.run("HOST/org/app:1.0")
    record = site.published("org/app:1.0")
    assert (record.is_adopted, record.owners, record.root) == (True, (), ducc.flat(APP))
    assert (record.image_id, record.digest) == (APP.image_id, APP.digest)


def test_the_run_after_an_adoption_has_nothing_to_do(site: Adopting) -> None:
    site.fake.add("org/app", "1.0", APP)
    site.ducc().publish(f"{site.fake.host}/org/app:1.0", APP)
    site.run("HOST/org/app:1.0")
    assert done(site.run("HOST/org/app:1.0")) == {"org/app:1.0": "kept"}
    assert done(site.run("HOST/org/app:1.0", predecessors=None)) == {"org/app:1.0": "kept"}


def test_what_is_damaged_is_composed_anew_beside_it_and_the_old_root_stays(site: Adopting) -> None:
    site.fake.add("org/app", "1.0", APP)
    ducc = site.ducc()
    ducc.publish(f"{site.fake.host}/org/app:1.0", APP)
    ducc.lose_singularity(APP)
    (site.target / ducc.flat(APP) / "etc" / "motd").write_bytes(b"cut")
    before = site.files(ducc.flat(APP))
    result = site.run("HOST/org/app:1.0")
    assert done(result) == {"org/app:1.0": "repaired"}
    assert site.files(ducc.flat(APP)) == before
    assert site.published("org/app:1.0").root == f"{ducc.flat(APP)}-2"
    assert (site.root("org/app:1.0") / "etc" / "motd").read_bytes() == b"hello"


def test_a_dangling_link_leads_somewhere_again(site: Adopting) -> None:
    site.fake.add("org/app", "1.0", APP)
    ducc = site.ducc()
    ducc.publish(f"{site.fake.host}/org/app:1.0", APP)
    ducc.lose_root(APP)
    assert done(site.run("HOST/org/app:1.0")) == {"org/app:1.0": "repaired"}
    assert (site.root("org/app:1.0") / "etc" / "motd").read_bytes() == b"hello"


def test_a_plan_lists_adopt_repair_publish_update_and_remove_with_reasons_and_changes_nothing(site: Adopting) -> None:
    ducc = site.ducc()
    for tag, built in (("sound", APP), ("damaged", OTHER), ("moved", APP), ("lost", OTHER)):
        ducc.publish(f"{site.fake.host}/org/{tag}:1", built)
    gone = DuccTree(site.target)
    for repository, built in (("sound", APP), ("damaged", OTHER), ("moved", OTHER), ("fresh", APP)):
        site.fake.add(f"org/{repository}", "1", built)
    gone.lose_singularity(OTHER)
    site.fake.add("org/else", "1", APP)
    (site.target / site.fake.host / "org" / "lost:1").unlink()
    (site.target / site.fake.host / "org" / "lost:1").symlink_to(f"../../.flat/ab/ab{'0' * 62}")
    before = sorted(str(p) for p in site.target.rglob("*"))
    wishes = [f"HOST/org/{name}:1" for name in ("sound", "damaged", "moved", "fresh")]
    found = survey(site.request(*wishes)).plan
    assert {a.public_path.rpartition("/")[2]: a.verb for a in found.actions} == {
        "sound:1": Verb.ADOPT,
        "damaged:1": Verb.REPAIR,
        "moved:1": Verb.UPDATE,
        "fresh:1": Verb.PUBLISH,
        "lost:1": Verb.REMOVE,
    }
    assert all(a.reason for a in found.actions)
    assert sorted(str(p) for p in site.target.rglob("*")) == before


def test_what_nobody_wishes_is_adopted_and_the_next_run_does_not_remove_it(site: Adopting) -> None:
    site.fake.add("org/app", "1.0", APP)
    site.ducc().publish(f"{site.fake.host}/org/app:1.0", APP)
    site.fake.add("org/other", "1", OTHER)
    assert done(site.run("HOST/org/other:1")) == {"org/app:1.0": "adopted", "org/other:1": "published"}
    site.run("HOST/org/other:1", predecessors=None)
    assert site.names() == {"org/app:1.0", "org/other:1"}


def test_an_adopted_name_is_removed_by_name_and_its_root_collected_after_the_grace_period(site: Adopting) -> None:
    site.fake.add("org/app", "1.0", APP)
    ducc = site.ducc()
    ducc.publish(f"{site.fake.host}/org/app:1.0", APP)
    site.run("HOST/org/app:1.0")
    publisher = site.remove("org/app:1.0")
    assert collect(publisher, grace=100, now=1050, dry_run=False).roots == ()
    assert (site.target / ducc.flat(APP)).is_dir()
    assert collect(publisher, grace=100, now=2000, dry_run=False).roots == (ducc.flat(APP),)
    assert not (site.target / ducc.flat(APP)).exists()


def test_a_root_that_a_name_not_adopted_still_leads_to_is_not_collected(site: Adopting) -> None:
    site.fake.add("org/app", "1.0", APP)
    ducc = site.ducc()
    ducc.publish(f"{site.fake.host}/org/app:1.0", APP)
    ducc.publish("elsewhere.example.org/org/app:1.0", APP)
    site.run("HOST/org/app:1.0", only=f"{site.fake.host}/*")
    publisher = site.remove("org/app:1.0")
    assert collect(publisher, grace=100, now=2000, dry_run=False).roots == ()


def test_rebuild_brings_what_was_adopted_under_todays_rules(site: Adopting) -> None:
    site.fake.add("org/app", "1.0", APP)
    ducc = site.ducc()
    ducc.publish(f"{site.fake.host}/org/app:1.0", APP)
    site.run("HOST/org/app:1.0")
    assert done(site.run("HOST/org/app:1.0", rebuild=True)) == {"org/app:1.0": "updated"}
    record = site.published("org/app:1.0")
    assert (record.rules, record.owners, record.root) == (site.policy.rules, (), f"{ducc.flat(APP)}-2")


def test_verify_finds_nothing_wrong_with_what_was_adopted_and_notices_when_its_root_goes(site: Adopting) -> None:
    site.fake.add("org/app", "1.0", APP)
    ducc = site.ducc()
    ducc.publish(f"{site.fake.host}/org/app:1.0", APP)
    site.run("HOST/org/app:1.0")
    record = site.published("org/app:1.0")
    assert list(verify(str(site.target), [record], quick=False)) == []
    ducc.lose_root(APP)
    assert [p.what for p in verify(str(site.target), [record], quick=True)] == [
        f"dangling link: {ducc.flat(APP)} does not exist",
        f"record without root: {ducc.flat(APP)} does not exist",
    ]


def test_an_image_of_osg_gets_its_public_name_and_keeps_the_one_it_had(site: Adopting) -> None:
    site.fake.add("org/app", "1.0", APP)
    osg = OsgTree(site.target)
    osg.publish("org/app:1.0", APP)
    old = os.readlink(site.target / "org" / "app:1.0")
    assert done(site.run("HOST/org/app:1.0")) == {"org/app:1.0": "adopted"}
    assert os.readlink(site.root("org/app:1.0")) == f"../../{osg.images(APP)}"
    assert (site.root("org/app:1.0") / "etc" / "motd").read_bytes() == b"hello"
    assert os.readlink(site.target / "org" / "app:1.0") == old
    assert list(verify(str(site.target), [site.published("org/app:1.0")], quick=False)) == []


def test_a_root_that_goes_while_it_is_adopted_is_a_failure_of_that_name_only(site: Adopting) -> None:
    site.fake.add("org/app", "1.0", APP)
    site.fake.add("org/app", "2.0", OTHER)
    ducc = site.ducc()
    ducc.publish(f"{site.fake.host}/org/app:1.0", APP)
    ducc.publish(f"{site.fake.host}/org/app:2.0", OTHER)

    class Losing(DirectoryPublisher):
        def transaction(self, message: str) -> Any:
            if (site.target / ducc.flat(APP)).exists():
                ducc.lose_root(APP)
            return super().transaction(message)

    result = reconcile(site.request("HOST/org/app:*", publisher=Losing(str(site.target))))
    assert done(result) == {"org/app:1.0": "failed", "org/app:2.0": "adopted"}
    assert exit_code(result, sound=True) == PublishError.exit_code


# -- in repositories of CernVM-FS -------------------------------------------------------------------------------


def lay(tree: Path, directory: Path) -> None:
    """Makes a repository in which a tree stands as whoever published it left it, without a word of unpacker's."""
    repository = Repository.create(str(directory), REPOSITORY, now=NOW)
    with cvmfs_transaction(repository, now=NOW) as within:
        with repository.objects.batch() as batch:
            compress = compressor(repository.compression)
            store = ContentsBatch(batch, compress, repository.algorithm)
            changes: dict[str, Change] = {f"/{p.name}": _node(p, store) for p in sorted(tree.iterdir())}
            composition = Composition(last_modified=NOW, compress=compress)
            edited = edit(repository.objects, within.base.root, changes, composition, batch=batch)
        within.publish(edited.root, edited.size, now=NOW)


def _node(path: Path, store: ContentsBatch) -> Node:
    own = path.lstat()
    mode, time = stat.S_IMODE(own.st_mode), own.st_mtime_ns
    if path.is_symlink():
        return Symlink(mode, 0, 0, time, (), os.readlink(path))
    if path.is_dir():
        return Directory(mode, 0, 0, time, (), {p.name: _node(p, store) for p in path.iterdir() if p.name != MARKER})
    data = path.read_bytes()
    token = store.put(io.BytesIO(data), len(data), Entry("", Kind.FILE, size=len(data)))
    return File(mode, 0, 0, time, (), len(data), token)


class Old(Adopting):
    """A native repository whose names another tool published."""

    def __init__(self, path: Path, fake: FakeRegistry) -> None:
        super().__init__(path, fake)
        self.target = path / "tree"
        self.directory = path / "repo"

    def publisher(self) -> Stratum0Publisher:
        return Stratum0Publisher(
            str(self.directory), clock=lambda: NOW + 1000, spool_root="/nowhere", configuration="/nowhere"
        )

    def request(self, *images: str, text: str | None = None, **options: Any) -> Request:
        publisher = self.publisher()
        chosen = {"publisher": publisher, "predecessors": publisher.view()}
        return super().request(*images, text=text, **{**chosen, **options})

    def withdraw(self, name: str) -> Stratum0Publisher:
        publisher = self.publisher()
        with publisher.transaction("remove") as transaction:
            transaction.remove([f"{self.fake.host}/{name}"], now=NOW)
        return publisher

    def record(self, name: str) -> Published:
        found = self.publisher().published()[f"{self.fake.host}/{name}"]
        assert isinstance(found, Published)
        return found

    def problems(self) -> list[str]:
        publisher = self.publisher()
        found = [p.what for p in audit(publisher, publisher.published(), quick=False, now=NOW + 1000)]
        if SWISSKNIFE is not None:
            swissknife_check("-c", "-r", str(self.directory))
        return found


@pytest.fixture
def repository(tmp_path: Path, registry: FakeRegistry, no_sync: None) -> Old:
    return Old(tmp_path, registry)


@pytest.mark.parametrize("generation", BOTH)
def test_a_repository_of_ducc_is_taken_over_and_stays_sound(repository: Old, generation: Generation) -> None:
    for tag, built in (("1", APP), ("2", OTHER), ("3", THIRD)):
        repository.fake.add("org/app", tag, built)
    ducc = repository.ducc(generation)
    ducc.publish(f"{repository.fake.host}/org/app:1", APP)
    ducc.publish(f"{repository.fake.host}/org/app:2", OTHER)
    ducc.cut_layer_off(OTHER, 1)
    lay(repository.target, repository.directory)
    result = repository.run("HOST/org/app:*")
    assert done(result) == {"org/app:1": "adopted", "org/app:2": "repaired", "org/app:3": "published"}
    assert repository.record("org/app:1").root == ducc.flat(APP)
    assert repository.record("org/app:2").root == f"{ducc.flat(OTHER)}-2"
    assert repository.problems() == []
    assert set(done(repository.run("HOST/org/app:*")).values()) == {"kept"}


def test_an_adopted_name_of_a_repository_is_removed_by_name_and_its_root_collected(repository: Old) -> None:
    repository.fake.add("org/app", "1", APP)
    ducc = repository.ducc()
    ducc.publish(f"{repository.fake.host}/org/app:1", APP)
    lay(repository.target, repository.directory)
    repository.run("HOST/org/app:1")
    publisher = repository.withdraw("org/app:1")
    found = unreferenced.collect(publisher, grace=0, keep=0, now=NOW + 2000, dry_run=False)
    assert ducc.flat(APP) in found.roots
    assert repository.problems() == []


def test_an_image_of_osg_in_a_repository_is_adopted(repository: Old) -> None:
    repository.fake.add("org/app", "1", APP)
    osg = OsgTree(repository.target)
    osg.publish("org/app:1", APP)
    lay(repository.target, repository.directory)
    assert done(repository.run("HOST/org/app:1")) == {"org/app:1": "adopted"}
    assert repository.record("org/app:1").root == osg.images(APP)
    assert repository.problems() == []


def test_a_root_that_an_absolute_link_leads_to_is_not_collected(repository: Old) -> None:
    repository.fake.add("org/app", "1", APP)
    ducc = repository.ducc()
    ducc.publish(f"{repository.fake.host}/org/app:1", APP)
    (repository.target / "short").mkdir()
    (repository.target / "short" / "app").symlink_to(f"/cvmfs/{REPOSITORY}/{ducc.flat(APP)}")
    lay(repository.target, repository.directory)
    repository.run("HOST/org/app:1")
    publisher = repository.withdraw("org/app:1")
    found = unreferenced.collect(publisher, grace=0, keep=0, now=NOW + 2000, dry_run=False)
    assert ducc.flat(APP) not in found.roots


def test_the_name_before_several_platforms_belongs_to_no_wishlist_either(site: Adopting) -> None:
    arm = image(layer(file("arm", b"x")), architecture="arm64", variant="v8")
    site.fake.add_index("org/app", "1.0", APP, arm)
    name = f"{site.fake.host}/org/app:1.0"
    site.ducc().publish_variants(name, **{"amd64": APP, "arm64:v8": arm})
    wish = "version: 2\nimages:\n- {image: 'HOST/org/app:1.0', platforms: [linux/amd64, linux/arm64]}\n"
    first = site.run("-", text=wish)
    assert sorted(o.done.value for o in first.outcomes) == ["adopted", "adopted", "updated"]
    assert site.published("org/app:1.0").owners == ()
    site.run(predecessors=None, allow_removals=True)
    assert os.path.lexists(site.target / name)


def test_a_name_that_ducc_made_of_a_root_of_ours_leaves_it_ours(site: Adopting) -> None:
    for tag in ("1.0", "2.0"):
        site.fake.add("org/app", tag, APP)
    site.run("HOST/org/app:2.0", predecessors=None)
    ours = site.published("org/app:2.0").root
    os.symlink(f"../../{ours}", site.root("org/app:1.0"))
    assert done(site.run("HOST/org/app:*")) == {"org/app:1.0": "adopted", "org/app:2.0": "kept"}
    publisher = DirectoryPublisher(str(site.target))
    assert publisher.root(APP.image_id, site.policy.rules) == ours
    (site.target / ours / "etc" / "motd").write_bytes(b"HELLO")
    found = {p.public_path for p in verify(str(site.target), publisher.published().values(), quick=False)}
    assert found == set(publisher.published())


def test_a_name_that_ducc_made_of_a_root_of_ours_in_a_repository_leaves_it_ours(repository: Old) -> None:
    for tag in ("1.0", "2.0"):
        repository.fake.add("org/app", tag, APP)
    (repository.ducc().path / "readme").write_text("not of unpacker")
    lay(repository.target, repository.directory)
    repository.run("HOST/org/app:2.0", predecessors=None)
    ours = repository.record("org/app:2.0").root
    link = Symlink(0o777, 0, 0, 0, (), f"../../{ours}")
    edit_by_hand(repository.publisher(), {f"/{repository.fake.host}/org/app:1.0": link})
    assert done(repository.run("HOST/org/app:*"))["org/app:1.0"] == "adopted"
    assert repository.publisher().root(APP.image_id, repository.policy.rules) == ours


def test_what_is_inside_roots_of_osg_is_no_name(site: Adopting) -> None:
    site.fake.add("org/app", "1.0", APP)
    ducc = site.ducc()
    ducc.publish(f"{site.fake.host}/org/app:1.0", APP)
    (site.target / ".images" / "ab" / "root").mkdir(parents=True)
    (site.target / ".images" / "ab" / "root" / "link").symlink_to(f"../../../{ducc.flat(APP)}")
    site.run("HOST/org/app:1.0")
    publisher = site.remove("org/app:1.0")
    assert collect(publisher, grace=100, now=2000, dry_run=False).roots == (ducc.flat(APP),)


def test_what_is_inside_roots_of_osg_in_a_repository_is_no_name(repository: Old) -> None:
    repository.fake.add("org/app", "1", APP)
    ducc = repository.ducc()
    ducc.publish(f"{repository.fake.host}/org/app:1", APP)
    (repository.target / ".images" / "ab" / "root").mkdir(parents=True)
    (repository.target / ".images" / "ab" / "root" / "link").symlink_to(f"../../../{ducc.flat(APP)}")
    lay(repository.target, repository.directory)
    repository.run("HOST/org/app:1")
    publisher = repository.withdraw("org/app:1")
    assert ducc.flat(APP) in unreferenced.collect(publisher, grace=0, keep=0, now=NOW + 2000, dry_run=False).roots


def test_layers_of_ducc_never_become_ours_though_the_index_was_lost(repository: Old) -> None:
    repository.fake.add("org/app", "1", APP)
    repository.fake.add("org/app", "2", OTHER)
    ducc = repository.ducc()
    ducc.publish(f"{repository.fake.host}/org/app:1", APP)
    ducc.publish("elsewhere.example.org/org/app:2", OTHER)
    lay(repository.target, repository.directory)
    repository.run("HOST/org/app:1", "HOST/org/app:2", only=f"{repository.fake.host}/*")
    edit_by_hand(repository.publisher(), {f"/{INDEX}": None})
    publisher = repository.publisher()
    with publisher.transaction("remove") as transaction:
        transaction.remove([f"{repository.fake.host}/org/app:{tag}" for tag in "12"], now=NOW)
    found = unreferenced.collect(publisher, grace=0, keep=0, now=NOW + 2000, dry_run=False)
    assert ducc.flat(APP) in found.roots
    assert found.layers == ()
