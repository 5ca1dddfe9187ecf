"""Prompts with handles in, answers out, whole or as a stream."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pic_rag.generation.answering import Generation
from pic_rag.generation.completion import Completion, Detokenizer
from pic_rag.generation.generator import Generator
from pic_rag.generation.reader import Reader
from pic_rag.generation.sampling import Sampling
from pic_rag.handles import UnknownHandleError, escape_handles, find_handles
from pic_rag.memory import Memory, hash_text

SAMPLED = {"temperature": 1.5, "top_p": 0.95, "seed": 7}


def make_memory(generator: Generator, text: str) -> Memory:
    """A memory made of the text's own token embeddings: it reads as the text does."""
    token_ids = torch.tensor(generator.tokenizer(text).input_ids)
    return Memory(
        embeddings=generator.model.get_input_embeddings()(token_ids).detach(),
        text_tokens=len(token_ids), ratio=1, fingerprint="f" * 64, source_hash=hash_text(text),
        generator=generator.model_id,
    )  # fmt: skip


def wait_for_streams(deadline_s: float = 5.0) -> None:
    end = time.monotonic() + deadline_s
    while any(thread.name.startswith("pic-rag-stream") for thread in threading.enumerate()):
        assert time.monotonic() < end, "a stream is still running"
        time.sleep(0.01)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A model this small only waits for a second thread, seconds long when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def generator(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Generator:
    return Generator(copy.deepcopy(tiny_model), tiny_tokenizer, name="tiny")


@pytest.fixture(scope="module")
def memory(generator: Generator) -> Memory:
    return make_memory(generator, "Paris is the capital of France.")


@pytest.fixture(scope="module")
def prompts(memory: Memory) -> list[Any]:
    """Texts and chats, with and without a memory, of all lengths."""
    return [
        "Who?",
        f"{memory.handle} Where is Paris?",
        [{"role": "user", "content": "Tell me about a river, any river."}],
        [{"role": "tool", "content": memory.handle}, {"role": "user", "content": "Which country?"}],
        f"a {memory.handle}{memory.handle}",
    ]


def test_text_gives_the_tokens_of_plain_generate(generator: Generator) -> None:
    inputs = generator.tokenizer("Who was it?", return_tensors="pt")
    written = generator.model.generate(**inputs, max_new_tokens=24, do_sample=False)  # type: ignore[operator]
    plain = written[0, inputs.input_ids.shape[1] :]
    assert generator.generate("Who was it?", max_new_tokens=24)[0].token_ids == plain.tolist()


def test_a_memory_of_a_texts_own_embeddings_is_answered_as_the_text(generator: Generator, memory: Memory) -> None:
    from_memory = generator.generate(f"Read: {memory.handle} Who?", [memory], max_new_tokens=24)[0]
    from_text = generator.generate("Read: Paris is the capital of France. Who?", max_new_tokens=24)[0]
    assert from_memory.token_ids == from_text.token_ids
    assert (from_memory.memory_tokens, from_text.memory_tokens) == (memory.memory_tokens, 0)
    assert from_memory.prompt_tokens == from_text.prompt_tokens


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_a_batch_equals_its_prompts_one_by_one(
    batch_size: int, sampling: dict[str, Any], generator: Generator, memory: Memory, prompts: list[Any]
) -> None:
    together = generator.generate(prompts, [memory], max_new_tokens=16, batch_size=batch_size, **sampling)
    alone = [generator.generate(prompt, [memory], max_new_tokens=16, **sampling)[0] for prompt in prompts]
    assert together == alone
    assert len({tuple(generation.token_ids) for generation in together}) > 1


def test_an_empty_batch_is_answered_by_an_empty_list(generator: Generator) -> None:
    assert generator.generate([]) == []


def test_one_chat_is_one_prompt_and_a_list_of_chats_is_many(generator: Generator) -> None:
    chat = [{"role": "user", "content": "Who?"}, {"role": "user", "content": "Where?"}]
    one = generator.generate(chat, max_new_tokens=4)
    assert len(one) == 1
    assert generator.generate([chat, chat], max_new_tokens=4) == one * 2


def test_memories_may_come_by_handle(generator: Generator, memory: Memory) -> None:
    listed = generator.generate(memory.handle, [memory], max_new_tokens=4)
    assert generator.generate(memory.handle, {memory.handle: memory}, max_new_tokens=4) == listed


def test_usage_counts_what_was_read_and_written(generator: Generator, memory: Memory) -> None:
    generation = generator.generate(f"ab{memory.handle}", [memory], max_new_tokens=5)[0]
    assert (
        generation.prompt_tokens == 2 + memory.memory_tokens == generator.count_tokens(f"ab{memory.handle}", [memory])
    )
    assert (generation.completion_tokens, generation.finish_reason) == (5, "length")


def test_an_end_token_ends_the_answer_and_adds_no_text(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, generator: Generator
) -> None:
    full = generator.generate("Who?", max_new_tokens=12)[0]
    end = full.token_ids[8]
    model = copy.deepcopy(tiny_model)
    model.generation_config.eos_token_id = [tiny_tokenizer.eos_token_id, end]
    generation = Generator(model, tiny_tokenizer, name="tiny").generate("Who?", max_new_tokens=12)[0]
    written = full.token_ids[: full.token_ids.index(end)]
    assert generation.token_ids == [*written, end]
    assert (generation.text, generation.finish_reason) == (
        tiny_tokenizer.decode(written, skip_special_tokens=True),
        "stop",
    )


@pytest.mark.parametrize("prompt", ["Who?", "handle"], ids=["text", "memory"])
def test_a_stop_string_across_tokens_ends_the_answer_before_it(
    prompt: str, generator: Generator, memory: Memory
) -> None:
    prompt = memory.handle if prompt == "handle" else prompt
    full = generator.generate(prompt, [memory], max_new_tokens=40)[0]
    stop = full.text[10:14]  # a token is a byte here, so this is four tokens or more
    generation = generator.generate(prompt, [memory], max_new_tokens=40, stop=["never seen", stop])[0]
    assert generation.text == full.text[: full.text.index(stop)]
    assert generation.finish_reason == "stop"
    assert generation.completion_tokens < full.completion_tokens
    assert "".join(generator.stream(prompt, [memory], max_new_tokens=40, stop=[stop])) == generation.text


def test_a_special_token_stops_as_a_stop_string(generator: Generator) -> None:
    """Its text is never shown, so it has to be known by its id."""
    special = "<|im_start|>"
    ids = generator.tokenizer(f"said{special}user", add_special_tokens=False).input_ids
    for stop, text in ((["END", special], "said"), (["END"], "saiduser")):
        completion = generator._completion(Sampling(max_new_tokens=len(ids), stop=stop))
        for token_id in ids:
            if not completion.finished:
                completion.push(token_id)
        assert completion.text == text


def test_a_stop_string_in_the_prompt_stops_nothing(generator: Generator) -> None:
    assert generator.generate("END Who? EN", max_new_tokens=6, stop=["END"])[0].completion_tokens == 6


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_stream_joins_to_the_generated_text(
    sampling: dict[str, Any], generator: Generator, memory: Memory, prompts: list[Any]
) -> None:
    for prompt in prompts:
        stream = generator.stream(prompt, [memory], max_new_tokens=24, **sampling)
        pieces: list[str] = []
        try:
            while True:
                pieces.append(next(stream))
        except StopIteration as end:
            generation = end.value
        assert generation == generator.generate(prompt, [memory], max_new_tokens=24, **sampling)[0]
        assert "".join(pieces) == generation.text
        assert all(pieces)
        assert len(pieces) > 1


def test_an_abandoned_stream_stops_the_model_and_frees_it(generator: Generator) -> None:
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1

    hook = generator.model.register_forward_hook(count)
    try:
        stream = generator.stream("Who?", max_new_tokens=1500)
        next(stream)
        stream.close()
        wait_for_streams()
    finally:
        hook.remove()
    assert steps < 500
    assert len(generator.generate("Who?", max_new_tokens=2)) == 1


def test_a_cancelled_call_that_waits_for_its_turn_gives_its_thread_back(generator: Generator) -> None:
    engine = generator._engine

    async def cancel() -> None:
        with engine._lock:  # somebody else's answer
            first = asyncio.ensure_future(generator.agenerate(["a"], max_new_tokens=2))
            while not engine._turns._group:
                await asyncio.sleep(0.01)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(generator.agenerate(["b"], max_new_tokens=2), timeout=0.2)
            deadline = time.monotonic() + 10
            while engine._turns._waiting and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            assert not engine._turns._waiting
        await first

    asyncio.run(cancel())


def test_a_stream_that_is_never_read_runs_nothing(generator: Generator) -> None:
    stream = generator.stream("Who?", max_new_tokens=1500)
    assert len(generator.generate("Who?", max_new_tokens=2)) == 1
    stream.close()
    wait_for_streams(0.5)


def test_a_consumer_may_ask_the_same_generator_inside_its_loop(generator: Generator) -> None:
    stream = generator.stream("Who?", max_new_tokens=8)
    next(stream)
    assert generator.generate("Where?", max_new_tokens=2)[0].completion_tokens == 2
    assert "".join(stream)


def test_an_error_of_the_model_reaches_the_consumer_and_leaves_the_generator_usable(generator: Generator) -> None:
    expected = generator.generate("Who?", max_new_tokens=2)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    hook = generator.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(generator.stream("Who?", max_new_tokens=2))
    hook.remove()
    assert generator.generate("Who?", max_new_tokens=2) == expected


def test_a_wrong_prompt_is_refused_when_the_stream_is_asked_for(generator: Generator, memory: Memory) -> None:
    with pytest.raises(UnknownHandleError, match=memory.handle[6:-2]):
        generator.stream(memory.handle)


def test_a_seed_repeats_an_answer_and_leaves_torchs_random_numbers_alone(generator: Generator) -> None:
    before = torch.get_rng_state()
    first, again, other = (
        generator.generate("Who?", max_new_tokens=16, temperature=1.5, seed=seed)[0].token_ids for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)


def test_no_seed_gives_new_answers(generator: Generator) -> None:
    answers = {tuple(generator.generate("Who?", max_new_tokens=16, temperature=1.5)[0].token_ids) for _ in range(3)}
    assert len(answers) > 1


def test_a_small_nucleus_or_temperature_is_greedy(generator: Generator) -> None:
    greedy = generator.generate("Who?", max_new_tokens=12)
    assert generator.generate("Who?", max_new_tokens=12, temperature=1.0, top_p=1e-6, seed=3) == greedy
    assert generator.generate("Who?", max_new_tokens=12, temperature=1e-4, seed=3) == greedy


def test_draws_follow_the_models_probabilities(generator: Generator) -> None:
    inputs = generator.tokenizer("Who?", return_tensors="pt")
    with torch.no_grad():
        probabilities = generator.model(**inputs).logits[0, -1].softmax(-1)
    likeliest = int(probabilities.argmax())
    draws = [
        generator.generate("Who?", max_new_tokens=1, temperature=1.0, seed=seed)[0].token_ids[0] for seed in range(200)
    ]
    expected = float(probabilities[likeliest])
    assert abs(draws.count(likeliest) / 200 - expected) < 4 * (expected * (1 - expected) / 200) ** 0.5


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of 1 or more, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number of 1 or more, got 2.5"),
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, got nan"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"stop": [""]}, "stop must be a list of non-empty strings"),
        ({"stop": [5]}, "stop must be a list of non-empty strings, got .5."),
        ({"temperature": None}, "temperature must be 0 or more, got None"),
        ({"top_p": None}, "top_p must be above 0 and at most 1, got None"),
        ({"stop": "END"}, "stop must be a list of non-empty strings, got 'END'"),
        ({"batch_size": 0}, "batch_size must be a whole number of 1 or more, got 0"),
        ({"batch_size": "4"}, "batch_size must be a whole number of 1 or more, got '4'"),
        ({"seed": 2**70}, "seed must be a whole number from 0 to"),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_refused(setting: dict[str, Any], rule: str, generator: Generator) -> None:
    with pytest.raises(ValueError, match=rule):
        generator.generate("Who?", **setting)


def test_an_empty_prompt_is_refused(generator: Generator) -> None:
    with pytest.raises(ValueError, match="prompt must hold at least one token, got ''"):
        generator.generate(["Who?", ""])


def test_a_prompt_that_leaves_no_room_for_the_answer_is_refused_with_the_numbers(generator: Generator) -> None:
    assert generator.context_tokens == 2048
    with pytest.raises(ValueError, match=r"context of 2048 tokens, got 2000 \+ 49"):
        generator.generate("a" * 2000, max_new_tokens=49)
    assert generator.generate("a" * 2000, max_new_tokens=48, stop=["\N{REPLACEMENT CHARACTER}", "a"])


def test_a_saved_model_loads_and_answers_the_same(generator: Generator, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    generator.model.save_pretrained(folder)
    generator.tokenizer.save_pretrained(folder)
    loaded = Generator.from_pretrained(folder, device="cpu", dtype="float32")
    assert (loaded.model_id, loaded.hidden) == (generator.model_id, 64)
    assert loaded.generate("Who?", max_new_tokens=8) == generator.generate("Who?", max_new_tokens=8)


@pytest.fixture(scope="module")
def reader(tiny_model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that changes the model's answers, saved by peft."""
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(tiny_model), LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("reader")
    adapted.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module", params=[2**30, 0], ids=["merged", "added at every token"])
def reading(
    reader: Path, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, request: pytest.FixtureRequest
) -> Generator:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pic_rag.generation.reader.MERGED_BYTES", request.param)
        return Generator(copy.deepcopy(tiny_model), tiny_tokenizer, name="tiny", reader=reader)


@pytest.fixture(scope="module")
def read_memory(reading: Generator, memory: Memory) -> Memory:
    """The memory as a compressor trained with the reader would have made it."""
    return dataclasses.replace(memory, generator=reading.model_id)


def test_a_reader_is_on_only_for_prompts_with_memories(
    reading: Generator, generator: Generator, memory: Memory, read_memory: Memory, prompts: list[Any]
) -> None:
    plain = generator.generate(prompts, [memory], max_new_tokens=12)
    read = reading.generate(prompts, [read_memory], max_new_tokens=12)
    for before, after in zip(plain, read, strict=True):
        assert (before.token_ids != after.token_ids) == (after.memory_tokens > 0)
    assert read == [reading.generate(prompt, [read_memory], max_new_tokens=12)[0] for prompt in prompts]


def test_a_reader_leaves_the_plain_models_logits_untouched(
    reading: Generator, generator: Generator, read_memory: Memory
) -> None:
    inputs = generator.tokenizer("Who was it?", return_tensors="pt")
    reading.generate(read_memory.handle, [read_memory], max_new_tokens=2)
    with torch.no_grad():
        assert torch.equal(reading.model(**inputs).logits, generator.model(**inputs).logits)


def test_a_merged_reader_says_what_one_added_at_every_token_says(
    reading: Generator, reader: Path, tiny_model: PreTrainedModel, generator: Generator
) -> None:
    inputs = generator.tokenizer("Who was it?", return_tensors="pt")
    added = PeftModel.from_pretrained(copy.deepcopy(tiny_model), reader)
    with torch.no_grad(), reading._engine._reader.switched(on=True):
        assert torch.allclose(reading.model(**inputs).logits, added(**inputs).logits, atol=1e-4)


@pytest.mark.parametrize(
    "further", [{"modules_to_save": ["norm"]}, {"trainable_token_indices": [5, 6]}, {"use_dora": True}], ids=str
)
def test_a_reader_that_is_more_than_a_lora_is_on_as_a_whole_and_off_as_a_whole(
    tiny_model: PreTrainedModel, generator: Generator, tmp_path: Path, further: dict[str, Any]
) -> None:
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, **further)
    adapted = get_peft_model(copy.deepcopy(tiny_model), lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.add_(0.3)
    adapted.save_pretrained(str(tmp_path))
    model = copy.deepcopy(tiny_model)
    reader = Reader(model, tmp_path)
    inputs = generator.tokenizer("Who was it?", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, tiny_model(**inputs).logits)
        with reader.switched(on=True):
            assert torch.allclose(model(**inputs).logits, adapted(**inputs).logits, atol=1e-4)
        assert torch.equal(model(**inputs).logits, tiny_model(**inputs).logits)


def test_a_model_that_is_moved_after_its_reader_was_added_reads_on(
    reader: Path, tiny_model: PreTrainedModel, generator: Generator
) -> None:
    model = copy.deepcopy(tiny_model)
    added = Reader(model, reader)
    model.to(torch.bfloat16)
    inputs = generator.tokenizer("Who was it?", return_tensors="pt")
    with torch.no_grad():
        before = model(**inputs).logits
        with added.switched(on=True):
            assert not torch.equal(model(**inputs).logits, before)
        assert torch.equal(model(**inputs).logits, before)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_an_interrupt_while_the_reader_is_switched_on_leaves_the_model_as_it_was(
    reader: Path, tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(tiny_model)
    added = Reader(model, reader)
    before = [parameter.clone() for parameter in model.parameters()]
    switch = added._switch

    def interrupted(on: bool) -> None:
        switch(on)
        if on:
            raise KeyboardInterrupt

    monkeypatch.setattr(added, "_switch", interrupted)
    with pytest.raises(KeyboardInterrupt), added.switched(on=True):
        pass
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("on", [True, False])
def test_a_reader_that_an_interrupt_has_left_on_in_part_is_off_after_the_next_call(
    reader: Path, tiny_model: PreTrainedModel, on: bool
) -> None:
    model = copy.deepcopy(tiny_model)
    added = Reader(model, reader)
    before = [parameter.clone() for parameter in model.parameters()]
    added._switch(True)
    weight, _ = added._switch.__self__._weights[0]
    weight.data = added._switch.__self__._own[0]  # so far it came
    with added.switched(on=on):
        pass
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before, strict=True))


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft warns of just this
def test_where_the_head_is_the_embeddings_a_reader_on_it_changes_no_embedding(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = copy.deepcopy(tiny_model.config)
    config.tie_word_embeddings = True
    model = type(tiny_model)(config)
    lora = LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    get_peft_model(copy.deepcopy(model), lora).save_pretrained(str(tmp_path))
    reader = Reader(model, tmp_path)
    before = model.get_input_embeddings().weight.clone()
    with reader.switched(on=True):
        assert torch.equal(model.get_input_embeddings().weight, before)


def test_a_reader_is_part_of_the_model_id_so_memories_for_it_are_not_read_without_it(
    reading: Generator, generator: Generator, memory: Memory, read_memory: Memory
) -> None:
    assert reading.model_id.startswith(f"{generator.model_id}+")
    for wrong, mixed_up in ((reading, memory), (generator, read_memory)):
        with pytest.raises(ValueError, match="Memory was made for"):
            wrong.generate(mixed_up.handle, [mixed_up])


def test_spread_memory_tokens_sit_where_the_text_would(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    spread = Generator(tiny_model, tiny_tokenizer, name="tiny", generator_positions="spread")
    text = "Paris is the capital."  # a token a byte: 21
    embed = tiny_model.get_input_embeddings()
    made = dataclasses.replace(
        make_memory(spread, text), ratio=4, embeddings=embed(torch.arange(40, 46)).detach()
    )  # 6 memory tokens
    before, after = (tiny_tokenizer(part, return_tensors="pt").input_ids[0] for part in ("Read: ", " Who?"))
    rows = torch.cat([embed(before), made.embeddings, embed(after)])[None].detach()
    positions = [0, 1, 2, 3, 4, 5, 9, 13, 17, 21, 25, 26, 27, 28, 29, 30, 31]
    expected: list[int] = []
    for _ in range(6):
        logits = tiny_model(inputs_embeds=rows, position_ids=torch.tensor([positions])).logits
        expected.append(int(logits[0, -1].argmax()))
        rows = torch.cat([rows, embed(torch.tensor([[expected[-1]]])).detach()], dim=1)
        positions.append(positions[-1] + 1)
    longer = f"Read this, all of it: {made.handle} Who?"
    for prompts in ([f"Read: {made.handle} Who?"], [longer, f"Read: {made.handle} Who?"]):  # alone, and padded
        assert spread.generate(prompts, [made], max_new_tokens=6)[-1].token_ids == expected
    contiguous = Generator(tiny_model, tiny_tokenizer, name="tiny")
    same = dataclasses.replace(made, generator=contiguous.model_id)
    assert contiguous.generate(f"Read: {same.handle} Who?", [same], max_new_tokens=6)[0].token_ids != expected


def test_a_memory_for_other_positions_is_refused_and_spread_ones_count_as_their_text(
    generator: Generator, memory: Memory
) -> None:
    spread = Generator(generator.model, generator.tokenizer, name="tiny", generator_positions="spread")
    with pytest.raises(ValueError, match=r"was made for 'tiny@[0-9a-f]{16}' .* but the generator is 'tiny@.*~spread'"):
        spread.generate(memory.handle, [memory])
    with pytest.raises(ValueError, match="generator_positions must be contiguous or spread, got 'apart'"):
        Generator(generator.model, generator.tokenizer, name="tiny", generator_positions="apart")  # type: ignore[arg-type]
    long = dataclasses.replace(
        memory, generator=spread.model_id, ratio=64, text_tokens=1984, embeddings=memory.embeddings[:31]
    )
    with pytest.raises(ValueError, match=r"context of 2048 tokens, got 1984 \+ 65\. .* or retrieve less text"):
        spread.generate(long.handle, [long], max_new_tokens=65)


def test_many_threads_get_what_one_thread_gets_reader_or_not(
    reading: Generator, read_memory: Memory, prompts: list[Any]
) -> None:
    asked = [prompts[number % len(prompts)] for number in range(32)]
    expected = [reading.generate(prompt, [read_memory], max_new_tokens=8)[0] for prompt in asked]

    def ask(number: int) -> str | Generation:
        if number % 4 == 3:
            return "".join(reading.stream(asked[number], [read_memory], max_new_tokens=8))
        return reading.generate(asked[number], [read_memory], max_new_tokens=8)[0]

    with ThreadPoolExecutor(32) as threads:
        answers = list(threads.map(ask, range(32)))
    assert answers == [one.text if number % 4 == 3 else one for number, one in enumerate(expected)]


def test_a_reader_is_switched_off_after_an_error(reading: Generator, generator: Generator, read_memory: Memory) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    hook = reading.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        reading.generate(read_memory.handle, [read_memory])
    hook.remove()
    assert reading.generate("Who?", max_new_tokens=8) == generator.generate("Who?", max_new_tokens=8)


def test_a_reader_must_be_a_lora_that_fits(
    reader: Path, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    ia3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(copy.deepcopy(tiny_model), ia3).save_pretrained(str(tmp_path / "ia3"))
    config = copy.deepcopy(tiny_model.config)
    config.hidden_size, config.head_dim = 32, 8
    narrow = type(tiny_model)(config)
    for model, folder, rule in (
        (tiny_model, tmp_path / "nowhere", "must be a folder saved by peft"),
        (tiny_model, tmp_path / "ia3", "must be a LoRA, got .*IA3"),
        (narrow, reader, "must fit the generator's layers"),
    ):
        with pytest.raises(ValueError, match=rule):
            Generator(copy.deepcopy(model), tiny_tokenizer, name="tiny", reader=folder)


def test_peft_is_loaded_only_with_a_reader() -> None:
    code = "import sys, pic_rag.generation.generator; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Decodes as Llama 2, Mistral and Gemma do: spaces as "▁", the first one stripped, unknown characters in bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyzENDT.", "▁the"]
    tokenizer = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, [], byte_fallback=True))
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(params=["byte level", "byte fallback"])
def tokenizer(
    request: pytest.FixtureRequest,
    tiny_tokenizer: PreTrainedTokenizerFast,
    byte_fallback_tokenizer: PreTrainedTokenizerFast,
) -> PreTrainedTokenizerFast:
    return tiny_tokenizer if request.param == "byte level" else byte_fallback_tokenizer


@pytest.mark.parametrize("text", ["the▁end▁of▁the", "naïve 你好🙂🙂 ça va", "abc"])
def test_text_is_decoded_token_by_token_without_half_a_character(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token_id) for token_id in token_ids]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert "".join(pieces) == tokenizer.decode(token_ids)
    assert detokenizer.flush() == ""


def test_a_token_without_text_does_not_swallow_the_space_after_it(
    byte_fallback_tokenizer: PreTrainedTokenizerFast,
) -> None:
    words = [byte_fallback_tokenizer.get_vocab()[word] for word in ("▁the", "<unk>", "<unk>", "▁the")]
    detokenizer = Detokenizer(byte_fallback_tokenizer)
    assert "".join(map(detokenizer.push, words)) == "the the"


def test_a_character_cut_short_shows_at_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    token_ids = tokenizer("a🙂", add_special_tokens=False).input_ids[:-1]
    detokenizer = Detokenizer(tokenizer)
    assert "".join(map(detokenizer.push, token_ids)) == "a"
    assert detokenizer.flush().strip("\N{REPLACEMENT CHARACTER}") == ""


@pytest.mark.parametrize("stop", [(), ("Nile",)])
def test_a_handle_that_the_model_writes_is_escaped_in_the_stream_as_well(
    stop: tuple[str, ...], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    said = f"a [[pic: and [[pic:{'0f' * 16}]] [[Nile"
    pieces: list[str] = []
    token_ids = tiny_tokenizer(said, add_special_tokens=False).input_ids
    completion = Completion(
        tiny_tokenizer, end_token_ids=(), max_new_tokens=len(token_ids), stop=stop, on_text=pieces.append
    )
    for token_id in token_ids:
        if not completion.finished:
            completion.push(token_id)
    assert completion.text == escape_handles(said).removesuffix(stop[0] if stop else "")
    assert "".join(pieces) == completion.text
    assert find_handles(completion.text) == []
    assert len(pieces) > 10


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("the answer. END of it", ["END"], "the answer. "),
        ("EEND", ["END"], "E"),
        ("ENabc", ["END"], "ENabc"),
        ("ab你好", ["你好"], "ab"),
        ("abcEN", ["END"], "abcEN"),
        ("aENDbT", ["T", "END"], "a"),
    ],
)
def test_no_part_of_a_stop_string_is_ever_released(
    text: str, stop: list[str], expected: str, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    released: list[str] = []
    token_ids = tiny_tokenizer(text).input_ids
    completion = Completion(
        tiny_tokenizer, end_token_ids=[], max_new_tokens=len(token_ids), stop=stop, on_text=released.append
    )
    for token_id in token_ids:
        if not completion.finished:
            completion.push(token_id)
        assert expected.startswith("".join(released))
    assert "".join(released) == completion.text == expected
    assert completion.finish_reason == ("length" if expected == text else "stop")
