"""Texts become segments, chunks and spans: nothing lost, nothing twice, nothing that grows with the text."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from pic_rag import chunking
from pic_rag.chunking import count_tokens, fold, place_slots, token_segments, tokenize

PROSE = "It was 1883, and the harbour of Whitby lay still; nobody spoke.\nThen the bell rang.\n\n"


@pytest.mark.parametrize("ratio", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("slots_per_chunk", [1, 3, 4])
def test_spans_cover_the_text_exactly_once_and_are_ceil_n_over_ratio(ratio, slots_per_chunk):
    for tokens in [*range(1, 70), 255, 256, 257, 512]:
        segment = place_slots(np.arange(tokens), ratio, slots_per_chunk)
        assert len(segment.chunk) == -(-tokens // ratio)
        covered = [token for a, b in zip(segment.start, segment.stop, strict=True) for token in range(a, b)]
        assert covered == list(range(tokens))
        assert (segment.stop - segment.start).max() <= ratio


def test_a_span_lies_inside_its_slots_own_chunk():
    segment = place_slots(np.arange(53), 4, 3)
    assert segment.chunk_tokens == 12
    assert (segment.start // 12).tolist() == segment.chunk.tolist()
    assert ((segment.stop - 1) // 12).tolist() == segment.chunk.tolist()


def test_a_short_last_chunk_gets_fewer_slots():
    assert np.bincount(place_slots(np.arange(33), 4, 4).chunk).tolist() == [4, 4, 1]


def test_folding_keeps_tokens_slots_spans_and_positions():
    segment = place_slots(np.arange(100, 137), 4, 3)
    parts = fold(segment)
    assert [part.offset for part in parts] == [0, 12, 24, 36]
    assert np.concatenate([part.token_ids for part in parts]).tolist() == segment.token_ids.tolist()
    assert np.concatenate([part.start + part.offset for part in parts]).tolist() == segment.start.tolist()
    assert np.concatenate([part.stop + part.offset for part in parts]).tolist() == segment.stop.tolist()
    assert all((part.chunk == 0).all() for part in parts)


def test_segments_of_a_long_text_are_those_of_tokenising_it_whole(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(chunking, "WINDOW_CHARACTERS", 500)
    text = PROSE * 60
    whole = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    segments = [ids for _, ids in token_segments([text], tiny_tokenizer, 64)]
    assert np.concatenate(segments).tolist() == whole
    assert {len(segment) for segment in segments[:-1]} == {64}


def test_tokenising_a_document_leaves_the_tokenizer_as_it_was(tiny_tokenizer):
    """Another thread may be tokenising a prompt with it, whose special tokens are special."""
    text = tiny_tokenizer.eos_token
    [special] = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert special not in tokenize(text, tiny_tokenizer)["input_ids"]
    assert not tiny_tokenizer.backend_tokenizer.encode_special_tokens


def test_a_special_token_in_a_document_is_counted_as_the_text_that_it_is(tiny_tokenizer):
    text = f"It says {tiny_tokenizer.eos_token} and goes on."
    [(_, token_ids)] = token_segments([text], tiny_tokenizer, 512)
    assert count_tokens(text, tiny_tokenizer) == len(token_ids)
    assert tiny_tokenizer.eos_token_id not in token_ids


def test_windows_break_between_words_and_never_inside_a_run_of_white_space(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(chunking, "WINDOW_CHARACTERS", 300)
    seen = []

    class Recording:
        def __call__(self, texts, **kwargs):
            seen.extend(texts)
            return tiny_tokenizer(texts, **kwargs)

    text = "word  \n\n  next " * 300
    list(token_segments([text], Recording(), 64))
    assert "".join(seen) == text
    assert len(seen) > 10
    for before, after in zip(seen, seen[1:], strict=False):
        assert not before[-1].isspace()
        assert after[0].isspace()
        assert not after[1].isspace()


@pytest.mark.parametrize("text", ["x" * 3000, "語" * 3000, " " * 3000], ids=["one word", "no spaces", "only spaces"])
def test_a_text_without_a_place_to_break_still_passes_whole(text, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(chunking, "WINDOW_CHARACTERS", 500)
    segments = [ids for _, ids in token_segments([text], tiny_tokenizer, 64)]
    assert tiny_tokenizer.decode(np.concatenate(segments)) == text


def test_empty_text_has_no_segment(tiny_tokenizer):
    assert list(token_segments(["", ""], tiny_tokenizer, 64)) == []


def test_texts_tokenised_together_are_cut_as_if_alone(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(chunking, "WINDOW_CHARACTERS", 500)
    texts = ["one", "", PROSE * 60, "two words", "x" * 64]
    together = list(token_segments(texts, tiny_tokenizer, 64))
    alone = [
        (number, ids) for number, text in enumerate(texts) for _, ids in token_segments([text], tiny_tokenizer, 64)
    ]
    assert [(number, ids.tolist()) for number, ids in together] == [(number, ids.tolist()) for number, ids in alone]


def _peak_bytes(text, tokenizer):
    tracemalloc.start()
    for _, segment in token_segments([text], tokenizer, 512):
        assert len(segment)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_length(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(chunking, "WINDOW_CHARACTERS", 2_500)
    monkeypatch.setattr(chunking, "_WINDOWS_AT_ONCE", 2)
    text = PROSE * 200
    _peak_bytes(text, tiny_tokenizer)
    short, long = _peak_bytes(text, tiny_tokenizer), _peak_bytes(text * 10, tiny_tokenizer)
    assert long < 1.3 * short
    monkeypatch.setattr(chunking, "WINDOW_CHARACTERS", 10**9)  # and the bound would notice
    assert _peak_bytes(text * 10, tiny_tokenizer) > 5 * long
