"""Loading a Hugging Face causal LM: where it lives, on what device, in what dtype, and what identifies it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pic_rag.config import GeneratorPositions
from pic_rag.models import embedded
from pic_rag.models.quiet import quiet_loading

EMBEDDED_NAME = "SmolLM2-135M-Instruct"
ATTN_IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")
READER_WEIGHTS = "adapter_model.safetensors"  # peft's names
READER_CONFIG = "adapter_config.json"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DIGEST_SAMPLES = 64  # values read of every parameter

_digests_before_rounding: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()  # of models cast to float16


class ModelRef(NamedTuple):
    """Which model something belongs to: where to load it from, and what identifies its weights (see `model_id`)."""

    name: str
    id: str


@dataclass(frozen=True)
class Backbone:
    """A causal LM with its tokenizer and the name it is known by."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str

    @property
    def ref(self) -> ModelRef:
        """The name with the identity of the weights."""
        return ModelRef(self.name, model_id(self.model, self.name))


def load_backbone(
    name_or_path: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
) -> Backbone:
    """Load a causal LM in evaluation mode.

    Args:
        name_or_path: a folder, a hub id, or None for the embedded default.
        device: as torch names it; None picks cuda, then mps, then cpu.
        dtype: "bfloat16", "float16", "float32" or "float64"; None picks bfloat16 where the device multiplies it
            natively, else float32.
        attn_implementation: "sdpa", "eager" or "flex_attention"; None leaves it to transformers.

    Raises:
        ValueError: when `attn_implementation` or `dtype` is none of those, or the model's files are damaged.
        OSError: when there is no such model.
        EmbeddedModelError: when the embedded default is neither cached nor reachable.
    """
    if attn_implementation not in (None, *ATTN_IMPLEMENTATIONS):
        raise ValueError(
            f"attn_implementation must be one of {', '.join(ATTN_IMPLEMENTATIONS)}, or None for the model's own, got "
            f"{attn_implementation!r}. The PIC mask has no other back-end."
        )
    name = EMBEDDED_NAME if name_or_path is None else str(name_or_path)
    source = find_model(name)
    where = resolve_device(device)
    computed_in = resolve_dtype(dtype, where)
    with quiet_loading(), _loading("weights", source):
        model = _load_model(source, computed_in, attn_implementation)
    with quiet_loading(), _loading("tokenizer", source):
        tokenizer = AutoTokenizer.from_pretrained(source)
    return Backbone(cast("Any", model).to(where).eval(), tokenizer, name)


def find_model(name: str) -> str:
    """Where transformers finds a model: the folder of the embedded default, fetched if it is not here yet, or the name.

    Raises:
        EmbeddedModelError: when the embedded default is neither cached nor reachable.
    """
    return str(embedded.generator_path()) if name == EMBEDDED_NAME else name


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: the model's own, else the tokenizer's."""
    ids = model.generation_config.eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    return frozenset() if ids is None else frozenset([ids] if isinstance(ids, int) else ids)


def _load_model(source: str, dtype: torch.dtype, attn_implementation: str | None) -> PreTrainedModel:
    exact = dtype != torch.float16
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype if exact else "auto", attn_implementation=attn_implementation
    )
    if exact:
        return model
    _digests_before_rounding[model] = _digest(model)
    return cast("Any", model).to(dtype)


@contextmanager
def _loading(part: str, source: str) -> Iterator[None]:
    """Say which file is damaged: what the libraries raise names neither it nor what to do."""
    try:
        yield
    except (OSError, ImportError, RuntimeError, TypeError):  # not there, a library is missing, no memory, wrong options
        raise
    except Exception as error:  # tokenizers and safetensors raise nothing more precise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"The model must be a causal LM with its tokenizer, whole, got {source!r}, whose {part} cannot be loaded: "
            f"{reason} Fetch it again, or name another folder or hub id."
        ) from error


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device to use: the given one, else cuda, mps or cpu, whichever is there first.

    Raises:
        ValueError: when torch knows no device of that name, or this machine has none.
    """
    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"device must be one that torch can use here, such as cpu or cuda, got {str(device)!r}: {reason} "
                "Leave it out to take the best there is."
            ) from error
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype to compute in: the given one, else bfloat16 where the device is fast at it, else float32.

    Raises:
        ValueError: when it is none that models compute in.
    """
    if dtype is None:
        fast = _cpu_multiplies_bfloat16() if device.type == "cpu" else device.type == "cuda"
        return torch.bfloat16 if fast else torch.float32
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in _DTYPES:
        raise ValueError(
            f"dtype must be one of {', '.join(str(each).removeprefix('torch.') for each in _DTYPES)}, got {dtype!r}."
        )
    return cast("torch.dtype", resolved)


def model_id(model: PreTrainedModel, name: str) -> str:
    """`name@digest`: 16 hex digits over a sample of every parameter, so that equal names cannot hide other weights.

    The sample is read in bfloat16, so the same checkpoint has the same digest in every precision it is loaded in. (In
    float16 it would be rounded twice: there it is taken of the weights as they lie on the disk.) A folder's name is its
    last part.
    """
    short = Path(name).name if Path(name).exists() else name
    return f"{short}@{_digests_before_rounding.get(model) or _digest(model)}"


def _digest(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for parameter_name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _DIGEST_SAMPLES)][:_DIGEST_SAMPLES]
        digest.update(f"{parameter_name}{tuple(parameter.shape)}".encode())
        digest.update(sample.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def generator_id(model: str, reader: Path | None, positions: GeneratorPositions) -> str:
    """The id of a generator with its reader adapter, and with how it reads: memories made for that suit nothing else.

    `name@digest`, then `+digest` of the reader, if there is one, then `~spread` where memory tokens are spread.
    """
    if reader is not None:
        digest = hashlib.sha256((reader / READER_WEIGHTS).read_bytes()).hexdigest()
        model = f"{model}+{digest[:16]}"
    return model if positions == "contiguous" else f"{model}~{positions}"


def same_model(one: str, other: str) -> bool:
    """Whether two ids are of the same weights, reader and way of reading, whatever the model is called.

    >>> same_model("SmolLM2@9ec930d6", "a-copy@9ec930d6"), same_model("SmolLM2@9ec930d6", "SmolLM2@0f59d511")
    (True, False)
    """
    return one.rpartition("@")[2] == other.rpartition("@")[2]


def plain_id(generator: str) -> str:
    """The id of the model alone, out of a `generator_id`.

    >>> plain_id("SmolLM2@9ec930d6+0f59d511~spread")
    'SmolLM2@9ec930d6'
    """
    name, _, digests = generator.rpartition("@")
    return f"{name}@{re.split('[+~]', digests)[0]}"


def _cpu_multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
