"""A study: arms are trained and measured, a killed one ends as if it had not been, and files alone give the report."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator

from pic_rag.cli import main
from pic_rag.config import PRESETS
from pic_rag.study.config import CONFIGS, StudyConfig
from pic_rag.study.records import best, read_bounds, read_results, read_run
from pic_rag.study.report import render, write_report
from pic_rag.study.runner import run_study
from pic_rag.study.watch import Watch
from pic_rag.training.loop import Trainer


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, tiny_model, tiny_tokenizer) -> StudyConfig:
    """The shipped smoke study on a tiny model."""
    base = tmp_path_factory.mktemp("base")
    copy.deepcopy(tiny_model).save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    study = StudyConfig.load("smoke")
    tiny = {"base_model": str(base), "precision": "fp32", "text_tokens": [16, 48], "workers": 0}
    tiny |= {"checkpoint_minutes": 0.0}  # after every step
    context = {"title": "Harbour", "text": "The bell of the harbour rang at noon, and nobody was there."}
    line = {"question": "When did the bell ring?", "answers": ["at noon"], "contexts": [context]}
    (base / "q.jsonl").write_text(f"{json.dumps(line)}\n" * 3)
    few = dataclasses.replace(study.measured, data=str(base / "q.jsonl"), limit=2, max_new_tokens=2)
    return dataclasses.replace(study, train={**study.train, **tiny}, measured=few)


@pytest.fixture(scope="module")
def folder(smoke, tmp_path_factory) -> Path:
    """The folder of the finished smoke study."""
    folder = tmp_path_factory.mktemp("study")
    assert run_study(smoke, folder, progress=False)
    return folder


def measured(folder: Path) -> dict[str, list[dict]]:
    """Every metrics file without its seconds, which no two runs share."""
    files = sorted((folder / "metrics").iterdir())
    lines = {file.name: [json.loads(line) for line in file.read_text().splitlines()] for file in files}
    return {name: [{**line, "seconds": 0} for line in own] for name, own in lines.items()}


def test_a_study_without_bounds_measures_its_arms_alone(smoke, tmp_path) -> None:
    measured = dataclasses.replace(smoke.measured, bounds=())
    study = dataclasses.replace(smoke, arms={"pic": {}}, measured=measured, reference=None)
    assert run_study(study, tmp_path, progress=False)
    results = read_results(tmp_path)
    assert results.runs["pic"][0].finished
    assert results.bounds == []
    assert "pic" in render(results)


def test_every_arm_is_measured_at_every_ratio_when_it_is_due(folder, smoke) -> None:
    results = read_results(folder)
    assert list(results.runs) == ["pic", "global"]
    for [run] in results.runs.values():
        assert run.finished
        assert [(line["step"], line["ratio"]) for line in run.losses] == [(s, r) for s in (0, 2, 4) for r in (4, 16)]
        assert [(line["step"], line["system"], line["ratio"]) for line in run.answers] == [
            (step, *system) for step in (2, 4) for system in (("pic", 4), ("pic", 16), ("text+reader", None))
        ]
        assert {line["n"] for line in run.answers} == {2}
        assert all(line["loss"] > 0 and line["kl"] > 0 and line["text_loss"] > 0 for line in run.losses)
        assert all(0 <= line["text_accuracy"] <= 1 for line in run.losses)
        seconds = [seconds for _, seconds, _ in run.curve("loss", 4)]
        assert seconds == sorted(seconds)
    assert [(line["system"], line["ratio"]) for line in results.bounds] == [
        ("text", None), ("none", None), ("truncate", 4), ("truncate", 16),
    ]  # fmt: skip
    one, other = (results.runs[arm][0].curve("loss", 16)[-1][2] for arm in ("pic", "global"))
    assert one != other


def test_arms_differ_in_what_they_change_and_in_nothing_else(smoke, tmp_path) -> None:
    pic, other = (smoke.training(arm, 3, tmp_path).to_dict() for arm in ("pic", "global"))
    assert (pic["seed"], other["seed"]) == (3, 3)
    changed = {name for name in pic if pic[name] != other[name]}
    assert changed == {"out", "pic"}
    assert {name for name in pic["pic"] if pic["pic"][name] != other["pic"][name]} == {"memory_scope", "positions"}
    assert {name: other["pic"][name] for name in PRESETS["global"]} == PRESETS["global"]


def test_a_finished_study_is_not_trained_again(folder, smoke, monkeypatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "study.yaml"}
    monkeypatch.setattr(Trainer, "run", lambda *_: pytest.fail("trained again"))
    assert run_study(smoke, folder, progress=False)
    assert {path: path.stat().st_mtime_ns for path in before} == before | {
        folder / "runs" / ".gitignore": (folder / "runs" / ".gitignore").stat().st_mtime_ns
    }


def test_arms_trained_by_different_processes_make_one_study(folder, smoke, tmp_path) -> None:
    assert run_study(smoke, tmp_path, arms=["global"], progress=False)
    assert [file.name for file in sorted((tmp_path / "metrics").iterdir())] == ["global-0.jsonl"]
    assert run_study(smoke, tmp_path, arms=["pic"], progress=False)
    assert measured(tmp_path) == measured(folder)
    assert (tmp_path / "study.yaml").read_text() == (folder / "study.yaml").read_text()
    for arms, got in [(["locl"], "'locl'"), ([], "none")]:
        with pytest.raises(ValueError, match=f"arms must be some of pic, global, got {got}"):
            run_study(smoke, tmp_path, arms=arms)


@pytest.fixture
def half_done(folder, tmp_path) -> Path:
    """A folder in which the first arm is finished and the second has not begun."""
    (tmp_path / "metrics").mkdir()
    for name in ("pic-0.jsonl", "bounds.jsonl"):
        shutil.copy(folder / "metrics" / name, tmp_path / "metrics" / name)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("killed_at", "death"), [(0, KeyboardInterrupt), (2, KeyboardInterrupt), (2, MemoryError), (4, MemoryError)]
)
def test_a_killed_study_ends_as_if_it_had_not_been(folder, smoke, half_done, monkeypatch, killed_at, death) -> None:
    measure = Watch.__call__

    def measure_and_die(watch: Watch, trainer: Trainer) -> None:
        measure(watch, trainer)
        if trainer.step == killed_at:
            raise death

    monkeypatch.setattr(Watch, "__call__", measure_and_die)
    with pytest.raises(death):
        run_study(smoke, half_done, progress=False)
    monkeypatch.undo()
    assert measured(half_done) != measured(folder) or killed_at == 4  # where all was written but the last checkpoint
    assert run_study(smoke, half_done, progress=False)
    assert measured(half_done) == measured(folder)


def test_a_study_that_runs_out_of_time_goes_on_where_it_stopped(folder, smoke, half_done) -> None:
    calls = 0
    while not run_study(smoke, half_done, minutes=0.001, progress=False):  # a step, or the rest of the arm
        calls += 1
        assert calls < 20
    assert calls
    assert measured(half_done) == measured(folder)


def test_measurements_that_were_cut_are_made_again(folder, smoke, tmp_path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "metrics").iterdir():
        path.write_bytes(path.read_bytes()[: -5 if path.name == "global-0.jsonl" else None])
    assert "1 of 2 runs are finished" in write_report(tmp_path)[0].read_text()
    assert run_study(smoke, tmp_path, progress=False)
    assert measured(tmp_path) == measured(folder)
    path = tmp_path / "metrics" / "pic-0.jsonl"
    path.write_text(path.read_text().replace("\n", "\n?\n", 1))
    with pytest.raises(ValueError, match=r"pic-0\.jsonl must hold a JSON object in every line, got line 2"):
        write_report(tmp_path)


def test_bounds_appear_whole(smoke, tmp_path, monkeypatch) -> None:
    write = Path.write_text

    def write_half_of_bounds(path: Path, text: str, **options) -> None:
        whole = not path.name.startswith("bounds")
        write(path, text if whole else text[: len(text) // 2], **options)
        if not whole:
            raise MemoryError

    monkeypatch.setattr(Path, "write_text", write_half_of_bounds)
    with pytest.raises(MemoryError):
        run_study(smoke, tmp_path, progress=False)
    assert not (tmp_path / "metrics" / "bounds.jsonl").exists()


def test_bounds_are_measured_again_when_what_is_measured_changed_and_only_then(
    folder, smoke, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(Trainer, "run", lambda *_: None)
    bounds = tmp_path / "metrics" / "bounds.jsonl"
    bounds.parent.mkdir()
    shutil.copy(folder / "metrics" / bounds.name, bounds)
    written = bounds.stat().st_ino

    def measure(**changed) -> list[tuple[str, int]]:
        measured = dataclasses.replace(smoke.measured, **changed)
        run_study(dataclasses.replace(smoke, measured=measured), tmp_path, arms=["pic"], progress=False)
        (tmp_path / "metrics" / "pic-0.jsonl").unlink()
        return [(line["system"], line["n"]) for line in read_bounds(bounds)[1]]

    assert measure() == [(system, 2) for system in ("text", "none", "truncate", "truncate")]
    assert bounds.stat().st_ino == written
    assert measure(limit=1, bounds=("none",)) == [("none", 1)]
    assert measure(bounds=()) == []


def test_bounds_of_an_older_version_are_read_without_a_head(folder, tmp_path) -> None:
    head, answers = read_bounds(folder / "metrics" / "bounds.jsonl")
    (tmp_path / "bounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    assert head
    assert read_bounds(tmp_path / "bounds.jsonl") == ({}, answers)


def test_a_run_made_with_another_configuration_is_refused_and_nothing_written(folder, smoke, tmp_path) -> None:
    shutil.copytree(folder / "metrics", tmp_path / "metrics")
    other = dataclasses.replace(smoke, train={**smoke.train, "learning_rate": 1.0})
    with pytest.raises(ValueError, match=r"pic-0\.jsonl must have the study's config, got another learning_rate"):
        run_study(other, tmp_path, progress=False)
    other = dataclasses.replace(smoke, measured=dataclasses.replace(smoke.measured, limit=3))
    with pytest.raises(ValueError, match="must have the study's measured, got another limit"):
        run_study(other, tmp_path, arms=["global"], progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics"]


def test_the_report_is_made_of_the_files_alone(folder, tmp_path, capsys) -> None:
    for name in ("study.yaml", "metrics"):
        copy_ = shutil.copytree if (folder / name).is_dir() else shutil.copy
        copy_(folder / name, tmp_path / name)
    assert sum(path.stat().st_size for path in (tmp_path / "metrics").iterdir()) < 20_000
    assert main(["study", "--report", str(tmp_path)]) == 0
    paths = [tmp_path / name for name in ("report.md", "curves.png", "quality.png")]
    assert capsys.readouterr().out.split() == list(map(str, paths))
    written = [path.read_bytes() for path in paths]
    assert all(picture.startswith(b"\x89PNG") for picture in written[1:])
    assert [path.read_bytes() for path in write_report(tmp_path)] == written
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in written[0].decode().splitlines()]
    [run] = read_results(folder).runs["global"]
    last = next(line for line in run.final("pic") if line["ratio"] == 16)
    answers = next(row for row in rows if row[:2] == ["global", "16"])
    assert answers[2:6] == [f"{100 * last[name]:.1f}" for name in ("f1", "em", "contains_answer", "agreement")]
    kl, kept = (run.curve(name, 16)[-1][2] for name in ("kl", "text_accuracy"))
    assert answers[6:] == [f"{kl:.3f}", f"{100 * kept:.1f}", "1"]
    assert "2 of 2 runs are finished" in written[0].decode()
    curve = run.curve("text_loss", 16)
    assert ["arm", "ratio", *(str(step) for step, *_ in curve)] in rows
    assert ["global", "16", *(f"{loss:.3f}" for *_, loss in curve)] in rows


def test_the_report_needs_no_model(folder) -> None:
    import subprocess

    script = (
        "import sys; from pic_rag.study.report import render, write_report; write_report(sys.argv[1]); "
        "print(sorted({'torch', 'transformers', 'pic_rag.generation.generator'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _write_study(folder: Path, curves: dict[str, dict[int, list[tuple[int, float, float]]]]) -> None:
    """A study at ratio 16 whose runs had these steps, losses and F1 scores, ten steps a second."""
    study = StudyConfig.from_dict(
        {
            "base": "smoke",
            "arms": dict.fromkeys(curves, {}),
            "seeds": list(next(iter(curves.values()))),
            "reference": "global",
            "measured": {"data": "q.jsonl", "every": 20, "offset": 10, "ratios": [16]},
        }
    )
    (folder / "metrics").mkdir()
    (folder / "study.yaml").write_text(yaml.safe_dump(study.to_dict()))
    for arm, seeds in curves.items():
        for seed, points in seeds.items():
            lines = [{"arm": arm, "seed": seed, "steps": 300, "config": {}, "versions": {"device": "abacus"}}]
            for step, loss, f1 in points:
                at = {"step": step, "seconds": step / 10, "ratio": 16}
                scores = dict.fromkeys(("em", "contains_answer", "agreement"), 0.5)
                texts = {"text_loss": loss, "text_accuracy": loss / 10}
                lines += [at | {"loss": loss, "kl": loss / 2, "accuracy": 0.1} | texts]
                lines += [at | {"system": "pic", "n": 10, "f1": f1, **scores}]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / "metrics" / f"{arm}-{seed}.jsonl").write_text(text)


def test_the_race_counts_steps_to_the_references_best_score_of_the_same_seed(tmp_path) -> None:
    _write_study(
        tmp_path,
        {
            "pic": {
                0: [(100, 3.0, 0.1), (200, 1.9, 0.4), (300, 1.5, 0.5)],
                1: [(100, 2.1, 0.3), (200, 2.0, 0.3), (300, 1.7, 0.3)],
            },
            "global": {
                0: [(100, 4.0, 0.1), (200, 3.0, 0.2), (300, 2.0, 0.3)],
                1: [(100, 4.0, 0.1), (200, 2.2, 0.4), (300, 2.3, 0.2)],
            },
        },
    )
    report = write_report(tmp_path)[0].read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines()]
    race = {row[0]: row[2:] for row in rows if len(row) == 10 and row[1] == "16"}
    # Seed 0: pic is as good as global's 2.0 after 200 of its 300 steps; seed 1: as good as 2.2 after 100 of its 200.
    assert race["pic"][:4] == ["1.600 ± 0.141", "150 ± 71", "15 ± 7", "58 ± 12 %"]
    assert race["pic"][4:] == ["40.0 ± 14.1", "1 of 2 seeds", "", ""]
    assert race["global"][:4] == ["2.100 ± 0.141", "250 ± 71", "25 ± 7", "100 ± 0 %"]
    answers = {row[0]: row[1:] for row in rows if len(row) == 9 and row[1] == "16"}
    assert answers["pic"] == ["16", "40.0 ± 14.1", *["50.0 ± 0.0"] * 3, "0.800 ± 0.071", "16.0 ± 1.4", "2"]
    assert "mean ± standard deviation over seeds 0, 1" in report
    assert "`--data q.jsonl --every 20 --offset 10`" in report


def test_runs_that_are_not_finished_are_left_out_of_the_tables_and_counted(tmp_path) -> None:
    _write_study(tmp_path, {"pic": {0: [(300, 1.0, 0.5)]}, "global": {0: [(100, 2.0, 0.1)]}})
    report = write_report(tmp_path)[0].read_text()
    assert "1 of 2 runs are finished" in report
    assert not [line for line in report.splitlines() if line.startswith("| global") and "| 16 |" in line]
    (tmp_path / "metrics" / "global-0.jsonl").unlink()
    assert not read_run(tmp_path / "metrics" / "global-0.jsonl").finished
    assert "1 of 2 runs are finished" in write_report(tmp_path)[0].read_text()
    (tmp_path / "metrics" / "pic-0.jsonl").unlink()
    assert "0 of 2 runs are finished" in write_report(tmp_path)[0].read_text()


def test_the_best_value_of_a_curve_is_its_lowest_loss_or_its_highest_score() -> None:
    curve = [(1, 0.1, 3.0), (2, 0.2, 1.0), (3, 0.3, 2.0)]
    assert (best(curve, rising=False), best(curve, rising=True)) == (1.0, 3.0)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_study_is_a_study_of_valid_runs(path, tmp_path) -> None:
    study = StudyConfig.load(path.stem)
    assert study == StudyConfig.from_dict(yaml.safe_load(yaml.safe_dump(study.to_dict())))
    assert study.reference in study.arms
    runs = {(arm, seed): study.training(arm, seed, tmp_path) for arm, seed in study.runs}
    assert len({config.out for config in runs.values()}) == len(runs)
    assert {config.steps for config in runs.values()} == {next(iter(runs.values())).steps}
    trained = {run: {**config.to_dict(), "out": None} for run, config in runs.items()}
    assert len({json.dumps(config, sort_keys=True) for config in trained.values()}) == len(runs)  # none twice
    assert Path(study.measured.data).name not in " ".join(next(iter(runs.values())).questions) or path.stem == "smoke"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arms": {}}, "arms must be a mapping of names to changed fields, got {}"),
        ({"arms": {"a/b": {}}}, r"arms must have names of letters, digits .* got 'a/b'"),
        ({"arms": {"a": 3}}, "a must be a mapping of training fields, got 3"),
        ({"arms": {"a": {"seed": 1}}}, "a must leave seed to the study, got 1"),
        ({"arms": {"a": {"pic": [1]}}}, r"pic of a must be a mapping of PicConfig's fields, got \[1\]"),
        ({"seeds": [1, 1]}, r"seeds must be different whole numbers, got \(1, 1\)"),
        ({"seeds": 3}, "seeds must be a list of whole numbers, got 3"),
        ({"measured": {"data": "q", "ratios": 4}}, "ratios must be a list of whole numbers, got 4"),
        ({"measured": {"data": "q", "ratios": []}}, "ratios must hold at least one ratio, got none"),
        ({"reference": "b"}, "reference must be one of a, got 'b'"),
        ({"measured": {"data": "q", "loss_steps": 0}}, "loss_steps must be a whole number of 1 or more, got 0"),
        ({"measured": {}}, "A study configuration must set 'data'"),
        ({"measured": None}, "measured must be a mapping with the question file as data, got None"),
        ({"arm": {}}, "Unknown study field 'arm'"),
        ({"base": None}, "A study configuration must set 'base'"),
    ],
)
def test_a_study_that_breaks_a_rule_is_refused_by_name(fields, message) -> None:
    values = {"base": "smoke", "arms": {"a": None}, "measured": {"data": "q"}}
    with pytest.raises(ValueError, match=message):
        StudyConfig.from_dict({**values, **fields})


@pytest.mark.parametrize("together", [True, False], ids=["together", "each by itself"])
def test_a_study_under_a_launcher_is_refused(smoke, tmp_path, monkeypatch, together) -> None:
    if together:
        monkeypatch.setattr(Accelerator, "num_processes", 2)
    else:
        monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="A study must run in one process, got 2 launched .* different --arms"):
        run_study(smoke, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_question_without_a_document_is_refused_by_name(smoke, tmp_path) -> None:
    line = {"id": "q7", "question": "When did the bell ring?", "answers": ["at noon"], "contexts": []}
    (tmp_path / "q.jsonl").write_text(json.dumps(line))
    study = dataclasses.replace(smoke, measured=dataclasses.replace(smoke.measured, data=str(tmp_path / "q.jsonl")))
    with pytest.raises(ValueError, match="contexts must hold a document with text, got none of question 'q7'"):
        run_study(study, tmp_path / "study", progress=False)


def test_a_file_that_is_not_utf_8_is_named(tmp_path) -> None:
    (tmp_path / "study.yaml").write_bytes(b'base: "\xff"')
    with pytest.raises(ValueError, match=r"study\.yaml must be UTF-8, got: .* Convert the file"):
        StudyConfig.load(tmp_path / "study.yaml")


@pytest.mark.parametrize("option", ["--arms=pic", "--minutes=1", "--out=elsewhere"])
def test_options_that_a_report_would_not_heed_are_refused(option, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["study", "--report", "runs/smoke", option])
    assert f"leave {option.partition('=')[0]} out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pic": {"ratios": [4, 8]}}, "ratio must be one of 4, 8 .* got 16"),
        ({"questions": {5: 1.0}}, "questions must be a mapping of files to weights, got {5: 1.0}"),
    ],
)
def test_an_arm_that_cannot_be_measured_or_trained_is_refused_before_training(
    smoke, tmp_path, changed, message
) -> None:
    study = dataclasses.replace(smoke, arms={"few": changed}, reference=None)
    with pytest.raises(ValueError, match=message):
        run_study(study, tmp_path, progress=False)
    assert not (tmp_path / "runs").exists()
