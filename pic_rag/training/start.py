"""What a run starts from: a base model that can be trained with, its reader LoRA, perhaps a trained compressor."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel

from pic_rag.encoder import PicEncoder
from pic_rag.models.backbone import READER_WEIGHTS, Backbone, ModelRef, end_token_ids, load_backbone, same_model
from pic_rag.models.checkpoint import Checkpoint
from pic_rag.models.quiet import quiet_loading
from pic_rag.prompts import repeat_messages
from pic_rag.training.config import TrainConfig
from pic_rag.training.guards import require_finite

_SHAPING = ("encoder_layers", "lora_rank", "residual_pool")  # settings that say which weights there are


def load_base(config: TrainConfig, device: torch.device) -> Backbone:
    """The base model of a run, in the run's precision.

    Raises:
        ValueError: when it has no end token or no chat template, or fewer embeddings than tokens, or when the device
            cannot train with the attention asked for.
    """
    if config.attn_implementation == "flex_attention" and device.type == "cpu":
        raise ValueError(
            "attn_implementation must be sdpa or eager on a CPU, got 'flex_attention', which has no gradients there. "
            "Change it in the configuration; compile goes with it."
        )
    base = load_backbone(
        config.base_model,
        device=device,
        dtype="bfloat16" if config.precision == "bf16" else "float32",
        attn_implementation=config.attn_implementation,
    )
    if config.questions or any(stage.tasks.get("reconstruct") for stage in config.stages):
        _check_chat(base)
    largest, embeddings = _largest_id(base), len(cast("torch.Tensor", base.model.get_input_embeddings().weight))
    if largest >= embeddings:
        raise ValueError(
            f"base_model must have an embedding for every token, got {embeddings} of them in {base.name!r}, whose "
            f"tokenizer goes up to token {largest}. Take the tokenizer that belongs to it, or enlarge it: "
            f"model.resize_token_embeddings({largest + 1})."
        )
    return base


def _check_chat(base: Backbone) -> None:
    if not end_token_ids(base.model, base.tokenizer):
        raise ValueError(
            f"base_model must have a token that ends an answer, got none in {base.name!r}. "
            "Set eos_token in its tokenizer_config.json."
        )
    if not base.tokenizer.chat_template:
        raise ValueError(
            f"base_model must have a chat template, got none in {base.name!r}. Take the model's instruction-tuned "
            "variant, or put a chat_template.jinja into its folder."
        )


def _largest_id(base: Backbone) -> int:
    """The largest id that text or a prompt becomes; a special token that neither holds may lie beyond it (Gemma 3)."""
    tokenizer = base.tokenizer
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    ids = [number for token, number in tokenizer.get_vocab().items() if token not in special]
    if tokenizer.chat_template:
        prompt = tokenizer.apply_chat_template(repeat_messages(""), tokenize=False, add_generation_prompt=True)
        ids += tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return max([*ids, tokenizer.eos_token_id or 0])


def prepare_generator(model: PreTrainedModel, config: TrainConfig) -> PreTrainedModel | PeftModel:
    """The base model frozen, with a reader LoRA if the run trains one."""
    model.requires_grad_(False)
    if not config.reader_rank:
        return model
    lora = LoraConfig(
        r=config.reader_rank,
        lora_alpha=config.reader_rank,
        target_modules="all-linear",
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    with quiet_loading():
        return get_peft_model(model, lora)


def start_from(folder: str, base: ModelRef, encoder: PicEncoder, generator: PreTrainedModel | PeftModel) -> None:
    """Load the weights of a compressor, and of its reader, into the modules of a run.

    Raises:
        FileNotFoundError: when there is no such compressor.
        ValueError: when it is of another base model or has weights of other shapes, or such that are not finite.
    """
    start = Checkpoint.load(folder)
    if not same_model(start.base.id, base.id):
        raise ValueError(f"init_from must be a compressor of {base.id!r}, got one of {start.base.id!r}.")
    require_finite(f"init_from={folder!r}", start.weights)
    _load_encoder(start, folder, encoder)
    if start.reader is None:
        return
    require_finite(f"The reader of init_from={folder!r}", load_file(start.reader / READER_WEIGHTS))
    trained = LoraConfig.from_pretrained(str(start.reader)).r
    rank = cast("LoraConfig", generator.peft_config["default"]).r if isinstance(generator, PeftModel) else 0
    if not isinstance(generator, PeftModel) or rank != trained:
        raise ValueError(f"reader_rank must be {trained}, that of the reader of init_from={folder!r}, got {rank}.")
    generator.load_adapter(str(start.reader), "default", is_trainable=True)


def _load_encoder(start: Checkpoint, folder: str, encoder: PicEncoder) -> None:
    try:
        encoder.load_trained_state(start.weights)
    except ValueError as error:
        for name in _SHAPING:
            has, got = getattr(start.config, name), getattr(encoder.config, name)
            if has != got:
                raise ValueError(f"pic.{name} must be {has}, as in init_from={folder!r}, got {got}.") from error
        raise


def save_reader(generator: PeftModel, folder: Path, base: str) -> None:
    """Write the reader as a peft adapter of a base model of that name."""
    generator.peft_config["default"].base_model_name_or_path = base  # else a path of this machine
    generator.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card; the compressor's speaks for both
