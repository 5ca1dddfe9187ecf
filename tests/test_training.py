"""Training: the loss falls, the base stays what it was, and a run that was cut off ends as if it had not been."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator

import pic_rag.training
from pic_rag.compression.compressor import Compressor
from pic_rag.config import PicConfig
from pic_rag.generation.generator import Generator
from pic_rag.prompts import rag_messages
from pic_rag.questions import read_questions as read_eval_questions
from pic_rag.training.batch import StepDataset, build_batches
from pic_rag.training.config import Stage, TrainConfig
from pic_rag.training.corpora import (
    Corpora,
    _training_records,
    content_hash,
    held_out_hashes,
    read_texts,
)
from pic_rag.training.loop import Trainer, train
from pic_rag.training.synthetic import passages

TEXT = "The harbour of Whitby lay still, and nobody spoke before the bell rang number {}. Then all of them left."


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_model, tiny_tokenizer):
    """A folder with a base model, texts and questions."""
    folder = tmp_path_factory.mktemp("data")
    copy.deepcopy(tiny_model).save_pretrained(folder / "base")
    tiny_tokenizer.save_pretrained(folder / "base")
    _write(folder / "texts.jsonl", [{"text": TEXT.format(number)} for number in range(8)])
    rows = [
        {
            "id": str(number),
            "question": f"Which number had bell {number}?",
            "answers": [str(number)],
            "contexts": [{"title": f"Bell {number}", "text": f"Bell {number} rang late.", "is_gold": True}],
        }
        for number in range(6)
    ]
    _write(folder / "questions.jsonl", rows)
    return folder


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _config(data, folder, *, steps=6, tasks=None, **fields):
    values = {
        "out": str(folder),
        "base_model": str(data / "base"),
        "stages": [{"steps": steps, "tasks": tasks or {"reconstruct": 1, "continue": 1, "questions": 1}}],
        "pic": {"segment_tokens": 64, "ratios": [4, 8], "lora_rank": 4, "encoder_layers": 2},
        "texts": [str(data / "texts.jsonl")],
        "questions": {str(data / "questions.jsonl"): 1.0},
        "text_tokens": [16, 48],
        "target_tokens": 16,
        "examples_per_step": 2,
        "row_places": 128,
        "warmup_steps": 2,
        "workers": 0,
        "log_steps": 1,
        "precision": "fp32",
    }
    return TrainConfig.from_dict({**values, **fields})


def _metrics(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()[1:]]
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def _weights(out):
    return torch.load(out / "training_state.pt", weights_only=True)["trained"]


def _file_hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("reader_rank", [0, 4], ids=["frozen", "reader"])
def test_a_run_trains_every_task_and_leaves_base_and_generator_alone(data, tmp_path, reader_rank):
    config = _config(data, tmp_path / "out", reader_rank=reader_rank, distillation=0.5)
    files = _file_hashes(data / "base")
    trainer = Trainer(config, Accelerator())
    frozen = {
        name: parameter.detach().clone()
        for name, parameter in trainer.model.named_parameters()
        if not parameter.requires_grad
    }
    start = [master.clone() for master in trainer.master]
    folder = trainer.run(None, False)
    assert all(
        torch.equal(parameter, frozen[name]) for name, parameter in trainer.model.named_parameters() if name in frozen
    )
    assert any("lm_head" in name or "embed_tokens" in name for name in frozen)
    assert all(not torch.equal(old, new) for old, new in zip(start, trainer.master, strict=True))
    assert _file_hashes(data / "base") == files
    logged = set().union(*_metrics(tmp_path / "out"))
    assert {"reconstruct_loss", "continue_loss", "questions_loss", "questions_accuracy", "gradient_norm"} <= logged
    assert (folder / "reader" / "adapter_model.safetensors").is_file() is bool(reader_rank)
    assert (Compressor.from_pretrained(folder, device="cpu", dtype="float32").reader is not None) is bool(reader_rank)


def test_the_loss_falls_on_a_set_small_enough_to_learn(data, tmp_path):
    fields = {"learning_rate": 1e-2, "converter_rate_factor": 1.0, "reader_rank": 8, "reader_learning_rate": 1e-2}
    train(_config(data, tmp_path, steps=60, tasks={"questions": 1}, examples_per_step=4, **fields), progress=False)
    losses = [line["questions_loss"] for line in _metrics(tmp_path)]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_equals_the_uninterrupted_one(data, tmp_path, precision):
    fields = {"precision": precision, "reader_rank": 2, "distillation": 0.5}
    train(_config(data, tmp_path / "whole", **fields), progress=False)
    cut = _config(data, tmp_path / "cut", **fields)
    train(cut, minutes=0, progress=False)  # stops after its first step
    assert torch.load(tmp_path / "cut" / "training_state.pt", weights_only=True)["step"] == 1
    train(cut, progress=False)
    assert _metrics(tmp_path / "cut") == _metrics(tmp_path / "whole")
    for one, other in zip(_weights(tmp_path / "cut"), _weights(tmp_path / "whole"), strict=True):
        assert torch.equal(one, other)
    assert _file_hashes(tmp_path / "cut" / "compressor" / "reader") == _file_hashes(
        tmp_path / "whole" / "compressor" / "reader"
    )


def test_the_same_seed_gives_the_same_curve_and_another_seed_another(data, tmp_path):
    for out, seed in [("one", 0), ("same", 0), ("other", 1)]:
        train(_config(data, tmp_path / out, steps=3, seed=seed), progress=False)
    assert _metrics(tmp_path / "one") == _metrics(tmp_path / "same")
    assert _metrics(tmp_path / "one") != _metrics(tmp_path / "other")


def test_stages_may_grow_behind_the_steps_taken_and_nowhere_else(data, tmp_path):
    def run(*stages):
        known = [{"steps": steps, "tasks": {task: 1}} for steps, task in stages]
        train(_config(data, tmp_path, stages=known), progress=False)

    run((2, "continue"), (2, "questions"))
    for stages in [((2, "continue"), (9, "reconstruct")), ((3, "continue"), (3, "questions")), ((5, "continue"),)]:
        with pytest.raises(ValueError, match="stages must begin with the 4 steps that the run .* has taken"):
            run(*stages)
    run((2, "continue"), (3, "questions"), (1, "reconstruct"))
    assert [set(line) & {"continue_loss", "questions_loss", "reconstruct_loss"} for line in _metrics(tmp_path)] == [
        {"continue_loss"},
        {"continue_loss"},
        {"questions_loss"},
        {"questions_loss"},
        {"questions_loss"},
        {"reconstruct_loss"},
    ]


def test_every_file_of_a_trained_compressor_has_the_mode_that_new_files_get(data, tmp_path):
    (tmp_path / "plain").touch()
    (tmp_path / "folder").mkdir()
    folder = train(_config(data, tmp_path / "out", steps=1, reader_rank=2), progress=False)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"adapter_model.safetensors", "compressor.safetensors"}
    assert {path.stat().st_mode for path in files} == {(tmp_path / "plain").stat().st_mode}
    assert (folder / "reader").stat().st_mode == (tmp_path / "folder").stat().st_mode


def test_another_configuration_in_the_same_folder_is_an_error(data, tmp_path):
    train(_config(data, tmp_path, steps=1), progress=False)
    with pytest.raises(ValueError, match="out must be a new folder or hold the same run, got .* another configuration"):
        train(_config(data, tmp_path, steps=1, learning_rate=1.0), progress=False)


def test_the_exported_compressor_makes_the_trained_memories(data, tmp_path):
    config = _config(data, tmp_path, learning_rate=1e-2)
    trainer = Trainer(config, Accelerator())
    folder = trainer.run(None, False)
    exported = Compressor.from_pretrained(folder, device="cpu", dtype="float32")
    untrained = Compressor.from_base(str(data / "base"), config=config.pic, device="cpu", dtype="float32")
    live = Compressor(exported.checkpoint, trainer.encoder, exported.tokenizer)
    [trained], [loaded], [pooled] = (each.compress([TEXT]) for each in (live, exported, untrained))
    size = trained.embeddings.norm(dim=1)
    assert ((trained.embeddings - pooled.embeddings).norm(dim=1) / size).median() > 0.05
    assert ((trained.embeddings - loaded.embeddings).norm(dim=1) / size).median() < 0.02  # kept in bfloat16


def test_a_new_run_starts_with_the_salience_of_rare_tokens_above_that_of_common_ones(data, tmp_path):
    trainer = Trainer(_config(data, tmp_path, precision="fp32"), Accelerator())
    table = trainer.factory.texts
    counts = np.bincount(table.ids, minlength=len(trainer.backbone.tokenizer))
    salience = trainer.encoder.pool.token_salience.detach()
    assert salience[int(counts.argmax())] == salience.min()
    assert (salience[torch.from_numpy(counts == 0).nonzero()[-1]] == salience.max()).all()


def test_a_run_can_start_from_a_compressor(data, tmp_path):
    folder = train(_config(data, tmp_path / "first"), progress=False)
    trainer = Trainer(_config(data, tmp_path / "second", init_from=str(folder)), Accelerator())
    state = trainer.encoder.trained_state()
    kept = Compressor.from_pretrained(folder, device="cpu").checkpoint.weights
    assert all(torch.equal(state[name].to(tensor.dtype), tensor) for name, tensor in kept.items())


def test_rows_give_every_step_one_shape_and_change_nothing_else(data, tmp_path):
    fields = {"reader_rank": 2, "distillation": 1.0, "tasks": {"questions": 1}, "steps": 3, "documents": 1, "turns": 1}
    free = Trainer(_config(data, tmp_path / "free", **fields), Accelerator())
    fixed = Trainer(_config(data, tmp_path / "fixed", **fields, rows=[3, 4, 5], row_places=512), Accelerator())
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
        trainer = Trainer(_config(data, tmp_path / str(rows[0]), **fields, rows=rows), Accelerator())
        batch = StepDataset(trainer.config, trainer.factory)[0]
        counts.append(int(batch.reads.segment.max()) + 1)
        assert (batch.reads.segment >= 0).float().mean() > 0.6
    assert counts[1] > 2 * counts[0]


def test_all_examples_are_measured_whatever_the_rows_hold(data, tmp_path):
    trainer = Trainer(_config(data, tmp_path, rows=[1, 1, 1], row_places=512), Accelerator())
    posed = [trainer.factory.pose(asked, 4) for asked in read_eval_questions(data / "questions.jsonl")]
    batches = build_batches("questions", posed, trainer.config, size=6)
    assert sum(int(batch.reads.segment.max()) + 1 for batch in batches) == len(posed)
    assert len(batches) == 2


def test_spread_memories_leave_every_target_where_the_text_would_have_it(data, tmp_path):
    pic = {"segment_tokens": 64, "ratios": [4, 8], "lora_rank": 4, "generator_positions": "spread"}
    fields = {"tasks": {"questions": 1}, "turns": 2, "distillation": 1.0, "rows": [4, 4, 4], "row_places": 512}
    trainer = Trainer(_config(data, tmp_path, **fields, pic=pic), Accelerator())
    for step in range(4):
        batch = StepDataset(trainer.config, trainer.factory)[step]
        assert (batch.reads.slot >= 0).any()
        at, teacher = (rows.position_ids[rows.target_row, rows.target_place] for rows in (batch.reads, batch.teacher))
        assert torch.equal(at, teacher)


@pytest.mark.parametrize("reader_rank", [0, 2], ids=["frozen", "reader"])
def test_a_compressor_is_read_as_it_was_trained_at_either_positions(data, tmp_path, reader_rank):
    asked = next(iter(read_eval_questions(data / "questions.jsonl")))
    long = "Bell 0 rang late, and nobody knew why. " * 4  # several segments, the last chunk of odd length
    asked = dataclasses.replace(asked, contexts=(*asked.contexts, dataclasses.replace(asked.contexts[0], text=long)))
    losses = {}
    for positions in ("contiguous", "spread"):
        pic = {"segment_tokens": 64, "ratios": [4, 8], "lora_rank": 4, "generator_positions": positions}
        fields = {"steps": 2, "tasks": {"questions": 1}, "reader_rank": reader_rank, "pic": pic}
        trainer = Trainer(_config(data, tmp_path / positions, **fields), Accelerator())
        folder = trainer.run(None, False)
        [batch] = build_batches("questions", [trainer.factory.pose(asked, 8)], trainer.config, 1)
        with torch.no_grad():
            losses[positions] = trainer.model.measure(batch)[0].item()
        compressor = Compressor.from_pretrained(folder, device="cpu", dtype="float32")
        generator = Generator.from_checkpoint(compressor.checkpoint, device="cpu", dtype="float32")
        assert generator.model_id.endswith("~spread") == (positions == "spread")
        memories = compressor.compress([context.document for context in asked.contexts], 8)
        prompt = rag_messages(asked.question, [memory.handle for memory in memories])
        assembled = generator._assembler.assemble(prompt, {memory.handle: memory for memory in memories})
        trained = batch.reads.position_ids[0, : assembled.prompt_tokens]
        assert torch.equal(assembled.position_ids, trained)
        [log_probs] = generator.score([prompt], [batch.reads.target_ids], memories)
        assert -log_probs.mean().item() == pytest.approx(losses[positions], abs=1.5e-2)  # saved in bfloat16
    assert losses["spread"] != pytest.approx(losses["contiguous"], abs=2e-2)


def test_documents_that_stay_text_are_read_as_their_tokens(data, tmp_path):
    fields = {"tasks": {"questions": 1}, "documents": 1, "turns": 1, "distillation": 1.0, "text_share": 0.5}
    trainer = Trainer(_config(data, tmp_path, **fields), Accelerator())
    random = np.random.default_rng(0)
    drawn = [trainer.factory.draw("questions", {4: 1.0}, random) for _ in range(30)]
    as_text = [np.array_equal(example.reads.ids, example.teacher.ids) for example in drawn]
    assert as_text == [not example.segments for example in drawn]
    assert 8 < sum(as_text) < 22
    assert all(len(StepDataset(trainer.config, trainer.factory)[step].layout.slot_row) > 0 for step in range(6))


def test_a_run_that_has_to_finish_ends_with_a_rate_of_zero_in_its_time(data, tmp_path):
    config = _config(data, tmp_path, steps=100_000, tasks={"continue": 1}, decay_share=0.5)
    started = time.monotonic()
    train(config, minutes=0.1, finish=True, progress=False)
    assert time.monotonic() - started < 60
    lines = _metrics(tmp_path)
    assert lines[-1]["rate"] < 0.4  # 0 unless the machine grew slower meanwhile
    assert 10 < lines[-1]["step"] < 100_000
    assert lines[len(lines) // 4]["rate"] == 1.0


def test_a_short_run_that_has_to_finish_is_extended_and_is_whole_afterwards(data, tmp_path):
    config = _config(data, tmp_path, steps=2, tasks={"continue": 1}, decay_share=0.5)
    train(config, minutes=0.05, finish=True, progress=False)
    lines = _metrics(tmp_path)
    assert lines[-1]["step"] > 10
    rates = [line["rate"] for line in lines]
    after_warm_up = rates[rates.index(1.0) :]
    assert after_warm_up == sorted(after_warm_up, reverse=True)
    train(config, progress=False)  # nothing is left to do
    assert _metrics(tmp_path)[-1]["step"] == lines[-1]["step"]


@pytest.mark.parametrize("text_share", [0.0, 0.9])
def test_rows_that_hold_no_example_are_an_error_and_no_endless_search(data, tmp_path, text_share):
    config = _config(data, tmp_path, tasks={"questions": 1}, rows=[1, 1, 1], row_places=24, text_share=text_share)
    with pytest.raises(ValueError, match="row_places must hold examples of the task questions, got 24"):
        train(config, progress=False)


def test_a_finished_run_may_be_read_as_what_it_was(data, tmp_path):
    config = _config(data, tmp_path, steps=9)
    assert config.ending_at(9) == config
    assert config.ending_at(4).steps == 4
    assert config.ending_at(20).steps == 20


@pytest.mark.slow
def test_compiled_layers_learn_what_plain_ones_do(data, tmp_path):
    fields = {"steps": 3, "tasks": {"reconstruct": 1}, "rows": [2, 2, 2], "row_places": 256}
    train(_config(data, tmp_path / "plain", **fields), progress=False)
    train(_config(data, tmp_path / "compiled", **fields, compile=True), progress=False)
    for one, other in zip(_weights(tmp_path / "plain"), _weights(tmp_path / "compiled"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_tables_travel_without_the_files_they_were_made_from(data, tmp_path, tiny_tokenizer):
    source = tmp_path / "questions.jsonl"
    source.write_bytes((data / "questions.jsonl").read_bytes())
    held = tmp_path / "held.jsonl"
    _write(held, [{"question": "which number HAD  bell 2"}])
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
    _write(source, [{"text": "one"}])
    assert len(corpora.texts([str(source)])) == 1
    _write(source, [{"text": "one"}, {"text": "and two"}])
    assert len(corpora.texts([str(source)])) == 2


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
    _write(
        tmp_path / "texts.jsonl", [{"title": "Mill", "text": PARAGRAPH}, {"text": PARAGRAPH.replace("mill", "farm")}]
    )
    _write(tmp_path / "held.jsonl", [{"text": PARAGRAPH}])
    source = f"synthetic:{tmp_path / 'texts.jsonl'}"
    table = Corpora(tmp_path / "cache", tiny_tokenizer, [str(tmp_path / "held.jsonl")]).questions(source)
    assert len(table.groups) == 1
    assert "farm" in tiny_tokenizer.decode(table.contexts[0])


HELD_OUT = [
    "the   HARBOUR of Whitby lay still — and nobody spoke before the bell rang number 3.\nThen all of them left",
    TEXT.format(3),
]


@pytest.mark.parametrize("text", HELD_OUT, ids=["spacing, case, punctuation", "as it is"])
def test_a_held_out_text_is_dropped_from_training(data, tmp_path, text):
    _write(tmp_path / "held.jsonl", [{"text": text}])
    held_out = held_out_hashes([str(tmp_path / "held.jsonl")])
    kept = [each for each in read_texts(str(data / "texts.jsonl")) if content_hash(each) not in held_out]
    assert len(kept) == 7
    assert TEXT.format(3) not in kept
    config = _config(data, tmp_path / "out", held_out=[str(tmp_path / "held.jsonl")])
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
    _write(tmp_path / "held.jsonl", [row])
    held_out = held_out_hashes([str(tmp_path / "held.jsonl")])
    kept = list(_training_records(str(data / "questions.jsonl"), held_out))
    assert [record.answers[0] for record in kept] == ["0", "1", "3", "4", "5"]


def test_when_all_is_held_out_the_error_says_by_what(data, tmp_path):
    _write(
        tmp_path / "held.jsonl",
        [
            {"question": "Which number had bell 2?"},
            *({"contexts": [{"text": f"Bell {number} rang late."}]} for number in (0, 1, 3, 4, 5)),
        ],
    )
    config = _config(data, tmp_path / "out", tasks={"questions": 1}, held_out=[str(tmp_path / "held.jsonl")])
    with pytest.raises(ValueError, match=r"1 held out by the wording of the question and 5 by a context"):
        train(config, progress=False)


def test_the_public_names_load_without_torch():
    code = "import sys, pic_rag.training as t; t.TrainConfig; t.Stage; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert pic_rag.training.train is train
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        pic_rag.training.trian  # noqa: B018


def test_an_empty_held_out_context_drops_nothing(data, tmp_path):
    _write(tmp_path / "held.jsonl", [{"question": "Else?", "contexts": [{"text": " "}]}])
    _write(tmp_path / "plain.jsonl", [{"question": "Who?", "answers": ["I"], "contexts": [{"text": "One line."}]}])
    held_out = held_out_hashes([str(tmp_path / "held.jsonl")])
    assert len(list(_training_records(str(tmp_path / "plain.jsonl"), held_out))) == 1


def test_texts_that_are_all_too_short_are_an_error_and_no_endless_search(data, tmp_path):
    with pytest.raises(ValueError, match=r"texts must hold a text of text_tokens\[0\]=500 tokens or more"):
        train(_config(data, tmp_path, text_tokens=[500, 600]), progress=False)


def test_a_line_without_text_is_named(tmp_path):
    _write(tmp_path / "texts.jsonl", [{"text": "fine"}, {"body": "not fine"}])
    with pytest.raises(ValueError, match="text must be a string, got None in .*texts.jsonl, line 2"):
        list(read_texts(str(tmp_path / "texts.jsonl")))


def test_yaml_keeps_every_field(data, tmp_path):
    config = _config(data, tmp_path, slots_per_chunk=[2, 4], held_out=["held.jsonl"])
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    assert TrainConfig.load(path) == config
    assert TrainConfig.load(path, seed=7) == dataclasses.replace(config, seed=7)


def test_a_preset_in_yaml_is_the_preset(tmp_path):
    (tmp_path / "train.yaml").write_text(
        "{out: x, texts: [a.txt], stages: [{steps: 2, tasks: {continue: 1}}], pic: {preset: local, ratio: 8}}"
    )
    config = TrainConfig.load(tmp_path / "train.yaml")
    assert config.pic == PicConfig.preset("local", ratio=8)
    assert config.steps == 2
    assert config.stages == (Stage(2, {"continue": 1}),)


COUNTS = ["examples_per_step", "target_tokens", "turns", "documents", "row_places", "log_steps"]
COUNTS_OR_0 = ["reader_rank", "warmup_steps", "workers", "seed"]
RATES = ["learning_rate", "converter_rate_factor", "reader_learning_rate", "distillation", "weight_decay", "clip"]
SHARES = ["distractor_share", "decay_share"]
BAD_FIELDS = [
    *[(name, value, f"{name} must be a whole number of 1 or more, got") for name in COUNTS for value in (0, 1.5, "8")],
    *[
        (name, value, f"{name} must be a whole number of 0 or more, got")
        for name in COUNTS_OR_0
        for value in (-1, True)
    ],
    *[(name, -1.0, f"{name} must be a number of 0 or more, got -1.0") for name in [*RATES, "checkpoint_minutes"]],
    *[(name, "3e-4", f"{name} must be a number .*, got '3e-4'. YAML reads 3e-4 as text") for name in [*RATES, *SHARES]],
    *[(name, 1.5, f"{name} must be a number from 0 to 1, got 1.5") for name in SHARES],
    ("learning_rate", float("nan"), "learning_rate must be a number of 0 or more, got nan"),
    ("out", None, "out must be a path, got None"),
    ("base_model", 3, "base_model must be a path or null, got 3"),
    ("init_from", [], "init_from must be a path or null"),
    ("cache", 3, "cache must be a path or null, got 3"),
    ("stages", [], "stages must hold at least one stage, got none"),
    ("stages", 100, "stages must be a list of mappings with steps, tasks and perhaps ratios, got 100"),
    ("stages", [100], "stages must be a list of mappings with steps, tasks and perhaps ratios, got 100"),
    (
        "stages",
        [{"steps": 5}],
        "stages must be a list of mappings with steps, tasks and perhaps ratios, got {'steps': 5}",
    ),
    ("stages", [{"steps": 0, "tasks": {"continue": 1}}], "steps of a stage must be a whole number of 1 or more, got 0"),
    (
        "stages",
        [{"steps": 5, "tasks": {"continue": 1}, "ratios": {0: 1.0}}],
        "ratios of a stage must be a whole number",
    ),
    ("stages", [{"steps": 5, "tasks": {"continue": 1}, "ratios": {4: -1}}], "ratios of a stage must be weights"),
    ("stages", [{"steps": 5, "tasks": {"sing": 1}}], "tasks of a stage must be weights of reconstruct, .*'sing'"),
    ("stages", [{"steps": 5, "tasks": {"continue": 0}}], "tasks of a stage must be weights of"),
    ("stages", [{"steps": 5, "tasks": {"continue": "much"}}], "tasks of a stage must be weights of .*'much'"),
    ("pic", "local", "pic must be a mapping of PicConfig's fields, or a preset and fields, got 'local'"),
    ("pic", {"preset": "loco"}, "preset must be one of pic, local, global, got 'loco'"),
    ("pic", {"preset": "pic", "sauce": 1}, "Unknown PicConfig field 'sauce'"),
    ("texts", "texts.jsonl", "texts must be a list of files, got 'texts.jsonl'"),
    ("texts", [], "texts must name a corpus when a stage trains on text, got none"),
    ("held_out", "held.jsonl", "held_out must be a list of files, got 'held.jsonl'"),
    ("questions", "questions.jsonl", "questions must be a mapping of files to weights, got 'questions.jsonl'"),
    ("questions", {"questions.jsonl": -1}, "questions must be a mapping of files to weights"),
    ("questions", {}, "questions must name a file when a stage trains on questions, got none"),
    ("text_tokens", [64], "text_tokens must be two whole numbers, 2 <= shortest <= longest"),
    ("text_tokens", [64, 16], "text_tokens must be two whole numbers, 2 <= shortest <= longest"),
    ("slots_per_chunk", 4, "slots_per_chunk must be a list of whole numbers, got 4"),
    ("slots_per_chunk", [0], "slots_per_chunk must be a whole number of 1 or more, got 0"),
    ("text_share", 1.0, "text_share must be a number from 0 to 0.9, got 1.0"),
    ("rows", [4, 4], "rows must be three whole numbers of 1 or more, for encoder, generator and teacher, got"),
    ("rows", [4, 0, 4], "rows must be three whole numbers"),
    ("precision", "fp8", "precision must be one of bf16, fp32, got 'fp8'"),
    ("attn_implementation", "flash", "attn_implementation must be one of sdpa, eager, flex_attention, got 'flash'"),
    ("compile", "yes", "compile must be one of True, False, got 'yes'"),
    ("epochs", 3, "Unknown training field 'epochs'. Known fields: .*examples_per_step"),
]


@pytest.mark.parametrize(("field", "value", "rule"), BAD_FIELDS)
def test_a_field_that_breaks_its_rule_is_named_with_its_value(data, tmp_path, field, value, rule):
    with pytest.raises(ValueError, match=rule):
        _config(data, tmp_path, **{field: value})


def test_every_field_has_a_rule_that_was_tried():
    assert {field.name for field in dataclasses.fields(TrainConfig)} == {name for name, _, _ in BAD_FIELDS} - {"epochs"}


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("- a list", "must be a YAML mapping of fields, got list"),
        ("{out: x", "must be YAML, got"),
        ("{out: x}", "A training configuration must set 'stages'"),
    ],
)
def test_what_is_no_configuration_is_an_error(tmp_path, text, rule):
    (tmp_path / "train.yaml").write_text(text)
    with pytest.raises(ValueError, match=rule):
        TrainConfig.load(tmp_path / "train.yaml")
