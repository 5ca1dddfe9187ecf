"""The systems that are compared: what each puts in the place of the documents, and which generator reads it.

Every system asks with the same messages, so prompts differ in nothing but the passages. This file does not know scores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from sentence_transformers import SentenceTransformer

from pic_rag.assembler import Prompt
from pic_rag.chunking import count_tokens
from pic_rag.compression.compressor import Compressor
from pic_rag.compression.ratios import Ratio, ratio_of_each
from pic_rag.evaluation.lingua import Lingua, LinguaError
from pic_rag.evaluation.shortening import Shortener
from pic_rag.generation.answering import Generation
from pic_rag.generation.generator import Generator
from pic_rag.generation.reader import Reader
from pic_rag.handles import escape_handles
from pic_rag.memory import AtRest, Memory
from pic_rag.models.backbone import load_backbone
from pic_rag.prompts import PromptShape, rag_messages
from pic_rag.questions import Question

AT_REST_SYSTEMS: dict[str, AtRest] = {"pic@bf16": "bf16", "pic@int8": "int8", "pic@int4": "int4"}
"""The systems that read memories as a store gives them back, by what they were kept as."""

LINGUA_SYSTEMS = {
    "llmlingua": "text shortened by LLMLingua to about as many tokens as the memories have",
    "longllmlingua": "the same by LongLLMLingua, which knows the question",
    "llmlingua2": "the same by LLMLingua-2, whose token classifier has to be named",
}
"""The systems that need an environment with LLMLingua, see `pic_rag.evaluation.lingua`."""

_READER = "+reader"

_TEXT_SYSTEMS = {
    "text": "full text",
    "truncate": "the beginning of each document, as many tokens as its memory has",
    "extract": "the sentences most similar to the question, as many tokens as the memories have",
    **LINGUA_SYSTEMS,
}

SYSTEMS = {
    "pic": "memories of the compressor",
    "none": "no documents",
    "pool": "memories of an untrained mean pooler",
    **_TEXT_SYSTEMS,
    **{f"{name}{_READER}": f"{what}, read with the reader switched on" for name, what in _TEXT_SYSTEMS.items()},
    **{name: f"memories of the compressor, kept as {at_rest}" for name, at_rest in AT_REST_SYSTEMS.items()},
}
"""Every system by name, with what it puts in the prompt."""

RATIO_SYSTEMS = frozenset(SYSTEMS) - {"none", "text", f"text{_READER}"}
"""The systems whose prompt depends on the ratio."""


def _shows_as(system: str) -> str:
    """The system that shows the same: without the reader's name."""
    return system.removesuffix(_READER)


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
        messages: the prompt of a question and what is shown with it.
        llmlingua_python: a Python that has llmlingua; None: as `Lingua` finds one.
        llmlingua2: folder or hub id of LLMLingua-2's token classifier; None: `PIC_RAG_LLMLINGUA2`.
    """

    def __init__(
        self,
        compressor: Compressor,
        *,
        embedder: str | Path | SentenceTransformer | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        messages: PromptShape = rag_messages,
        llmlingua_python: str | Path | None = None,
        llmlingua2: str | Path | None = None,
    ) -> None:
        self.compressor = compressor
        self._messages = messages
        self._llmlingua_python = llmlingua_python
        self._llmlingua2 = llmlingua2 or os.environ.get("PIC_RAG_LLMLINGUA2")
        self._loading: dict[str, Any] = {"device": device, "dtype": dtype, "attn_implementation": attn_implementation}
        base = load_backbone(compressor.generator.name, **self._loading)
        # One model for both: the plain generator first, whose id is that of the weights without a reader.
        self.plain = Generator(base.model, base.tokenizer, name=base.name)
        self.reading = Generator(
            base.model,
            base.tokenizer,
            name=base.name,
            reader=compressor.reader,
            generator_positions=compressor.config.generator_positions,
        )
        self._shortener = Shortener(base.tokenizer, embedder)
        self._show: dict[str, Callable[[Sequence[Question], Ratio, bool | None], list[Shown]]] = {
            "pic": self._compress,
            **{name: partial(self._keep, at_rest) for name, at_rest in AT_REST_SYSTEMS.items()},
            "none": lambda questions, *_: [Shown([]) for _ in questions],
            "pool": self._pool,
            "text": self._full_text,
            "truncate": self._truncate,
            "extract": self._extract,
            **{name: partial(self._lingua_text, name) for name in LINGUA_SYSTEMS},
        }

    def check(self, system: str) -> None:
        """Raise ValueError when there is no such system or the compressor cannot serve it, LinguaError for its own."""
        if system not in SYSTEMS:
            raise ValueError(f"systems must be some of {', '.join(SYSTEMS)}, got {system!r}.")
        if system.endswith(_READER) and self.compressor.reader is None:
            raise ValueError(
                f"system {system!r} must have a compressor with a reader, got one without. Leave the system out."
            )
        if _shows_as(system) in LINGUA_SYSTEMS:
            self.lingua(_shows_as(system))

    def lingua(self, system: str) -> Lingua:
        """LLMLingua as a system needs it: started by the first who asks.

        Raises:
            LinguaError: when it cannot be had; the message says what to install or name.
        """
        return self._lingua2 if system == "llmlingua2" else self._lingua1

    def show(
        self, system: str, questions: Sequence[Question], ratio: Ratio = None, *, progress: bool | None = None
    ) -> list[Shown]:
        """What a system shows for each question; a document that comes with several is compressed once.

        Args:
            system: a key of `SYSTEMS`.
            questions: with their documents.
            ratio: text tokens per memory token, for `RATIO_SYSTEMS`; None for the compressor's default. A sequence has
                one for each document of a question, the last of which serves all documents after it.
            progress: of compressing: True shows a bar, False none, None where it takes long on a terminal.

        Raises:
            ValueError: when the system or the ratio is not served.
        """
        self.check(system)
        ratio_of_each(ratio, 0, self.compressor.config.check_ratio)
        return self._show[_shows_as(system)](questions, ratio, progress)

    def answer(
        self,
        system: str,
        questions: Sequence[Question],
        shown: Sequence[Shown],
        *,
        max_new_tokens: int,
        batch_size: int,
    ) -> list[Generation | None]:
        """The generator's greedy answers to the questions, given what the system shows; None where that is too long."""
        prompts = [
            self._messages(escape_handles(question.question), one.passages)
            for question, one in zip(questions, shown, strict=True)
        ]
        memories = {memory.handle: memory for one in shown for memory in one.memories}
        generator = self.reading if system == "pic" or system in AT_REST_SYSTEMS else self.plain
        fitting = find_fitting(generator, prompts, memories, max_new_tokens)
        asked = [prompts[at] for at in fitting]
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
        if system.endswith(_READER):
            generator, reader = self._text_reader
            with reader.switched(on=True):
                answers = generator.generate(asked, **options)
        else:
            answers = generator.generate(asked, memories, **options)
        answered = dict(zip(fitting, answers, strict=True))
        return [answered.get(at) for at in range(len(prompts))]

    def document_bytes(self, system: str, shown: Sequence[Shown]) -> float | None:
        """Mean bytes of a document's memory in a store, each document counted once; None where there is none."""
        if system not in AT_REST_SYSTEMS:
            return None
        memories = {memory.handle: memory for one in shown for memory in one.memories}
        if not memories:
            return None
        return fmean(len(memory.to_bytes(AT_REST_SYSTEMS[system])) for memory in memories.values())

    def text_tokens(self, question: Question) -> int:
        """Tokens of the documents' full text, without markers."""
        return sum(self._shortener.count_tokens(context.document) for context in question.contexts)

    def _full_text(self, questions: Sequence[Question], ratio: Ratio, progress: bool | None) -> list[Shown]:
        return [Shown([escape_handles(context.document) for context in asked.contexts]) for asked in questions]

    def _compress(self, questions: Sequence[Question], ratio: Ratio, progress: bool | None) -> list[Shown]:
        return _remember(self.compressor, questions, ratio, progress)

    def _keep(self, at_rest: AtRest, questions: Sequence[Question], ratio: Ratio, progress: bool | None) -> list[Shown]:
        """Memories through a store and back."""
        shown = self._compress(questions, ratio, progress)
        kept = {memory.handle: Memory.from_bytes(memory.to_bytes(at_rest)) for one in shown for memory in one.memories}
        return [Shown(one.passages, tuple(kept[handle] for handle in one.passages)) for one in shown]

    def _pool(self, questions: Sequence[Question], ratio: Ratio, progress: bool | None) -> list[Shown]:
        return _remember(self._pooler, questions, ratio, progress)

    def _truncate(self, questions: Sequence[Question], ratio: Ratio, progress: bool | None) -> list[Shown]:
        texts = {
            (text, own): escape_handles(self._shortener.truncate(text, self._memory_tokens(text, own)))
            for text, own in _distinct(questions, ratio)
        }
        return [Shown([texts[pair] for pair in _with_ratios(asked, ratio)]) for asked in questions]

    def _extract(self, questions: Sequence[Question], ratio: Ratio, progress: bool | None) -> list[Shown]:
        documents = [[context.document for context in asked.contexts] for asked in questions]
        room = [self._room(asked, ratio) for asked in questions]
        extracts = self._shortener.extract([asked.question for asked in questions], documents, room)
        return [Shown([escape_handles(extract) for extract in own]) for own in extracts]

    def _lingua_text(
        self, system: str, questions: Sequence[Question], ratio: Ratio, progress: bool | None
    ) -> list[Shown]:
        lingua = self.lingua(system)
        shown = []
        for asked in questions:
            texts = [context.document for context in asked.contexts]
            known = asked.question if system == "longllmlingua" else None
            shown.append(Shown([escape_handles(lingua.shorten(texts, self._room(asked, ratio), known))]))
        return shown

    @cached_property
    def _lingua1(self) -> Lingua:
        """With the generator as the scorer."""
        return Lingua(cast("str", self.plain.model.name_or_path), **self._lingua_loading)

    @cached_property
    def _lingua2(self) -> Lingua:
        if self._llmlingua2 is None:
            raise LinguaError(
                "llmlingua2 must be the folder or hub id of a token classifier, got None. Name one, such as "
                "microsoft/llmlingua-2-xlm-roberta-large-meetingbank, in PIC_RAG_LLMLINGUA2 or with --llmlingua2."
            )
        loading = self._lingua_loading | {"dtype": "float32"}  # its scores become numpy arrays: no bfloat16
        return Lingua(self._llmlingua2, classifier=True, **loading)

    @property
    def _lingua_loading(self) -> dict[str, Any]:
        """Where and how the generator runs, so that times can be compared."""
        model = self.plain.model
        dtype = str(model.dtype).removeprefix("torch.")
        return {"python": self._llmlingua_python, "device": model.device.type, "dtype": dtype}

    def _room(self, asked: Question, ratio: Ratio) -> int:
        """Memory tokens that a question's documents get together."""
        return sum(self._memory_tokens(*pair) for pair in _with_ratios(asked, ratio))

    def _memory_tokens(self, text: str, ratio: int | None) -> int:
        """Memory tokens that the compressor makes of a text, counted and not computed."""
        return -(-count_tokens(text, self.compressor.tokenizer) // self.compressor.config.check_ratio(ratio))

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


def find_fitting(
    generator: Generator, prompts: Sequence[Prompt], memories: Mapping[str, Memory], max_new_tokens: int
) -> list[int]:
    """The numbers of the prompts that leave room for so long an answer in the generator's context."""
    room = generator.context_tokens - max_new_tokens
    return [at for at, prompt in enumerate(prompts) if generator.count_tokens(prompt, memories) <= room]


def _remember(
    compressor: Compressor, questions: Sequence[Question], ratio: Ratio, progress: bool | None
) -> list[Shown]:
    """Handles in place of the documents, every distinct document compressed once a ratio."""
    wanted = _distinct(questions, ratio)
    texts, ratios = [text for text, _ in wanted], [own for _, own in wanted]
    memories = dict(zip(wanted, compressor.compress(texts, ratios or None, progress=progress), strict=True))
    shown = []
    for asked in questions:
        own = tuple(memories[pair] for pair in _with_ratios(asked, ratio))
        shown.append(Shown([memory.handle for memory in own], own))
    return shown


def _with_ratios(asked: Question, ratio: Ratio) -> list[tuple[str, int | None]]:
    """A question's documents, each with its ratio."""
    texts = [context.document for context in asked.contexts]
    return list(zip(texts, ratio_of_each(ratio, len(texts), lambda own: own), strict=True))


def _distinct(questions: Iterable[Question], ratio: Ratio) -> list[tuple[str, int | None]]:
    return list(dict.fromkeys(pair for asked in questions for pair in _with_ratios(asked, ratio)))
