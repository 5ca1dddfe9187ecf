"""The encoder: the first layers of a causal LM with LoRA, one slot embedding, and a converter to the generator's width.

It receives a `Layout` and returns one vector a slot; it knows neither strings nor files.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from pic_rag.config import PicConfig
from pic_rag.layout import Layout
from pic_rag.mask import Scope, attention_mask


class Converter(nn.Module):
    """RMSNorm, Linear, GELU, Linear: `(slots, encoder_hidden)` to `(slots, generator_hidden)`.

    The last layer starts at zero, so that an untrained encoder with `residual_pool` is a mean pooler.
    """

    def __init__(self, encoder_hidden: int, generator_hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(encoder_hidden)
        self.up = nn.Linear(encoder_hidden, generator_hidden)
        self.down = nn.Linear(generator_hidden, generator_hidden)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Convert `(slots, encoder_hidden)` to `(slots, generator_hidden)`."""
        return self.down(nn.functional.gelu(self.up(self.norm(hidden))))


class SaliencePool(nn.Module):
    """Mean of the generator's token embeddings over each slot's span, weighted by how much every token tells.

    A token's weight is a softmax over its span of `token_salience[token] + context(its hidden state)`. Both start at
    zero, which is the plain mean; a training run starts `token_salience` at the tokens' surprisal (`start_at`), so that
    a name outweighs the articles around it from the first step on.
    """

    def __init__(self, encoder_hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.token_salience = nn.Parameter(torch.zeros(vocabulary))
        self.norm = nn.RMSNorm(encoder_hidden)
        self.context = nn.Linear(encoder_hidden, 1, bias=False)
        nn.init.zeros_(self.context.weight)

    def start_at(self, token_counts: torch.Tensor) -> None:
        """Set the salience of every token to its surprisal, `-log` of its share of the `(vocabulary,)` counts."""
        counts = token_counts.float() + 0.5
        with torch.no_grad():
            self.token_salience.copy_(-(counts / counts.sum()).log())

    def forward(self, layout: Layout, hidden: torch.Tensor, embeddings: nn.Module) -> torch.Tensor:
        """`(slots, generator_hidden)` float32 of `(rows, places, encoder_hidden)` hidden states."""
        place = layout.span_place.clamp(min=0)  # (slots, span)
        row = layout.slot_row[:, None]
        token_ids = layout.token_ids[row, place]
        context = self.context(self.norm(hidden.to(self.norm.weight.dtype)))[..., 0]  # (rows, places)
        salience = self.token_salience[token_ids].float() + context[row, place].float()
        weights = salience.masked_fill(layout.span_place < 0, -torch.inf).softmax(-1)
        return (weights[..., None] * embeddings(token_ids).float()).sum(1)


class PicEncoder(nn.Module):
    """Turns a layout's slots into memory tokens.

    Args:
        base: a causal LM; its decoder is copied, cut to `config.encoder_layers` layers and frozen.
        config: the PIC settings.
        generator_embeddings: input embeddings of the generator, frozen and not part of this module's state.
        share_embeddings: freeze the base's own input embeddings and use them, in place of a copy: of large vocabularies
            that spares gigabytes. For a base that nobody else trains, moves or rounds.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        config: PicConfig,
        generator_embeddings: nn.Module,
        *,
        share_embeddings: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.decoder = _cut_decoder(base, config, share_embeddings=share_embeddings)
        self._generator_embeddings = (generator_embeddings,)  # a tuple hides it from state_dict
        weight = self.token_embedding_weight
        hidden, self.hidden = weight.shape[1], _width(generator_embeddings)
        scale = weight.detach().float().std().item()
        generator = torch.Generator().manual_seed(0)
        self.slot_embedding = nn.Parameter((torch.randn(hidden, generator=generator) * scale).to(weight.device))
        self.converter = Converter(hidden, self.hidden).to(weight.device)
        vocabulary = len(cast("torch.Tensor", generator_embeddings.weight))
        self.pool = SaliencePool(hidden, vocabulary).to(weight.device) if config.residual_pool else None
        if config.lora_rank:
            _add_lora(self.decoder, config)

    def forward(self, layout: Layout) -> torch.Tensor:
        """`(slots, generator_hidden)` memory tokens of a layout, in the dtype of the base model."""
        embeddings = self.decoder.get_input_embeddings()
        text = embeddings(layout.token_ids)  # (rows, places, encoder_hidden)
        slot = self._slot_row(embeddings).to(text.dtype)
        hidden = self.decoder(
            inputs_embeds=torch.where(layout.is_slot[..., None], slot, text),
            position_ids=layout.position_ids,
            attention_mask=self._mask(layout, text.dtype),
            use_cache=False,
        ).last_hidden_state
        slots = hidden[layout.slot_row, layout.slot_place]  # (slots, encoder_hidden)
        memory = self.converter(slots.to(self.converter.up.weight.dtype))
        if self.pool is not None:
            memory = memory + self.pool(layout, hidden, self._generator_embeddings[0])
        return memory.to(text.dtype)

    @property
    def attn_implementation(self) -> str:
        """What computes its attention: "sdpa", "eager" or "flex_attention"."""
        return str(self.decoder.config._attn_implementation)

    @property
    def token_embedding_weight(self) -> torch.Tensor:
        """`(vocabulary, encoder_hidden)`: its dtype and device are those the encoder computes in."""
        return cast("torch.Tensor", self.decoder.get_input_embeddings().weight)

    def trained_state(self) -> dict[str, torch.Tensor]:
        """What training changes, and a checkpoint holds: LoRA, slot embedding, converter, pool."""
        return {name: tensor for name, tensor in self.state_dict().items() if _is_trained(name)}

    def load_trained_state(self, state: dict[str, torch.Tensor]) -> None:
        """Load `trained_state()`'s tensors.

        Raises:
            ValueError: when a tensor is missing, unknown or of another shape.
        """
        own = self.trained_state()
        for name in sorted(own.keys() | state.keys()):
            got, expected = _shape(state, name), _shape(own, name)
            if got != expected:
                raise ValueError(
                    f"Checkpoint tensor {name!r} must have the shape {expected}, got {got}. "
                    "The weights and the configuration beside them are not of one compressor: fetch it again."
                )
        self.load_state_dict(state, strict=False)

    def merge_lora(self) -> None:
        """Add the LoRA into the base weights, for inference; `trained_state` stays as it was."""
        for module in self.decoder.modules():
            if isinstance(module, BaseTunerLayer):
                module.merge()

    def _mask(self, layout: Layout, dtype: torch.dtype) -> object:
        scope = Scope(self.config.text_scope, self.config.memory_scope)
        return attention_mask(layout.places, scope, dtype, self.attn_implementation)

    def _slot_row(self, embeddings: nn.Module) -> torch.Tensor:
        """The slot embedding at the scale the model's own embedding module gives its rows (Gemma multiplies them)."""
        return self.slot_embedding * getattr(embeddings, "embed_scale", 1.0)


def _cut_decoder(base: PreTrainedModel, config: PicConfig, *, share_embeddings: bool) -> PreTrainedModel:
    decoder = base.get_decoder()
    if not hasattr(decoder, "layers") or not hasattr(decoder, "rotary_emb"):
        raise ValueError(
            f"The base model must be a causal LM with rotary positions, got {type(base).__name__}. "
            "Llama, Qwen2, Qwen3, Mistral and Gemma models are."
        )
    _check_attention(base)
    layers = cast("nn.ModuleList", decoder.layers)
    keep = config.encoder_layers or len(layers)
    if keep > len(layers):
        raise ValueError(f"encoder_layers must be at most {len(layers)} (the base model's layers), got {keep}.")
    decoder.layers = layers[:keep]
    embeddings = decoder.get_input_embeddings()
    try:
        cut = copy.deepcopy(decoder, {id(embeddings): embeddings} if share_embeddings else None)
    finally:
        decoder.layers = layers
    cut.config = copy.deepcopy(cut.config)
    cut.config.num_hidden_layers = keep
    return cut.requires_grad_(False)


def _check_attention(base: PreTrainedModel) -> None:
    """Refuse layers that mix places in another way than by attention: the mask would not keep documents apart."""
    for layer in DynamicCache(config=base.config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                f"The base model must mix places by attention alone, got {type(base).__name__}, which has a layer of "
                f"another kind (its cache is a {type(layer).__name__}) that no mask restricts. "
                "Llama, Qwen2, Qwen3, Mistral and Gemma models are suitable."
            )


def _add_lora(decoder: PreTrainedModel, config: PicConfig) -> None:
    layers = cast("nn.ModuleList", decoder.layers)
    linear = [name for name, module in layers.named_modules() if isinstance(module, nn.Linear)]
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=sorted({name.rpartition(".")[2] for name in linear}),
        lora_dropout=0.0,
    )
    inject_adapter_in_model(lora, decoder)


def _width(embeddings: nn.Module) -> int:
    return int(cast("torch.Tensor", embeddings.weight).shape[1])


def _is_trained(name: str) -> bool:
    return "lora_" in name or not name.startswith("decoder.")


def _shape(state: dict[str, torch.Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None
