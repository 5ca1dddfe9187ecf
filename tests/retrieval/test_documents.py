"""Files become documents, and a file that cannot is a problem that names itself and its remedy."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from pic_rag.retrieval.documents import Document, DocumentError, load_documents


def write_pdf(path: Path, pages: list[str], password: str | None = None) -> None:
    """Write a PDF with one line of text a page; an empty string makes a page without a text layer."""
    writer = PdfWriter()
    for text in pages:
        page = writer.add_blank_page(width=300, height=300)
        font = DictionaryObject(
            {
                NameObject("/Type"): NameObject("/Font"),
                NameObject("/Subtype"): NameObject("/Type1"),
                NameObject("/BaseFont"): NameObject("/Helvetica"),
            }
        )
        fonts = DictionaryObject({NameObject("/F1"): font})
        page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
        stream = DecodedStreamObject()
        stream.set_data(f"BT /F1 12 Tf 20 200 Td ({text}) Tj ET".encode() if text else b"")
        page[NameObject("/Contents")] = stream
    if password is not None:
        writer.encrypt(user_password=password, owner_password="owner", algorithm="RC4-128")
    with path.open("wb") as file:
        writer.write(file)


@pytest.mark.parametrize("suffix", [".txt", ".md", ".markdown", ".rst", ".TXT"])
def test_a_text_file_is_a_document(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"note{suffix}"
    path.write_bytes("Grüße,\r\nKai\r".encode())
    loaded = load_documents(path)
    assert [(d.text, d.source) for d in loaded.documents] == [("Grüße,\nKai\n", path.as_posix())]
    assert loaded.problems == []


def test_a_text_that_was_cut_inside_a_letter_is_not_taken_for_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "cut.txt").write_bytes("A harbour.".encode("utf-16")[:-1])
    with pytest.raises(DocumentError, match="must be whole UTF-16 text, got byte .* it may be cut"):
        load_documents(tmp_path / "cut.txt", on_error="raise")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_obeyed_and_dropped(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes("naïve".encode(encoding))
    assert load_documents(tmp_path).documents[0].text == "naïve"


def test_folders_are_walked_in_sorted_order_without_hidden_or_foreign_files(tmp_path: Path) -> None:
    for name in ("b.md", "a/z.txt", "a/b/c.rst", ".git/x.md", ".hidden.md", "code.py", "c.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    sources = [Path(d.source).relative_to(tmp_path).as_posix() for d in load_documents([tmp_path]).documents]
    assert sources == ["a/b/c.rst", "a/z.txt", "b.md", "c.md"]


def test_a_file_reached_twice_is_loaded_once(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("text")
    (tmp_path / "link.md").symlink_to(tmp_path / "a.md")
    assert len(load_documents([tmp_path, tmp_path / "a.md"]).documents) == 1


def test_an_empty_path_is_a_problem_and_not_the_current_folder(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.md").write_text("text")
    monkeypatch.chdir(tmp_path)
    loaded = load_documents(["", "a.md"])
    assert [document.text for document in loaded.documents] == ["text"]
    assert "must name a file or a folder, got an empty path" in str(loaded.problems[0])


def test_ids_depend_on_source_and_text_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.md").write_text("one")
    (tmp_path / "b.md").write_text("one")
    monkeypatch.chdir(tmp_path)
    first, second = load_documents(["a.md", "b.md"]).documents
    assert load_documents("./a.md").documents == [first]
    assert first.id != second.id
    assert Document.from_text("two", source="a.md").id != first.id == Document.from_text("one", source="a.md").id


def test_the_text_of_a_pdf_is_read_page_by_page(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", ["First page.", "", "Third page."])
    (document,) = load_documents(tmp_path).documents
    assert document.text == "First page.\n\nThird page."
    assert document.metadata == {"path": str(tmp_path / "a.pdf"), "pages": 3, "pages_without_text": [2]}


def test_a_pdf_encrypted_with_an_empty_password_is_read(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", ["Open."], password="")
    assert load_documents(tmp_path).documents[0].text == "Open."


def bad_file(folder: Path, kind: str) -> Path:
    path = folder / {
        "binary": "a.txt",
        "undecodable": "a.md",
        "empty": "a.rst",
        "blank": "a.txt",
        "missing": "none.txt",
        "ending": "a.docx",
        "broken link": "link.md",
    }.get(kind, "a.pdf")
    contents = {
        "binary": b"MZ\x00\x01",
        "undecodable": b"caf\xe9",
        "empty": b"",
        "blank": b" \n\t",
        "ending": b"PK",
        "not a pdf": b"hello",
        "truncated pdf": b"%PDF-1.7\n1 0 obj\n<<",
    }
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "encrypted pdf":
        write_pdf(path, ["Secret."], password="secret")
    elif kind == "image-only pdf":
        write_pdf(path, ["", ""])
    elif kind == "broken link":
        path.symlink_to(folder / "nowhere")
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("binary", "must be a text file, got a binary file .*position 2"),
        ("undecodable", "must be UTF-8 text, got byte 0xe9 at position 3. Convert it.*iconv"),
        ("empty", "must hold text, got an empty file"),
        ("blank", "must hold text, got white space only"),
        ("missing", "must exist, got no such file"),
        ("broken link", "must exist, got no such file"),
        ("ending", "must have one of the endings .txt.*got '.docx'"),
        ("not a pdf", "must be a readable PDF.*qpdf"),
        ("truncated pdf", "must be a readable PDF.*qpdf"),
        ("encrypted pdf", "must be a PDF without a password.*--decrypt"),
        ("image-only pdf", r"must be a PDF with a text layer, got 2 page\(s\) without any. Run OCR"),
    ],
)
def test_each_problem_names_path_rule_and_next_step(tmp_path: Path, kind: str, message: str) -> None:
    path = bad_file(tmp_path, kind)
    loaded = load_documents(path)
    assert loaded.documents == []
    (problem,) = loaded.problems
    assert problem.path == path.as_posix()
    assert str(problem).startswith(f"Document '{path.as_posix()}' must ")
    with pytest.raises(DocumentError, match=message):
        load_documents(path, on_error="raise")
    assert str(pickle.loads(pickle.dumps(problem))) == str(problem)


def test_one_bad_file_among_many_costs_that_file_only(tmp_path: Path) -> None:
    for number in range(10_000):
        (tmp_path / f"{number:05}.txt").write_text(f"Document {number}.")
    (tmp_path / "00777.txt").write_bytes(b"\x00")
    loaded = load_documents(tmp_path)
    assert len(loaded.documents) == 9999
    assert [Path(problem.path).name for problem in loaded.problems] == ["00777.txt"]


def test_a_path_that_cannot_even_be_looked_at_costs_itself_only(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("Text.")
    paths = [tmp_path / f"{'a' * 300}.txt", str(tmp_path / "a\0b.txt"), tmp_path / "good.txt" / "b.txt", tmp_path]
    loaded = load_documents(paths)
    assert [document.text for document in loaded.documents] == ["Text."]
    reasons = [
        "be a path that can be read, got file name too long",
        "got embedded null byte",
        "exist, got no such file",
    ]
    assert len(loaded.problems) == len(reasons)
    assert all(reason in str(problem) for reason, problem in zip(reasons, loaded.problems, strict=True))


def test_a_folder_without_any_document_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("pass")
    with pytest.raises(DocumentError, match="at least one file of the kinds"):
        load_documents(tmp_path, on_error="raise")


def test_unreadable_files_and_folders_are_problems(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.txt").chmod(0)
    (tmp_path / "closed").mkdir(mode=0)
    if os.access(tmp_path / "a.txt", os.R_OK):
        pytest.skip("this user may read everything")
    problems = load_documents(tmp_path).problems
    assert [Path(problem.path).name for problem in problems] == ["a.txt", "closed"]
    assert all("permission denied" in str(problem) for problem in problems)


@pytest.mark.skipif(os.name != "posix", reason="file names are text on this platform")
def test_a_file_name_that_is_not_utf8_has_a_printable_source(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "wb") as file:
        file.write(b"text")
    (document,) = load_documents(tmp_path).documents
    assert document.source.encode().endswith("caf\ufffd.txt".encode())


def test_a_text_with_lone_surrogates_still_has_an_id() -> None:
    assert len(Document.from_text("\ud800", source="a").id) == 32


def test_on_error_takes_two_words_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on_error must be 'skip' or 'raise', got 'ignore'"):
        load_documents(tmp_path, on_error="ignore")  # type: ignore[arg-type]
