"""The cache: memories in a store, under their handles.

A memory is found only by the compressor that made it and only in its own namespace: both are part of its key. What the
store loses, corrupts or refuses costs time and a warning, never an answer, as long as the text is at hand.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from pic_rag.checks import check_unicode, check_whole
from pic_rag.compression.ratios import Ratio, descend, ratio_of_each
from pic_rag.handles import format_handle, handle_digits
from pic_rag.memory import AtRest, Memory, MemoryFormatError, check_at_rest
from pic_rag.progress import progress_bar
from pic_rag.store.protocol import MemoryStore, check_store

if TYPE_CHECKING:
    from pic_rag.compression.compressor import Compressor

logger = logging.getLogger(__name__)

GROUP_DOCUMENTS = 64  # written together: what a killed process loses at most

# No slash, so that one namespace's keys never start with another's; no leading dot, for stores that keep keys as files.
_NAMESPACE_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class Found(NamedTuple):
    """What a store holds under some handles; one that is in neither is not there."""

    memories: dict[str, Memory]
    damaged: dict[str, MemoryFormatError]


@dataclass(frozen=True)
class _Way:
    """How a memory that the store lacks is made; `checking` makes the compressor check it."""

    compressor: Compressor
    batch_size: int | None
    progress: bool | None
    checking: Mapping[str, Any] = field(default_factory=dict)


class MemoryCache:
    """The memories of one compressor in one namespace of a store.

    Args:
        store: Keys to bytes; any LangChain ``ByteStore`` is one.
        fingerprint: Fingerprint of the compressor.
        namespace: Keeps tenants apart: a handle is found only in the namespace it was put in.
        at_rest: How memories are written; all ways are read.

    Raises:
        ValueError: The fingerprint is empty, or the namespace is not letters, digits, ``_``, ``-`` and ``.``.
    """

    def __init__(
        self, store: MemoryStore, fingerprint: str, *, namespace: str = "default", at_rest: AtRest = "bf16"
    ) -> None:
        """Touch nothing yet."""
        check_store(store)
        if not fingerprint:
            raise ValueError("fingerprint must not be empty, got ''. Pass the compressor's fingerprint.")
        check_at_rest(at_rest)
        if not isinstance(namespace, str) or not _NAMESPACE_PATTERN.fullmatch(namespace):
            raise ValueError(f"namespace must match {_NAMESPACE_PATTERN.pattern}, got {namespace!r}.")
        self.store = store
        self.fingerprint = fingerprint
        self.namespace = namespace
        self.at_rest: AtRest = at_rest

    def get(self, handles: Sequence[str]) -> list[Memory | None]:
        """Memories of the handles, in order; None where the store has none.

        Raises:
            MemoryFormatError: A value is corrupt, or is another memory than its key says.
            ValueError: A handle is not one.
        """
        memories, damaged = self.find(handles)
        for error in damaged.values():
            raise error
        return [memories.get(handle) for handle in handles]

    def find(self, handles: Iterable[str], sources: Mapping[str, str | None] | None = None) -> Found:
        """Memories by their handles, and by theirs what is wrong with those that are corrupt or misplaced.

        Args:
            handles: those to look up, in one request to the store.
            sources: a label of each handle, for messages and for `Memory.source`.

        Raises:
            ValueError: A handle is not one.
        """
        wanted = list(dict.fromkeys(handles))
        found = Found({}, {})
        for handle, value in zip(wanted, self.store.mget([self._key(handle) for handle in wanted]), strict=True):
            try:
                if value is not None:
                    found.memories[handle] = self._decode(value, handle, (sources or {}).get(handle))
            except MemoryFormatError as error:
                found.damaged[handle] = error
        return found

    def put(self, memories: Sequence[Memory]) -> list[int]:
        """Write memories.

        Returns:
            Bytes of each in the store.

        Raises:
            ValueError: A memory was made by another compressor, is not finite, or is larger than the store takes; none
                is written then.
        """
        pairs = self._encode(memories)
        self.store.mset(pairs)
        return [len(value) for _, value in pairs]

    def get_or_compress(
        self,
        texts: Sequence[str],
        compressor: Compressor,
        ratio: Ratio = None,
        *,
        sources: Sequence[str] | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
        min_fidelity: float | None = None,
        generator: Any = None,  # noqa: ANN401 - the cache only passes it on
    ) -> tuple[list[Memory], list[bool]]:
        """Memories of texts, compressing only those that the store does not hold.

        New memories are written after every group of `GROUP_DOCUMENTS`, so a killed process loses one group at most. A
        store that cannot be read or written is one warning, a corrupt value is compressed again, and a memory that the
        store refuses, such as one too large, is named and costs the others nothing.

        Args:
            texts: Source texts; one that occurs twice is compressed once.
            compressor: The compressor of this cache's fingerprint.
            ratio: Text tokens per memory token; the compressor's own default if None. A sequence has one for each
                text, the last of which serves all texts after it.
            sources: A label per text, for messages and for `Memory.source`.
            batch_size: Encoder rows computed at once, passed on to the compressor.
            progress: Whether to show a bar; None shows one on a terminal once it takes over a second.
            min_fidelity: As for `Compressor.compress`. Memories that were tried and found wanting are kept as well, so
                no ratio of a text is tried twice, whatever floor is asked for.
            generator: The one that checks, as for `Compressor.compress`.

        Returns:
            One memory per text, in order, and for each whether it came out of the store. A new memory is as precise as
            the compressor made it, one out of the store as precise as it was kept.

        Raises:
            TypeError: A text is not a string.
            ValueError: The compressor has another fingerprint or does not serve a ratio, `sources` has another length
                than `texts`, a text is not valid Unicode, or a number is out of range. Nothing is computed then.
        """
        self._check_request(texts, compressor, sources)
        batch_size = None if batch_size is None else check_whole("batch_size", batch_size)
        labels: Sequence[str | None] = sources if sources is not None else [None] * len(texts)
        if min_fidelity is None:
            way = _Way(compressor, batch_size, progress)
            ratios = ratio_of_each(ratio, len(texts), compressor.config.check_ratio)
            return self._at_ratios(texts, labels, ratios, way)
        # any fidelity will do here: each ratio asked for is made, checked and kept, and `descend` picks
        way = _Way(compressor, batch_size, progress, {"min_fidelity": 0.0, "generator": generator})
        cached: dict[str, bool] = {}

        def attempt(numbers: Sequence[int], ratio: int) -> list[Memory]:
            own, names = [texts[number] for number in numbers], [labels[number] for number in numbers]
            memories, known = self._at_ratios(own, names, [ratio] * len(own), way)
            cached.update(zip((memory.handle for memory in memories), known, strict=True))
            return memories

        memories = descend(ratio_of_each(ratio, len(texts), compressor.ladder), min_fidelity, attempt)
        return memories, [cached[memory.handle] for memory in memories]

    def __contains__(self, handle: str) -> bool:
        """Whether the store holds a value for the handle."""
        return self.store.mget([self._key(handle)])[0] is not None

    def delete(self, handles: Sequence[str]) -> None:
        """Delete memories; a handle that is not there is no error."""
        self.store.mdelete([self._key(handle) for handle in handles])

    def keys(self) -> Iterator[str]:
        """Handles of this compressor's memories in this namespace."""
        prefix = self._prefix
        for key in self.store.yield_keys(prefix=prefix):
            yield format_handle(key.removeprefix(prefix))

    @property
    def _prefix(self) -> str:
        return f"{self.namespace}/{self.fingerprint[:16]}/"

    def _key(self, handle: str) -> str:
        return self._prefix + handle_digits(handle)

    def _encode(self, memories: Sequence[Memory]) -> list[tuple[str, bytes]]:
        for memory in memories:
            if memory.fingerprint != self.fingerprint:
                raise ValueError(
                    f"Memory of {memory.source or memory.handle} must have the fingerprint {self.fingerprint!r}, "
                    f"got {memory.fingerprint!r}. Compress with this cache's compressor, or make a cache for the other."
                )
        return [(self._key(memory.handle), memory.to_bytes(self.at_rest)) for memory in memories]

    def _decode(self, value: bytes, handle: str, source: str | None = None) -> Memory:
        label = source or handle
        memory = Memory.from_bytes(value, source=label)
        if memory.fingerprint != self.fingerprint:
            raise MemoryFormatError(
                f"Memory of {label} must have the fingerprint {self.fingerprint!r}, got {memory.fingerprint!r}. "
                "Delete it and compress the document again with this compressor."
            )
        if memory.handle != handle:
            raise MemoryFormatError(
                f"Memory of {label} must have the handle {handle}, got {memory.handle}. "
                "Something moved values between keys: delete it and compress the document again."
            )
        return replace(memory, source=source)

    def _check_request(self, texts: Sequence[str], compressor: Compressor, sources: Sequence[str] | None) -> None:
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence of strings, got one string. Pass [text].")
        if sources is not None and len(sources) != len(texts):
            raise ValueError(f"sources must be as many as texts, got {len(sources)} for {len(texts)} texts.")
        if compressor.fingerprint != self.fingerprint:
            raise ValueError(
                f"compressor must have the fingerprint {self.fingerprint!r}, got {compressor.fingerprint!r}. "
                "Make a MemoryCache for this compressor; both can share one store."
            )
        for number, text in enumerate(texts):
            name = f"text {number}" if sources is None else f"text {number} ({sources[number]})"
            if not isinstance(text, str):
                raise TypeError(f"{name} must be a string, got {type(text).__name__}.")
            check_unicode(name, text)

    def _find(self, labels: dict[str, str | None]) -> dict[str, Memory]:
        """Memories that the store holds and that are whole, by handle."""
        try:
            memories, damaged = self.find(labels, labels)
        except Exception as error:  # a store of another library raises what it likes, and the texts are at hand
            logger.warning("The store could not be read; compressing %d documents again: %s", len(labels), error)
            return {}
        for problem in damaged.values():
            logger.warning("Compressing a document again: %s", problem)
        return memories

    def _at_ratios(
        self, texts: Sequence[str], labels: Sequence[str | None], ratios: Sequence[int | None], way: _Way
    ) -> tuple[list[Memory], list[bool]]:
        """Memories of these ratios, and for each whether the store held it as it is wanted."""
        handles = [way.compressor.handle(text, ratio) for text, ratio in zip(texts, ratios, strict=True)]
        found = self._find(dict(zip(handles, labels, strict=True)))
        if way.checking:
            found = {handle: memory for handle, memory in found.items() if memory.fidelity is not None}
        wanted = zip(handles, texts, ratios, labels, strict=True)
        missing = {handle: (text, ratio, label) for handle, text, ratio, label in wanted if handle not in found}
        known = found | self._compress(missing, way)
        memories = [replace(known[handle], source=label) for handle, label in zip(handles, labels, strict=True)]
        return memories, [handle in found for handle in handles]

    def _compress(self, missing: Mapping[str, tuple[str, int | None, str | None]], way: _Way) -> dict[str, Memory]:
        """Compress texts, given by handle with their ratios and labels, and write each group."""
        batch_size, progress = way.batch_size, way.progress
        group_documents = max(GROUP_DOCUMENTS, batch_size or 0)
        handles = list(missing)
        one_group = len(handles) <= group_documents
        # Of several groups the bar is shown here; inside one group the compressor knows its progress better.
        made: dict[str, Memory] = {}
        writable = True
        shown = False if one_group else progress
        with progress_bar(shown, total=len(handles), desc="compress", unit="document") as bar:
            for start in range(0, len(handles), group_documents):
                group = handles[start : start + group_documents]
                bar_inside = progress if one_group else False
                texts, ratios, labels = zip(*(missing[handle] for handle in group), strict=True)
                memories = way.compressor.compress(
                    texts, ratios, batch_size=batch_size, progress=bar_inside, **way.checking
                )
                memories = [replace(memory, source=label) for memory, label in zip(memories, labels, strict=True)]
                made.update(zip(group, memories, strict=True))
                writable = self._write(memories, warn=writable) and writable
                bar.update(len(group))
        return made

    def _write(self, memories: Sequence[Memory], *, warn: bool) -> bool:
        """Whether the store could be written. It may take a later group even if it refused an earlier one."""
        pairs = self._encode(memories)
        try:
            refused = self._set(pairs)
        except Exception as error:  # a store of another library raises what it likes, and the memories are at hand
            level = logging.WARNING if warn else logging.DEBUG
            logger.log(level, "The store could not be written, so it does not keep the memories: %s", error)
            return False
        for memory, (key, _) in zip(memories, pairs, strict=True):
            if key in refused:
                name = memory.source or memory.handle
                logger.warning("The store does not keep the memory of %s: %s", name, refused[key])
        return True

    def _set(self, pairs: Sequence[tuple[str, bytes]]) -> dict[str, ValueError]:
        """Write pairs; those that the store finds wrong, by their keys, cost the others nothing."""
        try:
            self.store.mset(pairs)
        except ValueError as error:
            if len(pairs) == 1:
                return {pairs[0][0]: error}
            refused = {key: problem for pair in pairs for key, problem in self._set([pair]).items()}
            if len(refused) == len(pairs):  # it is the store that is at fault
                raise
            return refused
        return {}
