"""The pictures show the rule that the encoder follows, and the weights that it computes."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch

from pic_rag.compression.compressor import Compressor
from pic_rag.config import PicConfig
from pic_rag.inspection import draw_attention, draw_mask, mask_pattern, render_mask, slot_attention

SETTINGS = {"ratio": 2, "ratios": (2, 4), "slots_per_chunk": 2, "segment_tokens": 64, "encoder_layers": 3}
TEXT = "memory tokens look here"


@pytest.fixture(scope="module")
def compressor(tiny_model, tiny_tokenizer) -> Compressor:
    tiny_model.set_attn_implementation("eager")
    made = Compressor.from_base(tiny_model, tiny_tokenizer, PicConfig(**SETTINGS))
    tiny_model.set_attn_implementation("sdpa")
    return made


def test_the_text_rendering_is_the_rule_as_issue_and_design_state_it(tiny_tokenizer) -> None:
    assert render_mask(mask_pattern("abcdefg", tiny_tokenizer, PicConfig(**SETTINGS))) == "\n".join(
        [
            " a  x... ... .. ..",
            " b  xx.. ... .. ..",
            " c  xxx. ... .. ..",
            " d  xxxx ... .. ..",
            " e  xxxx x.. .. ..",
            " f  xxxx xx. .. ..",
            " g  xxxx xxx .. ..",
            "m0  xxxx ... x. ..",
            "m1  xxxx ... xx ..",
            "m2  .... xxx xx x.",
            "m3  .... xxx xx xx",
        ]
    )


@pytest.mark.parametrize(
    ("preset", "first_of_second_chunk", "last_slot"),
    [("local", " e  .... x... .. ..", "m3  .... xxxx .. xx"), ("global", " e  xxxx x... .. ..", "m3  xxxx xxxx xx xx")],
)
def test_a_preset_shows_in_the_rendering(tiny_tokenizer, preset, first_of_second_chunk, last_slot) -> None:
    lines = render_mask(mask_pattern("abcdefgh", tiny_tokenizer, PicConfig.preset(preset, **SETTINGS))).splitlines()
    assert (lines[4], lines[-1]) == (first_of_second_chunk, last_slot)


def test_labels_are_readable_where_tokens_are_not(tiny_tokenizer) -> None:
    assert mask_pattern("a\n b", tiny_tokenizer, PicConfig(**SETTINGS)).labels == ["a", "\\n", "_", "b", "m0", "m1"]


def test_only_the_first_segment_is_shown_and_less_on_request(tiny_tokenizer) -> None:
    config = PicConfig(**SETTINGS)
    assert mask_pattern("x" * 1000, tiny_tokenizer, config).text_tokens == 64
    assert mask_pattern("x" * 1000, tiny_tokenizer, config, max_tokens=10).text_tokens == 10


def test_a_text_without_tokens_is_an_error(tiny_tokenizer) -> None:
    with pytest.raises(ValueError, match="text must hold at least one token, got ''"):
        mask_pattern("", tiny_tokenizer, PicConfig(**SETTINGS))


def test_attention_is_a_distribution_over_what_the_mask_allows(compressor) -> None:
    attention = slot_attention(compressor, TEXT)
    slots, places = int(attention.pattern.is_slot.sum()), len(attention.pattern.labels)
    assert attention.weights.shape == (3, slots, places)
    torch.testing.assert_close(attention.weights.sum(-1), torch.ones(3, slots))
    allowed = attention.pattern.allowed[attention.pattern.is_slot]
    assert (attention.weights[:, torch.from_numpy(~allowed)] == 0).all()
    assert (attention.weights[:, torch.from_numpy(allowed)] > 0).all()


def test_the_ratio_decides_how_many_memory_tokens_look(compressor) -> None:
    assert slot_attention(compressor, TEXT, 2).weights.shape[1] == 12
    assert slot_attention(compressor, TEXT, 4).weights.shape[1] == 6


def test_looking_changes_nothing(compressor) -> None:
    before = compressor.compress([TEXT])[0].embeddings
    slot_attention(compressor, TEXT)
    assert torch.equal(compressor.compress([TEXT])[0].embeddings, before)
    assert not any(layer.self_attn._forward_hooks for layer in compressor.encoder.decoder.layers)


def test_only_eager_attention_can_be_shown(tiny_model, tiny_tokenizer) -> None:
    made = Compressor.from_base(tiny_model, tiny_tokenizer, PicConfig(**SETTINGS))
    with pytest.raises(ValueError, match="attn_implementation must be 'eager' .* got 'sdpa'"):
        slot_attention(made, TEXT)


def test_the_last_layers_are_the_last_layers(compressor) -> None:
    attention = slot_attention(compressor, TEXT)
    assert torch.equal(attention.last_layers(1), attention.weights[2])
    torch.testing.assert_close(attention.last_layers(2), (attention.weights[1] + attention.weights[2]) / 2)
    with pytest.raises(ValueError, match="layers must be from 1 to 3 .* got 4"):
        attention.last_layers(4)


def test_the_mask_picture_has_a_colour_for_every_kind_and_a_label_for_every_place(tiny_tokenizer) -> None:
    pattern = mask_pattern("abcdefgh", tiny_tokenizer, PicConfig(**SETTINGS))
    figure = draw_mask(pattern)
    image = figure.axes[0].images[0].get_array()
    assert np.array_equal(image > 0, pattern.allowed)
    assert (image[8, 0], image[8, 8], image[1, 0]) == (2, 3, 1)
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == pattern.labels
    assert len(figure.legends[0].get_texts()) == 4
    assert "ratio 2" in figure.get_suptitle()


def test_dollar_signs_are_labels_and_no_formula(tiny_tokenizer) -> None:
    file = io.BytesIO()
    draw_mask(mask_pattern("a$$b$", tiny_tokenizer, PicConfig(**SETTINGS))).savefig(file)
    assert file.getvalue().startswith(b"\x89PNG")


def test_many_places_get_numbers_in_place_of_tokens(tiny_tokenizer) -> None:
    figure = draw_mask(mask_pattern("x" * 64, tiny_tokenizer, PicConfig(**SETTINGS)))
    assert len(figure.axes[0].get_xticks()) < 20


@pytest.mark.parametrize(("per_layer", "panels"), [(False, 1), (True, 2)])
def test_the_heat_map_shows_the_weights_and_hides_what_the_mask_hides(compressor, per_layer, panels) -> None:
    attention = slot_attention(compressor, TEXT)
    figure = draw_attention(attention, layers=2, per_layer=per_layer)
    images = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(images) == panels
    shown = attention.weights[-2:] if per_layer else attention.last_layers(2)[None]
    for image, weights in zip(images, shown, strict=True):
        assert np.array_equal(image.mask, ~attention.pattern.allowed[attention.pattern.is_slot])
        assert np.array_equal(image.data, weights.numpy())


def test_a_figure_becomes_a_png(compressor) -> None:
    file = io.BytesIO()
    draw_attention(slot_attention(compressor, TEXT), layers=99).savefig(file)
    assert file.getvalue().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_names_the_extra(tiny_tokenizer, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'pic-rag\[plot\]'"):
        draw_mask(mask_pattern("abc", tiny_tokenizer, PicConfig(**SETTINGS)))
