"""Source texts by handle, kept beside the memories: how a prompt gets its text back when only its handles are left.

A text is about 1 % of its memory at 4x, so keeping both costs little.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from pic_rag import MemoryStore

logger = logging.getLogger(__name__)


class SourceTexts:
    """Source texts in one namespace of a store.

    The keys are `<namespace>/text/<hex>`; memories have the compressor's fingerprint in the middle.

    Args:
        store: keys to bytes.
        namespace: a text is found only in the namespace it was put in.
    """

    def __init__(self, store: MemoryStore, namespace: str) -> None:
        self.store = store
        self.namespace = namespace

    def get(self, handles: Sequence[str]) -> dict[str, str]:
        """Texts of the handles that the store knows."""
        wanted = list(dict.fromkeys(handles))
        values = self.store.mget([self._key(handle) for handle in wanted]) if wanted else []
        return {
            handle: value.decode("utf-8") for handle, value in zip(wanted, values, strict=True) if value is not None
        }

    def put(self, texts: Mapping[str, str]) -> None:
        """Write texts that are not there yet. A store that refuses is one warning: the answer is not lost."""
        keys = [self._key(handle) for handle in texts]
        try:
            known = self.store.mget(keys)
            pairs = zip(keys, texts.values(), known, strict=True)
            if missing := [(key, text.encode("utf-8")) for key, text, value in pairs if value is None]:
                self.store.mset(missing)
        except Exception as error:  # a store of another library raises what it likes
            logger.warning("Source texts could not be kept, so their handles cannot be restored from it: %s", error)

    def _key(self, handle: str) -> str:
        return f"{self.namespace}/text/{handle.removeprefix('[[pic:').removesuffix(']]')}"
