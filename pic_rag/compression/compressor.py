"""The compressor: texts in, memories out."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pic_rag.checks import as_whole, check_unicode, check_whole
from pic_rag.chunking import Segment, cut, token_segments, token_windows
from pic_rag.compression.batching import Batcher, gather
from pic_rag.compression.fidelity import FidelityCheck
from pic_rag.compression.ratios import Ratio, descend, ratio_of_each
from pic_rag.config import RAW_TEXT, PicConfig
from pic_rag.encoder import PicEncoder
from pic_rag.generation.generator import Generator
from pic_rag.generation.sharing import shared_generator
from pic_rag.handles import make_handle
from pic_rag.memory import Memory, hash_text
from pic_rag.models.backbone import Backbone, ModelRef, generator_id, load_backbone
from pic_rag.models.checkpoint import Checkpoint
from pic_rag.models.pair import load_models
from pic_rag.progress import progress_bar

BATCH_SIZE = 2
"""Rows encoded at once; a row holds one full segment or several short ones. Two keep a CPU's cores as busy as eight do,
and few rows can be packed with less padding and in narrower rows."""

GPU_BATCH_SIZE = 64
"""The same on a GPU, where the arithmetic of few rows takes no longer than starting it; 64 has not been tuned."""

_LOOKAHEAD_BATCHES = 32  # full batches of segments gathered before they are packed: bounds memory, little padding


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
        self._batcher = Batcher(self.encoder)
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
        generator: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
    ) -> Compressor:
        """Load a trained compressor.

        Args:
            name_or_path: a folder written by `save_pretrained`, a hub id, or None for the one shipped with pic-rag.
            base_model: where the base model is, when it is not where the checkpoint says.
            generator: where the generator is, likewise; its token embeddings are needed.
            device: None picks cuda, mps or cpu.
            dtype: compute dtype; None picks the device's fast one.
            attn_implementation: "sdpa", "eager" or "flex_attention"; None leaves it to transformers.

        Raises:
            FileNotFoundError: when there is no checkpoint.
            ValueError: when the checkpoint is damaged, or its base model is not the one it was trained on.
        """
        checkpoint = Checkpoint.load(name_or_path)
        base, generating = load_models(
            checkpoint, base_model, generator, device=device, dtype=dtype, attn_implementation=attn_implementation
        )
        embeddings = generating.model.get_input_embeddings()
        encoder = PicEncoder(base.model, checkpoint.config, embeddings, share_embeddings=True)
        encoder.load_trained_state(checkpoint.weights)
        encoder.merge_lora()
        checkpoint = checkpoint.with_models_at(base.name, generating.name)
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
            ValueError: when a model object comes without its tokenizer, has no rotary positions or layers that are no
                attention, or when the generator's vocabulary cannot be the tokenizer's.
        """
        if isinstance(model, PreTrainedModel):
            if tokenizer is None:
                raise ValueError(
                    "tokenizer must be given with a model object, got None. Pass the model's own tokenizer."
                )
            base = Backbone(model, tokenizer, _name(model))
        else:
            base = load_backbone(model, **loading)
        generating = base if generator is None else Backbone(generator, base.tokenizer, _name(generator))
        config = config or PicConfig()
        embeddings = generating.model.get_input_embeddings()
        vocabulary = len(cast("torch.Tensor", embeddings.weight))
        if config.residual_pool and vocabulary < len(base.tokenizer):
            raise ValueError(
                f"generator must share the base model's tokenizer of {len(base.tokenizer)} tokens, got a vocabulary of "
                f"{vocabulary}. Set residual_pool=False for a generator with another tokenizer."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # equal models and settings make equal fingerprints, so a store of memories stays good
            given = isinstance(model, PreTrainedModel)
            encoder = PicEncoder(base.model, config, embeddings, share_embeddings=not given)
        weights = {name: tensor.detach().cpu().clone() for name, tensor in encoder.trained_state().items()}
        generator_ref = ModelRef(generating.name, generator_id(generating.ref.id, None, config.generator_positions))
        return cls(Checkpoint(config, base.ref, generator_ref, weights), encoder, base.tokenizer)

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
    def batch_size(self) -> int:
        """Encoder rows computed at once unless a call says otherwise."""
        return BATCH_SIZE if self.device.type == "cpu" else GPU_BATCH_SIZE

    @property
    def device(self) -> torch.device:
        """Where the encoder is."""
        return self._embedding_weight.device

    def handle(self, text: str, ratio: int | None = None) -> str:
        """The handle that this text's memory has, without compressing it; at ratio 1 that of the raw text."""
        return make_handle(
            source_hash=hash_text(text),
            fingerprint=self.fingerprint,
            ratio=RAW_TEXT if as_whole(ratio) == RAW_TEXT else self.config.check_ratio(ratio),
            dtype=self.dtype,
        )

    def ladder(self, ratio: int | None = None) -> tuple[int, ...]:
        """The ratios that `min_fidelity` tries: those served from `ratio` (None: the highest) down, then raw text."""
        if as_whole(ratio) == RAW_TEXT:
            return (RAW_TEXT,)
        highest = self.config.ratios[-1] if ratio is None else self.config.check_ratio(ratio)
        return (*(served for served in reversed(self.config.ratios) if served <= highest), RAW_TEXT)

    def compress(
        self,
        texts: Sequence[str],
        ratio: Ratio = None,
        *,
        batch_size: int | None = None,
        progress: bool | None = None,
        min_fidelity: float | None = None,
        generator: Generator | None = None,
    ) -> list[Memory]:
        """Compress texts; the working memory does not grow with their length.

        Args:
            texts: one string a document. An empty one becomes an empty memory.
            ratio: text tokens per memory token; None for the compressor's default. A sequence has one for each text,
                the last of which serves all texts after it. With `min_fidelity` the highest one to try; None for the
                highest that is served.
            batch_size: encoder rows computed at once; None for `batch_size`.
            progress: True shows a bar, False none; None shows one on a terminal once it takes over a second.
            min_fidelity: 0 to 1. Each text gets the highest ratio whose memory is that faithful, as the generator finds
                (`pic_rag.compression.fidelity`), else raw text: a memory of ratio 1 that holds its token embeddings.
            generator: the one that checks, for `min_fidelity`; None: `shared_generator(compressor.checkpoint)`, which
                is loaded unless something in this process shares it already.

        Returns:
            One memory a text, in order, on the CPU: `ceil(text_tokens / ratio)` memory tokens each. With `min_fidelity`
            they carry their `fidelity`; that of raw text is 1, for nothing is lost.

        Raises:
            ValueError: when the compressor does not serve that ratio, `min_fidelity` is out of range, or `generator` is
                another than the memories are made for.
            TypeError: when a text is not a string, or `generator` does not run in this process.
        """
        rows = self.batch_size if batch_size is None else check_whole("batch_size", batch_size)
        texts = _check_texts(texts)
        if min_fidelity is None:
            ratios = ratio_of_each(ratio, len(texts), self.config.check_ratio)
            return self._compress(texts, ratios, rows, progress)
        ladders = ratio_of_each(ratio, len(texts), self.ladder)
        check = FidelityCheck(self._checking(generator), self.config.segment_tokens)

        def attempt(numbers: Sequence[int], ratio: int) -> list[Memory]:
            own = [texts[number] for number in numbers]
            if ratio == RAW_TEXT:
                return [self._raw_text(text, check.generator) for text in own]
            return check.mark(own, self._compress(own, [ratio] * len(own), rows, progress))

        return descend(ladders, min_fidelity, attempt)

    def _compress(self, texts: Sequence[str], ratios: Sequence[int], rows: int, progress: bool | None) -> list[Memory]:
        """One memory a text, each of its own ratio; `rows` encoder rows computed at once."""
        pieces: list[list[torch.Tensor]] = [[] for _ in texts]
        text_tokens = [0] * len(texts)
        characters = sum(map(len, texts))
        with progress_bar(progress, total=characters, unit="char", unit_scale=True, desc="compress") as bar:
            segments = self._segments(texts, ratios, bar)
            for batch in gather(segments, rows * self.config.segment_tokens * _LOOKAHEAD_BATCHES):
                memories = self._batcher.encode([segment for _, segment in batch], rows)
                for (number, segment), memory in zip(batch, memories, strict=True):
                    pieces[number].append(memory)
                    text_tokens[number] += len(segment.token_ids)
        return [
            self._memory(text, ratio, tokens, parts)
            for text, ratio, tokens, parts in zip(texts, ratios, text_tokens, pieces, strict=True)
        ]

    def _segments(self, texts: Sequence[str], ratios: Sequence[int], bar: tqdm) -> Iterator[tuple[int, Segment]]:
        """Every text's segments (its chunks, where they can be folded), with the number of the text."""
        begun = 0
        for number, token_ids in token_segments(texts, self.tokenizer, self.config.segment_tokens):
            bar.update(sum(map(len, texts[begun:number])))
            begun = number
            for part in cut(token_ids, ratios[number], self.config.slots_per_chunk, foldable=self.config.foldable):
                yield number, part
        bar.update(sum(map(len, texts[begun:])))

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

    @torch.inference_mode()
    def _raw_text(self, text: str, generator: Generator) -> Memory:
        """The text as the generator's own token embeddings, which it reads as the text."""
        embed = generator.model.get_input_embeddings()
        windows = [torch.from_numpy(ids) for ids in token_windows(text, generator.tokenizer)]
        pieces = [embed(ids.to(generator.model.device)).to("cpu", self._embedding_weight.dtype) for ids in windows]
        return replace(self._memory(text, RAW_TEXT, sum(map(len, windows)), pieces), fidelity=1.0)

    def _checking(self, generator: Generator | None) -> Generator:
        """The generator that reads this compressor's memories: the one given, or the process's."""
        if generator is None:
            return shared_generator(self.checkpoint)
        if not isinstance(generator, Generator):
            raise TypeError(
                f"generator must be a Generator that runs in this process, got {type(generator).__name__}. "
                "Leave min_fidelity out, or pass Generator.from_checkpoint(compressor.checkpoint)."
            )
        generator.check_reads(self.generator.id)
        return generator

    @property
    def _embedding_weight(self) -> torch.Tensor:
        return self.encoder.token_embedding_weight


def _check_texts(texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise TypeError("texts must be a list of strings, got one string. Write compress([text]).")
    texts = list(texts)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts must hold strings, got {type(text).__name__} at position {number}.")
        check_unicode(f"text {number}", text)
    return texts


def _name(model: PreTrainedModel) -> str:
    return model.name_or_path or type(model).__name__
