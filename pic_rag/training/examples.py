"""Training examples: which documents the encoder compresses, and what is asked about them.

An example is drawn from a random generator, so the same seed and step give the same example on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pic_rag.chunking import Segment, cut
from pic_rag.handles import escape_handles, placeholder
from pic_rag.prompts import rag_messages
from pic_rag.questions import Question
from pic_rag.training.chat import MEMORY, Chat, Dialogue, PromptShape, Spans, shape_weights
from pic_rag.training.config import TrainConfig
from pic_rag.training.corpora import Asked, QuestionTable, TokenTable

Ratios = Mapping[int, float]


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


class ExampleFactory:
    """Draws examples of each task from tokenised corpora.

    Args:
        config: the run.
        tokenizer: any Hugging Face tokenizer.
        texts: the corpus of the text tasks.
        questions: the tables of the task questions, and their weights.
        end_token_ids: tokens at which the generator stops; none given: the tokenizer's special tokens.
        context_places: most places that the generator and its teacher read; None: any number.

    Raises:
        ValueError: when the texts are too short, or the chat template does not show a user's message.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: Any,  # noqa: ANN401 - any Hugging Face tokenizer
        texts: TokenTable | None,
        questions: Mapping[QuestionTable, float],
        end_token_ids: Collection[int] = (),
        context_places: int | None = None,
    ) -> None:
        self.config = config
        self.context_places = context_places or math.inf
        self.chat = Chat(tokenizer, end_token_ids)
        self.texts = texts
        if texts is not None:
            _check_longest(texts, config.text_tokens[0])
        self.questions = list(questions)
        weights = np.array(list(questions.values()), dtype=float)
        self._question_weights = weights / weights.sum() if len(weights) else weights
        self._shapes = self.chat.shapes if self.questions else []
        self._shape_weights = shape_weights(config.question_first)
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
        documents = [self.chat.document_ids(context.document) for context in question.contexts]
        segments = [self._cut(document, ratio, self.config.pic.slots_per_chunk) for document in documents]
        messages = rag_messages(escape_handles(question.question), list(map(placeholder, range(len(documents)))))
        spans = self.chat.converse(messages, [(question.question, question.answers[0])])
        return Example(
            [segment for parts in segments for segment in parts],
            self.chat.dialogue(spans, [_memory_places(parts) for parts in segments]),
            self.chat.dialogue(spans, documents),
        )

    def repeat(self, document: str, ratio: int) -> Example:
        """A document compressed at a ratio, which the generator has to repeat word by word."""
        return self._repeat(self.chat.document_ids(document), ratio, self.config.pic.slots_per_chunk)

    def token_counts(self, vocabulary: int) -> torch.Tensor:
        """How often each of `(vocabulary,)` tokens occurs in the texts and in the questions' contexts."""
        tables = [table.contexts for table in self.questions] + ([self.texts] if self.texts else [])
        return torch.from_numpy(sum(np.bincount(table.ids, minlength=vocabulary) for table in tables))

    def _reconstruct(self, ratios: Ratios, random: np.random.Generator) -> Example:
        text = self._excerpt(random, 0)
        return self._repeat(text, *self._draw_cut(ratios, random))

    def _repeat(self, text: np.ndarray, ratio: int, slots_per_chunk: int) -> Example:
        segments = self._cut(text, ratio, slots_per_chunk)
        return Example(segments, self.chat.repeat(_memory_places(segments), text))

    def _continue(self, ratios: Ratios, random: np.random.Generator) -> Example:
        excerpt = self._excerpt(random, self.config.target_tokens)
        shortest = min(self.config.text_tokens[0], len(excerpt) // 2)
        cut = max(shortest, len(excerpt) - self.config.target_tokens)
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
        shape = self._shapes[random.choice(len(self._shapes), p=self._shape_weights)]
        spans = self._conversation(asked, shape, len(documents), random)
        teacher = self.chat.dialogue(spans, documents) if self.config.distillation else None
        return Example(segments, self.chat.dialogue(spans, shown), teacher)

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

    def _conversation(
        self, asked: list[Asked], shape: PromptShape, documents: int, random: np.random.Generator
    ) -> Spans:
        """The rendered chat about so many documents, with one answer to each question."""
        exchanges = [(record.question, record.answers[random.integers(len(record.answers))]) for record in asked]
        messages = shape(escape_handles(asked[0].question), list(map(placeholder, range(documents))))
        return self.chat.converse(messages, exchanges)

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
        starts = range(0, len(document), pic.segment_tokens)
        texts = (document[start : start + pic.segment_tokens] for start in starts)
        return [part for text in texts for part in cut(text, ratio, slots_per_chunk, foldable=pic.foldable)]


def _check_longest(texts: TokenTable, shortest: int) -> None:
    longest = int(np.diff(texts.ends).max(initial=0))
    if longest < shortest:
        raise ValueError(
            f"texts must hold a text of text_tokens[0]={shortest} tokens or more that is not held out, got {longest} "
            "tokens in the longest. Lower text_tokens or name another corpus."
        )


def _memory_places(segments: Sequence[Segment]) -> np.ndarray:
    return np.full(sum(len(segment.chunk) for segment in segments), MEMORY, dtype=np.int64)
