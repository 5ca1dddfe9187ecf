"""Chats as the generator's template writes them: which tokens it reads, and which it has to say.

A document stands in them as a handle until it is replaced by its memory's places, or by its tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from jinja2 import TemplateError

from pic_rag.chunking import token_windows
from pic_rag.handles import escape_handles, handle_digits, placeholder, split_handles
from pic_rag.prompts import INSTRUCTION, Messages, PromptShape, filled_messages, rag_messages, repeat_messages

MEMORY = -1  # stands in a sequence where a memory token goes
Spans = list[tuple[str, bool]]  # text of a rendered chat, and whether the generator has to say it


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


def _system(question: str, passages: Sequence[str]) -> Messages:
    context = "\n\n".join(passages)
    system = f"You are an assistant for question-answering tasks. Use the context to answer.\n\n{context}"
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def _list_below(question: str, passages: Sequence[str]) -> Messages:
    context = "\n".join(f"- {passage}" for passage in passages)
    return [{"role": "user", "content": f"{question}\n\n{INSTRUCTION}\n\n{context}"}]


def _tool(question: str, passages: Sequence[str]) -> Messages:
    """An agent's: a call, which many templates do not show, and what the tool found."""
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": ""},
        {"role": "tool", "content": "\n\n".join(passages)},
    ]


_DOCUMENTS_FIRST = (
    "{context}\n\n{question}",
    "Context:\n{context}\n\nQuestion: {question}\nAnswer:",
    "Context information is below.\n---------------------\n{context}\n---------------------\n"
    "Given the context information and not prior knowledge, answer the query.\nQuery: {question}\nAnswer: ",
)
_QUESTION_FIRST = (
    "{question}\n\n{context}",
    "Question: {question}\n\nContext:\n{context}\n\nAnswer:",
    "You are an assistant for question-answering tasks. Use the following pieces of retrieved context to answer the "
    "question. If you don't know the answer, just say that you don't know. Use three sentences maximum and keep the "
    "answer concise.\nQuestion: {question} \nContext: {context} \nAnswer:",
    "Query: {question}\nSearch results:\n{context}\nAnswer the query from the search results.",
)

DOCUMENTS_FIRST: tuple[PromptShape, ...] = (
    rag_messages,
    _system,
    *(partial(filled_messages, template) for template in _DOCUMENTS_FIRST),
)
QUESTION_FIRST: tuple[PromptShape, ...] = (
    *(partial(filled_messages, template) for template in _QUESTION_FIRST),
    _list_below,
    _tool,
)
PROMPT_SHAPES = (*DOCUMENTS_FIRST, *QUESTION_FIRST)
"""Forms of the prompts that applications really send. Where the question comes first, memories have to be read with it
in mind: that is learned from such prompts only."""


def shape_weights(question_first: float) -> list[float]:
    """How often each of `PROMPT_SHAPES` is drawn; half of those that show the documents first are pic-rag's own.

    Args:
        question_first: share of the prompts that ask before they show the documents.
    """
    own, others = (1 - question_first) / 2, len(DOCUMENTS_FIRST) - 1
    return [own, *[own / others] * others, *[question_first / len(QUESTION_FIRST)] * len(QUESTION_FIRST)]


def _one_message(shape: PromptShape, question: str, passages: Sequence[str]) -> Messages:
    """A form of prompt for templates without a system role: that message's text comes in front of the user's."""
    return [{"role": "user", "content": "\n\n".join(message["content"] for message in shape(question, passages))}]


class Chat:
    """Writes prompts and conversations with a tokenizer's chat template.

    Args:
        tokenizer: any Hugging Face tokenizer.
        end_token_ids: tokens at which the generator stops; none given: the tokenizer's special tokens.
    """

    def __init__(self, tokenizer: Any, end_token_ids: Collection[int] = ()) -> None:  # noqa: ANN401 - see above
        self.tokenizer = tokenizer
        self.end_token_ids = end_token_ids or tokenizer.all_special_ids

    @cached_property
    def shapes(self) -> list[PromptShape]:
        """`PROMPT_SHAPES` as the template takes them.

        Raises:
            ValueError: when the template does not show a user's message.
        """
        return list(map(self._fitted, PROMPT_SHAPES))

    def converse(self, messages: Messages, exchanges: Sequence[tuple[str, str]]) -> Spans:
        """The rendered chat that begins with a prompt, of (question, answer) pairs: every answer is said to its end.

        It is over after the first answer that the template shows otherwise once there is a next question.
        """
        spans: Spans = []
        written = ""
        prompt = self._render(messages)
        for turn, (_, answer) in enumerate(exchanges, 1):
            following = exchanges[turn % len(exchanges)][0]  # after the last answer too: templates then end its turn
            messages = [
                *messages,
                {"role": "assistant", "content": answer},
                {"role": "user", "content": escape_handles(following)},
            ]
            longer = self._render(messages)
            said = self._said(prompt, answer, longer)
            spans += [(prompt.removeprefix(written), False), (said, True)]
            written = prompt + said
            if not longer.startswith(written):
                break
            prompt = longer
        return spans

    def repeat(self, shown: np.ndarray, text: np.ndarray) -> Dialogue:
        """A document is shown and has to be repeated, to the end of the turn."""
        pieces = self._tokenize(self._render(repeat_messages(placeholder(0))), [shown])
        return Dialogue.join([*pieces, (text, True), (self._ids(self._turn_end), True)])

    def dialogue(self, spans: Spans, documents: Sequence[np.ndarray]) -> Dialogue:
        """The tokens of a rendered chat, each handle replaced by what stands for its document."""
        pieces: list[tuple[np.ndarray, bool]] = []
        for text, is_target in spans:
            pieces += [(self._ids(text), True)] if is_target else self._tokenize(text, documents)
        return Dialogue.join(pieces)

    def document_ids(self, text: str) -> np.ndarray:
        """`(tokens,)` ids of a document."""
        return np.concatenate([np.empty(0, dtype=np.int64), *token_windows(text, self.tokenizer)])

    def _fitted(self, shape: PromptShape) -> PromptShape:
        """A form of prompt as the chat template takes it, further turns too: in one message where it refuses a role."""
        for form in (shape, partial(_one_message, shape)):
            with suppress(TemplateError):
                messages = form("?", [placeholder(0)])
                self._render([*messages, {"role": "assistant", "content": "!"}, {"role": "user", "content": "?"}])
                if self._render(messages).count(placeholder(0)) == 1:
                    return form
        raise ValueError(
            "The chat template of base_model must show a user's message once and as it is, got one that does not. "
            "Name an instruction-tuned model, or correct tokenizer.chat_template."
        )

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
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": placeholder(0)}]
        tail = str(self.tokenizer.apply_chat_template(messages, tokenize=False)).partition(placeholder(0))[2]
        tokens = filter(None, map(self.tokenizer.decode, self.end_token_ids))
        ends = [tail.index(token) + len(token) for token in tokens if token in tail]
        return tail[: min(ends)] if ends else str(self.tokenizer.eos_token)

    def _tokenize(self, text: str, documents: Sequence[np.ndarray]) -> list[tuple[np.ndarray, bool]]:
        """Token ids of a prompt, piece by piece, each handle replaced by what stands for its document."""
        return [
            (documents[int(handle_digits(piece), 16)] if is_handle else self._ids(piece), False)
            for is_handle, piece in split_handles(text)
            if piece
        ]

    def _render(self, messages: Messages) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _ids(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
