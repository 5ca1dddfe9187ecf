"""`pic-rag train`: a training run from its configuration file."""

from __future__ import annotations

import argparse
from pathlib import Path

from pic_rag.cli.console import calm_libraries
from pic_rag.cli.options import Commands, add_command, progress, show_bars

CONFIGS = Path(__file__).parents[1] / "training" / "configs"


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
    parser.add_argument("--minutes", type=_minutes, metavar="M", help="stop after M minutes, to be resumed later")
    parser.add_argument("--out", metavar="DIR", help="folder of the run, in place of the configuration's")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train."""
    from accelerate import PartialState

    from pic_rag.training.config import TrainConfig
    from pic_rag.training.loop import train

    overrides = {} if args.out is None else {"out": args.out}
    config = TrainConfig.load(find(args.config), **overrides)
    calm_libraries(bars=show_bars(args))
    folder = train(config, minutes=args.minutes, progress=progress(args))
    if PartialState().is_main_process:
        print(folder)
    return 0


def find(config: str) -> Path:
    """The file of that name, else the shipped configuration of that name."""
    shipped = CONFIGS / f"{config}.yaml"
    return shipped if shipped.is_file() and not Path(config).is_file() else Path(config)


def _minutes(text: str) -> float:
    minutes = float(text)
    if minutes <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return minutes
