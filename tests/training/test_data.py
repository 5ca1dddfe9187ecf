"""Training data: what is read, what is held out, and the examples and rows that come of it."""

from __future__ import annotations

import copy
import os
import re

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from training_runs import TEXT, make_config, make_factory, memory_places, metrics_of, write_rows

from pic_rag.questions import Context, Question
from pic_rag.questions import read_questions as read_eval_questions
from pic_rag.training.batch import StepDataset, build_batches
from pic_rag.training.chat import DOCUMENTS_FIRST, MEMORY, PROMPT_SHAPES, Chat, shape_weights
from pic_rag.training.corpora import (
    Corpora,
    QuestionTable,
    Record,
    _training_records,
    content_hash,
    held_out_hashes,
    read_records,
    read_texts,
)
from pic_rag.training.examples import ExampleFactory
from pic_rag.training.loop import Trainer, train
from pic_rag.training.synthetic import passages


def test_rows_give_every_step_one_shape_and_change_nothing_else(data, tmp_path):
    fields = {"reader_rank": 2, "distillation": 1.0, "tasks": {"questions": 1}, "steps": 3, "documents": 1, "turns": 1}
    free = Trainer(make_config(data, tmp_path / "free", **fields), Accelerator())
    fixed = Trainer(make_config(data, tmp_path / "fixed", **fields, rows=[3, 4, 5], row_places=512), Accelerator())
    for step in range(3):
        small, large = (StepDataset(trainer.config, trainer.factory)[step] for trainer in (free, fixed))
        shapes = [rows.ids.shape for rows in (large.reads, large.teacher)]
        assert [large.layout.token_ids.shape, *shapes] == [(3, 512), (4, 512), (5, 512)]
        assert torch.equal(small.reads.target_ids, large.reads.target_ids)
        with torch.no_grad():
            torch.testing.assert_close(free.model(small)[0], fixed.model(large)[0], rtol=1e-4, atol=1e-4)


def test_rows_take_as_many_examples_as_they_hold(data, tmp_path):
    fields = {"tasks": {"questions": 1}, "documents": 1, "turns": 1, "row_places": 512, "examples_per_step": 1000}
    counts = []
    for rows in ([2, 2, 2], [6, 6, 6]):
        trainer = Trainer(make_config(data, tmp_path / str(rows[0]), **fields, rows=rows), Accelerator())
        batch = StepDataset(trainer.config, trainer.factory)[0]
        counts.append(int(batch.reads.segment.max()) + 1)
        assert (batch.reads.segment >= 0).float().mean() > 0.6
    assert counts[1] > 2 * counts[0]


def test_all_examples_are_measured_whatever_the_rows_hold(data, tmp_path):
    trainer = Trainer(make_config(data, tmp_path, rows=[1, 1, 1], row_places=512), Accelerator())
    posed = [trainer.factory.pose(asked, 4) for asked in read_eval_questions(data / "questions.jsonl")]
    batches = build_batches("questions", posed, trainer.config, size=6)
    assert sum(int(batch.reads.segment.max()) + 1 for batch in batches) == len(posed)
    assert len(batches) == 2


def test_spread_memories_leave_every_target_where_the_text_would_have_it(data, tmp_path):
    pic = {"segment_tokens": 64, "ratios": [4, 8], "lora_rank": 4, "generator_positions": "spread"}
    fields = {"tasks": {"questions": 1}, "turns": 2, "distillation": 1.0, "rows": [4, 4, 4], "row_places": 512}
    trainer = Trainer(make_config(data, tmp_path, **fields, pic=pic), Accelerator())
    for step in range(4):
        batch = StepDataset(trainer.config, trainer.factory)[step]
        assert (batch.reads.slot >= 0).any()
        at, teacher = (rows.position_ids[rows.target_row, rows.target_place] for rows in (batch.reads, batch.teacher))
        assert torch.equal(at, teacher)


def test_documents_that_stay_text_are_read_as_their_tokens(data, tmp_path):
    fields = {"tasks": {"questions": 1}, "documents": 1, "turns": 1, "distillation": 1.0, "text_share": 0.5}
    trainer = Trainer(make_config(data, tmp_path, **fields), Accelerator())
    random = np.random.default_rng(0)
    drawn = [trainer.factory.draw("questions", {4: 1.0}, random) for _ in range(30)]
    as_text = [np.array_equal(example.reads.ids, example.teacher.ids) for example in drawn]
    assert as_text == [not example.segments for example in drawn]
    assert 8 < sum(as_text) < 22
    assert all(len(StepDataset(trainer.config, trainer.factory)[step].layout.slot_row) > 0 for step in range(6))


@pytest.mark.parametrize("text_share", [0.0, 0.9])
def test_rows_that_hold_no_example_are_an_error_and_no_endless_search(data, tmp_path, text_share):
    config = make_config(data, tmp_path, tasks={"questions": 1}, rows=[1, 1, 1], row_places=24, text_share=text_share)
    with pytest.raises(ValueError, match="row_places must hold examples of the task questions, got 24"):
        train(config, progress=False)


def test_the_document_of_a_continuation_keeps_its_part_of_a_short_text(data, tmp_path):
    fields = {"tasks": {"continue": 1}, "text_tokens": [16, 48]}
    for target_tokens, parts in [(128, {16}), (96, {16}), (16, set(range(16, 49)))]:
        config = make_config(data, tmp_path, **fields, target_tokens=target_tokens)
        factory = Trainer(config, Accelerator()).factory
        random = np.random.default_rng(0)
        for _ in range(30):
            example = factory.draw("continue", {4: 1.0}, random)
            assert sum(len(segment.token_ids) for segment in example.segments) in parts
            assert 0 < example.reads.is_target.sum() <= target_tokens


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start>model\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + '</s>' }}"
    "{% elif m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
QWEN3 = (  # an answer that is the last message is shown with an empty thought
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ '<think></think>' if loop.last and m['role'] == 'assistant' }}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATING = (  # Ministral's: turns take turns, whatever tools say between them
    "{% set ns = namespace(at=0) %}{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}"
    "{% if (m['role'] == 'user') != (ns.at % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set ns.at = ns.at + 1 %}{% endif %}{% endfor %}" + CHATML
)
REWRITES = "{% for m in messages %}{{ m['role'] ~ messages | length }}: {{ m['content'] }}</s>\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "eos", "stops", "targets"),
    [
        (CHATML, "<|im_end|>", [], ["1900 <|im_end|>"] * 2),
        (CHATML, "</s>", [], ["1900 <|im_end|>"] * 2),
        (CHATML, "</s>", ["</s>"], ["1900 </s>"]),
        (CHATML.replace("m['content']", "m['content'] | trim"), "<|im_end|>", [], ["1900<|im_end|>"] * 2),
        (QWEN3, "<|im_end|>", [], ["1900 <|im_end|>"] * 2),
        (GEMMA, "<eos>", ["<eos>", "<end_of_turn>"], ["1900<end_of_turn>"] * 2),
        (MISTRAL, "</s>", [], [" 1900 </s>"] * 2),
        (REWRITES, "</s>", [], ["1900 </s>"]),
    ],
    ids=["ChatML", "its own end", "no stop at its end", "trim", "thinks", "Gemma", "Mistral", "rewrites its history"],
)
def test_an_answer_ends_as_the_chat_template_ends_it(tmp_path, tiny_tokenizer, template, eos, stops, targets):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    ends = ["<|im_end|>", "<end_of_turn>", "<eos>", "</s>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ends, "eos_token": eos})
    tokenizer.chat_template = template
    contexts = [{"text": "The mill was built in 1900."}]
    rows = [{"question": asked, "answers": ["1900 "], "contexts": contexts} for asked in ("When?", "Which year?")]
    end_token_ids = tokenizer.convert_tokens_to_ids(stops)
    factory = make_factory(tmp_path, tokenizer, rows, end_token_ids, distillation=1.0)
    random = np.random.default_rng(0)
    for _ in range(30):  # prompts of every form
        example = factory.draw("questions", {4: 1.0}, random)
        assert memory_places(example.reads) == sum(len(segment.chunk) for segment in example.segments) > 0
        for said in (example.reads, example.teacher):
            assert tokenizer.decode(said.ids[said.is_target]) == "".join(targets)
    posed = factory.pose(next(read_eval_questions(tmp_path / "questions.jsonl")), 4).reads
    assert tokenizer.decode(posed.ids[posed.is_target]) == targets[0]


@pytest.mark.parametrize(
    "template",
    [CHATML, GEMMA, MISTRAL, ALTERNATING],
    ids=["all roles", "no system role", "users alone", "turns that alternate"],
)
def test_every_form_of_prompt_shows_each_passage_and_the_question_once(tiny_tokenizer, template):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = template
    chat = Chat(tokenizer)
    question, passages = "Who built the {mill}?", ["Rye is ground here.", "Anna Holm built it."]
    assert len(chat.shapes) == len(PROMPT_SHAPES)
    for shape in chat.shapes:
        prompt = tokenizer.apply_chat_template(shape(question, passages), tokenize=False, add_generation_prompt=True)
        assert [prompt.count(text) for text in (question, *passages)] == [1, 1, 1]
        assert chat.converse(shape(question, passages), [(question, "Anna Holm."), ("When?", "In 1900.")])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_prompts_asks_first(tmp_path, tiny_tokenizer, share):
    weights = shape_weights(share)
    assert sum(weights) == pytest.approx(1)
    assert sum(weights[len(DOCUMENTS_FIRST) :]) == pytest.approx(share)
    rows = [{"question": "Who?", "answers": ["Anna"], "contexts": [{"text": "Anna ground rye here."}]}]
    factory = make_factory(tmp_path, tiny_tokenizer, rows, question_first=share)
    random = np.random.default_rng(0)
    first = 0
    for _ in range(200):
        reads = factory.draw("questions", {4: 1.0}, random).reads
        before = reads.ids[: np.flatnonzero(reads.ids == MEMORY)[0]]
        first += "Who?" in tiny_tokenizer.decode(before)
    assert first / 200 == pytest.approx(share, abs=0.1)


def test_every_question_of_a_conversation_has_its_gold_document_shown(tmp_path, tiny_tokenizer):
    texts = [f"Farm {number} is old." for number in range(5)]
    rows = [
        {
            "question": f"How old is number {asked}?",
            "answers": ["old"],
            "contexts": [{"text": text, "is_gold": number == asked} for number, text in enumerate(texts)],
        }
        for asked in range(5)
    ]
    factory = make_factory(tmp_path, tiny_tokenizer, rows, documents=5, distillation=1.0)
    random = np.random.default_rng(0)
    turns = []
    for _ in range(60):
        chat = tiny_tokenizer.decode(factory.draw("questions", {4: 1.0}, random).teacher.ids)
        asked = re.findall(r"number (\d)", chat)
        turns.append(len(asked))
        assert set(asked) <= set(re.findall(r"Farm (\d)", chat))
    assert set(turns) == {1, 2, 3, 4}


def test_no_document_is_shown_twice(tmp_path, tiny_tokenizer):
    rows = [
        {
            "question": "Which?",
            "answers": ["both"],
            "contexts": [{"text": f"{name} {row}.", "is_gold": True} for name in ("alpha", "beta", "beta")],
        }
        for row in range(8)
    ]
    fields = {"documents": 5, "distractor_share": 1.0, "distillation": 1.0}
    factory = make_factory(tmp_path, tiny_tokenizer, rows, **fields)
    random = np.random.default_rng(0)
    for _ in range(60):
        chat = tiny_tokenizer.decode(factory.draw("questions", {4: 1.0}, random).teacher.ids)
        shown = re.findall(r"(?:alpha|beta) \d", chat)
        assert len(set(shown)) == len(shown) >= 2


def test_blank_answers_and_contexts_are_left_out_of_training(tmp_path, tiny_tokenizer):
    contexts = [{"text": " "}, {"title": "Mill", "text": "Built in 1900.", "is_gold": True}]
    lost = [{"text": "", "is_gold": True}, {"text": "The answer is not here."}]
    rows = [
        {"question": "When?", "answers": ["", "1900"], "contexts": contexts},
        {"question": "Why?", "answers": [" "], "contexts": contexts},
        {"question": "Where?", "answers": ["here"], "contexts": lost},
    ]
    [[asked]] = make_factory(tmp_path, tiny_tokenizer, rows).questions[0].groups
    assert (asked.question, asked.answers, asked.contexts, asked.gold) == ("When?", ["1900"], [0], [0])
    with pytest.raises(ValueError, match="at least one question with an answer and a document"):
        make_factory(tmp_path, tiny_tokenizer, rows[1:])


@pytest.mark.parametrize(
    ("answers", "gold"), [(["lars holm", "nobody"], [1, 3]), (["nobody"], [0, 1, 2, 3])], ids=["held", "held by none"]
)
def test_where_no_context_is_flagged_those_that_hold_an_answer_are_gold(tmp_path, answers, gold):
    texts = ["The mill is old.", "Its builder was Lars Holm.", "It grinds rye.", "Lars Holm died in 1900."]
    contexts = [{"title": "Mill", "text": text} for text in texts]
    write_rows(tmp_path / "q.jsonl", [{"question": "Who built the mill?", "answers": answers, "contexts": contexts}])
    [record] = read_records(str(tmp_path / "q.jsonl"))
    assert (len(record.contexts), record.gold) == (4, gold)


def test_a_handle_in_a_question_is_not_resolved_in_any_turn(tmp_path, tiny_tokenizer):
    handle = f"[[pic:{'a' * 32}]]"
    contexts = [{"text": "The mill was built in 1900."}]
    rows = [{"question": f"{asked} {handle}?", "answers": ["1900"], "contexts": contexts} for asked in ("When", "How")]
    factory = make_factory(tmp_path, tiny_tokenizer, rows, distillation=1.0)
    random = np.random.default_rng(0)
    for _ in range(20):  # prompts of every form
        read = tiny_tokenizer.decode(factory.draw("questions", {4: 1.0}, random).teacher.ids)
        assert read.count("[[pic::aaa") == 2


def _rows_with_a_long_one(words):
    """Five questions about a short document, and one about a document of so many words."""
    texts = ["The mill is old."] * 5 + ["old mill " * words]
    return [
        {"question": f"How old is mill {number}?", "answers": ["old"], "contexts": [{"text": text}]}
        for number, text in enumerate(texts)
    ]


@pytest.mark.parametrize(
    "fields",
    [{}, {"distillation": 1.0}, {"pic": {"segment_tokens": 64, "ratios": [4, 8], "generator_positions": "spread"}}],
    ids=["read", "read by the teacher", "spread"],
)
def test_an_example_that_the_generators_context_does_not_hold_is_drawn_again(data, tmp_path, fields):
    words = 250 if fields else 2000  # 9 tokens each; as memories they are fewer
    write_rows(tmp_path / "long.jsonl", _rows_with_a_long_one(words))
    fields |= {"questions": {str(tmp_path / "long.jsonl"): 1.0}, "distractor_share": 0.0, "turns": 1}
    trainer = Trainer(make_config(data, tmp_path / "out", tasks={"questions": 1}, steps=12, **fields), Accelerator())
    dataset = StepDataset(trainer.config, trainer.factory)
    batches = [dataset[step] for step in range(12)]
    assert trainer.factory.context_places == 2048
    for batch in batches:
        assert max(batch.reads.position_ids.max(), len(batch.layout.slot_row)) < 500
    trainer.factory.context_places = np.inf
    assert max(dataset[step].layout.token_ids.numel() for step in range(12)) > 2048
    trainer.factory.context_places = 8
    with pytest.raises(ValueError, match=r"task questions must fit the generator's context of 8 places, .* one of \d+"):
        dataset[0]


def test_a_resumed_run_draws_again_what_the_whole_one_did(data, tmp_path):
    write_rows(tmp_path / "long.jsonl", _rows_with_a_long_one(2000))
    fields = {"questions": {str(tmp_path / "long.jsonl"): 1.0}, "tasks": {"questions": 1}, "steps": 4}
    train(make_config(data, tmp_path / "whole", **fields), progress=False)
    cut = make_config(data, tmp_path / "cut", **fields)
    train(cut, minutes=0, progress=False)
    train(cut, progress=False)
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")


def test_documents_without_a_token_are_an_error_and_no_endless_search(data, tmp_path, tiny_tokenizer):
    QuestionTable.write(tmp_path, [Record("When?", ["1900"], [""], [0])], tiny_tokenizer)
    config = make_config(data, tmp_path / "out", tasks={"questions": 1})
    factory = ExampleFactory(config, tiny_tokenizer, None, {QuestionTable(tmp_path): 1.0})
    with pytest.raises(ValueError, match="examples of the task questions must have a document to compress"):
        StepDataset(config, factory)[0]


def test_tables_travel_without_the_files_they_were_made_from(data, tmp_path, tiny_tokenizer):
    source = tmp_path / "questions.jsonl"
    source.write_bytes((data / "questions.jsonl").read_bytes())
    held = tmp_path / "held.jsonl"
    write_rows(held, [{"question": "which number HAD  bell 2"}])
    made = Corpora(tmp_path / "cache", tiny_tokenizer, [str(held)]).questions(str(source))
    source.unlink()
    held.unlink()
    again = Corpora(tmp_path / "cache", tiny_tokenizer, [str(held)]).questions(str(source))
    assert again.groups == made.groups
    assert len(again.groups) == 5
    assert [again.contexts[row].tolist() for row in range(5)] == [made.contexts[row].tolist() for row in range(5)]


def test_a_changed_file_is_read_again(data, tmp_path, tiny_tokenizer):
    source = tmp_path / "texts.jsonl"
    corpora = Corpora(tmp_path / "cache", tiny_tokenizer, [])
    write_rows(source, [{"text": "one"}])
    assert len(corpora.texts([str(source)])) == 1
    write_rows(source, [{"text": "one"}, {"text": "and two"}])
    assert len(corpora.texts([str(source)])) == 2


def test_a_damaged_table_is_made_again_and_what_killed_runs_left_is_removed(tmp_path, tiny_tokenizer):
    source = tmp_path / "texts.jsonl"
    write_rows(source, [{"text": "one"}])
    left, in_use = (tmp_path / "cache" / f"pic-rag-staging-{name}" for name in ("left", "in-use"))
    left.mkdir(parents=True)
    in_use.mkdir()
    os.utime(left, (0, 0))
    corpora = Corpora(tmp_path / "cache", tiny_tokenizer, [])
    corpora.texts([str(source)])
    [made] = (tmp_path / "cache").glob("texts-*/files.json")
    made.write_text("")
    assert len(corpora.texts([str(source)])) == 1
    assert made.read_text()
    assert sorted((tmp_path / "cache").iterdir()) == [in_use, made.parent]


PARAGRAPH = (
    "The old mill at Harrow Bridge was built by Anna Holm in 1840. It ground rye for forty villages until 1911. "
    "Its wheel, made of larch, turned on the Tarn. On 12 May 1954 the council sold it to Peter Lunde, an innkeeper. "
    "Guests of the inn still hear the water under the floor, and the stones of the mill lie in the garden by the road."
)


def test_a_text_asks_for_what_it_says_and_never_gives_the_answer_away():
    [passage] = passages(PARAGRAPH, "Harrow Mill")
    assert passage.text == PARAGRAPH
    gaps = [(question, answer) for question, answer in passage.questions if "_____" in question]
    assert len(gaps) >= 3
    for question, answer in gaps:
        assert answer in PARAGRAPH
        assert answer not in question
        assert question.split("_____")[0].split('"')[-1].strip() in PARAGRAPH
    assert list(passages(PARAGRAPH, "Harrow Mill")) == [passage]


def test_synthetic_questions_of_held_out_texts_are_dropped(data, tmp_path, tiny_tokenizer):
    write_rows(
        tmp_path / "texts.jsonl", [{"title": "Mill", "text": PARAGRAPH}, {"text": PARAGRAPH.replace("mill", "farm")}]
    )
    write_rows(tmp_path / "held.jsonl", [{"text": PARAGRAPH}])
    source = f"synthetic:{tmp_path / 'texts.jsonl'}"
    table = Corpora(tmp_path / "cache", tiny_tokenizer, [str(tmp_path / "held.jsonl")]).questions(source)
    assert len(table.groups) == 1
    assert "farm" in tiny_tokenizer.decode(table.contexts[0])


def test_no_passage_of_a_held_out_text_is_asked_about(tmp_path, tiny_tokenizer):
    text = f"{PARAGRAPH} " * 6
    write_rows(tmp_path / "texts.jsonl", [{"text": text}, {"text": text.replace("mill", "farm")}])
    (tmp_path / "held.md").write_text(text)
    corpora = Corpora(tmp_path / "cache", tiny_tokenizer, [str(tmp_path / "held.md")])
    table = corpora.questions(f"synthetic:{tmp_path / 'texts.jsonl'}")
    assert len(table.contexts) > 1
    assert all("farm" in tiny_tokenizer.decode(table.contexts[row]) for row in range(len(table.contexts)))


HELD_OUT = [
    "the   HARBOUR of Whitby lay still — and nobody spoke before the bell rang number 3.\nThen all of them left",
    TEXT.format(3),
]


@pytest.mark.parametrize("text", HELD_OUT, ids=["spacing, case, punctuation", "as it is"])
def test_a_held_out_text_is_dropped_from_training(data, tmp_path, text):
    write_rows(tmp_path / "held.jsonl", [{"text": text}])
    held_out = held_out_hashes([str(tmp_path / "held.jsonl")])
    kept = [each for each in read_texts(str(data / "texts.jsonl")) if content_hash(each) not in held_out]
    assert len(kept) == 7
    assert TEXT.format(3) not in kept
    config = make_config(data, tmp_path / "out", held_out=[str(tmp_path / "held.jsonl")])
    assert len(Trainer(config, Accelerator()).factory.texts) == 7


@pytest.mark.parametrize(
    "row",
    [
        {"question": "which number HAD  bell 2"},
        {"question": "Else?", "contexts": [{"title": "Other", "text": "bell 2 rang,  late"}]},
        {"question": "Else?", "contexts": [{"text": "Bell 2\nBell 2 rang late."}]},
    ],
    ids=["question", "context under another title", "context with its title"],
)
def test_a_held_out_question_or_context_is_dropped_from_training(data, tmp_path, row):
    write_rows(tmp_path / "held.jsonl", [row])
    held_out = held_out_hashes([str(tmp_path / "held.jsonl")])
    kept = list(_training_records(str(data / "questions.jsonl"), held_out))
    assert [record.answers[0] for record in kept] == ["0", "1", "3", "4", "5"]


@pytest.mark.parametrize("form", ["{}", "synthetic:{}"])
def test_a_held_out_context_is_dropped_from_texts_that_have_its_title_line(tmp_path, tiny_tokenizer, form):
    held = {"question": "Who?", "contexts": [{"title": "Mill", "text": PARAGRAPH}]}
    write_rows(tmp_path / "held.jsonl", [held])
    kept = PARAGRAPH.replace("mill", "farm")
    write_rows(tmp_path / "texts.jsonl", [{"text": f"Mill\n{PARAGRAPH}"}, {"text": PARAGRAPH}, {"text": kept}])
    corpora = Corpora(tmp_path / "cache", tiny_tokenizer, [str(tmp_path / "held.jsonl")])
    source = form.format(tmp_path / "texts.jsonl")
    table = corpora.questions(source).contexts if source.startswith("synthetic:") else corpora.texts([source])
    assert [tiny_tokenizer.decode(table[row]) for row in range(len(table))] == [kept]


def test_when_all_is_held_out_the_error_says_by_what(data, tmp_path):
    write_rows(
        tmp_path / "held.jsonl",
        [
            {"question": "Which number had bell 2?"},
            *({"contexts": [{"text": f"Bell {number} rang late."}]} for number in (0, 1, 3, 4, 5)),
        ],
    )
    config = make_config(data, tmp_path / "out", tasks={"questions": 1}, held_out=[str(tmp_path / "held.jsonl")])
    with pytest.raises(ValueError, match=r"1 held out by the wording of the question and 5 by a context"):
        train(config, progress=False)


def test_an_empty_held_out_context_drops_nothing(data, tmp_path):
    write_rows(tmp_path / "held.jsonl", [{"question": "Else?", "contexts": [{"text": " "}]}])
    write_rows(tmp_path / "plain.jsonl", [{"question": "Who?", "answers": ["I"], "contexts": [{"text": "One line."}]}])
    held_out = held_out_hashes([str(tmp_path / "held.jsonl")])
    assert len(list(_training_records(str(tmp_path / "plain.jsonl"), held_out))) == 1


def test_texts_that_are_all_too_short_are_an_error_and_no_endless_search(data, tmp_path):
    with pytest.raises(ValueError, match=r"texts must hold a text of text_tokens\[0\]=500 tokens or more"):
        train(make_config(data, tmp_path, text_tokens=[500, 600]), progress=False)


def test_a_text_file_is_read_without_its_byte_order_mark_and_named_when_it_is_not_utf_8(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("café", encoding="utf-8-sig")
    assert list(read_texts(str(path))) == ["café"]
    path.write_text("café", encoding="latin-1")
    with pytest.raises(ValueError, match=r"text\.txt must be UTF-8, got: .* Convert the file"):
        list(read_texts(str(path)))


def test_a_line_without_text_is_named(tmp_path):
    write_rows(tmp_path / "texts.jsonl", [{"text": "fine"}, {"body": "not fine"}])
    with pytest.raises(ValueError, match="text must be a string, got None in .*texts.jsonl, line 2"):
        list(read_texts(str(tmp_path / "texts.jsonl")))


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"question": None}, r"question must be a string in a held-out file, got None"),
        ({"contexts": [{"txt": "Bell"}]}, r"contexts must be a list of .* in a held-out file, got \[{'txt': 'Bell'}\]"),
        ({"contexts": [{"title": 5, "text": "Bell"}]}, r"contexts must be a list of .* got \[{'title': 5, .*}\]"),
        ({"contexts": "Bell"}, r"contexts must be a list of .* in a held-out file, got 'Bell'"),
    ],
)
def test_a_held_out_row_of_another_form_is_named(tmp_path, row, error):
    write_rows(tmp_path / "held.jsonl", [{"text": "fine"}, row])
    with pytest.raises(ValueError, match=rf"held\.jsonl, line 2: {error}\. Correct the file\."):
        held_out_hashes([str(tmp_path / "held.jsonl")])


@pytest.mark.parametrize(
    ("source", "name"), [("{}", "text"), ("synthetic:{}", "title"), ("{}", "answers")], ids=["text", "title", "answer"]
)
def test_a_lone_surrogate_is_named(tmp_path, source, name):
    fine = {"text": PARAGRAPH, "question": "When?", "contexts": [{"text": PARAGRAPH}]}
    write_rows(tmp_path / "rows.jsonl", [{**fine, name: ["\ud800"] if name == "answers" else "\ud800"}])
    read = read_texts if name == "text" else read_records
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 1: {name} must be valid Unicode"):
        list(read(source.format(tmp_path / "rows.jsonl")))


def test_ratios_and_files_of_questions_are_drawn_by_their_weights(tmp_path, tiny_tokenizer):
    corpora, tables = Corpora(tmp_path / "cache", tiny_tokenizer, []), {}
    for name, weight in {"often": 9.0, "seldom": 1.0}.items():
        row = {"question": f"Asked {name}?", "answers": ["Anna"], "contexts": [{"text": "Anna ground rye here."}]}
        write_rows(tmp_path / f"{name}.jsonl", [row])
        tables[corpora.questions(str(tmp_path / f"{name}.jsonl"))] = weight
    stages = [{"steps": 300, "tasks": {"questions": 1}, "ratios": {4: 3, 16: 1}}]
    config = make_config(tmp_path, tmp_path, stages=stages, examples_per_step=1)
    dataset = StepDataset(config, ExampleFactory(config, tiny_tokenizer, None, tables))
    batches = [dataset[step] for step in range(300)]
    slots = [len(batch.layout.slot_row) for batch in batches]  # of 21 tokens
    often = ["Asked often?" in tiny_tokenizer.decode(batch.reads.ids.flatten()) for batch in batches]
    assert set(slots) == {6, 2}
    assert slots.count(6) / 300 == pytest.approx(0.75, abs=0.08)
    assert sum(often) / 300 == pytest.approx(0.9, abs=0.06)


def test_a_question_is_posed_as_evaluation_asks_it_and_its_first_answer_is_wanted(tmp_path, tiny_tokenizer):
    rows = [{"question": "Who?", "answers": ["Anna"], "contexts": [{"text": "Anna ground rye here."}]}]
    factory = make_factory(tmp_path, tiny_tokenizer, rows)
    handle = f"[[pic:{'0' * 32}]]"  # the one that stands for the first document while the prompt is written
    contexts = (Context("Mill", "It was built in 1900.", True),)
    posed = factory.pose(Question("q", f"When {handle}?", ("1900", "in 1900"), contexts), 4)
    for dialogue in (posed.reads, posed.teacher):
        assert tiny_tokenizer.decode(dialogue.ids[dialogue.is_target]) == "1900<|im_end|>"
    assert len(posed.strides) == (posed.reads.ids < 0).sum() == 7  # of 26 tokens
    read = tiny_tokenizer.decode(posed.teacher.ids)
    assert "[1] Mill\nIt was built in 1900.\n\nQuestion: When [[pic::000" in read


def test_devices_draw_other_examples_of_the_same_task(data, tmp_path):
    trainer = Trainer(make_config(data, tmp_path, steps=12), Accelerator())
    first, second = (StepDataset(trainer.config, trainer.factory, rank) for rank in (0, 1))
    for step in range(12):
        assert first[step].task == second[step].task
        assert first[step].reads.target_ids.tolist() != second[step].reads.target_ids.tolist()
