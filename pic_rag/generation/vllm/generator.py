"""`VLLMGenerator`: the generator of a compressor, its model run by vLLM."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from pic_rag.generation.answering import BaseGenerator
from pic_rag.generation.vllm.offline import OfflineEngine
from pic_rag.generation.vllm.serve import servable, served_names
from pic_rag.generation.vllm.server import ServerEngine
from pic_rag.models.backbone import end_token_ids, find_model, resolve_dtype
from pic_rag.models.checkpoint import Checkpoint


class VLLMGenerator(BaseGenerator):
    """A generator whose model runs in vLLM: made by `connect` or `offline`, used as `Generator` is.

    Prompts are laid out and checked here, as in process: nothing is sent that vLLM could not read. No weights are
    loaded here. Greedy answers are those of the same model in process, up to the rounding of its dtype; draws
    have vLLM's random numbers, so a seed repeats its own answers but not those in process.
    """

    @classmethod
    def connect(
        cls,
        url: str = "http://localhost:8000",
        checkpoint: Checkpoint | str | Path | None = None,
        name_or_path: str | Path | None = None,
        *,
        generator: str | None = None,
        reader: str | None = None,
        api_key: str | None = None,
        dtype: str | torch.dtype | None = None,
        timeout_s: float = 600.0,
        retries: int = 3,
    ) -> VLLMGenerator:
        """Use a vLLM server that `pic-rag serve` started, or one started with its arguments.

        That it serves the right weights follows from the served names, which are the ids that `pic-rag serve` computes
        from them. That it reads a prompt as meant is compared, token by token, in every answer.

        Args:
            url: of the server.
            checkpoint: of the compressor: its folder, its hub id, or None for the shipped one.
            name_or_path: where the generator's tokenizer and config are, when not where the checkpoint says.
            generator: what the server calls the model, when not by its id. You then vouch for its weights.
            reader: what the server calls the model with its reader, likewise.
            api_key: None takes `$VLLM_API_KEY`, if it is set.
            dtype: what the server computes in; None: the model's own. Memories must be finite in it.
            timeout_s: longest wait for an answer, or for the next token of a stream.
            retries: further attempts when the server cannot be reached, is busy (429) or fails (5xx).

        Raises:
            ImportError: when the openai client is not installed.
            ConnectionError: when no server answers.
            PermissionError: when the server wants another `api_key`.
            ValueError: when the server does not serve the generator, or not with its reader, or when the memories are
                read at spread positions.
        """
        checkpoint = servable(checkpoint)
        folder = find_model(str(name_or_path or checkpoint.generator.name))
        model, tokenizer = _skeleton(folder, dtype), AutoTokenizer.from_pretrained(folder)
        names = served_names(checkpoint.generator.id)
        engine = ServerEngine(
            url,
            generator=generator or names[0],
            reader=reader or names[1],
            end_token_ids=end_token_ids(model, tokenizer),
            api_key=api_key,
            timeout_s=timeout_s,
            retries=retries,
        )
        return cls(model, tokenizer, model_id=checkpoint.generator.id, engine=engine)

    @classmethod
    def offline(
        cls,
        checkpoint: Checkpoint | str | Path | None = None,
        name_or_path: str | Path | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        **settings: Any,  # noqa: ANN401 - vLLM's arguments
    ) -> VLLMGenerator:
        """Run vLLM in this process, which must have it installed.

        Args:
            checkpoint: as for `connect`.
            name_or_path: where the generator is, when it is not where the checkpoint says.
            dtype: to compute in; None: the model's own.
            **settings: of `vllm.LLM`, such as `gpu_memory_utilization`, `max_model_len` and `enforce_eager`.

        Raises:
            ImportError: when vLLM is not installed.
            ValueError: when the memories are read at spread positions.
        """
        checkpoint = servable(checkpoint)
        folder = find_model(str(name_or_path or checkpoint.generator.name))
        model, tokenizer = _skeleton(folder, dtype), AutoTokenizer.from_pretrained(folder)
        engine = OfflineEngine(
            folder,
            reader=checkpoint.reader,
            end_token_ids=end_token_ids(model, tokenizer),
            dtype=str(model.dtype).removeprefix("torch."),
            **settings,
        )
        return cls(model, tokenizer, model_id=checkpoint.generator.id, engine=engine)


def _skeleton(folder: str, dtype: str | torch.dtype | None) -> PreTrainedModel:
    """The model without its weights, which are vLLM's matter: config, width of the embeddings, end tokens."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        chosen = resolve_dtype(dtype or config.dtype, torch.device("cpu"))
        model = AutoModelForCausalLM.from_config(config, dtype=chosen)
    with contextlib.suppress(OSError):  # it has none: the config's own stays
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model
