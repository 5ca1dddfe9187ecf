"""Tables come from the JSON of an evaluation: nobody types a figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pic_rag.cli import main
from pic_rag.cli.report import updated
from pic_rag.evaluation.report import COLUMNS, DEFAULT_COLUMNS, report_table

ROOT = Path(__file__).parents[2]
CARDS = sorted((ROOT / "pic_rag" / "checkpoints").glob("*/README.md"))
SCORES = {"n": 3, "em": 0.0, "contains_answer": 0.5, "text_tokens_mean": 245.0, "too_long": 1}
REPORT = {
    "rows": [
        {"system": "text", "ratio": None, "f1": 0.1666, "agreement": None, "prompt_tokens_mean": None, **SCORES},
        {"system": "pic", "ratio": 4, "f1": 0.25, "agreement": 1.0, "prompt_tokens_mean": 61.5, **SCORES},
        {"system": "pic", "ratio": 16, "f1": 0.05, "agreement": 0.0, "prompt_tokens_mean": 15.4, **SCORES},
    ]
}


@pytest.mark.parametrize("path", [ROOT / "README.md", *CARDS], ids=lambda path: path.parent.name)
def test_every_published_table_is_what_its_report_says(path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("<!-- pic-rag report ") == text.count("<!-- end of report -->") >= 1
    assert updated(path) == text


def test_a_table_shows_the_columns_and_rows_asked_for_in_that_order() -> None:
    assert report_table(REPORT, ("system", "ratio", "f1", "agreement", "prompt"), ("pic:16", "text")) == (
        "| system | ratio |   F1 | agreement | prompt tokens |\n"
        "| ------ | ----: | ---: | --------: | ------------: |\n"
        "| pic    |    16 |  5.0 |       0.0 |            15 |\n"
        "| text   |       | 16.7 |           |               |\n"
    )
    assert report_table(REPORT, ("reads", "too_long"), ("pic:4",)).splitlines()[2].split("|")[1:3] == [
        " memories of the compressor, ratio 4 ",
        "        1 ",
    ]
    assert set(DEFAULT_COLUMNS) < set(COLUMNS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ["f2"]}, "columns must be some of reads, system, .* got 'f2'"),
        ({"rows": ["pic"]}, "rows must be some of text, pic:4, pic:16, got 'pic'"),
    ],
)
def test_an_unknown_column_or_row_is_refused_by_name(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        report_table(REPORT, **options)


def test_the_command_prints_a_table_and_renews_those_of_markdown_files(tmp_path, capsys) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "report.json").write_text(json.dumps(REPORT))
    command = ["report", str(tmp_path / "json" / "report.json"), "--columns", "system,f1", "--rows", "pic:4"]
    assert main(command) == 0
    table = capsys.readouterr().out
    assert table == report_table(REPORT, ("system", "f1"), ("pic:4",))
    marker = "<!-- pic-rag report json/report.json --columns system,f1 --rows pic:4 -->"
    page = f"# Ours\n{marker}\n{{}}<!-- end of report -->\n?\n"
    (tmp_path / "a.md").write_text(page.format("| old | 99.9 |\n") + page.format(""))
    assert main(["report", "--update", str(tmp_path / "a.md")]) == 0
    assert (tmp_path / "a.md").read_text() == page.format(table) * 2
    assert capsys.readouterr().out == f"{tmp_path / 'a.md'}\n"


def test_a_table_without_an_end_is_named_and_nothing_is_lost(tmp_path, capsys) -> None:
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    marker = "<!-- pic-rag report report.json -->"
    for page in (f"{marker}\nMine.\n{marker}\n<!-- end of report -->\n", f"{marker}\nMine.\n", "No table.\n"):
        (tmp_path / "a.md").write_text(page)
        assert main(["report", "--update", str(tmp_path / "a.md")]) == 1
        assert "a.md: " in capsys.readouterr().err
        assert (tmp_path / "a.md").read_text() == page


def test_a_file_that_is_not_utf_8_is_named(tmp_path, capsys) -> None:
    (tmp_path / "a.md").write_bytes(b"\xff\xfe")
    assert main(["report", "--update", str(tmp_path / "a.md")]) == 1
    assert "a.md: 'utf-8' codec can't decode" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "wrong"),
    [("--columsn f1", "unrecognized arguments: --columsn f1"), ("--rows 'text", "No closing quotation")],
)
def test_wrong_options_above_a_table_are_named_with_their_file(tmp_path, capsys, options, wrong) -> None:
    (tmp_path / "a.md").write_text(f"<!-- pic-rag report report.json {options} -->\n<!-- end of report -->\n")
    assert main(["report", "--update", str(tmp_path / "a.md")]) == 1
    error = capsys.readouterr().err
    assert "a.md: A table's marker must hold FILE, --columns and --rows, got " in error
    assert wrong in error


def test_the_ends_of_lines_stay_what_they_were(tmp_path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    page = b"A\r\n<!-- pic-rag report report.json --columns f1 --rows text -->\r\n<!-- end of report -->\r\n"
    (tmp_path / "a.md").write_bytes(page)
    assert main(["report", "--update", str(tmp_path / "a.md")]) == 0
    assert (tmp_path / "a.md").read_bytes().count(b"\r\n") == (tmp_path / "a.md").read_bytes().count(b"\n") == 6


@pytest.mark.parametrize(
    ("name", "columns"), [("benchmark_cpu", "cache"), ("evaluation_fidelity", "floor"), ("evaluation_at_rest", "bytes")]
)
def test_each_kind_of_report_has_columns_of_its_own(name, columns, capsys) -> None:
    path = CARDS[0].with_name(f"{name}.json")
    assert main(["report", str(path)]) == 0
    assert COLUMNS[columns][0] in capsys.readouterr().out


def test_a_column_that_the_report_does_not_have_is_named() -> None:
    with pytest.raises(ValueError, match="columns must be in the report, got 'single_f1', whose rows lack 'single_f1'"):
        report_table(REPORT, ("system", "single_f1"))


def test_a_file_that_is_no_report_is_named(tmp_path, capsys) -> None:
    (tmp_path / "x.json").write_text("[]")
    assert main(["report", str(tmp_path / "x.json")]) == 1
    shown = capsys.readouterr().err
    assert "x.json must be a report of `pic-rag eval --json` or `pic-rag bench`, got JSON without rows. Name " in shown
    (tmp_path / "x.json").write_text("rows")
    assert main(["report", str(tmp_path / "x.json")]) == 1
    assert "x.json must be a report of `pic-rag eval --json` or `pic-rag bench`, got no JSON" in capsys.readouterr().err
