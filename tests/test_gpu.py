"""A GPU computes what the CPU computes, and nothing is lost when its memory is short."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from conftest import make_tiny_model

from pic_rag.compression.compressor import GPU_BATCH_SIZE, Compressor
from pic_rag.config import PicConfig
from pic_rag.generation.generator import Generator
from pic_rag.training.config import TrainConfig, find_config
from pic_rag.training.loop import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

TEXTS = ["abc defgh " * 7, "x", "", "hgfedcba " * 90]
QUESTIONS = ["Who was it?", "And where was that, if anywhere?"]


@pytest.fixture(scope="module")
def compressors(tiny_model, tiny_tokenizer) -> list[Compressor]:
    """The same one on the CPU and on the GPU, float32."""
    made = []
    for device in ("cpu", "cuda"):
        config = PicConfig(segment_tokens=64, ratios=(4, 8, 16), lora_rank=4)
        made.append(Compressor.from_base(copy.deepcopy(tiny_model).to(device), tiny_tokenizer, config))
    torch.nn.init.normal_(made[0].encoder.converter.down.weight, std=0.1)
    made[1].encoder.load_state_dict(made[0].encoder.state_dict())
    return made


def test_memories_are_those_of_the_cpu(compressors) -> None:
    cpu, gpu = (compressor.compress(TEXTS, 8, progress=False) for compressor in compressors)
    assert compressors[1].batch_size == GPU_BATCH_SIZE
    assert [memory.handle for memory in gpu] == [memory.handle for memory in cpu]
    for on_gpu, on_cpu in zip(gpu, cpu, strict=True):
        torch.testing.assert_close(on_gpu.embeddings, on_cpu.embeddings, rtol=1e-3, atol=1e-3)


def test_flex_attention_is_the_dense_mask(tiny_tokenizer, tmp_path) -> None:
    make_tiny_model(tiny_tokenizer, hidden=256).save_pretrained(tmp_path)  # its kernels want heads of a usual width
    tiny_tokenizer.save_pretrained(tmp_path)
    config = PicConfig(segment_tokens=64, ratios=(4,))
    dense, flex = (
        Compressor.from_base(str(tmp_path), config=config, device="cuda", dtype="float32", attn_implementation=kind)
        for kind in ("sdpa", "flex_attention")
    )
    for expected, memory in zip(dense.compress(TEXTS), flex.compress(TEXTS), strict=True):
        torch.testing.assert_close(memory.embeddings, expected.embeddings, rtol=1e-3, atol=1e-3)


def test_answers_are_those_of_the_cpu(compressors, tiny_model, tiny_tokenizer) -> None:
    memories = compressors[0].compress(TEXTS, progress=False)
    prompts = [f"{memories[0].handle}{memories[3].handle} {question}" for question in QUESTIONS]
    name = compressors[0].generator.name
    cpu, gpu = (
        Generator(copy.deepcopy(tiny_model).to(device), tiny_tokenizer, name=name) for device in ("cpu", "cuda")
    )
    expected = [answer.token_ids for answer in cpu.generate(prompts, memories, max_new_tokens=16)]
    assert [answer.token_ids for answer in gpu.generate(prompts, memories, max_new_tokens=16)] == expected
    alone = [gpu.generate(prompt, memories, max_new_tokens=16)[0] for prompt in prompts]
    assert [answer.token_ids for answer in alone] == expected
    assert alone[1].cached_tokens > 0


def test_a_batch_that_is_too_large_for_the_gpu_is_halved(tiny_model, tiny_tokenizer, caplog) -> None:
    config = PicConfig(segment_tokens=512, ratios=(4,), lora_rank=0)
    compressor = Compressor.from_base(copy.deepcopy(tiny_model).to("cuda"), tiny_tokenizer, config)
    texts = [letter * 512 for letter in "abcdefgh"] * 64
    expected = compressor.compress(texts, batch_size=8)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**28) / total)
    try:
        memories = compressor.compress(texts, batch_size=512)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "smaller batches" in caplog.text
    for memory, other in zip(memories, expected, strict=True):
        torch.testing.assert_close(memory.embeddings, other.embeddings, rtol=1e-3, atol=1e-3)


def test_a_run_is_trained_compiled_and_resumed(tiny_model, tiny_tokenizer, tmp_path) -> None:
    tiny_model.save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    config = TrainConfig.load(
        find_config("smoke"),
        out=str(tmp_path / "run"),
        base_model=str(tmp_path / "base"),
        pic={"preset": "pic", "encoder_layers": 2, "lora_rank": 4, "lora_alpha": 4},
        stages=[{"steps": 4, "tasks": {"questions": 0.5, "reconstruct": 0.5}}],
        rows=[4, 4, 4],
        row_places=2048,
        compile=True,
        attn_implementation="flex_attention",
        precision="bf16",
        log_steps=1,
    )
    train(config.ending_at(2), progress=False)
    folder = train(config, progress=False)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in steps if "step" in line] == [1, 2, 3, 4]
    assert Compressor.from_pretrained(folder, base_model=tmp_path / "base").device.type == "cuda"
