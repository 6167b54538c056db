"""Conversations as tokens: the chat template of the teacher's tokenizer, and the tokens that the assistant wrote.

A conversation is rendered by the tokenizer's own template, to the tokens of `apply_chat_template`. A template with
{% generation %} blocks says itself what the assistant wrote. For any other, it is what each of its messages adds to the
conversation so far with the generation prompt, up to the end of its turn; whitespace that the template puts after the
token that ends the turn is not the assistant's. Where the template writes a turn differently once others follow, it is
the content that is still shown, and the end of the turn.
"""

import os
import re
from typing import NamedTuple

import numpy as np

from scavenger.recipe import RecipeError


GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
MARK = "\ue000"  # a private character, in no text
USE_ALL = "chat_loss: all works with every template"


class Conversation(NamedTuple):
    """Messages {role, content, …} as the template takes them, and their file and row, for error messages."""

    messages: list[dict]
    where: str


def require_template(tokenizer, assistant: bool):
    """Raise RecipeError for a tokenizer that cannot render conversations, or with `assistant` not mark its tokens."""
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        found = "chat templates, none of them called default" if tokenizer.chat_template else "no chat template"
        raise RecipeError(
            f"data.chat_column: the teacher's tokenizer has {found}; expected one beside its other files "
            "(chat_template.jinja), or data.text_column in place of chat_column"
        ) from error
    if assistant and not tokenizer.is_fast:
        raise RecipeError(
            "data.chat_loss: the teacher's tokenizer is a slow one, which does not give the places of tokens in "
            f"the text; expected a fast one (tokenizer.json): {USE_ALL}"
        )


def tokens(conversations: list[Conversation], tokenizer, assistant: bool) -> list[tuple[list[int], np.ndarray | None]]:
    """The token ids of each conversation; with `assistant` also which of them the assistant wrote, (token,) bool.

    Raises RecipeError, with the conversation's file and row, for one that the template refuses, and for one in which
    the assistant's tokens cannot be found.
    """
    if not conversations:
        return []
    if assistant and GENERATION.search(tokenizer.get_chat_template()):
        found = [
            _rendered(one, one.messages, tokenizer, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            for one in conversations
        ]
        return [(each["input_ids"], np.array(each["assistant_masks"], dtype=bool)) for each in found]
    texts = [_rendered(one, one.messages, tokenizer) for one in conversations]
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    found = tokenizer(texts, return_offsets_mapping=assistant, **options)
    if not assistant:
        return [(ids, None) for ids in found["input_ids"]]
    ends = tuple(tokenizer.get_added_vocab())
    read = zip(conversations, texts, found["input_ids"], found["offset_mapping"], strict=True)
    return [(ids, _inside(offsets, _spans(one, text, tokenizer, ends))) for one, text, ids, offsets in read]


def _rendered(conversation, messages, tokenizer, **options):
    """`messages`, all or the first of the conversation's, through the template; text unless the options say otherwise.

    Template and tokenizer are the teacher's: what they raise has no common class.
    """
    try:
        return tokenizer.apply_chat_template(messages, **{"tokenize": False} | options)
    except Exception as error:
        part = len(messages) < len(conversation.messages)
        what = f"the first {len(messages)} messages of the conversation" if part else "the conversation"
        raise RecipeError(
            f"data: {conversation.where}: the chat template of the teacher's tokenizer refuses {what} "
            f"({type(error).__name__}: {_first_line(error)}); expected roles and contents that it knows"
            + (f", or {USE_ALL.replace('every template', 'it')}" if part else "")
        ) from error


def _spans(conversation, whole, tokenizer, ends):
    """Where in the rendered text `whole` the assistant's messages stand: (begin, end) of each, characters.

    `ends` are the tokens of which one may end a turn.
    """
    messages, where = conversation
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            raise RecipeError(
                f"data: {where}: the assistant begins the conversation, and the chat template has no generation "
                f"blocks that say which tokens it wrote; expected another role before it ({USE_ALL})"
            )
        before = _rendered(conversation, messages[:index], tokenizer, add_generation_prompt=True)
        after = _rendered(conversation, messages[: index + 1], tokenizer)
        changed = None
        if not after.startswith(before):
            changed = f"does not begin message {index + 1} with its generation prompt, or changes earlier ones for it"
        elif not whole.startswith(after):
            changed = f"changes its first {index + 1} messages for later ones"
        if changed is None:
            turn = after.rstrip()
            spans.append((len(before), len(turn if turn.endswith(ends) else after)))
        elif (span := _content(conversation, index, whole, tokenizer, ends)) is not None:
            spans.append(span)
        else:
            raise RecipeError(
                f"data: {where}: the chat template {changed}, so the assistant's tokens cannot be found; expected a "
                f"template with generation blocks, or one that shows each content unchanged ({USE_ALL})"
            )
    return spans


def _content(conversation, index, whole, tokenizer, ends):
    """Where in `whole` the content of a message and the token that ends its turn stand, (begin, end) in characters.

    For templates that write earlier turns differently, without their reasoning for example: the content is what
    changes in the whole conversation with another content. None where that is not all that changes.
    """
    messages = list(conversation.messages)
    messages[index] = messages[index] | {"content": MARK}
    marked = _rendered(conversation, messages, tokenizer)
    begin = len(os.path.commonprefix([whole, marked]))
    after = len(os.path.commonprefix([whole[begin:][::-1], marked[begin:][::-1]]))
    if marked[begin : len(marked) - after] != MARK:
        return None
    end = len(whole) - after
    return begin, end + next((len(token) for token in ends if whole.startswith(token, end)), 0)


def _inside(offsets, spans):
    """Whether each token, its characters from offsets (token, 2), has a character in one of the spans, (token,)."""
    first, last = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    found = np.zeros(len(first), dtype=bool)
    for begin, end in spans:
        found |= (last > begin) & (first < end)
    return found


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]
