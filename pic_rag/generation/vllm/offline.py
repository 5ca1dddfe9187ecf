"""vLLM in this process as an engine: for a batch of prompts on one machine, without a server."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pic_rag.assembler import MEMORY_ROW, Assembled
from pic_rag.generation.completion import Completion, FinishReason
from pic_rag.generation.sampling import Sampling
from pic_rag.generation.threads import WaitingThreads
from pic_rag.generation.vllm.serve import lora_settings
from pic_rag.generation.vllm.wire import sampling_settings

if TYPE_CHECKING:
    from vllm import LLM


class OfflineEngine:
    """Decodes with `vllm.LLM`, one call at a time.

    Args:
        folder: Hugging Face folder or hub id of the model.
        reader: folder of its reader adapter, on for prompts with memories.
        end_token_ids: tokens that end an answer.
        **settings: of `vllm.LLM`, such as `dtype` and `gpu_memory_utilization`.

    Raises:
        ImportError: when vLLM is not installed.
    """

    batch_size = 256  # prompts handed over together; vLLM schedules them itself

    def __init__(
        self,
        folder: str,
        *,
        reader: Path | None,
        end_token_ids: frozenset[int],
        **settings: Any,  # noqa: ANN401 - vLLM's arguments
    ) -> None:
        self.end_token_ids = end_token_ids
        self._lock = threading.Lock()
        self._threads = WaitingThreads()
        self._numbers = itertools.count()
        self._llm = _load(folder, reader, settings)
        self._reader = None if reader is None else _lora_request(reader)
        self.context_tokens: int | None = int(self._llm.llm_engine.model_config.max_model_len)

    def decode(self, prompts: Sequence[Assembled], completions: Sequence[Completion], sampling: Sampling, /) -> None:
        """Step the engine until every completion is finished; one that needs no further token leaves it at once."""
        engine = self._llm.llm_engine
        with self._lock:
            waiting: dict[str, Completion] = {}
            try:
                for prompt, completion in zip(prompts, completions, strict=True):
                    waiting[self._add(prompt, sampling, completion)] = completion
                while waiting:
                    for output in engine.step():
                        completion = waiting[output.request_id]
                        _feed(completion, output)
                        if output.finished:
                            del waiting[output.request_id]
                    engine.abort_request(_pop_finished(waiting))
            finally:
                engine.abort_request(list(waiting))  # after an error of the engine, or Ctrl-C

    async def adecode(
        self, prompts: Sequence[Assembled], completions: Sequence[Completion], sampling: Sampling, /
    ) -> None:
        """`decode` for coroutines, in a thread."""
        await self._threads.run(self.decode, prompts, completions, sampling)

    def _add(self, prompt: Assembled, sampling: Sampling, completion: Completion) -> str:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        settings = SamplingParams(
            max_tokens=sampling.max_new_tokens,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            **sampling_settings(sampling, completion.end_token_ids),
        )
        number = str(next(self._numbers))
        reading = prompt.memory_tokens > 0
        self._llm.llm_engine.add_request(
            number, self._prompt(prompt), settings, lora_request=self._reader if reading else None
        )
        return number

    def _prompt(self, prompt: Assembled) -> Any:  # noqa: ANN401 - one of vLLM's prompt types
        """Token ids where there is text, rows where there are memories."""
        token_ids = prompt.token_ids
        if not prompt.memory_tokens:
            return {"prompt_token_ids": token_ids.tolist()}
        is_text = token_ids != MEMORY_ROW  # (rows,)
        memories = torch.cat([memory.embeddings for memory in prompt.memories])
        rows = memories.new_zeros(len(token_ids), memories.shape[1])
        rows[(~is_text).to(rows.device)] = memories
        return {
            "prompt_token_ids": token_ids.clamp_min(0).tolist(),
            "prompt_is_token_ids": is_text.tolist(),
            "prompt_embeds": rows.cpu().to(self._llm.llm_engine.model_config.dtype),
        }


def _feed(completion: Completion, output: Any) -> None:  # noqa: ANN401 - vLLM's RequestOutput
    answer = output.outputs[0]
    completion.cached_tokens = output.num_cached_tokens or 0
    reason: FinishReason = "length" if answer.finish_reason == "length" else "stop"
    completion.extend(answer.token_ids, reason if output.finished else None)


def _pop_finished(waiting: dict[str, Completion]) -> list[str]:
    finished = [number for number, completion in waiting.items() if completion.finished]
    for number in finished:
        del waiting[number]
    return finished


def _load(folder: str, reader: Path | None, settings: dict[str, Any]) -> LLM:
    try:
        from vllm import LLM
    except ImportError as error:
        raise ImportError("vLLM must be installed to run in this process, see https://docs.vllm.ai.") from error

    return LLM(model=folder, enable_prompt_embeds=True, **{**lora_settings(reader), **settings})


def _lora_request(reader: Path) -> Any:  # noqa: ANN401 - vLLM's LoRARequest
    from vllm.lora.request import LoRARequest

    return LoRARequest("reader", 1, str(reader))
