"""The README's Python runs when pasted, from top to bottom, and prints what it says it prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
NEEDS = ("langchain_pic_rag", "llama_index.llms.pic_rag", "llama_index.postprocessor.pic_rag")


@pytest.mark.embedded
def test_the_python_of_the_readme_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys) -> None:
    for module in NEEDS:
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pic_rag").symlink_to(ROOT / "pic_rag")  # the paths in it are those of the repository's top folder
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
        printed = capsys.readouterr().out
        for expected in re.findall(r"# -> (.*)$", block, re.MULTILINE):
            assert expected in printed, block


def test_the_readme_shows_code_and_the_commands_of_a_fresh_machine() -> None:
    assert len(BLOCKS) >= 4
    commands = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert any("&& pic-rag demo" in command for command in commands)
    assert any("&& pytest" in command for command in commands)
