"""A run: every system answers every question at every ratio, and the answers are scored."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO, cast

import torch
from sentence_transformers import SentenceTransformer
from tqdm import tqdm

from pic_rag.compression.compressor import Compressor
from pic_rag.compression.ratios import Ratio, ratio_of_each
from pic_rag.evaluation.metrics import agreement, contains_answer, f1
from pic_rag.evaluation.systems import RATIO_SYSTEMS, Shown, Systems
from pic_rag.evaluation.tasks import TASKS, Task
from pic_rag.generation.answering import Generation
from pic_rag.progress import progress_bar
from pic_rag.prompts import PromptShape, filled_messages
from pic_rag.questions import Question
from pic_rag.reporting import versions, write_json

_REFERENCES = {"text": "agreement", "text+reader": "reader_agreement"}  # answers to agree with, and what that is called
_LOOKAHEAD_BATCHES = 8  # batches given to the generator at once: it decodes prompts of like length together


@dataclass(frozen=True)
class EvalRow:
    """How one system did at one ratio.

    Attributes:
        system: its name.
        ratio: text tokens per memory token, such as 4, or those of the first, second, ... document of a question, such
            as "2+16"; None for a system that has none.
        n: questions answered.
        f1: mean over the questions, 0 to 1, like the next three.
        em: exact match.
        contains_answer: share of the answers that hold a right answer, word for word.
        agreement: F1 against the same generator's answer from the full text, over the questions whose full text fits
            the generator's context; None when none does, or where `text` is no system of the run.
        reader_agreement: the same against the answer that the generator with its reader gives from the full text; None
            where `text+reader` is no system of the run.
        prompt_tokens_mean: rows the generator read for a question whose prompt fits: memory tokens, question, markers.
        text_tokens_mean: tokens of the full text of a question's documents.
        too_long: questions whose prompt does not fit the generator's context: not answered, scored 0.
        document_bytes_mean: of a document's memory in a store; None for a system that keeps none.
        seconds: for compressing or selecting and for answering, without loading models.
    """

    system: str
    ratio: int | str | None
    n: int
    f1: float
    em: float
    contains_answer: float
    agreement: float | None
    reader_agreement: float | None
    prompt_tokens_mean: float | None
    text_tokens_mean: float
    too_long: int
    document_bytes_mean: float | None
    seconds: float


@dataclass(frozen=True)
class EvalReport:
    """The rows of a run, and everything needed to repeat it."""

    rows: list[EvalRow]
    config: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        write_json(path, self.to_dict())


@dataclass(frozen=True)
class _Answers:
    """One system's answers at one ratio, in the order of the questions."""

    generations: list[Generation | None]
    document_bytes: float | None
    seconds: float


def evaluate(
    questions: Sequence[Question],
    systems: Sequence[str] = ("pic", "text", "none", "truncate", "pool"),
    ratios: Sequence[Ratio] = (4, 16, 64),
    *,
    compressor: Compressor | str | Path | None = None,
    embedder: str | Path | SentenceTransformer | None = None,
    task: str = "questions",
    prompt: str | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    predictions: str | Path | None = None,
    data: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> EvalReport:
    """Let systems answer questions greedily and score them.

    Args:
        questions: as `pic_rag.questions.read_questions` gives them.
        systems: keys of `pic_rag.evaluation.systems.SYSTEMS`, in the order of the rows.
        ratios: text tokens per memory token, for the systems that compress; a sequence among them has one for each
            document of a question, the last of which serves all documents after it.
        compressor: one that is loaded, its folder or hub id, or None for the shipped one.
        embedder: sentence-transformers model of the `extract` system; None: the embedded MiniLM.
        task: a key of `pic_rag.evaluation.tasks.TASKS`: how the question is put, and what of the answer is scored.
        prompt: a user's message with `{context}` and `{question}`, as the application to be judged has it; None: the
            task's own.
        max_new_tokens: longest answer; None: the task's.
        batch_size: prompts decoded together.
        device: None picks cuda, mps or cpu.
        dtype: of generator and compressor; None picks the device's fast one.
        attn_implementation: of the generator; None leaves it to transformers.
        predictions: a JSONL file to write every answer to, with its scores, as soon as its system is done.
        data: where the questions are from, as JSON types, for the report.
        progress: True shows a bar, False none; None shows one on a terminal once it takes over a second.

    Raises:
        ValueError: when there are no questions, a system, ratio or task is not served, or `prompt` lacks a part.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}.")
    if not isinstance(compressor, Compressor):
        compressor = Compressor.from_pretrained(compressor, device=device, dtype=dtype)
    loading: dict[str, Any] = {"device": device, "dtype": dtype, "attn_implementation": attn_implementation}
    served = Systems(compressor, embedder=embedder, messages=_messages(TASKS[task], prompt), **loading)
    ratios = [tuple(ratio) if isinstance(ratio, Sequence) else ratio for ratio in ratios]
    run = _Run(served, list(questions), TASKS[task], max_new_tokens, batch_size)
    plan = run.plan(systems, ratios)
    with (
        ExitStack() as open_files,
        progress_bar(progress, total=len(run.questions) * len(plan), unit="answer", desc="evaluate") as bar,
    ):
        lines = None if predictions is None else open_files.enter_context(_create(predictions))
        rows = list(run.rows(plan, bar, lines, progress))
    asked = {"data": None if data is None else dict(data), "task": task, "prompt": prompt}
    config = asked | run.config(systems, ratios)
    return EvalReport(rows, config, versions())


def _messages(task: Task, prompt: str | None) -> PromptShape:
    """How a question is put."""
    if prompt is None:
        return task.messages
    if missing := [name for name in ("{context}", "{question}") if name not in prompt]:
        raise ValueError(f"prompt must hold {{context}} and {{question}}, got {prompt!r} without {missing[0]}.")
    return partial(filled_messages, prompt)


class _Run:
    """The questions of a run, and how systems are asked them."""

    def __init__(
        self, systems: Systems, questions: list[Question], task: Task, max_new_tokens: int | None, batch_size: int
    ) -> None:
        if not questions:
            raise ValueError("questions must hold at least one question, got none.")
        self.systems = systems
        self.questions = questions
        self.text_tokens = [systems.text_tokens(question) for question in questions]
        self.task = task
        self.max_new_tokens = max_new_tokens or task.max_new_tokens
        self.batch_size = batch_size

    def plan(self, systems: Sequence[str], ratios: Sequence[Ratio]) -> list[tuple[str, Ratio]]:
        """The system and ratio of each row; everything is checked before anything is computed."""
        if isinstance(systems, str) or not systems:
            raise ValueError(f"systems must be a list of at least one name, got {systems!r}.")
        for system in systems:
            self.systems.check(system)
        served = list(dict.fromkeys(ratios))
        for ratio in served:
            ratio_of_each(ratio, 0, self.systems.compressor.config.check_ratio)
        if not served and RATIO_SYSTEMS.intersection(systems):
            raise ValueError("ratios must hold at least one ratio for a system that compresses, got none.")
        return [
            (system, ratio)
            for system in dict.fromkeys(systems)
            for ratio in (served if system in RATIO_SYSTEMS else (None,))
        ]

    def rows(
        self, plan: Sequence[tuple[str, Ratio]], bar: tqdm, lines: TextIO | None, progress: bool | None
    ) -> Iterator[EvalRow]:
        """Answer and score, row by row."""
        references = {
            system: self._answer(system, None, bar, progress) for system in _REFERENCES if (system, None) in plan
        }
        for system, ratio in plan:
            given = references.get(system) or self._answer(system, ratio, bar, progress)
            scored = [self._score(number, given, references) for number in range(len(self.questions))]
            if lines is not None:
                for line in scored:
                    lines.write(
                        json.dumps({"system": system, "ratio": _named(ratio), **line}, ensure_ascii=False) + "\n"
                    )
                lines.flush()
            yield _row(system, ratio, scored, given)

    def config(self, systems: Sequence[str], ratios: Sequence[Ratio]) -> dict[str, Any]:
        """Settings of the run, as JSON types."""
        compressor = self.systems.compressor
        return {
            "systems": list(systems),
            "ratios": [_named(ratio) for ratio in ratios],
            "n": len(self.questions),
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
            "generator": self.systems.reading.model_id,
            "dtype": str(self.systems.plain.model.dtype).removeprefix("torch."),
            "device": str(self.systems.plain.model.device),
            "fingerprint": compressor.fingerprint,
            "pic": compressor.config.to_dict(),
        }

    def _answer(self, system: str, ratio: Ratio, bar: tqdm, progress: bool | None) -> _Answers:
        bar.set_postfix_str(system if ratio is None else f"{system} {_named(ratio)}x")
        begin = time.perf_counter()
        shown = self.systems.show(system, self.questions, ratio, progress=progress)
        generations = list(self._generate(system, shown, bar))
        seconds = time.perf_counter() - begin
        return _Answers(generations, self.systems.document_bytes(system, shown), seconds)

    def _generate(self, system: str, shown: Sequence[Shown], bar: tqdm) -> Iterator[Generation | None]:
        step = self.batch_size * _LOOKAHEAD_BATCHES
        for start in range(0, len(self.questions), step):
            part = slice(start, start + step)
            yield from self.systems.answer(
                system,
                self.questions[part],
                shown[part],
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
            )
            bar.update(len(shown[part]))

    def _score(self, number: int, given: _Answers, references: Mapping[str, _Answers]) -> dict[str, Any]:
        """One line of the predictions."""
        question, generation = self.questions[number], given.generations[number]
        full_text = {system: answers.generations[number] for system, answers in references.items()}
        return {
            "id": question.id,
            "question": question.question,
            "answers": list(question.answers),
            **self._judge(generation, question.answers),
            **{name: self._agreement(generation, full_text.get(system)) for system, name in _REFERENCES.items()},
            "prompt_tokens": None if generation is None else generation.prompt_tokens,
            "text_tokens": self.text_tokens[number],
        }

    def _judge(self, generation: Generation | None, answers: Sequence[str]) -> dict[str, Any]:
        """What was said and its scores: 0 where the prompt was too long."""
        if generation is None:
            return {"prediction": None, "f1": 0.0, "em": 0.0, "contains_answer": 0.0}
        said = self.task.answer(generation.text)
        return {
            "prediction": said,
            "f1": f1(said, answers),
            "em": self.task.exact_match(said, answers),
            "contains_answer": contains_answer(said, answers),
        }

    def _agreement(self, generation: Generation | None, reference: Generation | None) -> float | None:
        """F1 of an answer against that from the full text: 0 without an answer, None without one to compare with."""
        if reference is None:
            return None
        return (
            0.0 if generation is None else agreement(*(self.task.answer(each.text) for each in (generation, reference)))
        )


def _named(ratio: Ratio) -> int | str | None:
    """A ratio as a report has it."""
    return "+".join(map(str, ratio)) if isinstance(ratio, tuple) else cast("int | None", ratio)


def _row(system: str, ratio: Ratio, scored: Sequence[dict[str, Any]], given: _Answers) -> EvalRow:
    def mean(name: str) -> float | None:
        values = [line[name] for line in scored if line[name] is not None]
        return fmean(values) if values else None

    return EvalRow(
        system=system,
        ratio=_named(ratio),
        n=len(scored),
        f1=fmean(line["f1"] for line in scored),
        em=fmean(line["em"] for line in scored),
        contains_answer=fmean(line["contains_answer"] for line in scored),
        agreement=mean("agreement"),
        reader_agreement=mean("reader_agreement"),
        prompt_tokens_mean=mean("prompt_tokens"),
        text_tokens_mean=fmean(line["text_tokens"] for line in scored),
        too_long=sum(line["prompt_tokens"] is None for line in scored),
        document_bytes_mean=given.document_bytes,
        seconds=given.seconds,
    )


def _create(path: str | Path) -> TextIO:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.open("w", encoding="utf-8")
