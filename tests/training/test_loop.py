"""The training loop: the loss falls, the base stays what it was, and a run cut off ends as one that was not."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from training_runs import TEXT, file_hashes, make_config, metrics_of, weights_of

from pic_rag.compression.compressor import Compressor
from pic_rag.generation.generator import Generator
from pic_rag.prompts import rag_messages
from pic_rag.questions import read_questions as read_eval_questions
from pic_rag.training.batch import build_batches
from pic_rag.training.loop import Trainer, train


@pytest.mark.parametrize("reader_rank", [0, 4], ids=["frozen", "reader"])
def test_a_run_trains_every_task_and_leaves_base_and_generator_alone(data, tmp_path, reader_rank):
    config = make_config(data, tmp_path / "out", reader_rank=reader_rank, distillation=0.5)
    files = file_hashes(data / "base")
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
    assert file_hashes(data / "base") == files
    logged = set().union(*metrics_of(tmp_path / "out"))
    assert {"reconstruct_loss", "continue_loss", "questions_loss", "questions_accuracy", "gradient_norm"} <= logged
    assert (folder / "reader" / "adapter_model.safetensors").is_file() is bool(reader_rank)
    assert (Compressor.from_pretrained(folder, device="cpu", dtype="float32").reader is not None) is bool(reader_rank)


def test_the_loss_falls_on_a_set_small_enough_to_learn(data, tmp_path):
    fields = {"learning_rate": 1e-2, "converter_rate_factor": 1.0, "reader_rank": 8, "reader_learning_rate": 1e-2}
    train(make_config(data, tmp_path, steps=60, tasks={"questions": 1}, examples_per_step=4, **fields), progress=False)
    losses = [line["questions_loss"] for line in metrics_of(tmp_path)]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_equals_the_uninterrupted_one(data, tmp_path, precision):
    fields = {"precision": precision, "reader_rank": 2, "distillation": 0.5}
    train(make_config(data, tmp_path / "whole", **fields), progress=False)
    cut = make_config(data, tmp_path / "cut", **fields)
    train(cut, minutes=0, progress=False)  # stops after its first step
    assert torch.load(tmp_path / "cut" / "training_state.pt", weights_only=True)["step"] == 1
    train(cut, progress=False)
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")
    for one, other in zip(weights_of(tmp_path / "cut"), weights_of(tmp_path / "whole"), strict=True):
        assert torch.equal(one, other)
    assert file_hashes(tmp_path / "cut" / "compressor" / "reader") == file_hashes(
        tmp_path / "whole" / "compressor" / "reader"
    )


def test_the_same_seed_gives_the_same_curve_and_another_seed_another(data, tmp_path):
    for out, seed in [("one", 0), ("same", 0), ("other", 1)]:
        train(make_config(data, tmp_path / out, steps=3, seed=seed), progress=False)
    assert metrics_of(tmp_path / "one") == metrics_of(tmp_path / "same")
    assert metrics_of(tmp_path / "one") != metrics_of(tmp_path / "other")


def test_stages_may_grow_behind_the_steps_taken_and_nowhere_else(data, tmp_path):
    def run(*stages):
        known = [{"steps": steps, "tasks": {task: 1}} for steps, task in stages]
        train(make_config(data, tmp_path, stages=known), progress=False)

    run((2, "continue"), (2, "questions"))
    for stages in [((2, "continue"), (9, "reconstruct")), ((3, "continue"), (3, "questions")), ((5, "continue"),)]:
        with pytest.raises(ValueError, match="stages must begin with the 4 steps that the run .* has taken"):
            run(*stages)
    run((2, "continue"), (3, "questions"), (1, "reconstruct"))
    assert [set(line) & {"continue_loss", "questions_loss", "reconstruct_loss"} for line in metrics_of(tmp_path)] == [
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
    folder = train(make_config(data, tmp_path / "out", steps=1, reader_rank=2), progress=False)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"adapter_model.safetensors", "compressor.safetensors"}
    assert {path.stat().st_mode for path in files} == {(tmp_path / "plain").stat().st_mode}
    assert (folder / "reader").stat().st_mode == (tmp_path / "folder").stat().st_mode


def test_another_configuration_in_the_same_folder_is_an_error(data, tmp_path):
    train(make_config(data, tmp_path, steps=1), progress=False)
    with pytest.raises(ValueError, match="out must be a new folder or hold the same run, got .* another configuration"):
        train(make_config(data, tmp_path, steps=1, learning_rate=1.0), progress=False)


def test_the_exported_compressor_makes_the_trained_memories(data, tmp_path):
    config = make_config(data, tmp_path, learning_rate=1e-2)
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
    trainer = Trainer(make_config(data, tmp_path, precision="fp32"), Accelerator())
    table = trainer.factory.texts
    counts = np.bincount(table.ids, minlength=len(trainer.backbone.tokenizer))
    salience = trainer.encoder.pool.token_salience.detach()
    assert salience[int(counts.argmax())] == salience.min()
    assert (salience[torch.from_numpy(counts == 0).nonzero()[-1]] == salience.max()).all()


def test_a_run_can_start_from_a_compressor(data, tmp_path):
    folder = train(make_config(data, tmp_path / "first"), progress=False)
    trainer = Trainer(make_config(data, tmp_path / "second", init_from=str(folder)), Accelerator())
    state = trainer.encoder.trained_state()
    kept = Compressor.from_pretrained(folder, device="cpu").checkpoint.weights
    assert all(torch.equal(state[name].to(tensor.dtype), tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("reader_rank", [0, 2], ids=["frozen", "reader"])
def test_a_compressor_is_read_as_it_was_trained_at_either_positions(data, tmp_path, reader_rank):
    asked = next(iter(read_eval_questions(data / "questions.jsonl")))
    long = "Bell 0 rang late, and nobody knew why. " * 4  # several segments, the last chunk of odd length
    asked = dataclasses.replace(asked, contexts=(*asked.contexts, dataclasses.replace(asked.contexts[0], text=long)))
    losses = {}
    for positions in ("contiguous", "spread"):
        pic = {"segment_tokens": 64, "ratios": [4, 8], "lora_rank": 4, "generator_positions": positions}
        fields = {"steps": 2, "tasks": {"questions": 1}, "reader_rank": reader_rank, "pic": pic}
        trainer = Trainer(make_config(data, tmp_path / positions, **fields), Accelerator())
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


def test_a_run_that_has_to_finish_ends_with_a_rate_of_zero_in_its_time(data, tmp_path):
    config = make_config(data, tmp_path, steps=100_000, tasks={"continue": 1}, decay_share=0.5)
    started = time.monotonic()
    train(config, minutes=0.1, finish=True, progress=False)
    assert time.monotonic() - started < 60
    lines = metrics_of(tmp_path)
    assert lines[-1]["rate"] < 0.4  # 0 unless the machine grew slower meanwhile
    assert 10 < lines[-1]["step"] < 100_000
    assert lines[len(lines) // 4]["rate"] == 1.0


def test_a_short_run_that_has_to_finish_is_extended_and_is_whole_afterwards(data, tmp_path):
    config = make_config(data, tmp_path, steps=2, tasks={"continue": 1}, decay_share=0.5)
    train(config, minutes=0.05, finish=True, progress=False)
    lines = metrics_of(tmp_path)
    assert lines[-1]["step"] > 10
    rates = [line["rate"] for line in lines]
    after_warm_up = rates[rates.index(1.0) :]
    assert after_warm_up == sorted(after_warm_up, reverse=True)
    train(config, progress=False)  # nothing is left to do
    assert metrics_of(tmp_path)[-1]["step"] == lines[-1]["step"]


def test_a_finished_run_may_be_read_as_what_it_was(data, tmp_path):
    config = make_config(data, tmp_path, steps=9)
    assert config.ending_at(9) == config
    assert config.ending_at(4).steps == 4
    assert config.ending_at(20).steps == 20


@pytest.mark.slow
def test_compiled_layers_learn_what_plain_ones_do(data, tmp_path):
    fields = {"steps": 3, "tasks": {"reconstruct": 1}, "rows": [2, 2, 2], "row_places": 256}
    train(make_config(data, tmp_path / "plain", **fields), progress=False)
    train(make_config(data, tmp_path / "compiled", **fields, compile=True), progress=False)
    for one, other in zip(weights_of(tmp_path / "plain"), weights_of(tmp_path / "compiled"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
