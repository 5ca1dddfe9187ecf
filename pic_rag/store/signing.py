"""Signed handles: how the handles that a retriever put into a prompt are told from those that somebody typed.

A prompt is text, and whoever has a text and a compressor can compute its handle. So what is handed out to be printed
into a prompt is signed, ``[[pic:<64 lowercase hex>]]``: the handle (32), the day (4) and a code over both (28), made
with a key that the namespace keeps in its store. A handle without a signature, of another namespace or too old is never
read, wherever it comes from: a computed one, one out of a log or a database, one planted in a document weeks ago.

The same text has the same signed handle all day, so caches of prompts hit. What a signature cannot tell is who copied
it: whoever is shown a signed handle can use it too, in its namespace, until it is too old.

Standard library only.
"""

from __future__ import annotations

import functools
import hmac
import logging
import re
import secrets
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pic_rag.handles import (
    HANDLE_PATTERN,
    UnknownHandleError,
    escape_handles,
    find_handles,
    format_handle,
    handle_digits,
)
from pic_rag.prompts import map_texts
from pic_rag.store.protocol import MemoryStore, check_store

_Chat = Sequence[Mapping[str, Any]]

logger = logging.getLogger(__name__)

_KEY_BYTES = 32
_DAY_DIGITS = 4  # of hex: until the year 2149
_CODE_DIGITS = 28
_DAY_SECONDS = 86400

_REMEDY = (
    "Only what a compressor of this store and namespace handed out today or yesterday is read. Retrieve again, with "
    "the same store and namespace for compressor and LLM, or pass what users type through escape_handles."
)

_PEOPLE_REMEDY = (
    "The documents of this prompt stand in its system or tool messages, and this handle where people write. Put all "
    "documents there, or pass what users type through escape_handles."
)
_CUT_REMEDY = (
    "Compress after text splitters and whatever else shortens texts, or pass what users type through escape_handles. "
    "LlamaIndex cuts a memory that is larger than the chunks it plans: raise context_window or chunk_size_limit, or "
    "the ratio."
)
_DOCUMENT_ROLES = ("system", "developer", "tool", "function")

_CUT_HANDLE = re.compile(
    r"\[\[pic:[0-9a-f]{8,64}(?![0-9a-f\]])"  # and then something else, or nothing
    r"|(?<![0-9a-f:])[0-9a-f]{57,63}\]\]"  # what such a short beginning leaves; no digest is of these lengths
)

_making_key = threading.Lock()


class HandleSigner:
    """Signs the handles of one namespace of a store, and checks signatures.

    The key is read when it is first needed; make a signer for each call rather than one for good.

    Args:
        store: where the namespace's key is kept, under `<namespace>/key`. Deleting it voids all handles signed so far.
        namespace: as for `MemoryCache`.
    """

    def __init__(self, store: MemoryStore, namespace: str = "default") -> None:
        """Touch nothing yet."""
        check_store(store)
        self.store = store
        self.namespace = namespace

    def sign(self, handle: str) -> str:
        """The handle, signed today.

        Raises:
            ValueError: it is not a handle, or is signed already.
        """
        return self._signed(handle_digits(handle), _today())

    def verify(self, signed: str, *, any_age: bool = False) -> str | None:
        """The handle without its signature, or None when it is not one that this namespace signed lately.

        Args:
            signed: a signed handle, or any text.
            any_age: accept one that was signed before yesterday too: for what no user or document can have written.
        """
        match = HANDLE_PATTERN.fullmatch(signed)
        if match is None or not match.group(2):
            return None
        digits, day = match.group(1), int(match.group(2)[:_DAY_DIGITS], 16)
        if not hmac.compare_digest(signed, self._signed(digits, day)):
            return None
        # A day ahead as well: clocks of two machines differ around midnight.
        return format_handle(digits) if any_age or abs(_today() - day) <= 1 else None

    def unsign(self, prompt: str | _Chat, only: Collection[str] | None = None) -> tuple[str | _Chat, list[str]]:
        """The prompt with plain handles in place of signed ones, and these handles, in order, with repeats.

        Where system or tool messages hold handles, the application puts its documents there, and other messages are
        what people say: further handles in those are refused, however good their signature.

        Args:
            prompt: text, or messages with a role and a content that is text or a list of parts.
            only: the signed handles to read, for who knows them; all others become text then, and none is refused.

        Raises:
            UnknownHandleError: a handle was not signed by this namespace, is too old, or stands where people write.
            ValueError: a handle was cut into pieces, or `only` holds something else than signed handles.
        """
        _check_signed(only)
        if isinstance(prompt, str):
            text = self._unsign(prompt, only)
            return text, find_handles(text)
        read = [
            {**message, "content": map_texts(message.get("content"), lambda text: self._unsign(text, only))}
            for message in prompt
        ]
        found = [(message.get("role") in _DOCUMENT_ROLES, handle) for message in read for handle in _find(message)]
        documents = {handle for among_documents, handle in found if among_documents}
        if only is None and documents:
            for _, handle in found:
                if handle not in documents:
                    raise UnknownHandleError(handle, len(documents), _PEOPLE_REMEDY)
        return read, [handle for _, handle in found]

    def _unsign(self, text: str, only: Collection[str] | None) -> str:
        if only is None and (cut := _CUT_HANDLE.search(text)):
            raise ValueError(f"handles must be whole, got {cut.group()!r}. {_CUT_REMEDY}")
        read = {handle for handle in find_handles(text) if only is None or handle in only}
        known = {signed: handle for signed in read if (handle := self.verify(signed))}

        def handle_of(match: re.Match[str]) -> str:
            if match.group() not in read:
                return escape_handles(match.group())
            if match.group() not in known:
                raise UnknownHandleError(match.group(), len(known), _REMEDY)
            return known[match.group()]

        return HANDLE_PATTERN.sub(handle_of, text)

    def _signed(self, digits: str, day: int) -> str:
        dated = f"{digits}{day:0{_DAY_DIGITS}x}"
        code = hmac.digest(self._key, f"{self.namespace}/{dated}".encode(), "sha256").hex()[:_CODE_DIGITS]
        return format_handle(dated + code)

    @functools.cached_property
    def _key(self) -> bytes:
        """The namespace's key, made by the first who needs it.

        Two processes that make it at the same moment agree on the second one's; what the first signed in between is
        refused once.
        """
        name = f"{self.namespace}/key"
        with _making_key:
            key = None
            try:
                [key] = self.store.mget([name])
                if key is None:
                    self.store.mset([(name, secrets.token_bytes(_KEY_BYTES))])
                    [key] = self.store.mget([name])
            except Exception as error:  # a store of another library raises what it likes
                logger.warning("The store keeps no key, so its handles are read in this process only: %s", error)
        if key is not None and len(key) != _KEY_BYTES:
            raise ValueError(f"{name} must be {_KEY_BYTES} bytes in the store, got {len(key)}. Delete it.")
        return _process_key() if key is None else key


def _check_signed(handles: Collection[str] | None) -> None:
    """Anything else would name no handle of the prompt, and its documents would go unread."""
    for handle in [handles] if isinstance(handles, str) else handles or ():
        match = HANDLE_PATTERN.fullmatch(handle) if isinstance(handle, str) else None
        if match is None or not match.group(2) or isinstance(handles, str):
            raise ValueError(
                f"handles must be a list of signed handles, got {handle!r:.80}. Pass what stands in the prompt, such "
                "as the page_content of compressed documents, or find_handles(text)."
            )


def _find(message: Mapping[str, Any]) -> list[str]:
    handles: list[str] = []

    def collect(text: str) -> str:
        handles.extend(find_handles(text))
        return text

    map_texts(message.get("content"), collect)
    return handles


@functools.cache
def _process_key() -> bytes:
    return secrets.token_bytes(_KEY_BYTES)


def _today() -> int:
    return int(time.time() // _DAY_SECONDS)
