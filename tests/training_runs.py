"""What the tests of training share: a small run, and what it leaves."""

from __future__ import annotations

import hashlib
import json

import torch

from pic_rag.training.chat import MEMORY
from pic_rag.training.config import TrainConfig
from pic_rag.training.corpora import Corpora
from pic_rag.training.examples import ExampleFactory

TEXT = "The harbour of Whitby lay still, and nobody spoke before the bell rang number {}. Then all of them left."


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_config(data, folder, *, steps=6, tasks=None, **fields):
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


def make_factory(folder, tokenizer, rows, end_token_ids=(), **fields):
    """Of examples that ask the questions of these rows."""
    write_rows(folder / "questions.jsonl", rows)
    table = Corpora(folder / "cache", tokenizer, []).questions(str(folder / "questions.jsonl"))
    return ExampleFactory(make_config(folder, folder, **fields), tokenizer, None, {table: 1.0}, end_token_ids)


def memory_places(dialogue):
    return int((dialogue.ids == MEMORY).sum())


def metrics_of(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()[1:]]
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def weights_of(out):
    return torch.load(out / "training_state.pt", weights_only=True)["trained"]


def file_hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
