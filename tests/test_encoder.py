"""What reaches a memory token through a real model, on every attention back-end."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
)

from pic_rag.chunking import fold, place_slots
from pic_rag.config import PRESETS, PicConfig
from pic_rag.encoder import PicEncoder
from pic_rag.layout import build_layout

RATIO, SLOTS_PER_CHUNK = 4, 2
CHUNK_TOKENS = RATIO * SLOTS_PER_CHUNK
TOKENS = 29  # three full chunks and a short one


@pytest.fixture(autouse=True)
def _fixed_shapes():
    """A second shape makes torch.compile go dynamic, and torch 2.13's FlexAttention for CPUs then fails to compile."""
    torch.compiler.reset()


def _config(preset="pic", **overrides):
    return PicConfig.preset(preset, segment_tokens=64, lora_rank=4, lora_alpha=2, residual_pool=False, **overrides)


def _encoder(model, config, backend="sdpa", dtype=torch.float32):
    """An encoder whose trained weights are random, so that everything it attends to shows in its memories."""
    base = copy.deepcopy(model).to(dtype)
    base.set_attn_implementation(backend)
    encoder = PicEncoder(base, config, base.get_input_embeddings()).eval()
    generator = torch.Generator().manual_seed(1)
    state = {
        name: torch.randn(tensor.shape, generator=generator).to(tensor.dtype) * 0.2
        for name, tensor in encoder.trained_state().items()
    }
    encoder.load_trained_state(state)
    return encoder


def _tokens(seed, count=TOKENS):
    return np.random.default_rng(seed).integers(3, 250, size=count)


def _segment(token_ids):
    return place_slots(token_ids, RATIO, SLOTS_PER_CHUNK)


@torch.inference_mode()
def _encode(encoder, segments, row_places=0):
    return encoder(build_layout(segments, positions=encoder.config.positions, row_places=row_places))


def _reach(encoder):
    """`(tokens, slots)` bool: whether the memory token changes with the text token."""
    token_ids = _tokens(0)
    before = _encode(encoder, [_segment(token_ids)])
    changed = []
    for place in range(TOKENS):
        edited = token_ids.copy()
        edited[place] = (edited[place] + 100) % 250 + 3
        changed.append((_encode(encoder, [_segment(edited)]) != before).any(1))
    return torch.stack(changed)


def _expected_reach(preset):
    segment = _segment(_tokens(0))
    token_chunk = torch.arange(TOKENS)[:, None] // CHUNK_TOKENS
    slot_chunk = torch.from_numpy(segment.chunk)[None]
    if preset == "global":
        return torch.ones(TOKENS, len(segment.chunk), dtype=torch.bool)
    return token_chunk == slot_chunk if preset == "local" else token_chunk <= slot_chunk


@pytest.mark.parametrize(
    ("preset", "backend"),
    [("pic", "flex_attention")]
    + [pytest.param(preset, "flex_attention", marks=pytest.mark.slow) for preset in ("local", "global")]
    + [(preset, backend) for preset in PRESETS for backend in ("eager", "sdpa")],
)
def test_editing_a_token_changes_exactly_the_memories_in_its_reach_and_no_bit_of_the_others(
    tiny_model, preset, backend
):
    assert torch.equal(_reach(_encoder(tiny_model, _config(preset), backend)), _expected_reach(preset))


def test_editing_a_token_leaves_other_memories_alone_in_bfloat16_too(tiny_model):
    reach = _reach(_encoder(tiny_model, _config("pic"), "sdpa", torch.bfloat16))
    assert not (reach & ~_expected_reach("pic")).any()
    assert reach.any(0).all()


def test_slots_hand_on_earlier_chunks_from_layer_to_layer(tiny_model):
    """With text kept in its chunk only earlier slots can carry it on: not in one layer, in two they do."""
    scopes = {"text_scope": "chunk", "memory_scope": "chunk+past"}
    one = _reach(_encoder(tiny_model, _config("pic", encoder_layers=1, **scopes)))
    two = _reach(_encoder(tiny_model, _config("pic", encoder_layers=2, **scopes)))
    local, pic = _expected_reach("local"), _expected_reach("pic")
    assert not (one & ~local).any()
    assert (one & local).any(0).all()
    assert not (two & ~pic).any()
    assert (two & ~local).any(0)[SLOTS_PER_CHUNK:].all()


def _distance(tiny_model, preset, backend, dtype):
    """Largest relative distance of a memory token from the one that eager attention makes in float32."""
    segments = [_segment(_tokens(seed, count)) for seed, count in enumerate([29, 8, 3])]
    calm = copy.deepcopy(tiny_model)  # a random model is chaotic in bfloat16, whatever the attention
    with torch.no_grad():
        for parameter in calm.model.layers.parameters():
            parameter.mul_(0.3)
    exact = _encode(_encoder(calm, _config(preset), "eager"), segments, 64)
    memory = _encode(_encoder(calm, _config(preset), backend, dtype), segments, 64)
    assert memory.dtype == dtype
    return ((memory.float() - exact).norm(dim=1) / exact.norm(dim=1)).max().item()


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_dense_back_ends_agree(tiny_model, preset, dtype):
    assert _distance(tiny_model, preset, "eager", dtype) < TOLERANCE[dtype]
    assert _distance(tiny_model, preset, "sdpa", dtype) < TOLERANCE[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("preset", PRESETS)
def test_flex_agrees_with_the_dense_back_ends(tiny_model, preset, dtype):
    assert _distance(tiny_model, preset, "flex_attention", dtype) < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_folded_chunks_equal_the_dense_mask(tiny_model, backend):
    config = _config("local")
    assert config.foldable
    encoder = _encoder(tiny_model, config, backend)
    segment = _segment(_tokens(0))
    torch.testing.assert_close(_encode(encoder, fold(segment)), _encode(encoder, [segment]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("preset", PRESETS)
def test_what_stands_in_the_padding_moves_nothing(tiny_model, preset, backend):
    encoder = _encoder(tiny_model, _config(preset), backend)
    layout = build_layout([_segment(_tokens(0)), _segment(_tokens(1, 5))], positions=encoder.config.positions)
    padding = layout.segment < 0
    assert padding.any()
    poison = replace(
        layout,
        token_ids=layout.token_ids.masked_fill(padding, 259),
        position_ids=layout.position_ids.masked_fill(padding, 1999),
        is_slot=layout.is_slot.clone(),
    )
    embeddings = encoder.decoder.get_input_embeddings()
    with torch.inference_mode():
        clean = encoder(layout)
        huge = torch.cat([embeddings.weight, torch.full_like(embeddings.weight[:1], 1e4)])
    embeddings.weight = torch.nn.Parameter(huge.clone(), requires_grad=False)
    with torch.inference_mode():
        poisoned = encoder(poison)
    assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("preset", PRESETS)
def test_packed_rows_equal_single_rows(tiny_model, preset):
    encoder = _encoder(tiny_model, _config(preset))
    segments = [_segment(_tokens(seed, count)) for seed, count in enumerate([29, 1, 8, 3, 12, 30])]
    packed = _encode(encoder, segments, row_places=64)
    assert build_layout(segments, positions="spread", row_places=64).token_ids.shape[0] < len(segments)
    single = torch.cat([_encode(encoder, [segment]) for segment in segments])
    torch.testing.assert_close(packed, single, rtol=1e-4, atol=1e-4)


def test_an_untrained_encoder_is_a_mean_pooler(tiny_model):
    embeddings = tiny_model.get_input_embeddings()
    encoder = PicEncoder(tiny_model, PicConfig(segment_tokens=64), embeddings).eval()
    segment = _segment(_tokens(0))
    memory = _encode(encoder, [segment])
    table = embeddings.weight.detach()
    spans = zip(segment.start, segment.stop, strict=True)
    pooled = torch.stack([table[segment.token_ids[start:stop]].mean(0) for start, stop in spans])
    torch.testing.assert_close(memory, pooled)


def test_the_pool_weighs_a_span_by_what_its_tokens_tell(tiny_model):
    embeddings = tiny_model.get_input_embeddings()
    encoder = PicEncoder(tiny_model, PicConfig(segment_tokens=64), embeddings).eval()
    counts = torch.full((len(embeddings.weight),), 1_000_000)
    counts[7] = 0  # a rare token among common ones
    encoder.pool.start_at(counts)
    memory = _encode(encoder, [_segment(np.array([5, 7, 9, 11, 20, 21, 22, 23]))])
    torch.testing.assert_close(memory[0], embeddings.weight[7], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(memory[1], embeddings.weight[20:24].mean(0))


def test_the_pool_reads_nothing_beyond_its_chunk(tiny_model):
    encoder = _encoder(tiny_model, replace(_config("local"), residual_pool=True))
    token_ids = _tokens(0)
    edited = token_ids.copy()
    edited[CHUNK_TOKENS + 1] += 1  # in the second chunk
    before, after = _encode(encoder, [_segment(token_ids)]), _encode(encoder, [_segment(edited)])
    moved = (before != after).any(-1).view(-1).nonzero().flatten().tolist()
    assert set(moved) <= {2, 3}
    assert moved


def test_without_the_residual_pool_an_untrained_encoder_says_nothing(tiny_model):
    encoder = PicEncoder(tiny_model, _config(), tiny_model.get_input_embeddings()).eval()
    assert not _encode(encoder, [_segment(_tokens(0))]).any()


def test_the_encoder_keeps_its_own_copy_of_the_first_layers(tiny_model):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    encoder = _encoder(tiny_model, _config(encoder_layers=3))
    encoder.merge_lora()
    assert len(encoder.decoder.layers) == encoder.decoder.config.num_hidden_layers == 3
    assert len(tiny_model.model.layers) == tiny_model.config.num_hidden_layers == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.state_dict().items())


def test_the_encoder_shares_the_token_embeddings_of_its_base_only_where_it_is_told_to(tiny_model):
    base = copy.deepcopy(tiny_model)
    weight = base.get_input_embeddings().weight
    apart = PicEncoder(base, _config(), base.get_input_embeddings())
    assert apart.token_embedding_weight is not weight
    assert weight.requires_grad
    shared = PicEncoder(base, _config(), base.get_input_embeddings(), share_embeddings=True)
    assert shared.token_embedding_weight is weight


def test_merging_the_lora_keeps_memories_and_trained_state(tiny_model):
    encoder = _encoder(tiny_model, _config())
    segment, state = _segment(_tokens(0)), {name: t.clone() for name, t in encoder.trained_state().items()}
    before = _encode(encoder, [segment])
    encoder.merge_lora()
    torch.testing.assert_close(_encode(encoder, [segment]), before, rtol=1e-3, atol=1e-3)
    after = encoder.trained_state()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())


def test_only_lora_slot_embedding_and_converter_are_trained(tiny_model):
    encoder = PicEncoder(tiny_model, _config(), tiny_model.get_input_embeddings())
    trainable = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert trainable == encoder.trained_state().keys()
    assert "slot_embedding" in trainable
    assert {name.split(".")[0] for name in trainable} == {"slot_embedding", "converter", "decoder"}
    assert all("lora_" in name for name in trainable if name.startswith("decoder"))
    layers = {name for name in trainable if "lora_A" in name}
    assert len(layers) == 4 * 7  # every linear of every layer


def test_lora_rank_zero_means_no_lora(tiny_model):
    config = PicConfig(segment_tokens=64, lora_rank=0)
    names = PicEncoder(tiny_model, config, tiny_model.get_input_embeddings()).trained_state()
    assert not [name for name in names if "lora" in name]


def test_more_layers_than_the_model_has_is_an_error(tiny_model):
    with pytest.raises(ValueError, match="encoder_layers must be at most 4 .the base model's layers., got 5"):
        PicEncoder(tiny_model, _config(encoder_layers=5), tiny_model.get_input_embeddings())


def test_a_model_without_rotary_positions_is_an_error():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="must be a causal LM with rotary positions, got GPT2LMHeadModel"):
        PicEncoder(model, _config(), model.get_input_embeddings())


@pytest.mark.parametrize(
    ("config", "options"),
    [(Lfm2Config, {"layer_types": ["conv", "full_attention"]}), (FalconH1Config, {"mamba_d_ssm": 64})],
)
def test_a_model_with_layers_that_no_mask_restricts_is_an_error(config, options):
    """Its convolutions and recurrent states would carry one document into the next."""
    sizes = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "mamba_n_heads": 4}
    model = AutoModelForCausalLM.from_config(config(**sizes, **heads, **options))
    with pytest.raises(ValueError, match="must mix places by attention alone, got (Lfm2|FalconH1)ForCausalLM"):
        PicEncoder(model, _config(), model.get_input_embeddings())


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_weights_of_another_compressor_are_refused_by_name(tiny_model, change):
    encoder = PicEncoder(tiny_model, _config(), tiny_model.get_input_embeddings())
    state = encoder.trained_state()
    if change == "missing":
        del state["slot_embedding"]
    elif change == "unknown":
        state["slot_offset"] = torch.zeros(3)
    else:
        state["slot_embedding"] = torch.zeros(3)
    with pytest.raises(ValueError, match="Checkpoint tensor 'slot_(embedding|offset)' must have the shape .*, got"):
        encoder.load_trained_state(state)


def test_a_slot_has_the_scale_that_the_model_gives_its_token_embeddings():
    config = Gemma3TextConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    encoder = PicEncoder(model, _config(), model.get_input_embeddings())
    seen = []
    encoder.decoder.register_forward_pre_hook(
        lambda _, __, named: seen.append(named["inputs_embeds"]), with_kwargs=True
    )
    layout = build_layout([_segment(_tokens(0))], positions="spread")
    with torch.inference_mode():
        encoder(layout)
    slots = seen[0][layout.slot_row, layout.slot_place]
    torch.testing.assert_close(slots, 8 * encoder.slot_embedding.expand_as(slots))
