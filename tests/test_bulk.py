"""Whole corpora: each text once, whatever is killed, refused or in the way, and the same on both engines."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pic_rag.bulk.corpus import GROUP_CHARACTERS, GROUP_ITEMS, Corpus
from pic_rag.bulk.on_ray import plan_workers
from pic_rag.bulk.run import compress_corpus
from pic_rag.bulk.worker import Job, Worker
from pic_rag.cli import main
from pic_rag.compression.compressor import Compressor
from pic_rag.config import PicConfig
from pic_rag.memory import Memory
from pic_rag.retrieval.documents import Document
from pic_rag.retrieval.passages import PassageSplitter
from pic_rag.store import MemoryCache, ShardStore, SQLiteStore, StoreError

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra 'ray' is not installed")


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tiny_tokenizer, tmp_path_factory) -> Path:
    """A tiny compressor on disk, its base model beside it."""
    root = tmp_path_factory.mktemp("models")
    tiny_model.save_pretrained(root / "tiny")
    tiny_tokenizer.save_pretrained(root / "tiny")
    config = PicConfig(ratios=(4, 8), segment_tokens=64, encoder_layers=2, lora_rank=4)
    Compressor.from_base(root / "tiny", config=config, device="cpu", dtype="float32").save_pretrained(root / "made")
    return root / "made"


@pytest.fixture(scope="module")
def compressor(checkpoint: Path) -> Compressor:
    return Compressor.from_pretrained(checkpoint, device="cpu", dtype="float32")


def write_documents(folder: Path, count: int) -> Path:
    """Distinct small documents, a hundred a folder."""
    for number in range(count):
        path = folder / f"{number // 100:03d}" / f"{number:05d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"Document {number}. " + "It says a little. " * (number % 3))
    return folder


def texts_of(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.rglob("*.txt"))]


def make_job(store: ShardStore | SQLiteStore, checkpoint: Path, **options) -> Job:
    return Job(store, compressor=str(checkpoint), device="cpu", dtype="float32", **options)


def command(docs: Path, out: Path, checkpoint: Path, *more: str) -> list[str]:
    options = ["--compressor", str(checkpoint), "--device", "cpu", "--dtype", "float32"]
    return ["compress", "--docs", str(docs), "--out", str(out), *options, *more]


def start(*arguments: str) -> subprocess.Popen[str]:
    """`python -m pic_rag` in another process."""
    return subprocess.Popen(
        [sys.executable, "-m", "pic_rag", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def kill_after_shards(process: subprocess.Popen[str], folder: Path, shards: int) -> None:
    """SIGKILL, once so many shards are there."""
    deadline = time.monotonic() + 300
    while len(list(folder.glob("shard-*"))) < shards:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.communicate()


def shard_keys(folder: Path) -> list[str]:
    """The keys of all shards, each as often as it was written."""
    keys: list[str] = []
    for path in folder.glob("shard-*.safetensors"):
        with safe_open(path, framework="np") as shard:
            keys += shard.keys()
    return keys


# What is to be done


def test_a_corpus_gives_every_text_once_and_accounts_for_every_file(tmp_path: Path) -> None:
    for name, text in {"a.md": "One.", "b.md": "Two.", "c.md": "One.", "d.md": ""}.items():
        (tmp_path / name).write_text(text)
    items = list(Corpus([tmp_path, "/nowhere.txt"]).items())
    assert [item.status for item in items] == ["pending", "pending", "repeated", "refused", "refused"]
    assert [item.text for item in items if item.status == "pending"] == ["One.", "Two."]
    assert "must hold text" in items[3].message
    assert "must exist" in items[4].message


def test_a_corpus_is_read_while_it_is_worked_on(tmp_path: Path) -> None:
    corpus = Corpus([write_documents(tmp_path, 3 * GROUP_ITEMS)])
    groups = corpus.groups()
    next(groups)
    for path in tmp_path.rglob("*.txt"):
        path.unlink()
    later = Counter(item.status for group in groups for item in group)
    assert later == {"pending": 1, "refused": 2 * GROUP_ITEMS - 1}  # one was read ahead


def test_groups_are_bounded_in_texts_and_in_characters(tmp_path: Path) -> None:
    write_documents(tmp_path, GROUP_ITEMS + 5)
    for number in range(3):
        (tmp_path / f"long{number}.txt").write_text(str(number) * (GROUP_CHARACTERS // 2 + 1))
    (tmp_path / "longest.txt").write_text("x" * 3 * GROUP_CHARACTERS)
    groups = list(Corpus([tmp_path]).groups())
    assert [len(group) for group in groups] == [GROUP_ITEMS, 5 + 1, 1, 1, 1]


def test_a_split_corpus_gives_the_passages_of_the_retriever(tmp_path: Path) -> None:
    text = "\n\n".join(f"Paragraph {number}. " + "More words follow here. " * 20 for number in range(5))
    (tmp_path / "long.md").write_text(text)
    passages = PassageSplitter().split(Document.from_text(text, source="any"))
    assert len(passages) > 2
    assert [item.text for item in Corpus([tmp_path], split=True).items()] == [passage.text for passage in passages]


# The doing of it


def test_a_text_the_compressor_refuses_costs_itself_only(checkpoint: Path, tmp_path: Path) -> None:
    """A lone surrogate cannot be compressed; its neighbours are, and are written."""
    store = ShardStore(tmp_path / "out")
    (tmp_path / "a.txt").write_text("First.")
    good = list(Corpus([write_documents(tmp_path / "docs", 8)]).items())
    bad = type(good[0])("bad.txt", "broken \ud800 text")
    done = Worker(make_job(store, checkpoint))([*good[:5], bad, *good[5:]])
    assert [item.status for item in done] == ["compressed"] * 5 + ["refused"] + ["compressed"] * 3
    assert done[5].message.startswith("Skipped: 'bad.txt': text 0 must be valid Unicode")
    assert len(shard_keys(store.folder)) == 8


def test_a_memory_too_large_for_sqlite_costs_itself_only(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    """It is named, with what to do, and the run goes on; its neighbours in the group are written."""
    monkeypatch.setattr("pic_rag.store.sqlite._limit_bytes", lambda connection: 10_000)
    store = SQLiteStore(tmp_path / "out.sqlite")
    good = list(Corpus([write_documents(tmp_path / "docs", 4)]).items())
    long = type(good[0])("long.txt", "Many more words than fit. " * 100)
    done = Worker(make_job(store, checkpoint))([*good[:3], long, good[3]])
    assert [item.status for item in done] == ["compressed"] * 3 + ["refused", "compressed"]
    assert re.match(
        r"Skipped: 'long\.txt': Value of default/\S+ must be at most .* Split its document", done[3].message
    )
    assert len(list(store.yield_keys())) == 4


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_where_it_stopped(checkpoint: Path, compressor: Compressor, tmp_path) -> None:
    """Every document is compressed exactly once over both runs, and its memory is the one it would have alone."""
    docs, out = write_documents(tmp_path / "docs", 12 * GROUP_ITEMS), tmp_path / "out"
    kill_after_shards(start(*command(docs, out, checkpoint)), out, 2)
    killed = len(shard_keys(out))
    assert GROUP_ITEMS < killed < 12 * GROUP_ITEMS
    resumed = start(*command(docs, out, checkpoint))
    output, complaint = resumed.communicate(timeout=300)
    assert (resumed.returncode, complaint) == (0, "")
    assert f"{12 * GROUP_ITEMS - killed:,} compressed, {killed:,} there already, 0 repeated, 0 skipped" in output
    assert set(Counter(shard_keys(out)).values()) == {1}
    texts = texts_of(docs)
    memories, cached = MemoryCache(ShardStore(out), compressor.fingerprint).get_or_compress(texts, compressor)
    assert all(cached)
    for number in (0, 1, len(texts) - 1):
        [alone] = compressor.compress([texts[number]])
        torch.testing.assert_close(memories[number].embeddings, at_rest(alone).embeddings, rtol=0.01, atol=0.01)


def at_rest(memory: Memory) -> Memory:
    return Memory.from_bytes(memory.to_bytes())


def test_one_bad_file_is_named_and_the_exit_code_says_so(checkpoint: Path, tmp_path: Path, capsys) -> None:
    docs = write_documents(tmp_path / "docs", 20)
    (docs / "000" / "00007.txt").write_bytes(b"\xe9t\xe9")
    (docs / "000" / "00008.txt").write_bytes(b"\xc3(")
    (docs / "000" / "00010.txt").write_text((docs / "000" / "00009.txt").read_text())
    assert main(command(docs, tmp_path / "out", checkpoint)) == 3
    captured = capsys.readouterr()
    assert "17 compressed, 0 there already, 1 repeated, 2 skipped" in captured.out
    assert re.findall(r"warning: Skipped: Document '\S+/(\d+)\.txt' must be UTF-8", captured.err) == ["00007", "00008"]
    assert len(captured.err.splitlines()) == 2
    assert len(shard_keys(tmp_path / "out")) == 17


def test_another_compressor_adds_its_own_memories_beside_the_others(
    checkpoint: Path, compressor: Compressor, tmp_path: Path, capsys
) -> None:
    docs, out = write_documents(tmp_path / "docs", 5), tmp_path / "out"
    other = Compressor.from_base(
        checkpoint.parent / "tiny", config=PicConfig(ratios=(4,), encoder_layers=1, lora_rank=0), dtype="float32"
    )
    other.save_pretrained(tmp_path / "other")
    assert main(command(docs, out, checkpoint)) == main(command(docs, out, tmp_path / "other")) == 0
    assert capsys.readouterr().out.count("5 compressed, 0 there already") == 2
    for one in (compressor, other):
        memories, cached = MemoryCache(ShardStore(out), one.fingerprint).get_or_compress(texts_of(docs), one)
        assert all(cached)
        assert {memory.fingerprint for memory in memories} == {one.fingerprint}


@pytest.mark.parametrize("kind", ["shards", "sqlite"])
def test_a_path_in_the_way_stops_the_run_with_a_next_step(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    """As on a read-only disk, nothing can be made there."""
    (tmp_path / "file").write_bytes(b"")
    store = ShardStore(tmp_path / "file") if kind == "shards" else SQLiteStore(tmp_path / "file" / "m.sqlite")
    with pytest.raises(StoreError, match=r"must be readable and writable, got: .*[Cc]hoose another path"):
        compress_corpus([write_documents(tmp_path / "docs", 3)], make_job(store, checkpoint))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write into a read-only folder")
def test_a_read_only_folder_stops_the_run_with_a_next_step(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="write permission"):
        compress_corpus([write_documents(tmp_path / "docs", 3)], make_job(ShardStore(tmp_path / "out"), checkpoint))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no file size limit on Windows")
def test_a_full_disk_stops_the_run_and_loses_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """A limit on file sizes stands in for the disk's: a long document does not fit, what was written before stays."""
    docs, out = write_documents(tmp_path / "docs", GROUP_ITEMS), tmp_path / "out"
    (docs / "long.txt").write_text("A long text. " * (GROUP_CHARACTERS // 13 + 1))
    limited = (
        "import resource, sys; from pic_rag.cli import main; hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1];"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, hard)); sys.exit(main(sys.argv[1:]))"
    )
    arguments = command(docs, out, checkpoint)
    done = subprocess.run([sys.executable, "-c", limited, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"pic-rag: error: Store at \S+ must be readable and writable, got: .* disk\.\n", done.stderr)
    assert len(shard_keys(out)) == GROUP_ITEMS
    assert not list(out.glob(".*"))
    assert main(arguments) == 0
    assert len(shard_keys(out)) == GROUP_ITEMS + 1


def test_settings_that_cannot_be_met_are_errors_before_anything_is_written(checkpoint: Path, tmp_path: Path) -> None:
    job = make_job(ShardStore(tmp_path / "out"), checkpoint)
    docs = [write_documents(tmp_path / "docs", 1)]
    with pytest.raises(ValueError, match="workers must be left out with engine='local', got 2"):
        compress_corpus(docs, job, workers=2)
    with pytest.raises(ValueError, match="engine must be one of local, ray, got 'spark'"):
        compress_corpus(docs, job, engine="spark")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ratio must be one of 4, 8"):
        compress_corpus(docs, make_job(job.store, checkpoint, ratio=5))
    with pytest.raises(ValueError, match="paths must name at least one document that can be read, got none"):
        compress_corpus(["/nowhere.txt"], job)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_without_ray_the_error_names_the_extra(checkpoint: Path, tmp_path: Path) -> None:
    job = make_job(ShardStore(tmp_path / "out"), checkpoint)
    with pytest.raises(ImportError, match=r"needs the extra 'ray'\. Install it: pip install 'pic-rag\[ray\]'"):
        compress_corpus([write_documents(tmp_path / "docs", 1)], job, engine="ray")


# Ray


@pytest.mark.parametrize(
    ("nodes", "device", "workers", "plan"),
    [
        ([{"CPU": 2}], None, 2, (2, {"num_cpus": 1.0})),
        ([{"CPU": 2}], None, None, (1, {"num_cpus": 2.0})),
        ([{"CPU": 5}, {"CPU": 5}], None, 3, (3, {"num_cpus": 2.0})),
        ([{"CPU": 64, "GPU": 8}], None, None, (8, {"num_gpus": 1.0})),
        ([{"CPU": 64, "GPU": 8}], "cuda", 16, (16, {"num_gpus": 0.5})),
        ([{"CPU": 64, "GPU": 8}], "cpu", 8, (8, {"num_cpus": 8.0})),
    ],
)
def test_workers_share_what_the_machines_have(nodes, device, workers, plan) -> None:
    assert plan_workers(nodes, device=device, workers=workers) == plan


def test_workers_that_no_machine_has_room_for_are_an_error() -> None:
    with pytest.raises(ValueError, match="workers must be at most 2, the CPUs of the cluster, got 3"):
        plan_workers([{"CPU": 2}], device=None, workers=3)
    with pytest.raises(ValueError, match="device must be cpu on a cluster without GPUs, got 'cuda'"):
        plan_workers([{"CPU": 2}], device="cuda", workers=None)


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_actors_killed_in_the_middle_compress_ten_thousand_documents_once(
    checkpoint: Path, compressor: Compressor, tmp_path: Path, capsys
) -> None:
    """A real cluster, SIGKILL, a second run: each document once, one bad one named, memories as the local engine's."""
    docs, out = write_documents(tmp_path / "docs", 10_000), tmp_path / "out"
    (docs / "042" / "04217.txt").write_bytes(b"\xc3(")
    on_ray = command(docs, out, checkpoint, "--engine", "ray", "--workers", "2", "--ray-address", "local")
    kill_after_shards(start(*on_ray), out, 20)
    killed = len(shard_keys(out))
    assert 0 < killed < 9_999
    resumed = start(*on_ray)
    output, complaint = resumed.communicate(timeout=1200)
    assert resumed.returncode == 3, complaint
    assert re.findall(r"^pic-rag: (.*)'\S+/(\d+)\.txt'", complaint, re.M) == [("warning: Skipped: Document ", "04217")]
    counts = re.search(r"([\d,]+) compressed, ([\d,]+) there already, 0 repeated, 1 skipped", output)
    assert counts is not None
    compressed, known = (int(number.replace(",", "")) for number in counts.groups())
    assert known >= killed  # the actors may have written what they had in hand
    assert compressed + known == 9_999
    times_written = Counter(shard_keys(out))
    assert (len(times_written), set(times_written.values())) == (9_999, {1})
    assert main(command(docs, tmp_path / "local", checkpoint)) == 3
    ours, theirs = (MemoryCache(ShardStore(folder), compressor.fingerprint) for folder in (out, tmp_path / "local"))
    handles = list(theirs.keys())
    for one, other in zip(ours.get(handles), theirs.get(handles), strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one.embeddings, other.embeddings, rtol=0.01, atol=0.01)


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("out", "options", "error"),
    [
        ("file", [], r"Store at \S+ must be readable and writable, got: .* in the way\."),
        ("out", ["--generator", "/gone"], r".*/gone.*"),
    ],
)
def test_an_error_of_an_actor_is_the_error_of_the_run(
    out: str, options: list[str], error: str, checkpoint: Path, tmp_path: Path
) -> None:
    """Not Ray's account of where it happened."""
    (tmp_path / "file").write_bytes(b"")
    arguments = command(write_documents(tmp_path / "docs", 3), tmp_path / out, checkpoint)
    failed = start(*arguments, *options, "--engine", "ray", "--workers", "1", "--ray-address", "local")
    output, complaint = failed.communicate(timeout=600)
    assert (failed.returncode, output) == (1, "")
    ours = re.findall(r"^pic-rag: .*", complaint, re.M)  # Ray's core prints a line that no setting of Python's reaches
    assert len(ours) == 1
    assert re.fullmatch(f"pic-rag: error: {error}", ours[0])
