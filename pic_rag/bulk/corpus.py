"""What is to be compressed: the texts of files, one after the other, each text once.

Only the names of the files and a hash of every text are held, so a corpus may be far larger than memory. This file
does not know models, stores or engines.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pic_rag.retrieval.documents import Document, DocumentError, find_documents, load_document
from pic_rag.retrieval.passages import PassageSplitter

Status = Literal["pending", "compressed", "known", "repeated", "refused"]

GROUP_ITEMS = 128
"""The most texts compressed and written together: what a killed process loses."""

GROUP_CHARACTERS = 128_000
"""The most characters of a group of several texts: long documents are written sooner."""


@dataclass(frozen=True)
class Item:
    """A text of a corpus, and what became of it.

    Attributes:
        source: the file it comes from, for messages.
        text: the text while it is pending, then "".
        status: "pending"; "compressed" now; "known" to the store before; "repeated", the same as an earlier text of the
            corpus; "refused", with the reason as message.
        message: what the user should hear about it.
        text_bytes: of the text in UTF-8.
        text_tokens: of the text.
        memory_tokens: of its memory.
        stored_bytes: of its memory in the store, if it was written now.
    """

    source: str
    text: str = ""
    status: Status = "pending"
    message: str = ""
    text_bytes: int = 0
    text_tokens: int = 0
    memory_tokens: int = 0
    stored_bytes: int = 0


class Corpus:
    """The documents of files, and of folders of files, in a fixed order.

    Args:
        paths: files and folders; the folders are looked through now, the files read when their turn comes.
        split: give passages as the retriever cuts them, in place of whole documents.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]], *, split: bool = False) -> None:
        self._found = list(find_documents(paths))
        self._splitter = PassageSplitter() if split else None

    def __len__(self) -> int:
        """Files, the unreadable ones included."""
        return len(self._found)

    def groups(self) -> Iterator[list[Item]]:
        """Items in groups of at most `GROUP_ITEMS`, and of at most `GROUP_CHARACTERS` where a text is not longer."""
        group: list[Item] = []
        characters = 0
        for item in self.items():
            if group and (len(group) == GROUP_ITEMS or characters + len(item.text) > GROUP_CHARACTERS):
                yield group
                group, characters = [], 0
            group.append(item)
            characters += len(item.text)
        if group:
            yield group

    def items(self) -> Iterator[Item]:
        """One item a text, and one for each file that gives none."""
        seen: set[bytes] = set()
        for found in self._found:
            try:
                document = _load(found)
            except DocumentError as problem:
                yield Item(problem.path, status="refused", message=f"Skipped: {problem}")
                continue
            for text in self._texts(document):
                data = text.encode("utf-8", "surrogatepass")
                digest = hashlib.sha256(data).digest()
                repeated = digest in seen
                seen.add(digest)
                yield Item(
                    document.source,
                    text="" if repeated else text,
                    status="repeated" if repeated else "pending",
                    text_bytes=len(data),
                )

    def _texts(self, document: Document) -> list[str]:
        if self._splitter is None:
            return [document.text]
        return [passage.text for passage in self._splitter.split(document)]


def _load(found: Path | DocumentError) -> Document:
    if isinstance(found, DocumentError):
        raise found
    return load_document(found)
