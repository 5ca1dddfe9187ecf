"""`pic-rag inspect`: pictures of the PIC mask and of where memory tokens attend."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pic_rag.cli.options import (
    Commands,
    add_command,
    add_model_options,
    add_ratio,
    load_compressor,
    named_path,
    positive,
)
from pic_rag.config import PRESETS, PicConfig
from pic_rag.reporting import require_matplotlib

if TYPE_CHECKING:
    from pic_rag.compression.compressor import Compressor

_RENDERED_PLACES = 64  # wider text than that does not fit a terminal
_EXAMPLE_CHUNKS = 2


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "inspect",
        help="draw the mask and where memory tokens attend",
        description="Print the PIC mask of a text's beginning, and write mask.png and attention.png for its first "
        "segment. Needs matplotlib: pip install 'pic-rag[plot]'.",
    )
    parser.add_argument("text", metavar="TEXT", help="a text, or a file that can be asked about")
    parser.add_argument("--out-dir", type=named_path, default=Path("."), metavar="DIR", help="where the pictures go")
    add_ratio(parser)
    parser.add_argument("--tokens", type=positive, metavar="N", help="show the first N tokens only")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="draw this preset's mask, not the compressor's")
    parser.add_argument("--layers", type=positive, default=4, metavar="N", help="heat map of the last N layers")
    parser.add_argument("--per-layer", action="store_true", help="a panel for each layer in place of their mean")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Draw both."""
    from pic_rag.inspection import draw_attention, draw_mask, mask_pattern, slot_attention

    require_matplotlib()
    text = read(args.text)
    compressor = load_compressor(args, attn_implementation="eager")
    config = _config(compressor, args.preset)
    pattern = mask_pattern(text, compressor.tokenizer, config, args.ratio, max_tokens=args.tokens)
    mask = draw_mask(pattern)
    attention = slot_attention(compressor, text, args.ratio, max_tokens=args.tokens)
    heat = draw_attention(attention, layers=args.layers, per_layer=args.per_layer)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    paths = {"mask": args.out_dir / "mask.png", "attention": args.out_dir / "attention.png"}
    mask.savefig(paths["mask"])
    heat.savefig(paths["attention"])
    print(_render(text, compressor, config, args.ratio, args.tokens), end="\n\n")
    print("\n".join(f"{name}: {path}" for name, path in paths.items()))
    return 0


def read(text: str) -> str:
    """The text itself, or what is in the file of that name; a word that ends as files do has to be one's name."""
    from pic_rag.retrieval.documents import SUFFIXES, load_documents

    if os.path.isdir(text):
        raise ValueError(f"TEXT must be a text or a file, got the folder {text!r}. Name one of its files.")
    named = len(text.split()) == 1 and text.lower().endswith(SUFFIXES)
    if named or os.path.exists(text):
        return load_documents(text, on_error="raise", progress=False).documents[0].text
    return text


def _config(compressor: Compressor, preset: str | None) -> PicConfig:
    if preset is None:
        return compressor.config
    return PicConfig.from_dict({**compressor.config.to_dict(), **PRESETS[preset]})


def _render(text: str, compressor: Compressor, config: PicConfig, ratio: int | None, tokens: int | None) -> str:
    """The mask of the first chunks where they fit a line, else the same rule on smaller chunks."""
    from dataclasses import replace

    from pic_rag.inspection import mask_pattern, render_mask

    wanted = _EXAMPLE_CHUNKS * config.slots_per_chunk * config.check_ratio(ratio)
    shown = min(tokens or wanted, wanted)
    pattern = mask_pattern(text, compressor.tokenizer, config, ratio, max_tokens=shown)
    note = ""
    if len(pattern.labels) > _RENDERED_PLACES:
        config = replace(config, ratio=4, ratios=(4,), slots_per_chunk=2)
        pattern = mask_pattern(text, compressor.tokenizer, config, max_tokens=8 * _EXAMPLE_CHUNKS)
        note = " (chunks made small to fit)"
    return f"{pattern.title}{note}\n\n{render_mask(pattern)}"
