"""Conversations and chat templates for the tests of data."""

import copy
import functools
import itertools

from mtp_jax.data.tokenizer import train_tokenizer

MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content + '\n' }}{% endgeneration %}"
    "{% else %}{{ m.role[0].upper() + ':' + m.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# Thinks in the last turn alone, as Qwen3's template does.
THINKS = PLAIN.replace("A:{{ m.content", "A:{{ ('(thinks)' if loop.last else '') + m.content")
# What the generation prompt promises is not how a turn begins.
OTHER_PROMPT = PLAIN.replace("{% if add_generation_prompt %}A:", "{% if add_generation_prompt %}Assistant:")
# It opens a block of thought, which a turn without thoughts lacks, as DeepSeek R1's template does.
OPENS_THOUGHT = PLAIN.replace("{% if add_generation_prompt %}A:", "{% if add_generation_prompt %}A:<think>\n").replace(
    "A:{{ m.content", "A:{{ m.content.split('</think>')[-1]"
)
# The last turn alone has its block of thought, perhaps an empty one, as in Qwen3's thinking models.
KEEPS_THOUGHT = OPENS_THOUGHT.replace(
    "A:{{ m.content.split('</think>')[-1]",
    "A:{{ ('<think>\n' + (m.reasoning_content or '') + '\n</think>' if loop.last else '') + m.content",
)
# Refusals of a part of a conversation that they take as a whole.
NEEDS_USER = (
    "{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
    "{{ raise_exception('There is no user.') }}{% endif %}" + PLAIN
)
NEEDS_FIRST = "{% set first = messages[0]['role'] %}{{ '(' + first + ')' }}" + PLAIN
ENDS_WITH_ASSISTANT = (
    "{% if not add_generation_prompt and messages[-1].role != 'assistant' or messages | length < 4 %}"
    "{{ raise_exception('The conversation has not ended.') }}{% endif %}" + PLAIN
)


def turns(*texts):
    """A conversation, the user first; a text that begins with `system ` is one of the system."""
    return [{"role": role, "content": text} for role, text in zip(itertools.cycle(["user", "assistant"]), texts)]


TALK = turns("how are you?", " fine \n", "the cat?", "sat on the mat")
LOOK = "U:how are you?\nA: fine \n\nU:the cat?\nA:sat on the mat\n"
MARK = "_________________^^^^^^^^_____________^^^^^^^^^^^^^^^"  # under LOOK: what the assistant wrote


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def letters():
    """A tokenizer of single bytes, whose tokens are the characters."""
    return train_tokenizer(["a"], 258)
