"""What a tokenizer makes of a text and of a conversation: the same where a model is trained and where it is used."""

from typing import Any

from mtp_jax.errors import BadRecord


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer adds before a text and after it."""
    for text in ("a", *tokenizer.get_vocab()):
        if inner := tokenizer(text, add_special_tokens=False)["input_ids"]:
            break
    whole = tokenizer(text)["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
    return whole[:start], whole[start + len(inner) :]


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that is to be continued: what begins a text stands there once, and nothing ends it."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    before, _ = special_tokens(tokenizer)
    return list(ids) if ids[: len(before)] == before else [*before, *ids]


def render_chat(
    tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, prompt: bool = False
) -> str:
    """A conversation as the tokenizer's chat template writes it, special tokens included.

    Args:
        tokenizer: Has a chat template.
        messages: Each with a role.
        tools: JSON schemas of functions, for templates that list them.
        prompt: Whether to end where the assistant begins to answer.

    Raises:
        BadRecord: the template refuses the conversation, with its reason.
    """
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt, tokenize=False)
    except Exception as error:  # a template is a program of its own, and may raise whatever it likes
        raise BadRecord(refusal(error)) from error


def refusal(error: Exception) -> str:
    """What a chat template's error says, in a sentence."""
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return f"the chat template refuses the conversation ({reason.rstrip('.')})."
