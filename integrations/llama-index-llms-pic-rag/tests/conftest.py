"""A real compressor and generator at toy size, and an LLM of them."""

from __future__ import annotations

import pytest
import torch
from pic_rag import Compressor, Generator, MemoryCache, PicConfig, SQLiteStore
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llama_index.llms.pic_rag import PICLLM

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = "The lighthouse of Amsel was built in 1887 by Ida Brandt."


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer (one token a byte) with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: number for number, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """A random float32 Llama of width 64, always the same for a seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16384,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_compressor(tokenizer) -> Compressor:
    return Compressor.from_base(make_model(tokenizer), tokenizer, PicConfig(lora_rank=0))


@pytest.fixture(scope="session")
def tiny_generator(tokenizer, tiny_compressor) -> Generator:
    return Generator(make_model(tokenizer), tokenizer, name=tiny_compressor.generator.name)


@pytest.fixture(scope="session")
def checkpoint(tokenizer, tmp_path_factory) -> str:
    """The folder of a compressor, whose base model is a folder too."""
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("compressor")
    make_model(tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    Compressor.from_base(base, config=PicConfig(lora_rank=0), device="cpu", dtype="float32").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def store(tmp_path) -> SQLiteStore:
    return SQLiteStore(tmp_path / "memories.sqlite")


@pytest.fixture
def llm(tiny_compressor, tiny_generator, store) -> PICLLM:
    return PICLLM(compressor=tiny_compressor, generator=tiny_generator, store=store, max_new_tokens=8)


@pytest.fixture
def memory(tiny_compressor, store):
    """A memory that the LLM's store holds."""
    [memory] = tiny_compressor.compress([TEXT])
    MemoryCache(store, tiny_compressor.fingerprint).put([memory])
    return memory
