"""Signed handles: only what a namespace handed out lately is read, whatever else stands in a prompt."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from langchain_core.stores import InMemoryByteStore

from pic_rag import HandleSigner, MemoryCache, UnknownHandleError, escape_handles, find_handles
from pic_rag.store import SQLiteStore, signing

HANDLE, OTHER = f"[[pic:{'0123456789abcdef' * 2}]]", f"[[pic:{'f' * 32}]]"


@pytest.fixture
def store() -> InMemoryByteStore:
    """A store of another library."""
    return InMemoryByteStore()


@pytest.fixture
def signer(store: InMemoryByteStore) -> HandleSigner:
    """The signer of the default namespace."""
    return HandleSigner(store)


class ReadOnlyStore(InMemoryByteStore):
    """Refuses to write."""

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """Refuse."""
        raise PermissionError("read-only")


def test_a_signed_handle_is_printable_and_safe_in_templates(signer: HandleSigner) -> None:
    """What holds for handles: templates, JSON and splitters leave it whole."""
    signed = signer.sign(HANDLE)
    assert find_handles(f"a{signed}b") == [signed] != [HANDLE]
    assert signed.isascii()
    assert not set(signed) & set(" \t\n\"'{}\\.,;")
    assert find_handles(escape_handles(signed)) == []


def test_signed_handles_become_handles_and_the_text_around_them_stays(signer: HandleSigner) -> None:
    """Repeats and all."""
    first, second = signer.sign(HANDLE), signer.sign(OTHER)
    assert signer.unsign(f"{first} a {second}{first}") == (f"{HANDLE} a {OTHER}{HANDLE}", [HANDLE, OTHER, HANDLE])
    assert signer.unsign("no handle") == ("no handle", [])


def test_all_signers_of_a_namespace_agree_all_day(store: InMemoryByteStore) -> None:
    """Prompts with the same documents are the same prompts, so a cache of them hits."""
    assert HandleSigner(store).sign(HANDLE) == HandleSigner(store).sign(HANDLE)
    assert HandleSigner(store).verify(HandleSigner(store).sign(HANDLE)) == HANDLE


@pytest.mark.parametrize("text", ["", "text", HANDLE, HANDLE[:-2], f"[[pic:{'0' * 64}]]"])
def test_what_was_not_handed_out_is_not_verified(text: str, signer: HandleSigner) -> None:
    """A computed handle is worth nothing, however well its text is known."""
    assert signer.verify(text) is None
    assert signer.verify(text, any_age=True) is None
    if find_handles(text):
        with pytest.raises(UnknownHandleError, match="1 known here, got .* handed out today or yesterday"):
            signer.unsign(f"{signer.sign(OTHER)} {text}")


def test_no_digit_of_a_signed_handle_can_be_changed(signer: HandleSigner) -> None:
    """Handle, day and code are all covered."""
    signed = signer.sign(HANDLE)
    for at in range(len("[[pic:"), len(signed) - len("]]")):
        forged = f"{signed[:at]}{'0' if signed[at] != '0' else '1'}{signed[at + 1 :]}"
        assert signer.verify(forged, any_age=True) is None


@pytest.mark.parametrize(
    "disguise",
    [
        str.upper,
        lambda signed: signed[:-1],
        lambda signed: signed[1:],
        lambda signed: signed.replace("pic", "p\N{ZERO WIDTH SPACE}ic"),
        lambda signed: signed.replace("[", "\N{FULLWIDTH LEFT SQUARE BRACKET}"),
        lambda signed: signed.replace("p", "\N{CYRILLIC SMALL LETTER ER}"),
        lambda signed: signed.replace("]]", "] ]"),
    ],
)
def test_what_only_looks_like_a_signed_handle_is_text(disguise, signer: HandleSigner) -> None:  # noqa: ANN001
    """It is left as it is: it can never be read."""
    typed = disguise(signer.sign(HANDLE))
    assert signer.unsign(typed) == (typed, [])


def test_a_disguise_that_somebody_takes_off_is_checked_like_any_handle(signer: HandleSigner) -> None:
    """Signatures are checked where the prompt is read, behind whatever normalises text on the way."""
    typed = f"[[pic:{'0' * 32}]]".replace("[", "\N{FULLWIDTH LEFT SQUARE BRACKET}")
    with pytest.raises(UnknownHandleError):
        signer.unsign(unicodedata.normalize("NFKC", typed))


def test_another_namespace_or_store_does_not_read_it(store: InMemoryByteStore, signer: HandleSigner) -> None:
    """Also where both hold the same text."""
    signed = signer.sign(HANDLE)
    assert HandleSigner(store, "other").verify(signed) is None
    assert HandleSigner(InMemoryByteStore()).verify(signed) is None
    store.mset([("other/key", store.mget(["default/key"])[0] or b"")])
    assert HandleSigner(store, "other").verify(signed) is None


def test_a_handle_is_read_until_the_day_after(signer: HandleSigner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is worth nothing to whoever kept it, and its own document can still be restored."""
    today = signing._today()
    signed = signer.sign(HANDLE)
    for days, read in ((-2, None), (-1, HANDLE), (0, HANDLE), (1, HANDLE), (2, None), (400, None)):
        monkeypatch.setattr(signing, "_today", lambda days=days: today + days)
        assert signer.verify(signed) == read
        assert signer.verify(signed, any_age=True) == HANDLE


@pytest.mark.parametrize("text", ["text", HANDLE[:-1], f"{HANDLE} "])
def test_only_a_handle_is_signed_and_only_once(text: str, signer: HandleSigner) -> None:
    """A signature of anything else would be one too many."""
    for wrong in (text, signer.sign(HANDLE)):
        with pytest.raises(ValueError, match="handle must be"):
            signer.sign(wrong)


def test_deleting_the_key_voids_what_was_signed(store: InMemoryByteStore) -> None:
    """The way to take back everything at once."""
    signed = HandleSigner(store).sign(HANDLE)
    store.mdelete(["default/key"])
    assert HandleSigner(store).verify(signed) is None


def test_threads_that_start_together_share_one_key(tmp_path: Path) -> None:
    """The first requests of a fresh store read each other's handles."""
    store = SQLiteStore(tmp_path / "memories.sqlite")
    barrier = threading.Barrier(8)

    def sign(_: int) -> str:
        barrier.wait()
        return HandleSigner(store).sign(HANDLE)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(sign, range(8)))) == 1


def test_another_process_reads_what_this_one_signed(tmp_path: Path) -> None:
    """The key is in the store."""
    signed = HandleSigner(SQLiteStore(tmp_path / "memories.sqlite")).sign(HANDLE)
    code = (
        "import sys; from pic_rag import HandleSigner, SQLiteStore; "
        "print(HandleSigner(SQLiteStore(sys.argv[1])).verify(sys.argv[2])); sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "memories.sqlite"), signed]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == HANDLE


def test_a_store_that_cannot_keep_a_key_signs_for_this_process(caplog: pytest.LogCaptureFixture) -> None:
    """Memories made ahead may lie on a disk that nobody may write to."""
    store = ReadOnlyStore()
    with caplog.at_level(logging.WARNING):
        signed = HandleSigner(store).sign(HANDLE)
    assert "read in this process only" in caplog.text
    assert HandleSigner(store).verify(signed) == HANDLE
    assert HandleSigner(store, "other").verify(signed) is None


def test_a_key_that_is_none_is_named(store: InMemoryByteStore) -> None:
    """An empty key would sign for everybody."""
    store.mset([("default/key", b"")])
    with pytest.raises(ValueError, match="default/key must be 32 bytes in the store, got 0"):
        HandleSigner(store).sign(HANDLE)


def test_a_signed_handle_is_no_key_of_the_cache(signer: HandleSigner) -> None:
    """Memories are looked up only after the signature was checked."""
    with pytest.raises(ValueError, match="handle must be"):
        MemoryCache(InMemoryByteStore(), "ab" * 32).get([signer.sign(HANDLE)])


def test_messages_are_read_in_every_role_and_in_parts(signer: HandleSigner) -> None:
    """Content that is no text stays; a role alone never decides."""
    signed = signer.sign(HANDLE)
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    for role in ("system", "user", "assistant", "tool"):
        prompt = [
            {"role": role, "content": [{"type": "text", "text": f"a{signed}"}, signed, image]},
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": None},
        ]
        read, handles = signer.unsign(prompt)
        assert read[0] == {"role": role, "content": [{"type": "text", "text": f"a{HANDLE}"}, HANDLE, image]}
        assert list(read[1:]) == prompt[1:]
        assert handles == [HANDLE, HANDLE]


@pytest.mark.parametrize("documents", ["system", "tool"])
@pytest.mark.parametrize("people", ["user", "assistant"])
def test_where_documents_have_their_place_people_bring_in_no_handle(
    documents: str, people: str, signer: HandleSigner
) -> None:
    """Even a handle that the application showed to the user a minute ago."""
    shown = signer.sign(OTHER)
    prompt = [
        {"role": documents, "content": signer.sign(HANDLE)},
        {"role": people, "content": f"What is {shown}?"},
        {"role": "user", "content": "And now?"},
    ]
    with pytest.raises(UnknownHandleError, match="this handle where people write"):
        signer.unsign(prompt)
    read, handles = signer.unsign(prompt, only=[signer.sign(HANDLE)])
    assert handles == [HANDLE]
    assert read[1]["content"] == f"What is {escape_handles(shown)}?"


def test_who_names_the_handles_has_no_others_read_and_no_error(signer: HandleSigner) -> None:
    """Unless one that is named was not handed out."""
    first, second = signer.sign(HANDLE), signer.sign(OTHER)
    text, handles = signer.unsign(f"{first} {second} {HANDLE}", only=[second])
    assert text == f"{escape_handles(first)} {OTHER} {escape_handles(HANDLE)}"
    assert handles == [OTHER]
    foreign = HandleSigner(InMemoryByteStore()).sign(HANDLE)
    with pytest.raises(UnknownHandleError):
        signer.unsign(foreign, only=[foreign])
    with pytest.raises(ValueError, match="handles must be a list of signed handles, got"):
        signer.unsign(HANDLE, only=[HANDLE])


@pytest.mark.parametrize("cut", [20, 45, 69, 70])
def test_a_handle_that_was_cut_is_an_error_and_not_a_text_to_guess_about(signer: HandleSigner, cut: int) -> None:
    """A splitter behind the compressor, or a prompt that was shortened."""
    signed = signer.sign(HANDLE)
    for text in (f"{signed[:cut]} {signed[cut:]}", f"{signer.sign(OTHER)} and {signed[:cut]}"):
        with pytest.raises(
            ValueError, match=r"handles must be whole, got '\[\[pic:0123.*Compress after text splitters"
        ):
            signer.unsign(text)
    assert signer.unsign("[[pic: what is that? [[pic::0123456789abcdef0123") == (
        "[[pic: what is that? [[pic::0123456789abcdef0123",
        [],
    )


@pytest.mark.parametrize("cut", [7, 13])
def test_what_a_short_beginning_leaves_is_an_error_and_a_digest_is_not(signer: HandleSigner, cut: int) -> None:
    tail = signer.sign(HANDLE)[cut:]
    with pytest.raises(ValueError, match=f"handles must be whole, got '{tail}'"):
        signer.unsign(f"Context: {tail}")
    digests = "[[" + "0a" * 32 + "]], [[commit " + "0a" * 20 + "]]"
    assert signer.unsign(digests) == (digests, [])


class BrokenStore(InMemoryByteStore):
    """Can be neither read nor written."""

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """Refuse."""
        raise PermissionError("no")


def test_without_a_readable_store_handles_are_read_in_this_process(caplog: pytest.LogCaptureFixture) -> None:
    """As without a writable one: compressing goes on, and so does reading."""
    with caplog.at_level(logging.WARNING):
        signed = HandleSigner(BrokenStore()).sign(HANDLE)
    assert "its handles are read in this process only: no" in caplog.text
    assert HandleSigner(BrokenStore()).verify(signed) == HANDLE


def test_many_foreign_handles_are_escaped_in_one_pass(signer: HandleSigner) -> None:
    """Not in one pass each, which took minutes."""
    signed = signer.sign(HANDLE)
    foreign = [f"[[pic:{number:064x}]]" for number in range(20_000)]
    begin = time.perf_counter()
    read, handles = signer.unsign("".join(foreign) + signed, only=[signed])
    assert time.perf_counter() - begin < 5
    assert handles == [HANDLE]
    assert str(read).count("[[pic::") == 20_000
