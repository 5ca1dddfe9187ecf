"""Documents in, answers out: every passage's memory is made once, and nothing but retrieval decides what is read."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tiny_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from pic_rag.compression.compressor import Compressor
from pic_rag.config import PicConfig
from pic_rag.generation.generator import Generator
from pic_rag.rag import PicRag
from pic_rag.retrieval.documents import Document
from pic_rag.retrieval.index_folder import RetrieverError
from pic_rag.retrieval.retriever import Retriever
from pic_rag.store import STORE_FILE, SQLiteStore

DEMO = Path(__file__).parents[1] / "pic_rag" / "demo"
TEXTS = {
    "frogs.md": "Glass frogs hide their red blood in the liver while they sleep.",
    "trams.md": "The night tram connects the hospital with the port.",
    "bread.md": "The starter is fed every morning with flour and water.",
}
QUESTION = "Where do frogs hide blood?"
LOADING = {"device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def folder(tiny_model, tiny_tokenizer, tmp_path_factory) -> Path:
    """A folder with a tiny generator, an untrained compressor for it, and a tiny embedder."""
    root = tmp_path_factory.mktemp("models")
    tiny_model.save_pretrained(root / "tiny")
    tiny_tokenizer.save_pretrained(root / "tiny")
    config = PicConfig(ratios=(4, 8), segment_tokens=64, encoder_layers=2, lora_rank=4)
    Compressor.from_base(root / "tiny", config=config, **LOADING).save_pretrained(root / "compressor")
    words = sorted({word.strip(".").lower() for text in TEXTS.values() for word in text.split()} - {"the", "with"})
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(["[UNK]", *words])}, "[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = torch.randn(len(words) + 1, 64, generator=torch.Generator().manual_seed(0))
    weights[0] *= 0.01
    module = StaticEmbedding(tokenizer, embedding_weights=weights.numpy())
    SentenceTransformer(modules=[module], device="cpu").save(str(root / "embedder"))
    return root


def build(folder: Path, store: Path, texts: dict[str, str] = TEXTS) -> PicRag:
    rag = PicRag.from_pretrained(
        folder / "compressor", embedder=str(folder / "embedder"), store=SQLiteStore(store), **LOADING
    )
    rag.add([Document.from_text(text, source=source) for source, text in texts.items()])
    return rag


@pytest.fixture
def rag(folder, tmp_path) -> PicRag:
    return build(folder, tmp_path / "memories.sqlite")


def test_an_answer_says_what_it_was_given_from_and_what_it_cost(rag) -> None:
    answer = rag.ask(QUESTION, top_k=2, max_new_tokens=8)
    best = answer.documents[0]
    assert (best.source, best.text) == ("frogs.md", TEXTS["frogs.md"])
    assert (best.text_tokens, best.memory_tokens, best.cached) == (63, 16, False)
    assert best.handle == rag.compressor.handle(TEXTS["frogs.md"])
    assert len(answer.documents) == 2
    saved = sum(document.text_tokens - document.memory_tokens for document in answer.documents)
    assert answer.text_prompt_tokens - answer.prompt_tokens == saved
    assert answer.model == rag.generator.model_id
    assert answer.compressor == rag.compressor.fingerprint


def test_times_add_up(rag) -> None:
    times = rag.ask(QUESTION, max_new_tokens=8).latency_ms
    assert list(times) == ["retrieve", "compress", "first_token", "total"]
    assert times["retrieve"] + times["compress"] <= times["first_token"] <= times["total"]


def test_the_json_form_has_the_keys_that_scripts_rely_on(rag) -> None:
    values = rag.ask(QUESTION, max_new_tokens=4).to_dict()
    assert list(values) == [
        "answer", "documents", "prompt_tokens", "text_prompt_tokens", "latency_ms", "model", "compressor",
    ]  # fmt: skip
    assert list(values["documents"][0]) == [
        "id", "score", "text_tokens", "memory_tokens", "ratio", "fidelity", "handle", "cached", "source",
    ]  # fmt: skip


def test_a_second_ask_compresses_nothing_and_is_faster(folder, tmp_path) -> None:
    long = " ".join(f"Frog {number} hides blood and water in the port." for number in range(90))
    rag = build(folder, tmp_path / "memories.sqlite", {"long.md": long})
    first, second = (rag.ask(QUESTION, top_k=4, ratio=8, max_new_tokens=4) for _ in range(2))
    assert [document.cached for document in first.documents] == [False] * 4
    assert [document.cached for document in second.documents] == [True] * 4
    assert second.latency_ms["compress"] < first.latency_ms["compress"]


def test_another_ratio_is_another_memory(rag) -> None:
    four = rag.ask(QUESTION, top_k=1, ratio=4, max_new_tokens=2).documents[0]
    eight = rag.ask(QUESTION, top_k=1, ratio=8, max_new_tokens=2).documents[0]
    assert (four.memory_tokens, eight.memory_tokens, eight.cached) == (16, 8, False)


def test_ratios_go_to_passages_by_their_rank(rag) -> None:
    mixed = rag.ask(QUESTION, top_k=3, ratio=(4, 8), max_new_tokens=2)
    assert [document.ratio for document in mixed.documents] == [4, 8, 8]
    four, eight = (rag.ask(QUESTION, top_k=3, ratio=ratio, max_new_tokens=2) for ratio in (4, 8))
    assert [document.cached for document in four.documents] == [True, False, False]
    assert [document.cached for document in eight.documents] == [False, True, True]
    assert eight.prompt_tokens < mixed.prompt_tokens < four.prompt_tokens
    cut = rag.ask(QUESTION, top_k=3, ratio=(4, 8), mode="truncate", max_new_tokens=2)
    assert cut.prompt_tokens == mixed.prompt_tokens


def test_modes_show_what_they_say(rag) -> None:
    asked = {mode: rag.ask(QUESTION, mode=mode, max_new_tokens=4) for mode in ("pic", "text", "none", "truncate")}
    assert asked["text"].prompt_tokens == asked["text"].text_prompt_tokens == asked["pic"].text_prompt_tokens
    assert asked["truncate"].prompt_tokens == asked["pic"].prompt_tokens
    assert asked["none"].prompt_tokens < asked["pic"].prompt_tokens
    for mode in ("text", "none", "truncate"):
        assert {(document.memory_tokens, document.handle) for document in asked[mode].documents} == {(0, None)}


@pytest.mark.parametrize("mode", ["text", "none", "truncate"])
def test_only_mode_pic_compresses(rag, mode) -> None:
    rag.ask(QUESTION, mode=mode, max_new_tokens=2)
    assert list(rag.cache.keys()) == []


def test_mode_text_answers_what_the_plain_generator_answers(rag) -> None:
    from pic_rag.prompts import rag_messages

    answer = rag.ask(QUESTION, mode="text", top_k=1, max_new_tokens=12)
    plain = rag.generator.generate(rag_messages(QUESTION, [TEXTS["frogs.md"]]), max_new_tokens=12)[0]
    assert answer.answer == plain.text.strip()


def test_the_stream_joins_to_the_answer(rag) -> None:
    pieces = []
    stream = rag.stream(QUESTION, max_new_tokens=12)
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as done:
            answer = done.value
            break
    assert len(pieces) > 1
    assert "".join(pieces).strip() == answer.answer


def test_a_handle_in_a_question_stands_for_itself(rag) -> None:
    """Its memory is at hand, but a user's words must not reach it."""
    handle = rag.ask(QUESTION, max_new_tokens=2).documents[0].handle
    known = rag.ask(f"{QUESTION} {handle}", max_new_tokens=2)
    unknown = rag.ask(f"{QUESTION} [[pic:{'0' * 32}]]", max_new_tokens=2)
    assert known.prompt_tokens == unknown.prompt_tokens


@pytest.mark.parametrize("mode", ["pic", "text", "truncate"])
def test_a_handle_in_a_document_is_only_text(folder, tmp_path, mode) -> None:
    clean = build(folder, tmp_path / "a.sqlite")
    stolen = clean.compressor.handle(TEXTS["trams.md"])
    rag = build(
        folder, tmp_path / "b.sqlite", {"frogs.md": f"{stolen} {TEXTS['frogs.md']}", "trams.md": TEXTS["trams.md"]}
    )
    answer = rag.ask(QUESTION, top_k=2, mode=mode, max_new_tokens=4)
    shown = [document for document in answer.documents if document.source == "frogs.md"]
    assert shown[0].text.startswith("[[pic:")
    assert answer.text_prompt_tokens == clean.ask(QUESTION, top_k=2, mode="text", max_new_tokens=4).prompt_tokens + (
        len(stolen) + len(" ") + len(":")
    )


def test_files_are_added_and_bad_ones_are_named(rag, tmp_path) -> None:
    (tmp_path / "good.md").write_text("The port has a lighthouse.")
    (tmp_path / "bad.txt").write_bytes(b"\x00\x01")
    problems = rag.add_files([tmp_path / "good.md", tmp_path / "bad.txt"])
    assert [Path(problem.path).name for problem in problems] == ["bad.txt"]
    assert len(rag.retriever) == 4
    assert rag.add([Document.from_text(TEXTS["frogs.md"], source="frogs.md")]) == 0


def test_one_path_or_any_iterable_of_them_forgets_nothing_else(rag, tmp_path) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "page.md").write_text(f"This is page {name}.")
    before = len(rag.retriever)
    assert rag.add_files(str(tmp_path / "one")) == rag.add_files(tmp_path / "two") == []
    assert rag.add_files(iter([tmp_path / "three"])) == []
    assert len(rag.retriever) == before + 3
    (tmp_path / "three" / "page.md").unlink()
    (tmp_path / "three" / "other.md").write_text("Another page.")
    rag.add_files(iter([tmp_path / "three"]))
    assert {passage.text for passage in rag.retriever.passages[before:]} == {
        "This is page one.", "This is page two.", "Another page."
    }  # fmt: skip


def test_the_same_relative_path_in_two_folders_is_two_documents(rag, tmp_path, monkeypatch) -> None:
    for project in ("one", "two"):
        (tmp_path / project / "docs").mkdir(parents=True)
        (tmp_path / project / "docs" / "README.md").write_text(f"About project {project}.")
    before = len(rag.retriever)
    for project in ("one", "two", "one"):
        monkeypatch.chdir(tmp_path / project)
        rag.add_files(["docs"])
    assert [passage.text for passage in rag.retriever.passages[before:]] == ["About project one.", "About project two."]


def test_an_index_says_what_its_files_say_now(folder, tmp_path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    for name, text in TEXTS.items():
        (docs / name).write_text(text)
    rag = build(folder, tmp_path / "memories.sqlite", {})
    rag.add([Document.from_text("The starter is fed by hand.", source="docs/label.md")])
    rag.add_files([docs])
    (docs / "frogs.md").write_text("Glass frogs hide in the port.")
    (docs / "trams.md").unlink()
    (docs / "bread.md").write_bytes(b"\0")
    assert [problem.path for problem in rag.add_files([docs])] == [(docs / "bread.md").as_posix()]
    shown = {document.text for document in rag.ask(QUESTION, top_k=9, max_new_tokens=2).documents}
    assert shown == {"Glass frogs hide in the port.", "The starter is fed by hand."}
    rag.add_files([tmp_path / "docs" / ".." / "docs" / "frogs.md"])  # the same file by another name
    assert [document.text for document in rag.ask(QUESTION, top_k=9, max_new_tokens=2).documents][0] in shown
    assert len(rag.retriever) == 2


def test_an_empty_path_forgets_nothing(folder, tmp_path, monkeypatch) -> None:
    """Of an unset variable: it is not the current folder."""
    (tmp_path / "page.md").write_text("A page.")
    monkeypatch.chdir(tmp_path)
    rag = build(folder, tmp_path / "memories.sqlite", {})
    rag.add_files(["page.md"])
    assert len(rag.add_files([""])) == 1
    assert len(rag.retriever) == 1


def test_what_a_folder_does_not_lead_to_is_not_forgotten(folder, tmp_path) -> None:
    for name in ("docs", "elsewhere"):
        (tmp_path / name).mkdir()
    for name, text in zip(("docs/.hidden.md", "docs/shown.md", "elsewhere/page.md"), TEXTS.values(), strict=True):
        (tmp_path / name).write_text(text)
    (tmp_path / "docs" / "link").symlink_to(tmp_path / "elsewhere")
    rag = build(folder, tmp_path / "memories.sqlite", {})
    rag.add_files([tmp_path / "docs" / ".hidden.md", tmp_path / "docs" / "link"])
    rag.add_files(tmp_path / "docs")
    assert len(rag.retriever) == 3
    (tmp_path / "docs" / ".hidden.md").unlink()
    rag.add_files(tmp_path / "docs")
    assert len(rag.retriever) == 2


def test_files_of_one_name_in_two_folders_do_not_share_what_both_say(folder, tmp_path, monkeypatch) -> None:
    rag = build(folder, tmp_path / "memories.sqlite", {})
    for name in ("a", "b", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / name)
        Path("notes.md").write_text("Another text." if len(rag.retriever) > 1 else "What both say.")
        rag.add_files(["notes.md"])
    assert [passage.text for passage in rag.retriever.passages] == ["What both say.", "Another text."]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    rag.add_files(["notes.md"])
    assert sorted(Path(passage.metadata["path"]).parent.name for passage in rag.retriever.passages) == ["b", "moved"]


def test_a_link_that_leads_elsewhere_now_is_followed_and_what_it_led_to_is_forgotten(folder, tmp_path) -> None:
    for name, text in zip(("v1", "v2"), TEXTS.values(), strict=False):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.md").write_text(text)
    link = tmp_path / "current"
    link.symlink_to("v1")
    rag = build(folder, tmp_path / "memories.sqlite", {})
    rag.add_files([link])
    link.unlink()
    link.symlink_to("v2")
    rag.add_files([link])
    assert [passage.text for passage in rag.retriever.passages] == [TEXTS["trams.md"]]
    (tmp_path / "one.md").symlink_to(tmp_path / "v1" / "v1.md")
    rag.add_files([tmp_path / "one.md"])
    assert len(rag.retriever) == 2
    (tmp_path / "v1" / "v1.md").write_text("")
    assert len(rag.add_files([tmp_path / "one.md", tmp_path / "a\0b.md"])) == 2
    assert [passage.text for passage in rag.retriever.passages] == [TEXTS["trams.md"]]


def test_an_index_that_somebody_else_has_saved_meanwhile_is_not_written_over(rag, folder, tmp_path) -> None:
    index, embedder = tmp_path / "index", str(folder / "embedder")
    rag.save(index)
    one, other = (PicRag.load(index, embedder=embedder, **LOADING) for _ in range(2))
    one.add([Document.from_text("The lamp burns oil.", source="lamp.md")])
    one.save(index)
    one.save(index)
    other.add([Document.from_text("The bell is cracked.", source="bell.md")])
    with pytest.raises(RetrieverError, match="somebody else has saved since. Load it again"):
        other.save(index)
    other.save(tmp_path / "another")
    assert len(PicRag.load(index, embedder=embedder, **LOADING).retriever) == len(TEXTS) + 1
    rag_of_its_own = build(folder, tmp_path / "own.sqlite")
    rag_of_its_own.save(index)  # never loaded from there: the new index replaces the old one


@pytest.mark.parametrize("settings", ["", "{}", "[]"])
def test_a_damaged_index_is_named(rag, tmp_path, settings) -> None:
    rag.save(tmp_path / "index")
    (tmp_path / "index" / "pic_rag.json").write_text(settings)
    with pytest.raises(RetrieverError, match=r"pic_rag.json' must be as .* got unreadable settings"):
        PicRag.load(tmp_path / "index")


def test_an_index_is_the_same_after_save_and_load(folder, tmp_path) -> None:
    rag = PicRag.from_pretrained(folder / "compressor", embedder=str(folder / "embedder"), **LOADING)
    rag.add([Document.from_text(text, source=source) for source, text in TEXTS.items()])
    rag.save(tmp_path / "index")
    first = rag.ask(QUESTION, max_new_tokens=8)
    loaded = PicRag.load(tmp_path / "index", embedder=str(folder / "embedder"), **LOADING)
    again = loaded.ask(QUESTION, max_new_tokens=8)
    assert [document.id for document in again.documents] == [document.id for document in first.documents]
    assert all(document.cached for document in again.documents)
    assert (again.compressor, again.model) == (first.compressor, first.model)
    elsewhere = SQLiteStore(tmp_path / "elsewhere.sqlite")
    other = PicRag.load(tmp_path / "index", embedder=str(folder / "embedder"), store=elsewhere, **LOADING)
    assert not any(document.cached for document in other.ask(QUESTION, max_new_tokens=2).documents)
    other.save(tmp_path / "another index")  # memories stay in a store of one's own
    assert all(document.cached for document in other.ask(QUESTION, max_new_tokens=2).documents)


def test_an_index_made_with_a_compressor_without_a_name_asks_for_it(folder, tmp_path) -> None:
    """The shipped compressor, which has none either, would answer otherwise."""
    named = PicRag.from_pretrained(folder / "compressor", embedder=str(folder / "embedder"), **LOADING)
    compressor = Compressor(named.compressor.checkpoint, named.compressor.encoder, named.compressor.tokenizer)
    PicRag(named.retriever, compressor, named.generator).save(tmp_path / "index")
    with pytest.raises(ValueError, match="compressor must be given for the index .*, got none.*save_pretrained"):
        PicRag.load(tmp_path / "index", embedder=str(folder / "embedder"), **LOADING)
    assert PicRag.load(
        tmp_path / "index", compressor=folder / "compressor", embedder=str(folder / "embedder"), **LOADING
    )


def test_an_index_whose_compressor_has_moved_asks_for_it(folder, tmp_path) -> None:
    shutil.copytree(folder / "compressor", tmp_path / "compressor")
    loading = {"embedder": str(folder / "embedder"), **LOADING}
    PicRag.from_pretrained(tmp_path / "compressor", **loading).save(tmp_path / "index")
    moved = (tmp_path / "compressor").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="compressor must be given for the index .* made with .*compr"):
        PicRag.load(tmp_path / "index", **loading)
    PicRag.load(tmp_path / "index", compressor=moved, **loading).save(tmp_path / "index")
    PicRag.load(tmp_path / "index", **loading)


def test_an_index_opens_from_another_working_folder(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    PicRag.from_pretrained("./compressor", embedder=str(folder / "embedder"), **LOADING).save(tmp_path / "index")
    monkeypatch.chdir(tmp_path)
    assert PicRag.load("index", embedder=str(folder / "embedder"), **LOADING).compressor.generator.name


def test_what_is_no_index_is_an_error(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="folder must be an index that PicRag.save wrote"):
        PicRag.load(tmp_path)


def test_an_index_without_documents_answers_only_where_none_are_wanted(folder, tmp_path) -> None:
    empty = build(folder, tmp_path / "memories.sqlite", {})
    with pytest.raises(ValueError, match="The index must hold a passage to answer from, got none"):
        empty.ask(QUESTION)
    answer = empty.ask(QUESTION, mode="none", max_new_tokens=4)
    assert answer.documents == []
    assert answer.prompt_tokens == answer.text_prompt_tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"question": " "}, "question must hold at least one word"),
        ({"mode": "memory"}, "mode must be one of pic, text, none, truncate, got 'memory'"),
        ({"ratio": 5}, "ratio must be one of 4, 8"),
        ({"ratio": (4, 4, 4, 5)}, "ratio must be one of 4, 8"),
        ({"ratio": np.array([4, 8])}, "ratio must be one of 4, 8"),
        ({"ratio": b"\x04"}, "ratio must be one of 4, 8"),
        ({"top_k": 0}, "top_k must be a whole number of 1 or more, got 0"),
        ({"mode": "text", "min_fidelity": 2}, "min_fidelity must be a number from 0 to 1, got 2"),
    ],
)
def test_a_bad_setting_is_an_error(rag, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        rag.ask(**{"question": QUESTION, **arguments})


def test_another_generator_is_refused_with_both_names(rag, tiny_tokenizer) -> None:
    other = Generator(make_tiny_model(tiny_tokenizer, layers=2), tiny_tokenizer, name="other")
    with pytest.raises(ValueError, match=r"generator must be 'tiny@.*', .* got 'other@.*'"):
        PicRag(rag.retriever, rag.compressor, other)


def test_the_same_generator_in_another_folder_is_accepted(folder, rag, tmp_path) -> None:
    shutil.copytree(folder / "tiny", tmp_path / "moved")
    moved = PicRag.from_pretrained(
        folder / "compressor", generator=tmp_path / "moved", embedder=str(folder / "embedder"),
        store=SQLiteStore(tmp_path / "moved.sqlite"), **LOADING,
    )  # fmt: skip
    assert moved.generator.model_id == rag.generator.model_id


def test_a_store_that_cannot_be_written_costs_no_answer(folder, tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    rag = build(folder, tmp_path / "file" / "memories.sqlite")
    answers = [rag.ask(QUESTION, max_new_tokens=8) for _ in range(2)]
    assert answers[0].answer == answers[1].answer
    assert not any(document.cached for document in answers[1].documents)


def test_concurrent_asks_equal_sequential_ones(folder, tmp_path) -> None:
    questions = [QUESTION, "hospital tram port", "feed flour water", "sleep in the morning"] * 2
    rag = build(folder, tmp_path / "memories.sqlite")
    for question in questions:  # every memory out of the store, for both
        rag.ask(question, top_k=1, max_new_tokens=1)
    sequential = [rag.ask(question, top_k=1, max_new_tokens=8) for question in questions]
    with ThreadPoolExecutor(4) as threads:
        asked = list(threads.map(lambda question: rag.ask(question, top_k=1, max_new_tokens=8), questions))
    assert [(answer.answer, answer.documents) for answer in asked] == [
        (answer.answer, answer.documents) for answer in sequential
    ]
    assert len({answer.answer for answer in asked}) > 1


def test_threads_save_into_one_folder(rag, tmp_path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: rag.save(tmp_path / "index"), range(40)))
    assert not list((tmp_path / "index").glob("*.partial"))
    left = tmp_path / "index" / f"pic_rag.json.{'0' * 32}.partial"  # by a process that was killed
    left.write_bytes(b"{")
    os.utime(left, (0, 0))
    rag.save(tmp_path / "index")
    assert not left.exists()


@pytest.mark.embedded
@pytest.mark.slow
def test_the_embedded_models_find_and_read_the_demo_corpus(tmp_path) -> None:
    compressor = Compressor.from_base(config=PicConfig(encoder_layers=2))
    generator = Generator.from_pretrained()
    rag = PicRag(Retriever(), compressor, generator, store=SQLiteStore(tmp_path / "memories.sqlite"))
    assert rag.add_files([DEMO]) == []
    answer = rag.ask("Where does a sleeping glass frog store its red blood cells?", mode="text")
    assert Path(answer.documents[0].source).name == "glass-frogs.md"
    assert "liver" in answer.answer
    first = rag.ask("Who designed the lighthouse at Skerrin Point?", max_new_tokens=8)
    second = rag.ask("Who designed the lighthouse at Skerrin Point?", max_new_tokens=8)
    assert all(document.cached for document in second.documents)
    assert second.latency_ms["compress"] < first.latency_ms["compress"] / 2
    assert first.prompt_tokens < first.text_prompt_tokens / 2


def test_a_namespace_keeps_memories_apart_in_a_store_and_in_an_index(folder, tmp_path) -> None:
    def tenants(store: SQLiteStore) -> set[str]:
        return {key.partition("/")[0] for key in store.yield_keys()}

    rag = build(folder, tmp_path / "memories.sqlite")
    rag.ask(QUESTION, top_k=1, max_new_tokens=2)
    parts = (rag.retriever, rag.compressor, rag.generator)
    store = SQLiteStore(tmp_path / "memories.sqlite")
    mine = PicRag(*parts, store=store, namespace="mine")
    assert [mine.ask(QUESTION, top_k=1, max_new_tokens=2).documents[0].cached for _ in range(2)] == [False, True]
    assert tenants(store) == {"default", "mine"}

    index = tmp_path / "index"
    saved = PicRag(*parts, namespace="mine")
    saved.save(index)
    saved.ask(QUESTION, top_k=1, max_new_tokens=2)
    loading = {"embedder": str(folder / "embedder"), **LOADING}
    loaded = PicRag.load(index, namespace="mine", **loading)
    assert loaded.ask(QUESTION, top_k=1, max_new_tokens=2).documents[0].cached
    assert tenants(SQLiteStore(index / STORE_FILE)) == {"mine"}
    assert not PicRag.load(index, **loading).ask(QUESTION, top_k=1, max_new_tokens=2).documents[0].cached
