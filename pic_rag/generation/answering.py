"""Answers: prompts with handles in, answers out, whole or as a stream, whoever runs the model.

This file knows handles, checks, batches, streams and usage. It does not know how a model is run: that is the engine,
in process (`engine`) or in vLLM (`vllm/`).
"""

from __future__ import annotations

import asyncio
import collections.abc
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Protocol, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pic_rag.assembler import Assembled, Assembler, Prompt
from pic_rag.checks import check_whole
from pic_rag.config import GeneratorPositions
from pic_rag.generation.completion import Completion, FinishReason
from pic_rag.generation.sampling import Sampling
from pic_rag.memory import Memory
from pic_rag.models.backbone import same_model


@dataclass(frozen=True)
class Generation:
    """An answer and what it cost.

    Attributes:
        text: without the stop string or end token that ended it.
        token_ids: all tokens the generator wrote, the end token and those of a stop string included.
        prompt_tokens: rows the generator read, memory tokens included.
        completion_tokens: tokens it wrote.
        memory_tokens: rows it read that came from memories.
        finish_reason: "stop" for an end token or a stop string, "length" for `max_new_tokens`.
        cached_tokens: rows of the prompt that were not read again, because an earlier prompt began with the same
            memories. It depends on what ran before, so equality leaves it out.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    completion_tokens: int
    memory_tokens: int
    finish_reason: FinishReason
    cached_tokens: int = field(default=0, compare=False)


class Engine(Protocol):
    """What runs a model for a generator.

    Attributes:
        end_token_ids: tokens that end an answer.
        batch_size: prompts to decode together, where a call does not say.
        context_tokens: most tokens of prompt and answer together; None: as many as the model takes.
    """

    end_token_ids: frozenset[int]
    batch_size: int
    context_tokens: int | None

    def decode(self, prompts: Sequence[Assembled], completions: Sequence[Completion], sampling: Sampling, /) -> None:
        """Feed every completion its tokens until it is finished. Raises what the model raises.

        Args:
            prompts: all hold memories, or none of them does.
            completions: one for each.
            sampling: how tokens are chosen.
        """
        ...

    async def adecode(
        self, prompts: Sequence[Assembled], completions: Sequence[Completion], sampling: Sampling, /
    ) -> None:
        """`decode` for coroutines."""
        ...


class BaseGenerator:
    """What every generator does, whoever runs the model: handles, checks, batches, streams and usage.

    Args:
        model: the causal LM, for its settings and the width of its embeddings; only the engine computes with it.
        tokenizer: its tokenizer.
        model_id: `name@digest` of the model, its reader included; a memory must carry the same digest.
        engine: runs the model.
        generator_positions: where memory tokens sit, see `PicConfig`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        model_id: str,
        engine: Engine,
        generator_positions: GeneratorPositions = "contiguous",
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.model_id = model_id
        self._engine = engine
        self._assembler = Assembler(model, tokenizer, model_id=model_id, generator_positions=generator_positions)

    def check_reads(self, generator: str) -> None:
        """Refuse memories that are made for another generator: `compressor.generator.id` says which.

        Raises:
            ValueError: when the weights, the reader or the positions are others.
        """
        if not same_model(generator, self.model_id):
            raise ValueError(
                f"generator must be {generator!r}, which the compressor makes memories for, got {self.model_id!r}. "
                "Load it with Generator.from_checkpoint(compressor.checkpoint), or use a compressor trained for it."
            )

    @property
    def hidden(self) -> int:
        """Width of a memory that this generator reads."""
        return self._assembler.hidden

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and answer together: the model's, or the engine's if those are fewer."""
        config = self.model.config.get_text_config()
        of_model: int = getattr(config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        return min(of_model, self._engine.context_tokens or of_model)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        memories: Iterable[Memory] | Mapping[str, Memory] = (),
        *,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        batch_size: int | None = None,
    ) -> list[Generation]:
        """Answer one prompt or many, in order.

        Every prompt is checked before the first is answered. A prompt gets the answer it would get alone, up to the
        rounding of the model's dtype; in float32 greedy answers are the same tokens.

        Args:
            prompts: a text, a list of messages, or a list of such prompts.
            memories: the only memories that handles in these prompts may stand for.
            max_new_tokens: length at which an answer ends in any case.
            stop: strings that end an answer and are not part of it.
            temperature: 0 decodes greedily.
            top_p: probability mass that tokens are drawn from, when the temperature is above 0.
            seed: of the draws, which leave torch's global random numbers alone; each prompt is drawn as if alone.
            batch_size: prompts of this call decoded together; None leaves it to what runs the model (8 in process).

        Returns:
            One `Generation` for each prompt; none for an empty list.

        Raises:
            UnknownHandleError: when a handle stands for none of `memories`.
            ValueError: when a memory was made for another generator, a prompt is empty or does not fit
                `context_tokens`, or a setting is out of range.
        """
        batch_size = self._check_batch_size(batch_size)
        sampling = Sampling(max_new_tokens, stop, temperature, top_p, seed)
        known = by_handle(memories)
        assembled = [self._assemble(prompt, known, max_new_tokens) for prompt in _as_batch(prompts)]
        completions = [self._completion(sampling) for _ in assembled]
        for group in groups(assembled, batch_size):
            self._engine.decode([assembled[at] for at in group], [completions[at] for at in group], sampling)
        return [_generation(*pair) for pair in zip(assembled, completions, strict=True)]

    def stream(
        self,
        prompt: Prompt,
        memories: Iterable[Memory] | Mapping[str, Memory] = (),
        *,
        max_new_tokens: int = 128,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> collections.abc.Generator[str, None, Generation]:
        """Answer one prompt piece by piece: the pieces join to the text that `generate` gives.

        Checks are made at the call, decoding starts with the first piece asked for. A consumer that stops asking
        stops the model at its next token; an error of the model is raised in the consumer.

        Args:
            prompt: a text or a list of messages.
            memories: as for `generate`, like the settings.
            max_new_tokens: see `generate`.
            stop: see `generate`; no piece ever holds a part of a stop string.
            temperature: see `generate`.
            top_p: see `generate`.
            seed: see `generate`.

        Returns:
            An iterator of non-empty strings. Its return value (`generation = yield from stream`) is the `Generation`.

        Raises:
            UnknownHandleError: see `generate`.
            ValueError: see `generate`.
        """
        sampling = Sampling(max_new_tokens, stop, temperature, top_p, seed)
        return self._stream(self._assemble(prompt, by_handle(memories), max_new_tokens), sampling)

    async def agenerate(
        self,
        prompts: Prompt | Sequence[Prompt],
        memories: Iterable[Memory] | Mapping[str, Memory] = (),
        *,
        batch_size: int | None = None,
        **settings: Any,  # noqa: ANN401 - generate's settings
    ) -> list[Generation]:
        """`generate` for coroutines: the event loop goes on, and a cancelled call stops the model.

        Args:
            prompts: as for `generate`.
            memories: likewise.
            batch_size: likewise.
            **settings: `max_new_tokens`, `stop`, `temperature`, `top_p`, `seed`, likewise.

        Raises:
            UnknownHandleError: see `generate`.
            ValueError: see `generate`.
        """
        batch_size = self._check_batch_size(batch_size)
        sampling = Sampling(**settings)
        known = by_handle(memories)
        assembled = [self._assemble(prompt, known, sampling.max_new_tokens) for prompt in _as_batch(prompts)]
        completions = [self._completion(sampling) for _ in assembled]
        for group in groups(assembled, batch_size):
            await self._adecode([assembled[at] for at in group], [completions[at] for at in group], sampling)
        return [_generation(*pair) for pair in zip(assembled, completions, strict=True)]

    def astream(
        self,
        prompt: Prompt,
        memories: Iterable[Memory] | Mapping[str, Memory] = (),
        **settings: Any,  # noqa: ANN401 - generate's settings
    ) -> AsyncGenerator[str | Generation, None]:
        """`stream` for coroutines: the pieces, and after them the `Generation`.

        Args:
            prompt: as for `stream`.
            memories: likewise.
            **settings: `max_new_tokens`, `stop`, `temperature`, `top_p`, `seed`, likewise.

        Raises:
            UnknownHandleError: see `generate`.
            ValueError: see `generate`.
        """
        sampling = Sampling(**settings)
        return self._astream(self._assemble(prompt, by_handle(memories), sampling.max_new_tokens), sampling)

    def count_tokens(self, prompt: Prompt, memories: Iterable[Memory] | Mapping[str, Memory] = ()) -> int:
        """Rows that the generator reads for this prompt: a handle counts as its memory tokens."""
        return self._assembler.assemble(prompt, by_handle(memories)).prompt_tokens

    def _stream(self, assembled: Assembled, sampling: Sampling) -> collections.abc.Generator[str, None, Generation]:
        pieces: SimpleQueue[str | None] = SimpleQueue()  # unbounded: a slow consumer never holds the model
        completion = self._completion(sampling, on_text=pieces.put, on_end=lambda: pieces.put(None))
        worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pic-rag-stream")
        decoding = worker.submit(self._engine.decode, [assembled], [completion], sampling)
        decoding.add_done_callback(lambda _: pieces.put(None))
        worker.shutdown(wait=False)
        try:
            yield from iter(pieces.get, None)
            if completion.finish_reason is None:
                decoding.result()  # raises what the model raised
            return _generation(assembled, completion)
        finally:
            completion.abandoned = True

    async def _astream(self, assembled: Assembled, sampling: Sampling) -> AsyncGenerator[str | Generation, None]:
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        def pass_on(piece: str) -> None:
            try:
                loop.call_soon_threadsafe(pieces.put_nowait, piece)
            except RuntimeError:  # the loop was closed: nobody reads on, and others may share the batch
                completion.abandoned = True

        completion = self._completion(sampling, on_text=pass_on)
        decoding = asyncio.ensure_future(self._adecode([assembled], [completion], sampling))
        decoding.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            await decoding  # raises what the model raised
            yield _generation(assembled, completion)
        finally:
            completion.abandoned = True
            decoding.cancel()

    async def _adecode(
        self, prompts: Sequence[Assembled], completions: Sequence[Completion], sampling: Sampling
    ) -> None:
        try:
            await self._engine.adecode(prompts, completions, sampling)
        finally:
            for completion in completions:
                completion.abandoned = True  # of a cancelled call: a thread goes on to its next token

    def _check_batch_size(self, batch_size: int | None) -> int:
        if batch_size is None:
            return self._engine.batch_size
        return check_whole("batch_size", batch_size)

    def _assemble(self, prompt: Prompt, memories: Mapping[str, Memory], max_new_tokens: int) -> Assembled:
        assembled = self._assembler.assemble(prompt, memories)
        if assembled.prompt_tokens == 0:
            raise ValueError(f"prompt must hold at least one token, got {prompt!r}. Ask something.")
        positions = int(assembled.position_ids[-1]) + 1
        if positions + max_new_tokens > self.context_tokens:
            text_counts = positions > assembled.prompt_tokens  # as it does for spread memories
            raise ValueError(
                f"prompt tokens + max_new_tokens must be at most the generator's context of {self.context_tokens} "
                f"tokens, got {positions} + {max_new_tokens}. Shorten the prompt, lower max_new_tokens, or "
                f"{'retrieve less text' if text_counts else 'compress at a higher ratio'}."
            )
        return assembled

    def _completion(
        self,
        sampling: Sampling,
        on_text: Callable[[str], None] | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> Completion:
        return Completion(
            self.tokenizer,
            end_token_ids=self._engine.end_token_ids | _special_ids(self.tokenizer, sampling.stop),
            max_new_tokens=sampling.max_new_tokens,
            stop=sampling.stop,
            on_text=on_text,
            on_end=on_end,
        )


def by_handle(memories: Iterable[Memory] | Mapping[str, Memory]) -> Mapping[str, Memory]:
    """The memories by their handles."""
    if isinstance(memories, Memory):
        raise TypeError("memories must be a list of memories, got one. Pass [memory].")
    return memories if isinstance(memories, Mapping) else {memory.handle: memory for memory in memories}


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, from one prompt or many. Nothing at all is a batch of none, not a chat of none."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping):
        raise TypeError(f"prompts must be a text, a list of messages, or a list of those, got {prompts!r}. Pass [it].")
    one_chat = bool(prompts) and isinstance(prompts[0], Mapping)
    return cast("list[Prompt]", [prompts] if one_chat else list(prompts))


def groups(assembled: Sequence[Assembled], batch_size: int) -> Iterator[list[int]]:
    """Positions to decode together: those with memories apart, for the reader; like lengths together, for padding."""
    for with_memories in (False, True):
        kind = [at for at, prompt in enumerate(assembled) if (prompt.memory_tokens > 0) is with_memories]
        kind.sort(key=lambda at: assembled[at].prompt_tokens, reverse=True)
        yield from (kind[start : start + batch_size] for start in range(0, len(kind), batch_size))


def _special_ids(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> frozenset[int]:
    """Stop strings that are special tokens, which no text shows."""
    if not stop:
        return frozenset()
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(token_id for token_id, token in added if token.special and token.content in stop)


def _generation(assembled: Assembled, completion: Completion) -> Generation:
    return Generation(
        text=completion.text,
        token_ids=completion.token_ids,
        prompt_tokens=assembled.prompt_tokens,
        completion_tokens=len(completion.token_ids),
        memory_tokens=assembled.memory_tokens,
        finish_reason=completion.finish_reason or "length",
        cached_tokens=completion.cached_tokens,
    )
