"""Memory: what a document becomes, and its bytes at rest."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch

from pic_rag.memory import AtRest, Memory, MemoryFormatError, _checksum, hash_text

AT_REST: list[AtRest] = ["bf16", "int8", "int4"]


def make_memory(memory_tokens: int = 5, hidden: int = 64, dtype: torch.dtype = torch.bfloat16) -> Memory:
    """A memory whose vectors differ in norm by four orders of magnitude, as trained ones do."""
    generator = torch.Generator().manual_seed(memory_tokens * 1000 + hidden)
    norms = torch.logspace(-2, 2, max(memory_tokens, 1))[:memory_tokens].unsqueeze(1)
    return Memory(
        embeddings=(torch.randn(memory_tokens, hidden, generator=generator) * norms).to(dtype),
        text_tokens=16 * memory_tokens,
        ratio=16,
        fingerprint="f" * 64,
        source_hash=hash_text("a text"),
        generator="tiny@0123456789abcdef",
        source="paper.pdf",
    )


def provenance(memory: Memory) -> tuple[object, ...]:
    """Everything but the embeddings and the label."""
    return (
        memory.text_tokens, memory.ratio, memory.fingerprint, memory.source_hash, memory.generator, memory.dtype,
    )  # fmt: skip


@pytest.mark.parametrize("at_rest", AT_REST)
@pytest.mark.parametrize("shape", [(5, 64), (1, 1), (3, 7), (0, 64), (0, 7)])
def test_provenance_and_shape_survive_rest(shape: tuple[int, int], at_rest: AtRest) -> None:
    """Odd widths and empty documents too: the handle, and so the cache, stays the same."""
    memory = make_memory(*shape)
    restored = Memory.from_bytes(memory.to_bytes(at_rest), source="paper.pdf")
    assert restored.embeddings.shape == shape
    assert restored.embeddings.dtype == torch.bfloat16
    assert provenance(restored) == provenance(memory)
    assert restored.handle == memory.handle
    assert restored.source == "paper.pdf"


def test_bf16_is_exact_for_a_bf16_memory() -> None:
    """The default at rest loses nothing."""
    memory = make_memory()
    assert torch.equal(Memory.from_bytes(memory.to_bytes()).embeddings, memory.embeddings)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_other_compute_dtypes_rest_in_bf16_and_come_back_in_their_own(dtype: torch.dtype) -> None:
    """A float32 memory is stored in half the bytes, within bf16's rounding, and its handle still says float32."""
    memory = make_memory(dtype=dtype)
    data = memory.to_bytes()
    assert safetensors.torch.load(data)["embeddings"].dtype == torch.bfloat16
    restored = Memory.from_bytes(data)
    assert restored.embeddings.dtype == dtype
    assert restored.handle == memory.handle
    torch.testing.assert_close(restored.embeddings, memory.embeddings, rtol=2**-8, atol=1e-6)


def test_the_largest_float16_does_not_become_infinite_at_rest() -> None:
    """bfloat16 rounds 65504 up to 65536, which float16 does not have."""
    memory = replace(make_memory(), embeddings=torch.full((1, 4), 65504.0, dtype=torch.float16), dtype="float16")
    assert torch.isfinite(Memory.from_bytes(memory.to_bytes()).embeddings).all()


@pytest.mark.parametrize(("at_rest", "levels"), [("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("hidden", [64, 33])
def test_quantised_values_are_off_by_half_a_step_of_their_own_vector(at_rest: AtRest, levels: int, hidden: int) -> None:
    """One scale per vector: a small vector beside a large one keeps its precision."""
    memory = make_memory(memory_tokens=9, hidden=hidden, dtype=torch.float32)
    restored = Memory.from_bytes(memory.to_bytes(at_rest)).embeddings
    step = memory.embeddings.abs().amax(dim=1, keepdim=True) / levels
    error = (restored - memory.embeddings).abs()
    assert (error <= step * 0.5001).all()
    assert (error.amax(dim=1, keepdim=True) > step * 0.25).all()  # the bound is tight: it really was quantised


@pytest.mark.parametrize("at_rest", ["int8", "int4"])
def test_a_zero_vector_stays_zero(at_rest: AtRest) -> None:
    """A vector without a largest value must not become NaN."""
    embeddings = make_memory(dtype=torch.float32).embeddings
    embeddings[2] = 0
    restored = Memory.from_bytes(replace(make_memory(), embeddings=embeddings).to_bytes(at_rest)).embeddings
    assert torch.equal(restored[2], torch.zeros_like(restored[2]))
    assert torch.isfinite(restored).all()


def test_int8_halves_and_int4_quarters_the_bytes() -> None:
    """The reason to quantise: what a wide generator's memories cost on disk."""
    memory = make_memory(memory_tokens=64, hidden=2048)
    sizes = {at_rest: len(memory.to_bytes(at_rest)) for at_rest in AT_REST}
    assert sizes["int8"] < 0.51 * sizes["bf16"]
    assert sizes["int4"] < 0.26 * sizes["bf16"]
    assert memory.size_bytes == 64 * 2048 * 2 < sizes["bf16"]


@pytest.mark.parametrize("at_rest", AT_REST)
def test_every_truncation_is_an_error_that_names_the_document(at_rest: AtRest) -> None:
    """A half-written value is never taken for a memory."""
    data = make_memory(memory_tokens=2, hidden=8).to_bytes(at_rest)
    for size_bytes in range(len(data)):
        with pytest.raises(MemoryFormatError, match=r"Memory of paper\.pdf must .* compress the document again"):
            Memory.from_bytes(data[:size_bytes], source="paper.pdf")


@pytest.mark.parametrize("at_rest", AT_REST)
def test_no_flipped_bit_changes_a_memory_unnoticed(at_rest: AtRest) -> None:
    """Each flip is an error, or touches nothing that is read."""
    memory = make_memory(memory_tokens=2, hidden=8)
    data = memory.to_bytes(at_rest)
    expected = Memory.from_bytes(data)
    generator = random.Random(0)
    caught = 0
    for _ in range(1500):
        flipped = bytearray(data)
        flipped[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        try:
            restored = Memory.from_bytes(bytes(flipped))
        except MemoryFormatError:
            caught += 1
        else:
            assert torch.equal(restored.embeddings, expected.embeddings)
            assert provenance(restored) == provenance(expected)
    assert caught > 1400


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "got 0 bytes"),
        (b"not a tensor at all", "whole safetensors"),
        (safetensors.torch.save({"embeddings": torch.zeros(2, 2)}), "without format_version"),
        (safetensors.torch.save({"x": torch.zeros(2)}, {"format_version": "1"}), "hold all its parts"),
        (safetensors.torch.save({"x": torch.zeros(2)}, {"format_version": "99"}), "format_version 1, got '99'"),
    ],
)
def test_foreign_bytes_are_told_apart(data: bytes, message: str) -> None:
    """The message says what is wrong with them."""
    with pytest.raises(MemoryFormatError, match=message):
        Memory.from_bytes(data)


def rewritten(data: bytes, change: dict[str, str], *, checksum: bool) -> bytes:
    """The same tensors under changed metadata, with or without a checksum that agrees."""
    header_bytes = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + header_bytes])["__metadata__"] | change
    tensors = safetensors.torch.load(data)
    if checksum:
        del metadata["checksum"]
        metadata["checksum"] = _checksum(metadata, tensors)
    return safetensors.torch.save(tensors, metadata)


def test_metadata_edited_at_rest_is_an_error() -> None:
    """The checksum covers the provenance too: nobody's memory becomes another document's."""
    data = make_memory().to_bytes()
    assert Memory.from_bytes(rewritten(data, {}, checksum=False)).source_hash == make_memory().source_hash
    with pytest.raises(MemoryFormatError, match="match its checksum"):
        Memory.from_bytes(rewritten(data, {"source_hash": hash_text("another text")}, checksum=False))


@pytest.mark.parametrize(
    "change",
    [{"shape": "[5, 65]"}, {"shape": "five"}, {"ratio": "0"}, {"text_tokens": "many"}, {"dtype": "int32"}],
)
@pytest.mark.parametrize("at_rest", AT_REST)
def test_a_writer_that_contradicts_itself_is_an_error(change: dict[str, str], at_rest: AtRest) -> None:
    """A checksum proves that bytes are as written, not that they were written right."""
    with pytest.raises(MemoryFormatError, match="be consistent with its own metadata"):
        Memory.from_bytes(rewritten(make_memory().to_bytes(at_rest), change, checksum=True))


@pytest.mark.parametrize("at_rest", AT_REST)
@pytest.mark.parametrize("change", ["one dimension", "no dimension", "no metadata"])
def test_tensors_of_another_kind_are_an_error(change: str, at_rest: AtRest) -> None:
    data = make_memory().to_bytes(at_rest)
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    tensors = safetensors.torch.load(data)
    if change == "no metadata":
        header = json.dumps({"__metadata__": None}).encode()
        with pytest.raises(MemoryFormatError, match="whole safetensors bytes|without format_version"):
            Memory.from_bytes(len(header).to_bytes(8, "little") + header)
        return
    changed = {
        "one dimension": lambda tensor: tensor.flatten(),
        "no dimension": lambda tensor: tensor.flatten()[0].clone(),
    }[change]
    tensors = {name: changed(tensor) for name, tensor in tensors.items()}
    del metadata["checksum"]
    metadata["checksum"] = _checksum(metadata, tensors)
    with pytest.raises(MemoryFormatError, match="be consistent with its own metadata"):
        Memory.from_bytes(safetensors.torch.save(tensors, metadata))


@pytest.mark.parametrize(
    ("at_rest", "written", "read"),
    [
        ("bf16", "BF16", "F16"),
        ("int8", "I8", "U8"),
        ("int8", "F32", "I32"),
        ("int4", "U8", "I8"),
        ("int4", "F32", "U32"),
    ],
)
def test_a_tensor_under_another_dtype_is_an_error(at_rest: AtRest, written: str, read: str) -> None:
    """The checksum covers bytes, not how they are to be read: as many of them would pass for another memory."""
    data = make_memory().to_bytes(at_rest)
    changed = data.replace(f'"dtype":"{written}"'.encode(), f'"dtype":"{read}"'.encode())
    header_bytes = int.from_bytes(data[:8], "little") + len(changed) - len(data)
    with pytest.raises(MemoryFormatError, match="hold all its parts, got tensors"):
        Memory.from_bytes(header_bytes.to_bytes(8, "little") + changed[8:])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_memory_that_is_not_finite_is_never_stored(value: float) -> None:
    """It would poison every later answer."""
    embeddings = torch.ones(2, 4)
    embeddings[1, 2] = value
    with pytest.raises(ValueError, match=r"embeddings of paper\.pdf must be finite"):
        replace(make_memory(), embeddings=embeddings).to_bytes()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"embeddings": torch.zeros(4)}, ValueError, r"got \(4,\)"),
        ({"embeddings": torch.zeros(2, 2, dtype=torch.int64)}, TypeError, r"got torch\.int64"),
        ({"embeddings": [[0.0]]}, TypeError, "got list"),
        ({"text_tokens": -1}, ValueError, "text_tokens must be at least 0, got -1"),
        ({"ratio": 0}, ValueError, "ratio must be at least 1, got 0"),
        ({"dtype": "int32"}, ValueError, "got 'int32'"),
        ({"dtype": "nonsense"}, ValueError, "got 'nonsense'"),
    ],
)
def test_an_impossible_memory_cannot_be_made(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """Each rule names the field and the value."""
    with pytest.raises(error, match=message):
        replace(make_memory(), **change)


def test_an_unknown_way_to_rest_names_the_three() -> None:
    """A typing mistake costs one look at the message."""
    with pytest.raises(ValueError, match="one of bf16, int8, int4, got 'fp8'"):
        make_memory().to_bytes("fp8")  # type: ignore[arg-type]


def test_the_dtype_defaults_to_that_of_the_embeddings_and_outlives_a_cast() -> None:
    """The handle follows the dtype a memory was made in, not the one it is held in."""
    memory = make_memory()
    assert memory.dtype == "bfloat16"
    assert replace(memory, embeddings=memory.embeddings.float()).handle == memory.handle
    assert replace(memory, dtype="float32").handle != memory.handle


def test_a_restored_memory_does_not_share_its_bytes() -> None:
    """Writing to the embeddings leaves the value as it was."""
    data = make_memory().to_bytes()
    before = bytes(data)
    Memory.from_bytes(data).embeddings.zero_()
    assert data == before


def test_text_hash_is_sha256_of_utf8_and_total() -> None:
    """Any Python string has a hash, also one with the lone surrogates that PDF extractors produce."""
    assert hash_text("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert hash_text("é") != hash_text("e\u0301")
    assert hash_text("\ud800") != hash_text("\ud801")
