"""The Python of each integration's README runs when pasted, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

READMES = sorted(Path(__file__).parent.glob("*/README.md"))
INSTALL = (
    "pip install -c constraints.txt . integrations/langchain-pic-rag "
    "integrations/llama-index-postprocessor-pic-rag integrations/llama-index-llms-pic-rag"
)


def blocks(readme: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", readme.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("readme", READMES, ids=lambda readme: readme.parent.name)
def test_the_install_line_is_the_one_for_all_packages_and_names_folders_that_exist(readme):
    assert blocks(readme, "bash")[0].strip() == INSTALL
    folders = [word for word in INSTALL.split() if word.startswith("integrations/")]
    assert {readme.parent.name for readme in READMES} == {Path(folder).name for folder in folders}


@pytest.mark.embedded
@pytest.mark.slow
@pytest.mark.parametrize("readme", READMES, ids=lambda readme: readme.parent.name)
def test_the_python_of_the_readme_runs(readme, tmp_path, monkeypatch, capsys):
    import llama_index.core

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(llama_index.core, "global_tokenizer", None)  # one of the blocks sets it
    names: dict[str, object] = {}
    for block in blocks(readme, "python"):
        exec(compile(block, str(readme), "exec"), names)
    assert capsys.readouterr().out.strip()
