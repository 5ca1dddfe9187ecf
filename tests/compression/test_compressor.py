"""Texts in, memories out: right for every model family, every text, and every way to get it wrong."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from pic_rag.compression.compressor import Compressor
from pic_rag.config import PicConfig
from pic_rag.generation.generator import Generator
from pic_rag.models.checkpoint import Checkpoint

CONFIG = PicConfig(segment_tokens=64, ratios=(4, 8, 16), lora_rank=4)
TEXTS = [
    "The harbour lay still, and nobody spoke before the bell rang. " * 4,
    "x",
    "",
    "Bees dance to tell each other where the flowers are.",
]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory, tiny_model, tiny_tokenizer):
    """The tiny model, saved as transformers saves it."""
    folder = tmp_path_factory.mktemp("base")
    copy.deepcopy(tiny_model).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def _train(compressor, folder, seed=1):
    """Save the compressor with random trained weights, so that its memories say more than the mean of the text."""
    generator = torch.Generator().manual_seed(seed)
    kept = compressor.checkpoint
    weights = {
        name: torch.randn(tensor.shape, generator=generator) * 0.1 for name, tensor in sorted(kept.weights.items())
    }
    Checkpoint(kept.config, kept.base, kept.generator, weights).save(folder)
    return folder


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory, base_folder):
    untrained = Compressor.from_base(str(base_folder), config=CONFIG, device="cpu", dtype="float32")
    return _train(untrained, tmp_path_factory.mktemp("trained"))


def _load(folder, **options):
    return Compressor.from_pretrained(folder, **{"device": "cpu", "dtype": "float32", **options})


@pytest.fixture(scope="module")
def compressor(trained_folder):
    return _load(trained_folder)


FAMILIES = {
    "llama": LlamaConfig(),
    "qwen2": Qwen2Config(use_sliding_window=True, max_window_layers=1, sliding_window=16),
    "qwen3": Qwen3Config(head_dim=16),
    "mistral": MistralConfig(head_dim=16, sliding_window=16),
    "gemma2": Gemma2Config(head_dim=16, query_pre_attn_scalar=16, sliding_window=16),
    "gemma3": Gemma3TextConfig(head_dim=16, query_pre_attn_scalar=16, sliding_window=16),
}


def _family(name, tokenizer):
    values = FAMILIES[name].to_dict()
    for derived in ("layer_types", "head_dim", "transformers_version"):
        values.pop(derived, None)
    values |= {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(type(FAMILIES[name])(**values)).eval()


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_the_rule_and_starts_as_a_mean_pooler(family, backend, tiny_tokenizer, tmp_path):
    model = _family(family, tiny_tokenizer)
    if (family, backend) == ("gemma2", "sdpa"):
        backend = None  # transformers refuses it; the default has to work all the same
    else:
        model.set_attn_implementation(backend)
    untrained = Compressor.from_base(model, tiny_tokenizer, CONFIG)
    text = "The harbour lay still, and nobody spoke before"  # 46 tokens: chunks of 16
    ids = torch.tensor(tiny_tokenizer(text)["input_ids"])
    with torch.no_grad():
        pooled = torch.stack([model.get_input_embeddings()(part).mean(0) for part in ids[:32].split(4)])
    torch.testing.assert_close(untrained.compress([text])[0].embeddings[:8], pooled)
    for base in (model, copy.deepcopy(model)):
        base.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    folder = _train(untrained, tmp_path / "compressor")
    trained = _load(folder, base_model=tmp_path / "base", attn_implementation=backend)
    edited = text[:20] + "Q" + text[21:]
    before, after = (trained.compress([each])[0].embeddings for each in (text, edited))
    assert torch.equal(before[:4], after[:4])
    assert (before[4:] != after[4:]).any(1).all()


@pytest.mark.parametrize("ratio", [4, 8, 16])
def test_a_memory_has_ceil_n_over_ratio_tokens_and_says_where_it_comes_from(compressor, ratio):
    for text, memory in zip(TEXTS, compressor.compress(TEXTS, ratio=ratio), strict=True):
        assert memory.text_tokens == len(text)  # the tiny tokenizer makes a token of every byte
        assert memory.memory_tokens == -(-len(text) // ratio)
        assert memory.hidden == compressor.hidden == 64
        assert (memory.ratio, memory.dtype, memory.fingerprint) == (ratio, "float32", compressor.fingerprint)
        assert memory.handle == compressor.handle(text, ratio)
        assert memory.generator == compressor.generator.id


def test_empty_text_gives_an_empty_memory(compressor):
    [memory] = compressor.compress([""])
    assert memory.embeddings.shape == (0, 64)
    assert memory.text_tokens == 0
    assert compressor.compress([]) == []


@pytest.mark.parametrize("preset", ["pic", "local", "global"])
def test_a_batch_of_n_equals_n_batches_of_one(preset, base_folder, tmp_path):
    config = PicConfig.preset(preset, segment_tokens=64, ratios=(4, 8, 16), lora_rank=4)
    untrained = Compressor.from_base(str(base_folder), config=config, device="cpu", dtype="float32")
    compressor = _load(_train(untrained, tmp_path))
    together = compressor.compress(TEXTS)
    for text, memory in zip(TEXTS, together, strict=True):
        [alone] = compressor.compress([text], batch_size=1)
        torch.testing.assert_close(memory.embeddings, alone.embeddings, rtol=1e-4, atol=1e-4)


def test_any_iterable_of_texts_is_compressed_whole(compressor):
    memories = compressor.compress(text for text in TEXTS)
    assert [memory.handle for memory in memories] == [compressor.handle(text) for text in TEXTS]


def test_save_and_load_keep_memories_and_fingerprint(compressor, tmp_path):
    compressor.save_pretrained(tmp_path / "copy")
    again = _load(tmp_path / "copy")
    assert again.fingerprint == compressor.fingerprint
    for one, other in zip(compressor.compress(TEXTS), again.compress(TEXTS), strict=True):
        assert torch.equal(one.embeddings, other.embeddings)
        assert one.handle == other.handle


def test_a_save_that_fails_before_anything_is_replaced_loses_nothing(tmp_path, monkeypatch):
    shipped = Checkpoint.load()
    shipped.save(tmp_path)

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("pic_rag.models.checkpoint.shutil.copytree", full)
    with pytest.raises(OSError, match="No space left"):
        shipped.save(tmp_path)
    assert Checkpoint.load(tmp_path).fingerprint == shipped.fingerprint


@pytest.mark.parametrize("cut_at", [0, 1])
def test_a_save_that_is_cut_leaves_no_mixture_of_two_checkpoints(
    compressor, tiny_model, tiny_tokenizer, tmp_path, monkeypatch, cut_at
):
    Compressor.from_base(tiny_model, tiny_tokenizer, PicConfig(ratios=(2, 4), lora_rank=0)).save_pretrained(tmp_path)
    moves = []

    def replace(source, target):
        if len(moves) == cut_at:
            raise KeyboardInterrupt
        moves.append(target)
        return os.rename(source, target)

    monkeypatch.setattr("pic_rag.models.checkpoint.os.replace", replace)
    with pytest.raises(KeyboardInterrupt):
        compressor.save_pretrained(tmp_path)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="must hold config.json, got .* without it"):
        Checkpoint.load(tmp_path)
    compressor.save_pretrained(tmp_path)
    assert Checkpoint.load(tmp_path).fingerprint == compressor.fingerprint


def test_an_untrained_compressor_is_the_same_every_time(tiny_model, tiny_tokenizer):
    torch.manual_seed(1)
    one = Compressor.from_base(tiny_model, tiny_tokenizer, CONFIG)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    other = Compressor.from_base(tiny_model, tiny_tokenizer, CONFIG)
    assert one.fingerprint == other.fingerprint
    assert torch.equal(torch.random.get_rng_state(), state)  # and it draws nothing from the user's generator


def test_weights_settings_and_models_are_part_of_the_fingerprint(tiny_model, tiny_tokenizer, trained_folder, tmp_path):
    fingerprints = [_load(trained_folder).fingerprint]
    weights = load_file(trained_folder / "compressor.safetensors")
    weights["slot_embedding"][0] += 1e-3
    replace(Checkpoint.load(trained_folder), weights=weights).save(tmp_path / "weights")
    fingerprints.append(_load(tmp_path / "weights").fingerprint)
    for field, value in [("ratio", 8), ("slots_per_chunk", 2), ("positions", "append"), ("residual_pool", False)]:
        config = PicConfig.from_dict({**CONFIG.to_dict(), field: value})
        fingerprints.append(Compressor.from_base(tiny_model, tiny_tokenizer, config).fingerprint)
    other = copy.deepcopy(tiny_model)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    fingerprints.append(Compressor.from_base(tiny_model, tiny_tokenizer, CONFIG).fingerprint)
    fingerprints.append(Compressor.from_base(tiny_model, tiny_tokenizer, CONFIG, generator=other).fingerprint)
    fingerprints.append(Compressor.from_base(other, tiny_tokenizer, CONFIG).fingerprint)
    assert len(set(fingerprints)) == len(fingerprints)


def test_the_encoder_may_be_narrower_than_the_generator(tiny_model, tiny_tokenizer, base_folder, tmp_path):
    wide = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=len(tiny_tokenizer), hidden_size=96, intermediate_size=96, num_hidden_layers=1,
                    num_attention_heads=4, num_key_value_heads=4)
    ).eval()  # fmt: skip
    wide.save_pretrained(tmp_path / "wide")
    tiny_tokenizer.save_pretrained(tmp_path / "wide")
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    untrained = Compressor.from_base(base, tiny_tokenizer, CONFIG, generator=wide)
    [memory] = untrained.compress(["The harbour lay."])
    ids = torch.tensor(tiny_tokenizer("The harbour lay.")["input_ids"])
    torch.testing.assert_close(memory.embeddings, wide.get_input_embeddings()(ids).detach().view(4, 4, 96).mean(1))
    untrained.save_pretrained(tmp_path / "compressor")
    [again] = _load(tmp_path / "compressor").compress(["The harbour lay."])
    assert torch.equal(again.embeddings, memory.embeddings)
    assert again.generator == untrained.generator.id


def test_two_models_of_one_name_are_not_taken_for_one_another(tiny_tokenizer, base_folder, tmp_path):
    """The base model and a generator changed in place: loading must not pool the base's embeddings."""
    tiny_model = AutoModelForCausalLM.from_pretrained(base_folder)
    other = copy.deepcopy(tiny_model)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(2)
    untrained = Compressor.from_base(tiny_model, tiny_tokenizer, CONFIG, generator=other)
    assert untrained.generator.name == untrained.checkpoint.base.name
    untrained.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="generator must be .*, which the compressor makes memories for, got"):
        _load(tmp_path)


def test_a_generator_with_a_smaller_vocabulary_is_refused(tiny_model, tiny_tokenizer):
    small = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    )
    with pytest.raises(ValueError, match="must share the base model's tokenizer of 259 tokens, got a .* 100"):
        Compressor.from_base(tiny_model, tiny_tokenizer, CONFIG, generator=small)


def test_memories_in_bfloat16_are_near_those_in_float32(compressor, trained_folder):
    half = _load(trained_folder, dtype="bfloat16")
    [exact], [memory] = compressor.compress(TEXTS[:1]), half.compress(TEXTS[:1])
    assert (half.dtype, memory.embeddings.dtype) == ("bfloat16", torch.bfloat16)
    assert memory.handle != exact.handle
    assert half.fingerprint == compressor.fingerprint
    distance = (memory.embeddings.float() - exact.embeddings).norm(dim=1) / exact.embeddings.norm(dim=1)
    assert distance.mean() < 0.1


def test_each_text_may_have_a_ratio_of_its_own(compressor):
    texts = [*TEXTS, TEXTS[0]]
    mixed = compressor.compress(texts, (4, 16, 8))
    ratios = [4, 16, *[8] * (len(texts) - 2)]
    assert [memory.ratio for memory in mixed] == ratios
    for text, ratio, memory in zip(texts, ratios, mixed, strict=True):
        [alone] = compressor.compress([text], ratio)
        assert memory.handle == alone.handle == compressor.handle(text, ratio)
        torch.testing.assert_close(memory.embeddings, alone.embeddings)
    assert [memory.ratio for memory in compressor.compress(texts[:1], [16, 4])] == [16]
    assert [type(m.ratio) for m in compressor.compress(texts[:2], (np.int64(4), np.int64(16)))] == [int, int]
    assert compressor.compress([], [16, 4]) == []


@pytest.mark.parametrize(
    ("ratios", "rule"),
    [((4, 5), "ratio must be one of 4, 8, 16 .*, got 5"), ([], r"a sequence of at least one, got \[\]")],
)
def test_ratios_that_are_not_served_are_an_error_however_few_texts_there_are(compressor, ratios, rule):
    for texts in ([], ["text"]):
        with pytest.raises(ValueError, match=rule):
            compressor.compress(texts, ratios)


@pytest.mark.parametrize("ratio", [5, 64, 4.0, "4", True])
def test_a_ratio_that_is_not_served_is_an_error(compressor, ratio):
    with pytest.raises(ValueError, match="ratio must be one of 4, 8, 16 .the ratios this compressor serves., got"):
        compressor.compress(["text"], ratio=ratio)


@pytest.mark.parametrize(
    ("texts", "error", "rule"),
    [
        ("one text", TypeError, r"texts must be a list of strings, got one string. Write compress\(\[text\]\)"),
        (["good", None], TypeError, "texts must hold strings, got NoneType at position 1"),
        ([b"bytes"], TypeError, "texts must hold strings, got bytes at position 0"),
        (
            ["good", "bad \ud800"],
            ValueError,
            "text 1 must be valid Unicode, got a lone surrogate at character 4",
        ),
    ],
)
def test_what_is_no_list_of_texts_is_an_error(compressor, texts, error, rule):
    with pytest.raises(error, match=rule):
        compressor.compress(texts)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, "8", True])
def test_batch_size_is_a_positive_whole_number(compressor, batch_size):
    with pytest.raises(ValueError, match="batch_size must be a whole number of 1 or more, got"):
        compressor.compress(["text"], batch_size=batch_size)


def test_a_model_object_needs_its_tokenizer(tiny_model):
    with pytest.raises(ValueError, match="tokenizer must be given with a model object, got None"):
        Compressor.from_base(tiny_model)


def _broken(trained_folder, tmp_path, change):
    folder = tmp_path / "broken"
    shutil.copytree(trained_folder, folder)
    change(folder)
    return folder


def _edit(name, value):
    def change(folder):
        settings = json.loads((folder / "config.json").read_text())
        settings[name] = value
        (folder / "config.json").write_text(json.dumps(settings))

    return change


def _flip_a_bit(folder):
    path = folder / "compressor.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 0x40
    path.write_bytes(content)


def _truncate(name, size_bytes):
    return lambda folder: os.truncate(folder / name, size_bytes)


@pytest.mark.parametrize(
    ("change", "error", "rule"),
    [
        (_truncate("compressor.safetensors", 5000), ValueError, "truncated or damaged: fetch it again"),
        (_truncate("compressor.safetensors", 0), ValueError, "truncated or damaged: fetch it again"),
        (
            lambda folder: (folder / "compressor.safetensors").unlink(),
            FileNotFoundError,
            "must hold compressor.s",
        ),
        (
            lambda folder: (folder / "config.json").unlink(),
            FileNotFoundError,
            "must hold config.json, got .* without",
        ),
        (_truncate("config.json", 40), ValueError, "config.json must be JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), ValueError, "must hold a JSON object, got a list"),
        (lambda folder: (folder / "config.json").write_text("{}"), ValueError, "must name base, format_version"),
        (_edit("format_version", 99), ValueError, "format_version must be 1, got 99 in .* Upgrade pic-rag"),
        (_edit("base", {"nom": "x"}), ValueError, r"base in .* must hold \['id', 'name'\], got \{'nom': 'x'\}"),
        (_edit("pic", {"sauce": 1}), ValueError, "Unknown PicConfig field 'sauce'"),
        (_edit("pic", {**CONFIG.to_dict(), "lora_rank": 8}), ValueError, "lora_A.* must have the shape"),
        (_flip_a_bit, ValueError, "compressor.safetensors must be as config.json tells, with the weights_sha256"),
    ],
    ids=lambda value: "" if callable(value) else None,
)
def test_a_damaged_checkpoint_says_what_is_wrong(trained_folder, tmp_path, change, error, rule):
    with pytest.raises(error, match=rule):
        _load(_broken(trained_folder, tmp_path, change))


def test_a_checkpoint_without_the_reader_it_names_is_an_error(trained_folder, tmp_path):
    generator = json.loads((trained_folder / "config.json").read_text())["generator"]
    change = _edit("generator", {**generator, "id": generator["id"] + "+0123456789abcdef"})
    folder = _broken(trained_folder, tmp_path, change)
    with pytest.raises(FileNotFoundError, match="need their reader, got none at"):
        _load(folder)
    (folder / "reader").mkdir()
    (folder / "reader" / "adapter_model.safetensors").write_bytes(b"another")
    with pytest.raises(ValueError, match="must be the reader that config.json names, got another"):
        _load(folder)


def test_a_reader_folder_that_the_checkpoint_does_not_name_is_left_alone(trained_folder, tmp_path):
    stale = _broken(trained_folder, tmp_path, lambda folder: (folder / "reader").mkdir())
    assert _load(stale).reader is None


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="name_or_path must be a folder or a hub id, got .*nowhere"):
        _load(tmp_path / "nowhere")


def test_another_base_model_is_refused_by_name(trained_folder, base_folder, tiny_model, tiny_tokenizer, tmp_path):
    other = copy.deepcopy(tiny_model)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    other.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="The base model must be .*, which this compressor was trained on, got .*@"):
        _load(trained_folder, base_model=tmp_path)
    with pytest.raises(ValueError, match="generator must be .*, which the compressor makes memories for, got .*@"):
        _load(trained_folder, generator=tmp_path, base_model=base_folder)


def test_a_base_model_that_has_moved_is_named_with_the_way_out(trained_folder, tmp_path):
    change = _edit("base", {"name": str(tmp_path / "gone"), "id": "gone@0123456789abcdef"})
    with pytest.raises(FileNotFoundError, match="got '.*gone'.*as base_model"):
        _load(_broken(trained_folder, tmp_path, change))


def test_a_generator_that_has_moved_is_loaded_from_where_it_is_said_to_be(tiny_model, tiny_tokenizer, tmp_path):
    other = copy.deepcopy(tiny_model)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    for name, model in (("base", tiny_model), ("generator", other)):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    base, made_for = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("base", "generator"))
    Compressor.from_base(base, tiny_tokenizer, generator=made_for).save_pretrained(tmp_path / "pic")
    (tmp_path / "generator").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="generator must be a folder or a hub id, got '.*generator'"):
        _load(tmp_path / "pic")
    loaded = _load(tmp_path / "pic", generator=tmp_path / "moved")
    assert loaded.fingerprint == Checkpoint.load(tmp_path / "pic").fingerprint
    for where in (tmp_path / "moved", None):  # the compressor has told its checkpoint where the models are
        generator = Generator.from_checkpoint(loaded.checkpoint, where, device="cpu", dtype="float32")
        assert generator.generate("Who?", max_new_tokens=2)
    with pytest.raises(ValueError, match="generator must be .*, which the compressor makes memories for, got "):
        _load(tmp_path / "pic", generator=tmp_path / "base")


MEASURE = """
import sys
from pathlib import Path
from pic_rag.compression.compressor import Compressor
compressor = Compressor.from_pretrained(sys.argv[1], device="cpu", dtype="float32")
def peak(copies, rows):
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest use so far
    compressor.compress(["The harbour lay still and nobody spoke. " * copies], ratio=16, batch_size=rows)
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024
peak(5, 8)
print(peak(50, 8), peak(500, 8), peak(500, 10_000))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads Linux's record of memory use")
@pytest.mark.slow
def test_working_memory_does_not_grow_with_the_length_of_a_text(trained_folder):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(trained_folder)], capture_output=True, text=True, check=True
    )
    short, long, unbounded = map(float, done.stdout.split())
    assert long - short < 20  # MiB; ten times the text
    assert unbounded - long > 50  # and the bound would notice a batch that holds the whole text
