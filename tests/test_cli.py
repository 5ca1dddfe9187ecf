"""The command line: results on standard output, everything else on standard error, exit codes for scripts."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from pic_rag.cli import ask, evaluate, main
from pic_rag.compression.compressor import Compressor
from pic_rag.config import PicConfig
from pic_rag.rag import Mode, PicRag
from pic_rag.store import STORE_FILE, MemoryCache, ShardStore, SQLiteStore
from pic_rag.training.config import CONFIGS, Stage, TrainConfig, find_config

TEXTS = {
    "frogs.md": "Glass frogs hide their red blood in the liver while they sleep.",
    "trams.md": "The night tram connects the hospital with the port.",
    "bread.md": "The starter is fed every morning with flour and water.",
}
QUESTION = "Where do frogs hide blood?"
COMMANDS = (
    "fetch", "demo", "ask", "compress", "inspect", "train", "average", "eval", "bench", "report", "study", "serve",
)  # fmt: skip
HEAVY = ("torch", "transformers", "numpy", "faiss", "sentence_transformers", "matplotlib")


@pytest.fixture(scope="module")
def folder(tiny_model, tiny_tokenizer, tmp_path_factory) -> Path:
    """A folder with a tiny generator, an untrained compressor for it, and a tiny embedder."""
    root = tmp_path_factory.mktemp("models")
    tiny_model.save_pretrained(root / "tiny")
    tiny_tokenizer.save_pretrained(root / "tiny")
    config = PicConfig(ratios=(4, 8), segment_tokens=64, encoder_layers=2, lora_rank=4)
    made = Compressor.from_base(root / "tiny", config=config, device="cpu", dtype="float32")
    made.save_pretrained(root / "compressor")
    words = sorted({word.strip(".").lower() for text in TEXTS.values() for word in text.split()} - {"the", "with"})
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(["[UNK]", *words])}, "[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = torch.randn(len(words) + 1, 64, generator=torch.Generator().manual_seed(0))
    weights[0] *= 0.01
    module = StaticEmbedding(tokenizer, embedding_weights=weights.numpy())
    SentenceTransformer(modules=[module], device="cpu").save(str(root / "embedder"))
    return root


@pytest.fixture(autouse=True)
def _own_cache(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PIC_RAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIC_RAG_RETRIEVER", str(folder / "embedder"))
    monkeypatch.setenv("PIC_RAG_GENERATOR", str(folder / "tiny"))


@pytest.fixture
def docs(tmp_path) -> Path:
    where = tmp_path / "docs"
    where.mkdir()
    for name, text in TEXTS.items():
        (where / name).write_text(text)
    return where


@pytest.fixture
def options(folder) -> list[str]:
    return ["--compressor", str(folder / "compressor"), "--device", "cpu", "--dtype", "float32"]


def run_alone(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m pic_rag` in a process of its own."""
    return subprocess.run([sys.executable, "-m", "pic_rag", *arguments], capture_output=True, text=True, check=False)


def test_help_answers_without_a_heavy_import() -> None:
    program = (
        "import sys\nfrom pic_rag.cli import main\n"
        f"for words in [[], *[[name] for name in {COMMANDS}]]:\n"
        "    try:\n        main([*words, '--help'])\n"
        "    except SystemExit as done:\n        assert done.code == 0\n"
        f"sys.exit(','.join(name for name in {HEAVY} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
    assert all(f"pic-rag {name}" in done.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sing"],
        ["ask"],
        ["ask", QUESTION],
        ["ask", QUESTION, "--docs", "a.md", "--mode", "song"],
        ["ask", QUESTION, "--docs", "a.md", "--ratio", "0"],
        ["ask", QUESTION, "--docs", "a.md", "--ratio", "4+"],
        ["ask", QUESTION, "--docs", "a.md", "--min-fidelity", "1.5"],
        ["compress", "--docs", "a.md"],
        ["ask", " ", "--docs", "a.md"],
        ["train", "run.yaml", "--minutes", "-1"],
        ["train", "run.yaml", "--minutes", "nan"],
        ["eval", "--data", "q.jsonl", "--json", "o.json", "--ratios", "4,many"],
        ["eval", "--data", "q.jsonl", "--json", "o.json", "--ratios", "4,2+16", "--floors", "0.5"],
        ["eval", "--data", "q.jsonl", "--json", "o.json", "--floors", ""],
        ["eval", "--data", "q.jsonl", "--json", "o.json", "--floors", "0.5", "--systems", "pic"],
        ["eval", "--data", "q.jsonl", "--json", "o.json", "--floors", "0.5", "--task", "gsm8k"],
        ["eval", "--data", "q.jsonl", "--json", "o.json", "--floors", "0.5", "--prompt", "{context} {question}"],
        ["eval", "--data", "q.jsonl", "--json", "o.json", "--retrieve", "2", "--examples", "e.jsonl"],
        ["eval", "--data", "q.jsonl", "--json", "./q.jsonl"],
        ["eval", "--data", "q.jsonl", "--json", "o.json", "--predictions", "o.json"],
        ["eval", "--data", "q.jsonl", "--json", "."],
        ["eval", "--data", "q.jsonl", "--json", f"{__file__}/o.json"],
        ["bench", "--out", __file__],
        ["compress", "--docs", "a.md", "--out", ""],
        ["train", "smoke", "--out", ""],
        ["ask", QUESTION, "--docs", "a.md", "--index", ""],
        ["bench", "--patience-s", "inf"],
        ["report", "--update", "a.md", "--columns", "f1"],
        ["ask", QUESTION, "--docs", "a.md", "--mode", "text", "--min-fidelity", "0.5"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    assert "usage: pic-rag" in captured.err
    assert "invalid _" not in captured.err  # a rule, not the name of a function


def test_an_error_of_the_run_is_exit_code_1_and_one_line() -> None:
    done = run_alone("eval", "--data", "/nowhere/q.jsonl", "--json", "o.json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "pic-rag: error: /nowhere/q.jsonl: No such file or directory.\n"


def test_debug_adds_the_traceback() -> None:
    done = run_alone("eval", "--data", "/nowhere/q.jsonl", "--json", "o.json", "--debug")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")


def test_ctrl_c_is_exit_code_130(tmp_path) -> None:

    os.mkfifo(tmp_path / "questions.jsonl")
    command = [sys.executable, "-m", "pic_rag", "eval", "--data", str(tmp_path / "questions.jsonl"), "--json", "o.json"]

    def listen() -> None:  # a shell's background jobs ignore Ctrl-C, and so would this suite's children there
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen) as process:
        with (tmp_path / "questions.jsonl").open("w"):  # opens once the command reads, and leaves it waiting
            process.send_signal(signal.SIGINT)
            _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130
    assert complaint == "pic-rag: interrupted\n"


@pytest.mark.slow
def test_a_reader_that_leaves_early_causes_no_traceback(docs, options) -> None:
    command = [
        sys.executable,
        "-m",
        "pic_rag",
        "compress",
        "--docs",
        str(docs),
        "--out",
        str(docs / "s.sqlite"),
        *options,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        complaint = process.stderr.read()
    assert process.returncode == 1
    assert complaint == ""


def test_ask_prints_the_answer_and_notes_the_cost(docs, options, capsys) -> None:
    assert main(["ask", QUESTION, "--docs", str(docs), "--max-new-tokens", "8", "--top-k", "1", *options]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.strip()) > 0
    cost = re.fullmatch(
        r"pic-rag: from .*frogs\.md; the generator read (\d+) tokens in place of (\d+); [\d.]+ s\n", captured.err
    )
    assert cost is not None
    assert int(cost[2]) - int(cost[1]) == 63 - 16  # one token a byte, 4 to a memory token


def test_quiet_leaves_standard_error_empty(docs, options, capsys) -> None:
    assert main(["ask", QUESTION, "--docs", str(docs), "--quiet", *options]) == 0
    assert capsys.readouterr().err == ""


def test_on_a_terminal_the_same_answer_comes_piece_by_piece(docs, options, capsys, monkeypatch) -> None:
    command = ["ask", QUESTION, "--docs", str(docs), "--max-new-tokens", "8", *options]
    main(command)
    main(command)  # from cached memories, like the next one
    at_once = capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    main(command)
    assert capsys.readouterr().out.strip() == at_once


def test_train_explains_its_fields_and_needs_no_configuration_for_it(capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--fields"])
    explained = capsys.readouterr().out
    assert re.findall(r"^  (\w+): .+", explained, re.MULTILINE) == [
        field.name for config in (TrainConfig, Stage, PicConfig) for field in fields(config)
    ]


def test_ask_json_is_one_object_with_exactly_these_keys(docs, options, capsys) -> None:
    assert main(["ask", QUESTION, "--docs", str(docs), "--json", "--top-k", "2", "--ratio", "8", *options]) == 0
    captured = capsys.readouterr()
    values = json.loads(captured.out)
    assert captured.err == ""
    assert set(values) == {
        "answer", "documents", "prompt_tokens", "text_prompt_tokens", "latency_ms", "model", "compressor",
    }  # fmt: skip
    assert set(values["latency_ms"]) == {"retrieve", "compress", "first_token", "total"}
    keys = {"id", "score", "text_tokens", "memory_tokens", "ratio", "fidelity", "handle", "cached", "source"}
    assert [set(document) for document in values["documents"]] == [keys, keys]
    assert values["documents"][0]["memory_tokens"] == 8
    assert values["prompt_tokens"] < values["text_prompt_tokens"]


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_an_answer_is_not_lost_where_the_output_cannot_write_its_letters(docs, options, monkeypatch, form) -> None:
    def ask(encoding: str) -> str:
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
        assert main(["ask", QUESTION, "--docs", str(docs), "--max-new-tokens", "40", *form, *options]) == 0
        return written.getvalue().decode(encoding)

    whole, plain = ask("utf-8"), ask("ascii")
    assert not whole.isascii()
    if form:
        assert json.loads(plain)["answer"] == json.loads(whole)["answer"]
    else:
        assert plain == whole.encode("ascii", "backslashreplace").decode()


def test_an_index_is_made_used_and_extended(docs, options, tmp_path, capsys) -> None:
    def documents(*arguments: str) -> list[dict]:
        assert main(["ask", QUESTION, "--json", "--top-k", "9", "--index", str(tmp_path / "index"), *arguments]) == 0
        return json.loads(capsys.readouterr().out)["documents"]

    made = documents("--docs", str(docs / "frogs.md"), *options)
    used = documents("--device", "cpu", "--dtype", "float32")
    extended = documents("--docs", str(docs), "--device", "cpu", "--dtype", "float32")
    assert [document["cached"] for document in made] == [False]
    assert used == [{**made[0], "cached": True}]
    assert [document["cached"] for document in extended] == [True, False, False]
    assert all(document["cached"] for document in documents("--device", "cpu", "--dtype", "float32"))


@pytest.mark.slow
def test_an_index_keeps_the_compressor_that_it_was_brought_up_to_date_with(folder, docs, options, tmp_path) -> None:
    index = tmp_path / "index"
    command = ["ask", QUESTION, "--docs", str(docs), "--index", str(index), "--max-new-tokens", "1", *options]
    moved = shutil.copytree(folder / "compressor", tmp_path / "moved")
    for compressor in (folder / "compressor", moved):
        command[command.index("--compressor") + 1] = str(compressor)
        assert main(command) == 0
        assert json.loads((index / "pic_rag.json").read_text())["compressor"] == str(compressor)


@pytest.mark.slow  # three processes load the models
def test_two_processes_that_extend_one_index_lose_nothing(docs, options, tmp_path) -> None:
    index = str(tmp_path / "index")
    command = [sys.executable, "-m", "pic_rag", "ask", QUESTION, "--index", index, "--json", "--max-new-tokens", "1"]
    running = [
        subprocess.Popen([*command, "--docs", str(docs / name), *options], stdout=subprocess.DEVNULL) for name in TEXTS
    ]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert len((tmp_path / "index").glob("passages.*.jsonl").__next__().read_text().splitlines()) == 3


@pytest.mark.slow
def test_a_closed_standard_output_is_no_error(docs, options) -> None:
    words = [sys.executable, "-m", "pic_rag", "ask", QUESTION, "--docs", str(docs), *options]
    done = subprocess.run(["sh", "-c", f"{shlex.join(words)} >&-"], capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)


def test_an_index_forgets_what_a_changed_and_a_removed_file_said(docs, options, tmp_path, capsys) -> None:
    index = str(tmp_path / "index")

    def cached_by_id(*arguments) -> dict[str, bool]:
        main(["ask", QUESTION, *arguments, "--index", index, "--top-k", "9", "--json", *options])
        return {found["id"]: found["cached"] for found in json.loads(capsys.readouterr().out)["documents"]}

    before = cached_by_id("--docs", str(docs))
    (docs / "frogs.md").write_text("Frogs hide in the port.")
    (docs / "trams.md").unlink()
    after = cached_by_id("--docs", str(docs))
    assert (len(before), len(after)) == (3, 2)
    assert after == {found: found in before for found in after}
    assert cached_by_id() == dict.fromkeys(after, True)


def test_a_file_that_cannot_be_read_is_named_and_stops_nothing(docs, options, capsys) -> None:
    (docs / "broken.pdf").write_bytes(b"not a PDF")
    assert main(["ask", QUESTION, "--docs", str(docs), "/nowhere.md", "--quiet", *options]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    named = re.findall(r"pic-rag: warning: Skipped: Document '(\S+)'", captured.err)
    assert [Path(name).name for name in named] == ["broken.pdf", "nowhere.md"]


def test_no_readable_document_is_an_error(options, capsys) -> None:
    assert main(["ask", QUESTION, "--docs", "/nowhere.md", *options]) == 1
    assert "--docs must name at least one document that can be read, got none." in capsys.readouterr().err


def test_the_modes_of_the_command_line_are_those_of_the_library(docs, options, capsys) -> None:
    assert get_args(Mode) == ask.MODES
    tokens = {}
    for mode in ask.MODES:
        assert main(["ask", QUESTION, "--docs", str(docs), "--mode", mode, "--json", *options]) == 0
        tokens[mode] = json.loads(capsys.readouterr().out)["prompt_tokens"]
    assert tokens["none"] < tokens["pic"] == tokens["truncate"] < tokens["text"]


def test_ratios_by_rank(docs, options, capsys) -> None:
    assert main(["ask", QUESTION, "--docs", str(docs), "--json", "--top-k", "2", "--ratio", "4+8", *options]) == 0
    assert [document["ratio"] for document in json.loads(capsys.readouterr().out)["documents"]] == [4, 8]


def test_a_ratio_the_compressor_does_not_serve_is_an_error(docs, options, capsys) -> None:
    assert main(["ask", QUESTION, "--docs", str(docs), "--ratio", "5", *options]) == 1
    assert capsys.readouterr().err.endswith(
        "error: ratio must be one of 4, 8 (the ratios this compressor serves), got 5.\n"
    )


@pytest.mark.parametrize(("out", "store_type"), [("store.sqlite", SQLiteStore), ("shards", ShardStore)])
def test_compress_fills_a_store_that_the_library_reads(
    docs, options, folder, tmp_path, capsys, out, store_type
) -> None:
    store = tmp_path / out
    assert main(["compress", "--docs", str(docs), "--out", str(store), "--namespace", "me", *options]) == 0
    made = Compressor.from_pretrained(folder / "compressor", device="cpu", dtype="float32")
    cache = MemoryCache(store_type(store), made.fingerprint, namespace="me")
    memories, cached = cache.get_or_compress(list(TEXTS.values()), made)
    assert cached == [True, True, True]
    text_tokens = sum(len(text) for text in TEXTS.values())
    memory_tokens = sum(memory.memory_tokens for memory in memories)
    size_bytes = store.stat().st_size if store.is_file() else sum(file.stat().st_size for file in store.iterdir())
    stored_bytes = sum(map(len, cache.store.mget(list(cache.store.yield_keys()))))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "documents 3 compressed, 0 there already, 0 repeated, 0 skipped",
        f"tokens {text_tokens} of text -> {memory_tokens} of memory (3.9x)",
        f"at rest {stored_bytes / 3:,.0f} bytes a memory in bf16",
        f"on disk {text_tokens} bytes of text -> {size_bytes:,} bytes in {store}",
    ]


def test_compress_goes_on_where_it_stopped(docs, options, tmp_path, capsys) -> None:
    store = ["--out", str(tmp_path / "shards"), *options]
    main(["compress", "--docs", str(docs / "frogs.md"), *store])
    main(["compress", "--docs", str(docs), *store])
    shards = sorted((tmp_path / "shards").iterdir())
    main(["compress", "--docs", str(docs), *store])
    counts = re.findall(r"(\d) compressed, (\d) there already", capsys.readouterr().out)
    assert counts == [("1", "0"), ("2", "1"), ("0", "3")]
    assert sorted((tmp_path / "shards").iterdir()) == shards


def test_ask_compresses_nothing_after_compress_split(docs, options, folder, tmp_path, capsys) -> None:
    """In an index folder, and in a folder of shards that the library is given as its store."""
    (docs / "long.md").write_text(
        "\n\n".join(f"Glass frogs, part {number}. " + "They sleep. " * 40 for number in "1234")
    )
    index = tmp_path / "index"
    for out in (index / STORE_FILE, tmp_path / "shards"):
        assert main(["compress", "--docs", str(docs), "--split", "--out", str(out), *options]) == 0
    assert "passages   7 compressed" in capsys.readouterr().out
    assert main(["ask", QUESTION, "--docs", str(docs), "--index", str(index), "--json", "--top-k", "9", *options]) == 0
    assert [one["cached"] for one in json.loads(capsys.readouterr().out)["documents"]] == [True] * 7
    rag = PicRag.from_pretrained(
        folder / "compressor", store=ShardStore(tmp_path / "shards"), device="cpu", dtype="float32"
    )
    rag.add_files([docs])
    assert [document.cached for document in rag.ask(QUESTION, top_k=9).documents] == [True] * 7


def test_compress_keeps_less_at_a_lower_precision(docs, options, tmp_path) -> None:
    size_bytes = []
    for at_rest in ("bf16", "int8", "int4"):
        out = tmp_path / at_rest
        main(["compress", "--docs", str(docs), "--out", str(out), "--at-rest", at_rest, *options])
        size_bytes.append(sum(file.stat().st_size for file in out.iterdir()))
    assert size_bytes[0] > size_bytes[1] > size_bytes[2]


def test_a_corrupt_memory_is_compressed_again(docs, options, tmp_path, capsys) -> None:
    command = ["compress", "--docs", str(docs), "--out", str(tmp_path / "s.sqlite"), *options]
    main(command)
    store = SQLiteStore(tmp_path / "s.sqlite")
    store.mset([(next(store.yield_keys()), b"garbage")])
    store.close()
    capsys.readouterr()
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "1 compressed, 2 there already" in captured.out
    assert "warning: Compressing" in captured.err


def test_compress_into_a_store_that_cannot_be_written_fails(docs, options, capsys) -> None:
    assert main(["compress", "--docs", str(docs), "--out", str(docs / "frogs.md" / "s.sqlite"), *options]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"pic-rag: error: Store at \S+ must be readable and writable, got: .*\n", captured.err)


@pytest.mark.parametrize("from_file", [True, False])
def test_inspect_prints_a_mask_and_draws_two_pictures(docs, options, tmp_path, capsys, from_file) -> None:
    text = str(docs / "frogs.md") if from_file else TEXTS["frogs.md"]
    assert main(["inspect", text, "--out-dir", str(tmp_path / "out"), *options]) == 0
    for name in ("mask", "attention"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "text sees its segment, memory tokens see their chunk and earlier memory tokens, ratio 4"
    assert lines[2] == " G  x............... ................ .... ...."
    assert lines[-2:] == [f"{name}: {tmp_path / 'out' / name}.png" for name in ("mask", "attention")]


def test_inspect_shows_the_preset_asked_for(options, tmp_path, capsys) -> None:
    command = ["inspect", TEXTS["frogs.md"], "--out-dir", str(tmp_path), "--preset", "local", "--per-layer", *options]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("text sees its chunk, memory tokens see their chunk, ratio 4\n")


def test_train_runs_a_configuration_and_names_the_compressor(folder, tmp_path, docs, capsys) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(TEXTS.values()) * 40)
    run = {
        "out": str(tmp_path / "elsewhere"),
        "base_model": str(folder / "tiny"),
        "texts": [str(tmp_path / "text.txt")],
        "stages": [{"steps": 2, "tasks": {"reconstruct": 1.0}}],
        "pic": {"ratios": [4, 8], "segment_tokens": 64, "encoder_layers": 2, "lora_rank": 4},
        "text_tokens": [16, 48],
        "examples_per_step": 2,
        "precision": "fp32",
        "row_places": 128,
        "workers": 0,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    assert main(["train", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    made = capsys.readouterr().out.strip()
    assert made == str(tmp_path / "run" / "compressor")
    assert not (tmp_path / "elsewhere").exists()
    assert main(["compress", "--docs", str(docs), "--out", str(tmp_path / "s.sqlite"), "--compressor", made]) == 0


def test_a_shipped_configuration_goes_by_its_name_unless_a_file_has_it(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("smoke") == CONFIGS / "smoke.yaml"
    assert find_config("smoke").is_file()
    Path("smoke").write_text("out: mine")
    assert find_config("smoke") == Path("smoke")


def test_train_names_what_is_wrong_with_a_configuration(tmp_path, capsys) -> None:
    (tmp_path / "run.yaml").write_text("out: x\nstages: []\nstep: 3\n")
    assert main(["train", str(tmp_path / "run.yaml")]) == 1
    assert "error: Unknown training field 'step'." in capsys.readouterr().err


def test_eval_scores_systems_and_writes_the_report(options, tmp_path, capsys) -> None:
    contexts = [{"title": name, "text": text, "is_gold": name == "frogs.md"} for name, text in TEXTS.items()]
    line = {"question": QUESTION, "answers": ["the liver"], "contexts": contexts}
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"id": str(n), **line}) + "\n" for n in range(3)))
    command = ["eval", "--data", str(tmp_path / "q.jsonl"), "--json", str(tmp_path / "report.json"), "--limit", "2"]
    assert main([*command, "--systems", "pic,text,none", "--ratios", "4,8", *options]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(row["system"], row["ratio"], row["n"]) for row in report["rows"]] == [
        ("pic", 4, 2), ("pic", 8, 2), ("text", None, 2), ("none", None, 2),
    ]  # fmt: skip
    assert set(report["rows"][0]) == {
        "system", "ratio", "n", "f1", "em", "contains_answer", "agreement", "reader_agreement",
        "prompt_tokens_mean", "text_tokens_mean", "too_long", "document_bytes_mean", "seconds",
    }  # fmt: skip
    assert {"config", "versions"} < set(report)
    table = capsys.readouterr().out.splitlines()
    assert [row[: row.index(" |")].rstrip() for row in table] == [
        "| system",
        "| ------",
        "| pic",
        "| pic",
        "| text",
        "| none",
    ]


def test_eval_says_in_the_report_which_questions_were_asked_with_which_documents(options, tmp_path, capsys) -> None:
    contexts = [{"title": name, "text": text, "is_gold": name == "frogs.md"} for name, text in TEXTS.items()]
    line = {"question": QUESTION, "answers": ["the liver"], "contexts": contexts, "rationale": "In the liver. #### 1"}
    unanswerable = {"question": "Why?", "answers": [], "contexts": [{"text": "Nobody knows."}]}
    lines = [*({"id": str(n), **line} for n in range(6)), unanswerable]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def evaluated(*chosen: str) -> tuple[dict, dict]:
        command = ["eval", "--data", str(tmp_path / "q.jsonl"), "--json", str(tmp_path / "r.json"), "--systems", "text"]
        assert main([*command, "--ratios", "4", "--max-new-tokens", "2", *chosen, *options]) == 0
        report = json.loads((tmp_path / "r.json").read_text())
        return report["config"], report["rows"][0]

    config, whole = evaluated("--every", "2", "--offset", "1")
    assert whole["n"] == 3
    assert config["data"] == {
        "file": "q.jsonl", "every": 2, "offset": 1, "limit": None, "gold_only": False, "retrieve": None,
    }  # fmt: skip
    config, gold = evaluated("--gold-only", "--limit", "2")
    assert gold["n"] == 2
    assert gold["prompt_tokens_mean"] < whole["prompt_tokens_mean"]
    capsys.readouterr()
    config, found = evaluated("--retrieve", "1")
    assert (config["data"]["passages"], config["data"]["recall"]) == (4, 1.0)
    assert capsys.readouterr().err.count("1 questions without an answer were skipped") == 1
    assert found["prompt_tokens_mean"] == gold["prompt_tokens_mean"]
    config, solved = evaluated(
        "--task", "gsm8k", "--examples", str(tmp_path / "q.jsonl"), "--shots", "2", "--limit", "1"
    )
    assert (config["task"], config["data"]["examples"], config["data"]["shots"]) == ("gsm8k", "q.jsonl", 2)
    assert solved["text_tokens_mean"] == 2 * len(f"Question: {QUESTION}\nAnswer: In the liver. #### 1")


@pytest.mark.parametrize("chosen", [["--systems", "text"], ["--floors", "0"]], ids=["rows", "floors"])
def test_eval_saves_its_report_before_it_prints(options, tmp_path, monkeypatch, chosen) -> None:
    def fail(_: object) -> None:
        raise OSError("The output is full.")

    line = {"question": QUESTION, "answers": ["the liver"], "contexts": [{"text": TEXTS["frogs.md"]}]}
    (tmp_path / "q.jsonl").write_text(json.dumps(line))
    monkeypatch.setattr(evaluate, "report_table", fail)
    command = ["eval", "--data", str(tmp_path / "q.jsonl"), "--json", str(tmp_path / "report.json")]
    assert main([*command, *chosen, "--ratios", "4", "--max-new-tokens", "2", *options]) == 1
    assert json.loads((tmp_path / "report.json").read_text())["rows"]


def test_eval_refuses_a_system_it_does_not_know(options, tmp_path, capsys) -> None:
    line = {"question": QUESTION, "answers": ["the liver"], "contexts": [{"text": TEXTS["frogs.md"]}]}
    (tmp_path / "q.jsonl").write_text(json.dumps(line))
    command = ["eval", "--data", str(tmp_path / "q.jsonl"), "--json", str(tmp_path / "report.json")]
    assert main([*command, "--systems", "magic", *options]) == 1
    assert "got 'magic'" in capsys.readouterr().err


def test_demo_shows_both_answers_both_costs_and_a_summary(folder, options, capsys) -> None:
    assert main(["demo", "--limit", "2", "--top-k", "1", *options]) == 0
    output = capsys.readouterr().out
    memories = [int(number) for number in re.findall(r"^   memories +(\d+) tokens", output, re.MULTILINE)]
    text = [int(number) for number in re.findall(r"^   full text +(\d+) tokens", output, re.MULTILINE)]
    assert len(memories) == len(text) == 2
    assert max(memories) < min(text)
    assert "1. Who designed the lighthouse at Skerrin Point?  (expected: Adelaide Marsh)" in output
    summary = output.splitlines()[-1]
    assert summary.startswith(f"2 questions: {sum(memories) / 2:.0f} tokens a question from memories, ")


def test_a_checkpoint_that_calls_itself_weak_is_called_weak(folder, docs, tmp_path, capsys) -> None:
    weak = tmp_path / "weak"
    shutil.copytree(folder / "compressor", weak)
    settings = json.loads((weak / "config.json").read_text())
    (weak / "config.json").write_text(json.dumps({**settings, "quality": "A smoke test; its answers are noise."}))
    options = ["--compressor", str(weak), "--device", "cpu", "--dtype", "float32"]
    assert main(["demo", "--limit", "1", "--top-k", "1", *options]) == 0
    assert "\nNote: A smoke test; its answers are noise.\n" in capsys.readouterr().out
    assert main(["ask", QUESTION, "--docs", str(docs), *options]) == 0
    assert "pic-rag: note: A smoke test; its answers are noise.\n" in capsys.readouterr().err


def test_fetch_prints_where_the_models_are(folder, capsys) -> None:
    assert main(["fetch"]) == 0
    assert capsys.readouterr().out == f"generator: {folder / 'tiny'}\nretriever: {folder / 'embedder'}\n"


def test_the_command_line_leaves_logging_as_it_was(docs, options) -> None:
    logger = logging.getLogger("pic_rag")
    before = (logger.level, list(logger.handlers))
    main(["ask", QUESTION, "--docs", str(docs), "/nowhere.md", "--quiet", *options])
    assert (logger.level, logger.handlers) == before


def test_ask_with_a_floor_reads_what_is_faithful_enough(docs, tmp_path, options, capsys) -> None:
    ask = ["ask", QUESTION, "--docs", str(docs), "--index", str(tmp_path / "index"), "--json", "--max-new-tokens", "4"]
    for floor, ratio in (("0", 8), ("1", 1)):
        assert main([*ask, "--min-fidelity", floor, *options]) == 0
        documents = json.loads(capsys.readouterr().out)["documents"]
        assert [document["ratio"] for document in documents] == [ratio] * len(TEXTS)
        assert all(document["fidelity"] >= float(floor) for document in documents)
        assert [document["memory_tokens"] for document in documents] == [
            -(-document["text_tokens"] // ratio) for document in documents
        ]


def test_eval_without_a_question_left_says_so_before_anything_is_loaded(tmp_path, capsys) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text(json.dumps({"question": QUESTION, "answers": ["x"], "contexts": []}) + "\n")
    assert main(["eval", "--data", str(data), "--json", "o.json", "--offset", "1", "--compressor", "/nowhere"]) == 1
    assert "must hold a question with an answer after the first 1, got none" in capsys.readouterr().err


def test_inspect_takes_no_folder(tmp_path, capsys) -> None:
    assert main(["inspect", str(tmp_path)]) == 1
    assert "TEXT must be a text or a file, got the folder" in capsys.readouterr().err


def test_eval_with_floors_compares_mixed_ratios_with_single_ones(tmp_path, options, capsys) -> None:
    lines = [
        {"id": name, "question": QUESTION, "answers": ["x"], "contexts": [{"title": "", "text": text, "is_gold": True}]}
        for name, text in TEXTS.items()
    ]
    data, out = tmp_path / "questions.jsonl", tmp_path / "fidelity.json"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    floors = ["--ratios", "4,8", "--floors", "0,1", "--max-new-tokens", "4"]
    assert main(["eval", "--data", str(data), "--json", str(out), *floors, *options]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("| ratio | floor |   F1 |")
    assert printed.endswith("AUROC over all ratios: -\n")  # no answer is right
    rows = json.loads(out.read_text())["rows"]
    assert [(row["ratio"], row["min_fidelity"]) for row in rows] == [
        (8, None),
        (4, None),
        (1, None),
        (None, 0.0),
        (None, 1.0),
    ]
