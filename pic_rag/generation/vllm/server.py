"""A vLLM server as an engine: every prompt is one request, all of them at once, retried until the server answers.

Requests run in an event loop of their own, so that threads and coroutines of the caller share one pool of connections.
Retries, back-off, `Retry-After`, timeouts and event streams are the openai client's. This file does not know handles.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import weakref
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from pic_rag.assembler import Assembled
from pic_rag.generation.completion import Completion
from pic_rag.generation.sampling import Sampling
from pic_rag.generation.vllm.wire import chat_request, check_prompt

if TYPE_CHECKING:
    import openai

T = TypeVar("T")


class ServerEngine:
    """Decodes on a vLLM server. Safe to share between threads and event loops.

    Args:
        url: of the server, with or without `/v1`.
        generator: served name of the model, for prompts of text alone.
        reader: served name of the model with its reader, for prompts with memories.
        end_token_ids: tokens that end an answer.
        api_key: None takes `$VLLM_API_KEY`, if it is set.
        timeout_s: longest wait for an answer, or for the next token of a stream.
        retries: further attempts when the server cannot be reached, is busy (429) or fails (5xx); the pauses between
            them double, from half a second to eight.

    Raises:
        ConnectionError: when no server answers.
        PermissionError: when it wants another `api_key`.
        ValueError: when it serves no such models.
    """

    batch_size = 256  # requests in flight for one call; the server queues what it has no room for

    def __init__(
        self,
        url: str,
        *,
        generator: str,
        reader: str,
        end_token_ids: frozenset[int],
        api_key: str | None,
        timeout_s: float,
        retries: int,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {url!r}. Write http://{url}.")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.end_token_ids = end_token_ids
        self._generator = generator
        self._reader = reader
        self._make_client = partial(_client, f"{self.url}/v1", api_key, timeout_s, retries)
        self._starting = threading.Lock()
        self._start()
        self.context_tokens: int | None = self._submit(self._check_models()).result()

    def decode(self, prompts: Sequence[Assembled], completions: Sequence[Completion], sampling: Sampling, /) -> None:
        """Ask for every completion at once, and wait until all are finished or one has failed."""
        answering = self._submit(self._answer_all(prompts, completions, sampling))
        try:
            answering.result()
        finally:
            answering.cancel()  # after Ctrl-C: closed connections end the server's work

    async def adecode(
        self, prompts: Sequence[Assembled], completions: Sequence[Completion], sampling: Sampling, /
    ) -> None:
        """`decode` for coroutines; cancelling it ends the requests."""
        await asyncio.wrap_future(self._submit(self._answer_all(prompts, completions, sampling)))

    def _start(self) -> None:
        """Connections, and a thread for them, of this process."""
        self._process = os.getpid()
        self._client = self._make_client()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="pic-rag-vllm", daemon=True).start()
        weakref.finalize(self, _stop, self._client, self._loop)

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        with self._starting:
            if self._process != os.getpid():  # threads do not survive a fork
                self._start()
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _check_models(self) -> int:
        """Find both names among those served; returns the server's longest context in tokens."""
        try:
            served = {model.id: model async for model in self._client.models.list()}
        except _failures() as error:
            raise _explained(error, self.url) from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # a page for people, say
            raise _no_vllm(self.url, "an answer that is no list of models") from error
        missing = sorted({self._generator, self._reader} - served.keys())
        if missing:
            raise ValueError(
                f"The server at {self.url} must serve {missing[0]!r}, got {sorted(served)}. Start it with `pic-rag "
                "serve`, which names models by their weights, or say with generator= and reader= what it calls them."
            )
        card = served[self._generator].model_extra or {}
        if "max_model_len" not in card:
            raise _no_vllm(self.url, "models without max_model_len")
        return int(card["max_model_len"])

    async def _answer_all(
        self, prompts: Sequence[Assembled], completions: Sequence[Completion], sampling: Sampling
    ) -> None:
        pairs = zip(prompts, completions, strict=True)
        tasks = [asyncio.ensure_future(self._answer(*pair, sampling)) for pair in pairs]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # one has failed, or all are done
                task.cancel()

    async def _answer(self, prompt: Assembled, completion: Completion, sampling: Sampling) -> None:
        request = chat_request(
            prompt,
            sampling,
            model=self._reader if prompt.memory_tokens else self._generator,
            end_token_ids=completion.end_token_ids,
            stream=completion.streamed,
        )
        try:
            if completion.streamed:
                await self._stream(prompt, completion, request)
            else:
                await self._fetch(prompt, completion, request)
        except _failures() as error:
            raise _explained(error, self.url) from error
        except json.JSONDecodeError as error:
            raise ConnectionError(f"The server at {self.url} must answer in JSON, got: {error}. Ask again.") from error
        if not completion.finished:
            raise ConnectionError(
                f"The server at {self.url} must finish its answer, got {len(completion.token_ids)} tokens and then "
                "silence. Ask again; if it stays so, see the server's log."
            )

    async def _fetch(self, prompt: Assembled, completion: Completion, request: dict[str, Any]) -> None:
        answer: Any = await self._client.post("/chat/completions", body=request, cast_to=object)
        [choice, *_] = _choices(answer, self.url) or [{}]
        check_prompt(prompt, answer.get("prompt_token_ids") or ())
        completion.cached_tokens = _cached_tokens(answer)
        _feed(completion, choice)

    async def _stream(self, prompt: Assembled, completion: Completion, request: dict[str, Any]) -> None:
        import openai

        chunks: Any = await self._client.post(
            "/chat/completions", body=request, cast_to=object, stream=True, stream_cls=openai.AsyncStream[object]
        )
        async with chunks:  # leaving it early closes the connection, which ends the server's work
            checked = False
            async for chunk in chunks:
                choices = _choices(chunk, self.url)
                if not checked:  # the first one says what was read
                    check_prompt(prompt, chunk.get("prompt_token_ids") or ())
                    checked = True
                for choice in choices:
                    _feed(completion, choice)
                if completion.finished:
                    return


def _choices(answer: Any, url: str) -> list[dict[str, Any]]:  # noqa: ANN401 - whatever was sent
    """The answers in what a server sent."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not isinstance(choices, list):
        said = answer.get("error", answer) if isinstance(answer, dict) else answer
        raise _no_vllm(url, f"an answer without choices: {str(said)[:200]!r}")
    return choices


def _no_vllm(url: str, got: str) -> ValueError:
    return ValueError(
        f"url must be that of a vLLM server, got {url!r}, which gives {got}. Start one with `pic-rag serve`."
    )


def _stop(client: openai.AsyncOpenAI, loop: asyncio.AbstractEventLoop) -> None:
    """Close the connections, then end the loop, and with it its thread."""

    async def close() -> None:
        await client.close()
        loop.stop()

    asyncio.run_coroutine_threadsafe(close(), loop)


def _feed(completion: Completion, choice: dict[str, Any]) -> None:
    """Tokens of an answer, or of a piece of one."""
    reason = choice.get("finish_reason")
    completion.extend(choice.get("token_ids") or (), reason if reason in ("stop", "length") else None)


def _cached_tokens(answer: dict[str, Any]) -> int:
    """Rows of the prompt that the server had read before; streams say it too late to count."""
    details = (answer.get("usage") or {}).get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or 0)


def _client(url: str, api_key: str | None, timeout_s: float, retries: int) -> openai.AsyncOpenAI:
    try:
        import openai
    except ImportError as error:
        raise ImportError("A vLLM server is reached through the openai client: pip install 'pic-rag[vllm]'") from error
    key = api_key or os.environ.get("VLLM_API_KEY") or "none"  # the client insists on one
    return openai.AsyncOpenAI(base_url=url, api_key=key, timeout=timeout_s, max_retries=retries)


def _failures() -> type[openai.APIError]:
    import openai

    return openai.APIError


def _explained(error: openai.APIError, url: str) -> Exception:
    """The error of the client as one that says what to do."""
    import openai

    if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
        return PermissionError(f"api_key must be one that the server at {url} accepts, got: {error.message}")
    if isinstance(error, openai.APIStatusError) and error.status_code < 500 and error.status_code != 429:
        return ValueError(f"The server at {url} must accept the request, got {error.status_code}: {error.message}")
    return ConnectionError(
        f"url must be that of a vLLM server that answers, got {url!r}: {error.message} "
        "Start one with `pic-rag serve`, or raise timeout_s and retries."
    )
