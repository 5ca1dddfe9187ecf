"""The compressor that a process shares. Importing this file loads no torch; asking for the compressor does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pic_rag.models.sharing import loading_key, share

if TYPE_CHECKING:
    from pic_rag.compression.compressor import Compressor


def shared_compressor(
    name_or_path: str | Path | None = None,
    **loading: Any,  # noqa: ANN401 - from_pretrained's arguments
) -> Compressor:
    """The process's compressor of that name and loading; loaded by the first who asks. Thread safe.

    Args:
        name_or_path: as for `Compressor.from_pretrained`.
        **loading: likewise.
    """
    from pic_rag.compression.compressor import Compressor

    key = ("compressor", loading_key(name_or_path, loading))
    return share(key, lambda: Compressor.from_pretrained(name_or_path, **loading))
