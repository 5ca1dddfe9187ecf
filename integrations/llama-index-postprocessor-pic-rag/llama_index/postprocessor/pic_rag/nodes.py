"""A node that shows a handle to the LLM and its own text to everybody else.

LlamaIndex asks a node for its content in a mode: the LLM's prompt is made in mode LLM, `source_nodes` and evaluators
read mode NONE. In mode LLM a node shows its metadata through its templates, so a plain node whose only visible metadata
is the handle shows the handle, and survives every store. How it looked before is kept beside it, to be put back.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from llama_index.core.schema import BaseNode, NodeWithScore

if TYPE_CHECKING:
    from pic_rag import Memory

MEMORY_KEY = "pic_memory"
LAYOUT_KEY = "pic_layout"
_KEYS = (MEMORY_KEY, LAYOUT_KEY, "pic_ratio", "pic_text_tokens", "pic_memory_tokens", "pic_fidelity")

_LAYOUT_FIELDS = ("text_template", "metadata_template", "excluded_llm_metadata_keys", "excluded_embed_metadata_keys")
_METADATA_ONLY = "{metadata_str}"

AnyNode = TypeVar("AnyNode", BaseNode, NodeWithScore)


def restore_nodes(nodes: Sequence[AnyNode]) -> list[AnyNode]:
    """The nodes as they were before they carried handles: what an LLM that reads no memories can be given.

    Ids, scores, order, metadata and relationships stay. The nodes passed in are not changed.
    """
    return [
        node.model_copy(update={"node": restore_node(node.node)})
        if isinstance(node, NodeWithScore)
        else restore_node(node)
        for node in nodes
    ]


def note_handle(node: BaseNode, handle: str) -> BaseNode:
    """A copy that carries the handle as metadata which neither the LLM nor the embedding model is shown."""
    node = restore_node(node)
    return node.model_copy(
        update={
            "metadata": {**node.metadata, MEMORY_KEY: handle},
            "excluded_llm_metadata_keys": [*node.excluded_llm_metadata_keys, MEMORY_KEY],
            "excluded_embed_metadata_keys": [*node.excluded_embed_metadata_keys, MEMORY_KEY],
        }
    )


def show_handle(node: BaseNode, handle: str, memory: Memory, label: str | None = None) -> BaseNode:
    """A copy that shows the LLM its handle alone, under a label if there is one, and embedding models its text.

    The memory's ratio, sizes and fidelity are in the copy's metadata.
    """
    node = restore_node(node)
    layout = json.dumps({name: getattr(node, name) for name in _LAYOUT_FIELDS})
    figures = (memory.ratio, memory.text_tokens, memory.memory_tokens, memory.fidelity)
    own = {name: value for name, value in zip(_KEYS, (handle, layout, *figures), strict=True) if value is not None}
    metadata = {**node.metadata, **own}
    heading = "" if label is None else label.replace("{", "{{").replace("}", "}}") + "\n"
    return node.model_copy(
        update={
            "metadata": metadata,
            "text_template": heading + _METADATA_ONLY,
            "metadata_template": "{value}",
            "excluded_llm_metadata_keys": [key for key in metadata if key != MEMORY_KEY],
            "excluded_embed_metadata_keys": list(metadata),
        }
    )


def restore_node(node: BaseNode) -> BaseNode:
    """A copy without handle, and with the layout it had before `show_handle`."""
    if MEMORY_KEY not in node.metadata:
        return node.model_copy()
    layout = _kept_layout(node)
    return node.model_copy(
        update={
            **layout,
            "metadata": {key: value for key, value in node.metadata.items() if key not in _KEYS},
            "excluded_llm_metadata_keys": _without_memory(layout["excluded_llm_metadata_keys"]),
            "excluded_embed_metadata_keys": _without_memory(layout["excluded_embed_metadata_keys"]),
        }
    )


def _kept_layout(node: BaseNode) -> dict:
    """The layout to go back to. A node whose template is its own has not been through `show_handle`."""
    current = {name: getattr(node, name) for name in _LAYOUT_FIELDS}
    if LAYOUT_KEY not in node.metadata or not current["text_template"].endswith(_METADATA_ONLY):
        return current
    kept = json.loads(node.metadata[LAYOUT_KEY])
    return {name: kept[name] for name in _LAYOUT_FIELDS}


def _without_memory(keys: Sequence[str]) -> list[str]:
    return [key for key in keys if key != MEMORY_KEY]
