"""A base model, texts and questions to train on."""

from __future__ import annotations

import copy

import pytest
from training_runs import TEXT, write_rows


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_model, tiny_tokenizer):
    """A folder with a base model, texts and questions."""
    folder = tmp_path_factory.mktemp("data")
    copy.deepcopy(tiny_model).save_pretrained(folder / "base")
    tiny_tokenizer.save_pretrained(folder / "base")
    write_rows(folder / "texts.jsonl", [{"text": TEXT.format(number)} for number in range(8)])
    rows = [
        {
            "id": str(number),
            "question": f"Which number had bell {number}?",
            "answers": [str(number)],
            "contexts": [{"title": f"Bell {number}", "text": f"Bell {number} rang late.", "is_gold": True}],
        }
        for number in range(6)
    ]
    write_rows(folder / "questions.jsonl", rows)
    return folder
