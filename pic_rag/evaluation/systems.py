"""The systems that are compared: what each puts in the place of the documents, and which generator reads it.

Every system asks with `rag_messages`, so prompts differ in nothing but the passages. This file does not know scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from sentence_transformers import SentenceTransformer

from pic_rag.backbone import load_backbone
from pic_rag.compressor import Compressor
from pic_rag.evaluation.shortening import Shortener
from pic_rag.generator import Generation, Generator
from pic_rag.handles import escape_handles
from pic_rag.memory import Memory
from pic_rag.prompts import rag_messages
from pic_rag.questions import Question
from pic_rag.reader import Reader

SYSTEMS = {
    "pic": "memories of the compressor",
    "text": "full text",
    "none": "no documents",
    "truncate": "the beginning of each document, as many tokens as its memory has",
    "pool": "memories of an untrained mean pooler",
    "extract": "the sentences most similar to the question, as many tokens as the memories have",
    "text+reader": "full text, read with the reader switched on",
}
"""Every system by name, with what it puts in the prompt."""

RATIO_SYSTEMS = frozenset({"pic", "truncate", "pool", "extract"})
"""The systems whose prompt depends on the ratio."""


@dataclass(frozen=True)
class Shown:
    """What a system shows the generator for one question.

    Attributes:
        passages: handles or texts, in the order of the documents.
        memories: what the handles stand for.
    """

    passages: list[str]
    memories: tuple[Memory, ...] = ()


class Systems:
    """All systems over one compressor and the generator it was trained for.

    Args:
        compressor: makes the memories of `pic`.
        embedder: a sentence-transformers model, its folder or hub id, for `extract`; None: the embedded MiniLM.
        device: of the generator; None picks cuda, mps or cpu.
        dtype: of the generator; None picks the device's fast one.
        attn_implementation: of the generator; None leaves it to transformers.
    """

    def __init__(
        self,
        compressor: Compressor,
        *,
        embedder: str | Path | SentenceTransformer | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
    ) -> None:
        self.compressor = compressor
        self._loading: dict[str, Any] = {"device": device, "dtype": dtype, "attn_implementation": attn_implementation}
        base = load_backbone(compressor.generator.name, **self._loading)
        # One model for both: the plain generator first, whose id is that of the weights without a reader.
        self.plain = Generator(base.model, base.tokenizer, name=base.name)
        reader = compressor.reader
        self.reading = Generator(base.model, base.tokenizer, name=base.name, reader=reader) if reader else self.plain
        self._shortener = Shortener(base.tokenizer, embedder)
        self._show: dict[str, Callable[[Sequence[Question], int, bool | None], list[Shown]]] = {
            "pic": self._compress,
            "text": self._full_text,
            "none": lambda questions, *_: [Shown([]) for _ in questions],
            "truncate": self._truncate,
            "pool": self._pool,
            "extract": self._extract,
            "text+reader": self._full_text,
        }

    def check(self, system: str) -> None:
        """Raise ValueError when there is no such system, or the compressor cannot serve it."""
        if system not in SYSTEMS:
            raise ValueError(f"systems must be some of {', '.join(SYSTEMS)}, got {system!r}.")
        if system == "text+reader" and self.compressor.reader is None:
            raise ValueError(
                "system 'text+reader' must have a compressor with a reader, got one without. Leave the system out."
            )

    def show(
        self, system: str, questions: Sequence[Question], ratio: int | None = None, *, progress: bool | None = None
    ) -> list[Shown]:
        """What a system shows for each question; a document that comes with several is compressed once.

        Args:
            system: a key of `SYSTEMS`.
            questions: with their documents.
            ratio: text tokens per memory token, for `RATIO_SYSTEMS`; None for the compressor's default.
            progress: of compressing: True shows a bar, False none, None where it takes long on a terminal.

        Raises:
            ValueError: when the system or the ratio is not served.
        """
        self.check(system)
        return self._show[system](questions, self.compressor.config.check_ratio(ratio), progress)

    def answer(
        self,
        system: str,
        questions: Sequence[Question],
        shown: Sequence[Shown],
        *,
        max_new_tokens: int,
        batch_size: int,
    ) -> list[Generation]:
        """The generator's greedy answers to the questions, given what the system shows."""
        prompts = [
            rag_messages(escape_handles(question.question), one.passages)
            for question, one in zip(questions, shown, strict=True)
        ]
        memories = {memory.handle: memory for one in shown for memory in one.memories}
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        if system == "text+reader":
            generator, reader = self._text_reader
            with reader.on():
                return generator.generate(prompts, **options)
        return (self.reading if system == "pic" else self.plain).generate(prompts, memories, **options)

    def text_tokens(self, question: Question) -> int:
        """Tokens of the documents' full text, without markers."""
        return sum(self._shortener.count_tokens(context.document) for context in question.contexts)

    def _full_text(self, questions: Sequence[Question], ratio: int, progress: bool | None) -> list[Shown]:
        return [Shown([escape_handles(context.document) for context in asked.contexts]) for asked in questions]

    def _compress(self, questions: Sequence[Question], ratio: int, progress: bool | None) -> list[Shown]:
        return _remember(self.compressor, questions, ratio, progress)

    def _pool(self, questions: Sequence[Question], ratio: int, progress: bool | None) -> list[Shown]:
        return _remember(self._pooler, questions, ratio, progress)

    def _truncate(self, questions: Sequence[Question], ratio: int, progress: bool | None) -> list[Shown]:
        texts = {
            text: escape_handles(self._shortener.truncate(text, self._memory_tokens(text, ratio)))
            for text in _texts(questions)
        }
        return [Shown([texts[context.document] for context in asked.contexts]) for asked in questions]

    def _extract(self, questions: Sequence[Question], ratio: int, progress: bool | None) -> list[Shown]:
        documents = [[context.document for context in asked.contexts] for asked in questions]
        room = [sum(self._memory_tokens(text, ratio) for text in texts) for texts in documents]
        extracts = self._shortener.extract([asked.question for asked in questions], documents, room)
        return [Shown([escape_handles(extract) for extract in own]) for own in extracts]

    def _memory_tokens(self, text: str, ratio: int) -> int:
        """Memory tokens that the compressor makes of a text, counted and not computed."""
        tokens = len(self.compressor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return -(-tokens // ratio)

    @cached_property
    def _pooler(self) -> Compressor:
        """Mean pooling with the chunks of `pic`; one layer, whose output an untrained converter turns into zeros."""
        config = replace(self.compressor.config, residual_pool=True, encoder_layers=1, lora_rank=0)
        return Compressor.from_base(self.compressor.generator.name, config=config, **self._loading)

    @cached_property
    def _text_reader(self) -> tuple[Generator, Reader]:
        """A second copy of the generator with its reader, which `Generator` would leave off for text."""
        base = load_backbone(self.compressor.generator.name, **self._loading)
        generator = Generator(base.model, base.tokenizer, name=base.name)
        return generator, Reader(base.model, cast("Path", self.compressor.reader))


def _remember(compressor: Compressor, questions: Sequence[Question], ratio: int, progress: bool | None) -> list[Shown]:
    """Handles in place of the documents, every distinct document compressed once."""
    texts = _texts(questions)
    compressed = compressor.compress(texts, ratio, progress=progress)
    memories = dict(zip(texts, compressed, strict=True))
    shown = []
    for question in questions:
        own = tuple(memories[context.document] for context in question.contexts)
        shown.append(Shown([memory.handle for memory in own], own))
    return shown


def _texts(questions: Iterable[Question]) -> list[str]:
    return list(dict.fromkeys(context.document for question in questions for context in question.contexts))
