"""The pool of a directory target: tokens, sharing, holes, limits of links, damage.

What it promises as any other content store is tested in test_content_stores.py.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import io
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_content_stores import MTIME, Dribble
from unpacker.changeset import Entry, Kind
from unpacker.errors import IntegrityError, PublishError
from unpacker.publish import posix
from unpacker.publish.pool import SMALL, ContentPool, PoolLinks, content_token, pool_path
from unpacker.tree import File

ME = (os.geteuid(), os.getegid())


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here pulls the plug, and syncing a busy machine's disk takes seconds each time."""
    monkeypatch.setattr(posix, "syncfs", lambda fd: None)


@pytest.fixture
def pool(tmp_path: Path) -> ContentPool:
    return ContentPool(str(tmp_path))


def entry(size: int, **meta: Any) -> Entry:
    return Entry("some/file", Kind.FILE, size=size, **({"uid": ME[0], "gid": ME[1], "mtime_ns": MTIME} | meta))


def put(pool: ContentPool, data: bytes, **meta: Any) -> str:
    with pool.batch() as batch:
        return batch.put(io.BytesIO(data), len(data), entry(len(data), **meta))


def pooled(pool: ContentPool, token: str) -> Path:
    return Path(pool.locator.root) / ".unpacker/pool" / pool_path(token)


def everything(pool: ContentPool) -> list[Path]:
    return [p for p in (Path(pool.locator.root) / ".unpacker").rglob("*") if not p.is_dir()]


class TestTokens:
    def test_a_token_names_the_bytes_first(self, pool: ContentPool) -> None:
        digest, dot, metadata = put(pool, b"hello").partition(".")
        assert digest == hashlib.sha256(b"hello").hexdigest()
        assert (dot, len(metadata)) == (".", 16)

    def test_the_same_bytes_and_metadata_are_one_inode(self, pool: ContentPool) -> None:
        assert put(pool, b"hello") == put(pool, b"hello")
        assert len(everything(pool)) == 1

    @pytest.mark.parametrize(
        "meta", [{"mode": 0o755}, {"mtime_ns": MTIME + 1}, {"xattrs": (("user.a", b""),)}, {"uid": 7}, {"gid": 7}]
    )
    def test_other_metadata_is_another_token(self, pool: ContentPool, meta: dict[str, Any]) -> None:
        hint = entry(5)._replace(**meta)
        same = content_token("0" * 64, *_meta(entry(5)))
        assert content_token("0" * 64, *_meta(hint)) != same

    @given(
        st.lists(st.tuples(st.text(min_size=1), st.binary()), max_size=3),
        st.lists(st.tuples(st.text(min_size=1), st.binary()), max_size=3),
    )
    def test_only_equal_xattrs_give_equal_tokens(self, one: Any, two: Any) -> None:
        if all(n.isprintable() for n, _ in one + two):
            tokens = {content_token("0" * 64, 0, 0, 0, 0, tuple(x)) for x in (one, two)}
            assert (len(tokens) == 1) == (one == two)

    def test_empty_files_are_metadata_only(self, pool: ContentPool) -> None:
        token = put(pool, b"")
        assert token.startswith(hashlib.sha256(b"").hexdigest())
        assert everything(pool) == []
        assert pool.missing({token}) == pool.missing({token}, check=True) == set()
        with pool.open(token) as stream:
            assert stream.read(1) == b""

    @pytest.mark.parametrize("token", ["", "../../etc/passwd", "0" * 64, f"{'0' * 64}.{'G' * 16}", f"../{'0' * 78}"])
    def test_what_is_no_token_never_becomes_a_path(self, pool: ContentPool, token: str) -> None:
        put(pool, b"hello")
        with pytest.raises(PublishError, match="not a token"), pool.open(token):
            pass
        with pytest.raises(PublishError, match="not a token"):
            pool.missing({token})


def _meta(hint: Entry) -> Any:
    return hint.mode, hint.uid, hint.gid, hint.mtime_ns, hint.xattrs


class TestWriting:
    @pytest.mark.parametrize("size", [1, 100, SMALL, SMALL + 1, 3 * SMALL + 5])
    @pytest.mark.parametrize("most", [1 << 30, 100_001])
    def test_bytes_come_back_as_they_were_given(self, pool: ContentPool, size: int, most: int) -> None:
        data = hashlib.shake_128(b"%d" % size).digest(size)
        with pool.batch() as batch:
            token = batch.put(Dribble(data, most), size, entry(size))
            assert batch.written == size
        assert token.startswith(hashlib.sha256(data).hexdigest())
        with pool.open(token) as stream:
            assert stream.read(size + 1) == data

    @pytest.mark.parametrize("size", [5, 2 * SMALL])
    def test_files_carry_their_final_metadata(self, pool: ContentPool, size: int) -> None:
        uid, gid = (1234, 4321) if ME[0] == 0 else ME
        xattrs = (("user.a", b"\x00\xff"), ("user.b", b""))
        before = os.umask(0o077)
        try:
            token = put(pool, b"x" * size, mode=0o455, uid=uid, gid=gid, xattrs=xattrs)
        finally:
            os.umask(before)
        own = pooled(pool, token).stat()
        assert (stat.S_IMODE(own.st_mode), own.st_mtime_ns, own.st_size) == (0o455, MTIME, size)
        assert (own.st_uid, own.st_gid) == (uid, gid)
        assert {n: os.getxattr(pooled(pool, token), n) for n in os.listxattr(pooled(pool, token))} == dict(xattrs)

    @pytest.mark.parametrize("mtime", [-1, 0, 1 << 70, -(1 << 70)])
    def test_any_time_can_be_asked_for(self, pool: ContentPool, mtime: int) -> None:
        token = put(pool, b"hello", mtime_ns=mtime)
        assert pool.missing({token}) == set()

    @pytest.mark.parametrize("size", [10, 2 * SMALL])
    def test_a_stream_that_ends_early_is_an_error_and_leaves_nothing(self, pool: ContentPool, size: int) -> None:
        with pool.batch() as batch:
            good = batch.put(io.BytesIO(b"good"), 4, entry(4))
            with pytest.raises(IntegrityError, match=f"of {size} bytes ended after {size - 1}"):
                batch.put(io.BytesIO(b"x" * (size - 1)), size, entry(size))
        assert everything(pool) == [pooled(pool, good)]

    def test_zeros_become_holes(self, pool: ContentPool) -> None:
        data = bytes(8 * SMALL) + b"end" + bytes(3 * SMALL + 7)
        token = put(pool, data)
        own = pooled(pool, token).stat()
        assert own.st_size == len(data)
        assert own.st_blocks * 512 <= 2 * SMALL
        with pool.open(token) as stream:
            assert stream.read(len(data)) == data

    def test_a_large_file_known_already_is_not_kept_twice(self, pool: ContentPool) -> None:
        data = b"x" * (SMALL + 1)
        assert put(pool, data) == put(pool, data)
        assert len(everything(pool)) == 1

    def test_an_xattr_that_cannot_be_stored_is_said_with_its_name(self, pool: ContentPool) -> None:
        with pytest.raises(PublishError, match=r"cannot store the extended attribute user\.big of 70000 bytes"):
            put(pool, b"x", xattrs=(("user.big", bytes(70_000)),))
        assert everything(pool) == []


class TestSync:
    def test_the_real_sync_works_and_says_when_it_does_not(self, tmp_path: Path) -> None:
        real = importlib.util.find_spec("unpacker.publish.posix")
        assert real is not None and real.loader is not None
        module = importlib.util.module_from_spec(real)
        real.loader.exec_module(module)
        with open(tmp_path / "f", "w") as file:
            module.syncfs(file.fileno())
        with pytest.raises(OSError, match="Bad file descriptor"):
            module.syncfs(-1)


class TestDamage:
    def damage(self, pool: ContentPool, token: str, how: str) -> None:
        path = pooled(pool, token)
        path.chmod(0o644)
        if how == "flip":
            path.write_bytes(b"jello")
            os.utime(path, ns=(MTIME, MTIME))
        elif how == "truncate":
            os.truncate(path, 2)
        elif how == "mode":
            path.chmod(0o600)
        elif how == "xattr":
            os.setxattr(path, "user.new", b"")
        elif how == "mtime":
            os.utime(path, (0, 0))

    @pytest.mark.parametrize("how", ["flip", "truncate", "mode", "xattr", "mtime"])
    def test_a_check_throws_out_what_is_not_what_its_token_says(self, pool: ContentPool, how: str) -> None:
        token, other = put(pool, b"hello"), put(pool, b"other")
        assert pool.missing({token, other}, check=True) == set()
        self.damage(pool, token, how)
        assert pool.missing({token, other}) == set()
        assert pool.missing({token, other}, check=True) == {token}
        assert put(pool, b"hello") == token
        assert pool.missing({token, other}, check=True) == set()

    @pytest.mark.parametrize("how", ["truncate", "mode", "mtime"])
    def test_damage_that_shows_is_mended_by_writing_again(self, pool: ContentPool, how: str) -> None:
        token = put(pool, b"hello")
        self.damage(pool, token, how)
        put(pool, b"hello")
        assert pool.missing({token}, check=True) == set()


class TestLinks:
    @pytest.fixture
    def file(self, pool: ContentPool) -> File:
        return File(0o644, *ME, MTIME, (("user.a", b"1"),), 5, put(pool, b"hello", xattrs=(("user.a", b"1"),)))

    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        (tmp_path / "root").mkdir()
        (tmp_path / "scratch").mkdir()
        return tmp_path / "root"

    def links(self, pool: ContentPool, place: Path) -> tuple[PoolLinks, int]:
        fds = [
            os.open(p, posix.DIRECTORY_FLAGS)
            for p in (f"{pool.locator.root}/.unpacker/pool", place.parent / "scratch", place)
        ]
        return PoolLinks(pool.locator.root, fds[0], fds[1]), fds[2]

    def test_a_name_more_than_the_file_system_allows_gets_a_new_inode(
        self, pool: ContentPool, place: Path, file: File, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        link = os.link

        def limited(source: str, name: str, *, src_dir_fd: int, dst_dir_fd: int, follow_symlinks: bool) -> None:
            if os.stat(source, dir_fd=src_dir_fd).st_nlink >= 4:
                raise OSError(errno.EMLINK, "Too many links")
            link(source, name, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, follow_symlinks=follow_symlinks)

        monkeypatch.setattr(os, "link", limited)
        links, fd = self.links(pool, place)
        before = pooled(pool, file.token).stat().st_ino
        for i in range(10):
            links.link(file, f"{i}", fd)
        assert pooled(pool, file.token).stat().st_ino == before
        links.settle()
        inodes = {(place / f"{i}").stat().st_ino for i in range(10)}
        assert len(inodes) == 4
        assert pooled(pool, file.token).stat().st_ino in inodes - {before}
        for i in range(10):
            own = (place / f"{i}").stat()
            assert (place / f"{i}").read_bytes() == b"hello"
            assert (own.st_mtime_ns, stat.S_IMODE(own.st_mode), own.st_nlink <= 4) == (MTIME, 0o644, True)
            assert os.getxattr(place / f"{i}", "user.a") == b"1"
        assert pool.missing({file.token}, check=True) == set()

    @pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP])
    def test_where_links_cannot_be_made_files_are_copied(
        self, pool: ContentPool, place: Path, file: File, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        def broken(*args: Any, **options: Any) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "link", broken)
        links, fd = self.links(pool, place)
        links.link(file, "copy", fd)
        own = (place / "copy").stat()
        assert (place / "copy").read_bytes() == b"hello"
        assert (own.st_nlink, own.st_mtime_ns, os.getxattr(place / "copy", "user.a")) == (1, MTIME, b"1")

    def test_a_content_that_is_gone_is_said_with_what_to_do(self, pool: ContentPool, place: Path, file: File) -> None:
        pooled(pool, file.token).unlink()
        links, fd = self.links(pool, place)
        with pytest.raises(PublishError, match=r"does not hold content.*cache of read layers"):
            links.link(file, "name", fd)

    def test_a_symlink_in_the_pool_is_not_followed(
        self, pool: ContentPool, place: Path, file: File, tmp_path: Path
    ) -> None:
        (tmp_path / "secret").write_text("secret")
        pooled(pool, file.token).unlink()
        pooled(pool, file.token).symlink_to(tmp_path / "secret")
        links, fd = self.links(pool, place)
        links.link(file, "name", fd)
        assert (place / "name").is_symlink()
        with pytest.raises(PublishError), pool.open(file.token):
            pass
