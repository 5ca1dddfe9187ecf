"""The rooms of pic_rag stand in the order in which data flows through them, and none imports a later one.

Imports are read, not run: those inside functions and under `TYPE_CHECKING` count as well.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import pic_rag

ROOT = Path(__file__).parents[1]
ADAPTERS = [path for path in ROOT.glob("integrations/*/*/**/*.py") if "tests" not in path.relative_to(ROOT).parts]

# A room may import what stands before it. Generation comes before compression, for it is the generator that says how
# faithful a memory is; whoever only trains, measures or draws comes last.
ORDER = """
    checks config progress handles prompts questions
    models retrieval
    chunking mask layout encoder
    memory assembler generation
    compression store
    rag
    reporting inspection bulk evaluation training study benchmark
    cli __main__
""".split()


class Import(NamedTuple):
    """`module`, as it is imported in a line of a file."""

    module: str
    path: Path
    line: int
    for_types: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.module}"


def module_of(path: Path) -> str:
    """The name that a file of the repository is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted((ROOT / "pic_rag").rglob("*.py"))}


def imports_of(path: Path) -> Iterator[Import]:
    """What of pic_rag a file imports, module by module, wherever in the file; a public name counts as its module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = (node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    for_types = {inner for node in guarded for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        for module in modules_named(node):
            if module.partition(".")[0] == "pic_rag" and module != "pic_rag":
                yield Import(module, path, node.lineno, node in for_types)


def modules_named(node: ast.AST) -> list[str]:
    """The modules that a statement imports, or, as `pic_rag.name`, reaches into."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        return [resolved(node.module, alias.name) for alias in node.names]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pic_rag":
        return [resolved("pic_rag", node.attr)]
    return []


def resolved(module: str, name: str) -> str:
    """The module that `from module import name` takes the name from."""
    if module == "pic_rag" and name in pic_rag._ROOMS:
        return f"pic_rag.{pic_rag._ROOMS[name]}"
    return f"{module}.{name}" if f"{module}.{name}" in MODULES else module


def room_of(module: str) -> str:
    """The name right below `pic_rag`."""
    return module.split(".")[1]


def test_every_room_has_its_place_in_the_order() -> None:
    assert {room_of(module) for module in MODULES if module != "pic_rag"} == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("room", ORDER)
def test_a_room_imports_no_later_room(room) -> None:
    files = [path for module, path in MODULES.items() if module != "pic_rag" and room_of(module) == room]
    found = [imported for path in files for imported in imports_of(path)]
    later = ORDER[ORDER.index(room) + 1 :]
    assert [str(imported) for imported in found if room_of(imported.module) in later] == []


def test_modules_import_each_other_in_no_circle() -> None:
    TopologicalSorter(
        {
            module: {imported.module for imported in imports_of(path) if not imported.for_types} - {module}
            for module, path in MODULES.items()
            if module != "pic_rag"
        }
    ).prepare()  # raises CycleError, which names the circle


def test_the_readmes_map_shows_every_room_in_this_order_and_files_that_exist() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("| room of `pic_rag/` |")[2].partition("\n\n")[0]
    shown = []
    for line in table.splitlines()[2:]:
        rooms, files = (re.findall(r"`([^`]+(?:\.py|/))`", cell) for cell in line.strip("|").split("|"))
        shown += rooms
        missing = [name for name in files if not (ROOT / "pic_rag" / rooms[0] / name).exists()]
        assert missing == [], rooms
    assert [name.removesuffix(".py").rstrip("/") for name in shown] == [room for room in ORDER if room != "__main__"]
    assert all((ROOT / "pic_rag" / name).exists() for name in shown)


def test_the_adapters_know_the_public_names_only() -> None:
    assert len(ADAPTERS) > 10
    for path in ADAPTERS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "pic_rag":
                assert node.module == "pic_rag", f"{path}:{node.lineno}"
                assert {alias.name for alias in node.names} <= set(pic_rag.__all__), f"{path}:{node.lineno}"


def test_modules_and_names_that_the_docs_speak_of_exist() -> None:
    readmes = [ROOT / "README.md", *ROOT.glob("integrations/*/README.md")]
    for path in [*MODULES.values(), *ADAPTERS, *readmes]:
        for dotted in re.findall(r"`pic_rag\.([\w.]+)", path.read_text(encoding="utf-8")):
            assert is_there(dotted.rstrip(".").split(".")), f"{path} speaks of pic_rag.{dotted}"


def is_there(names: list[str]) -> bool:
    """Whether these names lead from pic_rag to a module, or to something in one."""
    where: object = pic_rag
    for at, name in enumerate(names, start=1):
        module = ".".join(["pic_rag", *names[:at]])
        where = importlib.import_module(module) if module in MODULES else getattr(where, name, None)
    return where is not None
