"""One measurement: a system gets documents and questions ready, and the generator answers."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch

from pic_rag.benchmark.measure import TokenClock, now, seconds
from pic_rag.chunking import count_tokens
from pic_rag.evaluation.lingua import LinguaError
from pic_rag.evaluation.systems import Shown, Systems
from pic_rag.generation.generator import Generator
from pic_rag.prompts import rag_messages
from pic_rag.questions import Question
from pic_rag.store import MemoryCache, SQLiteStore


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        system: see `pic_rag.benchmark.suite.SYSTEMS`.
        ratio: text tokens per memory token; None for full text.
        context_tokens: text tokens of a question's documents.
        batch_size: questions asked at once.
    """

    system: str
    ratio: int | None
    context_tokens: int
    batch_size: int


@dataclass(frozen=True)
class Sample:
    """One repetition of a case.

    Attributes:
        cache: where a memory came from: "miss" (compressed now), "hit" (read from the store), "prefix" (its keys and
            values were still there from the question before); None for text.
        prepare_s: from the documents to what the generator is shown.
        skipped: why nothing was answered.
        shown_tokens: of the passages, mean of the questions, without markers.
        prompt_tokens: rows the generator read, mean of the questions.
        cached_tokens: rows of them whose keys and values were kept.
        first_token_s: from asking the generator to the first token of all answers.
        answer_s: from asking the generator to the end of all answers.
        decode_tokens_per_s: tokens after the first, all answers together.
        memory_bytes: of a document's memory at rest, mean of the documents.
    """

    cache: str | None
    prepare_s: float
    skipped: str | None = None
    shown_tokens: float | None = None
    prompt_tokens: float | None = None
    cached_tokens: float | None = None
    first_token_s: float | None = None
    answer_s: float | None = None
    decode_tokens_per_s: float | None = None
    memory_bytes: float | None = None

    @property
    def until_first_s(self) -> float | None:
        """From the documents to the first token."""
        return None if self.first_token_s is None else self.prepare_s + self.first_token_s

    @property
    def total_s(self) -> float | None:
        """From the documents to the end of the answer."""
        return None if self.answer_s is None else self.prepare_s + self.answer_s


class CaseTimer:
    """Measures cases.

    Args:
        systems: over the compressor and its generator.
        new_tokens: of every answer.
    """

    def __init__(self, systems: Systems, new_tokens: int) -> None:
        self._systems = systems
        self._new_tokens = new_tokens
        self._device = torch.device(systems.plain.model.device)

    def measure(self, case: Case, questions: Sequence[Question]) -> list[Sample]:
        """Measure a case once: a sample for full text and shortened text, one a kind of cache for memories.

        Args:
            case: what to measure.
            questions: their documents must be new to compressor and generator.
        """
        try:
            if case.system == "pic":
                return list(self._memories(case, questions))
            return [self._text(case, questions)]
        except LinguaError as error:
            return [Sample(None, 0.0, skipped=str(error))]
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return [Sample(None, 0.0, skipped="the device's memory is too small")]

    def _text(self, case: Case, questions: Sequence[Question]) -> Sample:
        self._systems.check(case.system)
        shown: list[Shown] = []
        prepare_s = seconds(lambda: shown.extend(self._systems.show(case.system, questions, case.ratio)), self._device)
        return self._answer(Sample(None, prepare_s), self._systems.plain, questions, shown)

    def _memories(self, case: Case, questions: Sequence[Question]) -> Iterator[Sample]:
        """One answer is counted twice, for the generator's work does not depend on where memories came from."""
        compressor = self._systems.compressor
        texts = [context.document for asked in questions for context in asked.contexts]
        with tempfile.TemporaryDirectory() as folder, SQLiteStore(Path(folder) / "memories.sqlite") as store:
            cache = MemoryCache(store, compressor.fingerprint)

            def fetch() -> list[Shown]:
                memories = iter(cache.get_or_compress(texts, compressor, case.ratio, progress=False)[0])
                own = [tuple(next(memories) for _ in asked.contexts) for asked in questions]
                return [Shown([memory.handle for memory in some], some) for some in own]

            miss_s = seconds(fetch, self._device)
            begin = now(self._device)
            shown = fetch()
            hit_s = now(self._device) - begin
        at_rest = fmean(len(memory.to_bytes()) for one in shown for memory in one.memories)
        cold, warm = (
            self._answer(Sample("hit", hit_s, memory_bytes=at_rest), self._systems.reading, questions, shown)
            for _ in range(2)
        )
        yield replace(cold, cache="miss", prepare_s=miss_s)
        yield cold
        if not warm.skipped and not warm.cached_tokens:
            warm = Sample("prefix", hit_s, skipped="keys and values of these memories do not fit the prefix cache")
        yield replace(warm, cache="prefix")

    def _answer(
        self, sample: Sample, generator: Generator, questions: Sequence[Question], shown: Sequence[Shown]
    ) -> Sample:
        """The sample with what answering took, or why there was no answer."""
        prompts = [rag_messages(asked.question, one.passages) for asked, one in zip(questions, shown, strict=True)]
        memories = {memory.handle: memory for one in shown for memory in one.memories}
        longest = max(generator.count_tokens(prompt, memories) for prompt in prompts) + self._new_tokens
        if longest > generator.context_tokens:
            reason = f"prompt and answer of {longest} tokens do not fit the context of {generator.context_tokens}"
            return replace(sample, skipped=f"{reason} of the generator")
        begin = now(self._device)
        with TokenClock(generator) as clock:
            answers = generator.generate(
                prompts, memories, max_new_tokens=self._new_tokens, batch_size=len(prompts)
            )  # fmt: skip
        end = now(self._device)
        first, last = clock.times[-self._new_tokens], clock.times[-1]
        return replace(
            sample,
            shown_tokens=fmean(self._shown_tokens(generator, one) for one in shown),
            prompt_tokens=fmean(answer.prompt_tokens for answer in answers),
            cached_tokens=fmean(answer.cached_tokens for answer in answers),
            first_token_s=first - begin,
            answer_s=end - begin,
            decode_tokens_per_s=len(prompts) * (self._new_tokens - 1) / (last - first),
        )

    def _shown_tokens(self, generator: Generator, shown: Shown) -> int:
        if shown.memories:
            return sum(memory.memory_tokens for memory in shown.memories)
        return sum(count_tokens(text, generator.tokenizer) for text in shown.passages)
