"""What travels to a vLLM server and back: one prompt as one chat request, one answer as token ids. No network here."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Sequence
from typing import Any

import torch

from pic_rag.assembler import MEMORY_ROW, Assembled
from pic_rag.generation.sampling import Sampling
from pic_rag.handles import split_handles

PASS_THROUGH = (
    "{% for message in messages %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
)
"""A chat template that writes the parts down as they are: the prompt went through the model's own one here already."""


def chat_request(
    prompt: Assembled, sampling: Sampling, *, model: str, end_token_ids: Collection[int], stream: bool
) -> dict[str, Any]:
    """The body of `/v1/chat/completions` for one prompt, in vLLM's words.

    Args:
        prompt: text pieces become text parts, memories `prompt_embeds` parts.
        sampling: what generation_config.json says besides (a repetition penalty, say) stays as the server has it.
        model: the served name to ask.
        end_token_ids: tokens that end the answer.
        stream: whether the tokens are to come one by one.
    """
    return {
        "model": model,
        "messages": [{"role": "user", "content": _parts(prompt)}],
        "chat_template": PASS_THROUGH,
        "add_generation_prompt": False,
        "return_token_ids": True,
        "stream": stream,
        "stop": list(sampling.stop),
        "include_stop_str_in_output": True,  # the completion cuts it off, as it does in process
        "max_completion_tokens": sampling.max_new_tokens,
        **sampling_settings(sampling, end_token_ids),
    }


def sampling_settings(sampling: Sampling, end_token_ids: Collection[int]) -> dict[str, Any]:
    """How tokens are chosen, by the names that vLLM's requests and its `SamplingParams` share."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,  # all: a default of the model's would narrow the draws
        "seed": sampling.seed,
        "stop_token_ids": sorted(end_token_ids),
    }


def encode_rows(rows: torch.Tensor) -> str:
    """`(memory_tokens, hidden)` rows as base64 of `torch.save`, which is what vLLM reads; it loads weights only."""
    buffer = io.BytesIO()
    torch.save(rows.detach().cpu().clone(), buffer)  # a view would be saved with all of its storage
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def check_prompt(prompt: Assembled, token_ids: Sequence[int]) -> None:
    """Compare the rows that the server read with those that were meant.

    A server of another tokenizer is found out here. Around a memory of no tokens the server reads the text on both
    sides as one, so such a prompt is not compared.

    Raises:
        ValueError: when they differ.
    """
    if any(memory.memory_tokens == 0 for memory in prompt.memories):
        return
    meant = prompt.token_ids.tolist()
    same = len(meant) == len(token_ids) and all(a in (b, MEMORY_ROW) for a, b in zip(meant, token_ids, strict=True))
    if not same:
        raise ValueError(
            f"The server must read the prompt's {len(meant)} rows as they are meant, got {len(token_ids)}, or other "
            "tokens. It has another tokenizer, or is no vLLM: start it with `pic-rag serve`."
        )


def _parts(prompt: Assembled) -> list[dict[str, str]]:
    memories = iter(prompt.memories)
    parts = []
    for is_handle, piece in split_handles(prompt.text):
        if not is_handle:
            parts.append({"type": "text", "text": piece})
        elif (memory := next(memories)).memory_tokens:
            parts.append({"type": "prompt_embeds", "data": encode_rows(memory.embeddings)})
    return parts
