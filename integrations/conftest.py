"""What the tests of all integrations stand on: a real compressor and generator at toy size, and texts for them."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tiny_model, tiny_tokenizer  # tests/conftest.py, by `pythonpath` in pyproject.toml

from pic_rag import Compressor, Generator, PicConfig, SQLiteStore

__all__ = ["tiny_tokenizer"]

collect_ignore_glob = ["*/langchain_pic_rag", "*/llama_index"]  # no doctests there; one module needs an extra

CONTEXT_TOKENS = 16384


def make_model(tokenizer):
    """A random float32 Llama, always the same, for the long prompts that frameworks write."""
    model = make_tiny_model(tokenizer, layers=2)
    model.config.max_position_embeddings = CONTEXT_TOKENS
    return model


@pytest.fixture(scope="session")
def tiny_compressor(tiny_tokenizer) -> Compressor:
    return Compressor.from_base(make_model(tiny_tokenizer), tiny_tokenizer, PicConfig(lora_rank=0))


@pytest.fixture(scope="session")
def tiny_generator(tiny_tokenizer, tiny_compressor) -> Generator:
    return Generator(make_model(tiny_tokenizer), tiny_tokenizer, name=tiny_compressor.generator.name)


@pytest.fixture(scope="session")
def checkpoints(tiny_tokenizer, tmp_path_factory) -> list[str]:
    """Two compressor folders on one base model folder; their weights differ."""
    base = tmp_path_factory.mktemp("base")
    make_model(tiny_tokenizer).save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    folders = []
    for seed in (1, 2):
        compressor = Compressor.from_base(base, config=PicConfig(lora_rank=0), device="cpu", dtype="float32")
        torch.manual_seed(seed)
        weights = compressor.checkpoint.weights
        weights.update({name: torch.randn_like(weight) for name, weight in weights.items()})
        folder = tmp_path_factory.mktemp("compressor")
        compressor.save_pretrained(folder)
        folders.append(str(folder))
    return folders


@pytest.fixture
def store(tmp_path) -> SQLiteStore:
    return SQLiteStore(tmp_path / "memories.sqlite")


@pytest.fixture(scope="session")
def texts() -> tuple[str, ...]:
    return (
        "The lighthouse of Amsel was built in 1887 by Ida Brandt.",
        "Its lamp was changed from oil to gas in 1921, at a cost of 4,300 crowns.",
        "The keeper's house is a museum now; it is closed on Mondays.",
        "Seals rest on the rocks below the tower from June to September.",
    )
