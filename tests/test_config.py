"""Every setting of a compressor keeps its rule, and survives being written down."""

from __future__ import annotations

import dataclasses
import json

import pytest

from pic_rag.config import PRESETS, PicConfig


def test_presets_are_what_the_design_says():
    assert PRESETS == {
        "pic": {"text_scope": "segment", "memory_scope": "chunk+past", "positions": "spread"},
        "local": {"text_scope": "chunk", "memory_scope": "chunk", "positions": "spread"},
        "global": {"text_scope": "segment", "memory_scope": "segment", "positions": "append"},
    }
    assert PicConfig() == PicConfig.preset("pic")


def test_a_preset_can_be_overridden_field_by_field():
    config = PicConfig.preset("local", ratio=8, positions="append")
    assert (config.text_scope, config.ratio, config.positions) == ("chunk", 8, "append")


@pytest.mark.parametrize("preset", PRESETS)
def test_json_keeps_every_field(preset):
    config = PicConfig.preset(preset, ratio=16, ratios=(16, 32), encoder_layers=3, residual_pool=False)
    assert PicConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_field_has_help():
    assert all(field.metadata["help"] for field in dataclasses.fields(PicConfig))


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PicConfig().ratio = 8


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("ratio", 0, "ratio must be a whole number of 1 or more, got 0"),
        ("ratio", "4", "ratio must be a whole number of 1 or more, got '4'"),
        ("ratio", True, "ratio must be a whole number of 1 or more, got True"),
        ("ratio", 5, "ratio must be one of .*4, 8.*, got 5"),
        ("ratios", (), "ratios must be a list of at least one whole number"),
        ("ratios", 4, "ratios must be a list of at least one whole number, got 4"),
        ("ratios", (64, 4), r"ratios must be in increasing order without repeats, got \(64, 4\)"),
        ("ratios", (4, 4), "ratios must be in increasing order without repeats"),
        ("ratios", (4, -8), "ratios must be a whole number of 1 or more, got -8"),
        ("slots_per_chunk", 0, "slots_per_chunk must be a whole number of 1 or more, got 0"),
        ("slots_per_chunk", 1.5, "slots_per_chunk must be a whole number of 1 or more, got 1.5"),
        ("segment_tokens", 100, "segment_tokens must be a multiple of every ratio, got segment_tokens=100 and ratio=8"),
        ("text_scope", "document", "text_scope must be one of segment, chunk, got 'document'"),
        ("memory_scope", ["chunk"], "memory_scope must be one of chunk, chunk[+]past, segment"),
        ("positions", "middle", "positions must be one of spread, append, got 'middle'"),
        ("residual_pool", "yes", "residual_pool must be true or false, got 'yes'"),
        ("encoder_layers", 0, "encoder_layers must be a whole number of 1 or more, got 0"),
        ("lora_rank", -1, "lora_rank must be a whole number of 1 or more, got -1"),
        ("lora_rank", "32", "lora_rank must be a whole number of 1 or more, got '32'"),
        ("lora_alpha", 0, "lora_alpha must be a whole number of 1 or more, got 0"),
    ],
)
def test_a_field_that_breaks_its_rule_is_named_with_its_value(field, value, rule):
    with pytest.raises(ValueError, match=rule):
        PicConfig(**{field: value})


def test_an_unknown_field_is_named_beside_the_known_ones():
    with pytest.raises(ValueError, match="Unknown PicConfig field 'chunk_size'. Known fields: .*slots_per_chunk"):
        PicConfig.from_dict({"chunk_size": 4})
    with pytest.raises(ValueError, match="Unknown PicConfig field 'chunk_size'"):
        PicConfig.preset("pic", chunk_size=4)


@pytest.mark.parametrize("name", ["ICAE", "", ["pic"]])
def test_an_unknown_preset_is_named(name):
    with pytest.raises(ValueError, match="preset must be one of pic, local, global, got"):
        PicConfig.preset(name)


@pytest.mark.parametrize("ratio", [5, 0, -4, 4.0, "4", True])
def test_only_a_served_ratio_passes(ratio):
    with pytest.raises(ValueError, match="ratio must be one of 4, 8 .the ratios this compressor serves., got"):
        PicConfig(ratios=(4, 8)).check_ratio(ratio)


def test_no_ratio_means_the_default_one():
    assert PicConfig(ratio=8).check_ratio(None) == 8


@pytest.mark.parametrize(
    ("preset", "overrides", "foldable"),
    [
        ("local", {}, True),
        ("local", {"positions": "append"}, False),  # an appended slot's position depends on the whole segment
        ("local", {"text_scope": "segment"}, False),
        ("local", {"memory_scope": "chunk+past"}, False),
        ("pic", {}, False),
        ("global", {}, False),
    ],
)
def test_only_chunks_that_are_independent_of_each_other_fold(preset, overrides, foldable):
    assert PicConfig.preset(preset, **overrides).foldable is foldable
