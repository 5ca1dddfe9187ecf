"""The engine: rows go through a transformers model, tokens come out into completions.

The only room that calls `model.generate`, and the place for whatever makes that cheaper, such as keys and values kept
for a prefix of memories that many prompts share. It does not know handles, chat templates or stop strings.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from pic_rag.assembler import Assembled
from pic_rag.completion import Completion
from pic_rag.reader import Reader
from pic_rag.sampling import Sampling


class Engine:
    """Runs one model for many threads, one batch at a time.

    Args:
        model: a transformers causal LM.
        tokenizer: its tokenizer.
        reader: a LoRA on `model` that is on while a batch holds memories.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, reader: Reader | None = None
    ) -> None:
        self.model = model
        self.end_token_ids = _end_token_ids(model, tokenizer)
        self._reader = reader
        self._lock = threading.Lock()
        # Any id will do: padding is masked, and what follows an end token is not read.
        pad = tokenizer.pad_token_id
        self._pad_token_id = min(self.end_token_ids, default=0) if pad is None else pad

    @torch.no_grad()
    def decode(self, batch: Sequence[Assembled], completions: Sequence[Completion], sampling: Sampling) -> None:
        """Run the model until every completion is finished. The prompts all hold memories, or none of them does."""
        reading = batch[0].memory_tokens > 0
        with self._lock, self._reader.on() if self._reader and reading else nullcontext():
            if all(completion.finished for completion in completions):
                return  # abandoned while it waited for its turn
            self.model.generate(  # type: ignore[operator]
                **(self._pad_embeddings(batch) if reading else self._pad_ids(batch)),
                generation_config=self._generation_config(sampling),
                logits_processor=sampling.processors(len(batch), self.model.device),
                stopping_criteria=StoppingCriteriaList([_Feed(completions)]),
            )

    def _pad_ids(self, batch: Sequence[Assembled]) -> dict[str, torch.Tensor]:
        """`(prompts, rows)` token ids and mask: the way in that the model knows best, for prompts of text alone."""
        ids = pad_sequence([prompt.token_ids for prompt in batch], True, self._pad_token_id, "left")
        return {"input_ids": ids.to(self.model.device), "attention_mask": self._mask(batch)}

    def _pad_embeddings(self, batch: Sequence[Assembled]) -> dict[str, torch.Tensor]:
        """`(prompts, rows, hidden)` embeddings and `(prompts, rows)` mask."""
        embeddings = pad_sequence([prompt.embeddings for prompt in batch], True, padding_side="left")
        return {"inputs_embeds": embeddings, "attention_mask": self._mask(batch)}

    def _mask(self, batch: Sequence[Assembled]) -> torch.Tensor:
        """`(prompts, rows)`: 1 at a row of the prompt, 0 at the padding before it."""
        ones = [torch.ones_like(prompt.token_ids) for prompt in batch]
        return pad_sequence(ones, True, padding_side="left").to(self.model.device)

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


class _Feed(StoppingCriteria):
    """Hands each new token to its completion, and stops a row when its completion is finished."""

    def __init__(self, completions: Sequence[Completion]) -> None:
        self._completions = completions

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:  # noqa: ANN401 - transformers' signature
        """`(prompts, tokens)` ids so far in, `(prompts,)` whether each row is finished out."""
        for completion, token_id in zip(self._completions, input_ids[:, -1].tolist(), strict=True):
            if not completion.finished:
                completion.push(token_id)
        finished = [completion.finished for completion in self._completions]
        return torch.tensor(finished, device=input_ids.device)  # type: ignore[return-value]


def _end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: the model's own, else the tokenizer's."""
    ids = model.generation_config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)
