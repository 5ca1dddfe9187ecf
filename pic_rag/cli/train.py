"""`pic-rag train`: a training run from its configuration file."""

from __future__ import annotations

import argparse

from pic_rag.cli.console import calm_libraries
from pic_rag.cli.options import Commands, add_command, minutes, progress, show_bars
from pic_rag.training.config import CONFIGS, TrainConfig, find_config


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "train",
        help="train a compressor",
        description="Run a training configuration to its end, from its last checkpoint if there is one, and print the "
        "folder of the compressor. On several devices: accelerate launch -m pic_rag train CONFIG.",
    )
    shipped = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
    parser.add_argument("config", metavar="CONFIG", help=f"YAML file of the run, or a shipped one: {shipped}")
    parser.add_argument("--minutes", type=minutes, metavar="M", help="stop after M minutes, to be resumed later")
    parser.add_argument(
        "--finish", action="store_true", help="end the run within --minutes: cut or extend its last stages to fit"
    )
    parser.add_argument("--out", metavar="DIR", help="folder of the run, in place of the configuration's")
    parser.set_defaults(run=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Train."""
    if args.finish and args.minutes is None:
        args.usage_error("--finish must come with --minutes, the time there is")
    from accelerate import PartialState

    from pic_rag.training.guards import sigterm_interrupts
    from pic_rag.training.loop import train

    overrides = {} if args.out is None else {"out": args.out}
    config = TrainConfig.load(find_config(args.config), **overrides)
    calm_libraries(bars=show_bars(args))
    with sigterm_interrupts():
        folder = train(config, minutes=args.minutes, finish=args.finish, progress=progress(args))
    if PartialState().is_main_process:
        print(folder)
    return 0
