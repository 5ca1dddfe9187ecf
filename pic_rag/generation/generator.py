"""The generator in process: a transformers model and its reader, behind the answers of `answering`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pic_rag.assembler import Prompt
from pic_rag.config import GeneratorPositions
from pic_rag.generation.answering import BaseGenerator, by_handle, groups
from pic_rag.generation.engine import BATCH_PROMPTS, InProcessEngine
from pic_rag.generation.prefix import PREFIX_CACHE_BYTES
from pic_rag.generation.reader import Reader
from pic_rag.memory import Memory
from pic_rag.models.backbone import generator_id, load_backbone, model_id
from pic_rag.models.checkpoint import Checkpoint
from pic_rag.models.pair import load_generator


class Generator(BaseGenerator):
    """A causal LM that reads memories in place of text. Safe to share between threads.

    Its own weights never change; an optional reader is on only while a prompt holds memories.

    Args:
        model: a transformers causal LM. A reader is added to it in place, and is off unless a prompt holds memories.
        tokenizer: its tokenizer.
        name: what the model is known by; `model_id` is this name and a digest of the weights, the reader's included.
        reader: folder of a LoRA adapter saved by peft's `save_pretrained`.
        batch_size: most prompts decoded together.
        merge_calls: decode calls that wait at the same time together when their settings are the same: several times
            the answers a second for many threads. In bfloat16 another batch rounds otherwise, so an answer may then
            differ from the one that its prompt gets alone.
        prefix_cache_bytes: keys and values to keep, on the model's device, so that a prompt that begins with the same
            memories as an earlier one is read from its first new row; 0 keeps none. A model with sliding windows or
            recurrent states keeps none either.
        generator_positions: "contiguous", or "spread" for memories that were trained to be read so (see `PicConfig`):
            part of `model_id`.

    Raises:
        ValueError: when `reader` is not such a folder or does not fit the model, or a number is out of range.
    """

    _engine: InProcessEngine

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        reader: str | Path | None = None,
        batch_size: int = BATCH_PROMPTS,
        merge_calls: bool = False,
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
        generator_positions: GeneratorPositions = "contiguous",
    ) -> None:
        plain = model_id(model, name)  # before the reader adds parameters of its own
        engine = InProcessEngine(
            model,
            tokenizer,
            reader=None if reader is None else Reader(model, reader),
            batch_size=batch_size,
            merge_calls=merge_calls,
            prefix_cache_bytes=prefix_cache_bytes,
        )
        super().__init__(
            model,
            tokenizer,
            model_id=generator_id(plain, None if reader is None else Path(reader), generator_positions),
            engine=engine,
            generator_positions=generator_positions,
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path | None = None,
        *,
        reader: str | Path | None = None,
        batch_size: int = BATCH_PROMPTS,
        merge_calls: bool = False,
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
        generator_positions: GeneratorPositions = "contiguous",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
    ) -> Generator:
        """Load a generator.

        Args:
            name_or_path: a folder, a hub id, or None for the embedded default.
            reader: folder of a LoRA adapter that is on while memories are in the prompt.
            batch_size: most prompts decoded together, as for the class.
            merge_calls: whether waiting calls share a batch, as for the class.
            prefix_cache_bytes: keys and values of memories to keep, as for the class.
            generator_positions: as for the class.
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
            merge_calls=merge_calls,
            prefix_cache_bytes=prefix_cache_bytes,
            generator_positions=generator_positions,
        )

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        name_or_path: str | Path | None = None,
        *,
        batch_size: int = BATCH_PROMPTS,
        merge_calls: bool = False,
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
        **loading: Any,  # noqa: ANN401 - from_pretrained's arguments
    ) -> Generator:
        """Load the generator that reads a compressor's memories, with its reader.

        Args:
            checkpoint: `compressor.checkpoint`, or `Checkpoint.load(name)`.
            name_or_path: where the generator is, when it is not where the checkpoint says; equal weights go by the
                name that the checkpoint knows.
            batch_size: most prompts decoded together, as for the class.
            merge_calls: whether waiting calls share a batch, as for the class.
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
            merge_calls=merge_calls,
            prefix_cache_bytes=prefix_cache_bytes,
            generator_positions=checkpoint.config.generator_positions,
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
        batch_size = self._check_batch_size(batch_size)
        known = by_handle(memories)
        assembled = [self._assemble(prompt, known, len(ids)) for prompt, ids in zip(prompts, targets, strict=True)]
        scores: list[torch.Tensor] = [torch.empty(0)] * len(assembled)
        for group in groups(assembled, batch_size):
            scored = self._engine.score([assembled[at] for at in group], [targets[at] for at in group])
            for at, log_probs in zip(group, scored, strict=True):
                scores[at] = log_probs
        return scores
