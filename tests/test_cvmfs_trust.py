"""Keys and whitelists: what clients believe, and what they say when a key is missing or wrong."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from unpacker.cvmfs import keys, whitelist
from unpacker.cvmfs.keys import Certificate, MasterKey, PublicKey, RepositoryKey
from unpacker.cvmfs.signing import Letter, seal
from unpacker.cvmfs.whitelist import Whitelist
from unpacker.errors import PublishError, SettingsError

NAME = "try.example.org"
NOW = 1_790_000_000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made") / "keys"
    keys.create(str(directory), NAME, now=NOW)
    return directory


@pytest.fixture
def directory(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(made, tmp_path / "keys")
    return tmp_path / "keys"


def raw(signature: bytes, key: rsa.RSAPublicKey) -> bytes:
    """What was signed, padding and all, by nothing but arithmetic."""
    numbers = key.public_numbers()
    return pow(int.from_bytes(signature, "big"), numbers.e, numbers.n).to_bytes(key.key_size // 8, "big")


def padded(message: bytes) -> bytes:
    return b"\x00\x01" + b"\xff" * (256 - 3 - len(message)) + b"\x00" + message


def test_new_keys_are_four_files_of_which_the_private_ones_are_for_the_owner_only(made: Path) -> None:
    modes = {name: os.stat(made / name).st_mode & 0o7777 for name in os.listdir(made)}
    assert modes == {f"{NAME}.masterkey": 0o400, f"{NAME}.key": 0o400, f"{NAME}.pub": 0o444, f"{NAME}.crt": 0o444}
    assert os.stat(made).st_mode & 0o777 == 0o700


def test_making_keys_twice_keeps_those_that_are_there(directory: Path) -> None:
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    keys.create(str(directory), NAME, now=NOW + 1)
    assert before == {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("public", ["pub", "crt"])
def test_a_public_half_that_was_not_written_before_a_kill_is_made_from_the_private_one(
    directory: Path, public: str
) -> None:
    (directory / f"{NAME}.{public}").unlink()
    (directory / ".unpacker-12-34").write_bytes(b"half a key")
    keys.create(str(directory), NAME, now=NOW)
    RepositoryKey.open(str(directory), NAME)
    MasterKey.open(str(directory), NAME)
    assert len(os.listdir(directory)) == 4


@pytest.mark.parametrize(("private", "public"), [("masterkey", "pub"), ("key", "crt")])
def test_a_private_half_that_is_kept_elsewhere_is_not_made_anew(directory: Path, private: str, public: str) -> None:
    (directory / f"{NAME}.{private}").unlink()
    with pytest.raises(PublishError, match=rf"\.{public} is there, {NAME}\.{private} is not"):
        keys.create(str(directory), NAME, now=NOW)


def test_the_certificate_is_that_of_a_release_manager_for_a_year(made: Path) -> None:
    shown = subprocess.run(
        ["openssl", "x509", "-in", made / f"{NAME}.crt", "-noout", "-subject", "-startdate", "-enddate"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"CN = {NAME} CernVM-FS Release Managers" in shown or f"CN={NAME} CernVM-FS Release Managers" in shown
    assert "notBefore=Sep 21 14:13:20 2026 GMT" in shown and "notAfter=Sep 21 14:13:20 2027 GMT" in shown


def test_a_name_longer_than_thirty_letters_is_cut_in_the_certificate(tmp_path: Path) -> None:
    name = "a" * 35 + ".example.org"
    keys.create(str(tmp_path), name, now=NOW)
    command = ["openssl", "x509", "-in", tmp_path / f"{name}.crt", "-noout", "-subject"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "a" * 30 + "[...] CernVM-FS Release Managers" in shown


@pytest.mark.parametrize(
    "name", ["", "nodot", "a..b", ".a.b", "a.b.", "a/b.c", "a b.c", "x" * 57 + ".org", "-a.b", "é.b"]
)
def test_a_name_that_no_client_could_mount_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="not a repository name"):
        keys.create(str(tmp_path / "keys"), name, now=NOW)
    assert not (tmp_path / "keys").exists()


def test_keys_below_the_served_directory_are_refused_even_through_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "served" / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to("served/sub")
    for inside in ("served", "served/keys", "link", "link/keys", "other/../served"):
        with pytest.raises(SettingsError, match="would be served"):
            keys.check_outside(str(tmp_path / inside), str(tmp_path / "served"))
    for outside in ("served.keys", "keys"):
        keys.check_outside(str(tmp_path / outside), str(tmp_path / "served"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"key": None}, r"there is no .*\.key: the repository key"),
        ({"crt": None}, r"there is no .*\.crt: the certificate"),
        ({"key": b"rubbish"}, "not a private key in PEM form"),
        ({"crt": b"rubbish"}, "not a certificate in PEM form"),
        ({"key": b"x" * 70000}, "too long for a key"),
        ({"key": "masterkey"}, "no pair"),
    ],
    ids=["no key", "no certificate", "key is rubbish", "certificate is rubbish", "key is huge", "no pair"],
)
def test_what_is_wrong_with_a_repository_key_is_said(
    directory: Path, spoil: dict[str, bytes | str | None], message: str
) -> None:
    for suffix, content in spoil.items():
        path = directory / f"{NAME}.{suffix}"
        if isinstance(content, str):
            content = (directory / f"{NAME}.{content}").read_bytes()
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    with pytest.raises(PublishError, match=message):
        RepositoryKey.open(str(directory), NAME)


def test_an_encrypted_key_and_one_of_another_kind_are_refused(directory: Path) -> None:
    path = directory / f"{NAME}.key"
    elliptic = ec.generate_private_key(ec.SECP256R1())
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.unlink()
    path.write_bytes(elliptic.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    with pytest.raises(PublishError, match="not an RSA key"):
        RepositoryKey.open(str(directory), NAME)
    path.write_bytes(elliptic.private_bytes(pem, pkcs8, serialization.BestAvailableEncryption(b"secret")))
    with pytest.raises(PublishError, match="encrypted with a passphrase"):
        RepositoryKey.open(str(directory), NAME)


def test_a_key_with_flipped_bits_is_found_when_opening_and_not_when_publishing(directory: Path) -> None:
    path = directory / f"{NAME}.key"
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    assert isinstance(key, rsa.RSAPrivateKey)
    form = serialization.PrivateFormat.TraditionalOpenSSL
    data = bytearray(key.private_bytes(serialization.Encoding.DER, form, serialization.NoEncryption()))
    numbers = key.private_numbers()
    for number in (numbers.d, numbers.p):
        data[data.index(number.to_bytes((number.bit_length() + 7) // 8, "big")) + 20] ^= 4
    path.unlink()
    body = base64.encodebytes(data).decode()
    path.write_text(f"-----BEGIN RSA PRIVATE KEY-----\n{body}-----END RSA PRIVATE KEY-----\n")
    with pytest.raises(PublishError, match="is damaged"):
        RepositoryKey.open(str(directory), NAME)


def test_keys_in_either_pem_form_are_read(directory: Path) -> None:
    for path in (directory / f"{NAME}.key", directory / f"{NAME}.masterkey"):
        key = serialization.load_pem_private_key(path.read_bytes(), None)
        pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        path.unlink()
        path.write_bytes(key.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    RepositoryKey.open(str(directory), NAME)
    MasterKey.open(str(directory), NAME)


def test_a_master_key_that_does_not_fit_what_clients_have_is_refused(directory: Path) -> None:
    path = directory / f"{NAME}.masterkey"
    path.unlink()
    path.write_bytes((directory / f"{NAME}.key").read_bytes())
    with pytest.raises(PublishError, match="no pair"):
        MasterKey.open(str(directory), NAME)
    (directory / f"{NAME}.pub").unlink()
    MasterKey.open(str(directory), NAME)


def test_no_message_holds_a_secret(directory: Path) -> None:
    path = directory / f"{NAME}.key"
    secret = path.read_text().splitlines()[3]
    path.unlink()
    path.write_text(secret)
    with pytest.raises(PublishError) as raised:
        RepositoryKey.open(str(directory), NAME)
    assert secret not in str(raised.value)


def test_a_manifest_is_signed_with_a_sha1_digest_and_a_whitelist_over_the_bare_text(made: Path) -> None:
    manager, master = RepositoryKey.open(str(made), NAME), MasterKey.open(str(made), NAME)
    text = b"0123456789abcdef0123456789abcdef01234567"
    digest_info = bytes.fromhex("3021300906052b0e03021a05000414") + hashlib.sha1(text).digest()
    assert raw(manager.sign(text), manager.certificate.key) == padded(digest_info)
    public = serialization.load_pem_public_key((made / f"{NAME}.pub").read_bytes())
    assert isinstance(public, rsa.RSAPublicKey)
    assert raw(master.sign(text), public) == padded(text)


def test_a_fingerprint_is_the_hash_of_the_binary_certificate(made: Path) -> None:
    command = ["openssl", "x509", "-in", made / f"{NAME}.crt", "-noout", "-fingerprint", "-sha1"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().partition("=")[2]
    certificate = Certificate.open(str(made), NAME)
    assert certificate.fingerprint() == shown
    assert certificate.fingerprint("shake128").endswith("-SHAKE128")
    assert len(certificate.fingerprint("shake128")) == len(shown) + len("-SHAKE128")


def test_a_letter_is_its_text_a_line_of_dashes_the_hash_and_the_signature() -> None:
    letter = seal(b"first\nsecond\n", "sha1", lambda text: b"signed:" + text)
    name = hashlib.sha1(b"first\nsecond\n").hexdigest().encode()
    assert letter == b"first\nsecond\n--\n" + name + b"\nsigned:" + name
    parsed = Letter.parse(letter, "it")
    assert (parsed.text, parsed.signed, parsed.signature) == (b"first\nsecond\n", name, b"signed:" + name)


def test_a_signature_may_hold_any_byte() -> None:
    signature = b"\n--\n\x00\nab\n--\n"
    assert Letter.parse(seal(b"a\n", "sha1", lambda _: signature), "it").signature == signature


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has no signature"),
        (b"text\n", "has no signature"),
        (b"text\n--\n", "not a content hash"),
        (b"text\n--\n" + b"0" * 40 + b"\nsig", "damaged"),
        (b"text\n--\n" + hashlib.sha1(b"text\n").hexdigest().encode() + b"\n", "has no signature"),
        (b"text\n--\n" + hashlib.sha1(b"text\n").hexdigest().encode(), "has no signature"),
        (b"text\n--\n\xff\xff\nsig", "before its signature"),
        (b"x" * (1 << 20) + b"\n--\n", "longer than"),
    ],
)
def test_what_is_no_letter_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(PublishError, match=message):
        Letter.parse(data, "the letter")


@pytest.mark.parametrize("text", [b"no newline", b"a\n--\nb\n", b"--\n"])
def test_a_text_that_readers_would_cut_elsewhere_is_never_signed(text: bytes) -> None:
    with pytest.raises(ValueError, match="whole lines"):
        seal(text, "sha1", lambda _: b"signature")


@pytest.mark.parametrize("algorithm", ["sha1", "shake128"])
def test_a_whitelist_says_when_it_was_signed_until_when_for_whom(made: Path, algorithm: str) -> None:
    certificate, master = Certificate.open(str(made), NAME), MasterKey.open(str(made), NAME)
    data = whitelist.issue(NAME, certificate, algorithm=algorithm, days=30, now=NOW).sealed(master, algorithm)
    lines = data.split(b"\n--\n")[0].decode().split("\n")
    assert lines == ["20260921141320", "E20261021141320", f"N{NAME}", certificate.fingerprint(algorithm)]
    read = Whitelist.parse(data, "it", key=PublicKey.open(str(made), NAME))
    assert read.admits(certificate)
    assert (read.issued, read.expires) == (NOW, NOW + 30 * 86400)
    assert [read.days_left(NOW + days * 86400) for days in (0, 29, 30, 31)] == [30, 1, 0, -1]
    assert read.days_left(read.expires + 1) == -1


def test_openssl_verifies_a_whitelist_with_the_public_key_alone(made: Path, tmp_path: Path) -> None:
    master = MasterKey.open(str(made), NAME)
    certificate = Certificate.open(str(made), NAME)
    letter = Letter.parse(
        whitelist.issue(NAME, certificate, algorithm="sha1", days=1, now=NOW).sealed(master, "sha1"), "it"
    )
    (tmp_path / "signature").write_bytes(letter.signature)
    command = ["openssl", "pkeyutl", "-verifyrecover", "-pubin", "-inkey", made / f"{NAME}.pub"]
    done = subprocess.run([*command, "-in", tmp_path / "signature"], capture_output=True, check=True)
    assert done.stdout == letter.signed


def test_a_whitelist_of_another_master_key_is_refused(made: Path, tmp_path: Path) -> None:
    keys.create(str(tmp_path), NAME, now=NOW)
    certificate = Certificate.open(str(made), NAME)
    letter = whitelist.issue(NAME, certificate, algorithm="sha1", days=1, now=NOW)
    data = letter.sealed(MasterKey.open(str(made), NAME), "sha1")
    with pytest.raises(PublishError, match="not signed by the master key"):
        Whitelist.parse(data, "it", key=PublicKey.open(str(tmp_path), NAME))
    assert not Whitelist.parse(data, "it").admits(Certificate.open(str(tmp_path), NAME))


def test_comments_and_several_certificates_in_a_whitelist_are_read() -> None:
    one, other = ":".join(["0E"] * 20), ":".join(["E1"] * 20) + "-RMD160"
    text = f"20260101000000\nE20270101000000\nN{NAME}\n{one} # first\n{other}\n".encode()
    read = Whitelist.parse(seal(text, "sha1", lambda _: b"x"), "it")
    assert read.fingerprints == (one, other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"20260101000000\nE20270101000000\n", "lacks its name"),
        (f"20260101000000\nN{NAME}\n".encode(), "lacks its expiry"),
        (f"2026\nE20270101000000\nN{NAME}\n".encode(), "not a time"),
        (f"20260101000000\nE20271301000000\nN{NAME}\n".encode(), "not a time"),
    ],
)
def test_a_whitelist_without_name_or_times_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(PublishError, match=message):
        Whitelist.parse(seal(text, "sha1", lambda _: b"x"), "it")


def test_renewing_keeps_who_was_admitted_and_adds_a_new_certificate_once(made: Path, tmp_path: Path) -> None:
    keys.create(str(tmp_path), NAME, now=NOW)
    first, second = Certificate.open(str(made), NAME), Certificate.open(str(tmp_path), NAME)
    old = whitelist.issue(NAME, first, algorithm="sha1", days=30, now=NOW)
    later = NOW + 10 * 86400
    assert whitelist.renew(old, None, algorithm="sha1", days=30, now=later).fingerprints == old.fingerprints
    both = whitelist.renew(old, second, algorithm="sha1", days=30, now=later)
    assert both.admits(first) and both.admits(second) and both.days_left(later) == 30
    assert whitelist.renew(both, second, algorithm="sha1", days=30, now=later).fingerprints == both.fingerprints
