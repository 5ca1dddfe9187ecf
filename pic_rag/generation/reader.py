"""The reader: a LoRA on the generator, on only while memories are in the prompt. peft loads with the first reader."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from pic_rag.models.backbone import READER_CONFIG
from pic_rag.models.quiet import quiet_loading

if TYPE_CHECKING:
    from peft import LoraModel, PeftConfig
    from peft.tuners.lora import LoraLayer


MERGED_BYTES = 2**30
"""Up to this size the weights that the reader changes are kept a second time, with the reader added to them."""


class Reader:
    """Adds a LoRA to a model in place and leaves it off: the model computes what it computed before.

    A LoRA of its own costs two small products a layer and token, half as much again on a CPU. So, where there is room,
    the sums of both weights are kept beside the model's own, and switching it on puts them in their place.

    Args:
        model: the generator.
        folder: an adapter saved by peft's `save_pretrained`.

    Raises:
        ValueError: when the folder holds no LoRA, or one that does not fit the model.
    """

    def __init__(self, model: PreTrainedModel, folder: str | Path) -> None:
        from peft.tuners.lora import LoraLayer

        lora = _load(model, Path(folder))
        layers = [module for module in lora.modules() if isinstance(module, LoraLayer)]
        self._switch: Callable[[bool], object]
        if _can_merge(lora.peft_config["default"], layers, model.get_input_embeddings()):
            self._switch = _Sums(layers).switch
            lora.unload()
        else:
            self._switch = lambda on: lora.enable_adapter_layers() if on else lora.disable_adapter_layers()
            self._switch(False)

    @contextmanager
    def switched(self, *, on: bool) -> Iterator[None]:
        """The LoRA on, or off, inside a `with` block, and off behind it.

        The caller sees to it that nobody else uses the model meanwhile. Off is a switch as well: an interrupt may have
        left the LoRA on in part.
        """
        try:
            self._switch(on)
            yield
        finally:
            self._switch(False)


class _Sums:
    """The weights of linear layers with the LoRA added, to be put in the place of their own."""

    def __init__(self, layers: Sequence[LoraLayer]) -> None:
        weights = [cast("nn.Parameter", layer.get_base_layer().weight) for layer in layers]
        self._weights = [
            (weight, weight.data + cast("Any", layer).get_delta_weight("default").to(weight.dtype))
            for weight, layer in zip(weights, layers, strict=True)
        ]
        self._own: list[torch.Tensor] = []  # while the sums are in their place, or some of them

    def switch(self, on: bool) -> None:
        if on:
            self._own = self._own or [weight.data for weight, _ in self._weights]
            for weight, merged in self._weights:
                weight.data = merged.to(weight.data)  # the model may have been moved since
        else:
            for (weight, _), own in zip(self._weights, self._own, strict=False):
                weight.data = own
            self._own = []


def _can_merge(config: PeftConfig, layers: Sequence[LoraLayer], embeddings: nn.Module) -> bool:
    """Whether there is room, and it is all about weights of linear layers.

    Not so with biases, further modules or DoRA, with quantised layers, and with an output head that is the embeddings.
    """
    settings: Any = config
    further = (settings.modules_to_save, settings.trainable_token_indices, settings.lora_bias, settings.use_dora)
    if any(further) or settings.bias != "none" or any(layer.lora_variant for layer in layers):
        return False
    bases = [layer.get_base_layer() for layer in layers]
    linear = all(type(base) is nn.Linear and base.weight is not embeddings.weight for base in bases)
    return linear and sum(cast("torch.Tensor", base.weight).nbytes for base in bases) <= MERGED_BYTES


def _load(model: PreTrainedModel, folder: Path) -> LoraModel:
    from peft import PeftConfig, PeftModel

    if not (folder / READER_CONFIG).is_file():
        raise ValueError(
            f"reader must be a folder saved by peft's save_pretrained, got {str(folder)!r} "
            f"without {READER_CONFIG}. Check the path."
        )
    kind = PeftConfig.from_pretrained(str(folder)).peft_type
    if kind != "LORA":
        raise ValueError(f"reader must be a LoRA, got {kind} in {str(folder)!r}. Train the reader as a LoRA.")
    try:
        # In the model's own dtype: peft would keep a bfloat16 adapter in float32 and cast at every layer.
        with quiet_loading():
            adapted = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"reader must fit the generator's layers, got {str(folder)!r}: {error} "
            "Use a reader trained for this generator."
        ) from error
    return cast("LoraModel", adapted.base_model)
