"""Every system sees what it is said to see, and the report says what they answered: on a real tiny generator."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torchmetrics.functional.text import squad
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from pic_rag.compression.compressor import Compressor
from pic_rag.config import PicConfig
from pic_rag.evaluation.lingua import LinguaError
from pic_rag.evaluation.metrics import agreement, f1
from pic_rag.evaluation.retrieval import retrieve
from pic_rag.evaluation.runner import EvalReport, evaluate
from pic_rag.evaluation.shortening import Shortener
from pic_rag.evaluation.systems import AT_REST_SYSTEMS, LINGUA_SYSTEMS, RATIO_SYSTEMS, SYSTEMS, Systems
from pic_rag.evaluation.tasks import problem_messages, with_examples
from pic_rag.handles import find_handles
from pic_rag.models.backbone import ModelRef, generator_id, load_backbone
from pic_rag.models.checkpoint import Checkpoint
from pic_rag.prompts import filled_messages, rag_messages
from pic_rag.questions import Question, Row, document_text, pick, read_questions
from pic_rag.training.corpora import read_records

BEES = {"title": "Bees", "text": "Bees dance to point at flowers. They sleep at night.", "is_gold": True}
TRAMS = {"title": "", "text": "The night tram costs three euros [[pic:00]]. It stops at the port.", "is_gold": False}
LINES = [
    {"id": "q1", "question": "Why do bees dance?", "answers": ["to point at flowers"], "contexts": [BEES, TRAMS]},
    {"id": "q2", "question": "What does the tram cost?", "answers": ["three euros", "3"], "contexts": [TRAMS, BEES]},
    {"id": "q3", "question": "When do bees sleep?", "answers": ["at night"], "contexts": [BEES]},
]
KEYS = ["system", "ratio", "n", "f1", "em", "contains_answer", "agreement", "reader_agreement"]
KEYS += ["prompt_tokens_mean", "text_tokens_mean", "too_long", "document_bytes_mean"]
MAX_NEW_TOKENS = 8


def ask(lines: Sequence[dict] = LINES) -> list[Question]:
    return [Question.from_row(Row(line, f"line {number}")) for number, line in enumerate(lines, 1)]


def write_lines(path: Path, lines: Sequence[object]) -> Path:
    data = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def embedder() -> SentenceTransformer:
    """A real, tiny embedder: the mean of random word vectors, so sentences that share words are near."""
    text = " ".join(word for line in LINES for word in [line["question"], *(c["text"] for c in line["contexts"])])
    words = sorted({word.strip(".?").lower() for word in text.split()} - {"the", "at", "to", "do", "it", "they"})
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(["[UNK]", *words])}, "[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = torch.randn(len(words) + 1, 64, generator=torch.Generator().manual_seed(0))
    weights[0] *= 0.01
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights.numpy())], device="cpu")


@pytest.fixture(scope="module")
def base(tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path_factory) -> Path:
    """The tiny model as a folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def build_compressor(base: Path, folder: Path, reader: Path | None = None) -> Compressor:
    """A compressor that is not the mean pooler: its converter is random."""
    untrained = Compressor.from_base(
        base, config=PicConfig(encoder_layers=2, lora_rank=2, ratios=(4, 8, 16, 32)), dtype="float32"
    )
    torch.manual_seed(1)
    weights = dict(untrained.checkpoint.weights)
    weights["converter.down.weight"] = torch.randn_like(weights["converter.down.weight"]) * 0.2
    ref = untrained.checkpoint.base
    generator = ModelRef(ref.name, generator_id(ref.id, reader, "contiguous"))
    Checkpoint(untrained.config, ref, generator, weights, reader).save(folder)
    return Compressor.from_pretrained(folder, dtype="float32")


@pytest.fixture(scope="module")
def compressor(base: Path, tmp_path_factory) -> Compressor:
    return build_compressor(base, tmp_path_factory.mktemp("compressor"))


@pytest.fixture(scope="module")
def compressor_with_reader(base: Path, tmp_path_factory) -> Compressor:
    """The compressor with a reader that changes what the generator says."""
    model = load_backbone(base, dtype="float32").model
    lora = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(2)
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    lora.save_pretrained(str(folder))
    return build_compressor(base, tmp_path_factory.mktemp("compressor"), folder)


@pytest.fixture(scope="module")
def systems(compressor: Compressor, embedder: SentenceTransformer) -> Systems:
    return Systems(compressor, embedder=embedder, dtype="float32")


def run(compressor: Compressor, systems: Sequence[str], ratios: Sequence[int] = (4,), **options) -> EvalReport:
    options = {"max_new_tokens": MAX_NEW_TOKENS, "dtype": "float32", "progress": False} | options
    return evaluate(options.pop("questions", ask()), systems, ratios, compressor=compressor, **options)


# Reading questions


@pytest.mark.parametrize("name", ["questions.jsonl", "questions.jsonl.gz"])
def test_questions_are_read_as_they_were_written(tmp_path: Path, name: str) -> None:
    questions = list(read_questions(write_lines(tmp_path / name, [LINES[0], "", LINES[1]])))
    assert questions == ask(LINES[:2])
    assert questions[1].answers == ("three euros", "3")
    assert [context.is_gold for context in questions[0].contexts] == [True, False]


def test_squad_json_gives_the_same_questions_with_answers_once_and_skips_the_unanswerable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = [
        {"id": "q3", "question": LINES[2]["question"], "answers": [{"text": "at night", "answer_start": 1}] * 3},
        {"id": "q4", "question": "Why?", "answers": [], "is_impossible": True},
    ]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"title": "Bees", "paragraphs": [{"context": BEES["text"], "qas": asked}]}]}))
    with caplog.at_level(logging.WARNING):
        assert list(read_questions(path)) == ask(LINES[2:])
    assert "1 questions without an answer were skipped" in caplog.text


def test_gold_only_keeps_the_gold_contexts_and_refuses_a_question_without_one(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "q.jsonl", [LINES[0], {**LINES[1], "contexts": [TRAMS]}])
    reading = read_questions(path, gold_only=True)
    assert [context.title for context in next(reading).contexts] == ["Bees"]
    with pytest.raises(ValueError, match=r"q\.jsonl, line 2: is_gold .* must be true for one at least.* got \[False\]"):
        next(reading)


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ({**LINES[0], "question": " "}, "line 2: question must be a string that is not empty, got"),
        ({**LINES[0], "answers": "Denver"}, "line 2: answers must be a list of strings, got 'Denver'"),
        ({**LINES[0], "answers": [1]}, "line 2: answers must be a list of strings"),
        ({key: value for key, value in LINES[0].items() if key != "contexts"}, "line 2: contexts must be a list"),
        ({**LINES[0], "contexts": ["a text"]}, "line 2: contexts must be a list of .* got 'a text'"),
        ({**LINES[0], "contexts": [{"title": 1, "text": ""}]}, "line 2: title must be a string, got 1"),
        (
            {**LINES[0], "contexts": [{**BEES, "is_gold": "false"}]},
            "line 2: is_gold must be true or false, got 'false'",
        ),
        ({**LINES[0], "question": "\ud800?"}, "line 2: question and contexts must be valid Unicode"),
        ({**LINES[0], "contexts": [{"text": "\ud800"}]}, "line 2: question and contexts must be valid Unicode"),
        ({**LINES[0], "answers": ["bees", "\ud800"]}, "line 2: answers must be valid Unicode"),
        ({**LINES[0], "id": "\ud800"}, "line 2: id must be valid Unicode"),
        ("[1]", "must hold one JSON object a line, got line 2: a list"),
        ('{"id": ', "must hold one JSON object a line, got line 2:"),
        ("[" * 100_000, "must hold one JSON object a line, got line 2: maximum recursion depth"),
    ],
)
def test_a_bad_line_is_named_with_file_line_and_rule(tmp_path: Path, line: object, rule: str) -> None:
    with pytest.raises(ValueError, match=rule) as raised:
        list(read_questions(write_lines(tmp_path / "q.jsonl", [LINES[0], line])))
    assert str(tmp_path / "q.jsonl") in str(raised.value)


def test_a_byte_order_mark_is_no_part_of_the_first_line_and_a_blank_answer_none(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    lines = [{**LINES[0], "answers": ["", *LINES[0]["answers"]]}, {**LINES[1], "answers": [" "]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8-sig")
    assert list(read_questions(path)) == ask(LINES[:1])


def test_a_damaged_gzip_file_and_a_foreign_json_file_are_named(tmp_path: Path) -> None:
    whole = write_lines(tmp_path / "q.jsonl.gz", LINES).read_bytes()
    for data in (whole[:-20], b"no gzip at all"):
        (tmp_path / "cut.jsonl.gz").write_bytes(data)
        with pytest.raises(ValueError, match=r"cut\.jsonl\.gz must be a whole gzip file"):
            list(read_questions(tmp_path / "cut.jsonl.gz"))
    write_lines(tmp_path / "q.json", LINES[:1])
    with pytest.raises(ValueError, match=r"q\.json must be JSON in the form of SQuAD"):
        list(read_questions(tmp_path / "q.json"))


def test_training_and_evaluation_read_the_same_documents(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "q.jsonl", [*LINES, {"question": "No documents?", "answers": ["yes"]}])
    records = list(read_records(str(path)))
    assert [record.contexts for record in records] == [[c.document for c in asked.contexts] for asked in ask()]
    assert records[1].gold == [1]
    assert records[0].contexts[0] == document_text(BEES) == "Bees\n" + BEES["text"]


# What each system shows


def test_pic_shows_one_memory_for_each_document_compressed_once(systems: Systems) -> None:
    shown = systems.show("pic", ask(), 8)
    assert [len(one.memories) for one in shown] == [2, 2, 1]
    assert shown[0].memories[0] is shown[1].memories[1] is shown[2].memories[0]
    assert shown[0].passages == [memory.handle for memory in shown[0].memories]
    assert {memory.ratio for one in shown for memory in one.memories} == {8}


def test_text_shows_documents_whole_and_escaped_and_none_shows_nothing(systems: Systems) -> None:
    shown = systems.show("text", ask())
    assert shown[0].passages[0] == document_text(BEES)
    assert "[[pic::00]]" in shown[0].passages[1]
    assert all(one.passages == [] for one in systems.show("none", ask()))
    assert all(one.memories == () for one in shown)


@pytest.mark.parametrize("ratio", [4, 16])
def test_truncate_shows_the_beginnings_in_as_many_tokens_as_pic(systems: Systems, ratio: int) -> None:
    memories = systems.show("pic", ask(), ratio)
    for one, asked, memory in zip(systems.show("truncate", ask(), ratio), ask(), memories, strict=True):
        assert [len(text) for text in one.passages] == [each.memory_tokens for each in memory.memories]
        assert all(c.document.startswith(text) for c, text in zip(asked.contexts, one.passages, strict=True))


def test_truncate_never_has_more_tokens_than_allowed_whatever_a_cut_does_to_a_word() -> None:
    merges = [("a", "b"), ("ab", "c")]
    tokens = ["a", "b", "c", "x", "ab", "abc"]
    bpe = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    shortener = Shortener(PreTrainedTokenizerFast(tokenizer_object=bpe))
    assert [shortener.truncate("xabcxab", room) for room in range(6)] == [
        "",
        "x",
        "xabc",
        "xabcx",
        "xabcxab",
        "xabcxab",
    ]


def test_extract_shows_the_sentences_that_share_words_with_the_question(systems: Systems) -> None:
    shown = systems.show("extract", ask(), 4)
    assert shown[0].passages[0].startswith("Bees")
    assert "dance" in shown[0].passages[0]
    assert "tram" in shown[1].passages[0]
    assert "sleep" in systems.show("extract", ask(LINES[2:]), 4)[0].passages[0]


@pytest.mark.parametrize("ratio", [4, 8, 32])
def test_extract_fills_the_tokens_of_the_memories_and_no_more(systems: Systems, ratio: int) -> None:
    for one, memory in zip(systems.show("extract", ask(), ratio), systems.show("pic", ask(), ratio), strict=True):
        room = sum(each.memory_tokens for each in memory.memories)
        assert room - 3 <= sum(map(len, one.passages)) <= room


def test_extract_puts_sentences_in_the_order_of_the_text_and_leaves_empty_documents_out(
    tiny_tokenizer: PreTrainedTokenizerFast, embedder: SentenceTransformer
) -> None:
    shortener = Shortener(tiny_tokenizer, embedder)
    text = "The port. Bees sleep. Bees dance."
    assert shortener.extract(["Do bees dance?"], [["", text, " \n"]], [100]) == [[text]]
    assert shortener.extract(["Do bees dance?"], [[text]], [24]) == [["Bees sleep. Bees dance."]]
    assert shortener.extract(["Do bees dance?"], [[]], [0]) == [[]]


def test_memories_kept_at_less_precision_take_fewer_bytes_and_are_off_by_more(systems: Systems) -> None:
    exact = systems.show("pic", ask(), 4)
    size_bytes, error = [], []
    for system in AT_REST_SYSTEMS:
        shown = systems.show(system, ask(), 4)
        assert [one.passages for one in shown] == [one.passages for one in exact]
        size_bytes.append(systems.document_bytes(system, shown))
        pairs = [
            (ours, theirs)
            for one, two in zip(shown, exact, strict=True)
            for ours, theirs in zip(one.memories, two.memories, strict=True)
        ]
        error.append(sum(float((ours.embeddings - theirs.embeddings).abs().sum()) for ours, theirs in pairs))
    assert size_bytes[0] > size_bytes[1] > size_bytes[2]
    assert 0 < error[0] < error[1] < error[2]
    documents = {memory.handle: memory for one in exact for memory in one.memories}.values()
    assert size_bytes[1] == sum(len(memory.to_bytes("int8")) for memory in documents) / len(documents)
    assert systems.document_bytes("pic", exact) is None


def test_memories_at_rest_are_read_with_the_reader(compressor_with_reader: Compressor) -> None:
    rows = run(compressor_with_reader, ["pic", *AT_REST_SYSTEMS]).rows
    assert rows[0].document_bytes_mean is None
    assert [row.system for row in rows[1:]] == list(AT_REST_SYSTEMS)
    assert len({row.prompt_tokens_mean for row in rows}) == 1


def test_pool_shows_means_of_token_embeddings(systems: Systems, tiny_model: LlamaForCausalLM) -> None:
    memory = systems.show("pool", ask(LINES[2:]), 4)[0].memories[0]
    ids = torch.tensor(systems.plain.tokenizer(document_text(BEES))["input_ids"])
    wanted = tiny_model.get_input_embeddings()(ids[:4]).mean(0)
    torch.testing.assert_close(memory.embeddings[0], wanted)
    trained = systems.show("pic", ask(LINES[2:]), 4)[0].memories[0]
    assert memory.memory_tokens == trained.memory_tokens
    assert not torch.allclose(memory.embeddings, trained.embeddings)


def test_pool_is_read_without_the_reader_and_pic_with_it(compressor_with_reader: Compressor) -> None:
    systems = Systems(compressor_with_reader, dtype="float32")
    options = {"max_new_tokens": MAX_NEW_TOKENS, "batch_size": 2}
    for system, generator in (("pool", systems.plain), ("pic", systems.reading)):
        shown = systems.show(system, ask(), 4)
        assert {memory.generator for one in shown for memory in one.memories} == {generator.model_id}
        assert all(answer.memory_tokens for answer in systems.answer(system, ask(), shown, **options))
    assert systems.plain.model_id != systems.reading.model_id


def test_the_reader_is_off_for_text_and_on_for_text_with_reader(
    compressor: Compressor, compressor_with_reader: Compressor
) -> None:
    options = {"max_new_tokens": MAX_NEW_TOKENS, "batch_size": 2}
    plain, reading = (Systems(each, dtype="float32") for each in (compressor, compressor_with_reader))
    shown = plain.show("text", ask())
    wanted = [answer.token_ids for answer in plain.answer("text", ask(), shown, **options)]
    read = [answer.token_ids for answer in reading.answer("text+reader", ask(), shown, **options)]
    assert [answer.token_ids for answer in reading.answer("text", ask(), shown, **options)] == wanted
    assert all(ours != theirs for ours, theirs in zip(read, wanted, strict=True))


# The run


def test_a_row_has_exactly_its_keys_and_systems_without_ratio_have_one_row(
    compressor: Compressor, embedder: SentenceTransformer
) -> None:
    names = [name for name in SYSTEMS if not name.endswith("+reader") and name not in LINGUA_SYSTEMS]
    report = json.loads(json.dumps(run(compressor, names, (4, 16), embedder=embedder).to_dict()))
    assert list(report) == ["rows", "config", "versions"]
    assert all(list(row) == [*KEYS, "seconds"] for row in report["rows"])
    wanted = [(name, ratio) for name in names for ratio in ((4, 16) if name in RATIO_SYSTEMS else (None,))]
    assert [(row["system"], row["ratio"]) for row in report["rows"]] == wanted
    assert {row["n"] for row in report["rows"]} == {3}
    assert report["config"]["fingerprint"] == compressor.fingerprint
    assert report["versions"]["torch"] == torch.__version__


def test_prompt_tokens_are_what_the_generator_sees(compressor: Compressor, systems: Systems) -> None:
    rows = {row.system: row for row in run(compressor, ["text", "none", "pic", "pool", "truncate"]).rows}
    counted = [
        systems.plain.count_tokens(rag_messages(asked.question, shown.passages))
        for asked, shown in zip(ask(), systems.show("text", ask()), strict=True)
    ]
    assert rows["text"].prompt_tokens_mean == sum(counted) / 3
    assert rows["none"].prompt_tokens_mean < rows["pic"].prompt_tokens_mean < rows["text"].prompt_tokens_mean
    assert rows["pic"].prompt_tokens_mean == rows["pool"].prompt_tokens_mean == rows["truncate"].prompt_tokens_mean
    # One token a byte: the mean length of the documents, whatever the system shows of them.
    texts = [sum(len(context.document.encode()) for context in asked.contexts) for asked in ask()]
    assert {row.text_tokens_mean for row in rows.values()} == {sum(texts) / 3}


def test_questions_are_put_in_the_prompt_of_an_application(compressor: Compressor, systems: Systems) -> None:
    template = "Question: {question} Context: {context} Answer:"
    report = run(compressor, ["text"], prompt=template)
    counted = []
    for asked, shown in zip(ask(), systems.show("text", ask()), strict=True):
        text = template.replace("{question}", asked.question).replace("{context}", "\n\n".join(shown.passages))
        counted.append(systems.plain.count_tokens([{"role": "user", "content": text}]))
    assert report.rows[0].prompt_tokens_mean == sum(counted) / 3
    assert report.config["prompt"] == template


def test_a_prompt_without_a_place_for_the_documents_is_refused(compressor: Compressor) -> None:
    with pytest.raises(ValueError, match=r"prompt must hold {context} and {question}, got 'Who\? {question}'"):
        run(compressor, ["text"], prompt="Who? {question}")


def test_agreement_is_with_the_full_text_answer_of_the_same_run(compressor: Compressor, tmp_path: Path) -> None:
    rows = run(compressor, ["none", "text"], predictions=tmp_path / "said.jsonl").rows
    none, text = ([line["prediction"] for line in read_lines(tmp_path / "said.jsonl")][n : n + 3] for n in (0, 3))
    assert rows[0].agreement == sum(map(agreement, none, text)) / 3 < 1.0
    assert rows[1].agreement == 1.0
    assert run(compressor, ["none"]).rows[0].agreement is None


def test_the_readers_agreement_is_with_what_it_answers_from_the_full_text(
    compressor_with_reader: Compressor, tmp_path: Path
) -> None:
    systems = ["text+reader", "pic", "none"]
    rows = {row.system: row for row in run(compressor_with_reader, systems, predictions=tmp_path / "said.jsonl").rows}
    said = {(line["system"], line["id"]): line["prediction"] for line in read_lines(tmp_path / "said.jsonl")}
    for system, row in rows.items():
        wanted = [agreement(said[system, f"q{n}"], said["text+reader", f"q{n}"]) for n in (1, 2, 3)]
        assert row.reader_agreement == pytest.approx(sum(wanted) / 3)
    assert rows["text+reader"].reader_agreement == 1.0
    assert run(compressor_with_reader, ["none"]).rows[0].reader_agreement is None


def test_predictions_hold_what_the_row_is_the_mean_of(compressor: Compressor, tmp_path: Path) -> None:
    report = run(compressor, ["pic"], (8,), predictions=tmp_path / "new" / "said.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "new" / "said.jsonl").read_text().splitlines()]
    assert [(line["system"], line["ratio"], line["id"]) for line in lines] == [("pic", 8, f"q{n}") for n in (1, 2, 3)]
    assert [line["f1"] for line in lines] == [f1(line["prediction"], line["answers"]) for line in lines]
    assert report.rows[0].prompt_tokens_mean == sum(line["prompt_tokens"] for line in lines) / 3


def test_ratios_by_rank_stand_beside_single_ones_with_as_many_tokens_for_every_system(
    compressor: Compressor, systems: Systems, tmp_path: Path
) -> None:
    rows = run(compressor, ["pic", "truncate"], (4, [4, 16], 16), predictions=tmp_path / "said.jsonl").rows
    assert [(row.system, row.ratio) for row in rows] == [
        (system, ratio) for system in ("pic", "truncate") for ratio in (4, "4+16", 16)
    ]
    four, mixed, sixteen, *cut = [row.prompt_tokens_mean for row in rows]
    assert sixteen < mixed < four
    assert cut == [four, mixed, sixteen]
    for asked, shown in zip(ask(), systems.show("pic", ask(), (4, 16)), strict=True):
        assert [memory.ratio for memory in shown.memories] == [4, 16, 16][: len(asked.contexts)]
    assert {line["ratio"] for line in read_lines(tmp_path / "said.jsonl")} == {4, "4+16", 16}


def test_the_batch_size_changes_no_score(compressor: Compressor) -> None:
    one, three = (run(compressor, ["pic", "text"], batch_size=size).to_dict()["rows"] for size in (1, 3))
    assert [{key: row[key] for key in KEYS} for row in one] == [{key: row[key] for key in KEYS} for row in three]


def test_a_report_is_saved_as_json(compressor: Compressor, tmp_path: Path) -> None:
    report = run(compressor, ["none"])
    report.save(tmp_path / "out" / "report.json")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report.to_dict()


@pytest.mark.parametrize(
    ("names", "ratios", "message"),
    [
        (["pic", "magic"], (4,), "systems must be some of pic, .* got 'magic'"),
        ([], (4,), "systems must be a list of at least one name"),
        ("pic", (4,), "systems must be a list of at least one name, got 'pic'"),
        (["pic"], (5,), "ratio must be one of 4, 8, 16, 32 "),
        (["pic"], (4, (4, 5)), "ratio must be one of 4, 8, 16, 32 "),
        (["pic"], (), "ratios must hold at least one ratio"),
        (["text+reader"], (4,), r"'text\+reader' must have a compressor with a reader"),
        (["truncate+reader"], (4,), r"'truncate\+reader' must have a compressor with a reader"),
        (["pic+reader"], (4,), r"systems must be some of pic, .*, got 'pic\+reader'"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_anything_is_answered(
    compressor: Compressor, tmp_path: Path, names: Sequence[str], ratios: Sequence[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(compressor, names, ratios, predictions=tmp_path / "said.jsonl")
    assert not (tmp_path / "said.jsonl").exists()


def test_no_questions_are_refused(compressor: Compressor) -> None:
    with pytest.raises(ValueError, match="questions must hold at least one question"):
        evaluate([], ["text"], compressor=compressor, dtype="float32")


def test_a_handle_in_a_question_is_not_resolved(compressor: Compressor, systems: Systems) -> None:
    handle = systems.show("pic", ask(), 4)[0].passages[0]
    assert find_handles(handle) == [handle]
    hostile = ask([{**LINES[2], "question": f"What is {handle}?"}])
    shown = systems.show("none", hostile)
    answers = systems.answer("none", hostile, shown, max_new_tokens=2, batch_size=1)
    assert answers[0].memory_tokens == 0


def test_the_rows_are_what_the_official_scorer_says_of_the_runs_own_predictions(
    compressor: Compressor, tmp_path: Path
) -> None:
    run(compressor, ["none"], predictions=tmp_path / "first.jsonl")
    said = [line["prediction"] for line in read_lines(tmp_path / "first.jsonl")]
    # A random model answers nonsense: its own words become answers, so that there is something to score.
    answers = [[said[0], "x"], [f"{said[1]} tail", "y"], ["z"]]
    asked = ask([{**line, "answers": own} for line, own in zip(LINES, answers, strict=True)])
    report = run(compressor, ["none", "text"], questions=asked, predictions=tmp_path / "said.jsonl")
    for row in report.rows:
        own = [line for line in read_lines(tmp_path / "said.jsonl") if line["system"] == row.system]
        official = squad(
            [{"prediction_text": line["prediction"], "id": line["id"]} for line in own],
            [{"answers": {"answer_start": [0, 0], "text": line["answers"]}, "id": line["id"]} for line in own],
        )
        assert 100 * row.f1 == pytest.approx(float(official["f1"]))
        assert 100 * row.em == pytest.approx(float(official["exact_match"]))
    assert 0 < report.rows[0].em < report.rows[0].f1 < 1


# What is asked, with which documents


def test_a_slice_is_named_by_two_numbers() -> None:
    asked = ask(LINES * 4)
    assert pick(asked, every=3, offset=1) == [asked[1], asked[4], asked[7], asked[10]]
    assert pick(asked, every=3, offset=1, limit=2) == [asked[1], asked[4]]
    assert pick(iter(asked)) == asked


def test_a_prompt_that_is_too_long_scores_nothing_and_leaves_the_others_alone(
    compressor_with_reader: Compressor, tmp_path: Path
) -> None:
    systems = ["text", "text+reader", "pic", "truncate"]
    long = {**LINES[1], "id": "long", "contexts": [{**BEES, "text": "Bees dance. " * 300}]}  # 3,600 of 2,048 tokens
    alone = {row.system: row for row in run(compressor_with_reader, systems).rows}
    asked = ask([LINES[0], long, *LINES[1:]])
    report = run(compressor_with_reader, systems, questions=asked, predictions=tmp_path / "said.jsonl")
    lines = {line["system"]: line for line in read_lines(tmp_path / "said.jsonl") if line["id"] == "long"}
    for row in report.rows:
        fits = row.system in ("pic", "truncate")
        assert (row.n, row.too_long) == (4, int(not fits))
        assert (lines[row.system]["prediction"] is not None) is fits
        assert lines[row.system]["agreement"] is None  # there is no answer from the full text to agree with
        assert row.agreement == pytest.approx(alone[row.system].agreement)
        assert 4 * row.f1 == pytest.approx(3 * alone[row.system].f1 + lines[row.system]["f1"])
        if not fits:
            assert row.prompt_tokens_mean == alone[row.system].prompt_tokens_mean
    everything = run(compressor_with_reader, ["text"], questions=ask([long])).rows[0]
    assert (everything.too_long, everything.agreement, everything.prompt_tokens_mean) == (1, None, None)


def test_open_retrieval_searches_all_passages_and_says_how_often_the_gold_ones_were_found(
    embedder: SentenceTransformer,
) -> None:
    found = retrieve(ask(), ask(), 1, embedder=embedder)
    assert [[context.text[:4] for context in one.contexts] for one in found.questions] == [["Bees"], ["The "], ["Bees"]]
    # The file calls the bees the gold passage of the tram's question too, and that one was not found.
    assert [one.contexts[0].is_gold for one in found.questions] == [True, False, True]
    assert (found.passages, found.recall, found.recall_all) == (2, 2 / 3, 2 / 3)
    both = ask([{**LINES[0], "contexts": [BEES, {**TRAMS, "is_gold": True}]}])
    one, two = (retrieve(both, ask(), top_k, embedder=embedder) for top_k in (1, 5))
    assert (one.recall, one.recall_all, two.recall_all) == (1.0, 0.0, 1.0)
    assert len(two.questions[0].contexts) == 2
    unflagged = ask([{**LINES[0], "contexts": [TRAMS, {"text": "Wax."}]}])
    for asked, share in [(unflagged, None), ([*unflagged, ask()[0]], 1.0)]:
        found = retrieve(asked, ask(), 1, embedder=embedder)
        assert (found.recall, found.recall_all) == (share, share)
    with pytest.raises(ValueError, match="pool must hold questions with contexts to search, got none"):
        retrieve(both, ask([{**LINES[0], "contexts": []}]), 1, embedder=embedder)


PROBLEMS = [
    {"question": "2 + 3?", "answers": ["5"], "rationale": "2 + 3 = <<2+3=5>>5.\n#### 5", "contexts": []},
    {"question": "4 + 3?", "answers": ["1,007"], "rationale": "4 + 3 = <<4+3=7>>7.\n#### 7", "contexts": []},
]


def test_solved_problems_become_documents_that_are_compressed_and_the_final_number_is_scored(
    compressor: Compressor, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "train.jsonl", PROBLEMS)
    asked = list(with_examples(ask([{**PROBLEMS[1], "id": "p"}]), source, 2))
    assert [context.document for context in asked[0].contexts] == [
        "Question: 2 + 3?\nAnswer: 2 + 3 = 5.\n#### 5",
        "Question: 4 + 3?\nAnswer: 4 + 3 = 7.\n#### 7",
    ]
    report = run(compressor, ["pic", "text"], questions=asked, task="gsm8k", predictions=tmp_path / "said.jsonl")
    assert report.config["task"] == "gsm8k"
    pic, text = report.rows
    shown = [context.document for context in asked[0].contexts]
    length = len(problem_messages("4 + 3?", shown)[0]["content"]) - len(problem_messages("4 + 3?", [])[0]["content"])
    assert 0 < text.prompt_tokens_mean - pic.prompt_tokens_mean < length
    with pytest.raises(ValueError, match="shots must be at most the problems of .*, got 3 and 2 problems"):
        list(with_examples(asked, source, 3))
    with pytest.raises(ValueError, match="rationale must be a string, got None in .*line 1"):
        list(with_examples(asked, write_lines(tmp_path / "bare.jsonl", [{"question": "?"}]), 1))
    with pytest.raises(ValueError, match="question must be a string, got None in .*line 1"):
        list(with_examples(asked, write_lines(tmp_path / "bare.jsonl", [{"rationale": "#### 1"}]), 1))
    with pytest.raises(ValueError, match="task must be one of questions, gsm8k, got 'poetry'"):
        run(compressor, ["pic"], task="poetry")


def test_llmlingua_is_refused_before_anything_is_answered_where_it_is_not_to_be_had(
    compressor: Compressor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIC_RAG_LLMLINGUA2", raising=False)
    with pytest.raises(LinguaError, match="llmlingua2 must be the folder or hub id of a token classifier, got None"):
        run(compressor, ["text", "llmlingua2"], predictions=tmp_path / "said.jsonl")
    assert not (tmp_path / "said.jsonl").exists()


def test_braces_in_documents_and_questions_are_text() -> None:
    [message] = filled_messages("{context} {question}", "What is {context}?", ["Write {question} there."])
    assert message["content"] == "Write {question} there. What is {context}?"


def test_a_context_that_stands_alone_is_gold_and_of_several_none_is_unless_the_file_says_so(tmp_path: Path) -> None:
    unflagged, others = ({name: value for name, value in each.items() if name != "is_gold"} for each in (BEES, TRAMS))
    chosen = ([unflagged], [unflagged, others], [{**BEES, "is_gold": False}])
    lines = [{**LINES[0], "contexts": contexts} for contexts in chosen]
    alone, several, denied = read_questions(write_lines(tmp_path / "q.jsonl", lines))
    assert [context.is_gold for context in alone.contexts] == [True]
    assert [context.is_gold for context in several.contexts] == [False, False]
    assert [context.is_gold for context in denied.contexts] == [False]
    gold = read_questions(write_lines(tmp_path / "one.jsonl", lines[:1]), gold_only=True)
    assert [asked.id for asked in gold] == ["q1"]


def test_agreement_about_a_problem_is_of_the_numbers_found(compressor: Compressor, tmp_path: Path) -> None:
    rows = run(compressor, ["none", "text"], task="gsm8k", max_new_tokens=8, predictions=tmp_path / "said.jsonl").rows
    none, text = ([line["prediction"] for line in read_lines(tmp_path / "said.jsonl")][n : n + 3] for n in (0, 3))
    assert rows[0].agreement == sum(map(agreement, none, text)) / 3


def test_pool_shows_means_beside_a_compressor_that_adds_none(base: Path, embedder: SentenceTransformer) -> None:
    config = PicConfig(encoder_layers=2, lora_rank=2, residual_pool=False)
    bare, pooling = (
        Systems(Compressor.from_base(base, config=own, dtype="float32"), embedder=embedder, dtype="float32")
        for own in (config, replace(config, residual_pool=True))
    )
    for one, other in zip(bare.show("pool", ask(), 4), pooling.show("pool", ask(), 4), strict=True):
        for memory, expected in zip(one.memories, other.memories, strict=True):
            assert memory.embeddings.abs().sum() > 0
            torch.testing.assert_close(memory.embeddings, expected.embeddings)
