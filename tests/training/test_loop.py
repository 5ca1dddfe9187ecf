"""The training loop: the loss falls, the base stays what it was, and a run cut off ends as one that was not."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from filelock import FileLock
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from training_runs import TEXT, file_hashes, make_config, metrics_of, weights_of
from transformers import AutoTokenizer, LlamaForCausalLM

from pic_rag.cli import INTERRUPTED, main
from pic_rag.compression.compressor import Compressor
from pic_rag.generation.generator import Generator
from pic_rag.models.checkpoint import Checkpoint
from pic_rag.prompts import rag_messages
from pic_rag.questions import read_questions as read_eval_questions
from pic_rag.training import guards
from pic_rag.training.batch import build_batches
from pic_rag.training.examples import ExampleFactory
from pic_rag.training.loop import Trainer, train
from pic_rag.training.start import load_base


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


def test_without_a_learning_rate_the_reader_alone_is_trained(data, tmp_path):
    trainer = Trainer(make_config(data, tmp_path, learning_rate=0, reader_rank=4), Accelerator())
    encoder = {name: tensor.clone() for name, tensor in trainer.encoder.state_dict().items()}
    reader = [master.clone() for master in trainer.master]
    folder = trainer.run(None, False)
    assert not any(parameter.requires_grad for parameter in trainer.encoder.parameters())
    assert all(torch.equal(tensor, encoder[name]) for name, tensor in trainer.encoder.state_dict().items())
    assert all(not torch.equal(old, new) for old, new in zip(reader, trainer.master, strict=True))
    kept = Checkpoint.load(folder).weights
    assert kept
    assert all(torch.equal(tensor, encoder[name].bfloat16()) for name, tensor in kept.items())


def test_a_state_of_another_version_that_trained_other_weights_is_refused(data, tmp_path):
    config = make_config(data, tmp_path, steps=2)
    train(config, minutes=0, progress=False)
    path = tmp_path / "training_state.pt"
    state = torch.load(path)
    torch.save({**state, "trained": state["trained"][1:]}, path)
    with pytest.raises(ValueError, match="out must be a new folder or hold a run of this version"):
        train(config, progress=False)


@pytest.mark.parametrize("clip", [0, 0.001])
def test_a_gradient_is_cut_at_clip_and_at_0_not_at_all(data, tmp_path, clip):
    trainer = Trainer(make_config(data, tmp_path, steps=1, clip=clip), Accelerator())
    trainer.run(None, False)
    [line] = metrics_of(tmp_path)
    used = torch.stack([master.grad.norm() for master in trainer.master]).norm().item()
    assert line["gradient_norm"] > 0.01
    assert used == pytest.approx(clip or line["gradient_norm"], rel=1e-2)


@pytest.mark.slow
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


def test_another_run_in_the_same_folder_is_an_error_that_names_what_differs(data, tmp_path):
    shutil.copytree(data / "base", tmp_path / "base")
    fields = {"base_model": str(tmp_path / "base"), "steps": 1}
    train(make_config(data, tmp_path / "out", **fields), progress=False)
    pic = {"segment_tokens": 64, "ratios": [4, 8], "lora_rank": 2, "encoder_layers": 2}
    for changed, what in [
        ({"learning_rate": 1.0}, "learning_rate was 0.0003 and is 1.0"),
        ({"pic": pic}, "pic.lora_rank was 4 and is 2"),
    ]:
        with pytest.raises(ValueError, match=f"out must .* hold the same run, got .* another configuration: {what}"):
            train(make_config(data, tmp_path / "out", **fields, **changed), progress=False)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.lm_head.weight.data.neg_()
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="base_model must be 'base@.*', which the run .* was begun with, got 'base@"):
        train(make_config(data, tmp_path / "out", **fields), progress=False)


def test_a_damaged_state_is_named_with_what_to_do(data, tmp_path):
    config = make_config(data, tmp_path, steps=1)
    train(config, progress=False)
    state = tmp_path / "training_state.pt"
    whole = state.read_bytes()
    for damaged in (b"", whole[:-100], b"no state"):
        state.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"training_state\.pt must be the whole state .* Delete it to begin anew"):
            train(config, progress=False)


def test_a_run_that_diverges_stops_and_keeps_its_last_checkpoint(data, tmp_path):
    def poison(trainer):
        if trainer.step == 2:
            trainer.master[0].fill_(torch.nan)

    trainer = Trainer(make_config(data, tmp_path / "late", checkpoint_minutes=0.0), Accelerator())
    with pytest.raises(ValueError, match="low enough for weights to stay finite, got 0.0003: at step 2"):
        trainer.run(None, False, poison)
    assert torch.load(tmp_path / "late" / "training_state.pt", weights_only=True)["step"] == 1
    kept = load_file(tmp_path / "late" / "compressor" / "compressor.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())
    with pytest.raises(ValueError, match=r"loss and gradient norm to stay finite, got 1e\+30: at step 2"):
        train(make_config(data, tmp_path / "soon", learning_rate=1e30), progress=False)
    assert not (tmp_path / "soon" / "training_state.pt").exists()


def test_a_log_that_was_cut_or_is_gone_does_not_keep_a_run_from_going_on(data, tmp_path, caplog):
    log = tmp_path / "metrics.jsonl"

    def steps_after(damaged, steps):
        log.unlink() if damaged is None else log.write_bytes(damaged)
        train(make_config(data, tmp_path, steps=steps), progress=False)
        return [line["step"] for line in metrics_of(tmp_path)]

    train(make_config(data, tmp_path, steps=2), progress=False)
    assert steps_after(log.read_bytes()[:-5], 3) == [1, 3]
    assert steps_after(None, 4) == [4]
    assert "metrics.jsonl is gone and begins anew" in caplog.text
    with pytest.raises(ValueError, match=r"metrics\.jsonl must hold a JSON object in every line, got line 2: "):
        steps_after(log.read_bytes().replace(b"\n", b"\n?\n", 1), 5)


def test_a_folder_that_another_run_writes_to_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "_LOCK_TIMEOUT_S", 0.0)
    config = make_config(data, tmp_path, steps=1)
    with (
        FileLock(tmp_path / guards.LOCK_FILE),
        pytest.raises(ValueError, match="out must be .*: another run is writing here. Wait for it, or choose another"),
    ):
        train(config, progress=False)
    assert train(config, progress=False).is_dir()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_its_steps_and_ends_as_one_that_was_not(data, tmp_path, monkeypatch, number):
    train(make_config(data, tmp_path / "whole", steps=4), progress=False)
    config = make_config(data, tmp_path / "cut", steps=4)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.to_dict()))
    publish = Trainer._publish

    def interrupt(trainer):
        signal.raise_signal(number)  # between the new weights of a step and their use
        publish(trainer)

    monkeypatch.setattr(Trainer, "_publish", interrupt)
    handlers = {  # were SIGTERM not handled, this process would end; and a shell's background jobs ignore Ctrl-C
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: None),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
    }
    try:
        assert main(["train", str(tmp_path / "run.yaml"), "--quiet"]) == INTERRUPTED
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)
    monkeypatch.undo()
    assert torch.load(tmp_path / "cut" / "training_state.pt", weights_only=True)["step"] == 1
    train(config, progress=False)
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")
    for one, other in zip(weights_of(tmp_path / "cut"), weights_of(tmp_path / "whole"), strict=True):
        assert torch.equal(one, other)


def test_an_interrupt_waits_until_the_last_checkpoint_is_written(data, tmp_path, monkeypatch):
    export = Trainer.export
    signals = [signal.SIGINT]

    def interrupt(trainer, folder):
        if signals:
            signal.raise_signal(signals.pop())
        export(trainer, folder)

    monkeypatch.setattr(Trainer, "export", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    try:
        with pytest.raises(KeyboardInterrupt):
            train(make_config(data, tmp_path, steps=2), progress=False)
    finally:
        signal.signal(signal.SIGINT, before)
    assert torch.load(tmp_path / "training_state.pt", weights_only=True)["step"] == 2


def test_when_another_process_ends_the_steps_taken_are_saved(data, tmp_path, monkeypatch):
    train(make_config(data, tmp_path / "whole", steps=4), progress=False)
    backward = Accelerator.backward
    losses = []

    def meet(accelerator, loss):
        losses.append(loss)
        if len(losses) == 3:
            raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
        backward(accelerator, loss)

    config = make_config(data, tmp_path / "cut", steps=4)
    monkeypatch.setattr(Accelerator, "device", torch.device("cpu", 0))  # as it is in each of several processes
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "backward", meet)
        patch.setattr(Accelerator, "num_processes", 2)
        with pytest.raises(RuntimeError, match=r"All 2 processes must go on .* Run the same command again to go on"):
            train(config, progress=False)
    assert torch.load(tmp_path / "cut" / "training_state.pt", weights_only=True)["step"] == 2
    train(config, progress=False)
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")
    for one, other in zip(weights_of(tmp_path / "cut"), weights_of(tmp_path / "whole"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_two_processes_that_are_cut_and_resumed_train_what_they_would_have(data, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pic_rag"]
    for out, cuts in [("whole", [[]]), ("cut", [["--minutes", "0.00001"], []])]:
        path = tmp_path / f"{out}.yaml"
        path.write_text(yaml.safe_dump(make_config(data, tmp_path / out, steps=3).to_dict()))
        for cut in cuts:
            command = [*launch, "train", str(path), "--quiet", *cut]
            subprocess.run(command, check=True, env=os.environ | {"ACCELERATE_USE_CPU": "true"})
    assert [line["step"] for line in metrics_of(tmp_path / "cut")] == [1, 2, 3]
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")


def test_processes_that_would_each_train_by_themselves_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 launched processes must train together, .* set ACCELERATE_USE_CPU=true"):
        train(make_config(data, tmp_path / "out"), progress=False)
    assert not (tmp_path / "out").exists()


def test_shared_memory_that_is_full_is_named_with_what_to_do(data, tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DataLoader, "__iter__", fail)
    with pytest.raises(OSError, match=r"^Shared memory \(/dev/shm\) must have room for the workers .* Set workers: 0"):
        train(make_config(data, tmp_path, workers=1), progress=False)


def test_what_a_worker_fails_at_is_shown_as_it_is(data, tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("The bell is broken.")

    monkeypatch.setattr(ExampleFactory, "draw", fail)
    with pytest.raises(ValueError, match=r"^The bell is broken\.$"):
        train(make_config(data, tmp_path, workers=1), progress=False)


def _without_end_token(folder):
    for name, field in [("tokenizer_config", "eos_token"), ("config", "eos_token_id")]:
        settings = json.loads((folder / f"{name}.json").read_text())
        del settings[field]
        (folder / f"{name}.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").unlink()


def _without_template(folder):
    (folder / "chat_template.jinja").unlink()


def _with_few_embeddings(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(100)
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_end_token, "must have a token that ends an answer, got none .* Set eos_token in its tokenizer"),
        (_without_template, "must have a chat template, got none in .* instruction-tuned"),
        (_with_few_embeddings, r"must have an embedding for every token, got 100 .*resize_token_embeddings\(259\)"),
    ],
)
def test_a_base_model_that_cannot_be_trained_with_is_refused_at_once(data, tmp_path, damage, message):
    shutil.copytree(data / "base", tmp_path / "base")
    damage(tmp_path / "base")
    with pytest.raises(ValueError, match=f"base_model {message}"):
        train(make_config(data, tmp_path / "out", base_model=str(tmp_path / "base")), progress=False)
    assert not (tmp_path / "out" / "tokens").exists()


def test_a_special_token_that_no_text_holds_needs_no_embedding(data, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(data / "base")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})  # as Gemma 3 has it
    shutil.copytree(data / "base", tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = make_config(data, tmp_path / "out", steps=1, base_model=str(tmp_path / "base"))
    assert train(config, progress=False).is_dir()


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


def test_a_compressor_that_a_run_cannot_start_from_is_refused_by_what_differs(data, tmp_path):
    folder = train(make_config(data, tmp_path / "first", steps=1, reader_rank=2), progress=False)
    pic = {"segment_tokens": 64, "ratios": [4, 8], "lora_rank": 4, "encoder_layers": 2}
    start = {"init_from": str(folder), "reader_rank": 2}

    def refused(message, **changed):
        with pytest.raises(ValueError, match=message):
            Trainer(make_config(data, tmp_path / "second", **{**start, **changed}), Accelerator())

    refused("reader_rank must be 2, that of the reader of init_from=.*, got 4", reader_rank=4)
    refused("reader_rank must be 2, .* got 0", reader_rank=0)
    refused("pic.lora_rank must be 4, as in init_from=.*, got 8", pic={**pic, "lora_rank": 8})
    made = Checkpoint.load(folder)
    weights = {**made.weights, "slot_embedding": torch.full((64,), torch.nan)}
    dataclasses.replace(made, weights=weights).save(folder)
    refused("init_from=.* must hold finite weights, got others in 'slot_embedding'")


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


@pytest.mark.slow
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
    train(config, progress=False)  # nothing is left to do, unless the machine grew slower meanwhile
    whole = metrics_of(tmp_path)
    assert whole[: len(lines)] == lines
    train(config, progress=False)
    assert metrics_of(tmp_path) == whole


def test_a_run_that_has_to_finish_keeps_its_end_when_it_is_cut_and_when_it_is_over(data, tmp_path, caplog):
    config = make_config(data, tmp_path, steps=100_000, tasks={"continue": 1}, decay_share=0.5)

    def interrupt(trainer):
        if trainer.config.steps < 100_000:  # since its end is known
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(config, Accelerator()).run(0.05, False, interrupt, finish=True)
    cut = metrics_of(tmp_path)[-1]
    train(config, progress=False)
    lines = metrics_of(tmp_path)
    rates = [line["rate"] for line in lines[cut["step"] - 1 :]]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.5
    assert "nothing is left to do" not in caplog.text
    before = file_hashes(tmp_path / "compressor") | {"step": lines[-1]["step"]}
    for finish in (True, False):
        caplog.clear()
        train(config, minutes=0.05, finish=finish, progress=False)
        assert "nothing is left to do" in caplog.text
        assert file_hashes(tmp_path / "compressor") | {"step": metrics_of(tmp_path)[-1]["step"]} == before
    with pytest.raises(ValueError, match="finish must come with minutes"):
        train(config, finish=True)
    with pytest.raises(SystemExit, match="2"):
        main(["train", "smoke", "--finish"])


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


@pytest.mark.parametrize("field", ["texts", "questions", "held_out"])
def test_a_file_that_is_not_there_is_named_with_the_field_that_names_it(data, tmp_path, field):
    gone = {"questions": {"gone.jsonl": 1.0}}.get(field, ["gone.jsonl"])
    with pytest.raises(FileNotFoundError, match=f"{field} must name files that are there, got 'gone.jsonl'"):
        train(make_config(data, tmp_path, **{field: gone}), progress=False)


def test_flex_attention_is_refused_where_it_has_no_gradients(data, tmp_path):
    config = make_config(data, tmp_path, attn_implementation="flex_attention")
    with pytest.raises(ValueError, match="attn_implementation must be sdpa or eager on a CPU, got 'flex_attention'"):
        load_base(config, torch.device("cpu"))
