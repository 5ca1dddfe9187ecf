"""Many threads, one model: calls that wait are decoded together."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pic_rag.generation.answering import Generation
from pic_rag.generation.generator import Generator
from pic_rag.memory import Memory, hash_text

SAMPLED = {"temperature": 1.5, "top_p": 0.95, "seed": 7}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def generator(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Generator:
    return Generator(copy.deepcopy(tiny_model), tiny_tokenizer, name="tiny", merge_calls=True)


@pytest.fixture(scope="module")
def memory(generator: Generator) -> Memory:
    token_ids = torch.tensor(generator.tokenizer("Paris is the capital of France.").input_ids)
    return Memory(
        embeddings=generator.model.get_input_embeddings()(token_ids).detach(),
        text_tokens=len(token_ids), ratio=1, fingerprint="f" * 64, source_hash=hash_text("Paris"),
        generator=generator.model_id,
    )  # fmt: skip


class Gate:
    """Holds the model at its next step, and counts the prompts of every batch that it starts to read."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.held = threading.Event()
        self.batches: list[int] = []
        self.steps: list[int] = []

    def __call__(self, _: object, args: tuple[torch.Tensor, ...]) -> None:
        prompts, rows = args[0].shape[:2]
        self.steps.append(prompts)
        if rows > 1:
            self.batches.append(prompts)
        self.held.set()
        assert self.open.wait(20)


@contextmanager
def gate(generator: Generator) -> Iterator[Gate]:
    held = Gate()
    hook = generator.model.get_submodule("model.layers.0").register_forward_pre_hook(held)
    try:
        yield held
    finally:
        held.open.set()
        hook.remove()


def wait_for(condition: Callable[[], bool], deadline_s: float = 20.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def waiting(generator: Generator) -> int:
    return len(generator._engine._turns._waiting)


@contextmanager
def behind_another(generator: Generator, calls: list[Callable[[], Any]]) -> Iterator[tuple[list[Any], Gate]]:
    """Futures of calls that all wait, in this order, for a text that is being decoded, until the gate opens."""
    with ThreadPoolExecutor(len(calls) + 1) as threads, gate(generator) as held:
        futures = [threads.submit(generator.generate, "First?", max_new_tokens=2)]
        assert held.held.wait(20)
        for number, call in enumerate(calls, start=1):
            futures.append(threads.submit(call))
            wait_for(lambda number=number: waiting(generator) == number)
        yield futures[1:], held


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_calls_that_wait_are_decoded_together_and_answered_as_alone(
    sampling: dict[str, Any], generator: Generator, memory: Memory
) -> None:
    prompts = [f"{'W' * number}ho is {memory.handle}" for number in range(1, 7)]
    alone = [generator.generate(prompt, [memory], max_new_tokens=12, **sampling) for prompt in prompts]

    def ask(prompt: str) -> list[Generation]:
        return generator.generate(prompt, [memory], max_new_tokens=12, **sampling)

    with behind_another(generator, [lambda prompt=prompt: ask(prompt) for prompt in prompts]) as (futures, held):
        held.open.set()
        assert [future.result(20) for future in futures] == alone
    assert held.batches == [1, 6]


def test_only_alike_calls_go_together_and_no_more_than_fit(generator: Generator, memory: Memory) -> None:
    calls: list[Callable[[], Any]] = [
        *(lambda: generator.generate("Who?", max_new_tokens=4) for _ in range(9)),  # one more than a batch takes
        lambda: generator.generate("Who?", max_new_tokens=5),
        lambda: generator.generate("Who?", max_new_tokens=4, temperature=1.0, seed=1),
        lambda: generator.generate(f"Who?{memory.handle}", [memory], max_new_tokens=4),
        lambda: generator.generate("Who? " * 20, max_new_tokens=4),  # the others would be mostly padding
        lambda: generator.generate(["Who?"] * 8, max_new_tokens=4),  # a full batch of its own
    ]
    with behind_another(generator, calls) as (futures, held):
        held.open.set()
        assert [len(future.result(20)) for future in futures] == [1] * 13 + [8]
    assert held.batches == [1, 8, 1, 1, 1, 1, 1, 8]


def test_a_generators_batch_size_bounds_what_goes_together(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    one_by_one = Generator(tiny_model, tiny_tokenizer, name="tiny", batch_size=1, merge_calls=True)
    with behind_another(one_by_one, [lambda: one_by_one.generate("Who?", max_new_tokens=2)] * 3) as (futures, held):
        held.open.set()
        assert len({future.result(20)[0].text for future in futures}) == 1
    assert held.batches == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="batch_size must be a whole number of 1 or more, got 0"):
        Generator(tiny_model, tiny_tokenizer, name="tiny", batch_size=0)


def test_streams_and_calls_go_together_and_a_consumer_that_walks_away_harms_nobody(generator: Generator) -> None:
    """A batch of two streams and a call; the first stream is closed after a piece, the others are whole."""
    expected = generator.generate(["Who?", "Where?"], max_new_tokens=40)

    def walk_away() -> str:
        stream = generator.stream("When?", max_new_tokens=40)
        piece = next(stream)
        stream.close()
        return piece

    calls: list[Callable[[], Any]] = [
        walk_away,
        lambda: "".join(generator.stream("Who?", max_new_tokens=40)),
        lambda: generator.generate("Where?", max_new_tokens=40),
    ]
    with behind_another(generator, calls) as (futures, held):
        held.open.set()
        assert futures[0].result(20)
        assert [futures[1].result(20), futures[2].result(20)] == [expected[0].text, [expected[1]]]
    assert held.batches == [1, 3]


def test_a_stream_that_is_abandoned_while_it_waits_is_not_decoded(generator: Generator) -> None:
    stream = generator.stream("Who?", max_new_tokens=4)
    with behind_another(generator, [lambda: list(stream), lambda: generator.generate("Who?", max_new_tokens=4)]) as (
        (gone, wanted),
        held,
    ):
        request = generator._engine._turns._waiting[0].request
        request.completions[0].abandoned = True  # what closing the stream does
        held.open.set()
        assert len(wanted.result(20)) == 1
        assert gone.result(20) == []
    assert held.batches == [1, 1]


def test_a_short_answer_does_not_wait_for_the_long_ones_beside_it(generator: Generator) -> None:
    full = generator.generate("Where?", max_new_tokens=60)[0]
    stop = [full.text[2:6]]
    short = generator.generate("Where?", max_new_tokens=60, stop=stop)[0]
    long = generator.generate("Who?", max_new_tokens=60, stop=stop)[0]
    assert short.completion_tokens < long.completion_tokens == 60
    stepped: list[int] = []

    def ask(prompt: str) -> list[Generation]:
        answer = generator.generate(prompt, max_new_tokens=60, stop=stop)
        stepped.append(len(held.steps))
        return answer

    with behind_another(generator, [lambda: ask("Who?"), lambda: ask("Where?")]) as (futures, held):
        held.open.set()
        assert [future.result(20) for future in futures] == [[long], [short]]
    assert held.batches == [1, 2]
    assert stepped[0] < stepped[1]


def test_the_end_of_a_stream_does_not_wait_for_the_batch_either(generator: Generator) -> None:
    full = generator.generate("Where?", max_new_tokens=60)[0]
    stop = [full.text[2:6]]
    with behind_another(
        generator,
        [
            lambda: (list(generator.stream("Where?", max_new_tokens=60, stop=stop)), len(held.steps)),
            lambda: (generator.generate("Who?", max_new_tokens=60, stop=stop), len(held.steps)),
        ],
    ) as (futures, held):
        held.open.set()
        (pieces, short), (_, long) = (future.result(20) for future in futures)
    assert "".join(pieces) == full.text[:2]
    assert short < long
    assert held.batches == [1, 2]


def test_two_generators_of_one_model_take_turns(generator: Generator) -> None:
    """A reader of one of them would be on in the answers of the other."""
    other = Generator(generator.model, generator.tokenizer, name="tiny")
    with ThreadPoolExecutor(2) as threads, gate(generator) as held:
        first = threads.submit(generator.generate, "First?", max_new_tokens=2)
        assert held.held.wait(20)
        second = threads.submit(other.generate, "Second?", max_new_tokens=2)
        time.sleep(0.2)
        assert held.batches == [1]
        held.open.set()
        assert first.result(20)
        assert second.result(20)


def test_a_padding_token_that_the_model_has_no_row_for_is_not_used(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[ANOTHER]"})
    assert tokenizer.pad_token_id >= tiny_model.config.vocab_size
    prompts = ["Who?", "And who was it then?"]
    padded, plain = (Generator(tiny_model, each, name="tiny") for each in (tokenizer, tiny_tokenizer))
    assert padded.generate(prompts, max_new_tokens=4) == plain.generate(prompts, max_new_tokens=4)


def test_a_stream_whose_event_loop_was_closed_harms_no_call_beside_it(generator: Generator) -> None:
    async def begin() -> Any:
        pieces = generator.astream("Who was it, and when?", max_new_tokens=16)
        await anext(pieces)
        return pieces

    loop = asyncio.new_event_loop()
    with ThreadPoolExecutor(2) as threads, gate(generator) as held:
        begun = threads.submit(loop.run_until_complete, begin())
        assert held.held.wait(20)
        held.open.set()
        stream = begun.result(20)
        held.open.clear()
        loop.close()
        beside = threads.submit(generator.generate, "Who was it, and where?", max_new_tokens=16)
        held.open.set()
        assert beside.result(20)[0].completion_tokens == 16
    assert stream is not None


def test_an_error_reaches_the_caller_it_belongs_to(generator: Generator) -> None:
    """Token 'Z' breaks the model: the prompt that holds it fails, the ones that wait beside it are answered."""
    expected = generator.generate(["Who?", "Where?"], max_new_tokens=4)
    [broken] = generator.tokenizer("Z").input_ids

    def fail(_: object, args: tuple[torch.Tensor, ...]) -> None:
        if (args[0] == broken).any():
            raise RuntimeError("out of memory")

    hook = generator.model.get_input_embeddings().register_forward_pre_hook(fail)
    try:
        prompts = ["Who?", "Zzz?", "Where?"]
        calls = [lambda prompt=prompt: generator.generate(prompt, max_new_tokens=4) for prompt in prompts]
        with behind_another(generator, calls) as ((who, zzz, where), held):
            held.open.set()
            assert who.result(20) + where.result(20) == expected
            with pytest.raises(RuntimeError, match="out of memory"):
                zzz.result(20)
    finally:
        hook.remove()


def test_a_batch_too_large_for_the_machine_is_decoded_one_call_at_a_time(generator: Generator) -> None:
    expected = generator.generate(["Who?", "Where?"], max_new_tokens=4)

    def fail(_: object, args: tuple[torch.Tensor, ...]) -> None:
        if len(args[0]) > 1:
            raise RuntimeError("out of memory")

    hook = generator.model.get_input_embeddings().register_forward_pre_hook(fail)
    try:
        calls = [lambda prompt=prompt: generator.generate(prompt, max_new_tokens=4) for prompt in ("Who?", "Where?")]
        with behind_another(generator, calls) as (futures, held):
            held.open.set()
            assert [future.result(20)[0] for future in futures] == expected
    finally:
        hook.remove()


def test_32_threads_of_all_kinds_get_what_one_thread_gets(generator: Generator, memory: Memory) -> None:
    kinds: list[tuple[str, dict[str, Any]]] = [
        (f"{prompt}{number}", sampling)
        for number in range(4)
        for prompt in ("Who?", f"Read: {memory.handle} Where is ", f"a{memory.handle}{memory.handle} Hm ", "Tell me. ")
        for sampling in ({}, SAMPLED)
    ]
    expected = [generator.generate(prompt, [memory], max_new_tokens=10, **settings)[0] for prompt, settings in kinds]
    start = threading.Barrier(len(kinds))

    def ask(number: int) -> str:
        prompt, settings = kinds[number]
        start.wait(20)
        if number % 3 == 0:
            return "".join(generator.stream(prompt, [memory], max_new_tokens=10, **settings))
        return generator.generate(prompt, [memory], max_new_tokens=10, **settings)[0].text

    with gate(generator) as held, ThreadPoolExecutor(len(kinds)) as threads:
        held.open.set()
        for _ in range(3):
            assert list(threads.map(ask, range(len(kinds)))) == [answer.text for answer in expected]
    assert sum(held.batches) == 3 * len(kinds)
    assert len(held.batches) < 2 * len(kinds)


def test_scores_are_the_models_log_probabilities_of_the_answer(generator: Generator, memory: Memory) -> None:
    """Of prompts of different lengths in one batch, with and without memories, as a plain forward gives them."""
    prompts = [f"Read: {memory.handle} Who?", memory.handle]
    targets = [torch.tensor(generator.tokenizer(text).input_ids) for text in ("Ida", "Paris, France")]
    texts = ["Read: Paris is the capital of France. Who?", "Paris is the capital of France."]
    for asked in (prompts, texts):
        scored = generator.score(asked, targets, [memory])
        for text, ids, log_probs in zip(texts, targets, scored, strict=True):
            whole = torch.cat([torch.tensor(generator.tokenizer(text).input_ids), ids])
            with torch.no_grad():
                expected = generator.model(whole[None]).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
            assert torch.allclose(log_probs, expected.gather(1, ids[:, None])[:, 0], atol=1e-4)


def test_calls_take_turns_unless_they_may_be_merged(generator: Generator) -> None:
    apart = Generator(generator.model, generator.tokenizer, name="tiny")
    gate = Gate()
    hook = apart.model.register_forward_pre_hook(
        lambda module, _, given: gate(module, (given["input_ids"],)), with_kwargs=True
    )
    gate.open.set()
    try:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda _: apart.generate("Who?", max_new_tokens=3), range(8)))
    finally:
        hook.remove()
    assert gate.batches == [1] * 8


def test_coroutines_that_wait_for_the_model_leave_the_event_loop_its_threads_and_share_a_batch(
    generator: Generator,
) -> None:
    async def ask() -> list[str]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        calls = [asyncio.ensure_future(generator.agenerate("Who?", max_new_tokens=3)) for _ in range(9)]
        await asyncio.sleep(0)  # all of them begin, and prepare their prompts in that thread
        try:
            assert await asyncio.to_thread(held.held.wait, 10)
            await asyncio.sleep(0.2)  # the others wait for the model
        finally:
            held.open.set()
        return [answer.text for [answer] in await asyncio.gather(*calls)]

    with gate(generator) as held:
        answers = asyncio.run(ask())
    assert answers == [generator.generate("Who?", max_new_tokens=3)[0].text] * 9
    assert max(held.batches) > 1


def test_the_output_head_is_never_given_a_slice_of_the_prompt_for_which_torch_copies_its_weights(
    generator: Generator, memory: Memory
) -> None:
    strides = []
    head = generator.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda head, given, logits: strides.append((given[0].shape, given[0].stride())))
    generator.generate([f"Who? {memory.handle} Where?", memory.handle], [memory], max_new_tokens=1)
    hook.remove()
    assert strides == [((2, 1, 64), (64, 64, 1))]
