"""The LLM: answers prompts in which handles stand for memories."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Generator as ResponseStream
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.generic_utils import messages_to_prompt as generic_messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr, field_validator, model_validator
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import LLM, default_completion_to_prompt
from llama_index.llms.pic_rag.responses import (
    achats,
    acompletions,
    as_chat,
    as_messages,
    as_runtime_errors,
    completion,
    completions,
)

from pic_rag import HandleSigner, UnknownHandleError, find_handles, shared_checkpoint, shared_generator, shared_store

if TYPE_CHECKING:
    from pic_rag import BaseGenerator, Checkpoint, Generation, Memory, MemoryCache, MemoryStore

_REMEDY = (
    "This namespace of the store does not have its memory, made by this LLM's compressor: pass its node through "
    "PICCompressor again."
)
Prompt = str | Sequence[Mapping[str, Any]]
_MOST_COUNTED = 100_000  # memories whose sizes are remembered
_SETTINGS = ("max_new_tokens", "stop", "temperature", "top_p", "seed")


class PICLLM(LLM):
    """A local LLM that reads memories. Nothing is loaded before it is first used; calls from many threads take turns.

    A handle is read only if `PICCompressor` handed it out lately in this LLM's namespace of its store
    (`pic_rag.HandleSigner`), and if this LLM's compressor made the memory. Any other raises
    `pic_rag.UnknownHandleError`, and so do handles in what people say when system or tool messages hold some.

    Raises:
        UnknownHandleError: when called, for such a handle.
        RuntimeError: when called, for a prompt that does not fit the context, content that is not text, or a setting
            that is unknown or out of range. (Refining synthesizers swallow a ValueError.)
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())

    model_name: str | None = Field(
        default=None,
        description="Folder or hub id of a trained compressor, as for PICCompressor; it names the LLM that reads its "
        "memories. None: the one shipped with pic-rag.",
    )
    generator_name: str | None = Field(
        default=None, description="Where that LLM is, when it is not where the compressor's checkpoint says."
    )
    device: str | None = Field(default=None, description="Where to run; None: cuda, mps or cpu.")
    dtype: str | None = Field(default=None, description="Compute dtype; None: the device's fast one.")
    namespace: str = Field(
        default="default",
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$",
        description="Only memories of this namespace of the store are read.",
    )
    cache_folder: str | None = Field(
        default=None, description="Folder of the default store, memories.sqlite; None: pic-rag's cache folder."
    )
    context_window: int | None = Field(
        default=None, gt=0, description="Tokens of prompt and answer together; None: what the model can."
    )
    max_new_tokens: int = Field(default=256, gt=0, description="Longest answer, in tokens.")
    is_chat_model: bool | None = Field(
        default=None, description="Whether to use the chat template; None: if the model has one."
    )
    generate_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Settings of every call: stop, temperature, top_p, seed."
    )
    model_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of Generator.from_checkpoint, such as merge_calls."
    )
    generator: Any = Field(
        default=None, exclude=True, repr=False, description="A pic_rag.Generator or VLLMGenerator, in place of a name."
    )
    compressor: Any = Field(default=None, exclude=True, repr=False, description="A pic_rag.Compressor, likewise.")
    store: Any = Field(
        default=None, exclude=True, repr=False, description="A pic_rag.MemoryStore or any LangChain ByteStore."
    )

    _memory_tokens: dict[str, int] = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        """LlamaIndex takes a misspelt setting without a word, and it would do nothing."""
        unknown = set(values) - set(cls.model_fields) if isinstance(values, dict) else ()
        if unknown:
            raise ValueError(
                f"Unknown setting {min(unknown)!r}. {cls.__name__} has: {', '.join(sorted(cls.model_fields))}; and in "
                f"generate_kwargs, for every call: {', '.join(_SETTINGS)}."
            )
        return values

    @field_validator("generate_kwargs")
    @classmethod
    def _check_generate_kwargs(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Names only: ranges are checked at the first call, by what loads torch."""
        return _check_settings(settings)

    @model_validator(mode="after")
    def _check_pair(self) -> PICLLM:
        if self.compressor is not None and self.generator is not None:
            self.generator.check_reads(self.get_checkpoint().generator.id)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """LlamaIndex deletes what cannot be pickled, here as well, and the copy would load another one in its place."""
        given = {name: getattr(self, name) for name in ("generator", "compressor", "store")}
        state = super().__getstate__()
        for name, value in given.items():
            if name not in state["__dict__"]:
                self.__dict__.update(given)
                remedy = "a SQLiteStore, or cache_folder," if name == "store" else "model_name and generator_name"
                raise TypeError(
                    f"{type(self).__name__} must have a {name} that can be pickled, got {type(value).__name__}. "
                    f"Give {remedy} in its place."
                )
        return state

    @classmethod
    def class_name(cls) -> str:
        """The component's name in serialised form."""
        return "PICLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex plans prompts by. Loads the model."""
        generator = self.get_generator()
        has_template = bool(generator.tokenizer.chat_template)
        return LLMMetadata(
            context_window=self.context_window or generator.context_tokens,
            num_output=self.max_new_tokens,
            is_chat_model=has_template if self.is_chat_model is None else self.is_chat_model,
            model_name=generator.model_id,
        )

    def to_payload(self) -> dict[str, Any]:
        """What traces say about this LLM: its settings. `metadata` would load the model, in the event loop."""
        return self.to_dict()

    def get_checkpoint(self) -> Checkpoint:
        """The checkpoint of the compressor whose memories are read; the compressor itself is not loaded."""
        return shared_checkpoint(self.model_name) if self.compressor is None else self.compressor.checkpoint

    def get_generator(self) -> BaseGenerator:
        """The model that answers: the one given, or one that all components with the same settings share."""
        if self.generator is not None:
            if self.compressor is None:
                self.generator.check_reads(self.get_checkpoint().generator.id)
            return self.generator
        return shared_generator(
            self.get_checkpoint(), self.generator_name, device=self.device, dtype=self.dtype, **self.model_kwargs
        )

    def get_store(self) -> MemoryStore:
        """The store in use."""
        return self.store if self.store is not None else shared_store(self.cache_folder)

    def get_memory_cache(self) -> MemoryCache:
        """The memories that this LLM reads."""
        from pic_rag import MemoryCache

        return MemoryCache(self.get_store(), self.get_checkpoint().fingerprint, namespace=self.namespace)

    @property
    def signer(self) -> HandleSigner:
        """Knows the handles that were handed out in this namespace."""
        return HandleSigner(self.get_store(), self.namespace)

    def unknown_handles(self, handles: Sequence[str]) -> list[str]:
        """Those of the signed handles that this LLM would not read. `PICCompressor` asks before it shows them."""
        signer = self.signer
        plain = {signed: signer.verify(signed) for signed in handles}
        found = self.get_memory_cache().find(handle for handle in plain.values() if handle is not None)
        return [signed for signed in handles if plain[signed] not in found.memories]

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, a handle as its memory tokens (-1 each): `set_global_tokenizer(llm.tokenize)`.

        LlamaIndex plans prompts by this count. A handle that would not be read counts as text.
        """
        token_ids: list[int] = []
        for handle in find_handles(text):
            before, _, text = text.partition(handle)
            token_ids += self._tokenize_text(before)
            count = self._count_memory_tokens(handle)
            token_ids += self._tokenize_text(handle) if count is None else [-1] * count
        return token_ids + self._tokenize_text(text)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt. One that is not `formatted` goes through the chat template, as a user's message."""
        return self._answer(lambda: self._from_text(prompt, formatted), kwargs)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Answer a prompt piece by piece."""
        return self._stream(lambda: self._from_text(prompt, formatted), kwargs)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation; handles may stand in messages of every role."""
        return as_chat(self._answer(lambda: self._from_messages(messages), kwargs))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer a conversation piece by piece."""
        return self._stream_chat(messages, kwargs)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """As `complete`, without blocking the event loop; a cancelled call stops the model."""
        return await self._aanswer(lambda: self._from_text(prompt, formatted), kwargs)

    @llm_completion_callback()
    async def astream_complete(
        self,
        prompt: str,
        formatted: bool = False,
        **kwargs: Any,
    ) -> CompletionResponseAsyncGen:
        """As `stream_complete`, without blocking the event loop; a consumer that stops asking stops the model."""
        return await self._astream(lambda: self._from_text(prompt, formatted), kwargs)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """As `chat`, without blocking the event loop; a cancelled call stops the model."""
        return as_chat(await self._aanswer(lambda: self._from_messages(messages), kwargs))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """As `stream_chat`, without blocking the event loop; a consumer that stops asking stops the model."""
        return achats(await self._astream(lambda: self._from_messages(messages), kwargs))

    def _answer(self, make_prompt: Callable[[], Prompt], settings: dict[str, Any]) -> CompletionResponse:
        with as_runtime_errors():
            generator, read, memories = self._prepare(make_prompt)
            generations: list[Generation] = generator.generate(read, memories, **self._settings(settings))
        return completion(generations[0])

    async def _aanswer(self, make_prompt: Callable[[], Prompt], settings: dict[str, Any]) -> CompletionResponse:
        with as_runtime_errors():
            generator, read, memories = await asyncio.to_thread(self._prepare, make_prompt)
            generations: list[Generation] = await generator.agenerate(read, memories, **self._settings(settings))
        return completion(generations[0])

    async def _astream(self, make_prompt: Callable[[], Prompt], settings: dict[str, Any]) -> CompletionResponseAsyncGen:
        """Checks the prompt now, decodes when the first piece is asked for."""
        with as_runtime_errors():
            generator, read, memories = await asyncio.to_thread(self._prepare, make_prompt)
            return acompletions(generator.astream(read, memories, **self._settings(settings)))

    def _prepare(self, make_prompt: Callable[[], Prompt]) -> tuple[BaseGenerator, Prompt, list[Memory]]:
        """What blocks: a model to load, a store to read."""
        return self.get_generator(), *self._read(make_prompt())

    def _stream(
        self, make_prompt: Callable[[], Prompt], settings: dict[str, Any]
    ) -> ResponseStream[CompletionResponse, None, None]:
        """Checks the prompt now, decodes when the first piece is asked for."""
        with as_runtime_errors():
            generator, read, memories = self._prepare(make_prompt)
            return completions(generator.stream(read, memories, **self._settings(settings)))

    def _stream_chat(
        self, messages: Sequence[ChatMessage], settings: dict[str, Any]
    ) -> ResponseStream[ChatResponse, None, None]:
        stream = self._stream(lambda: self._from_messages(messages), settings)
        return (as_chat(response) for response in stream)

    def _settings(self, settings: dict[str, Any]) -> dict[str, Any]:
        given = {**self.generate_kwargs, **{name: value for name, value in settings.items() if value is not None}}
        _check_settings(given)
        if isinstance(given.get("stop"), str):
            given["stop"] = (given["stop"],)
        return {"max_new_tokens": self.max_new_tokens, **given}

    def _from_text(self, prompt: str, formatted: bool) -> Prompt:
        """Without a chat template, or with a `completion_to_prompt` of the user's own, a text stays text."""
        own = self.completion_to_prompt not in (None, default_completion_to_prompt)
        if formatted:
            return prompt
        if own and self.completion_to_prompt is not None:
            return self.completion_to_prompt(prompt)
        return [{"role": "user", "content": prompt}] if self.metadata.is_chat_model else prompt

    def _from_messages(self, messages: Sequence[ChatMessage]) -> Prompt:
        own = self.messages_to_prompt not in (None, generic_messages_to_prompt)
        if self.messages_to_prompt is not None and (own or not self.metadata.is_chat_model):
            return self.messages_to_prompt(messages)
        if not messages:
            raise ValueError("messages must hold at least one, got none. Ask something.")
        return as_messages(messages)

    def _read(self, prompt: Prompt) -> tuple[Prompt, list[Memory]]:
        """The prompt with its signed handles as plain ones, and their memories.

        Raises:
            UnknownHandleError: one was not handed out here lately, or its memory is missing. Its text is not at hand:
                only the postprocessor has the nodes.
        """
        read, handles = self.signer.unsign(prompt)
        return read, self._memories(list(dict.fromkeys(handles)))

    def _memories(self, handles: Sequence[str]) -> list[Memory]:
        memories = self.get_memory_cache().get(handles) if handles else []
        known = [memory for memory in memories if memory is not None]
        if None in memories:
            raise UnknownHandleError(handles[memories.index(None)], len(known), _REMEDY)
        return known

    def _tokenize_text(self, text: str) -> list[int]:
        tokenizer = self.get_generator().tokenizer
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []

    def _count_memory_tokens(self, signed: str) -> int | None:
        """Kept for the next time: prompts are planned by counting the same handles again and again."""
        handle = self.signer.verify(signed)
        if handle is None:
            return None
        if handle not in self._memory_tokens:
            [memory] = self.get_memory_cache().get([handle])
            if memory is None:
                return None
            if len(self._memory_tokens) >= _MOST_COUNTED:
                self._memory_tokens.clear()
            self._memory_tokens[handle] = memory.memory_tokens
        return self._memory_tokens[handle]


def _check_settings(given: dict[str, Any]) -> dict[str, Any]:
    if unknown := given.keys() - set(_SETTINGS):
        raise ValueError(
            f"{min(unknown)} must be one of {', '.join(_SETTINGS)}, got {given[min(unknown)]!r}. PICLLM has no such "
            "setting of a call: leave it out."
        )
    return given
