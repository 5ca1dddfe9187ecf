"""Training examples: what the encoder compresses, and what the generator reads and has to say.

An example is drawn from a random generator, so the same seed and step give the same example on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError

from pic_rag.chunking import Segment, fold, place_slots, token_windows
from pic_rag.handles import escape_handles, split_handles
from pic_rag.prompts import INSTRUCTION, rag_messages, repeat_messages
from pic_rag.questions import Question
from pic_rag.training.config import TrainConfig
from pic_rag.training.corpora import Asked, QuestionTable, TokenTable

MEMORY = -1  # stands in a sequence where a memory token goes
Messages = list[dict[str, str]]
Spans = list[tuple[str, bool]]  # text of a rendered chat, and whether the generator has to say it
Ratios = Mapping[int, float]
PromptShape = Callable[[str, Sequence[str]], Messages]


@dataclass(frozen=True, eq=False)
class Dialogue:
    """What the generator reads: `(tokens,)` ids with MEMORY where memory tokens go, and which it has to predict."""

    ids: np.ndarray
    is_target: np.ndarray

    @classmethod
    def join(cls, pieces: Sequence[tuple[np.ndarray, bool]]) -> Dialogue:
        """Put `(ids, is_target)` pieces behind one another."""
        ids = np.concatenate([piece for piece, _ in pieces])
        return cls(ids, np.concatenate([np.full(len(piece), target) for piece, target in pieces]))


@dataclass(frozen=True, eq=False)
class Example:
    """One training example.

    Attributes:
        segments: encoder input; its slots, in order, fill the MEMORY places of `reads`.
        reads: the generator's sequence with memories.
        teacher: the same with text in place of memories and the same targets; None without distillation.
    """

    segments: list[Segment]
    reads: Dialogue
    teacher: Dialogue | None = None

    @property
    def strides(self) -> np.ndarray:
        """`(slots,)` how far each memory token of `reads` lies behind the one before, where they are spread."""
        return np.concatenate([np.empty(0, dtype=np.int64), *(segment.strides for segment in self.segments)])

    @property
    def places(self) -> np.ndarray:
        """`(3,)` places it takes in rows of the encoder, of the generator and of its teacher."""
        dialogues = [len(dialogue.ids) if dialogue else 0 for dialogue in (self.reads, self.teacher)]
        return np.array([sum(segment.places for segment in self.segments), *dialogues])

    @property
    def longest(self) -> int:
        """Places of its longest sequence: a segment, or what the generator or its teacher reads."""
        return max(*self.places[1:], *(segment.places for segment in self.segments))


def _plain(question: str, passages: Sequence[str]) -> Messages:
    return [{"role": "user", "content": "\n\n".join([*passages, question])}]


def _context_then_question(question: str, passages: Sequence[str]) -> Messages:
    context = "\n\n".join(passages)
    return [{"role": "user", "content": f"Context:\n{context}\n\nQuestion: {question}\nAnswer:"}]


def _framework(question: str, passages: Sequence[str]) -> Messages:
    context = "\n\n".join(passages)
    asked = (
        "Context information is below.\n---------------------\n"
        f"{context}\n---------------------\n"
        "Given the context information and not prior knowledge, answer the query.\n"
        f"Query: {question}\nAnswer: "
    )
    return [{"role": "user", "content": asked}]


def _system(question: str, passages: Sequence[str]) -> Messages:
    context = "\n\n".join(passages)
    system = f"You are an assistant for question-answering tasks. Use the context to answer.\n\n{context}"
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def _question_first(question: str, passages: Sequence[str]) -> Messages:
    context = "\n".join(f"- {passage}" for passage in passages)
    return [{"role": "user", "content": f"{question}\n\n{INSTRUCTION}\n\n{context}"}]


PROMPT_SHAPES: tuple[tuple[float, PromptShape], ...] = (
    (0.5, rag_messages),
    (0.1, _plain),
    (0.1, _context_then_question),
    (0.1, _framework),
    (0.1, _system),
    (0.1, _question_first),
)
"""Weights and forms of the prompts that the frameworks really send."""

_SHAPE_WEIGHTS = [weight for weight, _ in PROMPT_SHAPES]


def _one_message(shape: PromptShape, question: str, passages: Sequence[str]) -> Messages:
    """A form of prompt for templates without a system role: that message's text comes in front of the user's."""
    return [{"role": "user", "content": "\n\n".join(message["content"] for message in shape(question, passages))}]


class ExampleFactory:
    """Draws examples of each task from tokenised corpora.

    Args:
        config: the run.
        tokenizer: any Hugging Face tokenizer.
        texts: the corpus of the text tasks.
        questions: the tables of the task questions, and their weights.
        end_token_ids: tokens at which the generator stops; none given: the tokenizer's special tokens.

    Raises:
        ValueError: when the texts are too short, or the chat template shows no form of prompt as it is.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: Any,  # noqa: ANN401 - any Hugging Face tokenizer
        texts: TokenTable | None,
        questions: Mapping[QuestionTable, float],
        end_token_ids: Collection[int] = (),
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.end_token_ids = end_token_ids or tokenizer.all_special_ids
        self.texts = texts
        if texts is not None:
            _check_longest(texts, config.text_tokens[0])
        self.questions = list(questions)
        weights = np.array(list(questions.values()), dtype=float)
        self._question_weights = weights / weights.sum() if len(weights) else weights
        self._shapes = [self._fitted(shape) for _, shape in PROMPT_SHAPES] if self.questions else []
        self._draw: dict[str, Callable[[Ratios, np.random.Generator], Example]] = {
            "reconstruct": self._reconstruct,
            "continue": self._continue,
            "questions": self._ask,
        }

    def draw(self, task: str, ratios: Ratios, random: np.random.Generator) -> Example:
        """One example of a task, its documents compressed at ratios of those weights."""
        return self._draw[task](ratios, random)

    def pose(self, question: Question, ratio: int) -> Example:
        """A question as evaluation asks it: all its documents at one ratio, its first answer, a teacher beside."""
        documents = [self._document_ids(context.document) for context in question.contexts]
        segments = [self._cut(document, ratio, self.config.pic.slots_per_chunk) for document in documents]
        messages = rag_messages(
            escape_handles(question.question), [_handle(number) for number in range(len(documents))]
        )
        spans = self._converse(messages, [(question.question, question.answers[0])])
        return Example(
            [segment for parts in segments for segment in parts],
            self._sequence(spans, [_memory_places(parts) for parts in segments]),
            self._sequence(spans, documents),
        )

    def repeat(self, document: str, ratio: int) -> Example:
        """A document compressed at a ratio, which the generator has to repeat word by word."""
        return self._repeat(self._document_ids(document), ratio, self.config.pic.slots_per_chunk)

    def token_counts(self, vocabulary: int) -> torch.Tensor:
        """How often each of `(vocabulary,)` tokens occurs in the texts and in the questions' contexts."""
        tables = [table.contexts for table in self.questions] + ([self.texts] if self.texts else [])
        return torch.from_numpy(sum(np.bincount(table.ids, minlength=vocabulary) for table in tables))

    def _reconstruct(self, ratios: Ratios, random: np.random.Generator) -> Example:
        text = self._excerpt(random, 0)
        return self._repeat(text, *self._draw_cut(ratios, random))

    def _repeat(self, text: np.ndarray, ratio: int, slots_per_chunk: int) -> Example:
        segments = self._cut(text, ratio, slots_per_chunk)
        prompt = self._render(repeat_messages(_handle(0)))
        pieces = self._tokenize(prompt, [_memory_places(segments)])
        return Example(segments, Dialogue.join([*pieces, (text, True), (self._ids(self._turn_end), True)]))

    def _continue(self, ratios: Ratios, random: np.random.Generator) -> Example:
        excerpt = self._excerpt(random, self.config.target_tokens)
        cut = max(1, len(excerpt) - self.config.target_tokens)
        segments = self._compress(excerpt[:cut], ratios, random)
        return Example(segments, Dialogue.join([(_memory_places(segments), False), (excerpt[cut:], True)]))

    def _ask(self, ratios: Ratios, random: np.random.Generator) -> Example:
        table = self.questions[random.choice(len(self.questions), p=self._question_weights)]
        group = table.groups[random.integers(len(table.groups))]
        candidates = [group[number] for number in random.permutation(len(group))]
        rows = self._documents(candidates[0], table, random)
        asked = [record for record in candidates if set(record.gold) <= set(rows)][: self.config.turns]
        documents = [table.contexts[row] for row in rows]
        shown: list[np.ndarray] = []
        segments: list[Segment] = []
        for document in documents:
            if random.random() < self.config.text_share:
                shown.append(document)
                continue
            parts = self._compress(document, ratios, random)
            segments += parts
            shown.append(_memory_places(parts))
        shape = self._shapes[random.choice(len(PROMPT_SHAPES), p=_SHAPE_WEIGHTS)]
        exchanges = [(record.question, record.answers[random.integers(len(record.answers))]) for record in asked]
        messages = shape(asked[0].question, [_handle(number) for number in range(len(documents))])
        spans = self._converse(messages, exchanges)
        teacher = self._sequence(spans, documents) if self.config.distillation else None
        return Example(segments, self._sequence(spans, shown), teacher)

    def _documents(self, asked: Asked, table: QuestionTable, random: np.random.Generator) -> list[int]:
        """The contexts to show, each once: the gold ones, distractors from the record or from neighbouring records."""
        gold = list(dict.fromkeys(asked.gold))
        others = [row for row in dict.fromkeys(asked.contexts) if row not in gold]
        limit = max(len(gold), int(random.integers(1, self.config.documents + 1)))
        if not others and random.random() < self.config.distractor_share:
            others = self._neighbours(asked, table, random)
        random.shuffle(others)
        shown = gold + others[: limit - len(gold)]
        random.shuffle(shown)
        return shown

    def _neighbours(self, asked: Asked, table: QuestionTable, random: np.random.Generator) -> list[int]:
        near = asked.contexts[0] + random.integers(-8, 9, size=self.config.documents)
        return [row for row in set(near.tolist()) if 0 <= row < len(table.contexts) and row not in asked.contexts]

    def _fitted(self, shape: PromptShape) -> PromptShape:
        """A form of prompt as the chat template takes it: without a system message where it refuses or drops that."""
        for form in (shape, partial(_one_message, shape)):
            with suppress(TemplateError):
                if self._render(form("?", [_handle(0)])).count(_handle(0)) == 1:
                    return form
        raise ValueError(
            "The chat template of base_model must show a user's message once and as it is, got one that does not. "
            "Name an instruction-tuned model, or correct tokenizer.chat_template."
        )

    def _converse(self, messages: Messages, exchanges: Sequence[tuple[str, str]]) -> Spans:
        """The rendered chat that begins with a prompt, of (question, answer) pairs: every answer is said to its end.

        It is over after the first answer that the template shows otherwise once there is a next question.
        """
        spans: Spans = []
        written = ""
        prompt = self._render(messages)
        for turn, (_, answer) in enumerate(exchanges, 1):
            following = exchanges[turn % len(exchanges)][0]  # after the last answer too: templates then end its turn
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": following}]
            longer = self._render(messages)
            said = self._said(prompt, answer, longer)
            spans += [(prompt.removeprefix(written), False), (said, True)]
            written = prompt + said
            if not longer.startswith(written):
                break
            prompt = longer
        return spans

    def _said(self, prompt: str, answer: str, longer: str) -> str:
        """What a longer chat has behind a prompt, up to the end of the answer's turn; without that, answer and end."""
        wrote = longer[len(prompt) :] if longer.startswith(prompt) else ""
        for said in (answer + self._turn_end, answer.strip() + self._turn_end):
            if said in wrote:
                return wrote[: wrote.index(said) + len(said)]
        return answer + self._turn_end

    @cached_property
    def _turn_end(self) -> str:
        """What the template writes behind an answer, up to a token at which the generator stops; else `eos_token`."""
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _handle(0)}]
        tail = str(self.tokenizer.apply_chat_template(messages, tokenize=False)).partition(_handle(0))[2]
        tokens = filter(None, map(self.tokenizer.decode, self.end_token_ids))
        ends = [tail.index(token) + len(token) for token in tokens if token in tail]
        if not ends and self.tokenizer.eos_token is None:
            raise ValueError(
                "The chat template of base_model must end an answer with a token at which the generator stops, got "
                f"{tail!r}. Set tokenizer.eos_token, or eos_token_id in generation_config.json."
            )
        return tail[: min(ends)] if ends else str(self.tokenizer.eos_token)

    def _sequence(self, spans: Spans, documents: Sequence[np.ndarray]) -> Dialogue:
        pieces: list[tuple[np.ndarray, bool]] = []
        for text, is_target in spans:
            pieces += [(self._ids(text), True)] if is_target else self._tokenize(text, documents)
        return Dialogue.join(pieces)

    def _tokenize(self, text: str, documents: Sequence[np.ndarray]) -> list[tuple[np.ndarray, bool]]:
        """Token ids of a prompt, piece by piece, each handle replaced by what stands for its document."""
        return [
            (documents[_number(piece)] if is_handle else self._ids(piece), False)
            for is_handle, piece in split_handles(text)
            if piece
        ]

    def _excerpt(self, random: np.random.Generator, extra_tokens: int) -> np.ndarray:
        """A stretch of a text: log-uniform length within `text_tokens`, plus some, where the text is long enough."""
        if self.texts is None:
            raise ValueError("texts must name a corpus for a text task, got none.")
        shortest, longest = self.config.text_tokens
        wanted = int(np.exp(random.uniform(np.log(shortest), np.log(longest + 1)))) + extra_tokens
        while True:
            position = random.integers(self.texts.ends[-1])
            text = self.texts[int(np.searchsorted(self.texts.ends, position, side="right")) - 1]
            if len(text) >= min(wanted, shortest):
                start = random.integers(max(1, len(text) - wanted + 1))
                return text[start : start + wanted]

    def _compress(self, document: np.ndarray, ratios: Ratios, random: np.random.Generator) -> list[Segment]:
        """Segments of a document at a random ratio and a random number of slots a chunk."""
        return self._cut(document, *self._draw_cut(ratios, random))

    def _draw_cut(self, ratios: Ratios, random: np.random.Generator) -> tuple[int, int]:
        """A ratio and a number of slots a chunk."""
        weights = np.array(list(ratios.values()))
        ratio = int(random.choice(list(ratios), p=weights / weights.sum()))
        return ratio, int(random.choice(self.config.slots_per_chunk))

    def _cut(self, document: np.ndarray, ratio: int, slots_per_chunk: int) -> list[Segment]:
        """Segments of one document."""
        pic = self.config.pic
        cuts = [document[start : start + pic.segment_tokens] for start in range(0, len(document), pic.segment_tokens)]
        segments = [place_slots(cut, ratio, slots_per_chunk) for cut in cuts]
        return [part for segment in segments for part in fold(segment)] if pic.foldable else segments

    def _render(self, messages: Messages) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _document_ids(self, text: str) -> np.ndarray:
        return np.concatenate([np.empty(0, dtype=np.int64), *token_windows(text, self.tokenizer)])

    def _ids(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)


def _check_longest(texts: TokenTable, shortest: int) -> None:
    longest = int(np.diff(texts.ends).max(initial=0))
    if longest < shortest:
        raise ValueError(
            f"texts must hold a text of text_tokens[0]={shortest} tokens or more that is not held out, got {longest} "
            "tokens in the longest. Lower text_tokens or name another corpus."
        )


def _handle(number: int) -> str:
    return f"[[pic:{number:032x}]]"


def _number(handle: str) -> int:
    return int(handle[6:-2], 16)


def _memory_places(segments: Sequence[Segment]) -> np.ndarray:
    return np.full(sum(len(segment.chunk) for segment in segments), MEMORY, dtype=np.int64)
