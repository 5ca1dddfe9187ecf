"""A causal LM is loaded as asked for, or the request is refused by name."""

from __future__ import annotations

import shutil

import pytest
import torch

from pic_rag.compression.compressor import Compressor
from pic_rag.generation.generator import Generator
from pic_rag.models.backbone import load_backbone, model_id


@pytest.fixture(scope="module")
def folder(tiny_model, tiny_tokenizer, tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    tiny_model.save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    return base


@pytest.mark.parametrize("wrong", ["flash", "flash_attention_2", "SDPA", ""])
@pytest.mark.parametrize("load", [load_backbone, Generator.from_pretrained, Compressor.from_base])
def test_an_attention_back_end_that_has_no_pic_mask_is_refused_before_anything_is_loaded(load, wrong):
    rule = rf"attn_implementation must be one of sdpa, eager, flex_attention, or None .*, got '{wrong}'"
    with pytest.raises(ValueError, match=rule):
        load("/no/such/folder", attn_implementation=wrong)


@pytest.mark.parametrize("asked", ["sdpa", "eager", "flex_attention"])
def test_the_back_end_asked_for_is_used(folder, asked):
    model = load_backbone(folder, device="cpu", attn_implementation=asked).model
    assert model.config._attn_implementation == asked


@pytest.mark.parametrize("wrong", ["int8", "half32", torch.int64])
def test_a_dtype_that_does_not_compute_is_refused(folder, wrong):
    with pytest.raises(ValueError, match="^dtype must be one of float16, bfloat16, float32, float64, got"):
        load_backbone(folder, dtype=wrong)


@pytest.mark.parametrize("wrong", ["abacus", *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_device_that_is_not_here_is_refused(folder, wrong):
    with pytest.raises(ValueError, match=f"device must be one that torch can use here, .* got '{wrong}'"):
        load_backbone(folder, device=wrong)


def test_the_id_is_that_of_the_weights_in_any_precision_and_any_folder(folder, tiny_model):
    """Float16, too, which holds fewer small numbers than bfloat16, and rounds to others."""
    loaded = {dtype: load_backbone(folder, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16", "float16")}
    assert {backbone.ref.id for backbone in loaded.values()} == {model_id(tiny_model, folder.name)}
    assert [str(backbone.model.dtype).removeprefix("torch.") for backbone in loaded.values()] == list(loaded)
    assert not loaded["float32"].model.training


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("model.safetensors", None, "weights"),
        ("tokenizer.json", None, "tokenizer"),
        ("tokenizer.json", "{}", "tokenizer"),
        ("config.json", '{"model_type": "abacus"}', "weights"),
    ],
)
def test_a_damaged_model_is_named_with_the_part_that_is(folder, tmp_path, file, content, part):
    shutil.copytree(folder, tmp_path / "base")
    damaged = tmp_path / "base" / file
    damaged.write_bytes(damaged.read_bytes()[:100] if content is None else content.encode())
    with pytest.raises(ValueError, match=f"got '.*base', whose {part} cannot be loaded: .*Fetch it again"):
        load_backbone(tmp_path / "base")
