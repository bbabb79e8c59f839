"""What a source lists: examples, each with a name, a place in the split, and content read on demand."""

import hashlib
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Text(NamedTuple):
    """Every token is to be predicted."""

    text: str


class Completion(NamedTuple):
    """The tokens of the completion are to be predicted."""

    prompt: str
    completion: str
    whole: bool = True  # the text ends here; otherwise it was cut, or says itself where it ends


class Conversation(NamedTuple):
    """The tokens of the assistant's turns are to be predicted."""

    messages: list[dict[str, Any]]


Content = Text | Completion | Conversation


class Example(ABC):
    """One document of a source: cheap to hold, read each time it is asked for."""

    __slots__ = ()

    name: str  # independent of the machine

    @abstractmethod
    def content(self) -> Content:
        """What is trained on; raises UserError where it cannot be read."""

    def text(self) -> str:
        """All of its text, without any template."""
        content = self.content()
        if isinstance(content, Conversation):
            return "\n".join(str(message.get("content", "")) for message in content.messages)
        return "".join(content[:2])

    @property
    def draw(self) -> float:
        """A number in [0, 1) that depends on the name alone; the smallest ones are held out."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big") / 2**64


class Examples(Sequence[Example]):
    """Examples that are made when they are asked for, so that a list of millions takes no memory."""

    def __init__(self, length: int, make: Callable[[int], Example]):
        self.length, self.make = length, make

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return self.part(np.arange(self.length)[number])
        number = operator.index(number)
        if not -self.length <= number < self.length:
            raise IndexError(number)
        return self.make(number % self.length)

    def part(self, numbers: np.ndarray) -> "Examples":
        """Those of the given numbers."""
        return Examples(len(numbers), lambda n: self.make(int(numbers[n])))
