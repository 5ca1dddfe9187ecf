"""The apps of the two notebooks are the frameworks' own tutorials: two lines make each a pic-rag app, and no more."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
NAMES = ["02_langchain_rag", "03_llamaindex_rag"]


def code_cells(name: str) -> list[str]:
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run(name: str) -> dict:
    """The names that a notebook leaves behind, without the cells that only a notebook can run."""
    names: dict = {}
    for cell in code_cells(name):
        if "get_ipython" not in cell and "await " not in cell:
            exec(compile(cell, name, "exec"), names)
    return names


@pytest.mark.parametrize("name", NAMES)
def test_the_app_with_and_the_app_without_differ_in_two_lines(name):
    without, with_memories = (cell.splitlines() for cell in code_cells(name) if cell.startswith("# The app"))
    changed = [line[0] for line in difflib.ndiff(without, with_memories) if line[0] in "+-"]
    assert sorted(changed) == ["+", "+", "-", "-"]


@pytest.mark.embedded
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_both_apps_answer_from_the_same_sources_and_the_prompt_shrinks_by_the_ratio(name, tmp_path, monkeypatch):
    """The notebooks assert tokens themselves; here, that this is not for want of sources or of answers."""
    if name == "03_llamaindex_rag":
        for package in ("embeddings.huggingface", "llms.huggingface", "vector_stores.faiss"):
            pytest.importorskip(f"llama_index.{package}", reason="needs the extra `notebooks`")
        import llama_index.core

        for setting in ("_llm", "_embed_model", "_node_parser", "_callback_manager"):
            monkeypatch.setattr(llama_index.core.Settings, setting, None)
    monkeypatch.chdir(tmp_path)
    left = run(name)
    without, with_memories, shrunk = left["without"], left["with_memories"], left["shrunk"]
    assert len(without) == len(with_memories) == len(left["questions"]) == len(shrunk)
    if name == "02_langchain_rag":
        from langchain_pic_rag import PICRestore, restore_documents

        assert all(message.content.strip() for message in (*without, *with_memories))
        assert restore_documents(left["compressed"]) == left["found"]  # text, ids, order and metadata

        def ask(retriever, question):
            return left["prompt"].invoke({"context": left["join"](retriever.invoke(question)), "question": question})

        for question in left["questions"]:  # the documents are all that differs in the prompts
            assert PICRestore().invoke(ask(left["retriever"], question)) == ask(left["search"], question)
    else:
        from llama_index.postprocessor.pic_rag import restore_nodes

        assert all(str(response).strip() for response in (*without, *with_memories))
        for text, memory in zip(without, with_memories, strict=True):
            assert restore_nodes(memory.source_nodes) == text.source_nodes  # text, ids, scores, order and metadata
    documents = next(name for name in shrunk.columns if name.endswith("text tokens"))
    share = shrunk[documents] / shrunk["prompt without"]  # what of the prompt can shrink at all
    expected = shrunk["prompt without"] * (1 - share + share / left["ratio"])
    assert ((shrunk["prompt with"] - expected).abs() < 12).all()
