"""A real compressor and generator at toy size, and documents for them."""

from __future__ import annotations

import pytest
import torch
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pic_rag import Compressor, Generator, PicConfig, SQLiteStore
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from langchain_pic_rag import ChatPIC, PICCompressor

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = (
    "The lighthouse of Amsel was built in 1887 by Ida Brandt.",
    "Its lamp was changed from oil to gas in 1921, at a cost of 4,300 crowns.",
    "The keeper's house is a museum now; it is closed on Mondays.",
    "Seals rest on the rocks below the tower from June to September.",
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer (one token a byte) with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: number for number, token in enumerate(special + alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A random float32 Llama of width 64, always the same."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=8192,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.2,
        )
    ).eval()


class ListRetriever(BaseRetriever):
    """Finds the same documents for every query."""

    documents: list[Document]

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return self.documents


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_compressor(tokenizer: PreTrainedTokenizerFast) -> Compressor:
    return Compressor.from_base(tiny_model(tokenizer), tokenizer, PicConfig(lora_rank=0))


@pytest.fixture(scope="session")
def other_compressor(tokenizer: PreTrainedTokenizerFast) -> Compressor:
    """For the same generator, with another fingerprint."""
    return Compressor.from_base(tiny_model(tokenizer), tokenizer, PicConfig(lora_rank=0, slots_per_chunk=2))


@pytest.fixture(scope="session")
def tiny_generator(tokenizer: PreTrainedTokenizerFast, tiny_compressor: Compressor) -> Generator:
    return Generator(tiny_model(tokenizer), tokenizer, name=tiny_compressor.generator.name)


@pytest.fixture
def store(tmp_path) -> SQLiteStore:
    return SQLiteStore(tmp_path / "memories.sqlite")


@pytest.fixture
def compressor(tiny_compressor: Compressor, store: SQLiteStore) -> PICCompressor:
    return PICCompressor(compressor=tiny_compressor, store=store)


@pytest.fixture
def chat(tiny_compressor: Compressor, tiny_generator: Generator, store: SQLiteStore) -> ChatPIC:
    return ChatPIC(compressor=tiny_compressor, generator=tiny_generator, store=store, max_tokens=12)


@pytest.fixture
def documents() -> list[Document]:
    return [
        Document(id=f"passage-{number}", page_content=text, metadata={"source": "amsel.md", "score": 1 / (1 + number)})
        for number, text in enumerate(TEXTS)
    ]


@pytest.fixture
def base_retriever(documents: list[Document]) -> ListRetriever:
    return ListRetriever(documents=documents)
