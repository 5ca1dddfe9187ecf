"""Passages of documents are embedded and searched with FAISS.

A `Retriever` keeps its passages and an exact inner-product index over their normalised embeddings, row i of the
index being passage i. On disk it is an index file and a JSONL file in an `index_folder`: no pickle.
This file does not know what is done with a passage afterwards.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from pic_rag.checks import check_unicode, check_whole
from pic_rag.models.backbone import same_model
from pic_rag.models.embedded import retriever_path
from pic_rag.models.quiet import quiet_loading
from pic_rag.progress import progress_bar
from pic_rag.retrieval.documents import Document
from pic_rag.retrieval.index_folder import (
    RetrieverError,
    damaged,
    read_folder,
    write_folder,
)
from pic_rag.retrieval.passages import OVERLAP_CHARACTERS, PASSAGE_CHARACTERS, Passage, PassageSplitter, origin

PASSAGES_A_STEP = 512


@dataclass(frozen=True)
class Hit:
    """A passage and its cosine similarity to the query, -1 to 1."""

    passage: Passage
    score: float


class Retriever:
    """Finds the passages whose embeddings are nearest to the query's.

    Searches may run in other threads while documents are added or removed.
    """

    def __init__(
        self,
        embedder: str | os.PathLike[str] | SentenceTransformer | None = None,
        *,
        passage_characters: int = PASSAGE_CHARACTERS,
        overlap_characters: int = OVERLAP_CHARACTERS,
        device: str | torch.device | None = None,
        batch_size: int = 32,
    ) -> None:
        """Load the embedder and start with no passages.

        Args:
            embedder: a sentence-transformers model, its folder or hub id; `None` is the embedded all-MiniLM-L6-v2.
            passage_characters: the most a passage holds; what is beyond an embedder's limit is kept, but not searched.
            overlap_characters: how much of a passage the next one may repeat.
            device: where the embedder runs, such as `"cuda:0"`; `None` is inferred.
            batch_size: passages embedded at once.

        Raises:
            ValueError: a size is out of range.
            EmbeddedModelError: the embedded retriever is neither in the cache nor obtainable.
        """
        self.batch_size = check_whole("batch_size", batch_size)
        self._splitter = PassageSplitter(passage_characters, overlap_characters)
        self.passage_characters = self._splitter.passage_characters
        self.overlap_characters = self._splitter.overlap_characters
        self._model, self.embedder = _load_embedder(embedder, device)
        probe = self._model.encode_query(["dimension"], **self._encode_options)
        self._index: faiss.Index = faiss.IndexFlatIP(probe.shape[1])
        self._passages: list[Passage] = []
        self._hashes: set[str] = set()
        self._states: dict[Path, str | None] = {}  # of folders this was loaded from or saved to
        self._make_locks()

    def _make_locks(self) -> None:
        self._lock = threading.Lock()  # of passages and index, which go together
        self._adding = threading.Lock()
        self._saving = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: all but the locks, as it is at one moment."""
        with self._lock:
            state = {name: value for name, value in vars(self).items() if name not in ("_lock", "_adding", "_saving")}
            own = {name: copy.copy(state[name]) for name in ("_passages", "_hashes", "_states")}
            return {**state, **own, "_index": faiss.clone_index(self._index)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has locks of its own."""
        vars(self).update(state)
        self._make_locks()

    def __len__(self) -> int:
        """Return the number of passages."""
        return len(self._passages)

    @property
    def passages(self) -> tuple[Passage, ...]:
        """All passages, in the order they were added."""
        return tuple(self._passages)

    def add(self, documents: Iterable[Document], *, progress: bool | None = None) -> int:
        """Split and embed documents. What they say replaces what was here from the same sources.

        Passages that stay the same are not embedded again; those that their source no longer holds are removed. A
        source that comes in several documents has to come in one call. Files that are named alike in two folders, as
        `metadata["path"]` tells, are two sources.

        Args:
            documents: what to add.
            progress: show a progress bar; `None` shows one on a terminal once it takes over a second.

        Returns:
            The number of passages added.

        Raises:
            TypeError: an item is not a `Document`.
            ValueError: a text is not valid Unicode.
        """
        documents = list(documents)
        for document in documents:
            if isinstance(document, Document):  # of another type: `split` says so
                check_unicode(f"The text of document {document.source!r}", document.text)
        wanted = {passage.hash: passage for document in documents for passage in self.split(document)}
        with self._adding:
            fresh = [passage for passage in wanted.values() if passage.hash not in self._hashes]
            with progress_bar(progress, total=len(fresh), desc="Embedding", unit="passage") as bar:
                for start in range(0, len(fresh), PASSAGES_A_STEP):
                    step = fresh[start : start + PASSAGES_A_STEP]
                    self._append(step, self._model.encode_document([p.text for p in step], **self._encode_options))
                    bar.update(len(step))
            origins = {origin(document) for document in documents}
            self._replace(lambda passage: origin(passage) in origins, wanted)
        return len(fresh)

    def remove(self, sources: Iterable[str]) -> int:
        """Forget all passages of some sources; returns how many those were.

        Raises:
            TypeError: `sources` is one string.
        """
        if isinstance(sources, str):
            raise TypeError(f"sources must be a list of sources, got the string {sources!r}. Pass [source].")
        named = set(sources)
        return self.remove_where(lambda passage: passage.source in named)

    def remove_where(self, condition: Callable[[Passage], bool]) -> int:
        """Forget all passages that meet a condition; returns how many those were."""
        with self._adding:
            return self._replace(condition, {})

    def split(self, document: Document) -> list[Passage]:
        """Return the passages of one document, in order.

        Raises:
            TypeError: `document` is not a `Document`.
        """
        return self._splitter.split(document)

    def search(self, query: str, top_k: int = 5) -> list[Hit]:
        """Return the `top_k` best passages, or all when there are fewer, best first; equal texts count once.

        Raises:
            TypeError: `query` is not a string.
            ValueError: `query` is blank or not valid Unicode, or `top_k` below 1.
        """
        top_k = check_whole("top_k", top_k)
        if not isinstance(query, str):
            raise TypeError(f"query must be a string, got {type(query).__name__}. Pass the question alone.")
        check_unicode("query", query)
        if not query.strip():
            raise ValueError(f"query must hold text, got {query!r}.")
        if not self._passages:
            return []
        embedding = self._model.encode_query([query], **self._encode_options)
        with self._lock:
            wanted = top_k
            while self._passages:  # others may have removed them meanwhile
                wanted = min(wanted, len(self._passages))
                scores, rows = self._index.search(embedding, wanted)
                hits: dict[str, Hit] = {}
                for row, score in sorted(zip(rows[0], scores[0], strict=True), key=lambda found: (-found[1], found[0])):
                    passage = self._passages[row]
                    hits.setdefault(passage.text, Hit(passage, float(score)))
                if len(hits) >= top_k or wanted == len(self._passages):
                    return list(hits.values())[:top_k]
                wanted *= 2
        return []

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the retriever into a folder, which may hold other files; a killed process leaves the old state.

        Raises:
            TypeError: the metadata of a passage is not JSON.
            RetrieverError: this was loaded from or saved to that folder, and somebody else has saved there since.
        """
        folder = Path(folder).absolute()
        settings = {
            "embedder": self.embedder,
            "passage_characters": self.passage_characters,
            "overlap_characters": self.overlap_characters,
        }
        with self._saving:  # threads one after the other, so that none takes another's state for somebody else's
            with self._lock:
                index = faiss.serialize_index(self._index).tobytes()
                lines = "".join(_to_json(passage) + "\n" for passage in self._passages).encode()
            files = {"index.faiss": index, "passages.jsonl": lines}
            self._states[folder] = write_folder(folder, settings, files, self._states.get(folder))

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        embedder: str | os.PathLike[str] | SentenceTransformer | None = None,
        *,
        device: str | torch.device | None = None,
        batch_size: int = 32,
    ) -> Retriever:
        """Read what `save` wrote; the arguments are those of the constructor.

        Raises:
            RetrieverError: the folder holds no retriever, a damaged one, or one that another embedder made.
        """
        folder = Path(folder)
        state, manifest, files = read_folder(folder)
        for stem in ("index", "passages"):
            if stem not in files:
                raise damaged(folder, f"no {stem}")
        try:
            PassageSplitter(manifest["passage_characters"], manifest["overlap_characters"])
        except (TypeError, ValueError) as error:
            raise damaged(folder, f"settings of no retriever ({error})") from error
        retriever = cls(
            embedder,
            passage_characters=manifest["passage_characters"],
            overlap_characters=manifest["overlap_characters"],
            device=device,
            batch_size=batch_size,
        )
        if not same_model(manifest["embedder"], retriever.embedder):
            raise RetrieverError(
                f"The retriever in '{folder}' must be searched with the embedder that made it, "
                f"'{manifest['embedder']}', got '{retriever.embedder}'. Pass that one as embedder=..., or add the "
                "documents again."
            )
        index = faiss.deserialize_index(np.frombuffer(files["index"], dtype=np.uint8))
        lines = files["passages"].splitlines()
        if index.d != retriever._index.d:
            raise RetrieverError(
                f"The retriever in '{folder}' must be searched with embeddings of {index.d} numbers, as it was made "
                f"with, got {retriever._index.d}. Pass the same embedder as embedder=..., or add the documents again."
            )
        if index.ntotal != len(lines):
            raise damaged(folder, f"{index.ntotal} embeddings for {len(lines)} passages")
        retriever._states[folder.absolute()] = state
        retriever._index = index
        retriever._passages = [Passage(**json.loads(line)) for line in lines]
        retriever._hashes = {passage.hash for passage in retriever._passages}
        return retriever

    @property
    def _encode_options(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "normalize_embeddings": True, "show_progress_bar": False}

    def _append(self, passages: list[Passage], embeddings: np.ndarray) -> None:
        """Add passages that are not here yet with their `(passages, dimensions)` embeddings; interrupted, none."""
        rows, known = np.ascontiguousarray(embeddings, dtype=np.float32), len(self._passages)
        with self._lock:
            try:
                self._index.add(rows)
                self._passages.extend(passages)
                self._hashes.update(passage.hash for passage in passages)
            except BaseException:  # Ctrl-C: rows and passages still go together
                self._index.remove_ids(faiss.IDSelectorRange(known, self._index.ntotal))
                del self._passages[known:]
                self._hashes.difference_update(passage.hash for passage in passages)
                raise

    def _replace(self, is_replaced: Callable[[Passage], bool], wanted: Mapping[str, Passage]) -> int:
        """Of these passages, keep the wanted ones, by hash, as they are now; returns how many went."""
        gone = {
            row for row, passage in enumerate(self._passages) if passage.hash not in wanted and is_replaced(passage)
        }
        kept = [wanted.get(passage.hash, passage) for row, passage in enumerate(self._passages) if row not in gone]
        hashes = {passage.hash for passage in kept}
        index = self._index
        if gone:
            index = faiss.clone_index(index)  # whoever interrupts this leaves rows and passages that go together
            # later rows move up, as in the list
            index.remove_ids(faiss.IDSelectorBatch(np.array(sorted(gone), dtype=np.int64)))
        with self._lock:  # searches go on until here; nobody else changes passages, see `_adding`
            self._index, self._passages, self._hashes = index, kept, hashes
        return len(gone)


def _load_embedder(
    embedder: str | os.PathLike[str] | SentenceTransformer | None, device: str | torch.device | None
) -> tuple[SentenceTransformer, str]:
    """Return the model and its identity, `<name>@<16 hex digits of its weights' hash>`."""
    if isinstance(embedder, SentenceTransformer):
        model, name = embedder, "custom"
    else:
        name = os.fspath(retriever_path() if embedder is None else embedder)
        with quiet_loading():
            model = SentenceTransformer(name, device=None if device is None else str(device))
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
