"""What fidelity is good for: it should tell right answers from wrong ones, and mixed ratios should beat single ones.

Every question is answered from memories of each ratio and from raw text. A floor under the fidelity then picks a ratio
for each document, as `Compressor.compress(..., min_fidelity=...)` does, and its answers are set beside those of the
single ratios at equal generator tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from pic_rag.compression.compressor import Compressor
from pic_rag.compression.fidelity import Fidelity, FidelityCheck
from pic_rag.compression.ratios import descend
from pic_rag.config import RAW_TEXT
from pic_rag.evaluation.metrics import auroc, contains_answer, f1
from pic_rag.evaluation.systems import find_fitting
from pic_rag.generation.answering import Generation
from pic_rag.generation.generator import Generator
from pic_rag.handles import escape_handles
from pic_rag.memory import Memory
from pic_rag.prompts import rag_messages
from pic_rag.questions import Question
from pic_rag.reporting import versions, write_json

Pick = Mapping[str, Memory]  # the memory of each document, by its text
Trial = tuple[list[Memory], bool]  # what was read for a question, and whether the answer is right

_PARTS = {"loss": -1, "telling_loss": -1, "recall": 1, "telling_recall": 1}  # which way is better


@dataclass(frozen=True)
class FidelityRow:
    """How one ratio, or one floor, did.

    Attributes:
        ratio: text tokens per memory token, 1 for raw text; None where a floor decided.
        min_fidelity: the floor; None for a single ratio.
        f1: mean over the questions, 0 to 1.
        contains_answer: share of the answers that hold a right answer, word for word.
        prompt_tokens_mean: rows the generator read for a question whose prompt fits; None when none does.
        fidelity_mean: of the documents.
        ratios: documents at each ratio.
        auroc: how well fidelity tells right answers from wrong ones at this ratio, over the questions that raw text
            answers rightly: 0.5 is chance, 1 perfect; None where all or none are right.
        single_f1: F1 of single ratios at as many prompt tokens, on straight lines between them; None for a single one.
        too_long: questions whose prompt does not fit the generator's context: not answered, scored 0.
    """

    ratio: int | None
    min_fidelity: float | None
    f1: float
    contains_answer: float
    prompt_tokens_mean: float | None
    fidelity_mean: float
    ratios: dict[int, int]
    auroc: float | None = None
    single_f1: float | None = None
    too_long: int = 0


@dataclass(frozen=True)
class FidelityReport:
    """The rows of a run, and everything needed to repeat it.

    Attributes:
        rows: single ratios from the highest to raw text, then floors.
        auroc: as of a row, over all ratios together.
        auroc_of_parts: the same for each part of `Fidelity`, a lower loss being better.
        config: settings.
        versions: of the packages that matter.
    """

    rows: list[FidelityRow]
    auroc: float | None
    auroc_of_parts: dict[str, float | None]
    config: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        write_json(path, self.to_dict())


def evaluate_fidelity(
    questions: Sequence[Question],
    ratios: Sequence[int],
    floors: Sequence[float],
    *,
    compressor: Compressor,
    generator: Generator,
    max_new_tokens: int = 32,
    batch_size: int = 8,
    data: Mapping[str, Any] | None = None,
) -> FidelityReport:
    """Answer questions from single ratios and from the ratios that floors pick.

    Args:
        questions: with documents; a document that comes with several is compressed once a ratio.
        ratios: those to try; raw text comes after them.
        floors: values of `min_fidelity`.
        compressor: makes the memories.
        generator: checks and reads them.
        max_new_tokens: longest answer.
        batch_size: prompts decoded together.
        data: where the questions are from, as JSON types, for the report.

    Raises:
        ValueError: when there are no questions with documents, or a ratio or floor is out of range.
    """
    texts = list(dict.fromkeys(context.document for question in questions for context in question.contexts))
    if not texts:
        raise ValueError(f"questions must come with documents to compress, got none in {len(questions)} questions.")
    ladder = (*sorted({compressor.config.check_ratio(ratio) for ratio in ratios}, reverse=True), RAW_TEXT)
    single, measured = _compress_at_each(texts, ladder[:-1], compressor, generator)
    mixed: dict[float, Pick] = {}
    for floor in floors:
        chosen = descend(
            [ladder] * len(texts), floor, lambda numbers, at: [single[at][texts[number]] for number in numbers]
        )
        mixed[floor] = dict(zip(texts, chosen, strict=True))
    answers = _Answers(questions, generator, {"max_new_tokens": max_new_tokens, "batch_size": batch_size})
    rows = [_single_row(answers, ratio, single) for ratio in ladder]
    line = sorted((row.prompt_tokens_mean, row.f1) for row in rows if row.prompt_tokens_mean is not None)
    rows += [_mixed_row(answers, floor, pick, line) for floor, pick in mixed.items()]
    pooled = [trial for ratio in ladder[:-1] for trial in answers.trials(single[ratio], single[RAW_TEXT])]
    parts = {
        name: [(min(sign * getattr(measured[memory.handle], name) for memory in read), right) for read, right in pooled]
        for name, sign in _PARTS.items()
    }
    config = {
        "data": None if data is None else dict(data),
        "n": len(questions),
        "ratios": list(ladder),
        "floors": list(floors),
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "generator": generator.model_id,
        "fingerprint": compressor.fingerprint,
    }
    of_parts = {name: _auroc(trials) for name, trials in parts.items()}
    return FidelityReport(rows, _auroc(_by_fidelity(pooled)), of_parts, config, versions())


def _compress_at_each(
    texts: Sequence[str], ratios: Sequence[int], compressor: Compressor, generator: Generator
) -> tuple[dict[int, Pick], dict[str, Fidelity]]:
    """The texts' memories at every ratio and as raw text, and what was measured of each memory, by its handle."""
    check = FidelityCheck(generator, compressor.config.segment_tokens)
    single: dict[int, Pick] = {}
    measured: dict[str, Fidelity] = {}
    for ratio in ratios:
        memories = compressor.compress(texts, ratio)
        found = check.measure(texts, memories)
        measured.update(zip((memory.handle for memory in memories), found, strict=True))
        scored = [replace(memory, fidelity=own.score) for memory, own in zip(memories, found, strict=True)]
        single[ratio] = dict(zip(texts, scored, strict=True))
    raw = compressor.compress(texts, RAW_TEXT, min_fidelity=1.0, generator=generator)
    single[RAW_TEXT] = dict(zip(texts, raw, strict=True))
    return single, measured


class _Answers:
    """Answers to the questions from picked memories; the same prompt is answered once."""

    def __init__(self, questions: Sequence[Question], generator: Generator, options: dict[str, Any]) -> None:
        self._questions = questions
        self._generator = generator
        self._options = options
        self._known: dict[tuple[str, ...], Generation | None] = {}

    def of(self, pick: Pick) -> list[Generation | None]:
        """One answer a question; None where the prompt is too long."""
        handles = [[pick[context.document].handle for context in question.contexts] for question in self._questions]
        keys = [(question.question, *own) for question, own in zip(self._questions, handles, strict=True)]
        missing = [key for key in dict.fromkeys(keys) if key not in self._known]
        prompts = [rag_messages(escape_handles(asked), shown) for asked, *shown in missing]
        memories = {memory.handle: memory for memory in pick.values()}
        fitting = find_fitting(self._generator, prompts, memories, self._options["max_new_tokens"])
        made = self._generator.generate([prompts[at] for at in fitting], memories, **self._options)
        self._known.update(dict.fromkeys(missing))
        self._known.update(zip((missing[at] for at in fitting), made, strict=True))
        return [self._known[key] for key in keys]

    def trials(self, pick: Pick, raw: Pick) -> list[Trial]:
        """The memories read and whether the answer is right, of the questions that raw text answers rightly."""
        pairs = zip(self._questions, self.of(pick), self.of(raw), strict=True)
        return [
            ([pick[context.document] for context in question.contexts], _is_right(question, said))
            for question, said, from_text in pairs
            if question.contexts and _is_right(question, from_text)
        ]

    def figures(self, pick: Pick) -> dict[str, Any]:
        """The means of a row."""
        said = self.of(pick)
        pairs = list(zip(self._questions, said, strict=True))
        read = [answer.prompt_tokens for answer in said if answer is not None]
        served = [memory.ratio for memory in pick.values()]
        return {
            "f1": fmean(f1(answer.text.strip(), question.answers) if answer else 0.0 for question, answer in pairs),
            "contains_answer": fmean(_is_right(*pair) for pair in pairs),
            "prompt_tokens_mean": fmean(read) if read else None,
            "too_long": len(said) - len(read),
            "fidelity_mean": fmean(memory.fidelity or 0.0 for memory in pick.values()),
            "ratios": {ratio: served.count(ratio) for ratio in sorted(set(served))},
        }


def _single_row(answers: _Answers, ratio: int, single: Mapping[int, Pick]) -> FidelityRow:
    trials = [] if ratio == RAW_TEXT else answers.trials(single[ratio], single[RAW_TEXT])
    return FidelityRow(ratio, None, **answers.figures(single[ratio]), auroc=_auroc(_by_fidelity(trials)))


def _mixed_row(answers: _Answers, floor: float, pick: Pick, line: Sequence[tuple[float, float]]) -> FidelityRow:
    figures = answers.figures(pick)
    read = figures["prompt_tokens_mean"]
    if read is None or not line:
        return FidelityRow(None, floor, **figures)
    tokens, scores = zip(*line, strict=True)
    return FidelityRow(None, floor, **figures, single_f1=float(np.interp(read, tokens, scores)))


def _by_fidelity(trials: Sequence[Trial]) -> list[tuple[float, bool]]:
    """Each question by the least faithful of its memories."""
    return [(min(memory.fidelity or 0.0 for memory in read), right) for read, right in trials]


def _auroc(trials: Sequence[tuple[float, bool]]) -> float | None:
    right = [is_right for _, is_right in trials]
    return auroc([score for score, _ in trials], right) if len(set(right)) == 2 else None


def _is_right(question: Question, answer: Generation | None) -> bool:
    return answer is not None and contains_answer(answer.text.strip(), question.answers) == 1
