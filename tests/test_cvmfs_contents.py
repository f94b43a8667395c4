"""Contents of files in a CernVM-FS repository: tokens, chunks, where large files are cut."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unpacker.changeset import Entry, Kind
from unpacker.cvmfs import chunks, deflation
from unpacker.cvmfs.contents import Content, ContentsLocator, Piece, RepositoryContents
from unpacker.cvmfs.hash import ALGORITHMS, ContentHash
from unpacker.cvmfs.known import Known, KnownContents
from unpacker.cvmfs.objects import ObjectStore
from unpacker.errors import IntegrityError, PublishError
from unpacker.publish import posix

HINT = Entry("some/file", Kind.FILE)
EMPTY = "z:e8ec3d88b62ebf526e4e5a4ff6162a3aa48a6b78"
HIT = bytes.fromhex("7f00000000000000ff00000000000000ff00000000000000ff")
"""After zeros, the rule hits at the last of these bytes: x is then 0x7fffffff."""


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here pulls the plug, and syncing a busy machine's disk takes seconds each time."""
    monkeypatch.setattr(posix, "syncfs", lambda fd: None)


@pytest.fixture
def contents(tmp_path: Path) -> RepositoryContents:
    (tmp_path / "data").mkdir()
    return RepositoryContents(ObjectStore(str(tmp_path)), "fast")


def put(contents: RepositoryContents, data: bytes, hint: Entry = HINT) -> str:
    with contents.batch() as batch:
        return batch.put(io.BytesIO(data), len(data), hint)


def hit_at(*positions: int, size: int) -> bytes:
    """Zeros in which the rule hits at these positions, and each time once more 31 bytes later."""
    data = bytearray(size)
    for position in positions:
        data[position - len(HIT) + 1 : position + 1] = HIT
    return bytes(data)


def naive_hits(data: bytes) -> list[int]:
    """The rule as it is written down, byte by byte."""
    x, found = 0, []
    for i, byte in enumerate(data):
        x = ((x << 1) ^ byte) % 2**32
        if i >= 31 and abs(x - (2**31 - 1)) < (2**32 - 1) // (8 << 20):
            found.append(i)
    return found


@st.composite
def data_with_near_hits(draw: st.DrawFn) -> bytes:
    """Random bytes, some of them set so that x comes out at, or next to, the borders of what hits."""
    data = bytearray(draw(st.binary(min_size=32, max_size=300)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(31, len(data) - 1))
        target = (0x7FFFFFFF + draw(st.sampled_from([-512, -511, -510, -1, 0, 1, 510, 511, 512]))) % 2**32
        for shift in (0, 8, 16, 24):
            data[at - shift] = 0
        x = 0
        for byte in data[at - 31 : at + 1]:
            x = ((x << 1) ^ byte) % 2**32
        for shift in (0, 8, 16, 24):
            data[at - shift] = ((x ^ target) >> shift) & 0xFF
    return bytes(data)


class TestTokens:
    @given(
        st.sampled_from(ALGORITHMS),
        st.lists(st.tuples(st.binary(min_size=20, max_size=20), st.integers(1, (1 << 63) - 1)), max_size=4),
        st.binary(min_size=20, max_size=20),
        st.booleans(),
    )
    def test_a_token_is_read_back(
        self, algorithm: str, pieces: list[tuple[bytes, int]], digest: bytes, is_compressed: bool
    ) -> None:
        parts = tuple(Piece(ContentHash(name, algorithm), size) for name, size in pieces)
        content = Content(None if parts else ContentHash(digest, algorithm), parts, is_compressed)
        assert Content.parse(content.token) == content

    @pytest.mark.parametrize(
        ("token", "flags", "objects"),
        [
            (f"z:{'0' * 40}", 0, [f"data/00/{'0' * 38}"]),
            (f"n:{'0' * 40}-shake128", 512 | 2048, [f"data/00/{'0' * 38}-shake128"]),
            (f"zc:{'0' * 40}@5,{'1' * 40}@7", 64, [f"data/00/{'0' * 38}P", f"data/11/{'1' * 38}P"]),
            (f"nc:{'0' * 40}-rmd160@5", 64 | 256 | 2048, [f"data/00/{'0' * 38}-rmd160P"]),
        ],
    )
    def test_a_token_says_what_a_catalog_needs(self, token: str, flags: int, objects: list[str]) -> None:
        content = Content.parse(token)
        assert content.flags_bits == flags
        assert [name.object_path(suffix) for name, suffix in content.objects] == objects

    def test_a_token_does_not_depend_on_metadata(self, contents: RepositoryContents) -> None:
        other = Entry("other/name", Kind.FILE, mode=0o755, uid=5, mtime_ns=7, xattrs=(("user.a", b"1"),))
        assert put(contents, b"hello") == put(contents, b"hello", other)

    def test_stock_names_a_file_as_the_official_tools_do(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        contents = RepositoryContents(ObjectStore(str(tmp_path)), "stock")
        assert put(contents, b"hello\n") == f"z:{hashlib.sha1(zlib.compress(b'hello' + bytes([10]))).hexdigest()}"

    def test_the_empty_file_is_always_there(self, contents: RepositoryContents) -> None:
        ObjectStore.create(contents.objects.root)
        assert contents.empty == EMPTY
        assert contents.missing({EMPTY}) == set()
        assert put(contents, b"") == EMPTY

    def test_what_is_stored_bare_can_be_read(self, contents: RepositoryContents) -> None:
        whole = contents.objects.put(b"hello, world")
        pieces = tuple(Piece(contents.objects.put(part, "P"), len(part)) for part in (b"hello", b", world"))
        for token in (f"n:{whole}", Content(None, pieces, is_compressed=False).token):
            assert contents.missing({token}, check=True) == set()
            with contents.open(token) as stream:
                assert b"".join(iter(lambda: stream.read(3), b"")) == b"hello, world"

    def test_a_locator_keeps_compression_and_algorithm(self, tmp_path: Path) -> None:
        locator = ContentsLocator(str(tmp_path), "stock", "shake128")
        assert locator.open().locator == locator


class TestCuts:
    @given(data_with_near_hits())
    def test_the_search_finds_what_the_rule_says(self, data: bytes) -> None:
        assert chunks._first_hit(data) == next(iter(naive_hits(data)), None)

    @pytest.mark.parametrize(
        ("hits", "size", "sizes"),
        [
            ([], chunks.MINIMUM + 1, [chunks.MINIMUM + 1]),
            ([], chunks.MAXIMUM, [chunks.MAXIMUM]),
            ([], chunks.MAXIMUM + 1, [chunks.MAXIMUM, 1]),
            ([chunks.MINIMUM - 1], chunks.MINIMUM + 9, [chunks.MINIMUM + 9]),
            ([chunks.MINIMUM], chunks.MINIMUM + 9, [chunks.MINIMUM, 9]),
            ([chunks.MINIMUM + 3, chunks.MINIMUM + 90], chunks.MINIMUM + 99, [chunks.MINIMUM + 3, 96]),
            ([chunks.MINIMUM + (1 << 18)], chunks.MINIMUM + (1 << 19), [chunks.MINIMUM + (1 << 18), 1 << 18]),
            ([chunks.MINIMUM + (1 << 18) + 9], chunks.MINIMUM + (1 << 19), [chunks.MINIMUM + (1 << 18) + 9, 262135]),
            ([5 << 20, 10 << 20], 11 << 20, [5 << 20, 5 << 20, 1 << 20]),
            ([chunks.MAXIMUM - 1], chunks.MAXIMUM + 1, [chunks.MAXIMUM - 1, 2]),
        ],
    )
    def test_a_file_is_cut_before_a_hit_past_the_minimum_and_at_the_maximum(
        self, hits: list[int], size: int, sizes: list[int]
    ) -> None:
        data = hit_at(*hits, size=size)
        found = list(chunks.cut(io.BytesIO(data), size))
        assert [len(chunk) for chunk in found] == sizes
        assert b"".join(found) == data

    def test_after_a_change_the_cuts_fall_into_place_again(self) -> None:
        rest = hit_at(6 << 20, 11 << 20, size=13 << 20)[5 << 20 :]
        sizes = [
            [len(chunk) for chunk in chunks.cut(io.BytesIO(data), len(data))]
            for data in (bytes(5 << 20) + rest, bytes((5 << 20) + 1000) + rest)
        ]
        assert sizes == [[6 << 20, 5 << 20, 2 << 20], [(6 << 20) + 1000, 5 << 20, 2 << 20]]

    def test_a_file_that_ends_early_is_an_error(self) -> None:
        with pytest.raises(IntegrityError, match="20000000 bytes ended after 18000000"):
            list(chunks.cut(io.BytesIO(bytes(18_000_000)), 20_000_000))


class TestLargeFiles:
    def test_a_file_with_cuts_becomes_chunks_with_offsets_in_order(self, contents: RepositoryContents) -> None:
        data = hit_at(5 << 20, 10 << 20, size=11 << 20)
        content = Content.parse(put(contents, data))
        assert content.whole is None and content.is_compressed
        assert [size for _, size in content.chunks] == [5 << 20, 5 << 20, 1 << 20]
        assert [contents.objects.read(name, "P") for name, _ in content.chunks] == [
            data[: 5 << 20],
            data[5 << 20 : 10 << 20],
            data[10 << 20 :],
        ]

    def test_a_large_file_without_a_cut_is_one_object_without_suffix(self, contents: RepositoryContents) -> None:
        data = bytes(chunks.MAXIMUM)
        content = Content.parse(put(contents, data))
        assert content.whole is not None and contents.objects.read(content.whole) == data

    def test_large_files_are_never_held_whole(self, contents: RepositoryContents) -> None:
        class Zeros:
            def read(self, size: int, /) -> bytes:
                return bytes(size)

        size = 160 << 20
        tracemalloc.start()
        try:
            with contents.batch() as batch:
                token = batch.put(Zeros(), size, HINT)
            put_peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.reset_peak()
            with contents.open(token) as stream:
                assert sum(len(piece) for piece in iter(lambda: stream.read(1 << 20), b"")) == size
            open_peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert put_peak < 4 * chunks.MAXIMUM
        assert open_peak < 4 << 20

    def test_several_threads_may_put_into_one_batch(self, contents: RepositoryContents) -> None:
        files = [b"%d" % (i % 40) * (i % 40) * 100 for i in range(200)]
        with contents.batch() as batch, ThreadPoolExecutor(4) as pool:
            tokens = list(pool.map(lambda data: batch.put(io.BytesIO(data), len(data), HINT), files))
            assert batch.written == sum(map(len, files))
        assert len(set(tokens)) == len(set(files))
        assert contents.missing(tokens, check=True) == set()
        for token, data in zip(tokens, files, strict=True):
            with contents.open(token) as stream:
                assert stream.read(1 << 20) == data[: 1 << 20]


class TestKnownContents:
    """An index in a file of its own remembers which object known bytes became."""

    @pytest.fixture
    def index(self, tmp_path: Path) -> Path:
        return tmp_path / "index"

    @pytest.fixture
    def indexed(self, contents: RepositoryContents, index: Path) -> RepositoryContents:
        return RepositoryContents(contents.objects, "fast", str(index))

    @pytest.fixture
    def compressed(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """The sizes of what was compressed so far."""
        sizes: list[int] = []
        fast = deflation.fast

        def counted(data: bytes) -> bytes:
            sizes.append(len(data))
            return fast(data)

        monkeypatch.setattr(deflation, "fast", counted)
        return sizes

    @pytest.mark.parametrize("data", [b"x" * 50_000, hit_at(5 << 20, size=6 << 20)], ids=["small", "large"])
    def test_known_bytes_are_not_compressed_again(
        self, compressed: list[int], contents: RepositoryContents, index: Path, data: bytes
    ) -> None:
        first = put(RepositoryContents(contents.objects, "fast", str(index)), data)
        before = len(compressed)
        assert put(RepositoryContents(contents.objects, "fast", str(index)), data) == first
        assert (len(compressed), before > 0) == (before, True)

    def test_what_was_collected_is_stored_again(self, indexed: RepositoryContents) -> None:
        token = put(indexed, b"x" * 50_000)
        name = Content.parse(token).whole
        assert name is not None
        indexed.objects.discard(name)
        assert put(indexed, b"x" * 50_000) == token
        assert indexed.missing({token}, check=True) == set()

    def test_a_batch_left_by_exception_teaches_nothing(
        self, compressed: list[int], contents: RepositoryContents, index: Path
    ) -> None:
        indexed = RepositoryContents(contents.objects, "fast", str(index))
        with pytest.raises(RuntimeError), indexed.batch() as batch:
            batch.put(io.BytesIO(b"x" * 50_000), 50_000, HINT)
            raise RuntimeError
        put(indexed, b"x" * 50_000)
        assert compressed == [50_000, 50_000]

    def test_each_compression_and_algorithm_has_its_own(self, indexed: RepositoryContents, index: Path) -> None:
        root = indexed.objects.root
        data = bytes(range(256)) * 200
        fast = put(indexed, data)
        stock = put(RepositoryContents(indexed.objects, "stock", str(index)), data)
        shake = put(RepositoryContents(ObjectStore(root, "shake128"), "fast", str(index)), data)
        assert stock == f"z:{hashlib.sha1(zlib.compress(data)).hexdigest()}"
        assert len({fast, stock, shake}) == 3 and shake.endswith("-shake128")

    def test_a_damaged_index_is_said_with_what_to_do(self, indexed: RepositoryContents, index: Path) -> None:
        index.write_bytes(b"no database" * 1000)
        with pytest.raises(PublishError, match=r"index: file is not a database; delete it"):
            put(indexed, b"x" * 50_000)


def _learn(path: str, number: int, start: Any) -> None:
    start.wait()
    known = KnownContents(path, "dense", "sha1")
    for turn in range(20):
        known.add({hashlib.sha256(b"%d %d" % (number, turn)).digest(): Known(b"x" * 20, 1)})
        known.find(b"y" * 32)
    known.close()


def test_processes_that_open_a_new_index_at_the_same_moment_wait_for_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    for turn in range(3):
        start = context.Barrier(3)
        path = str(tmp_path / f"known-{turn}")
        processes = [context.Process(target=_learn, args=(path, n, start)) for n in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0, 0]
