"""Training data on disk: read once, held-out texts dropped, tokenised once into memory-mapped tables."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pic_rag.questions import Question, read_jsonl, read_rows

logger = logging.getLogger(__name__)

_BATCH_TEXTS = 1000


@dataclass(frozen=True)
class Record:
    """A question about documents.

    Attributes:
        question: as asked.
        answers: at least one.
        contexts: the documents' texts, title first where there is one.
        gold: numbers of the contexts that hold the answer.
    """

    question: str
    answers: list[str]
    contexts: list[str]
    gold: list[int]


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
    def build(cls, folder: Path, texts: Iterable[str], tokenizer: Any) -> TokenTable:  # noqa: ANN401
        """Tokenise texts into a new folder; it appears whole or not at all."""
        dtype = np.uint16 if len(tokenizer) <= np.iinfo(np.uint16).max + 1 else np.uint32
        folder.parent.mkdir(parents=True, exist_ok=True)
        ids, ends = [], [0]
        for batch in _batched(tqdm(texts, desc=f"tokenise {folder.name}", disable=None, delay=1.0)):
            for tokens in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
                ids.append(np.asarray(tokens, dtype=dtype))
                ends.append(ends[-1] + len(tokens))
        with tempfile.TemporaryDirectory(dir=folder.parent) as staging:
            whole = Path(staging, "table")
            whole.mkdir()
            np.save(whole / "ids.npy", np.concatenate(ids) if ids else np.empty(0, dtype))
            np.save(whole / "ends.npy", np.asarray(ends, dtype=np.int64))
            if not folder.exists():
                os.rename(whole, folder)
        return cls(folder)


def read_texts(source: str) -> Iterator[str]:
    """Texts of a corpus: `.txt` or `.md` (one), `.jsonl(.gz)` (`text` of each line), `hf:ID[:SPLIT]` of `datasets`."""
    if source.startswith("hf:"):
        import datasets

        name, _, split = source[3:].partition(":")
        for row in datasets.load_dataset(name, split=split or "train", streaming=True):
            yield row["text"]
    elif source.endswith((".txt", ".md")):
        yield Path(source).read_text(encoding="utf-8")
    else:
        for values, where in read_jsonl(source):
            if not isinstance(values.get("text"), str):
                raise ValueError(
                    f"text must be a string, got {values.get('text')!r} in {where}. Give it in every line."
                )
            yield values["text"]


def read_questions(source: str) -> Iterator[Record]:
    """Questions of a file: `.jsonl(.gz)` in the form of `pic-rag eval`, or SQuAD's own `.json`."""
    for row in read_rows(source):
        if row.values.get("contexts") and row.values.get("answers"):
            asked = Question.from_row(row)
            gold = [number for number, context in enumerate(asked.contexts) if context.is_gold]
            yield Record(asked.question, list(asked.answers), [context.document for context in asked.contexts], gold)


def held_out_hashes(sources: Sequence[str]) -> set[str]:
    """Content hashes of every text, context and question of the held-out files."""
    hashes: set[str] = set()
    for source in sources:
        for row, _ in read_rows(source):
            for context in row.get("contexts") or []:
                hashes.add(content_hash(context["text"]))
            for name in ("text", "question"):
                if name in row:
                    hashes.add(content_hash(row[name]))
    return hashes - {content_hash("")}  # else every context of one line would count as held out


def content_hash(text: str) -> str:
    """Hash of a text's words: case, punctuation and spacing do not hide a held-out text."""
    words = "".join(character if character.isalnum() else " " for character in text.lower()).split()
    return hashlib.sha256(" ".join(words).encode()).hexdigest()


def keep_training(records: Iterable[Record], held_out: set[str]) -> Iterator[Record]:
    """The records none of whose contexts (with or without title) or questions are held out."""
    return (record for record in records if _held_out_by(record, held_out) is None)


def _held_out_by(record: Record, held_out: set[str]) -> str | None:
    """What of a record is held out: the wording of its question, or a context; None when neither is."""
    if content_hash(record.question) in held_out:
        return "wording"
    contexts = [*record.contexts, *(text.partition("\n")[2] for text in record.contexts)]
    return "context" if any(content_hash(text) in held_out for text in contexts) else None


def text_table(sources: Sequence[str], cache: Path, tokenizer: Any, held_out: set[str]) -> TokenTable:  # noqa: ANN401
    """All text corpora as one token table, tokenised when the cache does not hold it."""
    folder = cache / f"texts-{_cache_key(sources, tokenizer, held_out)}"
    if folder.exists():
        return TokenTable(folder)
    texts = (text for source in sources for text in read_texts(source) if content_hash(text) not in held_out)
    return TokenTable.build(folder, texts, tokenizer)


class QuestionTable:
    """Questions of one file, grouped by the documents they are about; contexts are tokenised once.

    Attributes:
        groups: lists of records that share their contexts.
        contexts: token ids of every distinct context.
        number: the row of `contexts` of a context's text.
    """

    def __init__(self, source: str, cache: Path, tokenizer: Any, held_out: set[str]) -> None:  # noqa: ANN401
        records = _training_records(source, held_out)
        self.number: dict[str, int] = {}
        grouped: dict[tuple[int, ...], list[Record]] = {}
        for record in records:
            key = tuple(self.number.setdefault(text, len(self.number)) for text in record.contexts)
            grouped.setdefault(key, []).append(record)
        self.groups = list(grouped.values())
        folder = cache / f"contexts-{_cache_key([source], tokenizer, held_out)}"
        self.contexts = TokenTable(folder) if folder.exists() else TokenTable.build(folder, self.number, tokenizer)


def _training_records(source: str, held_out: set[str]) -> list[Record]:
    records: list[Record] = []
    dropped: Counter[str] = Counter()
    for record in read_questions(source):
        reason = _held_out_by(record, held_out)
        if reason is None:
            records.append(record)
        else:
            dropped[reason] += 1
    why = f"{dropped['wording']} held out by the wording of the question and {dropped['context']} by a context"
    logger.info("%s: %d questions kept for training, %s", source, len(records), why)
    if not records:
        raise ValueError(
            f"questions must hold at least one question that is not held out, got none in {source}: {why}. "
            "Name other questions, or take the file that they share words with out of held_out."
        )
    return records


def _cache_key(sources: Sequence[str], tokenizer: Any, held_out: set[str]) -> str:  # noqa: ANN401
    stats = [os.stat(source) if os.path.exists(source) else None for source in sources]
    files = [(source, stat and (stat.st_size, stat.st_mtime_ns)) for source, stat in zip(sources, stats, strict=True)]
    vocabulary = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    identity = json.dumps([files, vocabulary, sorted(held_out)])
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def _batched(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH_TEXTS:
            yield batch
            batch = []
    if batch:
        yield batch
