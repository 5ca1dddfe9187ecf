"""Source texts by handle, kept beside the memories: how a prompt gets its text back when only its handles are left.

A text is about 1 % of its memory at 4x, so keeping both costs little. It is kept behind its own hash: what the store
spoils is not there, and never another text.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence

from pic_rag import MemoryStore

logger = logging.getLogger(__name__)

_HASH_BYTES = 16


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
        """Texts of the handles that the store knows; one that is damaged is a warning."""
        wanted = list(dict.fromkeys(handles))
        values = self.store.mget([self._key(handle) for handle in wanted]) if wanted else []
        found = {handle: value for handle, value in zip(wanted, values, strict=True) if value is not None}
        whole = {handle: value for handle, value in found.items() if _is_whole(value)}
        for handle in found.keys() - whole.keys():
            logger.warning("The source text of %s is damaged in the store: compress its document again.", handle)
        return {handle: value[_HASH_BYTES:].decode("utf-8") for handle, value in whole.items()}

    def put(self, texts: Mapping[str, str]) -> None:
        """Write texts that are not there yet. A store that refuses is one warning: the answer is not lost."""
        keys = [self._key(handle) for handle in texts]
        try:
            known = self.store.mget(keys)
            pairs = zip(keys, texts.values(), known, strict=True)
            if missing := [(key, _hashed(text)) for key, text, value in pairs if value is None or not _is_whole(value)]:
                self.store.mset(missing)
        except Exception as error:  # a store of another library raises what it likes
            logger.warning("Source texts could not be kept, so their handles cannot be restored from it: %s", error)

    def _key(self, handle: str) -> str:
        return f"{self.namespace}/text/{handle.removeprefix('[[pic:').removesuffix(']]')}"


def _hashed(text: str) -> bytes:
    """A text as it is kept."""
    encoded = text.encode("utf-8")
    return _hash(encoded) + encoded


def _is_whole(value: bytes) -> bool:
    return value[:_HASH_BYTES] == _hash(value[_HASH_BYTES:])


def _hash(encoded: bytes) -> bytes:
    return hashlib.blake2b(encoded, digest_size=_HASH_BYTES).digest()
