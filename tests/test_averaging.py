"""The mean of checkpoints: every tensor, reader included, and only of what may be averaged."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from pic_rag.cli import main
from pic_rag.compression.compressor import Compressor
from pic_rag.config import PicConfig
from pic_rag.generation.generator import Generator
from pic_rag.models.backbone import ModelRef, generator_id, plain_id
from pic_rag.models.checkpoint import Checkpoint
from pic_rag.training.averaging import average

SETTINGS = {"segment_tokens": 64, "ratios": (4, 8), "lora_rank": 2, "encoder_layers": 2}


@pytest.fixture
def make(tiny_model, tiny_tokenizer, tmp_path):
    """Writes a compressor with random weights, and with a random reader if it is wanted."""
    tiny_model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")

    def write(name, seed, reader_rank=0, **settings):
        made = Compressor.from_base(tmp_path / "base", config=PicConfig(**{**SETTINGS, **settings}), device="cpu")
        torch.manual_seed(seed)
        weights = {
            key: torch.randn_like(tensor, dtype=torch.float32) for key, tensor in made.checkpoint.weights.items()
        }
        reader, generator = None, made.generator
        if reader_rank:
            lora = LoraConfig(r=reader_rank, target_modules=["q_proj"], init_lora_weights=False)
            reader = tmp_path / f"{name}-reader"
            get_peft_model(copy.deepcopy(tiny_model), lora).save_pretrained(reader)
            positions = made.config.generator_positions
            generator = ModelRef(generator.name, generator_id(plain_id(generator.id), reader, positions))
        Checkpoint(made.config, made.checkpoint.base, generator, weights, reader).save(tmp_path / name)
        return tmp_path / name

    return write


@pytest.mark.parametrize("positions", ["contiguous", "spread"])
def test_every_tensor_is_the_mean_and_the_compressor_works(make, tmp_path, capsys, positions):
    parts = [make(name, seed, reader_rank=3, generator_positions=positions) for seed, name in enumerate("abc")]
    assert main(["average", *map(str, parts), "--out", str(tmp_path / "mean")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "mean")
    for file in ("compressor.safetensors", "reader/adapter_model.safetensors"):
        tensors = [load_file(part / file) for part in parts]
        for name, tensor in load_file(tmp_path / "mean" / file).items():
            torch.testing.assert_close(tensor, torch.stack([own[name] for own in tensors]).mean(0))
    compressor = Compressor.from_pretrained(tmp_path / "mean", device="cpu")
    assert compressor.fingerprint not in {Checkpoint.load(part).fingerprint for part in parts}
    generator = Generator.from_checkpoint(compressor.checkpoint, device="cpu")
    memories = compressor.compress(["The bell rang at noon."])
    assert generator.generate(memories[0].handle, memories, max_new_tokens=2)[0].memory_tokens > 0


def test_what_is_no_checkpoint_of_one_run_is_refused_and_nothing_written(make, tmp_path):
    one, read = make("one", 0), make("read", 1, reader_rank=3)
    refused = [
        ([one], "compressors must be two or more to be averaged, got 1"),
        ([one, make("ratios", 1, ratios=(4,))], "must have the same config"),
        ([one, read], "must all have a reader or none .* got 1 of 2"),
        ([read, make("rank", 2, reader_rank=2)], "must have readers of the same settings .*'r': 3.* got .*'r': 2"),
    ]
    for compressors, message in refused:
        with pytest.raises(ValueError, match=message):
            average(compressors, tmp_path / "mean")
    for file in ("compressor.safetensors", "reader/adapter_model.safetensors"):
        bad = make("bad", 3, reader_rank=3)
        weights = load_file(bad / file)
        name = min(weights)
        save_file({**weights, name: torch.full_like(weights[name], torch.nan)}, bad / file)
        _name_anew(bad)
        with pytest.raises(ValueError, match=f"bad.* must hold finite weights, got others in '{name}'"):
            average([read, bad], tmp_path / "mean")
    for model in ("base", "generator"):
        one = make("one", 0)
        other = json.loads((one / "config.json").read_text())
        other[model]["id"] = "another@0123456789abcdef"
        (one / "config.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=f"must have the same {model} .*another@0123456789abcdef"):
            average([make("two", 1), one], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_a_reader_that_was_given_another_scale_is_refused(make):
    folder = make("read", 1, reader_rank=3)
    config = folder / "reader" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 64}))
    with pytest.raises(
        ValueError, match=r"adapter_config.json must be as config.json tells, .* got .*'lora_alpha': 64"
    ):
        Checkpoint.load(folder)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json must be a JSON object as peft writes it, got: "):
        Checkpoint.load(folder)


def _name_anew(folder):
    """Let a compressor's settings tell of the weights and of the reader that lie beside them."""
    settings = json.loads((folder / "config.json").read_text())
    plain = plain_id(settings["generator"]["id"])
    settings["generator"]["id"] = generator_id(plain, folder / "reader", "contiguous")
    del settings["recorded"]
    (folder / "config.json").write_text(json.dumps(settings))
