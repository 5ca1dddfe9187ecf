"""The loss: the generator reads memories and has to say the targets, as surely as when it reads the text."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from pic_rag.encoder import PicEncoder
from pic_rag.mask import Scope, attention_mask
from pic_rag.training.batch import Batch, Rows

TARGETS_AT_ONCE = 8192
"""Targets whose logits exist at the same time: `TARGETS_AT_ONCE * vocabulary` values."""


class Objective(nn.Module):
    """Encoder and generator in one module, so that a distributed wrapper sees a single forward.

    Args:
        encoder: trained.
        generator: a causal LM, frozen but for its reader LoRA, if peft has put one in it.
        distillation: weight of the KL to the same generator, its reader switched on as well, reading the text.

    Raises:
        ValueError: when a layer of the generator attends neither to all that stands before nor to a sliding window.
    """

    def __init__(self, encoder: PicEncoder, generator: PreTrainedModel | PeftModel, distillation: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.generator = generator
        self.distillation = distillation
        self._windows = _windows(generator.config.get_text_config())

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss a target token, and the share of targets that are the likeliest token, both `()` float32."""
        cross_entropy, divergence, accuracy = self.measure(batch)
        return cross_entropy + self.distillation * divergence, accuracy

    def measure(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean cross-entropy and KL to the teacher (0 without one) a target token, and the accuracy, `()` float32."""
        hidden = self._read(batch.reads, self.encoder(batch.layout))  # (targets, hidden)
        teacher = None
        if batch.teacher is not None:
            with torch.no_grad():
                teacher = self._read(batch.teacher, None)
        targets = batch.reads.target_ids
        sums = torch.zeros(3, device=hidden.device)
        for start in range(0, len(targets), TARGETS_AT_ONCE):
            part = slice(start, start + TARGETS_AT_ONCE)
            sums = sums + checkpoint(
                self._score,
                hidden[part],
                targets[part],
                None if teacher is None else teacher[part],
                use_reentrant=False,
                preserve_rng_state=False,
            )
        cross_entropy, divergence, correct = sums / len(targets)
        return cross_entropy, divergence, correct

    def _score(self, hidden: torch.Tensor, targets: torch.Tensor, teacher: torch.Tensor | None) -> torch.Tensor:
        """`(3,)`: summed cross-entropy, summed KL to the teacher and number of right guesses of `(targets, hidden)`."""
        logits = self._logits(hidden)  # (targets, vocabulary)
        cross_entropy = nn.functional.cross_entropy(logits, targets, reduction="sum")
        divergence = torch.zeros_like(cross_entropy)
        if teacher is not None:
            with torch.no_grad():
                wanted = self._logits(teacher).log_softmax(-1)
            divergence = nn.functional.kl_div(logits.log_softmax(-1), wanted, reduction="sum", log_target=True)
        return torch.stack([cross_entropy, divergence, (logits.argmax(-1) == targets).sum()])

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        config = self.generator.config.get_text_config()
        logits = self.generator.get_output_embeddings()(hidden).float()
        if factor := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * factor
        if divisor := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / divisor
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        return cap * torch.tanh(logits / cap) if cap else logits

    def _mask(self, rows: Rows, dtype: torch.dtype, window: int | None) -> torch.Tensor | BlockMask:
        """Each sequence attends to itself alone, causally, and in some layers no farther back than their window."""
        scope = Scope("segment", "segment", window)
        return attention_mask(rows.places, scope, dtype, self.generator.config._attn_implementation)

    def _read(self, rows: Rows, memories: torch.Tensor | None) -> torch.Tensor:
        """`(targets, hidden)` last hidden states of the generator at the places that predict a target."""
        embeddings = self.generator.get_input_embeddings()(rows.ids)  # (rows, places, hidden)
        if memories is not None:
            memory = memories.to(embeddings.dtype)[rows.slot.clamp(min=0)]
            embeddings = torch.where((rows.slot >= 0)[..., None], memory, embeddings)
        masks = {kind: self._mask(rows, embeddings.dtype, window) for kind, window in self._windows.items()}
        decoder = self.generator.get_decoder()
        states = decoder(
            inputs_embeds=embeddings,
            position_ids=rows.position_ids,
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            use_cache=False,
        ).last_hidden_state
        return states[rows.target_row, rows.target_place]


def _windows(config: PretrainedConfig) -> dict[str, int | None]:
    """How far back each kind of layer attends, in places; None: to the beginning."""
    window = getattr(config, "sliding_window", None)
    of_all = "full_attention" if window is None else "sliding_attention"
    kinds = sorted(set(getattr(config, "layer_types", None) or [of_all]))
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"base_model must have layers of full_attention or sliding_attention, got {kind} in a "
                f"{config.model_type} model. Train for another model."
            )
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}
