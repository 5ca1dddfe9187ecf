"""From disk to spliced: how long documents whose memories are in the store take to become rows of a prompt."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from pic_rag.assembler import Assembler
from pic_rag.benchmark.measure import now
from pic_rag.benchmark.workload import Workload
from pic_rag.evaluation.systems import Systems
from pic_rag.prompts import rag_messages
from pic_rag.store import MemoryCache, SQLiteStore

DOCUMENTS = 5
DOCUMENT_TOKENS = 512
_RUNS = 30


@dataclass(frozen=True)
class Splice:
    """Times in milliseconds, medians.

    Attributes:
        documents: spliced into one prompt.
        document_tokens: text tokens of each.
        ratio: text tokens per memory token.
        read_ms: their memories out of the SQLite file, whose pages the operating system has in memory.
        splice_ms: from memories to the embeddings of the whole prompt, on the generator's device.
        total_ms: both; 2 is the goal.
    """

    documents: int
    document_tokens: int
    ratio: int
    read_ms: float
    splice_ms: float
    total_ms: float


def measure_splice(systems: Systems, workload: Workload, ratio: int) -> Splice:
    """Splice five documents at a ratio, thirty times."""
    compressor, generator = systems.compressor, systems.reading
    device = torch.device(generator.model.device)
    assembler = Assembler(
        generator.model,
        generator.tokenizer,
        model_id=generator.model_id,
        generator_positions=compressor.config.generator_positions,
    )
    made = compressor.compress([workload.document(DOCUMENT_TOKENS) for _ in range(DOCUMENTS)], ratio, progress=False)
    handles = [memory.handle for memory in made]
    prompt = rag_messages("What does the first record tell?", handles)
    times = []
    with tempfile.TemporaryDirectory() as folder, SQLiteStore(Path(folder) / "memories.sqlite") as store:
        cache = MemoryCache(store, compressor.fingerprint)
        cache.put(made)
        for _ in range(_RUNS):
            begin = now(device)
            memories = {memory.handle: memory for memory in cache.get(handles) if memory is not None}
            read = now(device)
            with torch.inference_mode():
                assembler.assemble(prompt, memories).embeddings  # noqa: B018 - built when asked for
            times.append((read - begin, now(device) - read))
    return Splice(
        documents=DOCUMENTS,
        document_tokens=DOCUMENT_TOKENS,
        ratio=ratio,
        read_ms=1000 * median(read for read, _ in times),
        splice_ms=1000 * median(splice for _, splice in times),
        total_ms=1000 * median(map(sum, times)),
    )
