"""The README's Python runs when pasted, from top to bottom, and prints what it says it prints."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pic_rag.cli import build_parser

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


@pytest.mark.parametrize("path", [ROOT / "README.md", *ROOT.glob("pic_rag/checkpoints/*/README.md")], ids=str)
def test_every_command_of_the_text_is_one_that_the_program_takes(path: Path) -> None:
    """Parsed, not run: names of options and the values they allow."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    commands = re.findall(r"^(?:.*&& )?pic-rag (.*)$", "".join(blocks), re.MULTILINE)
    assert len(commands) >= 7
    for command in commands:
        build_parser().parse_args(shlex.split(command))


def test_the_readme_shows_code_and_the_commands_of_a_fresh_machine() -> None:
    assert len(BLOCKS) >= 4
    commands = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert any("&& pic-rag demo" in command for command in commands)
    assert any("&& pytest" in command for command in commands)
