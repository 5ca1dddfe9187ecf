"""The reader: a LoRA on the generator, on only while memories are in the prompt. peft loads with the first reader."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from transformers import PreTrainedModel

from pic_rag.models.quiet import quiet_loading

if TYPE_CHECKING:
    from peft import LoraModel


class Reader:
    """Adds a LoRA to a model in place and leaves it off: the model computes what it computed before.

    Args:
        model: the generator.
        folder: an adapter saved by peft's `save_pretrained`.

    Raises:
        ValueError: when the folder holds no LoRA, or one that does not fit the model.
    """

    def __init__(self, model: PreTrainedModel, folder: str | Path) -> None:
        self._lora = _load(model, Path(folder))
        self._lora.disable_adapter_layers()

    @contextmanager
    def on(self) -> Iterator[None]:
        """Switch the LoRA on inside a `with` block. The caller sees to it that nobody else uses the model meanwhile."""
        self._lora.enable_adapter_layers()
        try:
            yield
        finally:
            self._lora.disable_adapter_layers()


def _load(model: PreTrainedModel, folder: Path) -> LoraModel:
    from peft import PeftConfig, PeftModel

    if not (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"reader must be a folder saved by peft's save_pretrained, got {str(folder)!r} "
            "without adapter_config.json. Check the path."
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
