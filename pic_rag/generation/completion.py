"""One answer as it grows: tokens in, text out, and the moment at which it is finished.

Both `generate` and `stream` read their text here, which is why they cannot differ. This file knows strings and a
tokenizer's `decode`; it does not know the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from pic_rag.handles import OPENING, escape_handles

FinishReason = Literal["stop", "length"]
_UNSETTLED = "\N{REPLACEMENT CHARACTER}"  # what decode returns for the first bytes of a longer character


class Detokenizer:
    """Incremental decoding that never shows half a character.

    Text is the difference between two decodings of a short window, so that a tokenizer whose decoding depends on the
    token before (a leading space, a run of byte tokens) gives what decoding everything at once would give.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._known = 0  # tokens of the window whose text is complete
        self._shown = 0  # characters of the window that were returned

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; often "", inside a character."""
        self._window.append(token_id)
        text = self._decode(self._window)
        settled = text.rstrip(_UNSETTLED)
        fresh = settled[self._shown :]
        self._shown = max(self._shown, len(settled))
        if fresh and settled == text:
            self._slide()
        return fresh

    def flush(self) -> str:
        """What is left at the end of the answer: a character cut short shows as a replacement character."""
        rest = self._decode(self._window)[self._shown :]
        self._shown += len(rest)
        return rest

    def _slide(self) -> None:
        """Keep only the tokens since the last complete piece: decoding costs the same at every length."""
        self._window = self._window[self._known :]
        self._known = len(self._window)
        self._shown = len(self._decode(self._window))

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Completion:
    """One answer, token by token, ended by an end token, a stop string or its length.

    No model knows a handle, so one that it writes was in a text that it read, and is escaped: the answer can be part of
    the next prompt.

    Args:
        tokenizer: the generator's.
        end_token_ids: tokens that end an answer; they count as tokens and add no text.
        max_new_tokens: length at which the answer ends in any case.
        stop: strings that end the answer and are not part of it.
        on_text: called with each piece of text as soon as no stop string and no handle can begin in it.
        on_end: called after the last piece.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        end_token_ids: Collection[int],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self.token_ids: list[int] = []
        self.cached_tokens = 0  # rows of its prompt that were not read again
        self.finish_reason: FinishReason | None = None
        self.abandoned = False  # set by a reader that went away, perhaps from another thread
        self.end_token_ids = end_token_ids
        self._max_new_tokens = max_new_tokens
        self._stop = stop
        self._on_text = on_text
        self._on_end = on_end
        self._detokenizer = Detokenizer(tokenizer)
        self._pieces: list[str] = []
        self._held = ""  # may be the beginning of a stop string, or of a handle

    @property
    def text(self) -> str:
        """The text that is certain so far."""
        return "".join(self._pieces)

    @property
    def streamed(self) -> bool:
        """Whether somebody wants each piece as soon as it is certain."""
        return self._on_text is not None

    @property
    def finished(self) -> bool:
        """Whether no further token is wanted."""
        return self.abandoned or self.finish_reason is not None

    def push(self, token_id: int) -> None:
        """Take the next token."""
        self.token_ids.append(token_id)
        if token_id in self.end_token_ids:
            self._close("stop")
        else:
            self._take(self._detokenizer.push(token_id))
        if not self.finished and len(self.token_ids) >= self._max_new_tokens:
            self._close("length")
        if self.finished and self._on_end is not None:
            self._on_end()

    def extend(self, token_ids: Iterable[int], reason: FinishReason | None = None) -> None:
        """Take the next tokens, as far as they are wanted; with a reason, end the answer behind them."""
        for token_id in token_ids:
            if self.finished:
                return
            self.push(token_id)
        if reason is not None:
            self.finish(reason)

    def finish(self, reason: FinishReason) -> None:
        """End the answer here, if it has not ended: what runs the model gives no further token."""
        if not self.finished:
            self._close(reason)
            if self._on_end is not None:
                self._on_end()

    def _take(self, fresh: str) -> None:
        """Release what is certain of the held and the fresh text; end at the first stop string."""
        text = self._held + fresh
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self._release(text[: min(found)])
            self.finish_reason = "stop"  # only now: another thread may be waiting for it
            return
        certain = len(text) - max(_overlap(text, held) for held in (OPENING, *self._stop))
        self._held = text[certain:]
        self._release(text[:certain])

    def _close(self, reason: FinishReason) -> None:
        self._take(self._detokenizer.flush())
        if self.finish_reason is None:
            self._release(self._held)
            self.finish_reason = reason

    def _release(self, text: str) -> None:
        text = escape_handles(text)
        if text:
            self._pieces.append(text)
            if self._on_text is not None:
                self._on_text(text)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that begin `stop`.

    >>> _overlap("the end, EN", "END")
    2
    """
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
