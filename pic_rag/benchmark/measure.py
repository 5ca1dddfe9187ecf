"""Clocks and meters: when the device is done, when each token was there, what keys and values take, what this is."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel

from pic_rag.generation.generator import Generator
from pic_rag.models.backbone import end_token_ids
from pic_rag.reporting import cpu_name


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """How long a call takes."""
    begin = now(device)
    call()
    return now(device) - begin


class TokenClock:
    """Notes when each forward of a generator's model is done; while it runs, no answer ends before its length.

    Attributes:
        times: in seconds on the clock of `now`. The last N are those of an answer's N tokens.
    """

    def __init__(self, generator: Generator) -> None:
        self.times: list[float] = []
        self._model: PreTrainedModel = generator.model
        self._end = sorted(end_token_ids(generator.model, generator.tokenizer))

    def __enter__(self) -> TokenClock:
        """Start."""
        self._hook = self._model.register_forward_hook(self._tick)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self._hook.remove()

    def _tick(self, module: torch.nn.Module, arguments: Any, output: Any) -> None:  # noqa: ANN401 - torch's hook
        output.logits[..., self._end] = -torch.inf
        self.times.append(now(output.logits.device))


@torch.inference_mode()
def kv_bytes(model: PreTrainedModel) -> int:
    """Bytes of keys and values of one token, over all layers, as the model keeps them."""
    ids = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    past = model(input_ids=ids, use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in past.layers)


def matrix_rate(device: torch.device, dtype: torch.dtype, repeats: int = 10) -> float:
    """Floating-point operations a second of a large matrix product: what this device can do, and not its data sheet."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    torch.mm(left, right)
    return max(2 * size**3 / seconds(lambda: torch.mm(left, right), device) for _ in range(repeats))


def hardware(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on, as JSON types."""
    cuda = device.type == "cuda"
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "gpu_memory_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else None,
        "system": platform.platform(),
    }


def load_average() -> float | None:
    """Processes that wanted a core over the last minute: above the number of cores, figures mean little."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
