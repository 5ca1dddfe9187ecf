"""A real compressor and generator at toy size, and nodes for them."""

from __future__ import annotations

import llama_index.core
import pytest
import torch
from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.schema import NodeRelationship, NodeWithScore, RelatedNodeInfo, TextNode
from llama_index.llms.pic_rag import PICLLM
from pic_rag import Compressor, Generator, PicConfig, SQLiteStore
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llama_index.postprocessor.pic_rag import PICCompressor

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
def checkpoints(tokenizer, tmp_path_factory) -> list[str]:
    """Two compressor folders on one base model folder; their weights differ."""
    base = tmp_path_factory.mktemp("base")
    make_model(tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
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


@pytest.fixture
def compressor(tiny_compressor, store) -> PICCompressor:
    return PICCompressor(compressor=tiny_compressor, store=store)


@pytest.fixture
def llm(tiny_compressor, tiny_generator, store) -> PICLLM:
    return PICLLM(compressor=tiny_compressor, generator=tiny_generator, store=store, max_new_tokens=8)


@pytest.fixture
def nodes() -> list[NodeWithScore]:
    return [
        NodeWithScore(
            node=TextNode(
                id_=f"passage-{number}",
                text=text,
                metadata={"file": "amsel.md", "page": number},
                excluded_llm_metadata_keys=["file"],
                relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id="amsel")},
            ),
            score=1 / (1 + number),
        )
        for number, text in enumerate(TEXTS)
    ]


@pytest.fixture
def index(nodes) -> VectorStoreIndex:
    return VectorStoreIndex([node.node for node in nodes], embed_model=MockEmbedding(embed_dim=8))


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch, tokenizer):
    """No test leaves a global LLM or tokenizer behind; the tokenizer counts bytes."""
    for name in ("_llm", "_embed_model", "_callback_manager"):
        monkeypatch.setattr(Settings, name, None)
    monkeypatch.setattr(llama_index.core, "global_tokenizer", lambda text: list(text.encode()))
