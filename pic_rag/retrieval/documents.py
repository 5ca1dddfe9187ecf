"""Files on disk become `Document`s: text, Markdown, reStructuredText and PDF.

One bad file among ten thousand costs that file only: it comes back as a problem which names the path, the rule
and the next step. This file does not know how a document is split, embedded or compressed.
"""

from __future__ import annotations

import codecs
import hashlib
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pic_rag.progress import progress_bar

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".md", ".markdown", ".rst")
SUFFIXES = (*TEXT_SUFFIXES, ".pdf")


class DocumentError(ValueError):
    """A file that cannot become a document.

    Attributes:
        path: the file or folder, as the user named it.
    """

    def __init__(self, path: str, rule: str, got: str, next_step: str) -> None:
        """Keep the four parts of the message."""
        super().__init__(path, rule, got, next_step)
        self.path = path

    def __str__(self) -> str:
        """Return the message: path, rule, value, next step."""
        path, rule, got, next_step = self.args
        return f"Document '{path}' must {rule}, got {got}. {next_step}"


@dataclass(frozen=True)
class Document:
    """What the user stores and retrieves.

    Attributes:
        id: 32 hex digits; see `from_text`.
        text: the whole text.
        source: where it comes from, such as a path, for messages and citations.
        metadata: anything else worth keeping; JSON values. `path` is the file it was loaded from.
    """

    id: str
    text: str
    source: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_text(cls, text: str, *, source: str, metadata: Mapping[str, Any] | None = None) -> Document:
        """Make a document whose id is a hash of its source and its text: the same both, the same id.

        Raises:
            TypeError: `text` is not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, got {type(text).__name__} for {source!r}. Decode it first.")
        digest = hashlib.sha256(f"{source}\0{text}".encode("utf-8", "surrogatepass")).hexdigest()
        return cls(id=digest[:32], text=text, source=source, metadata=dict(metadata or {}))


@dataclass(frozen=True)
class LoadedDocuments:
    """What `load_documents` found.

    Attributes:
        documents: in the order of the paths; inside a folder sorted by path.
        problems: one error for each file or folder that gave no document, in the same order.
        files: all that the paths led to, read or not.
    """

    documents: list[Document]
    problems: list[DocumentError]
    files: list[Path]


def load_documents(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    on_error: Literal["skip", "raise"] = "skip",
    progress: bool | None = None,
) -> LoadedDocuments:
    """Load files, and folders recursively, as documents.

    A folder gives its .txt, .md, .markdown, .rst and .pdf files, without hidden files, hidden folders and linked
    folders. A file that is reached twice is loaded once. `source` is the path as given (`./a//b.md` as `a/b.md`),
    so ids stay the same as long as the files are named the same way.

    Args:
        paths: one path or many.
        on_error: `"skip"` collects problems and goes on, `"raise"` stops at the first.
        progress: show a progress bar; `None` shows one on a terminal once it takes over a second.

    Raises:
        DocumentError: with `on_error="raise"`, for the first file that cannot become a document.
        ValueError: `on_error` is neither.
    """
    if on_error not in ("skip", "raise"):
        raise ValueError(f"on_error must be 'skip' or 'raise', got {on_error!r}.")
    roots = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    found = list(find_documents(roots))
    loaded = LoadedDocuments([], [], [item for item in found if isinstance(item, Path)])
    for item in progress_bar(progress, found, desc="Loading documents", unit="file"):
        try:
            if isinstance(item, DocumentError):
                raise item
            loaded.documents.append(load_document(item))
        except DocumentError as problem:
            if on_error == "raise":
                raise
            logger.warning("Skipped: %s", problem)
            loaded.problems.append(problem)
    return loaded


def find_documents(paths: Iterable[str | os.PathLike[str]]) -> Iterator[Path | DocumentError]:
    """Yield each file that `load_documents` would load, once, and an error for each folder that leads to none."""
    seen: set[str] = set()
    for path in paths:
        if not os.fspath(path):  # of an unset variable, perhaps: it would be the current folder
            yield DocumentError("''", "name a file or a folder", "an empty path", "Write . for the current folder.")
            continue
        root = Path(os.path.normpath(path))
        for item in _walk_folder(root) if os.path.isdir(root) else (root,):
            if isinstance(item, DocumentError):
                yield item
            elif (key := real_path(item)) not in seen:
                seen.add(key)
                yield item


def _walk_folder(root: Path) -> list[Path | DocumentError]:
    found: list[Path | DocumentError] = []

    def note(error: OSError) -> None:
        folder = _label(Path(error.filename or root))
        found.append(DocumentError(folder, "be a folder you may read", _reason(error), "Change its permissions."))

    for folder, subfolders, names in os.walk(root, onerror=note):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        visible = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        found.extend(path for path in visible if path.suffix.lower() in SUFFIXES)
    if not found:
        rule = f"be a folder that holds at least one file of the kinds {', '.join(SUFFIXES)}"
        found.append(DocumentError(_label(root), rule, "none", "Name another folder."))
    return sorted(found, key=lambda item: item.path if isinstance(item, DocumentError) else _label(item))


def load_document(path: Path) -> Document:
    """Load one file.

    Raises:
        DocumentError: it cannot become a document.
    """
    source = _label(path)
    suffix = path.suffix.lower()
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DocumentError(source, "exist", "no such file or folder", "Check the path.") from error
    except (OSError, ValueError) as error:  # not allowed, too long, a zero character
        raise DocumentError(source, "be a path that can be read", _reason(error), "Check the path.") from error
    if not stat.S_ISREG(status.st_mode):
        raise DocumentError(source, "be a file or a folder", "something else", "Name a regular file.")
    if suffix not in SUFFIXES:
        got = f"'{suffix}'" if suffix else "none"
        raise DocumentError(source, f"have one of the endings {', '.join(SUFFIXES)}", got, "Convert or rename it.")
    read: Callable[[Path], tuple[str, dict[str, Any]]] = _read_pdf if suffix == ".pdf" else _read_text
    try:
        if status.st_size == 0:
            raise DocumentError(source, "hold text", "an empty file (0 bytes)", "Fill or remove it.")
        text, metadata = read(path)
    except OSError as error:
        raise DocumentError(source, "be readable", _reason(error), "Check the file and its permissions.") from error
    if not text.strip():
        raise DocumentError(source, "hold text", "white space only", "Fill or remove it.")
    return Document.from_text(text, source=source, metadata={"path": os.path.abspath(path), **metadata})


def real_path(path: str | os.PathLike[str]) -> str:
    """The absolute path without links; with them where they cannot be followed."""
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):
        return os.path.abspath(path)


def _label(path: Path) -> str:
    """Return the path in printable form: a file name need not be UTF-8, what prints it must be."""
    return os.fsencode(path.as_posix()).decode("utf-8", "replace")


def _reason(error: OSError | ValueError) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


def _read_text(path: Path) -> tuple[str, dict[str, Any]]:
    data = path.read_bytes()
    encoding = _encoding(data)
    if encoding == "utf-8-sig" and b"\0" in data:
        got = f"a binary file (a zero byte at position {data.index(0)})"
        raise DocumentError(_label(path), "be a text file", got, "Remove it, or name the text it was made from.")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        got = f"byte 0x{data[error.start]:02x} at position {error.start}"
        if encoding != "utf-8-sig":  # its byte order mark says so
            rule = f"be whole {encoding.upper()} text"
            raise DocumentError(_label(path), rule, got, "Copy the file again, it may be cut.") from error
        next_step = "Convert it, for example: iconv -f WINDOWS-1252 -t UTF-8."
        raise DocumentError(_label(path), "be UTF-8 text", got, next_step) from error
    return text.replace("\r\n", "\n").replace("\r", "\n"), {}


def _encoding(data: bytes) -> str:
    """Return UTF-8 unless a byte order mark says UTF-32 or UTF-16; that of UTF-32 may begin like UTF-16's."""
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    return "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def _read_pdf(path: Path) -> tuple[str, dict[str, Any]]:
    from pypdf import PdfReader
    from pypdf.errors import DependencyError

    source = _label(path)
    try:
        with path.open("rb") as file:
            reader = PdfReader(file)
            if reader.is_encrypted and not reader.decrypt(""):  # many PDFs are encrypted with an empty password
                next_step = "Remove the password first, for example: qpdf --decrypt."
                raise DocumentError(source, "be a PDF without a password", "an encrypted one", next_step)
            pages = [_clean(page.extract_text()) for page in reader.pages]
    except (DocumentError, OSError):
        raise
    except DependencyError as error:
        next_step = "pip install 'pypdf[crypto]'."
        raise DocumentError(source, "be a PDF without AES encryption", "an encrypted one", next_step) from error
    except Exception as error:  # a malformed PDF raises whatever its bytes lead to, RecursionError included
        next_step = "Repair it, for example: qpdf broken.pdf repaired.pdf."
        got = f"{type(error).__name__}: {error}"
        raise DocumentError(source, "be a readable PDF", got, next_step) from error
    return _join_pages(source, pages)


def _join_pages(source: str, pages: list[str]) -> tuple[str, dict[str, Any]]:
    without_text = [number for number, page in enumerate(pages, start=1) if not page.strip()]
    if len(without_text) == len(pages):
        got = f"{len(pages)} page(s) without any"
        raise DocumentError(source, "be a PDF with a text layer", got, "Run OCR on it, for example: ocrmypdf.")
    metadata: dict[str, Any] = {"pages": len(pages)}
    if without_text:
        metadata["pages_without_text"] = without_text
        logger.warning("Document '%s': no text on page(s) %s.", source, ", ".join(map(str, without_text)))
    return "\n\n".join(page for page in pages if page.strip()), metadata


def _clean(text: str) -> str:
    """Drop zero characters and lone surrogates, which fonts without a proper map give and UTF-8 cannot hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "")
