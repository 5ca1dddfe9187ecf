"""The generator that a process shares. Importing this file loads no torch; asking for the generator does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pic_rag.models.sharing import loading_key, share

if TYPE_CHECKING:
    from pic_rag.generation.generator import Generator
    from pic_rag.models.checkpoint import Checkpoint


def shared_generator(
    checkpoint: Checkpoint,
    name_or_path: str | Path | None = None,
    **loading: Any,  # noqa: ANN401 - from_checkpoint's arguments
) -> Generator:
    """The process's generator that reads a compressor's memories; loaded by the first who asks. Thread safe.

    Args:
        checkpoint: the compressor's: `shared_checkpoint(name)`, or `compressor.checkpoint`.
        name_or_path: where the generator is, when it is not where the checkpoint says.
        **loading: as for `Generator.from_checkpoint`.

    Raises:
        ValueError: when the model found there is another than the memories are made for.
    """
    from pic_rag.generation.generator import Generator

    key = ("generator", checkpoint.generator, checkpoint.reader, loading_key(name_or_path, loading))
    return share(key, lambda: Generator.from_checkpoint(checkpoint, name_or_path, **loading))
