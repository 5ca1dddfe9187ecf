"""`pic-rag study`: training configurations compared, and their tables and plots."""

from __future__ import annotations

import argparse
from pathlib import Path

from pic_rag.cli.console import calm_libraries, say
from pic_rag.cli.options import (
    Commands,
    add_command,
    minutes,
    named_path,
    names,
    progress,
    show_bars,
)
from pic_rag.reporting import require_matplotlib
from pic_rag.study.config import CONFIGS, StudyConfig


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "study",
        help="train and compare configurations",
        description="Train every arm of a study with every seed, measure it, and write report.md, curves.png and "
        "quality.png. A finished run is skipped and a cut one resumed. With --report nothing is trained: the report "
        "is made from the metrics files of FOLDER alone. Needs matplotlib: pip install 'pic-rag[plot]'.",
    )
    shipped = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("config", nargs="?", metavar="CONFIG", help=f"YAML file, or a shipped study: {shipped}")
    what.add_argument("--report", type=named_path, metavar="FOLDER", help="folder of a study; only its report is made")
    parser.add_argument(
        "--out", type=named_path, metavar="FOLDER", help="folder of the study (default: runs/ and the study's name)"
    )
    parser.add_argument(
        "--arms", type=names, metavar="A,B", help="train only these, and leave others to other machines"
    )
    parser.add_argument("--minutes", type=minutes, metavar="M", help="stop after M minutes, to be resumed later")
    parser.set_defaults(run=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Train what is not trained yet, then report."""
    _check_usage(args)
    require_matplotlib()
    folder = args.report
    if folder is None:
        from pic_rag.study.runner import run_study
        from pic_rag.training.guards import sigterm_interrupts

        folder = args.out or Path("runs", Path(args.config).stem)
        study = StudyConfig.load(args.config)
        calm_libraries(bars=show_bars(args))
        with sigterm_interrupts():
            finished = run_study(study, folder, arms=args.arms, minutes=args.minutes, progress=progress(args))
        if not finished:
            say("the study is not finished: run the same command again to resume it")
    from pic_rag.study.report import write_report

    print("\n".join(map(str, write_report(folder))))
    return 0


def _check_usage(args: argparse.Namespace) -> None:
    for name in ("out", "arms", "minutes"):
        if args.report is not None and getattr(args, name) is not None:
            args.usage_error(f"--report reads what was measured: leave --{name} out")
