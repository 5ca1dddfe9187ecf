"""What is asked of the generator, and what counts as its answer: questions about documents, or problems by example."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from pic_rag.checks import check_unicode
from pic_rag.evaluation.metrics import exact_match
from pic_rag.prompts import Messages, PromptShape, rag_messages
from pic_rag.questions import Context, Question, read_jsonl

_CALCULATION = re.compile(r"<<.*?>>")  # GSM8K's calculator notes, which are no text
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        messages: the prompt.
        answer: what is scored of the generator's words.
        exact_match: 1 when that is right, else 0.
        max_new_tokens: longest answer.
    """

    messages: PromptShape
    answer: Callable[[str], str]
    exact_match: Callable[[str, Sequence[str]], float]
    max_new_tokens: int


def problem_messages(question: str, passages: Sequence[str]) -> Messages:
    """One chat message that shows solved problems (handles or texts) and sets the next one."""
    examples = "\n\n".join(f"[{number}] {passage}" for number, passage in enumerate(passages, 1))
    shown = f"Solved problems:\n{examples}\n\n" if passages else ""
    instruction = "Solve the problem step by step. End with #### and the number."
    return [{"role": "user", "content": f"{instruction}\n\n{shown}Question: {question}\nAnswer:"}]


def final_number(text: str) -> str:
    """The number after `####`, else the last number of a text; without commas, a point's zeros or a sign of money.

    >>> final_number("She sells 9 eggs for $18.00. #### 1,018"), final_number("9 eggs, so $18.50."), final_number("?")
    ('1018', '18.5', '')
    """
    marked = text.rpartition("####")[2] if "####" in text else ""
    numbers = _NUMBER.findall(marked)[:1] or _NUMBER.findall(text)[-1:]
    number = numbers[0].replace(",", "") if numbers else ""
    return number.rstrip("0").rstrip(".") if "." in number else number


def same_number(said: str, answers: Sequence[str]) -> float:
    """1 when a number is one of the answers, else 0.

    >>> same_number("-3.5", ["-3.50"]), same_number("35", ["3.5"]), same_number("", ["x"])
    (1.0, 0.0, 0.0)
    """
    return float(bool(said) and said in map(final_number, answers))


TASKS = {
    "questions": Task(rag_messages, str.strip, exact_match, max_new_tokens=32),
    "gsm8k": Task(problem_messages, final_number, same_number, max_new_tokens=256),
}
"""Every task by name."""


def with_examples(questions: Iterable[Question], source: str | Path, shots: int) -> Iterator[Question]:
    """Give every question the first solved problems of a file as its contexts, the same ones in the same order.

    Args:
        questions: problems without contexts of their own.
        source: `.jsonl` or `.jsonl.gz` with `question` and `rationale`, which ends in `#### number`: a train split.
        shots: how many.

    Raises:
        ValueError: when the file holds fewer, or a line has no question or no rationale.
    """
    examples = []
    for values, where in islice(read_jsonl(source), shots):
        for name in ("question", "rationale"):
            if not isinstance(values.get(name), str):
                raise ValueError(f"{name} must be a string, got {values.get(name)!r} in {where}. Correct the file.")
            check_unicode(f"{where}: {name}", values[name])
        solution = _CALCULATION.sub("", values["rationale"])
        examples.append(Context("", f"Question: {values['question']}\nAnswer: {solution}", True))
    if len(examples) < shots:
        raise ValueError(f"shots must be at most the problems of {source}, got {shots} and {len(examples)} problems.")
    yield from (replace(question, contexts=tuple(examples)) for question in questions)
