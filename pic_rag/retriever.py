"""Documents are split into passages, embedded and searched with FAISS.

A `Retriever` keeps its passages and an exact inner-product index over their normalised embeddings, row i of the
index being passage i. On disk it is an index file, a JSONL file and a small JSON file that names both: no pickle.
This file does not know what is done with a passage afterwards.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from filelock import FileLock
from langchain_text_splitters import RecursiveCharacterTextSplitter
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from pic_rag.documents import Document
from pic_rag.embedded import retriever_path

logger = logging.getLogger(__name__)

MANIFEST = "retriever.json"
FORMAT_VERSION = 1
PASSAGES_A_STEP = 512


class RetrieverError(ValueError):
    """A saved retriever that cannot be used; the message names the folder and the remedy."""


@dataclass(frozen=True)
class Passage:
    """A piece of a document: what the retriever finds.

    Attributes:
        id: the document's id and the passage's number in it.
        text: the piece.
        source: the document's.
        metadata: the document's, and `start_character`: where the piece starts in the document.
        hash: of source and text; a passage of the same hash is kept once.
    """

    id: str
    text: str
    source: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    hash: str = ""

    def __post_init__(self) -> None:
        """Fill in the hash."""
        if not self.hash:
            content = f"{self.source}\0{self.text}".encode("utf-8", "surrogatepass")
            object.__setattr__(self, "hash", hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class Hit:
    """A passage and its cosine similarity to the query, -1 to 1."""

    passage: Passage
    score: float


class Retriever:
    """Finds the passages whose embeddings are nearest to the query's.

    Searches may run in other threads while documents are added.
    """

    def __init__(
        self,
        embedder: str | os.PathLike[str] | SentenceTransformer | None = None,
        *,
        passage_characters: int = 1000,
        overlap_characters: int = 100,
        device: str | None = None,
        batch_size: int = 32,
    ) -> None:
        """Load the embedder and start with no passages.

        Args:
            embedder: a sentence-transformers model, its folder or hub id; `None` is the embedded all-MiniLM-L6-v2.
            passage_characters: the most a passage holds. 1,000 characters of English are about the 256 tokens that
                all-MiniLM-L6-v2 reads; what is beyond an embedder's limit is kept, but not searched.
            overlap_characters: how much of a passage the next one may repeat.
            device: where the embedder runs, such as `"cuda:0"`; `None` is inferred.
            batch_size: passages embedded at once.

        Raises:
            ValueError: a size is out of range.
            EmbeddedModelError: the embedded retriever is neither in the cache nor obtainable.
        """
        _check_positive("passage_characters", passage_characters)
        _check_positive("batch_size", batch_size)
        if not 0 <= overlap_characters < passage_characters:
            rule = f"overlap_characters must be at least 0 and below passage_characters={passage_characters}"
            raise ValueError(f"{rule}, got {overlap_characters}.")
        self.passage_characters = passage_characters
        self.overlap_characters = overlap_characters
        self.batch_size = batch_size
        self._model, self.embedder = _load_embedder(embedder, device)
        self._splitter = RecursiveCharacterTextSplitter(
            chunk_size=passage_characters,
            chunk_overlap=overlap_characters,
            separators=["\n\n", "\n", ". ", " ", ""],
            keep_separator="end",
            add_start_index=True,
        )
        probe = self._model.encode_query(["dimension"], **self._encode_options)
        self._index: faiss.Index = faiss.IndexFlatIP(probe.shape[1])
        self._passages: list[Passage] = []
        self._hashes: set[str] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return the number of passages."""
        return len(self._passages)

    @property
    def passages(self) -> tuple[Passage, ...]:
        """All passages, in the order they were added."""
        return tuple(self._passages)

    def add(self, documents: Iterable[Document], *, progress: bool | None = None) -> int:
        """Split and embed documents; passages that are here already are left as they are.

        Args:
            documents: what to add.
            progress: show a progress bar; `None` shows it on a terminal only.

        Returns:
            The number of passages added.

        Raises:
            TypeError: an item is not a `Document`.
        """
        fresh = {p.hash: p for document in documents for p in self.split(document) if p.hash not in self._hashes}
        passages = list(fresh.values())
        before = len(self)
        with tqdm(
            total=len(passages), desc="Embedding", unit="passage", disable=None if progress is None else not progress
        ) as bar:
            for start in range(0, len(passages), PASSAGES_A_STEP):
                step = passages[start : start + PASSAGES_A_STEP]
                embeddings = self._model.encode_document([p.text for p in step], **self._encode_options)
                self._append(step, embeddings)
                bar.update(len(step))
        return len(self) - before

    def split(self, document: Document) -> list[Passage]:
        """Return the passages of one document, in order.

        Raises:
            TypeError: `document` is not a `Document`.
        """
        if not isinstance(document, Document):
            raise TypeError(
                f"documents must be pic_rag.Document objects, got {type(document).__name__}. "
                "Use Document.from_text(text, source=...) or load_documents(paths)."
            )
        return [
            Passage(
                id=f"{document.id}-{number}",
                text=piece.page_content,
                source=document.source,
                metadata={**document.metadata, "start_character": piece.metadata["start_index"]},
            )
            for number, piece in enumerate(self._splitter.create_documents([document.text]))
        ]

    def search(self, query: str, top_k: int = 5) -> list[Hit]:
        """Return the `top_k` best passages, or all when there are fewer, best first.

        Raises:
            ValueError: `query` is blank or `top_k` below 1.
        """
        _check_positive("top_k", top_k)
        if not query.strip():
            raise ValueError(f"query must hold text, got {query!r}.")
        if not self._passages:
            return []
        embedding = self._model.encode_query([query], **self._encode_options)
        with self._lock:
            scores, rows = self._index.search(embedding, min(top_k, len(self._passages)))
        return [Hit(self._passages[row], float(score)) for row, score in zip(rows[0], scores[0], strict=True)]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the retriever into a folder, which may hold other files.

        Readers and a killed process see the old state or the new one: data files are named after their content,
        and the one replacement of `retriever.json` makes them count.

        Raises:
            TypeError: the metadata of a passage is not JSON.
        """
        folder = Path(folder)
        with self._lock:
            index = faiss.serialize_index(self._index).tobytes()
            lines = "".join(_to_json(passage) + "\n" for passage in self._passages).encode()
        data = {_name("index", index, "faiss"): index, _name("passages", lines, "jsonl"): lines}
        manifest = {
            "format_version": FORMAT_VERSION,
            "embedder": self.embedder,
            "passage_characters": self.passage_characters,
            "overlap_characters": self.overlap_characters,
            "files": {name.partition(".")[0]: {"name": name, "sha256": _sha256(value)} for name, value in data.items()},
        }
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "retriever.lock"):
            for name, value in data.items():
                _write(folder / name, value)
            _write(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
            for path in [*folder.glob("index.*.faiss*"), *folder.glob("passages.*.jsonl*")]:
                if path.name not in data:
                    path.unlink()

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        embedder: str | os.PathLike[str] | SentenceTransformer | None = None,
        *,
        device: str | None = None,
        batch_size: int = 32,
    ) -> Retriever:
        """Read what `save` wrote; the arguments are those of the constructor.

        Raises:
            RetrieverError: the folder holds no retriever, a damaged one, or one that another embedder made.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        retriever = cls(
            embedder,
            passage_characters=manifest["passage_characters"],
            overlap_characters=manifest["overlap_characters"],
            device=device,
            batch_size=batch_size,
        )
        if manifest["embedder"].rpartition("@")[2] != retriever.embedder.rpartition("@")[2]:
            raise RetrieverError(
                f"The retriever in '{folder}' must be searched with the embedder that made it, "
                f"'{manifest['embedder']}', got '{retriever.embedder}'. Pass that one as embedder=..., or add the "
                "documents again."
            )
        index = faiss.deserialize_index(np.frombuffer(_read(folder, manifest, "index"), dtype=np.uint8))
        lines = _read(folder, manifest, "passages").splitlines()
        if index.ntotal != len(lines):
            raise _damaged(folder, f"{index.ntotal} embeddings for {len(lines)} passages")
        retriever._index = index
        retriever._passages = [Passage(**json.loads(line)) for line in lines]
        retriever._hashes = {passage.hash for passage in retriever._passages}
        return retriever

    @property
    def _encode_options(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "normalize_embeddings": True, "show_progress_bar": False}

    def _append(self, passages: list[Passage], embeddings: np.ndarray) -> None:
        with self._lock:  # another thread may have added the same passages meanwhile
            rows = [row for row, passage in enumerate(passages) if passage.hash not in self._hashes]
            self._passages.extend(passages[row] for row in rows)
            self._index.add(np.ascontiguousarray(embeddings[rows], dtype=np.float32))
            self._hashes.update(passages[row].hash for row in rows)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


def _load_embedder(
    embedder: str | os.PathLike[str] | SentenceTransformer | None, device: str | None
) -> tuple[SentenceTransformer, str]:
    """Return the model and its identity, `<name>@<16 hex digits of its weights' hash>`."""
    if isinstance(embedder, SentenceTransformer):
        model, name = embedder, "custom"
    else:
        name = os.fspath(retriever_path() if embedder is None else embedder)
        model = SentenceTransformer(name, device=device)
    digest = hashlib.sha256()
    for key, weight in sorted(model.state_dict().items()):
        digest.update(f"{key} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return model, f"{Path(name).name if os.path.isdir(name) else name}@{digest.hexdigest()[:16]}"


def _to_json(passage: Passage) -> str:
    try:
        return json.dumps({**vars(passage), "metadata": dict(passage.metadata)})
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"The metadata of document '{passage.source}' must hold JSON values only, got: {error}. "
            "Make it text before you add the document."
        ) from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _name(stem: str, data: bytes, suffix: str) -> str:
    return f"{stem}.{_sha256(data)[:16]}.{suffix}"


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as writer:
        writer.write(data)
        writer.flush()
        os.fsync(writer.fileno())
    partial.replace(path)


def _damaged(folder: Path, got: str) -> RetrieverError:
    return RetrieverError(
        f"The folder '{folder}' must hold a retriever as `Retriever.save` wrote it, got {got}. "
        "Load again if it was just being saved, else add the documents to a new Retriever and save that."
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except FileNotFoundError as error:
        raise _damaged(folder, f"no '{MANIFEST}'") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, f"an unreadable '{MANIFEST}' ({error})") from error
    if version != FORMAT_VERSION:
        raise _damaged(folder, f"format_version {version!r} where this pic-rag reads {FORMAT_VERSION}")
    missing = {"embedder", "passage_characters", "overlap_characters", "files"} - manifest.keys()
    if missing:
        raise _damaged(folder, f"a '{MANIFEST}' without '{min(missing)}'")
    return manifest


def _read(folder: Path, manifest: Mapping[str, Any], stem: str) -> bytes:
    try:
        record = manifest["files"][stem]
        data = (folder / Path(record["name"]).name).read_bytes()
    except FileNotFoundError as error:
        raise _damaged(folder, f"no '{record['name']}'") from error
    except (KeyError, TypeError) as error:
        raise _damaged(folder, f"a '{MANIFEST}' without the file of its {stem}") from error
    if _sha256(data) != record["sha256"]:
        raise _damaged(folder, f"a '{record['name']}' of another content")
    return data
