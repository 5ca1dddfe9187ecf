"""Keys and values of memories that were read before."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from pic_rag.assembler import Assembled
from pic_rag.generation.answering import Generation
from pic_rag.generation.generator import Generator
from pic_rag.generation.prefix import PrefixCache, cut_blocks, join, supports_reuse
from pic_rag.memory import Memory, hash_text

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral with a window": MistralConfig(**SIZES, sliding_window=16),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=16),
    "llama with dynamic positions": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    ),
}
WITHOUT_REUSE = {"mistral with a window", "gemma3", "llama with dynamic positions"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    config = copy.deepcopy(config)
    for name in ("bos", "eos", "pad"):
        setattr(config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def make_memory(generator: Generator, text: str, ratio: int = 3) -> Memory:
    """A memory of every third token embedding: of the right size and norm, and no text's own."""
    token_ids = torch.tensor(generator.tokenizer(text).input_ids)
    return Memory(
        embeddings=generator.model.get_input_embeddings()(token_ids[::ratio]).detach().clone(),
        text_tokens=len(token_ids), ratio=ratio, fingerprint="f" * 64, source_hash=hash_text(text),
        generator=generator.model_id,
    )  # fmt: skip


def make_prompts(first: Memory, second: Memory, third: Memory) -> list[Any]:
    """Prefixes that share all, some or nothing, of all lengths; one ends with its memory, one has no memory at all."""
    a, b, c = first.handle, second.handle, third.handle
    return [
        f"Read: {a} and {b} Who?",
        f"Read: {a} and {b} Where was it, and when?",
        f"Read: {a} and {c} Who?",
        f"Read: {b} and {a} Who?",
        f"Read: {a}",
        f"Read: {a}{b}{c}",
        f"Read: {a}{b}{c} Who was she?",
        "Who?",
        [{"role": "system", "content": a}, {"role": "user", "content": f"{b} Which one?"}],
    ]


@pytest.fixture(scope="module", params=[*FAMILIES, "llama, spread"])
def pair(request: pytest.FixtureRequest, tiny_tokenizer: PreTrainedTokenizerFast) -> tuple[Generator, Generator]:
    """The same model twice: one keeps what it has read."""
    family, spread, _ = request.param.partition(", spread")
    model = make_model(FAMILIES[family], tiny_tokenizer)
    assert supports_reuse(model) == (request.param not in WITHOUT_REUSE)
    settings: dict[str, Any] = {"name": "tiny", "generator_positions": "spread" if spread else "contiguous"}
    return Generator(model, tiny_tokenizer, **settings), Generator(
        model, tiny_tokenizer, **settings, prefix_cache_bytes=0
    )


@pytest.fixture
def generator(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Generator:
    return Generator(tiny_model, tiny_tokenizer, name="tiny")


@pytest.fixture
def memories(generator: Generator) -> list[Memory]:
    texts = ("Paris is the capital of France.", "Rome is in Italy, by the Tiber.", "The Nile.")
    return [make_memory(generator, text) for text in texts]


def assemble(generator: Generator, prompt: str, memories: Sequence[Memory]) -> Assembled:
    return generator._assembler.assemble(prompt, {memory.handle: memory for memory in memories})


def test_answers_are_those_of_reading_everything(
    pair: tuple[Generator, Generator], request: pytest.FixtureRequest
) -> None:
    keeping, forgetting = pair
    memories = [make_memory(keeping, text) for text in ("Paris is the capital of France.", "Rome is in Italy.", "Nile")]
    prompts = make_prompts(*memories)
    expected = forgetting.generate(prompts, memories, max_new_tokens=12)
    one_by_one = [keeping.generate(prompt, memories, max_new_tokens=12)[0] for prompt in prompts]
    together = keeping.generate(prompts, memories, max_new_tokens=12)  # one batch of mixed prefixes
    assert expected == one_by_one == together
    assert not any(answer.cached_tokens for answer in expected)
    reused = {answer.cached_tokens for answer in together}
    assert reused == {0} if request.node.callspec.params["pair"] in WITHOUT_REUSE else len(reused) > 3


def test_what_was_read_on_another_device_is_not_found(generator: Generator, memories: list[Memory]) -> None:
    assembled = assemble(generator, make_prompts(*memories)[0], memories)
    moved = dataclasses.replace(assembled, token_embeddings=copy.deepcopy(assembled.token_embeddings).to("meta"))
    here, there = ([block.name for block in cut_blocks(each)] for each in (assembled, moved))
    assert here
    assert not set(here) & set(there)


def test_what_a_batch_has_read_is_kept_of_each_prompt(generator: Generator, memories: list[Memory]) -> None:
    prompts = make_prompts(*memories)
    forgetting = Generator(generator.model, generator.tokenizer, name="tiny", prefix_cache_bytes=0)
    for _ in range(2):
        expected = forgetting.generate(prompts, memories, max_new_tokens=8, temperature=1.0, seed=5)
        assert generator.generate(prompts, memories, max_new_tokens=8, temperature=1.0, seed=5) == expected


def test_a_prompt_begins_at_its_first_new_row(generator: Generator, memories: list[Memory]) -> None:
    a, b, c = memories
    gap = " And then there is this: "  # a token a byte
    rows = [5 + a.memory_tokens, 5 + a.memory_tokens + len(gap) + b.memory_tokens]
    asked = {
        f"Read:{a.handle}{gap}{b.handle} Who?": 0,
        f"Read:{a.handle}{gap}{b.handle} Who was it?": rows[1],
        f"Read:{a.handle}{gap}{c.handle} Who?": rows[0],
        f"Read:{a.handle} {b.handle} Who?": 0,  # a block of two, which is read as one
        f"Read:{b.handle} {a.handle} Who?": 0,
        f"Look:{a.handle} {b.handle} Who?": 0,
        f"Read:{a.handle}": 0,  # the last row is read in any case
        "Read: Who?": 0,
    }
    for prompt, cached_tokens in asked.items():
        assert generator.generate(prompt, memories, max_new_tokens=2)[0].cached_tokens == cached_tokens


@contextmanager
def read_shapes(generator: Generator) -> Iterator[list[tuple[int, int]]]:
    """`(prompts, rows)` of every forward of the model."""
    read: list[tuple[int, int]] = []
    body = generator.model.get_submodule("model.layers.0")
    hook = body.register_forward_pre_hook(lambda _, args: read.append(tuple(args[0].shape[:2])))
    try:
        yield read
    finally:
        hook.remove()


def test_the_model_reads_only_the_new_rows(generator: Generator, memories: list[Memory]) -> None:
    prompt = f"Read:{memories[0].handle}{memories[1].handle} Who?"
    with read_shapes(generator) as read:
        for _ in range(2):
            generator.generate(prompt, memories, max_new_tokens=1)
    question = len(" Who?")
    assert read == [(1, generator.count_tokens(prompt, memories) - question), (1, question), (1, question)]


def test_what_the_prompts_of_a_batch_share_is_read_once(generator: Generator, memories: list[Memory]) -> None:
    shared = f"Read:{memories[0].handle}{memories[1].handle}"
    prompts = [f"{shared} Who?", f"{shared} Where?", f"{shared} What was it?"]
    forgetting = Generator(generator.model, generator.tokenizer, name="tiny", prefix_cache_bytes=0)
    with read_shapes(generator) as read:
        answers = generator.generate(prompts, memories, max_new_tokens=1)
    rows = generator.count_tokens(shared, memories)
    assert read == [(1, rows), (3, len(" What was it?"))]
    assert sorted(answer.cached_tokens for answer in answers) == [0, rows, rows]
    assert answers == forgetting.generate(prompts, memories, max_new_tokens=1)
    assert [answer.cached_tokens for answer in generator.generate(prompts, memories, max_new_tokens=1)] == [rows] * 3


def test_a_batch_with_little_to_reuse_is_read_in_one_go(generator: Generator, memories: list[Memory]) -> None:
    """Kept rows and rows to read are padded apart, so that one kept prompt would widen the rows of all."""
    known, *others = (f"Read:{memory.handle} Who was it?" for memory in memories)
    generator.generate(known, memories, max_new_tokens=1)
    with read_shapes(generator) as read:
        answers = generator.generate([known, *others], memories, max_new_tokens=1)
    assert read == [(3, max(generator.count_tokens(prompt, memories) for prompt in (known, *others)))]
    assert [answer.cached_tokens for answer in answers] == [0, 0, 0]


def test_whether_memories_were_kept_changes_no_bit_of_an_answer(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    half = Generator(copy.deepcopy(tiny_model).bfloat16(), tiny_tokenizer, name="tiny")
    memories = [make_memory(half, text) for text in ("Paris is the capital of France.", "Rome is in Italy.", "Nile")]
    prompts = make_prompts(*memories)
    seen: list[torch.Tensor] = []
    hook = half.model.get_submodule("lm_head").register_forward_hook(lambda *call: seen.append(call[2][:, -1].clone()))

    def logits(prompt: Any) -> torch.Tensor:  # noqa: ANN401
        seen.clear()
        half.generate(prompt, memories, max_new_tokens=6, temperature=1.0, seed=3)
        return torch.cat(seen[-6:])

    try:
        first = [logits(prompt) for prompt in prompts]
        assert all(torch.equal(logits(prompt), before) for prompt, before in zip(prompts, first, strict=True))
    finally:
        hook.remove()


def test_a_stream_reuses_as_well(generator: Generator, memories: list[Memory]) -> None:
    prompt = f"Read:{memories[0].handle} Who?"
    [expected] = generator.generate(prompt, memories, max_new_tokens=8)

    def read() -> Iterator[Any]:
        yield (yield from generator.stream(prompt, memories, max_new_tokens=8))

    *pieces, generation = read()
    assert "".join(pieces) == expected.text
    assert generation == expected
    assert generation.cached_tokens == 5 + memories[0].memory_tokens


def test_another_precision_of_a_memory_is_another_prefix(generator: Generator, memories: list[Memory]) -> None:
    prompt = f"Read:{memories[0].handle} Who?"
    forgetting = Generator(generator.model, generator.tokenizer, name="tiny", prefix_cache_bytes=0)
    rounded = Memory.from_bytes(memories[0].to_bytes("int4"))
    assert rounded.handle == memories[0].handle
    for memory, cached in ((memories[0], False), (rounded, False), (memories[0], True), (rounded, True)):
        [answer] = generator.generate(prompt, [memory], max_new_tokens=8)
        assert (answer.cached_tokens > 0) is cached
        assert [answer] == forgetting.generate(prompt, [memory], max_new_tokens=8)


def test_blocks_are_named_by_what_the_generator_sees(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    half = Generator(copy.deepcopy(tiny_model).bfloat16(), tiny_tokenizer, name="tiny")
    whole = dataclasses.replace(make_memory(half, "Paris is the capital."), generator=half.model_id)
    stored = Memory.from_bytes(whole.to_bytes("bf16"))  # bfloat16 is all that this generator reads of it
    one, other = (list(cut_blocks(assemble(half, f"a{m.handle}", [m]))) for m in (whole, stored))
    assert one == other


def test_a_memory_without_rows_is_in_no_block(generator: Generator, memories: list[Memory]) -> None:
    empty = dataclasses.replace(memories[0], embeddings=torch.empty(0, 64), source_hash=hash_text(""))
    prompt = f"a{empty.handle}b{memories[1].handle}{empty.handle} Who?"
    blocks = list(cut_blocks(assemble(generator, prompt, [empty, *memories])))
    assert [(block.start, block.end) for block in blocks] == [(0, 2 + memories[1].memory_tokens)]
    assert list(cut_blocks(assemble(generator, f"Who? {empty.handle}", [empty]))) == []


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
def test_logits_after_a_kept_prefix_are_those_of_reading_everything(
    dtype: torch.dtype, tolerance: float, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    half = Generator(copy.deepcopy(tiny_model).to(dtype), tiny_tokenizer, name="tiny")
    memories = [make_memory(half, text) for text in ("Paris is the capital of France.", "Rome is in Italy.")]
    prompt = assemble(half, f"Read:{memories[0].handle} {memories[1].handle} Who?", memories)
    cache = PrefixCache(2**20)
    rows = prompt.embeddings[None]
    with torch.no_grad():
        before = cache.find(prompt)
        past = join([before], half.model)
        whole = half.model(inputs_embeds=rows, past_key_values=past).logits[0, -1]
        cache.keep([before], past)
        after = cache.find(prompt)
        read = rows[:, after.cached_tokens :]
        part = half.model(inputs_embeds=read, past_key_values=join([after], half.model)).logits[0, -1]
    assert (before.cached_tokens, read.shape[1]) == (0, len(" Who?"))
    assert torch.allclose(part, whole, rtol=0, atol=tolerance * whole.abs().max().item())


def test_the_cache_is_bounded_and_forgets_what_was_used_longest_ago(generator: Generator) -> None:
    memories = [make_memory(generator, f"{number}: a text of always the same length.") for number in range(5)]
    prompts = [f"{memory.handle} Who?" for memory in memories]
    layers, kv_heads, head_width = 4, 2, 16
    block_bytes = memories[0].memory_tokens * layers * 2 * kv_heads * head_width * 4
    small = Generator(generator.model, generator.tokenizer, name="tiny", prefix_cache_bytes=3 * block_bytes)
    cache = small._engine._prefixes
    assert cache is not None

    def is_kept(number: int) -> bool:
        return cache.find(assemble(small, prompts[number], memories)).cached_tokens > 0

    for number in (0, 1, 2, 0, 3):
        small.generate(prompts[number], memories, max_new_tokens=1)
        assert cache.size_bytes <= cache.max_bytes
    assert [is_kept(number) for number in range(4)] == [True, False, True, True]
    assert cache.size_bytes == 3 * block_bytes
    everything = "".join(memory.handle for memory in memories) + " Who?"
    small.generate(everything, memories, max_new_tokens=1)
    assert cache.find(assemble(small, everything, memories)).cached_tokens == 0  # one block, larger than the cache
    assert is_kept(3)


def test_a_cache_smaller_than_one_block_keeps_nothing(generator: Generator, memories: list[Memory]) -> None:
    tiny = Generator(generator.model, generator.tokenizer, name="tiny", prefix_cache_bytes=100)
    for _ in range(2):
        assert tiny.generate(f"{memories[0].handle} Who?", memories, max_new_tokens=1)[0].cached_tokens == 0
    assert tiny._engine._prefixes is not None
    assert tiny._engine._prefixes.size_bytes == 0


def test_a_size_below_zero_is_refused(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="prefix_cache_bytes must be at least 0, got -1"):
        Generator(tiny_model, tiny_tokenizer, name="tiny", prefix_cache_bytes=-1)


def test_nothing_is_kept_of_a_prompt_that_failed(generator: Generator, memories: list[Memory]) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    prompt = f"{memories[0].handle} Who?"
    hook = generator.model.get_submodule("model.layers.2").register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        generator.generate(prompt, memories)
    hook.remove()
    assert generator.generate(prompt, memories, max_new_tokens=1)[0].cached_tokens == 0


def test_a_reader_reads_a_kept_prefix_as_it_reads_everything(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(tiny_model), LoraConfig(target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(str(tmp_path))

    def make(**settings: Any) -> Generator:  # noqa: ANN401
        return Generator(copy.deepcopy(tiny_model), tiny_tokenizer, name="tiny", **settings)

    keeping, forgetting = make(reader=tmp_path), make(reader=tmp_path, prefix_cache_bytes=0)
    memories = [make_memory(keeping, text) for text in ("Paris is the capital.", "Rome is in Italy.", "The Nile.")]
    prompts = make_prompts(*memories)
    answers: list[list[Generation]] = [one.generate(prompts, memories, max_new_tokens=8) for one in (keeping,) * 2]
    assert sum(answer.cached_tokens for answer in answers[1]) > 0
    assert answers[0] == answers[1] == forgetting.generate(prompts, memories, max_new_tokens=8)


def test_blocks_of_equal_rows_at_other_positions_are_others(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    spread = Generator(tiny_model, tiny_tokenizer, name="tiny", generator_positions="spread")
    whole = dataclasses.replace(make_memory(spread, "Paris is the capital."), generator=spread.model_id)
    shorter = dataclasses.replace(whole, text_tokens=whole.text_tokens - 3)
    names = [[block.name for block in cut_blocks(assemble(spread, f"a{m.handle}", [m]))] for m in (whole, shorter)]
    assert names[0] != names[1]
