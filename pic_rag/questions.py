"""Question files: `.jsonl`, `.jsonl.gz` and SQuAD's own `.json` become questions. Standard library only.

A line is `{"id", "question", "answers": [...], "contexts": [{"title", "text", "is_gold"}]}`. `id`, `title` and
`is_gold` may be missing: a context that stands alone is gold then, others are not; where none is, training takes those
that hold an answer (`pic_rag.training.corpora.Record`). This file does not know who asks: training and evaluation do.
"""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pic_rag.checks import check_unicode

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """A JSON object of a file, and where it stands, for messages."""

    values: dict[str, Any]
    where: str


@dataclass(frozen=True)
class Context:
    """A document that comes with a question."""

    title: str
    text: str
    is_gold: bool

    @property
    def document(self) -> str:
        """The context as it is compressed and shown, see `document_text`."""
        return document_text({"title": self.title, "text": self.text})


@dataclass(frozen=True)
class Question:
    """A question about documents.

    Attributes:
        id: of the file; where a row has none, where it stands.
        question: as asked.
        answers: any of them is right, blank ones left out; none for an unanswerable question.
        contexts: the documents to answer from.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    contexts: tuple[Context, ...]

    @classmethod
    def from_row(cls, row: Row) -> Question:
        """Check a row of a file and make it a question.

        Raises:
            ValueError: when a field is missing or of another type; the message names file, place and rule.
        """
        values, where = row
        question = values.get("question")
        if not isinstance(question, str) or not question.strip():
            raise _error(where, "question", "a string that is not empty", question)
        answers = values.get("answers")
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise _error(where, "answers", "a list of strings", answers)
        contexts = values.get("contexts")
        if not isinstance(contexts, list):
            raise _error(where, "contexts", 'a list of {"title", "text", "is_gold"}', contexts)
        alone = len(contexts) == 1
        read = tuple(_context(context, alone, where) for context in contexts)
        name = str(values.get("id", where))
        documents = [context.document for context in read]
        for field, texts in {"id": [name], "question and contexts": [question, *documents], "answers": answers}.items():
            for text in texts:
                check_unicode(f"{where}: {field}", text)
        return cls(name, question, tuple(filter(str.strip, answers)), read)


def read_questions(source: str | Path, *, gold_only: bool = False) -> Iterator[Question]:
    """The answerable questions of a file, in order; unanswerable ones are skipped, and a warning says how many.

    Args:
        source: a `.jsonl`, `.jsonl.gz` or SQuAD `.json` file.
        gold_only: keep only the contexts that hold the answer.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when a row breaks the form above, or has no gold context where they are asked for.
    """
    unanswerable = 0
    for row in read_rows(source):
        question = Question.from_row(row)
        if not question.answers:
            unanswerable += 1
            continue
        gold = tuple(context for context in question.contexts if context.is_gold)
        if gold_only and not gold:
            flags = [context.is_gold for context in question.contexts]
            raise _error(row.where, "is_gold of the contexts", "true for one at least, with gold_only", flags)
        yield replace(question, contexts=gold) if gold_only else question
    if unanswerable:
        logger.warning("%s: %d questions without an answer were skipped.", source, unanswerable)


def pick(questions: Iterable[Question], *, every: int = 1, offset: int = 0, limit: int | None = None) -> list[Question]:
    """A slice that two numbers name: one question of `every`, after the first `offset`, at most `limit` of them."""
    return list(islice(islice(questions, offset, None, every), limit))


def read_rows(source: str | Path) -> Iterator[Row]:
    """The rows of a file as they are: of SQuAD `.json` in the form above, else the JSON object of every line.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is neither.
    """
    return _read_squad(source) if str(source).endswith(".json") else read_jsonl(source)


def document_text(context: Mapping[str, Any]) -> str:
    r"""The text of a context as it is compressed: title line first, if it has one.

    >>> document_text({"title": "Bees", "text": "They dance."})
    'Bees\nThey dance.'
    """
    title = (context.get("title") or "").strip()
    return f"{title}\n{context['text']}" if title else str(context["text"])


def read_jsonl(source: str | Path) -> Iterator[Row]:
    """The JSON object of every line of a `.jsonl` or `.jsonl.gz` file; empty lines are skipped.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when a line holds something else, or the file is damaged.
    """
    path = str(source)
    opener = gzip.open if path.endswith(".gz") else open
    opened = opener(path, "rt", encoding="utf-8-sig")  # editors of some systems write a byte order mark
    number = 0
    with opened as lines:
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield Row(_read_object(line), f"{source}, line {number}")
        except UnicodeDecodeError as error:
            raise ValueError(f"{source} must be UTF-8, got after line {number}: {error}. Convert the file.") from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            rule = f"{source} must be a whole gzip file, got after line {number}: {error}"
            raise ValueError(f"{rule}. Fetch it again, or rename it.") from error
        except _NotAnObject as error:
            raise ValueError(f"{source} must hold one JSON object a line, got line {number}: {error}.") from error


class _NotAnObject(Exception):
    pass


def _read_object(line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _NotAnObject(error) from error
    if not isinstance(values, dict):
        raise _NotAnObject(f"a {type(values).__name__}")
    return values


def _read_squad(source: str | Path) -> Iterator[Row]:
    try:
        articles = json.loads(Path(source).read_text(encoding="utf-8-sig"))["data"]
        rows = [
            Row(_squad_row(article, paragraph, asked), f"{source}, question {asked['id']!r}")
            for article in articles
            for paragraph in article["paragraphs"]
            for asked in paragraph["qas"]
        ]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{source} must be JSON in the form of SQuAD, got {type(error).__name__}: {error}. "
            "One JSON object a line belongs in a .jsonl file."
        ) from error
    yield from rows


def _squad_row(article: Mapping[str, Any], paragraph: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": asked["id"],
        "question": asked["question"],
        "answers": list(dict.fromkeys(answer["text"] for answer in asked["answers"])),
        "contexts": [{"title": article.get("title", ""), "text": paragraph["context"], "is_gold": True}],
    }


def _context(values: Any, alone: bool, where: str) -> Context:  # noqa: ANN401 - any JSON value
    if not isinstance(values, dict) or not isinstance(values.get("text"), str):
        raise _error(where, "contexts", 'a list of {"title", "text", "is_gold"} with a string as text', values)
    title = values.get("title") or ""
    if not isinstance(title, str):
        raise _error(where, "title", "a string", title)
    is_gold = values.get("is_gold", alone)
    if not isinstance(is_gold, bool):
        raise _error(where, "is_gold", "true or false", is_gold)
    return Context(title, values["text"], is_gold)


def _error(where: str, name: str, rule: str, got: object) -> ValueError:
    return ValueError(f"{where}: {name} must be {rule}, got {repr(got)[:80]}. Correct the file.")
