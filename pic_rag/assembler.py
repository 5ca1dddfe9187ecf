"""Handles in a prompt become rows: text pieces as token embeddings, memories spliced in between.

This room knows the generator's tokenizer, chat template and input embeddings. It does not know how a memory is made,
where it is stored or how an answer is decoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from jinja2 import TemplateError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pic_rag.checks import check_unicode
from pic_rag.chunking import strides
from pic_rag.config import GeneratorPositions
from pic_rag.handles import UnknownHandleError, escape_handles, find_handles, replace_handles, split_handles
from pic_rag.memory import Memory
from pic_rag.models.backbone import same_model
from pic_rag.prompts import map_texts

Prompt = str | Sequence[Mapping[str, Any]]
"""Text, or chat messages: a role and a content that is a string or a list of `{"type": "text", "text": ...}` parts."""

MEMORY_ROW = -1
"""Stands in `Assembled.token_ids` where a memory token sits."""


@dataclass(frozen=True, eq=False)
class Assembled:
    """A prompt as the generator sees it.

    Attributes:
        token_ids: `(rows,)` int64, `MEMORY_ROW` where a memory token sits.
        memories: the memories in reading order; one that is named twice is read twice.
        token_embeddings: the generator's input embeddings, scaled as that model scales them.
        text: the same as one string, a handle where a memory sits; special tokens are written out.
        generator_positions: where memory tokens sit, see `PicConfig`.
    """

    token_ids: torch.Tensor
    memories: tuple[Memory, ...]
    token_embeddings: nn.Module
    text: str
    generator_positions: GeneratorPositions = "contiguous"

    @property
    def prompt_tokens(self) -> int:
        """Rows that the generator reads, memory tokens included."""
        return len(self.token_ids)

    @property
    def memory_tokens(self) -> int:
        """Rows that come from memories."""
        return sum(memory.memory_tokens for memory in self.memories)

    @property
    def position_ids(self) -> torch.Tensor:
        """`(rows,)` int64: the last token of a spread memory sits where the last token of its text would."""
        steps = torch.ones_like(self.token_ids)
        if self.memories and self.generator_positions == "spread":
            read = [strides(memory.memory_tokens, memory.text_tokens, memory.ratio) for memory in self.memories]
            steps[self.token_ids == MEMORY_ROW] = torch.from_numpy(np.concatenate(read))
        return steps.cumsum(0) - 1

    @property
    def embeddings(self) -> torch.Tensor:
        """`(rows, hidden)` in the generator's dtype, on its device.

        Built at every access and kept nowhere: a long list of assembled prompts holds no device memory.
        """
        weight = next(self.token_embeddings.parameters())
        token_ids = self.token_ids.to(weight.device)
        rows = self.token_embeddings(token_ids.clamp_min(0))
        if self.memories:
            spliced = [memory.embeddings.to(rows.device, rows.dtype) for memory in self.memories]
            rows[token_ids == MEMORY_ROW] = torch.cat(spliced)
        return rows


class Assembler:
    """Turns prompts with handles into rows for one generator.

    Args:
        model: the generator.
        tokenizer: its tokenizer, with its chat template when messages are to be read.
        model_id: `name@digest` of the generator; a memory must carry the same digest.
        generator_positions: where memory tokens sit, see `PicConfig`.

    Raises:
        ValueError: when `generator_positions` is neither "contiguous" nor "spread".
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        model_id: str,
        generator_positions: GeneratorPositions = "contiguous",
    ) -> None:
        if generator_positions not in get_args(GeneratorPositions):
            known = " or ".join(get_args(GeneratorPositions))
            raise ValueError(
                f"generator_positions must be {known}, got {generator_positions!r}. Take the compressor's own."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.model_id = model_id
        self.generator_positions = generator_positions
        self._opening, self._closing = _special_tokens(tokenizer)

    @property
    def hidden(self) -> int:
        """Width of the generator's input embeddings."""
        return next(self.model.get_input_embeddings().parameters()).shape[1]

    def render(self, prompt: Prompt) -> str:
        """The prompt as one string: text as it is, messages through the model's own chat template.

        Raises:
            ValueError: when there is no chat template, or it refuses the messages, or drops one that holds a handle.
        """
        if isinstance(prompt, str):
            return prompt
        messages = [_flatten(message) for message in prompt]
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"prompt must be text for a generator without a chat template, got {len(messages)} messages for "
                f"{self.model_id!r}. Pass a string, or set tokenizer.chat_template."
            )
        return self._apply_chat_template(messages)

    def assemble(self, prompt: Prompt, memories: Mapping[str, Memory]) -> Assembled:
        """Lay a prompt out as rows.

        Text is tokenised as `tokenizer(prompt)` does it, special tokens included; a rendered chat template
        already holds its own and gets no second ones.

        Args:
            prompt: text or messages, with handles anywhere in them.
            memories: the only memories that a handle may stand for, by handle.

        Raises:
            UnknownHandleError: when a handle is not in `memories`.
            ValueError: when a memory was made for another generator, or is not finite, or the text is not Unicode.
        """
        text = self.render(prompt)
        check_unicode("prompt", text)
        pieces = split_handles(text)
        read = [self._resolve(piece, memories) for is_handle, piece in pieces if is_handle]
        self._check_finite(read)
        upcoming = iter(read)
        token_ids = [
            token_id
            for is_handle, piece in pieces
            for token_id in ([MEMORY_ROW] * next(upcoming).memory_tokens if is_handle else self._tokenize(piece))
        ]
        if isinstance(prompt, str):
            token_ids = [*self._opening, *token_ids, *self._closing]
            text = f"{self.tokenizer.decode(self._opening)}{text}{self.tokenizer.decode(self._closing)}"
        rows = torch.tensor(token_ids, dtype=torch.long)
        return Assembled(rows, tuple(read), self.model.get_input_embeddings(), text, self.generator_positions)

    def _tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _apply_chat_template(self, messages: list[dict[str, Any]]) -> str:
        try:
            text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"messages must suit the chat template of {self.model_id!r}, got the roles {roles or 'of no message'}: "
                f"{error}. Send roles that this model knows, for example retrieved text in a user message."
            ) from error
        seen = set(find_handles(text))
        for message in messages:
            if not seen.issuperset(find_handles(message["content"])):
                raise ValueError(
                    f"messages with handles must have a role that the chat template of {self.model_id!r} renders, got "
                    f"{message['role']!r}, which it drops. Put the handles in a user message."
                )
        return text

    def _resolve(self, handle: str, memories: Mapping[str, Memory]) -> Memory:
        if handle not in memories:
            raise UnknownHandleError(handle, len(memories))
        memory = memories[handle]
        if not same_model(memory.generator, self.model_id) or memory.hidden != self.hidden:
            raise ValueError(
                f"{_whose(memory)} was made for {memory.generator!r} (hidden {memory.hidden}) but the generator is "
                f"{self.model_id!r} (hidden {self.hidden}). "
                "Compress again with a compressor trained for this generator."
            )
        return memory

    def _check_finite(self, memories: Sequence[Memory]) -> None:
        dtype = self.model.dtype
        if not memories or torch.cat([memory.embeddings.to(dtype) for memory in memories]).isfinite().all():
            return
        wrong = next(memory for memory in memories if not memory.embeddings.to(dtype).isfinite().all())
        raise ValueError(
            f"{_whose(wrong)} must be finite in {dtype}, got NaN or infinity behind {wrong.handle}. Compress it again."
        )


def restore(prompt: Prompt, texts: Mapping[str, str]) -> Prompt:
    """Put the source texts back in place of their handles, in every role: the prompt for an LLM that reads no memories.

    A source text's own handle syntax comes back escaped, so that it can never be resolved.

    Args:
        prompt: text or messages.
        texts: source texts by handle.

    Raises:
        UnknownHandleError: when a handle is not in `texts`.
    """

    def put_back(text: str) -> str:
        used = {handle: escape_handles(texts[handle]) for handle in find_handles(text) if handle in texts}
        return replace_handles(text, used)

    if isinstance(prompt, str):
        return put_back(prompt)
    return [
        {**message, "content": map_texts(message["content"], put_back)} if "content" in message else dict(message)
        for message in prompt
    ]


def _whose(memory: Memory) -> str:
    return f"Memory of {memory.source!r}" if memory.source else "Memory"


def _flatten(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its content as one string, which is what every chat template can render."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"messages must be mappings with a role and a content, got {message!r}. Add the role.")
    content = message.get("content")
    if not isinstance(content, (str, list, tuple)) and content is not None:
        raise ValueError(f"content must be text or a list of parts, got {content!r}. Put a single part into a list.")
    parts = [content] if isinstance(content, str) else content or []  # no content: an assistant's bare tool call
    return {**message, "content": "\n".join(_part_text(part) for part in parts)}  # a newline, as vLLM joins parts


def _part_text(part: str | Mapping[str, Any]) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ValueError(f"content parts must be text or mappings, got {part!r}. Remove that part.")
    if part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"content parts must be text, got a part of type {part.get('type')!r}. Remove that part.")
    return part["text"]


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What `tokenizer(text)` puts before and after the tokens of any text, read off a one-letter text."""
    probe = tokenizer("a", return_special_tokens_mask=True)
    first = probe.special_tokens_mask.index(0)
    last = len(probe.input_ids) - probe.special_tokens_mask[::-1].index(0)
    return probe.input_ids[:first], probe.input_ids[last:]
