"""The retriever finds passages, keeps each once, and is the same after save and load."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from pic_rag.questions import read_rows
from pic_rag.retrieval import index_folder
from pic_rag.retrieval.documents import Document, load_documents
from pic_rag.retrieval.retriever import Hit, Passage, Retriever, RetrieverError

DEMO = Path(__file__).parents[2] / "pic_rag" / "demo"
TEXTS = {
    "frogs.md": "Glass frogs hide their red blood in the liver while they sleep.",
    "trams.md": "The night tram connects the hospital with the port.",
    "bread.md": "The starter is fed every morning with flour and water.",
}


def build_embedder(seed: int) -> SentenceTransformer:
    """A real, tiny embedder: the mean of random word vectors, so texts that share words are near."""
    words = sorted({word.strip(".").lower() for text in TEXTS.values() for word in text.split()} - {"the", "with"})
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(["[UNK]", *words])}, "[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = torch.randn(len(words) + 1, 64, generator=torch.Generator().manual_seed(seed))
    weights[0] *= 0.01
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights.numpy())], device="cpu")


@pytest.fixture(scope="module")
def embedder() -> SentenceTransformer:
    return build_embedder(seed=0)


@pytest.fixture
def documents() -> list[Document]:
    return [Document.from_text(text, source=source, metadata={"kind": "note"}) for source, text in TEXTS.items()]


@pytest.fixture
def retriever(embedder: SentenceTransformer, documents: list[Document]) -> Retriever:
    retriever = Retriever(embedder)
    retriever.add(documents)
    return retriever


@pytest.mark.parametrize(
    ("query", "source"),
    [("Where do frogs hide blood?", "frogs.md"), ("hospital tram", "trams.md"), ("feed flour water", "bread.md")],
)
def test_the_best_hit_answers_the_query(retriever: Retriever, query: str, source: str) -> None:
    hits = retriever.search(query, top_k=3)
    assert hits[0].passage.source == source
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_the_score_is_the_cosine_similarity(retriever: Retriever) -> None:
    hit = retriever.search(TEXTS["frogs.md"], top_k=1)[0]
    assert hit.score == pytest.approx(1.0, abs=1e-5)


def test_a_passage_keeps_what_its_document_says(retriever: Retriever, documents: list[Document]) -> None:
    passage = retriever.passages[0]
    assert passage.id == f"{documents[0].id}-0"
    assert (passage.text, passage.source) == (TEXTS["frogs.md"], "frogs.md")
    assert passage.metadata == {"kind": "note", "start_character": 0}


def test_adding_a_document_twice_adds_nothing(retriever: Retriever, documents: list[Document]) -> None:
    assert retriever.add(documents) == 0
    assert len(retriever) == 3
    assert len(retriever.search("frogs", top_k=10)) == 3


def test_a_changed_document_replaces_what_it_said_before_and_leaves_the_others(embedder) -> None:
    words = "hospital port liver frogs night tram starter flour".split()
    before = "\n\n".join(f"The {word}. " * 3 for word in words)
    after = before.replace("frogs", "blood")
    retriever = Retriever(embedder, passage_characters=50, overlap_characters=0)
    retriever.add([Document.from_text(TEXTS["trams.md"], source="trams.md"), Document.from_text(before, source="a.md")])
    kept = {passage.text for passage in retriever.passages if "frogs" not in passage.text}
    changed = Document.from_text(after, source="a.md")
    assert retriever.add([changed]) == 1
    assert {passage.text for passage in retriever.passages if "blood" not in passage.text} == kept
    assert {passage.id.rpartition("-")[0] for passage in retriever.passages if passage.source == "a.md"} == {changed.id}
    for passage in retriever.passages:  # rows of the index are still the rows of the list
        assert retriever.search(passage.text, top_k=1)[0].score == pytest.approx(1, abs=1e-5)
        assert retriever.search(passage.text, top_k=1)[0].passage == passage
    assert not any("frogs" in hit.passage.text for hit in retriever.search("frogs", top_k=99))


def test_a_removed_source_is_not_found_any_more(retriever: Retriever, tmp_path: Path) -> None:
    assert retriever.remove(["trams.md", "never.md"]) == 1
    assert {hit.passage.source for hit in retriever.search("hospital tram", top_k=9)} == {"frogs.md", "bread.md"}
    retriever.save(tmp_path)
    again = Retriever.load(tmp_path, retriever._model)
    assert again.passages == retriever.passages
    assert again.add([Document.from_text(TEXTS["trams.md"], source="trams.md")]) == 1


def test_a_search_while_everything_is_removed_finds_nothing(retriever: Retriever, monkeypatch) -> None:
    really = retriever._model.encode_query

    def remove_meanwhile(*args, **kwargs):
        retriever.remove(TEXTS)
        return really(*args, **kwargs)

    monkeypatch.setattr(retriever._model, "encode_query", remove_meanwhile)
    assert retriever.search("frogs") == []


def test_the_same_text_from_two_sources_is_kept_twice(retriever: Retriever) -> None:
    assert retriever.add([Document.from_text(TEXTS["frogs.md"], source="copy.md")]) == 1


def test_long_documents_are_split_without_losing_a_word(embedder: SentenceTransformer) -> None:
    retriever = Retriever(embedder, passage_characters=120, overlap_characters=30)
    text = "\n\n".join(f"Paragraph {n}. " + " ".join(f"word{n}x{w}" for w in range(30)) for n in range(5))
    passages = retriever.split(Document.from_text(text, source="long.md"))
    assert max(len(passage.text) for passage in passages) <= 120
    assert {word for passage in passages for word in passage.text.split()} == set(text.split())
    for passage in passages:
        assert text[passage.metadata["start_character"] :].startswith(passage.text)
    assert len({passage.id for passage in passages}) == len(passages)


def test_an_empty_retriever_finds_nothing(embedder: SentenceTransformer, tmp_path: Path) -> None:
    retriever = Retriever(embedder)
    assert retriever.add([]) == 0
    assert retriever.search("anything") == []
    retriever.save(tmp_path)
    assert len(Retriever.load(tmp_path, embedder)) == 0


def test_save_and_load_give_the_same_hits(retriever: Retriever, embedder: SentenceTransformer, tmp_path: Path) -> None:
    retriever.save(tmp_path / "index")
    loaded = Retriever.load(tmp_path / "index", embedder)
    assert loaded.passages == retriever.passages
    assert loaded.search("night port", top_k=3) == retriever.search("night port", top_k=3)
    assert loaded.add([Document.from_text(TEXTS["bread.md"], source="bread.md")]) == 0


def test_what_is_added_after_load_stays_aligned(
    retriever: Retriever, embedder: SentenceTransformer, tmp_path: Path
) -> None:
    retriever.save(tmp_path)
    loaded = Retriever.load(tmp_path, embedder)
    loaded.add([Document.from_text("Water and flour, morning and night.", source="new.md")])
    loaded.save(tmp_path)
    again = Retriever.load(tmp_path, embedder)
    for passage in again.passages:
        assert again.search(passage.text, top_k=1)[0].passage == passage


def test_save_replaces_its_own_files_and_leaves_others(retriever: Retriever, tmp_path: Path) -> None:
    others = {"memories.sqlite", "passages.train.jsonl", "passages.2026.jsonl.bak", "index.my.faiss"}
    for name in others:
        (tmp_path / name).write_text("another's")
    retriever.save(tmp_path)
    retriever.add([Document.from_text("The port sleeps.", source="port.md")])
    retriever.save(tmp_path)
    own = {path.name for path in tmp_path.iterdir()} - others
    assert len(list(tmp_path.iterdir())) == len(others) + 4
    names = sorted(name.split(".")[0] + Path(name).suffix for name in own)
    assert names == ["index.faiss", "passages.jsonl", "retriever.json", "retriever.lock"]


def test_a_save_that_fails_leaves_the_old_state(
    retriever: Retriever, embedder: SentenceTransformer, tmp_path: Path
) -> None:
    retriever.save(tmp_path)
    retriever.add([Document.from_text("A port.", source="path.md", metadata={"path": Path("x")})])
    with pytest.raises(TypeError, match=r"metadata of document 'path.md' must hold JSON values"):
        retriever.save(tmp_path)
    assert len(Retriever.load(tmp_path, embedder)) == 3


def test_a_killed_save_leaves_the_old_state(
    retriever: Retriever, embedder: SentenceTransformer, tmp_path: Path
) -> None:
    retriever.save(tmp_path)
    (tmp_path / "index.0123456789abcdef.faiss").write_bytes(b"whole, but not yet named by retriever.json")
    half = tmp_path / f"passages.0123456789abcdef.jsonl.{'0' * 32}.partial"
    half.write_bytes(b"half")
    os.utime(half, (0, 0))
    assert len(Retriever.load(tmp_path, embedder)) == 3
    retriever.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4, "the next save removes what the killed one left"


def test_another_embedder_is_refused_by_name(retriever: Retriever, tmp_path: Path) -> None:
    retriever.save(tmp_path)
    with pytest.raises(RetrieverError, match=r"embedder that made it, 'custom@.*got 'custom@.*embedder="):
        Retriever.load(tmp_path, build_embedder(seed=1))


def test_embeddings_of_another_width_are_refused(retriever: Retriever, tmp_path: Path) -> None:
    """The same weights, cut short."""
    retriever.save(tmp_path)
    short = build_embedder(seed=0)
    short.truncate_dim = 32
    with pytest.raises(RetrieverError, match="must be searched with embeddings of 64 numbers.* got 32"):
        Retriever.load(tmp_path, short)


def test_a_retriever_that_is_saved_again_while_it_is_loaded_is_loaded_whole(
    retriever: Retriever, embedder: SentenceTransformer, tmp_path: Path, monkeypatch
) -> None:
    retriever.save(tmp_path)
    read = index_folder._read

    def saving_first(*arguments):
        monkeypatch.setattr(index_folder, "_read", read)
        retriever.add([Document.from_text("The port sleeps.", source="port.md")])
        retriever.save(tmp_path)
        return read(*arguments)

    monkeypatch.setattr(index_folder, "_read", saving_first)
    loaded = Retriever.load(tmp_path, embedder)
    assert loaded.passages == retriever.passages
    loaded.save(tmp_path)  # what was loaded is what is there


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda retriever: pickle.loads(pickle.dumps(retriever))])
def test_a_copy_is_a_retriever_of_its_own(retriever: Retriever, duplicate: Callable[[Retriever], Retriever]) -> None:
    before = len(retriever)
    copied = duplicate(retriever)
    copied.add([Document.from_text("Storks nest on chimneys.", source="storks.md")])
    assert copied.search("Where do storks nest?", 1)[0].passage.source == "storks.md"
    assert len(retriever) == before


def test_a_copy_is_whole_while_others_add(retriever: Retriever) -> None:
    done = threading.Event()

    def add() -> None:
        for number in range(300):
            retriever.add([Document.from_text(f"Stork {number} nests.", source=f"{number}.md")])
        done.set()

    adding = threading.Thread(target=add)
    adding.start()
    while not done.is_set():
        copied = copy.deepcopy(retriever)
        assert copied._index.ntotal == len(copied.passages)
        assert {hit.passage.hash for hit in copied.search("Stork", 5)} <= copied._hashes
    adding.join()


def test_searches_go_on_while_it_is_decided_what_goes(retriever: Retriever) -> None:
    searched: list[int] = []

    def condition(_: Passage) -> bool:
        searched.append(len(retriever.search("boats", 1)))  # would wait for ever, were the lock held
        return False

    assert retriever.remove_where(condition) == 0
    assert searched == [1] * len(retriever)


def test_a_full_disk_is_named_and_leaves_the_old_state(
    retriever: Retriever, embedder: SentenceTransformer, tmp_path: Path, monkeypatch
) -> None:
    retriever.save(tmp_path)
    retriever.add([Document.from_text("Storks nest on chimneys.", source="storks.md")])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device\. What was there is as it was") as error:
            retriever.save(tmp_path)
    assert str(tmp_path) in str(error.value.filename)
    assert not list(tmp_path.glob("*.partial"))
    assert len(Retriever.load(tmp_path, embedder)) == len(retriever) - 1


def test_one_source_alone_is_not_taken_for_its_letters(retriever: Retriever) -> None:
    with pytest.raises(TypeError, match="sources must be a list of sources, got the string 'frogs.md'"):
        retriever.remove("frogs.md")


def test_an_embedder_is_known_by_its_weights_not_by_its_path(
    retriever: Retriever, embedder: SentenceTransformer, tmp_path: Path
) -> None:
    embedder.save(str(tmp_path / "moved"))
    retriever.save(tmp_path / "index")
    loaded = Retriever.load(tmp_path / "index", tmp_path / "moved", device=torch.device("cpu"))
    assert loaded.embedder.startswith("moved@")
    assert loaded.search("frogs", top_k=1)[0].passage.source == "frogs.md"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "retriever.json").unlink(), "no 'retriever.json'"),
        (lambda folder: (folder / "retriever.json").write_text("{"), "unreadable 'retriever.json'"),
        (lambda folder: (folder / "retriever.json").write_text('{"format_version": 9}'), "format_version 9"),
        (lambda folder: (folder / "retriever.json").write_text('{"format_version": 1}'), "without 'embedder'"),
        (lambda folder: next(folder.glob("index.*")).write_bytes(b"x"), "of another content"),
        (lambda folder: next(folder.glob("passages.*")).unlink(), "no 'passages"),
    ],
    ids=["no manifest", "broken manifest", "other version", "short manifest", "index", "passages"],
)
def test_a_damaged_folder_is_a_clear_error(
    retriever: Retriever, embedder: SentenceTransformer, tmp_path: Path, damage, message: str
) -> None:
    retriever.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(RetrieverError, match=message) as error:
        Retriever.load(tmp_path, embedder)
    assert str(tmp_path) in str(error.value)


def test_threads_that_add_the_same_documents_add_them_once(
    embedder: SentenceTransformer, documents: list[Document]
) -> None:
    retriever = Retriever(embedder)
    threads = [threading.Thread(target=retriever.add, args=(documents,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(retriever) == 3
    assert retriever.search("tram")[0].passage.source == "trams.md"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"passage_characters": 0}, "passage_characters must be a whole number of 1 or more, got 0"),
        ({"passage_characters": 100, "overlap_characters": 100}, "below passage_characters=100, got 100"),
        ({"batch_size": 0}, "batch_size must be a whole number of 1 or more, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(embedder: SentenceTransformer, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Retriever(embedder, **settings)


def test_a_query_out_of_range_is_refused(retriever: Retriever) -> None:
    with pytest.raises(ValueError, match="top_k must be a whole number of 1 or more, got 0"):
        retriever.search("frogs", top_k=0)
    with pytest.raises(ValueError, match="query must hold text, got ' '"):
        retriever.search(" ")


def test_a_string_is_not_a_document(retriever: Retriever) -> None:
    with pytest.raises(TypeError, match="must be pic_rag.Document objects, got str"):
        retriever.add(["text"])  # type: ignore[list-item]


def test_a_hash_belongs_to_source_and_text() -> None:
    passage = Passage(id="a-0", text="text", source="a.md")
    assert passage.hash == Passage(id="b-7", text="text", source="a.md").hash
    assert passage.hash != Passage(id="a-0", text="text", source="b.md").hash
    assert Hit(passage, 0.5).passage is passage


def test_the_demo_questions_are_answered_by_their_documents() -> None:
    questions = [row.values for row in read_rows(DEMO / "questions.jsonl")]
    texts = {Path(d.source).name: d.text for d in load_documents(DEMO, on_error="raise").documents}
    assert len(questions) >= 10
    assert len(texts) == 8
    assert {q["source"] for q in questions} == set(texts)
    assert all(q["answers"][0] in texts[q["source"]] for q in questions)


@pytest.mark.embedded
def test_the_embedded_retriever_finds_the_document_of_every_demo_question() -> None:
    retriever = Retriever()
    retriever.add(load_documents(DEMO).documents)
    for question in (row.values for row in read_rows(DEMO / "questions.jsonl")):
        hits = retriever.search(question["question"], top_k=3)
        assert any(question["answers"][0] in hit.passage.text for hit in hits), question
        assert Path(hits[0].passage.source).name == question["source"]


def test_what_is_no_text_is_an_error_that_says_so(retriever):
    with pytest.raises(TypeError, match="query must be a string, got dict. Pass the question alone"):
        retriever.search({"question": "Who?"})
    with pytest.raises(ValueError, match="query must be valid Unicode"):
        retriever.search("Who \ud800?")
    with pytest.raises(ValueError, match="The text of document 'odd' must be valid Unicode, got .* at character 4"):
        retriever.add([Document("odd", "bad \ud800", "odd")])


def test_a_text_that_was_added_from_many_sources_takes_one_place_among_the_hits(embedder):
    retriever = Retriever(embedder)
    copies = [Document.from_text(TEXTS["frogs.md"], source=f"copy-{number}.md") for number in range(9)]
    retriever.add([*copies, Document.from_text(TEXTS["trams.md"], source="trams.md")])
    query = "Where do frogs hide blood?"
    assert [hit.passage.source for hit in retriever.search(query, 2)] == ["copy-0.md", "trams.md"]
    assert [hit.passage.source for hit in retriever.search(query, 5)] == ["copy-0.md", "trams.md"]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class Interrupting:
    """An index in which Ctrl-C comes just after a change."""

    def __init__(self, index: faiss.Index) -> None:
        self.index = index

    def __getattr__(self, name: str) -> Any:
        return getattr(self.index, name)

    def add(self, rows: np.ndarray) -> None:
        self.index.add(rows)
        interrupt()


def test_an_interrupt_leaves_rows_and_passages_that_go_together(
    retriever: Retriever, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = retriever.search("hospital tram", top_k=3)
    more = Document.from_text("The ferry to Amsel leaves at noon.", source="ferry.md")
    index = retriever._index
    retriever._index = Interrupting(index)
    with pytest.raises(KeyboardInterrupt):
        retriever.add([more])
    retriever._index = index
    monkeypatch.setattr(faiss, "IDSelectorBatch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        retriever.remove_where(lambda passage: passage.source == found[0].passage.source)
    assert retriever._index.ntotal == len(retriever) == len(TEXTS)
    assert retriever.search("hospital tram", top_k=3) == found
    assert retriever.add([more]) == 1


def test_threads_that_add_and_save_into_one_folder_are_not_somebody_else(retriever: Retriever, tmp_path: Path) -> None:
    retriever.save(tmp_path)

    def add(number: int) -> None:
        retriever.add([Document.from_text(f"The ferry has {number} seats.", source=f"{number}.md")])
        retriever.save(tmp_path)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(add, range(20)))
    assert {passage.source for passage in retriever.passages} >= {f"{number}.md" for number in range(20)}
    assert Retriever.load(tmp_path, retriever._model).passages == retriever.passages


def test_what_was_removed_or_replaced_can_be_added_again(retriever: Retriever, documents: list[Document]) -> None:
    retriever.remove(["frogs.md"])
    assert retriever.add(documents) == 1
    retriever.add([Document.from_text("Another tram.", source="trams.md")])
    assert retriever.add(documents) == 1
    for source, text in TEXTS.items():
        assert retriever.search(text, top_k=1)[0].passage.source == source
    assert sorted(passage.source for passage in retriever.passages) == sorted(TEXTS)
