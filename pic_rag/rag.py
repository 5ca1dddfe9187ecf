"""The whole way in one object: index documents, retrieve passages, let the generator read their memories."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator as TextStream
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from pic_rag.chunking import count_tokens, tokenize
from pic_rag.compression.compressor import Compressor
from pic_rag.compression.ratios import Ratio, check_floor, ratio_of_each
from pic_rag.generation.answering import BaseGenerator
from pic_rag.generation.generator import Generator
from pic_rag.handles import escape_handles
from pic_rag.memory import Memory
from pic_rag.models.sharing import shared_checkpoint
from pic_rag.prompts import rag_messages
from pic_rag.retrieval.documents import Document, DocumentError
from pic_rag.retrieval.files import add_files
from pic_rag.retrieval.index_folder import RetrieverError, write_file
from pic_rag.retrieval.retriever import Hit, Retriever
from pic_rag.store import STORE_FILE, MemoryCache, MemoryStore, SQLiteStore, shared_store

Mode = Literal["pic", "text", "none", "truncate"]
SETTINGS_FILE = "pic_rag.json"


@dataclass(frozen=True)
class RetrievedDocument:
    """A passage that an answer was given from.

    Attributes:
        id: the passage's id.
        score: cosine similarity to the question, -1 to 1.
        text_tokens: tokens of its text.
        memory_tokens: memory tokens it became; 0 when the generator did not read memories.
        ratio: text tokens per memory token; 1 for raw text; None when the generator did not read memories.
        fidelity: how much of the text the memory keeps, 0 to 1; None where nobody has checked.
        handle: the memory's handle; None when the generator did not read memories.
        cached: whether the memory came from the store.
        text: the passage.
        source: the file or label it came from.
    """

    id: str
    score: float
    text_tokens: int
    memory_tokens: int
    ratio: int | None
    fidelity: float | None
    handle: str | None
    cached: bool
    text: str
    source: str


@dataclass(frozen=True)
class Answer:
    """An answer, what it was given from and what it cost.

    Attributes:
        answer: the generator's words.
        documents: the passages, best first.
        prompt_tokens: rows the generator read: memory tokens, question, markers.
        text_prompt_tokens: tokens of the same prompt with the passages' full text.
        latency_ms: `retrieve`, `compress`, `first_token` (from the call to the first piece of text) and `total`.
        model: the generator's id.
        compressor: the compressor's fingerprint.
    """

    answer: str
    documents: list[RetrievedDocument]
    prompt_tokens: int
    text_prompt_tokens: int
    latency_ms: dict[str, float]
    model: str
    compressor: str

    def to_dict(self) -> dict[str, Any]:
        """The answer as JSON types; the passages' texts stay out of it."""
        values = asdict(self)
        for document in values["documents"]:
            del document["text"]
        return values


class PicRag:
    """Answers questions from documents, the generator reading memory tokens in place of their text.

    Args:
        retriever: finds passages.
        compressor: makes memories of them.
        generator: reads them; it must be the one the compressor was trained for.
        store: where memories are kept; None: a SQLite file in the user's cache folder.
        namespace: keeps the memories of different users of one store apart.

    Raises:
        ValueError: when the compressor's memories are for another generator.
    """

    def __init__(
        self,
        retriever: Retriever,
        compressor: Compressor,
        generator: BaseGenerator,
        *,
        store: MemoryStore | None = None,
        namespace: str = "default",
    ) -> None:
        generator.check_reads(compressor.generator.id)
        self.retriever = retriever
        self.compressor = compressor
        self.generator = generator
        self._own_store = store is not None
        store = store if store is not None else shared_store()
        self.cache = MemoryCache(store, compressor.fingerprint, namespace=namespace)

    @classmethod
    def from_pretrained(
        cls,
        compressor: str | Path | None = None,
        *,
        generator: str | Path | None = None,
        embedder: str | None = None,
        store: MemoryStore | None = None,
        namespace: str = "default",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> PicRag:
        """An empty index with the models loaded; with no arguments, the embedded default.

        Args:
            compressor: folder or hub id of a trained compressor; None: the shipped one.
            generator: where the generator is, when not where the compressor's checkpoint says.
            embedder: sentence-transformers folder or hub id; None: the embedded MiniLM.
            store: where memories are kept.
            namespace: of this user's memories in the store.
            device: None picks cuda, mps or cpu.
            dtype: None picks the device's fast one.
        """
        retriever = Retriever(embedder, device=device)
        return cls._around(retriever, compressor, generator, store, namespace, device=device, dtype=dtype)

    @classmethod
    def load(cls, folder: str | Path, **loading: Any) -> PicRag:  # noqa: ANN401 - from_pretrained's arguments
        """Open an index folder written by `save`; its memories are kept in the folder.

        Args:
            folder: the index.
            **loading: `generator`, `namespace`, `device`, `dtype`, `embedder`, as for `from_pretrained`; `compressor`
                to use another than the one the index was saved with, `store` to keep memories elsewhere.

        Raises:
            FileNotFoundError: when there is no index.
            ValueError: when its compressor has no name and none is given.
            RetrieverError: when it is damaged.
        """
        path = Path(folder) / SETTINGS_FILE
        if not path.is_file():
            raise FileNotFoundError(f"folder must be an index that PicRag.save wrote, got {str(folder)!r}.")
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            name, named = settings["compressor"], settings.get("named", True)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RetrieverError(
                f"{str(path)!r} must be as PicRag.save wrote it, got unreadable settings ({error}). Add the documents "
                "to a new PicRag and save that."
            ) from error
        if not named and "compressor" not in loading:
            raise ValueError(
                f"compressor must be given for the index {str(folder)!r}, got none: it was made with one that has no "
                "name. Pass the folder that you have saved it in by save_pretrained."
            )
        if "compressor" not in loading and name and os.path.isabs(name) and not os.path.exists(name):
            raise FileNotFoundError(
                f"compressor must be given for the index {str(folder)!r}, which was made with {name!r}, where there is "
                "nothing any more. Pass the folder that it is in now."
            )
        loading.setdefault("compressor", name)
        retriever = Retriever.load(folder, loading.pop("embedder", None), device=loading.get("device"))
        rag = cls._around(retriever, **loading)
        if not rag._own_store:
            rag._keep_in(Path(folder))
        return rag

    @classmethod
    def _around(
        cls,
        retriever: Retriever,
        compressor: str | Path | None = None,
        generator: str | Path | None = None,
        store: MemoryStore | None = None,
        namespace: str = "default",
        **loading: Any,  # noqa: ANN401 - device and dtype
    ) -> PicRag:
        """The models of a compressor loaded around a retriever."""
        loaded = Compressor.from_pretrained(compressor, generator=generator, **loading)
        reading = Generator.from_checkpoint(loaded.checkpoint, generator, **loading)
        return cls(retriever, loaded, reading, store=store, namespace=namespace)

    def save(self, folder: str | Path) -> None:
        """Write passages, search index and the compressor's name; from now on memories are kept there, too.

        Memories stay in a store that was given as `store`.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        self.retriever.save(target)
        name = self.compressor.name
        if name is not None and Path(name).is_dir():
            name = str(Path(name).resolve())  # the index may be opened from another folder
        settings = {"compressor": name, "named": name is not None or self._has_shipped_compressor}
        write_file(target / SETTINGS_FILE, f"{json.dumps(settings, indent=2)}\n".encode())
        if not self._own_store:
            self._keep_in(target)

    @property
    def _has_shipped_compressor(self) -> bool:
        return self.compressor.fingerprint == shared_checkpoint().fingerprint

    def _keep_in(self, folder: Path) -> None:
        """Memories go to, and come from, the store of an index folder."""
        kept = self.cache
        self.cache = MemoryCache(
            SQLiteStore(folder / STORE_FILE), kept.fingerprint, namespace=kept.namespace, at_rest=kept.at_rest
        )

    def add(self, documents: Iterable[Document], *, progress: bool | None = None) -> int:
        """Index documents, in place of what was indexed from the same sources. Returns the number of new passages."""
        return self.retriever.add(documents, progress=progress)

    def add_files(
        self, paths: str | Path | Iterable[str | Path], *, progress: bool | None = None
    ) -> list[DocumentError]:
        """Index text, Markdown and PDF files and folders of them; returns what could not be read, and why.

        The index then says what these paths say now: a changed file is indexed again, and one that was indexed before
        but is gone or cannot be read any more is forgotten. A file in a folder that does not lead to it, since it is
        hidden or behind a link, stays as it was indexed.
        """
        return add_files(self.retriever, paths, progress)

    def ask(
        self,
        question: str,
        *,
        top_k: int = 3,
        ratio: Ratio = None,
        min_fidelity: float | None = None,
        mode: Mode = "pic",
        max_new_tokens: int = 64,
        progress: bool | None = None,
    ) -> Answer:
        """Answer a question from the indexed documents.

        Args:
            question: what to ask.
            top_k: passages shown to the generator, at most.
            ratio: text tokens per memory token; None for the compressor's default. A sequence such as `(2, 16)` has one
                for the best passage, one for the second, ..., the last of which serves all after it. With
                `min_fidelity` the highest one to try; None for the highest that is served.
            min_fidelity: 0 to 1: each passage gets the highest ratio whose memory is that faithful, else its raw text.
            mode: "pic" reads memories, "text" the full text, "truncate" text cut to as many tokens as the memories
                have, "none" nothing: the baselines to compare with.
            max_new_tokens: longest answer.
            progress: None shows a bar on a terminal while many passages are compressed.

        Raises:
            TypeError: when the question is not a string.
            ValueError: when it is empty, the index holds nothing to answer from, or a setting is out of range.
        """
        stream = self.stream(
            question,
            top_k=top_k,
            ratio=ratio,
            min_fidelity=min_fidelity,
            mode=mode,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
        while True:
            try:
                next(stream)
            except StopIteration as done:
                return done.value

    def stream(
        self,
        question: str,
        *,
        top_k: int = 3,
        ratio: Ratio = None,
        min_fidelity: float | None = None,
        mode: Mode = "pic",
        max_new_tokens: int = 64,
        progress: bool | None = None,
    ) -> TextStream[str, None, Answer]:
        """Like `ask`, in pieces of text; the generator's return value (`yield from`) is the `Answer`."""
        if not isinstance(question, str):
            raise TypeError(f"question must be a string, got {type(question).__name__}.")
        if not question.strip():
            raise ValueError(f"question must hold at least one word, got {question!r}.")
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}.")
        if min_fidelity is not None:
            check_floor(min_fidelity)
        ratio_of_each(ratio, 0, self.compressor.config.check_ratio if min_fidelity is None else self.compressor.ladder)
        watch = _Watch()
        hits = self.retriever.search(question, top_k)
        if not hits and mode != "none":
            raise ValueError(
                "The index must hold a passage to answer from, got none. Add documents first; mode='none' asks the "
                "model alone."
            )
        watch.lap("retrieve")
        documents, memories = self._read(hits, ratio, min_fidelity, mode, progress)
        watch.lap("compress")
        asked = escape_handles(question)
        stream = self.generator.stream(
            rag_messages(asked, self._shown(documents, ratio, mode)), memories, max_new_tokens=max_new_tokens
        )
        while True:
            try:
                piece = next(stream)
            except StopIteration as done:
                generation = done.value
                break
            watch.first_token()
            yield piece
        full_text = rag_messages(asked, self._shown(documents, ratio, "text"))
        latency_ms = watch.finish()
        return Answer(
            answer=generation.text.strip(),
            documents=documents,
            prompt_tokens=generation.prompt_tokens,
            text_prompt_tokens=self.generator.count_tokens(full_text),
            latency_ms=latency_ms,
            model=self.generator.model_id,
            compressor=self.compressor.fingerprint,
        )

    def _read(
        self, hits: Sequence[Hit], ratio: Ratio, min_fidelity: float | None, mode: Mode, progress: bool | None
    ) -> tuple[list[RetrievedDocument], list[Memory]]:
        """The passages found, and in mode "pic" their memories: from the store, else compressed now."""
        texts = [hit.passage.text for hit in hits]
        if mode != "pic":
            return [self._document(hit, None, cached=False) for hit in hits], []
        ids = [hit.passage.id for hit in hits]
        memories, cached = self.cache.get_or_compress(
            texts,
            self.compressor,
            ratio,
            sources=ids,
            progress=progress,
            min_fidelity=min_fidelity,
            generator=self.generator,
        )
        documents = [
            self._document(hit, memory, cached=known) for hit, memory, known in zip(hits, memories, cached, strict=True)
        ]
        return documents, memories

    def _document(self, hit: Hit, memory: Memory | None, *, cached: bool) -> RetrievedDocument:
        text = hit.passage.text
        return RetrievedDocument(
            id=hit.passage.id,
            score=hit.score,
            text_tokens=memory.text_tokens if memory else count_tokens(text, self.generator.tokenizer),
            memory_tokens=memory.memory_tokens if memory else 0,
            ratio=memory.ratio if memory else None,
            fidelity=memory.fidelity if memory else None,
            handle=memory.handle if memory else None,
            cached=cached,
            text=text,
            source=hit.passage.source,
        )

    def _shown(self, documents: Sequence[RetrievedDocument], ratio: Ratio, mode: Mode) -> list[str]:
        """What stands for each passage in the prompt."""
        if mode == "none":
            return []
        if mode == "pic":
            return [document.handle or "" for document in documents]
        texts = [document.text for document in documents]
        if mode == "truncate":
            ratios = ratio_of_each(ratio, len(texts), self.compressor.config.check_ratio)
            texts = [self._truncate(*pair) for pair in zip(texts, ratios, strict=True)]
        return [escape_handles(text) for text in texts]

    def _truncate(self, text: str, ratio: int) -> str:
        """The beginning of a text, as many tokens as its memory would have."""
        token_ids = tokenize(text, self.generator.tokenizer)["input_ids"]
        return str(self.generator.tokenizer.decode(token_ids[: -(-len(token_ids) // ratio)]))


class _Watch:
    """Milliseconds from now to each event."""

    def __init__(self) -> None:
        self._begin = self._last = time.perf_counter()
        self.latency_ms: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.latency_ms[name], self._last = _milliseconds(now - self._last), now

    def first_token(self) -> None:
        self.latency_ms.setdefault("first_token", _milliseconds(time.perf_counter() - self._begin))

    def finish(self) -> dict[str, float]:
        self.first_token()  # an empty answer has none: its end stands for it
        return {**self.latency_ms, "total": _milliseconds(time.perf_counter() - self._begin)}


def _milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 2)
