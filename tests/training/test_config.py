"""Training configurations: what a file may say, and what it is told otherwise."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import yaml
from training_runs import make_config

import pic_rag.training
from pic_rag.config import PicConfig
from pic_rag.training.config import Stage, TrainConfig
from pic_rag.training.loop import train


def test_the_public_names_load_without_torch():
    code = "import sys, pic_rag.training as t; t.TrainConfig; t.Stage; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert pic_rag.training.train is train
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        pic_rag.training.trian  # noqa: B018


def test_yaml_keeps_every_field(data, tmp_path):
    config = make_config(data, tmp_path, slots_per_chunk=[2, 4], held_out=["held.jsonl"])
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


SHARES = ["distractor_share", "question_first", "decay_share"]


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
    ("learning_rate", 0, "learning_rate must be above 0 where reader_rank is 0, got 0"),
    ("out", None, "A training configuration must set 'out'"),
    ("out", 3, "out must be a path, got 3"),
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
    *[
        (
            "stages",
            [{"steps": 5, "tasks": {"continue": 1}, "ratios": none}],
            f"ratios of a stage must be weights of ratios, got {none}",
        )
        for none in (None, 0)
    ],
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
        make_config(data, tmp_path, **{field: value})


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
