"""Components that ask for the same model get the same one, and reading memories needs no compressor."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import make_tiny_model

from pic_rag.compression.compressor import Compressor
from pic_rag.compression.sharing import shared_compressor
from pic_rag.config import PicConfig
from pic_rag.generation.generator import Generator
from pic_rag.generation.sharing import shared_generator
from pic_rag.models.sharing import shared_checkpoint, unload_shared
from pic_rag.store import shared_store

LOADING = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def base(tiny_model, tiny_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(base) -> Path:
    compressor = Compressor.from_base(base, config=PicConfig(encoder_layers=2, lora_rank=0), **LOADING)
    compressor.save_pretrained(base.parent / "compressor")
    return base.parent / "compressor"


@pytest.fixture(autouse=True)
def _nothing_shared():
    unload_shared()
    yield
    unload_shared()


def test_torch_is_loaded_by_the_first_who_asks_not_by_importing_what_to_ask_with():
    names = "shared_checkpoint, shared_compressor, shared_generator, shared_store, unload_shared"
    code = f"import sys; from pic_rag import {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_many_threads_that_ask_first_get_one_compressor_loaded_once(monkeypatch):
    loads, results = [], []
    started = threading.Barrier(8)

    def load(name, **loading):
        loads.append(name)
        return object()

    def ask():
        started.wait()
        results.append(shared_compressor("some/compressor"))

    monkeypatch.setattr(Compressor, "from_pretrained", load)
    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == ["some/compressor"]
    assert len(set(results)) == 1


def test_a_path_is_its_text_and_none_is_left_out_but_another_setting_is_another_model(folder):
    one = shared_compressor(folder, **LOADING)
    assert shared_compressor(str(folder), **LOADING, attn_implementation=None) is one
    assert shared_compressor(folder, **LOADING, attn_implementation="eager") is not one


def test_a_load_that_failed_is_tried_again(folder, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(Compressor, "from_pretrained", lambda *_, **__: pytest.fail("disk", pytrace=False))
        with pytest.raises(pytest.fail.Exception):
            shared_compressor(folder, **LOADING)
    assert shared_compressor(folder, **LOADING).fingerprint


def test_unloading_lets_go_of_models_that_nobody_holds(folder):
    checkpoint, generator = shared_checkpoint(folder), shared_generator(shared_checkpoint(folder), **LOADING)
    assert shared_checkpoint(folder) is checkpoint
    unload_shared()
    assert shared_checkpoint(folder) is not checkpoint
    assert shared_generator(checkpoint, **LOADING) is not generator


def test_a_process_that_reads_memories_loads_no_compressor(folder, monkeypatch):
    compressor = Compressor.from_pretrained(folder, **LOADING)
    [memory] = compressor.compress(["The night tram connects the hospital with the port."])
    monkeypatch.setattr(Compressor, "__init__", lambda *_, **__: pytest.fail("loaded a compressor"))
    checkpoint = shared_checkpoint(folder)
    assert checkpoint.fingerprint == compressor.fingerprint == memory.fingerprint
    generator = shared_generator(checkpoint, **LOADING)
    assert generator.generate(memory.handle, [memory], max_new_tokens=2)[0].memory_tokens == memory.memory_tokens


def test_a_generator_that_has_moved_reads_the_same_memories_and_another_model_is_refused(
    folder, base, tiny_tokenizer, tmp_path
):
    checkpoint = shared_checkpoint(folder)
    moved, other = tmp_path / "moved", tmp_path / "other"
    moved.symlink_to(base)
    assert Generator.from_checkpoint(checkpoint, moved, **LOADING).model_id == checkpoint.generator.id
    make_tiny_model(tiny_tokenizer, layers=1).save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    with pytest.raises(ValueError, match="generator must be 'tiny@.*got 'other@"):
        Generator.from_checkpoint(checkpoint, other, **LOADING)


def test_there_is_one_store_a_folder_and_the_cache_folder_is_the_default(tmp_path, monkeypatch):
    assert shared_store(tmp_path) is shared_store(str(tmp_path))
    assert shared_store(tmp_path / "other") is not shared_store(tmp_path)
    monkeypatch.setenv("PIC_RAG_CACHE", str(tmp_path / "cache"))
    assert shared_store().path == tmp_path / "cache" / "memories.sqlite"
