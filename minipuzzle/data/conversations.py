"""Conversations in the words of a tokenizer's chat template, which runs in transformers' sandbox and within limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from minipuzzle.data.limits import memory_at_most, time_at_most
from minipuzzle.errors import MinipuzzleError
from minipuzzle.files.json_files import parse_json

RECORD_HINT = 'a record is {"text": "..."} or {"messages": [{"role": "user", "content": "..."}, ...]}'
MAX_CHARACTERS = 32 * 2**20  # that a conversation may become
_MAX_BYTES = 2**29  # that a template may take beside what there is
MAX_SECONDS = 2.0  # of computing, for one conversation

Message = dict[str, Any]


def spelled_out(tokenizer: Any, messages: object, tools: object, where: str) -> str:
    """The text of a conversation. ``tools``: what the assistant may call, as JSON schemas; None or empty for none.

    Content that is a list of text parts goes to the template as a list where it writes that out, else as one text.

    Raises: MinipuzzleError saying where, for anything that the template would drop, refuse, or not end with.
    """
    if not messages or not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise MinipuzzleError(f"{where}: no text", RECORD_HINT)
    if getattr(tokenizer, "chat_template", None) is None:
        raise MinipuzzleError(
            f"{where} is a conversation, and the tokenizer has no chat template to write it out",
            "use a tokenizer with a chat template, or give records with a text",
        )
    # Parquet gives every message all fields that any message has, empty ones as null.
    present = [{name: value for name, value in message.items() if value is not None} for message in messages]
    schemas = _tools(tools, where)
    texts = list(_texts(present, where))
    forms = [present, [_with_one_text(message) for message in present]] if texts else [present]
    found = ""
    for form in forms:
        found = _render(tokenizer, form, schemas, where, may_fail=form is not forms[-1])
        if not texts or (all(text in found for text in texts) and not _as_python(present, found)):
            break
    else:
        raise MinipuzzleError(f"{where}: the chat template does not write out all parts of a content", RECORD_HINT)
    for name in _called(present):
        if name not in found:
            problem = f"{where}: the chat template does not write out the call of {name}"
            raise MinipuzzleError(problem, "use a tokenizer whose template knows tool_calls, or remove the record")
    return found


def _tools(tools: object, where: str) -> list[Any] | None:
    found = parse_json(tools, f"{where}: tools") if isinstance(tools, str) and tools else tools
    if found is None or found == [] or found == "":
        return None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise MinipuzzleError(f"{where}: tools is no list of objects", "give a JSON schema for each tool")
    return found


def _texts(messages: list[Message], where: str) -> Iterator[str]:
    """What all contents that are lists say, part by part."""
    for message in messages:
        for part in message["content"] if isinstance(message.get("content"), list) else ():
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise MinipuzzleError(f"{where}: a content holds a part of type {kind!r}, no text", RECORD_HINT)
            yield part["text"].strip()


def _with_one_text(message: Message) -> Message:
    if not isinstance(message.get("content"), list):
        return message
    return {**message, "content": "\n".join(part["text"] for part in message["content"])}


def _as_python(messages: list[Message], found: str) -> bool:
    """Whether a template has written a list as Python spells it."""
    return any(str(message["content"]) in found for message in messages if isinstance(message.get("content"), list))


def _called(messages: list[Message]) -> Iterator[str]:
    for message in messages:
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function", call) if isinstance(call, Mapping) else {}
            if isinstance(function, Mapping) and isinstance(function.get("name"), str):
                yield function["name"]


def _render(tokenizer: Any, messages: list[Message], tools: list[Any] | None, where: str, *, may_fail: bool) -> str:
    try:
        words = _words(tokenizer.get_chat_template(None, tools))
        if tools and "tools" not in words:
            raise ValueError("it does not know tools")
        if "**" in words:  # a single power could take for ever
            raise ValueError("it computes powers")
        with memory_at_most(_MAX_BYTES), time_at_most(MAX_SECONDS):
            found = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        if len(found) > MAX_CHARACTERS:
            raise ValueError(f"it makes {len(found):,} characters of them")
    except Exception as error:  # a program of others may raise anything
        if may_fail:
            return ""
        problem = f"{where}: the chat template refuses the messages: {str(error) or type(error).__name__}"
        raise MinipuzzleError(problem, RECORD_HINT) from None
    assert isinstance(found, str)
    return found


@lru_cache(maxsize=8)
def _words(template: str) -> frozenset[str]:
    """Names and operators of a template."""
    from jinja2 import Environment

    return frozenset(word for _, kind, word in Environment().lex(template) if kind in ("name", "operator"))
