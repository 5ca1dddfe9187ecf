"""Training data on disk: read once, held-out texts dropped, tokenised once into memory-mapped tables."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pic_rag.checks import check_unicode
from pic_rag.chunking import tokenize
from pic_rag.progress import progress_bar
from pic_rag.questions import Question, Row, document_text, read_jsonl, read_rows
from pic_rag.training.synthetic import passages

logger = logging.getLogger(__name__)

SYNTHETIC = "synthetic:"
"""Before the name of a text corpus: the questions its texts ask about themselves."""

HUB = "hf:"
"""Before the id of a text corpus of Hugging Face `datasets`."""

_TABLE_VERSION = 3  # of what is written into tables: another one makes them anew
_STAGING = "pic-rag-staging-"
_STAGING_SECONDS = 7 * 24 * 3600.0  # no tokenisation takes that long
_ONE_TEXT = (".txt", ".md")
_BATCH_TEXTS = 1000
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Record:
    """A question about documents.

    Attributes:
        question: as asked.
        answers: at least one.
        contexts: the documents' texts, title first where there is one.
        gold: numbers of the contexts that hold the answer: those flagged `is_gold`; where none is, those whose text
            holds an answer, in whatever case; where none does either, all of them.
        cut_from: the whole text that the context of a synthetic question is a passage of.
    """

    question: str
    answers: list[str]
    contexts: list[str]
    gold: list[int]
    cut_from: str = ""


class TokenTable:
    """Token ids of many texts in two memory-mapped files; `table[i]` is `(tokens,)` int64."""

    def __init__(self, folder: Path) -> None:
        self.ids = np.load(folder / "ids.npy", mmap_mode="r")
        self.ends = np.load(folder / "ends.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, number: int) -> np.ndarray:
        return np.asarray(self.ids[self.ends[number] : self.ends[number + 1]], dtype=np.int64)

    @classmethod
    def write(cls, folder: Path, texts: Iterable[str], tokenizer: Any) -> None:  # noqa: ANN401
        """Tokenise texts into the files of a table."""
        dtype = np.uint16 if len(tokenizer) <= np.iinfo(np.uint16).max + 1 else np.uint32
        ids, ends = [], [0]
        for batch in _batched(progress_bar(None, texts, desc=f"tokenise {folder.name}")):
            for tokens in tokenize(batch, tokenizer)["input_ids"]:
                ids.append(np.asarray(tokens, dtype=dtype))
                ends.append(ends[-1] + len(tokens))
        np.save(folder / "ids.npy", np.concatenate(ids) if ids else np.empty(0, dtype))
        np.save(folder / "ends.npy", np.asarray(ends, dtype=np.int64))


def read_texts(source: str) -> Iterator[str]:
    """Texts of a corpus: `.txt` or `.md` (one), `.jsonl(.gz)` (`text` of each line), `hf:ID[:SPLIT]` of `datasets`."""
    if source.endswith(_ONE_TEXT):
        yield _read_text(source)
    else:
        yield from (values["text"] for values, _ in _text_rows(source))


def _read_text(source: str) -> str:
    try:
        return Path(source).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} must be UTF-8, got: {error}. Convert the file.") from error


def _text_rows(source: str) -> Iterator[Row]:
    for row in _hub_rows(source) if source.startswith(HUB) else read_jsonl(source):
        text = row.values.get("text")
        if not isinstance(text, str):
            raise ValueError(f"text must be a string, got {text!r} in {row.where}. Give it in every line.")
        check_unicode(f"{row.where}: text", text)
        yield row


def _hub_rows(source: str) -> Iterator[Row]:
    import datasets

    name, _, split = source.removeprefix(HUB).partition(":")
    for number, values in enumerate(datasets.load_dataset(name, split=split or "train", streaming=True), 1):
        yield Row(values, f"{source}, row {number}")


def read_records(source: str) -> Iterator[Record]:
    """Questions of a file: `.jsonl(.gz)` in the form of `pic-rag eval`, or SQuAD's own `.json`.

    `synthetic:FILE` is a `.jsonl(.gz)` file of texts, and the questions are those of `pic_rag.training.synthetic`.
    """
    if source.startswith(SYNTHETIC):
        for values, where in _text_rows(source.removeprefix(SYNTHETIC)):
            title = str(values.get("title") or "")
            check_unicode(f"{where}: title", title)
            for passage in passages(values["text"], title):
                for question, answer in passage.questions:
                    yield Record(question, [answer], [passage.text], [0], cut_from=values["text"])
        return
    for row in read_rows(source):
        if row.values.get("contexts") and row.values.get("answers"):
            record = _record(row)
            if record.answers and record.contexts:
                yield record


def _record(row: Row) -> Record:
    """A question and those of its contexts that hold text; none of them where no gold one does."""
    asked = Question.from_row(row)
    contexts = [context for context in asked.contexts if context.text.strip()]
    texts = [context.document for context in contexts]
    gold = [number for number, context in enumerate(contexts) if context.is_gold]
    if not any(context.is_gold for context in asked.contexts):
        gold = _holding(asked.answers, texts) or list(range(len(texts)))
    return Record(asked.question, list(asked.answers), texts if gold else [], gold)


def _holding(answers: Sequence[str], texts: Sequence[str]) -> list[int]:
    """Numbers of the texts that hold one of the answers."""
    sought = [answer.strip().casefold() for answer in answers]
    return [number for number, text in enumerate(texts) if any(answer in text.casefold() for answer in sought)]


def held_out_hashes(sources: Sequence[str]) -> set[str]:
    """Content hashes of every text, context and question of the held-out files."""
    hashes = {content_hash(text) for source in sources for text in _held_out_texts(source)}
    return hashes - {content_hash("")}  # else every context of one line would count as held out


def _held_out_texts(source: str) -> Iterator[str]:
    if source.endswith(_ONE_TEXT):
        yield from read_texts(source)
        return
    for values, where in read_rows(source):
        texts: list[tuple[str, Any]] = [(name, values[name]) for name in ("text", "question") if name in values]
        contexts = values.get("contexts") or []
        for context in contexts if isinstance(contexts, list) else [contexts]:
            texts += [("contexts", text) for text in _context_texts(context)]
        for name, text in texts:
            if not isinstance(text, str):
                rule = 'a list of {"title", "text"} with strings' if name == "contexts" else "a string"
                got = repr(values[name])[:80]
                raise ValueError(f"{where}: {name} must be {rule} in a held-out file, got {got}. Correct the file.")
            yield text


def _context_texts(context: Any) -> list[Any]:  # noqa: ANN401 - any JSON value
    """What a context says, without its title and with it; [None] for what is no context."""
    if not isinstance(context, dict) or not isinstance(context.get("title") or "", str):
        return [None]
    text = context.get("text")
    return [text, document_text(context)] if isinstance(text, str) else [None]


@lru_cache(maxsize=1 << 16)  # contexts come back with every question about them
def content_hash(text: str) -> str:
    """Hash of a text's words: case, punctuation and spacing do not hide a held-out text."""
    return hashlib.sha256(" ".join(_WORD.findall(text.lower())).encode()).hexdigest()


def _held_out_by(record: Record, held_out: set[str]) -> str | None:
    """What of a record is held out: the wording of its question, or a context or its text; None when neither is."""
    if content_hash(record.question) in held_out:
        return "wording"
    texts = [record.cut_from, *record.contexts, *(text.partition("\n")[2] for text in record.contexts)]
    return "context" if any(content_hash(text) in held_out for text in texts) else None


class Corpora:
    """The tokenised corpora of a run, in a folder that holds each until its files change.

    A table that was made elsewhere counts as it is where its files are not at hand, so a training machine needs the
    folder alone.

    Args:
        cache: the folder.
        tokenizer: any Hugging Face tokenizer.
        held_out: files whose texts and questions are dropped.
    """

    def __init__(self, cache: Path, tokenizer: Any, held_out: Sequence[str]) -> None:  # noqa: ANN401
        self.cache = cache
        self.tokenizer = tokenizer
        self.held_out = tuple(held_out)
        self._vocabulary = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()

    def texts(self, sources: Sequence[str]) -> TokenTable:
        """All text corpora as one table."""

        def build(folder: Path) -> None:
            held_out = self._held_out_hashes
            texts = (text for source in sources for text in read_texts(source) if content_hash(text) not in held_out)
            TokenTable.write(folder, texts, self.tokenizer)

        return TokenTable(self._table("texts", sources, build))

    def questions(self, source: str) -> QuestionTable:
        """The questions of a file."""

        def build(folder: Path) -> None:
            QuestionTable.write(folder, _training_records(source, self._held_out_hashes), self.tokenizer)

        return QuestionTable(self._table("questions", [source], build))

    @cached_property
    def _held_out_hashes(self) -> set[str]:
        return held_out_hashes(self.held_out)

    def _table(self, kind: str, sources: Sequence[str], build: Callable[[Path], None]) -> Path:
        """The folder of a table; it appears whole or not at all."""
        stamp = {_file(source): _stamp(_file(source)) for source in (*sources, *self.held_out)}
        identity = json.dumps([_TABLE_VERSION, list(sources), list(self.held_out), self._vocabulary])
        folder = self.cache / f"{kind}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
        made = _made_of(folder)
        if made is not None and all(now in (None, made.get(file)) for file, now in stamp.items()):
            return folder
        _require_files(kind, sources)
        _require_files("held_out", self.held_out)
        self.cache.mkdir(parents=True, exist_ok=True)
        _sweep(self.cache)
        with tempfile.TemporaryDirectory(dir=self.cache, prefix=_STAGING) as staging:
            whole = Path(staging, folder.name)
            whole.mkdir()
            build(whole)
            (whole / "files.json").write_text(json.dumps(stamp, indent=1), encoding="utf-8")
            if folder.exists():
                os.rename(folder, Path(staging, "stale"))
            os.rename(whole, folder)
        return folder


@dataclass(frozen=True)
class Asked:
    """A question of a table; its documents are rows of the table's contexts.

    Attributes:
        question: as asked.
        answers: at least one.
        contexts: the rows of its documents.
        gold: those that hold the answer.
    """

    question: str
    answers: list[str]
    contexts: list[int]
    gold: list[int]


class QuestionTable:
    """Questions of one file, grouped by the documents they are about; contexts are tokenised once.

    Attributes:
        groups: lists of questions that share their contexts.
        contexts: token ids of every distinct context.
    """

    def __init__(self, folder: Path) -> None:
        self.contexts = TokenTable(folder)
        grouped: dict[tuple[int, ...], list[Asked]] = {}
        for line in (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines():
            asked = Asked(**json.loads(line))
            grouped.setdefault(tuple(asked.contexts), []).append(asked)
        self.groups = list(grouped.values())

    @classmethod
    def write(cls, folder: Path, records: Iterable[Record], tokenizer: Any) -> None:  # noqa: ANN401
        """Write the files of a table."""
        row: dict[str, int] = {}
        with (folder / "questions.jsonl").open("w", encoding="utf-8") as lines:
            for record in records:
                contexts = [row.setdefault(text, len(row)) for text in record.contexts]
                gold = [contexts[number] for number in record.gold]
                lines.write(json.dumps(asdict(Asked(record.question, record.answers, contexts, gold))) + "\n")
        TokenTable.write(folder, row, tokenizer)


def _training_records(source: str, held_out: set[str]) -> Iterator[Record]:
    kept = 0
    dropped: Counter[str] = Counter()
    for record in read_records(source):
        reason = _held_out_by(record, held_out)
        if reason is None:
            kept += 1
            yield record
        else:
            dropped[reason] += 1
    why = f"{dropped['wording']} held out by the wording of the question and {dropped['context']} by a context"
    logger.info("%s: %d questions kept for training, %s", source, kept, why)
    if not kept:
        raise ValueError(
            "questions must hold at least one question with an answer and a document that is not held out, got none "
            f"in {source}: {why}. Name other questions, or take the file that they share words with out of held_out."
        )


def _file(source: str) -> str:
    return source.removeprefix(SYNTHETIC)


def _require_files(field: str, sources: Sequence[str]) -> None:
    """Raise FileNotFoundError, which names the configuration's field, when a source is a file that is not there."""
    for file in map(_file, sources):
        if not file.startswith(HUB) and not os.path.exists(file):
            raise FileNotFoundError(
                f"{field} must name files that are there, got {file!r}, which is not in {os.getcwd()!r}. Name your own "
                "files in the configuration, or leave the field out."
            )


def _made_of(folder: Path) -> dict[str, Any] | None:
    """The stamps of the files that a table was made of; None where there is no table, or a damaged one."""
    try:
        made = json.loads((folder / "files.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return made if isinstance(made, dict) else None


def _sweep(cache: Path) -> None:
    """Remove what killed runs left: staging folders too old to be in use by another process."""
    for folder in cache.glob(f"{_STAGING}*"):
        with suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > _STAGING_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _stamp(file: str) -> list[int] | None:
    """Size and time of a file; None where there is none."""
    if not os.path.exists(file):
        return None
    stat = os.stat(file)
    return [stat.st_size, stat.st_mtime_ns]


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH_TEXTS:
            yield batch
            batch = []
    if batch:
        yield batch
