"""The engine: rows go through a transformers model, tokens come out into completions.

The only room that calls `model.generate`. Calls of many threads take turns, or share a batch, and memories
that were read before are not read again. It does not know handles, chat templates or stop strings.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import cross_entropy, pad
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from pic_rag.assembler import Assembled
from pic_rag.checks import check_whole
from pic_rag.generation.completion import Completion
from pic_rag.generation.prefix import (
    PREFIX_CACHE_BYTES,
    Block,
    Layers,
    Prefix,
    PrefixCache,
    cut,
    join,
    shared_blocks,
    spares_rows,
    supports_reuse,
)
from pic_rag.generation.reader import Reader
from pic_rag.generation.sampling import Sampling
from pic_rag.generation.threads import WaitingThreads
from pic_rag.generation.turns import Turns
from pic_rag.models.backbone import end_token_ids

BATCH_PROMPTS = 8
"""Prompts that are decoded together by default."""

_locks: WeakKeyDictionary[PreTrainedModel, threading.Lock] = WeakKeyDictionary()
"""One a model: a reader changes its weights while it is on, also below other engines of the same model."""
_making_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class _Request:
    """One call of `decode`: prompts that all hold memories, or none of them."""

    prompts: Sequence[Assembled]
    completions: Sequence[Completion]
    sampling: Sampling

    @property
    def started(self) -> bool:
        return any(completion.token_ids for completion in self.completions)

    @property
    def finished(self) -> bool:
        return all(completion.finished for completion in self.completions)

    @property
    def reading(self) -> bool:
        return self.prompts[0].memory_tokens > 0


class InProcessEngine:
    """Runs one model for many threads, one batch at a time.

    Args:
        model: a transformers causal LM.
        tokenizer: its tokenizer.
        reader: a LoRA on `model` that is on while a batch holds memories.
        batch_size: most prompts to decode together.
        merge_calls: whether calls that wait at the same time share a batch.
        prefix_cache_bytes: keys and values to keep of memories that were read; 0 keeps none.

    Raises:
        ValueError: when a number is out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        reader: Reader | None = None,
        batch_size: int = BATCH_PROMPTS,
        merge_calls: bool = False,
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
    ) -> None:
        check_whole("batch_size", batch_size)
        if prefix_cache_bytes < 0:
            raise ValueError(f"prefix_cache_bytes must be at least 0, got {prefix_cache_bytes}. Use 0 to keep none.")
        self.model = model
        self.batch_size = batch_size
        self.context_tokens: int | None = None
        self.merge_calls = merge_calls
        self.end_token_ids = end_token_ids(model, tokenizer)
        self._reader = reader
        head = model.get_output_embeddings()
        if head is not None and _compact not in head._forward_pre_hooks.values():
            head.register_forward_pre_hook(_compact)
        self._prefixes = PrefixCache(prefix_cache_bytes) if prefix_cache_bytes and supports_reuse(model) else None
        with _making_lock:
            self._lock = _locks.setdefault(model, threading.Lock())
        self._turns = Turns(self._run, self._joins)
        self._threads = WaitingThreads()
        # Any id of the model's will do: padding is masked, and what follows an end token is not read.
        padding = tokenizer.pad_token_id
        known = padding is not None and padding < len(cast("torch.Tensor", model.get_input_embeddings().weight))
        self._pad_token_id = padding if known else min(self.end_token_ids, default=0)

    def decode(self, prompts: Sequence[Assembled], completions: Sequence[Completion], sampling: Sampling, /) -> None:
        """Run the model until every completion is finished, together with alike calls that wait, with `merge_calls`.

        Args:
            prompts: all hold memories, or none of them does.
            completions: one for each. When an error or an interrupt ends the call they are abandoned.
            sampling: how tokens are chosen.
        """
        try:
            self._turns.take(_Request(prompts, completions, sampling))
        except BaseException:
            for completion in completions:
                completion.abandoned = True
            raise

    async def adecode(
        self, prompts: Sequence[Assembled], completions: Sequence[Completion], sampling: Sampling, /
    ) -> None:
        """`decode` for coroutines, in a thread, which a cancelled call gives back at once or at its next token."""
        try:
            await self._threads.run(self.decode, prompts, completions, sampling)
        except asyncio.CancelledError:
            for completion in completions:
                completion.abandoned = True
            self._turns.wake()
            raise

    @torch.no_grad()
    def score(self, batch: Sequence[Assembled], targets: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """`(target_tokens,)` float32 log-probabilities of each target's tokens after its prompt, on the CPU.

        Args:
            batch: prompts that all hold memories, or none of them does.
            targets: `(target_tokens,)` int64, one for each, of one token or more.
        """
        whole = [
            replace(prompt, token_ids=torch.cat([prompt.token_ids, ids]))
            for prompt, ids in zip(batch, targets, strict=True)
        ]
        reading = batch[0].memory_tokens > 0
        with self._exclusive(reading):
            inputs = self._pad_embeddings(whole, [0] * len(whole)) if reading else self._pad_ids(whole)
            if not reading:  # `generate` sees to it by itself
                inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
            last = max(map(len, targets)) + 1  # the row before a target's first token says what that token is
            logits = self.model(**inputs, logits_to_keep=last, use_cache=False).logits
        return [_log_probs(row[-len(ids) - 1 : -1], ids) for row, ids in zip(logits, targets, strict=True)]

    @torch.no_grad()
    def _run(self, requests: Sequence[_Request]) -> None:
        """Decode requests that go together, as one batch."""
        prompts = [prompt for request in requests for prompt in request.prompts]
        completions = [completion for request in requests for completion in request.completions]
        reading, sampling = requests[0].reading, requests[0].sampling
        with (
            self._exclusive(reading),
            self._read(prompts, completions) if reading else nullcontext(self._pad_ids(prompts)) as inputs,
        ):
            self.model.generate(  # type: ignore[operator]
                **inputs,
                generation_config=self._generation_config(sampling),
                logits_processor=sampling.processors(len(prompts), self.model.device),
                stopping_criteria=StoppingCriteriaList([_Feed(completions, self._turns.wake)]),
            )

    @contextmanager
    def _exclusive(self, reading: bool) -> Iterator[None]:
        """The model for one thread, its reader on for prompts with memories."""
        with self._lock, self._reader.switched(on=reading) if self._reader else nullcontext():
            yield

    @contextmanager
    def _read(self, prompts: Sequence[Assembled], completions: Sequence[Completion]) -> Iterator[dict[str, Any]]:
        """Inputs for prompts with memories, less what was read before; afterwards what was read is kept."""
        if self._prefixes is None:
            yield self._pad_embeddings(prompts, [0] * len(prompts))
            return
        prefixes = self._read_blocks(prompts, completions, [self._prefixes.find(prompt) for prompt in prompts])
        past = join(prefixes, self.model)
        inputs = self._pad_embeddings(prompts, [prefix.cached_tokens for prefix in prefixes])
        yield {**inputs, "past_key_values": past}
        self._prefixes.keep(prefixes, past)

    def _read_blocks(
        self, prompts: Sequence[Assembled], completions: Sequence[Completion], found: Sequence[Prefix]
    ) -> list[Prefix]:
        """Read by themselves, one by one, a single prompt's blocks, and those that several prompts of a batch share."""
        ahead = shared_blocks(found)
        if not spares_rows(found, ahead):
            return [prefix.without_kept() for prefix in found]
        read: dict[bytes, Layers] = {}
        prefixes = []
        for prompt, completion, prefix in zip(prompts, completions, found, strict=True):
            completion.cached_tokens = prefix.cached_tokens
            while (block := prefix.next_block) and block.name in ahead:
                if block.name in read:
                    completion.cached_tokens += block.end - block.start
                else:
                    read[block.name] = self._read_block(prompt, prefix, block)
                prefix = prefix.with_next(read[block.name])
            prefixes.append(prefix)
        return prefixes

    def _read_block(self, prompt: Assembled, prefix: Prefix, block: Block) -> Layers:
        """Keys and values of a block, just as if those before it were kept."""
        past = join([prefix], self.model)
        rows = slice(block.start, block.end)
        self.model.get_decoder()(
            inputs_embeds=prompt.embeddings[None, rows],
            position_ids=prompt.position_ids[None, rows].to(self.model.device),
            past_key_values=past,
            use_cache=True,
        )
        return cut(past, 0, block.start, block.end)

    def _pad_ids(self, prompts: Sequence[Assembled]) -> dict[str, torch.Tensor]:
        """`(prompts, rows)` token ids and mask: the way in that the model knows best, for prompts of text alone."""
        ids = pad_sequence([prompt.token_ids for prompt in prompts], True, self._pad_token_id, "left")
        ones = [torch.ones_like(prompt.token_ids) for prompt in prompts]
        mask = pad_sequence(ones, True, padding_side="left")
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    def _pad_embeddings(self, prompts: Sequence[Assembled], cached: Sequence[int]) -> dict[str, torch.Tensor]:
        """`(prompts, rows, hidden)` embeddings and `(prompts, rows)` positions and mask.

        The cached rows of all prompts come first, padded on the left, then the rows to read, padded on the left. What
        embeddings say at cached rows does not matter: `model.generate` wants them and cuts them off.
        """
        read = [prompt.embeddings[rows:] for prompt, rows in zip(prompts, cached, strict=True)]
        embeddings = pad(pad_sequence(read, True, padding_side="left"), (0, 0, max(cached), 0))
        counted = [prompt.position_ids + 1 for prompt in prompts]  # 0 is padding
        parts = [
            [own[:rows] for own, rows in zip(counted, cached, strict=True)],
            [own[rows:] for own, rows in zip(counted, cached, strict=True)],
        ]
        places = torch.cat([pad_sequence(part, True, padding_side="left") for part in parts], dim=1)
        places = places.to(self.model.device)
        positions = (places - 1).clamp_min(0)
        return {"inputs_embeds": embeddings, "attention_mask": places.sign(), "position_ids": positions}

    def _generation_config(self, sampling: Sampling) -> GenerationConfig:
        """One beam, the highest score; what is not said here (a repetition penalty, say) stays as the model has it."""
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            use_cache=True,
            return_dict_in_generate=False,
            eos_token_id=sorted(self.end_token_ids) or None,
            pad_token_id=self._pad_token_id,
        )

    def _joins(self, request: _Request, group: Sequence[_Request]) -> bool:
        """Whether a request may be decoded with others: same kind and settings, room in the batch, alike in length.

        The longest prompt with its answer is at most twice the shortest: less than half of a batch is padding.
        """
        if not self.merge_calls:
            return False
        tokens = [
            prompt.prompt_tokens + request.sampling.max_new_tokens
            for together in (*group, request)
            for prompt in together.prompts
        ]
        return (
            (request.reading, request.sampling) == (group[0].reading, group[0].sampling)
            and len(tokens) <= self.batch_size
            and max(tokens) <= 2 * min(tokens)
        )


class _Feed(StoppingCriteria):
    """Hands each new token to its completion, and stops a row when its completion is finished.

    Args:
        completions: one a row.
        on_end: called when one of them is finished.
    """

    def __init__(self, completions: Sequence[Completion], on_end: Callable[[], None]) -> None:
        self._completions = completions
        self._on_end = on_end

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:  # noqa: ANN401 - transformers' signature
        """`(prompts, tokens)` ids so far in, `(prompts,)` whether each row is finished out."""
        for completion, token_id in zip(self._completions, input_ids[:, -1].tolist(), strict=True):
            if not completion.finished:
                completion.push(token_id)
                if completion.finished:
                    self._on_end()
        finished = [completion.finished for completion in self._completions]
        return torch.tensor(finished, device=input_ids.device)  # type: ignore[return-value]


def _compact(head: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Before the output head: the last rows of a batch as a tensor of their own.

    Of a slice that strides over the rows before, torch makes a batched product, and copies the head's weights, the
    largest of a small model, once a prompt.
    """
    hidden, *others = arguments
    return (hidden.clone(memory_format=torch.contiguous_format), *others)


def _log_probs(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """`(tokens,)` of `(tokens, vocabulary)`, on the CPU; one prompt at a time, for float32 logits are large."""
    return -cross_entropy(logits.float(), token_ids.to(logits.device), reduction="none").cpu()
