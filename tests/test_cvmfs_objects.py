"""Objects of a CernVM-FS repository: hashes, names, durability by batch, compression."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unpacker.cvmfs import deflation
from unpacker.cvmfs.hash import ALGORITHMS, ContentHash
from unpacker.cvmfs.objects import CATALOG, CERTIFICATE, CHUNK, ObjectStore
from unpacker.errors import PublishError
from unpacker.publish import posix

EMPTY = ContentHash.parse("e8ec3d88b62ebf526e4e5a4ff6162a3aa48a6b78")
DIGESTS = st.builds(ContentHash, st.binary(min_size=20, max_size=20), st.sampled_from(ALGORITHMS))


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here pulls the plug, and syncing a busy machine's disk takes seconds each time."""
    monkeypatch.setattr(posix, "syncfs", lambda fd: None)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    # Not `ObjectStore.create`: 256 directories for each test are slow to remove again.
    root = tmp_path / "repo.example.org"
    (root / "data").mkdir(parents=True)
    return ObjectStore(str(root))


def names(store: ObjectStore) -> set[str]:
    root = Path(store.root)
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}


class TestHashes:
    @pytest.mark.parametrize(
        ("algorithm", "text"),
        [
            ("sha1", "11f6ad8ec52a2984abaafd7c3b516503785c2072"),
            ("rmd160", "11ff33c6fb942655efb3e30cf4c0fd95f5ef483a-rmd160"),
            ("shake128", "e472c5e394f30ff8d5d33803f9593e63e2f3862d-shake128"),
        ],
    )
    def test_each_algorithm_has_20_bytes_and_all_but_sha1_a_tag(self, algorithm: str, text: str) -> None:
        name = ContentHash.of(b"x", algorithm)
        assert name.hex == str(name) == text
        assert len(name.digest) == 20
        assert ContentHash.of_stream(io.BytesIO(b"x"), algorithm) == name

    def test_an_object_path_has_the_tag_and_then_the_suffix(self) -> None:
        assert EMPTY.object_path() == "data/e8/ec3d88b62ebf526e4e5a4ff6162a3aa48a6b78"
        assert EMPTY.object_path("C") == "data/e8/ec3d88b62ebf526e4e5a4ff6162a3aa48a6b78C"
        name = ContentHash(EMPTY.digest, "shake128")
        assert name.object_path("C") == "data/e8/ec3d88b62ebf526e4e5a4ff6162a3aa48a6b78-shake128C"

    @given(DIGESTS)
    def test_text_and_flags_are_read_back(self, name: ContentHash) -> None:
        assert ContentHash.parse(name.hex) == name
        assert ContentHash.from_flags(name.digest, name.flags_bits | 4 | 2048) == name

    def test_the_flags_count_from_0_for_sha1(self) -> None:
        assert [ContentHash(bytes(20), a).flags_bits for a in ("sha1", "rmd160", "shake128")] == [0, 256, 512]

    @pytest.mark.parametrize(
        "text", ["", "e8", "E8" * 20, "g" * 40, "e8" * 20 + "C", "e8" * 20 + "-sha1", "e8" * 20 + "\n", "é" * 40]
    )
    def test_what_is_no_hash_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="not a content hash"):
            ContentHash.parse(text)

    def test_unknown_algorithms_and_short_digests_are_refused(self) -> None:
        with pytest.raises(ValueError, match="md5"):
            ContentHash(bytes(20), "md5")
        with pytest.raises(ValueError, match="19"):
            ContentHash(bytes(19))
        with pytest.raises(ValueError, match="0x700"):
            ContentHash.from_flags(bytes(20), 0x700)


class TestStore:
    def test_a_new_store_has_all_directories_and_the_empty_file(self, tmp_path: Path) -> None:
        store = ObjectStore.create(str(tmp_path / "repo.example.org"))
        data = Path(store.root) / "data"
        assert {p.name for p in data.iterdir()} == {"txn"} | {f"{i:02x}" for i in range(256)}
        assert names(store) == {"data/e8/ec3d88b62ebf526e4e5a4ff6162a3aa48a6b78"}
        assert store.read(EMPTY) == b""

    def test_making_a_store_again_keeps_what_is_there(self, store: ObjectStore) -> None:
        name = store.put(zlib.compress(b"hello"))
        assert ObjectStore.create(store.root).read(name) == b"hello"

    def test_an_object_is_named_by_the_hash_of_its_stored_bytes(self, store: ObjectStore) -> None:
        stored = zlib.compress(b"a catalog")
        name = store.put(stored, CATALOG)
        assert name.hex == hashlib.sha1(stored).hexdigest()
        assert Path(store.path(name, CATALOG)).read_bytes() == stored
        assert store.read(name, CATALOG) == b"a catalog"
        assert b"".join(store.stored(name, CATALOG)) == stored

    def test_the_suffix_is_part_of_the_name_and_not_of_the_hash(self, store: ObjectStore) -> None:
        name = store.put(b"x")
        assert store.put(b"x", CHUNK) == name
        assert store.has(name) and store.has(name, CHUNK) and not store.has(name, CERTIFICATE)

    @pytest.mark.parametrize("algorithm", ALGORITHMS)
    def test_any_algorithm_can_be_written_and_read(self, store: ObjectStore, algorithm: str) -> None:
        name = ObjectStore(store.root, algorithm).put(deflation.stock(b"hello"), CATALOG)
        assert name.algorithm == algorithm
        assert store.read(name, CATALOG) == b"hello"

    def test_objects_and_directories_are_readable_by_all_whatever_the_umask(self, tmp_path: Path) -> None:
        before = os.umask(0o077)
        try:
            store = ObjectStore.create(str(tmp_path / "repo"))
            name = store.put(b"x")
        finally:
            os.umask(before)
        for path in (Path(store.path(name)), *Path(store.path(name)).parents):
            if path == tmp_path:
                break
            assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644)

    def test_renames_come_in_the_order_of_the_puts(self, store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
        order: list[str] = []
        rename = os.rename

        def renamed(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
            rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            order.append(target)

        monkeypatch.setattr(os, "rename", renamed)
        with store.batch() as batch:
            put = [batch.put(b"%d" % i, CATALOG).object_path(CATALOG).removeprefix("data/") for i in range(20)]
        assert order == put

    def test_nothing_but_txn_is_touched_before_a_batch_ends(self, store: ObjectStore) -> None:
        before = names(store)
        with store.batch() as batch:
            name = batch.put(b"x")
            assert {n.rpartition("/")[0] for n in names(store) - before} == {"data/txn"}
            assert not store.has(name)
        assert names(store) - before == {name.object_path()}

    def test_missing_directories_are_made_again(self, store: ObjectStore) -> None:
        assert not (Path(store.root) / "data/txn").exists()
        assert store.has(store.put(b"x"))

    def test_one_batch_may_be_filled_by_several_threads(self, store: ObjectStore) -> None:
        with store.batch() as batch:
            threads = [threading.Thread(target=lambda: [batch.put(b"%d" % i) for i in range(300)]) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert names(store) == {ContentHash.of(b"%d" % i).object_path() for i in range(300)}

    def test_what_a_killed_batch_left_is_swept_away_and_nothing_else(self, store: ObjectStore) -> None:
        store.put(deflation.EMPTY)
        (Path(store.root) / "data/txn/of-another-tool").write_bytes(b"x")
        program = (
            "import os, signal, sys\nfrom unpacker.cvmfs.objects import ObjectStore\n"
            "with ObjectStore(sys.argv[1]).batch() as batch:\n"
            "    batch.put(b'x')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        assert subprocess.run([sys.executable, "-c", program, store.root], check=False).returncode < 0
        assert len(names(store)) == 3
        store.sweep()
        assert names(store) == {EMPTY.object_path(), "data/txn/of-another-tool"}

    def test_a_lacking_object_is_said_with_its_name(self, store: ObjectStore) -> None:
        with pytest.raises(PublishError, match=r"lacks object 0{40}C of .*repo\.example\.org"):
            store.read(ContentHash(bytes(20)), CATALOG)

    def test_a_repository_that_is_not_there_is_not_taken_for_an_empty_one(self, tmp_path: Path) -> None:
        store = ObjectStore(str(tmp_path / "unmounted"))
        for act in (store.has, store.is_sound):
            with pytest.raises(PublishError, match="no repository"):
                act(EMPTY)
        with pytest.raises(PublishError, match="object store"):
            store.put(b"x")

    def test_discarding_twice_is_as_good_as_once(self, store: ObjectStore) -> None:
        name = store.put(b"x")
        assert store.is_sound(name)
        store.discard(name)
        store.discard(name)
        assert not store.has(name) and not store.is_sound(name)


class TestCompression:
    @pytest.mark.parametrize("name", deflation.COMPRESSIONS)
    @given(data=st.binary(max_size=3000))
    def test_every_compressor_makes_a_zlib_stream(self, name: str, data: bytes) -> None:
        assert zlib.decompress(deflation.compressor(name)(data)) == data

    def test_the_empty_file_is_the_same_for_all(self) -> None:
        assert {deflation.compressor(name)(b"") for name in deflation.COMPRESSIONS} == {deflation.EMPTY}
        assert ContentHash.of(deflation.EMPTY) == EMPTY

    def test_stock_is_zlib_as_python_calls_it(self) -> None:
        text = Path(os.__file__).read_bytes()
        assert deflation.stock(text) == zlib.compress(text)

    def test_a_zlib_that_makes_other_bytes_is_refused_for_stock_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        compress = zlib.compress
        monkeypatch.setattr(zlib, "compress", lambda data, level=6: compress(data, 5))
        deflation.check_zlib.cache_clear()
        try:
            with pytest.raises(PublishError, match=r"use a Python with the original zlib"):
                deflation.compressor("stock")
            deflation.compressor("dense")
        finally:
            deflation.check_zlib.cache_clear()

    @pytest.mark.parametrize("name", deflation.COMPRESSIONS)
    def test_the_same_bytes_give_the_same_stream_in_every_process_and_thread(self, name: str) -> None:
        program = (
            "import hashlib, os, sys\nfrom pathlib import Path\nfrom concurrent.futures import ThreadPoolExecutor\n"
            "from unpacker.cvmfs.deflation import compressor\n"
            "files = [p.read_bytes() for p in sorted(Path(os.__file__).parent.glob('*.py'))[:40]]\n"
            "with ThreadPoolExecutor(3) as pool:\n"
            "    print(hashlib.sha1(b''.join(pool.map(compressor(sys.argv[1]), files))).hexdigest())\n"
        )
        runs = {subprocess.check_output([sys.executable, "-c", program, name]) for _ in range(3)}
        assert len(runs) == 1

    def test_an_unknown_compression_is_refused(self) -> None:
        with pytest.raises(PublishError, match="dense, fast, stock"):
            deflation.compressor("brotli")

    def test_dense_is_about_as_small_as_stock_even_on_text(self) -> None:
        """Sources are its weak side; on programs and libraries it is smaller."""
        sources = [path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py"))[:60]]
        dense, stock = (sum(len(f(s)) for s in sources) for f in (deflation.dense, deflation.stock))
        assert dense <= stock * 1.02

    def test_incompressible_data_cost_a_thousandth_at_most_and_compressible_ones_are_not_missed(self) -> None:
        noise = os.urandom(1 << 19)
        assert len(deflation.dense(noise)) <= len(noise) * 1.001
        mixed = noise[: 1 << 18] + bytes(1 << 18)
        assert len(deflation.dense(mixed)) < len(mixed) * 0.51
