"""ChatPIC: the chat model that reads memories where the prompt has handles."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict, Field, model_validator

from langchain_pic_rag.guard import LLM_TYPE
from langchain_pic_rag.messages import to_prompt, tool_chunk, usage
from langchain_pic_rag.settings import ModelSettings
from langchain_pic_rag.store import store_name
from langchain_pic_rag.texts import content_handles
from langchain_pic_rag.tools import CallWatch, parse_calls
from pic_rag import UnknownHandleError, find_handles, shared_compressor, shared_generator

if TYPE_CHECKING:
    import builtins
    from collections.abc import Mapping

    from pic_rag import BaseGenerator, Compressor, Generation, Memory
else:
    BaseGenerator = Any  # pydantic reads annotations at import, when torch must not be loaded yet

logger = logging.getLogger(__name__)

_REMEDY = (
    "This namespace of the store has neither its memory, made by this compressor, nor its text. Compress its document "
    "again; keep_source=True keeps the text too. A store that could not be written has logged a warning."
)
_SAMPLING = ("max_tokens", "temperature", "top_p", "seed")


class _Call(NamedTuple):
    """What the generator is asked in one call; `tokens_saved`: text tokens less memory tokens of its handles."""

    prompt: str | Sequence[Mapping[str, Any]]
    memories: dict[str, Memory]
    options: dict[str, Any]
    tokens_saved: int


class ChatPIC(ModelSettings, BaseChatModel):
    """A generator that reads the memories behind handles, in messages of every role.

    A handle is read only if a compressor handed it out lately in this model's namespace of its store
    (`pic_rag.HandleSigner`), and if this model's compressor made the memory; any other raises `UnknownHandleError`, and
    so do handles in what people say when system or tool messages hold some. A memory that the store has lost is made
    again if its text is still there. With `invoke(..., handles=[...])` only those are read, and every other handle in
    the prompt is text.

    Raises:
        UnknownHandleError: when called, for any other handle, wherever it stands.
        ValueError: when called, for content that is not text, or a prompt that does not fit the generator's context.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, populate_by_name=True, extra="ignore")

    ignored_settings: ClassVar[frozenset[str]] = frozenset({"api_key", "max_retries", "streaming", "timeout"})
    """What applications pass to every chat model, and one in this process has no use for."""

    reads_handles: ClassVar[bool] = True

    generator_name: str | None = None
    """Where the generator is, when it is not where the compressor's checkpoint says."""

    generator: BaseGenerator | None = Field(default=None, exclude=True, repr=False)
    """A ready `pic_rag.Generator` or `VLLMGenerator`, used instead of the one the compressor names."""

    max_tokens: int = Field(default=256, ge=1)
    """Length in tokens at which an answer ends in any case."""

    temperature: float = Field(default=0.0, ge=0.0)
    """0 decodes greedily."""

    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Probability mass that tokens are drawn from, when the temperature is above 0."""

    seed: int | None = None
    """Of the draws; None: another every time."""

    stop: list[str] | None = None
    """Strings that end an answer and are not part of it."""

    @model_validator(mode="after")
    def _check_pair(self) -> ChatPIC:
        if self.compressor is not None and self.generator is not None:
            self.generator.check_reads(self.get_checkpoint().generator.id)
        return self

    def get_generator(self) -> BaseGenerator:
        """The generator, loaded at the first call of any component with the same settings."""
        if self.generator is not None:
            if self.compressor is None:
                self.generator.check_reads(self.get_checkpoint().generator.id)
            return self.generator
        return shared_generator(self.get_checkpoint(), self.generator_name, **self.loading)

    def get_compressor(self) -> Compressor:
        """The compressor, for memories that the store has lost; `model_kwargs` are the generator's."""
        if self.compressor is not None:
            return self.compressor
        return shared_compressor(self.model_name, device=self.device, dtype=self.dtype)

    @property
    def _llm_type(self) -> str:
        return LLM_TYPE

    @property
    def _identifying_params(self) -> builtins.dict[str, Any]:
        """All that an answer depends on besides the prompt: the key of LangChain's LLM cache."""
        return {
            "model_name": self._name,
            "compressor_fingerprint": self.get_checkpoint().fingerprint,
            "generator": self.get_checkpoint().generator.id,
            "generator_dtype": self.dtype if self.generator is None else str(self.generator.model.dtype),
            "device": self.device,
            "store": store_name(self.get_store()),
            "namespace": self.namespace,
            "own_stop": self.stop,  # LangChain puts the call's own in the place of "stop"
            **{name: getattr(self, name) for name in _SAMPLING},
        }

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = LangSmithParams(
            ls_provider="pic-rag",
            ls_model_type="chat",
            ls_model_name=kwargs.get("model") or self._name,
            ls_temperature=kwargs.get("temperature", self.temperature),
            ls_max_tokens=kwargs.get("max_tokens", self.max_tokens),
        )
        if used := stop or self.stop:
            params["ls_stop"] = used
        return params

    @property
    def _name(self) -> str:
        return self.model_name or (self.compressor and self.compressor.name) or "pic-rag"

    def bind_tools(
        self,
        tools: Sequence[builtins.dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | builtins.dict[str, Any] | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Tell the generator which tools it can call. How well it does is up to its own training.

        Args:
            tools: anything LangChain makes a tool of.
            tool_choice: "any" or True asks for some call, a name (or the dict that OpenAI or Anthropic put around it)
                for a call of that tool; None, False, "none" or "auto" leaves it open.
            strict: has no effect: nothing makes this generator keep to a schema.
            **kwargs: bound as they are.
        """
        formatted = [convert_to_openai_tool(tool) for tool in tools]
        wanted: Any = tool_choice
        if isinstance(tool_choice, dict):
            wanted = tool_choice.get("function", tool_choice).get("name") or tool_choice.get("type")
        choice = {True: "any", "required": "any", False: None, "auto": None, "none": None}.get(wanted, wanted)
        return self.bind(tools=formatted, tool_choice=choice, **kwargs)

    def get_num_tokens(self, text: str) -> int:
        """Tokens that the generator reads for a text.

        A handle counts as its memory tokens, one that would not be read as the characters it is written in.
        """
        return self._count(text, find_handles(text))

    def get_num_tokens_from_messages(
        self,
        messages: list[BaseMessage],
        tools: Sequence[builtins.dict[str, Any] | type | Callable[..., Any] | BaseTool] | None = None,
    ) -> int:
        """Tokens that the generator reads for messages: memories, the chat template and the tools included.

        Handles count as in `get_num_tokens`: a user may have typed one, or it has grown old.
        """
        if not messages and not tools:  # memories that drop messages until the rest fits may have dropped all
            return 0
        prompt = to_prompt(messages, [convert_to_openai_tool(tool) for tool in tools or ()])
        return self._count(prompt, [handle for message in messages for handle in content_handles(message)])

    def _count(self, prompt: str | Sequence[Mapping[str, Any]], shown: Sequence[str]) -> int:
        """Tokens of a prompt in which these handles stand, signed or not."""
        signer = self.signer
        known = {signed: handle for signed in shown if (handle := signer.verify(signed))}
        memories, _ = self.get_memory_cache().find(known.values())
        read, _ = signer.unsign(prompt, only=[signed for signed, handle in known.items() if handle in memories])
        return self.get_generator().count_tokens(read, memories)

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of a text; a handle, which has none, is tokenised as the characters it is written in."""
        return list(self.get_generator().tokenizer(text, add_special_tokens=False)["input_ids"])

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        call = self._call(messages, stop, kwargs)
        [generation] = self.get_generator().generate(call.prompt, call.memories, **call.options)
        return self._result(generation, call, kwargs)

    def _result(self, generation: Generation, call: _Call, kwargs: builtins.dict[str, Any]) -> ChatResult:
        use = parse_calls(generation.text) if kwargs.get("tools") else None
        message = AIMessage(
            content=use.text if use else generation.text,
            tool_calls=use.calls if use else [],
            invalid_tool_calls=use.invalid if use else [],
            usage_metadata=usage(generation),
            response_metadata=self._response_metadata(generation, call.tokens_saved),
        )
        info = {"finish_reason": generation.finish_reason}
        return ChatResult(generations=[ChatGeneration(message=message, generation_info=info)])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        call = self._call(messages, stop, kwargs)
        watch = CallWatch(may_call=bool(kwargs.get("tools")))
        with closing(self.get_generator().stream(call.prompt, call.memories, **call.options)) as pieces:
            while True:
                try:
                    piece = next(pieces)
                except StopIteration as done:
                    generation: Generation = done.value
                    break
                if said := watch.add(piece):
                    yield ChatGenerationChunk(message=AIMessageChunk(content=said))
        yield from self._last_chunks(generation, call, watch)

    def _last_chunks(self, generation: Generation, call: _Call, watch: CallWatch) -> Iterator[ChatGenerationChunk]:
        if rest := watch.rest(generation.text):
            yield tool_chunk(rest)
        last = AIMessageChunk(
            content="",
            usage_metadata=usage(generation),
            response_metadata=self._response_metadata(generation, call.tokens_saved),
            chunk_position="last",
        )
        yield ChatGenerationChunk(message=last, generation_info={"finish_reason": generation.finish_reason})

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        generator, call = await asyncio.to_thread(self._prepare, messages, stop, kwargs)
        [generation] = await generator.agenerate(call.prompt, call.memories, **call.options)
        return self._result(generation, call, kwargs)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        generator, call = await asyncio.to_thread(self._prepare, messages, stop, kwargs)
        watch = CallWatch(may_call=bool(kwargs.get("tools")))
        # A consumer that goes away closes the pieces, which stops the model at its next token.
        async with aclosing(generator.astream(call.prompt, call.memories, **call.options)) as pieces:
            async for piece in pieces:
                if not isinstance(piece, str):
                    generation = piece
                elif said := watch.add(piece):
                    yield ChatGenerationChunk(message=AIMessageChunk(content=said))
        for chunk in self._last_chunks(generation, call, watch):
            yield chunk

    def _prepare(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: builtins.dict[str, Any]
    ) -> tuple[BaseGenerator, _Call]:
        """What takes its time before the first token: the model loaded, memories read."""
        return self.get_generator(), self._call(messages, stop, kwargs)

    def _call(self, messages: list[BaseMessage], stop: list[str] | None, kwargs: builtins.dict[str, Any]) -> _Call:
        if not messages:
            raise ValueError("messages must hold at least one, got none. Ask something.")
        unknown = kwargs.keys() - {*_SAMPLING, "tools", "tool_choice", "parallel_tool_calls", "handles"}
        if unknown:
            raise TypeError(
                f"{min(unknown)} must be one of {', '.join(_SAMPLING)}, stop, handles, tools, tool_choice, got "
                f"{kwargs[min(unknown)]!r}. ChatPIC has no such option: leave it out."
            )
        options = {name: getattr(self, name) if kwargs.get(name) is None else kwargs[name] for name in _SAMPLING}
        options["max_new_tokens"] = options.pop("max_tokens")
        wanted = self.stop or () if stop is None else stop
        options["stop"] = (wanted,) if isinstance(wanted, str) else tuple(wanted)
        prompt = to_prompt(messages, kwargs.get("tools") or (), kwargs.get("tool_choice"))
        read, handles = self.signer.unsign(prompt, only=kwargs.get("handles"))
        memories = self._memories(handles)
        saved = sum(memories[handle].text_tokens - memories[handle].memory_tokens for handle in handles)
        return _Call(read, memories, options, saved)

    def _memories(self, handles: Sequence[str]) -> builtins.dict[str, Memory]:
        """The memories of this namespace that the handles stand for."""
        wanted = list(dict.fromkeys(handles))
        if not wanted:
            return {}
        found, damaged = self.get_memory_cache().find(wanted)
        for error in damaged.values():
            logger.warning("A damaged memory is made again, if its text is kept: %s", error)
        found |= self._compress_again([handle for handle in wanted if handle not in found])
        for handle in wanted:
            if handle not in found:
                raise UnknownHandleError(handle, len(found), _REMEDY)
        return found

    def _compress_again(self, handles: Sequence[str]) -> builtins.dict[str, Memory]:
        """Memories that the store has lost, of the handles whose source text it still holds."""
        made: builtins.dict[str, Memory] = {}
        for handle, text in (self.sources.get(handles) if handles else {}).items():
            compressor = self.get_compressor()
            for ratio in compressor.ladder():
                if compressor.handle(text, ratio) == handle:
                    [made[handle]], _ = self.get_memory_cache().get_or_compress(
                        [text],
                        compressor,
                        ratio,
                        min_fidelity=0.0 if ratio == 1 else None,  # only where it is asked for is raw text a memory
                        generator=self.get_generator(),
                    )
        return made

    def _response_metadata(self, generation: Generation, tokens_saved: int) -> builtins.dict[str, Any]:
        return {
            "model_name": self._name,
            "model_provider": "pic-rag",
            "memory_tokens": generation.memory_tokens,
            "tokens_saved": tokens_saved,
        }
