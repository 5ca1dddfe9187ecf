"""How vLLM has to be started to serve a compressor's generator and its reader, under names that say which they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open

from pic_rag.models.backbone import READER_WEIGHTS, find_model, plain_id
from pic_rag.models.checkpoint import Checkpoint
from pic_rag.models.pair import load_generator

_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # those vLLM has kernels for


def servable(checkpoint: Checkpoint | str | Path | None) -> Checkpoint:
    """The compressor's checkpoint, loaded if only its name is given.

    Raises:
        ValueError: when its memories are read at spread positions, which vLLM has no way to be told.
    """
    loaded = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.load(checkpoint)
    if loaded.config.generator_positions != "contiguous":
        raise ValueError(
            f"generator_positions must be contiguous for vLLM, got {loaded.config.generator_positions!r}. "
            "Read these memories with pic_rag.Generator, in process."
        )
    return loaded


def served_names(model_id: str) -> tuple[str, str]:
    """What the generator and the generator with its reader are served as: their ids. Without a reader they are one.

    >>> served_names("SmolLM2@9ec930d6+0f59d511")
    ('SmolLM2@9ec930d6', 'SmolLM2@9ec930d6+0f59d511')
    """
    return plain_id(model_id), model_id


def lora_settings(reader: Path | None) -> dict[str, Any]:
    """What vLLM has to be told for a reader: its rank, and the layers it is on.

    By default vLLM makes every layer ready for LoRA, the token embeddings too, and those then fail beside
    `prompt_embeds`: they look up some rows of a batch and count all (vLLM 0.32).
    """
    if reader is None:
        return {}
    with safe_open(reader / READER_WEIGHTS, "pt") as adapter:
        matrices = {name: adapter.get_slice(name).get_shape() for name in adapter.keys() if ".lora_A." in name}
    rank = max(shape[0] for shape in matrices.values())
    return {
        "enable_lora": True,
        "max_lora_rank": next(known for known in _LORA_RANKS if known >= rank),
        "lora_target_modules": sorted({name.partition(".lora_A.")[0].rpartition(".")[2] for name in matrices}),
    }


def serve_arguments(
    checkpoint: Checkpoint | str | Path | None = None, name_or_path: str | Path | None = None
) -> list[str]:
    """Arguments of `vllm serve` for the generator of a compressor.

    The weights are read and compared with those the compressor was trained for, then named by their id: a
    `VLLMGenerator` asks for exactly that name, so it cannot reach another model by mistake.

    Args:
        checkpoint: of the compressor: its folder, its hub id, or None for the shipped one.
        name_or_path: where the generator is, when it is not where the checkpoint says.

    Raises:
        ValueError: when the model found there is another than the memories are made for, or they are not `servable`.
    """
    checkpoint = servable(checkpoint)
    source = name_or_path or checkpoint.generator.name
    generator, reader = served_names(checkpoint.generator.id)
    load_generator(checkpoint, source, device="cpu", dtype="bfloat16")  # only to compare its weights
    arguments = [
        *("--model", find_model(str(source))),
        *("--served-model-name", generator),
        "--enable-prompt-embeds",
        "--enable-prompt-tokens-details",  # for `Generation.cached_tokens`
        "--trust-request-chat-template",  # each request brings the template that writes its parts down as they are
    ]
    if checkpoint.reader is not None:
        settings = lora_settings(checkpoint.reader)
        arguments += [
            "--enable-lora",
            *("--max-lora-rank", str(settings["max_lora_rank"])),
            *("--lora-target-modules", *settings["lora_target_modules"]),
            *("--lora-modules", f"{reader}={checkpoint.reader}"),
        ]
    return arguments
