"""A memory's fidelity is what the generator knows of the text from it, and a floor under it decides the ratio."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import make_tiny_model
from peft import LoraConfig, get_peft_model

from pic_rag.compression.compressor import Compressor
from pic_rag.compression.fidelity import FidelityCheck
from pic_rag.config import PicConfig
from pic_rag.evaluation.fidelity import FidelityReport, evaluate_fidelity
from pic_rag.evaluation.metrics import auroc, contains_answer
from pic_rag.evaluation.report import report_table
from pic_rag.generation.generator import Generator
from pic_rag.memory import Memory
from pic_rag.prompts import rag_messages, repeat_messages
from pic_rag.questions import Context, Question
from pic_rag.store import MemoryCache, ShardStore, SQLiteStore

CONFIG = PicConfig(ratio=4, ratios=(2, 4, 8), segment_tokens=64, encoder_layers=2, lora_rank=2)
TEXTS = [
    "The harbour of Amsel lay still until 4 May 1887, and nobody spoke before the bell rang. " * 2,  # three segments
    "Bees dance.",
    "",
    "no name and no number is in here",
]
REPEATED = ["abcdefgh", "badcfehg", "hgfedcba", "aabbccdd", "ddccbbaa", "ghghefef"]


@pytest.fixture(scope="module")
def compressor(tiny_model, tiny_tokenizer) -> Compressor:
    return Compressor.from_base(tiny_model, tiny_tokenizer, CONFIG)


@pytest.fixture(scope="module")
def generator(tiny_model, tiny_tokenizer) -> Generator:
    return Generator(tiny_model, tiny_tokenizer, name="LlamaForCausalLM")


@pytest.fixture(scope="module")
def check(generator) -> FidelityCheck:
    return FidelityCheck(generator, CONFIG.segment_tokens)


@pytest.fixture
def compressed(compressor, monkeypatch) -> list[int]:
    """The ratios at which the encoder was put to work, as the test goes on."""
    ratios: list[int] = []
    really = Compressor._compress

    def count(self, texts, own, *args):
        ratios.extend(own)
        return really(self, texts, own, *args)

    monkeypatch.setattr(Compressor, "_compress", count)
    return ratios


def plain_loss(model, tokenizer, text: str) -> float:
    """The model's own mean loss on a text that it has just read and is asked to repeat."""
    template = {"tokenize": False, "add_generation_prompt": True}
    prompt = tokenizer(tokenizer.apply_chat_template(repeat_messages(text), **template)).input_ids
    ids = torch.tensor([prompt + tokenizer(text).input_ids])
    labels = ids.clone()
    labels[0, : len(prompt)] = -100
    with torch.no_grad():
        return model(ids, labels=labels).loss.item()


# The measure


def test_raw_text_has_the_loss_that_the_plain_model_has_on_the_text(
    compressor, generator, check, tiny_model, tiny_tokenizer
) -> None:
    text = "Bees dance in May 1887."
    [raw] = compressor.compress([text], min_fidelity=1.0, generator=generator)
    assert raw.ratio == 1
    [measured] = check.measure([text], [raw])
    assert measured.loss == pytest.approx(plain_loss(tiny_model, tiny_tokenizer, text), rel=1e-4)


def test_a_reader_is_on_while_its_memories_are_measured(compressor, tiny_tokenizer, tmp_path) -> None:
    lora = get_peft_model(
        make_tiny_model(tiny_tokenizer), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    lora.save_pretrained(str(tmp_path))
    generator = Generator(make_tiny_model(tiny_tokenizer), tiny_tokenizer, name="LlamaForCausalLM", reader=tmp_path)
    text = "Bees dance in May 1887."
    [raw] = compressor.compress(
        [text],
        min_fidelity=1.0,
        generator=Generator(make_tiny_model(tiny_tokenizer), tiny_tokenizer, name="LlamaForCausalLM"),
    )
    [measured] = FidelityCheck(generator).measure([text], [dataclasses.replace(raw, generator=generator.model_id)])
    merged = lora.merge_and_unload()
    assert measured.loss == pytest.approx(plain_loss(merged, tiny_tokenizer, text), rel=1e-4)
    assert measured.loss != pytest.approx(plain_loss(make_tiny_model(tiny_tokenizer), tiny_tokenizer, text), rel=1e-2)


def test_numbers_names_and_dates_are_measured_apart(compressor, check, tiny_tokenizer, generator) -> None:
    text = "Bees dance in May 1887."
    [memory] = compressor.compress([text], 4)
    [target] = generator.score(
        [repeat_messages(memory.handle)], [torch.tensor(tiny_tokenizer(text).input_ids)], [memory]
    )
    [measured] = check.measure([text], [memory])
    told = torch.cat([target[14:17], target[18:22]])  # one token a byte: "May", "1887"
    assert measured.telling_loss == pytest.approx(-told.mean().item(), rel=1e-4)
    assert measured.telling_recall == pytest.approx(told.exp().mean().item(), rel=1e-4)
    assert measured.recall == pytest.approx(target.exp().mean().item(), rel=1e-4)


def test_a_text_without_numbers_and_names_is_measured_by_all_its_tokens(compressor, check) -> None:
    [measured] = check.measure(TEXTS[3:], compressor.compress(TEXTS[3:], 4))
    assert (measured.telling_loss, measured.telling_recall) == (measured.loss, measured.recall)


def test_an_empty_text_has_lost_nothing(compressor, generator) -> None:
    [memory] = compressor.compress([""], min_fidelity=1.0, generator=generator)
    assert (memory.ratio, memory.fidelity, memory.memory_tokens) == (8, 1.0, 0)


def test_a_long_document_is_measured_segment_by_segment(compressor, check) -> None:
    text = TEXTS[0]
    [memory] = compressor.compress([text], 4)
    [whole] = check.measure([text], [memory])
    parts = [text[start : start + 64] for start in range(0, len(text), 64)]  # one token a byte
    sizes = [len(part) for part in parts]
    losses = [fidelity.loss for fidelity in check.measure(parts, compressor.compress(parts, 4))]
    expected = sum(size * loss for size, loss in zip(sizes, losses, strict=True)) / sum(sizes)
    assert len(parts) == 3
    assert whole.loss == pytest.approx(expected, rel=1e-4)


def test_a_batch_measures_what_each_memory_measures_alone(compressor, check) -> None:
    memories = compressor.compress(TEXTS, 4)
    together = check.measure(TEXTS, memories)
    for text, memory, fidelity in zip(TEXTS, memories, together, strict=True):
        [alone] = check.measure([text], [memory])
        assert dataclasses.astuple(alone) == pytest.approx(dataclasses.astuple(fidelity), rel=1e-4)


@pytest.fixture(scope="module")
def repeating(tiny_tokenizer) -> tuple[Compressor, Generator]:
    """A tiny generator that has learned to repeat `REPEATED`: a random one cannot tell a memory from noise."""
    model = make_tiny_model(tiny_tokenizer).train()
    prompts = [
        tiny_tokenizer.apply_chat_template(repeat_messages(text), tokenize=False, add_generation_prompt=True)
        for text in REPEATED
    ]
    ids = torch.tensor(tiny_tokenizer([a + b for a, b in zip(prompts, REPEATED, strict=True)]).input_ids)
    labels = ids.clone()
    labels[:, : -len(REPEATED[0])] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(ids, labels=labels).loss.backward()
        optimizer.step()
    model.eval()
    compressor = Compressor.from_base(model, tiny_tokenizer, CONFIG)
    return compressor, Generator(model, tiny_tokenizer, name="LlamaForCausalLM")


def test_noise_in_a_memory_lowers_its_fidelity(repeating) -> None:
    compressor, generator = repeating
    check = FidelityCheck(generator)
    memories = compressor.compress(REPEATED, min_fidelity=1.0, generator=generator)
    scale = generator.model.get_input_embeddings().weight.std()
    noise = torch.Generator().manual_seed(0)
    scores = []
    for share in (0.0, 1.0, 4.0):
        noisy = [
            dataclasses.replace(
                memory,
                embeddings=memory.embeddings + share * scale * torch.randn(memory.embeddings.shape, generator=noise),
            )
            for memory in memories
        ]
        scores.append(sum(fidelity.score for fidelity in check.measure(REPEATED, noisy)) / len(REPEATED))
    assert scores[0] > 0.9
    assert scores[0] > scores[1] > scores[2]


def test_a_memory_of_another_text_or_another_tokenizer_is_refused(compressor, check) -> None:
    [memory] = compressor.compress(["Bees dance."], 4)
    with pytest.raises(ValueError, match="must be of the text it is checked against, got another"):
        check.measure(["Bees sleep."], [memory])
    with pytest.raises(ValueError, match="must share the compressor's tokenizer, got 11 tokens for a text of 5"):
        check.measure(["Bees dance."], [dataclasses.replace(memory, text_tokens=5)])


# The floor


def test_no_floor_gives_the_highest_ratio_and_a_floor_of_one_raw_text(compressor, generator, tiny_model) -> None:
    texts = [text for text in TEXTS if text]
    highest = compressor.compress(texts, min_fidelity=0, generator=generator)
    raw = compressor.compress(texts, min_fidelity=1, generator=generator)
    assert {memory.ratio for memory in highest} == {8}
    assert all(0 < memory.fidelity < 1 for memory in highest)
    assert [memory.handle for memory in highest] == [compressor.handle(text, 8) for text in texts]
    for text, memory in zip(texts, raw, strict=True):
        embeddings = tiny_model.get_input_embeddings()(torch.tensor(compressor.tokenizer(text).input_ids))
        assert torch.equal(memory.embeddings, embeddings)
        assert (memory.ratio, memory.fidelity, memory.memory_tokens) == (1, 1.0, memory.text_tokens)
        assert memory.handle == compressor.handle(text, 1)
    assert all(
        torch.equal(one.embeddings, two.embeddings)
        for one, two in zip(highest, compressor.compress(texts, 8), strict=True)
    )


def test_raw_text_is_answered_from_as_the_text_is(compressor, generator) -> None:
    [raw] = compressor.compress(TEXTS[:1], min_fidelity=1, generator=generator)
    asked = "\n\nWhen did the bell ring?"
    [from_memory] = generator.generate([raw.handle + asked], [raw], max_new_tokens=12)
    [from_text] = generator.generate([TEXTS[0] + asked], max_new_tokens=12)
    assert from_memory.token_ids == from_text.token_ids
    assert from_memory.prompt_tokens == from_text.prompt_tokens


def test_each_text_gets_the_highest_ratio_that_meets_the_floor(compressor, generator, check) -> None:
    texts = [text for text in TEXTS if text]
    table = {
        ratio: [fidelity.score for fidelity in check.measure(texts, compressor.compress(texts, ratio))]
        for ratio in (8, 4, 2)
    }
    floor = sorted(score for scores in table.values() for score in scores)[5]  # met by about half
    expected = [
        next((ratio for ratio in (8, 4, 2) if table[ratio][number] >= floor), 1) for number in range(len(texts))
    ]
    chosen = compressor.compress(texts, min_fidelity=floor, generator=generator)
    assert [memory.ratio for memory in chosen] == expected
    assert len(set(expected)) > 1
    assert all(memory.fidelity >= floor for memory in chosen)


def test_the_ratio_is_the_highest_one_that_a_floor_tries(compressor, generator) -> None:
    [memory] = compressor.compress(["Bees dance."], 4, min_fidelity=0, generator=generator)
    assert memory.ratio == 4
    assert memory.fidelity is not None


@pytest.mark.parametrize("floor", [-0.1, 1.1, float("nan"), True, "0.5"])
def test_a_floor_that_is_no_share_is_refused(compressor, generator, floor) -> None:
    with pytest.raises(ValueError, match="min_fidelity must be a number from 0 to 1, got"):
        compressor.compress(["Bees"], min_fidelity=floor, generator=generator)


def test_a_generator_that_does_not_read_these_memories_is_refused(compressor, tiny_tokenizer, tiny_model) -> None:
    other = Generator(make_tiny_model(tiny_tokenizer, layers=1), tiny_tokenizer, name="other")
    with pytest.raises(ValueError, match="generator must be 'LlamaForCausalLM@.*, got 'other@"):
        compressor.compress(["Bees"], min_fidelity=0.5, generator=other)
    with pytest.raises(TypeError, match="generator must be a Generator .*, got LlamaForCausalLM"):
        compressor.compress(["Bees"], min_fidelity=0.5, generator=tiny_model)


def test_ratio_one_is_the_text_and_no_compressor_serves_it(compressor) -> None:
    with pytest.raises(ValueError, match="ratios must be 2 or more, got .*Ratio 1 is the text itself"):
        PicConfig(ratio=2, ratios=(1, 2))
    with pytest.raises(ValueError, match="ratio must be one of 2, 4, 8"):
        compressor.compress(["Bees"], 1)


# At rest


@pytest.mark.parametrize("at_rest", ["bf16", "int8", "int4"])
def test_the_fidelity_survives_every_form_at_rest(compressor, generator, at_rest) -> None:
    for memory in compressor.compress(TEXTS[:2], min_fidelity=0, generator=generator):
        assert Memory.from_bytes(memory.to_bytes(at_rest)).fidelity == memory.fidelity
        unchecked = dataclasses.replace(memory, fidelity=None)
        assert unchecked.handle == memory.handle
        assert Memory.from_bytes(unchecked.to_bytes(at_rest)).fidelity is None


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_a_memory_refuses_a_fidelity_that_is_no_share(compressor, value) -> None:
    [memory] = compressor.compress(["Bees"])
    with pytest.raises(ValueError, match="fidelity must be from 0 to 1, or None, got"):
        dataclasses.replace(memory, fidelity=value)


@pytest.fixture(params=["sqlite", "shards"])
def cache(request, tmp_path, compressor) -> MemoryCache:
    store = SQLiteStore(tmp_path / "memories.sqlite") if request.param == "sqlite" else ShardStore(tmp_path)
    return MemoryCache(store, compressor.fingerprint)


def test_a_second_call_computes_nothing_and_finds_the_same(
    compressor, generator, cache, compressed, monkeypatch
) -> None:
    floor = _middle(compressor, generator)
    compressed.clear()
    first, cached = cache.get_or_compress(TEXTS, compressor, min_fidelity=floor, generator=generator)
    assert cached == [False] * len(TEXTS)
    assert compressed
    compressed.clear()
    monkeypatch.setattr(generator, "score", None)  # nothing is to be checked either
    again, cached = cache.get_or_compress(TEXTS, compressor, min_fidelity=floor, generator=generator)
    assert compressed == []
    assert cached == [True] * len(TEXTS)
    assert [(memory.handle, memory.fidelity) for memory in again] == [(m.handle, m.fidelity) for m in first]


def test_a_higher_floor_tries_only_the_ratios_not_tried_yet(compressor, generator, cache, compressed) -> None:
    cache.get_or_compress(TEXTS[:1], compressor, min_fidelity=0, generator=generator)
    assert compressed == [8]
    [raw], [cached] = cache.get_or_compress(TEXTS[:1], compressor, min_fidelity=1, generator=generator)
    assert compressed == [8, 4, 2]
    assert (raw.ratio, cached) == (1, False)
    [memory], [cached] = cache.get_or_compress(TEXTS[:1], compressor, min_fidelity=0, generator=generator)
    assert (memory.ratio, cached) == (8, True)
    assert compressed == [8, 4, 2]


def test_each_text_goes_down_from_a_ratio_of_its_own(compressor, generator, compressed) -> None:
    assert [m.ratio for m in compressor.compress(TEXTS[:2], (2, 8), min_fidelity=0, generator=generator)] == [2, 8]
    compressed.clear()
    raw = compressor.compress(TEXTS[:2], (2, 8), min_fidelity=1, generator=generator)
    assert [memory.ratio for memory in raw] == [1, 1]
    assert compressed == [8, 4, 2, 2]  # the first text is never tried above its own


def test_a_memory_that_nobody_has_checked_is_checked(compressor, generator, cache) -> None:
    cache.get_or_compress(TEXTS[1:2], compressor, 8)
    [memory], [cached] = cache.get_or_compress(TEXTS[1:2], compressor, min_fidelity=0, generator=generator)
    assert not cached
    assert memory.fidelity is not None
    assert cache.get([memory.handle])[0].fidelity == memory.fidelity


def test_sources_stay_with_their_texts_on_the_way_down(compressor, generator, cache) -> None:
    names = [f"file {number}" for number in range(len(TEXTS))]
    floor = _middle(compressor, generator)
    memories, _ = cache.get_or_compress(TEXTS, compressor, sources=names, min_fidelity=floor, generator=generator)
    direct = compressor.compress(TEXTS, min_fidelity=floor, generator=generator)
    assert [memory.source for memory in memories] == names
    assert [memory.handle for memory in memories] == [memory.handle for memory in direct]
    assert len({memory.ratio for memory in direct}) > 1


def _middle(compressor: Compressor, generator: Generator) -> float:
    """A floor that some of `TEXTS` meet at ratio 8 and others do not."""
    scores = sorted(memory.fidelity for memory in compressor.compress(TEXTS, min_fidelity=0, generator=generator))
    return (scores[1] + scores[2]) / 2


# What it is good for


def _question(number: int, text: str, answer: str) -> Question:
    return Question(f"q{number}", f"What is number {number}?", (answer,), (Context("", text, True),))


@pytest.fixture(scope="module")
def report(repeating) -> FidelityReport:
    compressor, generator = repeating
    questions = [_question(number, text, text[:2]) for number, text in enumerate(REPEATED)]
    return evaluate_fidelity(
        [*questions, questions[0]],
        (2, 8),
        (0.0, 0.4, 1.0),
        compressor=compressor,
        generator=generator,
        max_new_tokens=4,
    )


def test_the_lowest_floor_is_the_highest_ratio_and_the_highest_raw_text(report) -> None:
    eight, two, raw, lowest, middle, highest = report.rows
    assert [row.ratio for row in report.rows] == [8, 2, 1, None, None, None]
    assert [row.min_fidelity for row in report.rows] == [None, None, None, 0.0, 0.4, 1.0]
    for single, mixed in ((eight, lowest), (raw, highest)):
        for name in ("f1", "contains_answer", "prompt_tokens_mean", "fidelity_mean", "ratios"):
            assert getattr(mixed, name) == getattr(single, name), name
        assert mixed.single_f1 == pytest.approx(single.f1)
    assert middle.fidelity_mean >= 0.4
    assert eight.ratios == {8: len(REPEATED)}
    assert sum(middle.ratios.values()) == len(REPEATED)


def test_prompt_tokens_are_those_that_the_ratios_make(report) -> None:
    eight, two, raw = (row.prompt_tokens_mean for row in report.rows[:3])
    assert (two - eight, raw - two) == (3, 4)  # eight tokens of text: 1, 4 and 8 rows


def test_auroc_ranks_the_answers_that_raw_text_gets_right_by_fidelity(repeating) -> None:
    compressor, generator = repeating

    def said(memories: list[Memory]) -> list[str]:
        prompts = [rag_messages(f"What is {m.source_hash[:4]}?", [m.handle]) for m in memories]
        return [answer.text.strip() for answer in generator.generate(prompts, memories, max_new_tokens=4)]

    memories = compressor.compress(REPEATED, 8, min_fidelity=0, generator=generator)
    from_text = said(compressor.compress(REPEATED, min_fidelity=1, generator=generator))
    questions = [  # the answer from raw text is right, the one from the memory where it is given as right
        Question(
            text,
            f"What is {memory.source_hash[:4]}?",
            (from_raw, from_memory) if number % 2 else (from_raw,),
            (Context("", text, True),),
        )
        for number, (text, memory, from_raw, from_memory) in enumerate(
            zip(REPEATED, memories, from_text, said(memories), strict=True)
        )
    ]
    found = evaluate_fidelity(questions, (8,), (), compressor=compressor, generator=generator, max_new_tokens=4)
    assert found.rows[-1].contains_answer == 1.0
    right = [number % 2 == 1 for number in range(len(REPEATED))]
    expected = auroc([memory.fidelity for memory in memories], right)
    assert found.auroc == found.rows[0].auroc == found.auroc_of_parts["telling_recall"] == expected
    assert found.auroc_of_parts["recall"] == expected  # there is no number and no name


def test_a_report_without_questions_is_refused(repeating) -> None:
    compressor, generator = repeating
    for questions in ([], [Question("q", "What?", ("x",), ())]):
        with pytest.raises(
            ValueError, match=f"questions must come with documents.*got none in {len(questions)} questions"
        ):
            evaluate_fidelity(questions, (8,), (0.5,), compressor=compressor, generator=generator)


def test_a_prompt_that_does_not_fit_is_not_answered_scores_0_and_is_counted(repeating, monkeypatch) -> None:
    compressor, generator = repeating
    question = _question(0, REPEATED[0], "x")
    [memory] = compressor.compress(REPEATED[:1], 8)
    places = generator.count_tokens(rag_messages(question.question, [memory.handle]), [memory])
    monkeypatch.setattr(type(generator), "context_tokens", property(lambda _: places + 4))
    found = evaluate_fidelity([question], (8,), (1.0,), compressor=compressor, generator=generator, max_new_tokens=4)
    eight, raw, mixed = found.rows
    assert (eight.too_long, eight.prompt_tokens_mean) == (0, places)
    for row in (raw, mixed):
        assert (row.too_long, row.prompt_tokens_mean, row.f1, row.contains_answer, row.single_f1) == (
            1,
            None,
            0,
            0,
            None,
        )
    assert report_table(found.to_dict()).count("\n") == 2 + len(found.rows)


def test_the_report_is_saved_and_shown(report, tmp_path) -> None:
    report.save(tmp_path / "fidelity.json")
    saved = json.loads((tmp_path / "fidelity.json").read_text())
    assert saved["config"]["ratios"] == [8, 2, 1]
    assert [row["f1"] for row in saved["rows"]] == [row.f1 for row in report.rows]
    table = report_table(report.to_dict())
    assert len(table.splitlines()) == 2 + len(report.rows)
    assert "| mixed |   0.4 |" in table


def test_auroc_goes_by_the_least_faithful_document_of_the_questions_that_raw_text_gets_right(repeating) -> None:
    compressor, generator = repeating
    pairs = list(zip(REPEATED, REPEATED[2:] + REPEATED[:2], strict=True))

    def said(made: list[Memory]) -> list[str]:
        shown = dict(zip(REPEATED, made, strict=True))
        prompts = [
            rag_messages(f"What is {number}?", [shown[text].handle for text in pair])
            for number, pair in enumerate(pairs)
        ]
        return [answer.text.strip() for answer in generator.generate(prompts, made, max_new_tokens=4)]

    memories = compressor.compress(REPEATED, 8, min_fidelity=0, generator=generator)
    from_memory, from_text = said(memories), said(compressor.compress(REPEATED, min_fidelity=1, generator=generator))
    answers = [  # right from both, right from raw text alone, right from the memory alone, and once more
        [(from_text[n], from_memory[n]), (from_text[n],), (from_memory[n],)][n % 3] for n in range(len(pairs))
    ]
    questions = [
        Question(str(n), f"What is {n}?", answers[n], tuple(Context("", text, True) for text in pairs[n]))
        for n in range(len(pairs))
    ]
    found = evaluate_fidelity(questions, (8,), (), compressor=compressor, generator=generator, max_new_tokens=4)
    measured = FidelityCheck(generator, compressor.config.segment_tokens).measure(REPEATED, memories)
    known = dict(zip(REPEATED, measured, strict=True))
    counted = [n for n in range(len(pairs)) if contains_answer(from_text[n], answers[n])]
    assert counted == [0, 1, 3, 4]
    right = [contains_answer(from_memory[n], answers[n]) == 1 for n in counted]
    for name, sign in {"loss": -1, "telling_loss": -1, "recall": 1, "telling_recall": 1}.items():
        least = [min(sign * getattr(known[text], name) for text in pairs[n]) for n in counted]
        assert found.auroc_of_parts[name] == auroc(least, right), name
    most = [max(known[text].score for text in pairs[n]) for n in counted]
    assert found.auroc == found.rows[0].auroc == auroc(least, right) != auroc(most, right)


def test_a_floor_is_compared_with_single_ratios_on_straight_lines_between_them(repeating) -> None:
    compressor, generator = repeating

    def said(memories: list[Memory]) -> list[str]:
        prompts = [rag_messages(f"What is number {n}?", [memory.handle]) for n, memory in enumerate(memories)]
        return [answer.text.strip() for answer in generator.generate(prompts, memories, max_new_tokens=4)]

    memories = compressor.compress(REPEATED, 8, min_fidelity=0, generator=generator)
    from_memory = said(memories)
    questions = [_question(n, text, from_memory[n]) for n, text in enumerate(REPEATED)]
    floor = sorted(memory.fidelity for memory in memories)[3]
    found = evaluate_fidelity(questions, (8,), (floor,), compressor=compressor, generator=generator, max_new_tokens=4)
    *singles, mixed = found.rows
    tokens, scores = ([getattr(row, name) for row in singles] for name in ("prompt_tokens_mean", "f1"))
    assert tokens[0] < mixed.prompt_tokens_mean < tokens[-1]
    assert len(mixed.ratios) > 1
    assert mixed.single_f1 == pytest.approx(np.interp(mixed.prompt_tokens_mean, tokens, scores))
    assert min(scores) < mixed.single_f1 < max(scores) == 1.0
