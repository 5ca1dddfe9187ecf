"""`pic-rag bench`: what memories cost and save on this machine, beside full text and LLMLingua."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path

from pic_rag.benchmark.suite import SUITES, SYSTEMS, Suite
from pic_rag.cli.options import (
    Commands,
    add_command,
    add_model_options,
    load_compressor,
    minutes,
    names,
    new_folder,
    positive,
    progress,
)
from pic_rag.reporting import require_matplotlib


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "bench",
        help="time memories against full text and LLMLingua",
        description="Time compressing, first token and whole answer for contexts of several lengths, at several "
        "ratios, from memories, full text, cut text and text shortened by LLMLingua; print tables, and write "
        "report.json, report.md and report.png. Needs matplotlib: pip install 'pic-rag[plot]'.",
    )
    parser.add_argument("--suite", choices=sorted(SUITES), help="what is measured (default: by the device)")
    parser.add_argument("--out", type=new_folder, default=Path("bench"), metavar="FOLDER", help="of the report (bench)")
    parser.add_argument("--minutes", type=minutes, metavar="M", help="begin nothing more after M minutes")
    grid = parser.add_argument_group("in place of what the suite says")
    for name in ("contexts", "ratios", "batch_sizes"):
        grid.add_argument(_option(name), type=_numbers, metavar="N,M", help=_help(name))
    grid.add_argument("--systems", type=names, metavar="A,B", help=f"of {', '.join(SYSTEMS)}")
    for name in ("repeats", "new_tokens", "document_tokens", "compress_tokens", "most_tokens", "lingua_tokens"):
        grid.add_argument(_option(name), type=positive, metavar="N", help=_help(name))
    grid.add_argument("--patience-s", type=minutes, metavar="S", help=_help("patience_s"))
    rivals = parser.add_argument_group("LLMLingua")
    rivals.add_argument("--llmlingua", metavar="PYTHON", help="a Python that has llmlingua (PIC_RAG_LLMLINGUA_PYTHON)")
    rivals.add_argument("--llmlingua2", metavar="MODEL", help="token classifier of LLMLingua-2 (PIC_RAG_LLMLINGUA2)")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, write, print."""
    require_matplotlib()
    compressor = load_compressor(args)
    from pic_rag.benchmark.runner import benchmark
    from pic_rag.evaluation.systems import Systems

    systems = Systems(
        compressor,
        device=args.device,
        dtype=args.dtype,
        llmlingua_python=args.llmlingua,
        llmlingua2=args.llmlingua2,
    )
    given = {field.name: value for field in fields(Suite) if (value := getattr(args, field.name)) is not None}
    suite = SUITES[args.suite or ("gpu" if compressor.device.type == "cuda" else "cpu")]
    report = benchmark(systems, replace(suite, **given), minutes=args.minutes, progress=progress(args))
    print(report.to_markdown(), end="")
    report.save(args.out)
    return 0


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _help(name: str) -> str:
    return str(next(field.metadata["help"] for field in fields(Suite) if field.name == name))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(positive(number) for number in names(text))
