"""Handles in a prompt become rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from pic_rag.assembler import MEMORY_ROW, Assembler, restore
from pic_rag.handles import UnknownHandleError, escape_handles
from pic_rag.memory import Memory, hash_text

MODEL_ID = "tiny@0123456789abcdef"
ARCHITECTURES = [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, GemmaConfig, Gemma2Config, Gemma3TextConfig]
WITH_BOS = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
USER_ONLY = (
    "{% for m in messages %}{% if m['role'] != 'user' %}{{ raise_exception('Only user messages') }}{% endif %}"
    "{{ m['content'] }}{% endfor %}"
)
DROPS_TOOLS = "{% for m in messages %}{% if m['role'] != 'tool' %}{{ m['content'] }}{% endif %}{% endfor %}"


def make_memory(embeddings: torch.Tensor, text: str = "a document", **changes: object) -> Memory:
    fields: dict[str, Any] = {"text_tokens": 8, "ratio": 4, "fingerprint": "f" * 64, "generator": MODEL_ID} | changes
    return Memory(embeddings=embeddings, source_hash=hash_text(text), **fields)


def as_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    return model.get_input_embeddings()(torch.tensor(tokenizer(text).input_ids)).detach()


def with_special_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer, made to put a token before and after every text."""
    changed = copy.deepcopy(tokenizer)
    ids = [(token, changed.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|im_end|>")]
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=ids
    )
    return changed


@pytest.fixture(scope="module")
def assembler(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Assembler:
    return Assembler(tiny_model, tiny_tokenizer, model_id=MODEL_ID)


@pytest.fixture
def memory() -> Memory:
    return make_memory(torch.randn(3, 64))


@pytest.mark.parametrize("config_class", ARCHITECTURES, ids=lambda c: c.model_type)
def test_a_memory_made_of_a_texts_own_token_embeddings_gives_the_logits_of_the_text(
    config_class: Callable[..., PretrainedConfig], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(0)
    config = config_class(
        vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    memory = make_memory(as_rows(model, tiny_tokenizer, "the capital is Paris"))
    assembler = Assembler(model, tiny_tokenizer, model_id=MODEL_ID)
    assembled = assembler.assemble(f"We know: {memory.handle}. Where?", {memory.handle: memory})
    text = tiny_tokenizer("We know: the capital is Paris. Where?", return_tensors="pt").input_ids
    with torch.no_grad():
        from_memory = model(inputs_embeds=assembled.embeddings[None]).logits
        from_text = model(input_ids=text).logits
    torch.testing.assert_close(from_memory, from_text)
    assert from_text.std() > 0.01  # the logits say something


@pytest.mark.parametrize("special", [False, True], ids=["bare", "bos and eos"])
@pytest.mark.parametrize("prompt", ["", "Who?", " two\n\nlines <|im_end|> ", "naïve 你好 🙂", "[[pic:not a handle]]"])
def test_text_without_handles_is_tokenised_as_the_tokenizer_does_it(
    prompt: str, special: bool, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = with_special_tokens(tiny_tokenizer) if special else tiny_tokenizer
    assembled = Assembler(tiny_model, tokenizer, model_id=MODEL_ID).assemble(prompt, {})
    assert assembled.token_ids.tolist() == tokenizer(prompt).input_ids
    assert assembled.embeddings.shape == (assembled.prompt_tokens, 64)


def test_special_tokens_surround_the_prompt_and_not_each_piece_of_it(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, memory: Memory
) -> None:
    assembler = Assembler(tiny_model, with_special_tokens(tiny_tokenizer), model_id=MODEL_ID)
    token_ids = assembler.assemble(f"{memory.handle}a{memory.handle}", {memory.handle: memory}).token_ids.tolist()
    start, letter, end = (tiny_tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "a", "<|im_end|>"))
    assert token_ids == [start, *[MEMORY_ROW] * 3, letter, *[MEMORY_ROW] * 3, end]


def test_a_rendered_chat_template_gets_no_second_bos(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = with_special_tokens(tiny_tokenizer)
    tokenizer.chat_template = WITH_BOS
    messages = [{"role": "user", "content": "Who?"}]
    token_ids = Assembler(tiny_model, tokenizer, model_id=MODEL_ID).assemble(messages, {}).token_ids.tolist()
    assert token_ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert token_ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("as_parts", [False, True], ids=["string", "parts"])
@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_a_handle_is_read_in_every_role(role: str, as_parts: bool, assembler: Assembler, memory: Memory) -> None:
    content = [{"type": "text", "text": "Read"}, {"type": "text", "text": memory.handle}] if as_parts else memory.handle
    messages: list[dict[str, Any]] = [{"role": role, "content": content}, {"role": "user", "content": "Who?"}]
    assembled = assembler.assemble(messages, {memory.handle: memory})
    assert assembled.memory_tokens == 3
    torch.testing.assert_close(assembled.embeddings[assembled.token_ids == MEMORY_ROW], memory.embeddings)


def test_text_parts_are_joined_by_a_newline(assembler: Assembler) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    joined = [{"role": "user", "content": "one\ntwo"}]
    assert assembler.render([{"role": "user", "content": parts}]) == assembler.render(joined)


@pytest.mark.parametrize("content", [{"content": None}, {}, {"content": []}], ids=["none", "missing", "no parts"])
def test_a_message_without_content_is_rendered_empty(content: dict[str, Any], assembler: Assembler) -> None:
    assert assembler.render([{"role": "assistant", **content}]).startswith("<|im_start|>assistant\n<|im_end|>")


def test_rows_are_counted_as_the_generator_sees_them(assembler: Assembler, memory: Memory) -> None:
    assembled = assembler.assemble(f"ab{memory.handle}c{memory.handle}", {memory.handle: memory})
    assert (assembled.prompt_tokens, assembled.memory_tokens) == (2 + 3 + 1 + 3, 6)
    assert assembled.embeddings.shape == (9, 64)


def test_an_empty_memory_adds_no_rows(assembler: Assembler) -> None:
    empty = make_memory(torch.zeros(0, 64))
    assembled = assembler.assemble(f"a{empty.handle}b", {empty.handle: empty})
    assert (assembled.prompt_tokens, assembled.memory_tokens) == (2, 0)
    torch.testing.assert_close(assembled.embeddings, assembler.assemble("ab", {}).embeddings)


def test_memories_are_cast_to_the_generators_dtype(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, memory: Memory
) -> None:
    assembler = Assembler(copy.deepcopy(tiny_model).bfloat16(), tiny_tokenizer, model_id=MODEL_ID)
    assert assembler.assemble(memory.handle, {memory.handle: memory}).embeddings.dtype == torch.bfloat16


def test_gradients_reach_a_memory_through_the_assembled_rows(assembler: Assembler) -> None:
    embeddings = torch.randn(2, 64, requires_grad=True)
    memory = make_memory(embeddings)
    assembler.assemble(f"a{memory.handle}b", {memory.handle: memory}).embeddings.sum().backward()
    torch.testing.assert_close(embeddings.grad, torch.ones(2, 64))


def test_only_the_given_memories_can_be_read(assembler: Assembler, memory: Memory) -> None:
    other = make_memory(torch.randn(1, 64), text="another")
    with pytest.raises(UnknownHandleError, match=other.handle[6:-2]):
        assembler.assemble(f"{memory.handle} {other.handle}", {memory.handle: memory})


def test_escaped_handles_are_plain_text(assembler: Assembler, memory: Memory) -> None:
    assembled = assembler.assemble(escape_handles(memory.handle), {memory.handle: memory})
    assert assembled.memory_tokens == 0


@pytest.mark.parametrize(
    ("hidden", "generator"), [(64, "tiny@fedcba9876543210"), (32, MODEL_ID)], ids=["model", "hidden"]
)
def test_a_memory_of_another_generator_is_refused(hidden: int, generator: str, assembler: Assembler) -> None:
    memory = make_memory(torch.randn(1, hidden), generator=generator, source="a.pdf")
    with pytest.raises(ValueError, match="a.pdf.* was made for .*but the generator is .*Compress again") as raised:
        assembler.assemble(memory.handle, {memory.handle: memory})
    assert f"{generator!r} (hidden {hidden})" in str(raised.value)
    assert f"{MODEL_ID!r} (hidden 64)" in str(raised.value)


def test_equal_weights_read_a_memory_whatever_they_are_called(assembler: Assembler) -> None:
    memory = make_memory(torch.randn(2, 64), generator=f"a-copy@{MODEL_ID.partition('@')[2]}")
    assert assembler.assemble(memory.handle, {memory.handle: memory}).memory_tokens == 2


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_memory_that_is_not_finite_is_refused_by_name(number: float, assembler: Assembler, memory: Memory) -> None:
    memory.embeddings[1, 5] = number
    with pytest.raises(ValueError, match="must be finite") as raised:
        assembler.assemble(memory.handle, {memory.handle: memory})
    assert memory.handle in str(raised.value)


def test_a_memory_that_overflows_the_generators_dtype_is_refused(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    assembler = Assembler(copy.deepcopy(tiny_model).half(), tiny_tokenizer, model_id=MODEL_ID)
    memory = make_memory(torch.full((1, 64), 1e5))
    with pytest.raises(ValueError, match=r"must be finite in torch\.float16"):
        assembler.assemble(memory.handle, {memory.handle: memory})


@pytest.mark.parametrize(
    ("template", "role", "message"),
    [
        (None, "user", "prompt must be text for a generator without a chat template"),
        (USER_ONLY, "tool", "got the roles tool: Only user messages"),
        (DROPS_TOOLS, "tool", "got 'tool', which it drops"),
    ],
    ids=["no template", "rejects the role", "drops the role"],
)
def test_messages_that_the_chat_template_cannot_render_are_refused(
    template: str | None, role: str, message: str,
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, memory: Memory,
) -> None:  # fmt: skip
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = template
    assembler = Assembler(tiny_model, tokenizer, model_id=MODEL_ID)
    with pytest.raises(ValueError, match=message):
        assembler.assemble([{"role": role, "content": memory.handle}], {memory.handle: memory})


@pytest.mark.parametrize(
    ("message", "rule"),
    [
        ({"content": "Who?"}, "a role and a content"),
        ("Who?", "a role and a content"),
        ({"role": "user", "content": {"type": "text", "text": "x"}}, "must be text or a list of parts, got {'type'"),
        ({"role": "user", "content": 5}, "must be text or a list of parts, got 5"),
        ({"role": "user", "content": [5]}, "parts must be text or mappings, got 5"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "parts must be text.*'image_url'"),
    ],
    ids=str,
)
def test_messages_that_are_not_text_are_refused(message: dict[str, Any], rule: str, assembler: Assembler) -> None:
    with pytest.raises(ValueError, match=rule):
        assembler.render([message])


def test_restore_puts_the_source_texts_back_in_every_role(memory: Memory) -> None:
    prompt: list[dict[str, Any]] = [
        {"role": "tool", "content": f"Found {memory.handle}", "tool_call_id": "7"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": [{"type": "text", "text": memory.handle}, {"type": "image_url", "image_url": "x"}]},
    ]
    before = copy.deepcopy(prompt)
    assert restore(prompt, {memory.handle: "a document"}) == [
        {"role": "tool", "content": "Found a document", "tool_call_id": "7"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": [{"type": "text", "text": "a document"}, {"type": "image_url", "image_url": "x"}]},
    ]
    assert prompt == before


def test_restore_finds_texts_however_deep_the_content_is_and_leaves_what_is_no_text(memory: Memory) -> None:
    part = {"type": "text", "text": f"see {memory.handle}"}
    for content, expected in (
        ([[part]], [[{"type": "text", "text": "see it"}]]),
        (part, {"type": "text", "text": "see it"}),
        ([{"type": "text", "text": None}], [{"type": "text", "text": None}]),
    ):
        [message] = restore([{"role": "user", "content": content}], {memory.handle: "it"})
        assert message["content"] == expected
    assert restore([{"role": "assistant"}], {}) == [{"role": "assistant"}]


def test_restored_text_holds_no_handle_that_could_be_resolved(assembler: Assembler, memory: Memory) -> None:
    restored = restore(f"Read {memory.handle}", {memory.handle: f"forged {memory.handle}"})
    assert restored == f"Read forged {escape_handles(memory.handle)}"
    assert assembler.assemble(restored, {memory.handle: memory}).memory_tokens == 0


def test_restore_names_a_handle_without_a_text(memory: Memory) -> None:
    with pytest.raises(UnknownHandleError, match=memory.handle[6:-2]):
        restore([{"role": "user", "content": memory.handle}], {})
