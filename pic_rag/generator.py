"""The generator: prompts with handles in, answers out, whole or as a stream.

This room knows handles, checks, batches, streams and usage. It does not know how a model is run: that is the engine,
and another engine with the same `decode` would serve the same `generate` and `stream`.
"""

from __future__ import annotations

import asyncio
import collections.abc
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pic_rag.assembler import Assembled, Assembler, Prompt
from pic_rag.backbone import Backbone, load_backbone, model_id, reader_id
from pic_rag.completion import Completion, FinishReason
from pic_rag.engine import BATCH_PROMPTS, Engine
from pic_rag.memory import Memory
from pic_rag.prefix import PREFIX_CACHE_BYTES
from pic_rag.reader import Reader
from pic_rag.sampling import Sampling

if TYPE_CHECKING:
    from pic_rag.checkpoint import Checkpoint


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


class Decoder(Protocol):
    """What runs a model for a generator: in process (`pic_rag.engine`) or elsewhere (`pic_rag.vllm`)."""

    end_token_ids: frozenset[int]
    batch_size: int

    def decode(self, prompts: Sequence[Assembled], completions: Sequence[Completion], sampling: Sampling, /) -> None:
        """Feed every completion its tokens until it is finished. Raises what the model raises.

        Args:
            prompts: all hold memories, or none of them does.
            completions: one for each.
            sampling: how tokens are chosen.
        """
        ...


class BaseGenerator:
    """What every generator does, whoever runs the model: handles, checks, batches, streams and usage.

    Args:
        model: the causal LM, for its settings and the width of its embeddings; only the engine computes with it.
        tokenizer: its tokenizer.
        model_id: `name@digest` of the model, its reader included; a memory must carry the same one.
        engine: runs the model.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, model_id: str, engine: Decoder
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.model_id = model_id
        self._engine = engine
        self._assembler = Assembler(model, tokenizer, model_id=model_id)

    @property
    def hidden(self) -> int:
        """Width of a memory that this generator reads."""
        return self._assembler.hidden

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and answer together."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or self.tokenizer.model_max_length

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
        batch_size = self._engine.batch_size if batch_size is None else batch_size
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}. Use 1 to decode one prompt at a time.")
        sampling = Sampling(max_new_tokens, stop, temperature, top_p, seed)
        known = _by_handle(memories)
        assembled = [self._assemble(prompt, known, max_new_tokens) for prompt in _as_batch(prompts)]
        completions = [self._completion(sampling) for _ in assembled]
        for group in _groups(assembled, batch_size):
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
        return self._stream(self._assemble(prompt, _by_handle(memories), max_new_tokens), sampling)

    async def agenerate(
        self,
        prompts: Prompt | Sequence[Prompt],
        memories: Iterable[Memory] | Mapping[str, Memory] = (),
        **settings: Any,  # noqa: ANN401 - generate's settings
    ) -> list[Generation]:
        """`generate` for coroutines: the event loop goes on, and a cancelled call stops the model.

        Args:
            prompts: as for `generate`.
            memories: likewise.
            **settings: `max_new_tokens`, `stop`, `temperature`, `top_p`, `seed`, likewise.

        Raises:
            UnknownHandleError: see `generate`.
            ValueError: see `generate`.
        """
        sampling = Sampling(**settings)
        known = _by_handle(memories)
        assembled = [self._assemble(prompt, known, sampling.max_new_tokens) for prompt in _as_batch(prompts)]
        completions = [self._completion(sampling) for _ in assembled]
        for group in _groups(assembled, self._engine.batch_size):
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
        return self._astream(self._assemble(prompt, _by_handle(memories), sampling.max_new_tokens), sampling)

    def count_tokens(self, prompt: Prompt, memories: Iterable[Memory] | Mapping[str, Memory] = ()) -> int:
        """Rows that the generator reads for this prompt: a handle counts as its memory tokens."""
        return self._assembler.assemble(prompt, _by_handle(memories)).prompt_tokens

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
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

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
            await asyncio.to_thread(self._engine.decode, prompts, completions, sampling)
        finally:
            for completion in completions:
                completion.abandoned = True  # of a cancelled call: the thread goes on to its next token

    def _assemble(self, prompt: Prompt, memories: Mapping[str, Memory], max_new_tokens: int) -> Assembled:
        assembled = self._assembler.assemble(prompt, memories)
        if assembled.prompt_tokens == 0:
            raise ValueError(f"prompt must hold at least one token, got {prompt!r}. Ask something.")
        if assembled.prompt_tokens + max_new_tokens > self.context_tokens:
            raise ValueError(
                f"prompt tokens + max_new_tokens must be at most the generator's context of {self.context_tokens} "
                f"tokens, got {assembled.prompt_tokens} + {max_new_tokens}. Shorten the prompt, lower max_new_tokens, "
                "or compress at a higher ratio."
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
            end_token_ids=self._engine.end_token_ids,
            max_new_tokens=sampling.max_new_tokens,
            stop=sampling.stop,
            on_text=on_text,
            on_end=on_end,
        )


class Generator(BaseGenerator):
    """A causal LM that reads memories in place of text. Safe to share between threads.

    Its own weights never change; an optional reader is on only while a prompt holds memories. Calls that wait while
    another is decoded are decoded together when their settings are the same.

    Args:
        model: a transformers causal LM. A reader is added to it in place, and is off unless a prompt holds memories.
        tokenizer: its tokenizer.
        name: what the model is known by; `model_id` is this name and a digest of the weights, the reader's included.
        reader: folder of a LoRA adapter saved by peft's `save_pretrained`.
        batch_size: most prompts decoded together, whichever calls they come from.
        prefix_cache_bytes: keys and values to keep, on the model's device, so that a prompt that begins with the same
            memories as an earlier one is read from its first new row; 0 keeps none. A model with sliding windows or
            recurrent states keeps none either.

    Raises:
        ValueError: when `reader` is not such a folder or does not fit the model, or a number is out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        reader: str | Path | None = None,
        batch_size: int = BATCH_PROMPTS,
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
    ) -> None:
        plain = model_id(model, name)  # before the reader adds parameters of its own
        self._engine: Engine = Engine(
            model,
            tokenizer,
            reader=None if reader is None else Reader(model, reader),
            batch_size=batch_size,
            prefix_cache_bytes=prefix_cache_bytes,
        )
        whole = plain if reader is None else reader_id(plain, Path(reader))
        super().__init__(model, tokenizer, model_id=whole, engine=self._engine)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path | None = None,
        *,
        reader: str | Path | None = None,
        batch_size: int = BATCH_PROMPTS,
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
    ) -> Generator:
        """Load a generator.

        Args:
            name_or_path: a folder, a hub id, or None for the embedded default.
            reader: folder of a LoRA adapter that is on while memories are in the prompt.
            batch_size: most prompts decoded together, as for the class.
            prefix_cache_bytes: keys and values of memories to keep, as for the class.
            device: as torch names it; None picks the best there is.
            dtype: such as "bfloat16"; None picks what the device is fast at.
            attn_implementation: "sdpa", "eager" or "flex_attention"; None leaves it to transformers.
        """
        backbone = load_backbone(name_or_path, device=device, dtype=dtype, attn_implementation=attn_implementation)
        return cls(
            backbone.model,
            backbone.tokenizer,
            name=backbone.name,
            reader=reader,
            batch_size=batch_size,
            prefix_cache_bytes=prefix_cache_bytes,
        )

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        name_or_path: str | Path | None = None,
        *,
        batch_size: int = BATCH_PROMPTS,
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
        **loading: Any,  # noqa: ANN401 - from_pretrained's arguments
    ) -> Generator:
        """Load the generator that reads a compressor's memories, with its reader.

        Args:
            checkpoint: `compressor.checkpoint`, or `Checkpoint.load(name)`.
            name_or_path: where the generator is, when it is not where the checkpoint says; equal weights go by the
                name that the checkpoint knows.
            batch_size: most prompts decoded together, as for the class.
            prefix_cache_bytes: keys and values of memories to keep, as for the class.
            **loading: `device`, `dtype`, `attn_implementation`, as for `from_pretrained`.

        Raises:
            ValueError: when the model found there is another than the memories are made for.
        """
        backbone = load_generator(checkpoint, name_or_path, **loading)
        return cls(
            backbone.model,
            backbone.tokenizer,
            name=checkpoint.generator.id.rpartition("@")[0],
            reader=checkpoint.reader,
            batch_size=batch_size,
            prefix_cache_bytes=prefix_cache_bytes,
        )

    def score(
        self,
        prompts: Sequence[Prompt],
        targets: Sequence[torch.Tensor],
        memories: Iterable[Memory] | Mapping[str, Memory] = (),
        *,
        batch_size: int = 8,
    ) -> list[torch.Tensor]:
        """How likely given answers are, token by token: one forward a batch, nothing is generated.

        Args:
            prompts: as for `generate`.
            targets: `(target_tokens,)` int64 token ids of an answer to each prompt, one token or more.
            memories: as for `generate`.
            batch_size: prompts scored together.

        Returns:
            `(target_tokens,)` float32 log-probabilities for each prompt, on the CPU: of every token given the prompt
            and the answer's tokens before it.

        Raises:
            UnknownHandleError: see `generate`.
            ValueError: see `generate`; the target counts as `max_new_tokens`.
        """
        known = _by_handle(memories)
        assembled = [self._assemble(prompt, known, len(ids)) for prompt, ids in zip(prompts, targets, strict=True)]
        scores: list[torch.Tensor] = [torch.empty(0)] * len(assembled)
        for group in _groups(assembled, batch_size):
            scored = self._engine.score([assembled[at] for at in group], [targets[at] for at in group])
            for at, log_probs in zip(group, scored, strict=True):
                scores[at] = log_probs
        return scores


def load_generator(
    checkpoint: Checkpoint,
    name_or_path: str | Path | None = None,
    **loading: Any,  # noqa: ANN401 - load_backbone's arguments
) -> Backbone:
    """Load the model that reads a compressor's memories, without its reader.

    Args:
        checkpoint: of the compressor.
        name_or_path: where the model is, when it is not where the checkpoint says.
        **loading: as for `load_backbone`.

    Raises:
        ValueError: when the model found there is another than the memories are made for.
    """
    backbone = load_backbone(name_or_path or checkpoint.generator.name, **loading)
    digest = checkpoint.generator.id.rpartition("@")[2].partition("+")[0]
    if backbone.ref.id.rpartition("@")[2] != digest:
        raise ValueError(
            f"generator must be {checkpoint.generator.id!r}, which the compressor makes memories for, got "
            f"{backbone.ref.id!r}. Name the folder or hub id where the right model is."
        )
    return backbone


def _by_handle(memories: Iterable[Memory] | Mapping[str, Memory]) -> Mapping[str, Memory]:
    return memories if isinstance(memories, Mapping) else {memory.handle: memory for memory in memories}


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, from one prompt or many. Nothing at all is a batch of none, not a chat of none."""
    if isinstance(prompts, str):
        return [prompts]
    one_chat = bool(prompts) and isinstance(prompts[0], Mapping)
    return cast("list[Prompt]", [prompts] if one_chat else list(prompts))


def _groups(assembled: Sequence[Assembled], batch_size: int) -> Iterator[list[int]]:
    """Positions to decode together: those with memories apart, for the reader; like lengths together, for padding."""
    for with_memories in (False, True):
        kind = [at for at, prompt in enumerate(assembled) if (prompt.memory_tokens > 0) is with_memories]
        kind.sort(key=lambda at: assembled[at].prompt_tokens, reverse=True)
        yield from (kind[start : start + batch_size] for start in range(0, len(kind), batch_size))


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
