"""The compressor: texts in, memories out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pic_rag.backbone import Backbone, ModelRef, load_backbone
from pic_rag.checkpoint import Checkpoint
from pic_rag.chunking import Segment, fold, place_slots, token_segments
from pic_rag.config import PicConfig
from pic_rag.encoder import PicEncoder
from pic_rag.handles import make_handle
from pic_rag.layout import build_layout
from pic_rag.memory import Memory, hash_text

BATCH_SIZE = 8
"""Rows encoded at once; a row holds one full segment or several short ones."""

_LOOKAHEAD_BATCHES = 8  # batches of segments gathered before they are packed: bounds memory, leaves little padding


class Compressor:
    """Turns texts into memories that one generator can read. It never changes after it is built.

    Use `from_pretrained` (a trained checkpoint) or `from_base` (untrained).

    Attributes:
        config: the PIC settings.
        fingerprint: 64 hex digits over weights, settings and models; equal fingerprints make equal memories.
        generator: the model that reads the memories.
        reader: folder of the LoRA adapter the generator needs for them, if any.
        name: folder or hub id it was loaded from; None for the shipped one and for an untrained one.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        encoder: PicEncoder,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.name = name
        self.encoder = encoder.eval()
        self.tokenizer = tokenizer
        self.config = checkpoint.config
        self.generator = checkpoint.generator
        self.reader = checkpoint.reader
        self.fingerprint = checkpoint.fingerprint

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path | None = None,
        *,
        base_model: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
    ) -> Compressor:
        """Load a trained compressor.

        Args:
            name_or_path: a folder written by `save_pretrained`, a hub id, or None for the one shipped with pic-rag.
            base_model: where the base model is, when it is not where the checkpoint says.
            device: None picks cuda, mps or cpu.
            dtype: compute dtype; None picks the device's fast one.
            attn_implementation: "sdpa", "eager" or "flex_attention"; None leaves it to transformers.

        Raises:
            FileNotFoundError: when there is no checkpoint.
            ValueError: when the checkpoint is damaged, or its base model is not the one it was trained on.
        """
        checkpoint = Checkpoint.load(name_or_path)
        load = partial(load_backbone, device=device, dtype=dtype, attn_implementation=attn_implementation)
        base = _load_base(load, base_model or checkpoint.base.name)
        if _digest(base.ref.id) != _digest(checkpoint.base.id):
            raise ValueError(
                f"The base model must be {checkpoint.base.id!r}, which this compressor was trained on, got "
                f"{base.ref.id!r}. Pass the right folder or hub id as base_model."
            )
        generator = _load_generator(load, base, checkpoint.generator)
        encoder = PicEncoder(base.model, checkpoint.config, generator.model.get_input_embeddings())
        encoder.load_trained_state(checkpoint.weights)
        encoder.merge_lora()
        return cls(checkpoint, encoder, base.tokenizer, name=None if name_or_path is None else str(name_or_path))

    @classmethod
    def from_base(
        cls,
        model: str | Path | PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        config: PicConfig | None = None,
        *,
        generator: PreTrainedModel | None = None,
        **loading: Any,  # noqa: ANN401 - passed on to load_backbone
    ) -> Compressor:
        """An untrained compressor on any Hugging Face causal LM with rotary positions: a mean pooler until trained.

        Args:
            model: the base model, or its name or folder (None: the embedded default).
            tokenizer: needed with a model object.
            config: None for the defaults.
            generator: the LLM that will read the memories, when it is not the base model. With
                `config.residual_pool` it must share the base model's tokenizer.
            **loading: `device`, `dtype`, `attn_implementation`, for a model given by name.

        Raises:
            ValueError: when a model object comes without its tokenizer, has no rotary positions, or when the
                generator's vocabulary cannot be the tokenizer's.
        """
        if isinstance(model, PreTrainedModel):
            if tokenizer is None:
                raise ValueError(
                    "tokenizer must be given with a model object, got None. Pass the model's own tokenizer."
                )
            base = Backbone(model, tokenizer, _name(model))
        else:
            base = load_backbone(model, **loading)
        reader = base if generator is None else Backbone(generator, base.tokenizer, _name(generator))
        config = config or PicConfig()
        embeddings = reader.model.get_input_embeddings()
        vocabulary = len(cast("torch.Tensor", embeddings.weight))
        if config.residual_pool and vocabulary < len(base.tokenizer):
            raise ValueError(
                f"generator must share the base model's tokenizer of {len(base.tokenizer)} tokens, got a vocabulary of "
                f"{vocabulary}. Set residual_pool=False for a generator with another tokenizer."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # equal models and settings make equal fingerprints, so a store of memories stays good
            encoder = PicEncoder(base.model, config, embeddings)
        weights = {name: tensor.detach().cpu().clone() for name, tensor in encoder.trained_state().items()}
        return cls(Checkpoint(config, base.ref, reader.ref, weights), encoder, base.tokenizer)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json`, `compressor.safetensors` and the reader, if there is one, into a folder."""
        self.checkpoint.save(folder)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload the checkpoint to the Hugging Face hub; returns the repository's address."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.upload_folder(repo_id=repo_id, folder_path=folder)
        return str(address)

    @property
    def hidden(self) -> int:
        """Width of a memory token: the generator's hidden size."""
        return self.encoder.hidden

    @property
    def dtype(self) -> str:
        """The dtype memories are computed in, such as "bfloat16"."""
        return str(self._embedding_weight.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Where the encoder is."""
        return self._embedding_weight.device

    def handle(self, text: str, ratio: int | None = None) -> str:
        """The handle that this text's memory has, without compressing it."""
        return make_handle(
            source_hash=hash_text(text),
            fingerprint=self.fingerprint,
            ratio=self.config.check_ratio(ratio),
            dtype=self.dtype,
        )

    def compress(
        self,
        texts: Sequence[str],
        ratio: int | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
    ) -> list[Memory]:
        """Compress texts; the working memory does not grow with their length.

        Args:
            texts: one string a document. An empty one becomes an empty memory.
            ratio: text tokens per memory token; None for the compressor's default.
            batch_size: encoder rows computed at once.
            progress: True shows a bar, False none; None shows one on a terminal once it takes over a second.

        Returns:
            One memory a text, in order, on the CPU: `ceil(text_tokens / ratio)` memory tokens each.

        Raises:
            ValueError: when the compressor does not serve that ratio.
            TypeError: when a text is not a string.
        """
        ratio = self.config.check_ratio(ratio)
        rows = _require_batch_size(batch_size)
        texts = _check_texts(texts)
        pieces: list[list[torch.Tensor]] = [[] for _ in texts]
        text_tokens = [0] * len(texts)
        characters = sum(map(len, texts))
        with tqdm(total=characters, unit="char", unit_scale=True, desc="compress", delay=1.0,
                  disable=None if progress is None else not progress) as bar:  # fmt: skip
            segments = self._segments(texts, ratio, bar)
            while batch := list(islice(segments, rows * _LOOKAHEAD_BATCHES)):
                memories = self._encode([segment for _, segment in batch], rows)
                for (number, segment), memory in zip(batch, memories, strict=True):
                    pieces[number].append(memory)
                    text_tokens[number] += len(segment.token_ids)
        return [
            self._memory(text, ratio, tokens, parts)
            for text, tokens, parts in zip(texts, text_tokens, pieces, strict=True)
        ]

    def _segments(self, texts: Sequence[str], ratio: int, bar: tqdm) -> Iterator[tuple[int, Segment]]:
        """Every text's segments (its chunks, where they can be folded), with the number of the text."""
        for number, text in enumerate(texts):
            for token_ids in token_segments(text, self.tokenizer, self.config.segment_tokens):
                segment = place_slots(token_ids, ratio, self.config.slots_per_chunk)
                for part in fold(segment) if self.config.foldable else [segment]:
                    yield number, part
            bar.update(len(text))

    @torch.inference_mode()
    def _encode(self, segments: Sequence[Segment], rows: int) -> list[torch.Tensor]:
        """`(slots, hidden)` of each segment, on the CPU; about `rows` rows at a time, longest segments first."""
        order = sorted(range(len(segments)), key=lambda number: -segments[number].places)
        full = max(self.config.segment_tokens, segments[order[0]].places)
        row_places = 0 if self.config.foldable else full  # folded chunks get rows of their own
        memories: list[torch.Tensor] = [torch.empty(0)] * len(segments)
        for group in _groups(order, segments, rows * full):
            own = [segments[number] for number in group]
            layout = build_layout(own, positions=self.config.positions, row_places=row_places)
            encoded = self.encoder(layout.to(self.device)).cpu()
            sizes = [len(segment.chunk) for segment in own]
            for number, memory in zip(group, encoded.split(sizes), strict=True):
                memories[number] = memory
        return memories

    def _memory(self, text: str, ratio: int, text_tokens: int, pieces: list[torch.Tensor]) -> Memory:
        empty = torch.empty((0, self.hidden), dtype=self._embedding_weight.dtype)
        return Memory(
            embeddings=torch.cat(pieces) if pieces else empty,
            text_tokens=text_tokens,
            ratio=ratio,
            dtype=self.dtype,
            fingerprint=self.fingerprint,
            source_hash=hash_text(text),
            generator=self.generator.id,
        )

    @property
    def _embedding_weight(self) -> torch.Tensor:
        return self.encoder.token_embedding_weight


def _groups(order: Sequence[int], segments: Sequence[Segment], places: int) -> Iterator[list[int]]:
    """Runs of `order` whose segments take at most that many places together (one segment at least)."""
    group: list[int] = []
    used = 0
    for number in order:
        if group and used + segments[number].places > places:
            yield group
            group, used = [], 0
        group.append(number)
        used += segments[number].places
    yield group


def _load_base(load: Callable[..., Backbone], name_or_path: str | Path) -> Backbone:
    try:
        return load(name_or_path)
    except OSError as error:
        raise FileNotFoundError(
            f"The base model must be a folder or a hub id, got {str(name_or_path)!r}: {error} "
            "Pass the folder or hub id it is at now as base_model."
        ) from error


def _load_generator(load: Callable[..., Backbone], base: Backbone, generator: ModelRef) -> Backbone:
    digest = _digest(generator.id).partition("+")[0]  # without its reader's
    if digest == _digest(base.ref.id):
        return base
    loaded = load(generator.name)
    if _digest(loaded.ref.id) != digest:
        raise ValueError(
            f"The generator must be {generator.id!r}, which this compressor writes memories for, got "
            f"{loaded.ref.id!r}. Put the right model at {generator.name!r}."
        )
    return loaded


def _check_texts(texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise TypeError("texts must be a list of strings, got one string. Write compress([text]).")
    texts = list(texts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts must hold strings, got {type(text).__name__} at position {number}.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"texts must be valid Unicode, got a lone surrogate at position {number}, character {error.start}. "
                'Decode the file with errors="replace".'
            ) from error
    return texts


def _require_batch_size(batch_size: int | None) -> int:
    if batch_size is None:
        return BATCH_SIZE
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of 1 or more, got {batch_size!r}.")
    return batch_size


def _digest(identity: str) -> str:
    return identity.rpartition("@")[2]


def _name(model: PreTrainedModel) -> str:
    return model.name_or_path or type(model).__name__
