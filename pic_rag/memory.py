"""Memory: what a document becomes, and its bytes at rest.

At rest a memory is one safetensors file in bytes (never pickle): the embeddings, their scales if quantised, and
metadata strings. A CRC-32 over metadata and tensors turns every flipped bit into an error instead of a wrong answer.

Memory vectors differ in norm by orders of magnitude, and a frozen generator needs their norms: int8 and int4 therefore
keep one float32 scale per vector, so each value is off by at most half a step of its own vector.

This file does not know models, stores or prompts.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import KW_ONLY, dataclass
from typing import Literal, get_args

import safetensors
import safetensors.torch
import torch

from pic_rag.handles import make_handle

AtRest = Literal["bf16", "int8", "int4"]

FORMAT_VERSION = "1"

_LEVELS = {"int8": 127, "int4": 7}  # largest integer of each symmetric grid
_METADATA_NAMES = ("fingerprint", "ratio", "shape", "dtype", "at_rest", "source_hash", "text_tokens", "generator")
_TENSOR_DTYPES = {
    "bf16": {"embeddings": torch.bfloat16},
    "int8": {"embeddings": torch.int8, "scales": torch.float32},
    "int4": {"embeddings": torch.uint8, "scales": torch.float32},
}


class MemoryFormatError(ValueError):
    """Bytes that are not a memory, or not the memory that was asked for."""


def check_at_rest(at_rest: str) -> None:
    """Raise ValueError when that is no precision that memories are kept in."""
    if at_rest not in get_args(AtRest):
        raise ValueError(f"at_rest must be one of {', '.join(get_args(AtRest))}, got {at_rest!r}.")


def hash_text(text: str) -> str:
    """SHA-256 of a text in UTF-8, as 64 hex digits.

    Lone surrogates, which PDF extractors produce, have no UTF-8: they are hashed by their three surrogate bytes.
    """
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, eq=False)
class Memory:
    """A document as the generator reads it: embeddings and their provenance.

    Attributes:
        embeddings: `(memory_tokens, hidden)` vectors for the generator; `(0, hidden)` for an empty document.
        text_tokens: Tokens of the source text.
        ratio: Text tokens per memory token that the compressor aimed at.
        fingerprint: Fingerprint of the compressor that made it.
        source_hash: `hash_text` of the source text.
        generator: Model id ``"<name>@<16 hex>"`` of the generator that reads it.
        source: Label of the document for messages, such as its file name; not kept at rest.
        dtype: Compute dtype the compressor made it in, such as ``"bfloat16"``; part of the handle, so it outlives
            quantisation. Defaults to the dtype of the embeddings.
        fidelity: How much of the text the memory keeps, 0 to 1 (`Fidelity.score`); None where nobody has checked.

    Raises:
        TypeError: The embeddings are not a floating-point tensor.
        ValueError: The embeddings are not 2-D, a number is out of range or the dtype is unknown.
    """

    embeddings: torch.Tensor
    text_tokens: int
    ratio: int
    fingerprint: str
    source_hash: str
    generator: str
    source: str | None = None
    _: KW_ONLY
    dtype: str = ""
    fidelity: float | None = None

    def __post_init__(self) -> None:
        """Check every field once, where the memory is made."""
        if not isinstance(self.embeddings, torch.Tensor) or not self.embeddings.is_floating_point():
            got = getattr(self.embeddings, "dtype", type(self.embeddings).__name__)
            raise TypeError(f"embeddings must be a floating-point tensor, got {got}.")
        if self.embeddings.dim() != 2:
            shape = tuple(self.embeddings.shape)
            raise ValueError(f"embeddings must have the shape (memory_tokens, hidden), got {shape}.")
        if self.text_tokens < 0:
            raise ValueError(f"text_tokens must be at least 0, got {self.text_tokens}.")
        if self.ratio < 1:
            raise ValueError(f"ratio must be at least 1, got {self.ratio}.")
        if self.fidelity is not None and not 0 <= self.fidelity <= 1:
            raise ValueError(f"fidelity must be from 0 to 1, or None, got {self.fidelity}.")
        if not self.dtype:
            object.__setattr__(self, "dtype", str(self.embeddings.dtype).removeprefix("torch."))
        _resolve_dtype(self.dtype)

    @property
    def memory_tokens(self) -> int:
        """Memory tokens: rows of the embeddings."""
        return self.embeddings.shape[0]

    @property
    def hidden(self) -> int:
        """Width of the generator."""
        return self.embeddings.shape[1]

    @property
    def handle(self) -> str:
        """The handle that stands for this memory in a prompt."""
        return make_handle(
            source_hash=self.source_hash, fingerprint=self.fingerprint, ratio=self.ratio, dtype=self.dtype
        )

    @property
    def size_bytes(self) -> int:
        """Bytes of the embeddings as they are here, not at rest."""
        return self.embeddings.numel() * self.embeddings.element_size()

    def to_bytes(self, at_rest: AtRest = "bf16") -> bytes:
        """Write the memory as safetensors bytes.

        Args:
            at_rest: ``"bf16"``; ``"int8"``, half of that; or ``"int4"``, a quarter.

        Raises:
            ValueError: `at_rest` is none of the three, or the embeddings hold NaN or infinity.
        """
        check_at_rest(at_rest)
        if not bool(torch.isfinite(self.embeddings).all()):
            raise ValueError(
                f"embeddings of {self.source or self.handle} must be finite, got NaN or infinity. "
                "Check the compressor's weights, or compress in bfloat16 or float32 instead of float16."
            )
        tensors = _pack(self.embeddings.detach().cpu(), at_rest)
        metadata = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "ratio": str(self.ratio),
            "shape": json.dumps(list(self.embeddings.shape)),
            "dtype": self.dtype,
            "at_rest": at_rest,
            "source_hash": self.source_hash,
            "text_tokens": str(self.text_tokens),
            "generator": self.generator,
        }
        if self.fidelity is not None:
            metadata["fidelity"] = repr(self.fidelity)
        metadata["checksum"] = _checksum(metadata, tensors)
        return safetensors.torch.save(tensors, metadata)

    @classmethod
    def from_bytes(cls, data: bytes, *, source: str | None = None) -> Memory:
        """Read a memory written by `to_bytes`.

        Args:
            data: Safetensors bytes.
            source: Label of the document, for messages and for the memory's own `source`.

        Returns:
            The memory on the CPU, its embeddings in its compute dtype.

        Raises:
            MemoryFormatError: The bytes are truncated, corrupt, foreign or of another format version.
        """
        tensors, metadata = _read(data, source)
        try:
            embeddings = _unpack(tensors, metadata)
            return cls(
                embeddings=embeddings,
                text_tokens=int(metadata["text_tokens"]),
                ratio=int(metadata["ratio"]),
                fingerprint=metadata["fingerprint"],
                source_hash=metadata["source_hash"],
                generator=metadata["generator"],
                source=source,
                dtype=metadata["dtype"],
                fidelity=float(metadata["fidelity"]) if "fidelity" in metadata else None,
            )
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            raise _format_error(source, f"be consistent with its own metadata, got: {error}") from error


def _read(data: bytes, source: str | None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of safetensors bytes that are certainly ours and whole."""
    try:
        tensors = safetensors.torch.load(bytes(data))
        metadata = _read_metadata(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _format_error(source, f"be whole safetensors bytes, got {len(data)} bytes: {error}") from error
    version = metadata.get("format_version")
    if version is None:
        raise _format_error(source, "be written by pic-rag, got a safetensors file without format_version")
    if version != FORMAT_VERSION:
        raise _format_error(source, f"have format_version {FORMAT_VERSION}, got {version!r} (another pic-rag)")
    missing = [name for name in _METADATA_NAMES if name not in metadata]
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}  # the checksum does not cover them
    if missing or dtypes != _TENSOR_DTYPES.get(metadata["at_rest"]):
        raise _format_error(source, f"hold all its parts, got tensors {dtypes} and no metadata {missing}")
    if metadata.pop("checksum", None) != _checksum(metadata, tensors):
        raise _format_error(source, "match its checksum, got changed bytes")
    return tensors, metadata


def _read_metadata(data: bytes) -> dict[str, str]:
    """The metadata strings, which `safetensors.torch.load` drops: an 8-byte header size, then the JSON header."""
    header_bytes = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + header_bytes]).get("__metadata__") or {}


def _format_error(source: str | None, rule: str) -> MemoryFormatError:
    name = f"Memory of {source}" if source else "Memory"
    return MemoryFormatError(f"{name} must {rule}. Delete it and compress the document again.")


def _checksum(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> str:
    """CRC-32 over metadata and tensors, in hex, whatever order they were read in."""
    crc = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes(), crc)
    return f"{crc:08x}"


def _resolve_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must name a floating-point torch dtype, got {name!r}.")
    return dtype


def _pack(embeddings: torch.Tensor, at_rest: AtRest) -> dict[str, torch.Tensor]:
    """Tensors at rest of `(memory_tokens, hidden)` embeddings."""
    if at_rest == "bf16":
        return {"embeddings": embeddings.to(torch.bfloat16).contiguous()}
    levels = _LEVELS[at_rest]
    vectors = embeddings.to(torch.float32)
    largest = vectors.abs().amax(dim=1) if vectors.numel() else vectors.new_zeros(len(vectors))
    scales = largest / levels  # (memory_tokens,)
    steps = torch.where(scales > 0, scales, torch.ones_like(scales)).unsqueeze(1)  # a zero vector stays zero
    integers = (vectors / steps).round().clamp(-levels, levels).to(torch.int8)
    return {"embeddings": integers if at_rest == "int8" else _pack_nibbles(integers), "scales": scales}


def _unpack(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> torch.Tensor:
    """`(memory_tokens, hidden)` embeddings in their compute dtype, from tensors at rest."""
    memory_tokens, hidden = json.loads(metadata["shape"])
    values = tensors["embeddings"]
    if metadata["at_rest"] == "int4":
        values = _unpack_nibbles(values, hidden)
    if "scales" in tensors:
        values = values.to(torch.float32) * tensors["scales"].unsqueeze(1)
    if values.shape != (memory_tokens, hidden):
        raise ValueError(f"shape must be {(memory_tokens, hidden)}, got {tuple(values.shape)}.")
    dtype = _resolve_dtype(metadata["dtype"])
    # float16 ends at 65504, and bfloat16 rounds the last of it up to 65536: clamp, or it would become infinite.
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    return values.to(torch.float32).clamp(-largest, largest).to(dtype)


def _pack_nibbles(integers: torch.Tensor) -> torch.Tensor:
    """`(memory_tokens, ceil(hidden / 2))` bytes of integers in -7..7; the even column sits in the low half."""
    nibbles = (integers + 8).to(torch.uint8)  # 1..15
    if nibbles.shape[1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1), value=8)
    return (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).contiguous()


def _unpack_nibbles(packed: torch.Tensor, hidden: int) -> torch.Tensor:
    """`(memory_tokens, hidden)` integers from the bytes of `_pack_nibbles`."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)  # (memory_tokens, hidden or hidden + 1)
    return (nibbles[:, :hidden].to(torch.int8) - 8).contiguous()
