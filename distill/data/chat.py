"""Conversations to text and to the marks of what the assistant said.

The text is what the tokenizer's chat template makes of the messages, end marks included. Counted are the assistant's
tokens only: what `{% generation %}` encloses where the template has it; otherwise, for every assistant message, what
the template adds between the conversation before it (with the generation prompt) and the conversation including it,
thus with the mark that ends the turn.
"""

from __future__ import annotations

import re
from typing import Any

from ..errors import UserError
from .documents import Document

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}

Span = tuple[int, int]


def has_generation_marks(tokenizer: Any) -> bool:
    """Whether the chat template says itself what the assistant's tokens are.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template, and the data are chat messages; use an "
            "instruction-tuned teacher, or a text field: data.text=FIELD"
        )
    return bool(_GENERATION.search(template))


def messages_of(document: Document) -> list[dict[str, Any]]:
    """The messages as {role, content, ...}; {from, value} (ShareGPT's spelling) is rewritten.

    Raises:
        UserError: something that is not a message.
    """
    messages = []
    for number, message in enumerate(document.content, 1):
        if isinstance(message, dict) and "from" in message and "value" in message:
            role = str(message["from"])
            message = {"role": _ROLES.get(role, role), "content": message["value"]}
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise UserError(
                f"{document.place}: message {number} is {str(message)[:60]}, expected {{role, content}}; correct it"
            )
        messages.append(message)
    return messages


def marked_tokens(tokenizer: Any, document: Document) -> tuple[list[int], list[bool]]:
    """Ids and completion mask by a template that has `{% generation %}`."""
    encoded = _apply(
        tokenizer, document, messages_of(document), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]


def spans(tokenizer: Any, document: Document) -> tuple[str, list[Span]]:
    """The conversation's text and the character spans that the assistant wrote, by comparing prefixes.

    Raises:
        UserError: the template changes what it wrote before when a message is added (e.g. drops earlier reasoning),
            or refuses the messages.
    """
    messages = messages_of(document)
    found: list[Span] = []
    text = _apply(tokenizer, document, messages, tokenize=False)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = ""
        if index:
            before = _apply(tokenizer, document, messages[:index], tokenize=False, add_generation_prompt=True)
        until = text
        if index + 1 < len(messages):
            until = _apply(tokenizer, document, messages[: index + 1], tokenize=False)
        if not until.startswith(before) or not text.startswith(until):
            raise UserError(
                f"{document.place}: the chat template writes the conversation up to message {index + 1} differently "
                "when more follows, so the assistant's tokens cannot be found; expected a template with "
                "{% generation %} marks (edit chat_template in the teacher's tokenizer), or one reply per conversation"
            )
        found.append((len(before), len(until)))
    return text, found


def _apply(tokenizer: Any, document: Document, messages: list[dict[str, Any]], **options: Any) -> Any:
    import jinja2

    try:
        return tokenizer.apply_chat_template(messages, **options)
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise UserError(
            f"{document.place}: the tokenizer's chat template refuses this conversation ({error}); expected roles and "
            "contents that the template knows; correct or remove it"
        ) from None
