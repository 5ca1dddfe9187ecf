"""Importing pic_rag costs nothing, and each room imports what it says."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys

import pytest

import pic_rag

HEAVY = {"torch", "transformers", "numpy", "peft", "safetensors", "sentence_transformers", "faiss", "accelerate"}


def _imported_by(statement):
    """Top-level modules in `sys.modules` of a new interpreter after a statement."""
    script = (
        f"import sys, json\n{statement}\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_pic_rag_loads_no_torch_and_is_quick():
    script = (
        "import time, sys, importlib, typing\n"
        "start = time.perf_counter(); import pic_rag; seconds = time.perf_counter() - start\n"
        f"print(seconds, sorted({HEAVY!r} & set(sys.modules)))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split(" ", 1)
        for _ in range(3)
    ]
    assert {heavy.strip() for _, heavy in runs} == {"[]"}
    assert min(float(seconds) for seconds, _ in runs) < 0.1


def test_entering_any_room_loads_nothing_heavy():
    rooms = [module.name for module in pkgutil.walk_packages(pic_rag.__path__, "pic_rag.") if module.ispkg]
    assert {"pic_rag.models", "pic_rag.store", "pic_rag.generation.vllm"} <= set(rooms)
    assert _imported_by(f"import {', '.join(rooms)}") & HEAVY == set()


@pytest.mark.parametrize("room", ["config", "handles", "prompts", "questions", "models.sharing"])
def test_the_light_rooms_import_the_standard_library_only(room):
    own = {name for name in _imported_by(f"import pic_rag.{room}") - _imported_by("pass") if name in HEAVY}
    assert own == set()
    third_party = _imported_by(f"import pic_rag.{room}") - sys.stdlib_module_names - _imported_by("pass")
    assert third_party == {"pic_rag"}


def test_the_mask_imports_torch_only():
    allowed = _imported_by("import torch; import torch.nn.attention.flex_attention") | {"pic_rag"}
    imported = _imported_by("import pic_rag.mask")
    assert "torch" in imported
    assert imported <= allowed
    assert not imported & (HEAVY - {"torch", "numpy"})


def test_every_public_name_is_there_and_listed():
    assert set(pic_rag.__all__) == set(pic_rag._ROOMS)
    for name in pic_rag.__all__:
        assert getattr(pic_rag, name).__module__.startswith("pic_rag."), name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'pic_rag' has no attribute 'Kompressor'"):
        pic_rag.Kompressor  # noqa: B018
