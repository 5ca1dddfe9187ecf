"""Batches: little padding, many threads at once, and a way on when memory runs out."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pic_rag.compression.batching import narrow_rows
from pic_rag.compression.compressor import Compressor
from pic_rag.config import PicConfig


def _compressor(model, tokenizer, preset="pic"):
    config = PicConfig.preset(preset, segment_tokens=64, ratios=(4, 8, 16), lora_rank=0)
    compressor = Compressor.from_base(model, tokenizer, config)
    torch.nn.init.normal_(compressor.encoder.converter.down.weight, std=0.1)  # memories that depend on the layers
    return compressor


def _texts(kind, count=200):
    draw = random.Random(0)
    tokens = {
        "skewed": lambda: 1 + int(draw.lognormvariate(3.2, 1)),
        "even": lambda: draw.randint(1, 80),
        "passages": lambda: max(3, int(draw.gauss(20, 8))),
        "short": lambda: draw.randint(1, 5),
    }[kind]
    return ["".join(draw.choices("abcdefgh ", k=tokens())) for _ in range(count)]


def _watch(compressor):
    """The layouts the encoder is given from now on."""
    layouts = []
    compressor.encoder.register_forward_pre_hook(lambda module, arguments: layouts.append(arguments[0]))
    return layouts


@pytest.mark.parametrize("kind", ["skewed", "even", "passages", "short"])
@pytest.mark.parametrize("preset", ["pic", "local"])
def test_at_most_a_twentieth_of_the_places_is_padding(preset, kind, tiny_model, tiny_tokenizer):
    compressor = _compressor(tiny_model, tiny_tokenizer, preset)
    layouts = _watch(compressor)
    compressor.compress(_texts(kind), ratio=4)
    padding = torch.cat([(layout.segment < 0).flatten() for layout in layouts])
    assert padding.float().mean() <= 0.05


def test_short_segments_get_short_rows():
    row_places, spots = narrow_rows([20] * 30, 640, 8 * 640)
    assert (row_places, len(spots)) == (20, 30)
    row_places, spots = narrow_rows([600, 300, 300], 640, 8 * 640)  # 600 holds both of the others
    assert (row_places, len({row for row, _ in spots.values()})) == (600, 2)


def test_long_rows_have_a_length_that_attention_is_fast_at(tiny_model, tiny_tokenizer):
    compressor = Compressor.from_base(tiny_model, tiny_tokenizer, PicConfig(segment_tokens=512))
    layouts = _watch(compressor)
    compressor.compress(["a" * 500, "b" * 490], ratio=16)
    longest = max(int((row >= 0).sum()) for row in layouts[0].segment)
    assert (longest % 16, layouts[0].token_ids.shape[1]) == (longest - 528, 544)


def test_rows_of_flex_attention_are_whole_blocks(tiny_tokenizer, tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    config = PicConfig(segment_tokens=512, lora_rank=0)
    dense, flex = (
        Compressor.from_base(tmp_path, config=config, device="cpu", dtype="float32", attn_implementation=kind)
        for kind in ("sdpa", "flex_attention")
    )
    layouts = _watch(flex)
    [memory], [expected] = flex.compress(["a" * 20]), dense.compress(["a" * 20])
    assert {layout.token_ids.shape[1] % 128 for layout in layouts} == {0}
    torch.testing.assert_close(memory.embeddings, expected.embeddings, rtol=1e-4, atol=1e-4)


def test_a_batch_never_takes_more_places_than_it_is_allowed(tiny_model, tiny_tokenizer):
    compressor = _compressor(tiny_model, tiny_tokenizer)
    layouts = _watch(compressor)
    compressor.compress(_texts("skewed"), batch_size=3)
    assert max((layout.segment >= 0).sum() for layout in layouts) <= 3 * (64 + 16)
    assert len(layouts) > 10


def test_threads_get_what_they_would_have_got_alone(tiny_model, tiny_tokenizer):
    compressor = _compressor(tiny_model, tiny_tokenizer)
    texts = _texts("skewed", 96)
    alone = [compressor.compress([text], ratio)[0] for text in texts for ratio in (4, 16)]
    with ThreadPoolExecutor(32) as pool:
        jobs = [pool.submit(compressor.compress, [text], ratio) for text in texts for ratio in (4, 16)]
    for job, expected in zip(jobs, alone, strict=True):
        [memory] = job.result()
        assert memory.handle == expected.handle
        torch.testing.assert_close(memory.embeddings, expected.embeddings, rtol=1e-4, atol=1e-4)


def _while_one_is_encoded(compressor, texts):
    """Compress the texts, a thread each, so that all arrive while the first is being encoded; the threads' results."""
    encoding, go_on = threading.Event(), threading.Event()

    def hold(module, arguments):
        encoding.set()
        assert go_on.wait(60)

    hook = compressor.encoder.register_forward_pre_hook(hold)
    with ThreadPoolExecutor(len(texts)) as pool:
        jobs = [pool.submit(compressor.compress, texts[:1])]
        assert encoding.wait(60)
        jobs += [pool.submit(compressor.compress, [text]) for text in texts[1:]]
        while len(compressor._batcher._waiting) < len(texts):
            threading.Event().wait(0.001)
        hook.remove()
        go_on.set()
    return jobs


def test_requests_that_arrive_meanwhile_are_encoded_together(tiny_model, tiny_tokenizer):
    compressor = _compressor(tiny_model, tiny_tokenizer)
    layouts = _watch(compressor)
    jobs = _while_one_is_encoded(compressor, ["first", "a few words", "some more", "and the last"])
    assert [job.result()[0].text_tokens for job in jobs] == [5, 11, 9, 12]
    assert [len(layout.slot_row) for layout in layouts] == [2, 3 + 3 + 3]


def test_a_request_that_fails_fails_alone(tiny_model, tiny_tokenizer):
    compressor = _compressor(tiny_model, tiny_tokenizer)
    poison = tiny_tokenizer("Q")["input_ids"][0]

    def refuse(module, arguments):
        if (arguments[0].token_ids == poison).any():
            raise ValueError("Q must not be compressed.")

    compressor.encoder.register_forward_pre_hook(refuse)
    jobs = _while_one_is_encoded(compressor, ["first", "second", "Q is poison", "fourth", "fifth"])
    with pytest.raises(ValueError, match="Q must not be compressed"):
        jobs.pop(2).result()
    assert [job.result()[0].text_tokens for job in jobs] == [5, 6, 6, 5]


def test_a_copy_of_a_compressor_works(tiny_model, tiny_tokenizer):
    compressor = _compressor(tiny_model, tiny_tokenizer)
    twin = copy.deepcopy(compressor)
    assert torch.equal(twin.compress(["text"])[0].embeddings, compressor.compress(["text"])[0].embeddings)
    assert twin._batcher.encoder is twin.encoder


OUT_OF_MEMORY = """
import logging, resource, sys
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
from pic_rag.compression.compressor import Compressor
from pic_rag.config import PicConfig

class Count(logging.Handler):
    messages = []
    def emit(self, record):
        self.messages.append(record.getMessage())

logging.getLogger("pic_rag.compression.batching").addHandler(Count())
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
compressor = Compressor.from_base(model, tokenizer, PicConfig(segment_tokens=64, ratios=(4,), lora_rank=0))
torch.nn.init.normal_(compressor.encoder.converter.down.weight, std=0.1)
text = "The harbour lay still and nobody spoke. " * 3000
[expected] = compressor.compress([text], batch_size=8)
assert not Count.messages
rows = []
compressor.encoder.register_forward_pre_hook(lambda module, arguments: rows.append(len(arguments[0].segment)))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 250 * 2**20,) * 2)
[memory] = compressor.compress([text], batch_size=10_000)
torch.testing.assert_close(memory.embeddings, expected.embeddings, rtol=1e-4, atol=1e-4)
print(len(Count.messages), max(rows), max(rows[len(rows) // 2:]), rows)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the address space as Linux does")
def test_a_batch_that_does_not_fit_into_memory_is_halved_until_it_does(tmp_path, tiny_model, tiny_tokenizer):
    copy.deepcopy(tiny_model).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    # One thread: others would take their own part of the limit, more or less as they are scheduled.
    one = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY, str(tmp_path)], capture_output=True, text=True, env=one)
    assert done.returncode == 0, done.stderr
    warnings, first_rows, later_rows = map(int, done.stdout.split()[:3])
    assert warnings == 1
    assert first_rows == 1875
    assert later_rows < 1000
