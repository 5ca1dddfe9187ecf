"""Guards: handles that users type never resolve, and an LLM that cannot read handles never gets them."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import BaseLanguageModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.prompt_values import ChatPromptValue, PromptValue, StringPromptValue
from langchain_core.runnables import Runnable, RunnableLambda, RunnableSequence, RunnableWithFallbacks
from langchain_core.runnables.base import RunnableBindingBase

from langchain_pic_rag.texts import content_handles, map_content
from pic_rag import escape_handles, find_handles

LLM_TYPE = "chat-pic-rag"
"""`ChatPIC._llm_type`: how a callback knows the model."""


def reads_handles(llm: object) -> bool:
    """Whether an LLM, or a chain that ends in one, can be given handles.

    True for `ChatPIC`, also behind `bind`, `with_retry`, `with_config` and `with_fallbacks` (all of them must), and for
    a sequence with `PICRestore` or `ChatPIC` before any other LLM. Another class says so with an attribute
    `reads_handles = True`. What stands behind a lambda cannot be seen: that is False.
    """
    if isinstance(llm, RunnableBindingBase):
        return reads_handles(llm.bound)
    if isinstance(llm, RunnableWithFallbacks):
        return all(reads_handles(option) for option in (llm.runnable, *llm.fallbacks))
    if isinstance(llm, RunnableSequence):
        return any(reads_handles(step) for step in llm.steps[: _first_llm(llm) + 1])
    return getattr(llm, "reads_handles", False) is True


class HandleGuard(BaseCallbackHandler):
    """Stops a run in which an LLM that cannot read handles is about to get some.

    A callback sees every prompt just before its LLM does, so this works for any chain or agent:
    `chain.invoke(question, {"callbacks": [HandleGuard()]})`.
    """

    raise_error = True
    run_inline = True

    def on_chat_model_start(
        self,
        serialized: dict[str, Any],
        messages: list[list[BaseMessage]],
        **kwargs: Any,
    ) -> None:
        """Check the messages for a chat model.

        Raises:
            ValueError: they hold a handle, and the model is not `ChatPIC`.
        """
        if (kwargs.get("invocation_params") or {}).get("_type") == LLM_TYPE:
            return
        handles = [handle for batch in messages for message in batch for handle in content_handles(message)]
        _refuse(handles, serialized)

    def on_llm_start(self, serialized: dict[str, Any], prompts: list[str], **kwargs: Any) -> None:
        """Check the prompts of a completion model.

        Raises:
            ValueError: they hold a handle.
        """
        _refuse([handle for prompt in prompts for handle in find_handles(prompt)], serialized)


def _first_llm(sequence: RunnableSequence[Any, Any]) -> int:
    """Position of the first step that is a language model."""
    kinds = [isinstance(step, BaseLanguageModel) for step in sequence.steps]
    return kinds.index(True) if True in kinds else len(kinds)


def _refuse(handles: list[str], serialized: dict[str, Any] | None) -> None:
    if not handles:
        return
    name = ((serialized or {}).get("id") or ["this LLM"])[-1]
    raise ValueError(
        f"llm must read handles, as ChatPIC does, got {name} with {handles[0]} in its prompt. Use ChatPIC, put "
        "PICRestore() before the LLM, or pass llm= and fallback='text' to the compressor."
    )


def escape(value: Any) -> Any:
    """A text, a prompt, messages or anything made of them, with its handles turned into text."""
    if isinstance(value, str):
        return escape_handles(value)
    if isinstance(value, StringPromptValue):
        return StringPromptValue(text=escape_handles(value.text))
    if isinstance(value, PromptValue):
        return ChatPromptValue(messages=escape(value.to_messages()))
    if isinstance(value, BaseMessage):
        changed = {"content": map_content(value, escape_handles)}
        if isinstance(value, AIMessage):
            changed["tool_calls"] = escape(value.tool_calls)
        return value.model_copy(update=changed)
    if isinstance(value, dict):
        return {key: escape(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(escape(item) for item in value)
    return value


escape_input: Runnable[Any, Any] = RunnableLambda(escape, name="escape_input")
"""A step at the entrance of a chain: handles in the user's text, messages or dict of them become text.

A handle that nobody handed out is refused without it too. With it the chain answers instead of raising, and one that a
user was shown and copied is text as well."""
