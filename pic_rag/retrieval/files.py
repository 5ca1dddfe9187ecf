"""A retriever is brought up to date with files: what they say now is found, what they no longer say is not."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pic_rag.retrieval.documents import DocumentError, load_documents, real_path
from pic_rag.retrieval.passages import origin
from pic_rag.retrieval.retriever import Retriever


def add_files(
    retriever: Retriever, paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], progress: bool | None = None
) -> list[DocumentError]:
    """Index text, Markdown and PDF files and folders of them; returns what could not be read, and why.

    A changed file is indexed again, and one that was indexed before but is gone or cannot be read any more is
    forgotten. A file in a folder that does not lead to it, since it is hidden or behind a link, stays as it was.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    loaded = load_documents(paths, progress=progress)
    retriever.add(loaded.documents, progress=progress)
    known = {origin(document) for document in loaded.documents}
    sources = {document.source for document in loaded.documents}
    reached = {real_path(file) for file in loaded.files}
    roots = [Path(place) for path in paths if os.fspath(path) for place in (os.path.abspath(path), real_path(path))]

    @functools.cache  # a file has many passages
    def is_outdated(source: str, path: str | None) -> bool:
        if path is None or (source, path) in known:
            return False
        gone = not os.path.exists(path)
        if _is_under(path, roots):
            return gone or real_path(path) in reached
        return gone and source in sources  # its folder has moved

    retriever.remove_where(lambda passage: is_outdated(*origin(passage)))
    return loaded.problems


def _is_under(path: str, roots: Sequence[Path]) -> bool:
    """Whether a file is in one of these folders, or is one of these files."""
    places = (Path(path), Path(real_path(Path(path).parent), Path(path).name))
    return any(place.is_relative_to(root) for place in places for root in roots)
