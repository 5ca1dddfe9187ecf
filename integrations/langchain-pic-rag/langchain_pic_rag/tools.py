"""Tool calls as text, in the format that Hermes, Qwen and SmolLM2 models were trained on.

The generator is a plain causal LM: which tools there are stands in its system message, and a call is JSON between
`<tool_call>` tags in its answer. How well that works is up to the model; one of 135M parameters rarely manages.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from langchain_core.messages import InvalidToolCall, ToolCall
from langchain_core.messages.tool import invalid_tool_call, tool_call

_TAG = "<tool_call>"
_CALL = re.compile(rf"{_TAG}\s*(.*?)\s*</tool_call>", re.DOTALL)


class ToolUse(NamedTuple):
    """An answer taken apart.

    Attributes:
        text: what is left of it without calls.
        calls: the calls that are valid JSON with a name.
        invalid: the others.
    """

    text: str
    calls: list[ToolCall]
    invalid: list[InvalidToolCall]


def tool_instructions(tools: Sequence[Mapping[str, Any]], tool_choice: str | None = None) -> str:
    """What a system message says about the tools.

    Args:
        tools: in OpenAI's form.
        tool_choice: "any" asks for some call, a name for a call of that tool; None leaves it to the model.
    """
    signatures = "\n".join(json.dumps(tool) for tool in tools)
    must = {None: "", "any": " You must call a function."}.get(tool_choice, f" You must call {tool_choice}.")
    return (
        f"You can call functions. Their signatures are within <tools></tools> tags:\n<tools>\n{signatures}\n</tools>\n"
        "For a function call, answer with a JSON object within <tool_call></tool_call> tags:\n"
        f'<tool_call>\n{{"name": <function name>, "arguments": <arguments as a JSON object>}}\n</tool_call>{must}'
    )


def format_calls(calls: Sequence[Mapping[str, Any]]) -> str:
    """Calls of an earlier message, in OpenAI's form, as the model would have written them."""
    written = [
        json.dumps({"name": call["function"]["name"], "arguments": json.loads(call["function"]["arguments"] or "{}")})
        for call in calls
    ]
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in written)


def parse_calls(answer: str) -> ToolUse:
    """Take the calls out of an answer."""
    calls: list[ToolCall] = []
    invalid: list[InvalidToolCall] = []
    for match in _CALL.finditer(answer):
        try:
            parsed = json.loads(match.group(1))
            calls += [_read_call(call) for call in (parsed if isinstance(parsed, list) else [parsed])]
        except ValueError as error:
            invalid.append(invalid_tool_call(name=None, args=match.group(), id=_call_id(), error=str(error)))
    return ToolUse(_CALL.sub("", answer).rstrip() if calls or invalid else answer, calls, invalid)


class CallWatch:
    """An answer that comes in pieces: what it says before a call is shown as it comes, the rest when it is whole.

    Args:
        may_call: whether tools are bound at all.
    """

    def __init__(self, *, may_call: bool) -> None:
        self._may_call = may_call
        self._answer = ""
        self._shown = 0

    def add(self, piece: str) -> str:
        """What can be shown now, after one more piece: nothing while a call may have begun."""
        if not self._may_call:
            return piece
        self._answer += piece
        begins = self._answer.find(_TAG)
        if begins < 0:
            begins = len(self._answer) - _tag_begun(self._answer)
        shown, self._shown = self._shown, max(self._shown, len(self._answer[:begins].rstrip()))
        return self._answer[shown : self._shown]

    def rest(self, answer: str) -> str:
        """What of the whole answer has not been shown."""
        return answer[self._shown :] if self._may_call else ""


def _tag_begun(answer: str) -> int:
    """Characters at the end of an answer that a tag may begin with."""
    return next((length for length in range(len(_TAG) - 1, 0, -1) if answer.endswith(_TAG[:length])), 0)


def _read_call(call: Any) -> ToolCall:
    """One call, its arguments an object or, as some models write them, the JSON of one."""
    name, arguments = (call.get("name"), call.get("arguments")) if isinstance(call, dict) else (None, None)
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments or {}, dict):
        raise ValueError(f'a call must be {{"name": <string>, "arguments": <object>}}, got {json.dumps(call)}.')
    return tool_call(name=name, args=arguments or {}, id=_call_id())


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
