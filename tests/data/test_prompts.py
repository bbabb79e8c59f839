"""Files of prompts: what a line may hold, and every fault by its line."""

import gzip
import json

import pytest

from mtp_jax.data.prompts import read_prompts
from mtp_jax.errors import UserError

pytestmark = pytest.mark.quick

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture
def file(tmp_path):
    """A function that writes a file of prompts."""

    def write(text):
        path = tmp_path / "prompts.jsonl"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_a_line_is_a_prompt_or_a_chat(file):
    records = [{"prompt": "def main():"}, {"messages": CHAT, "id": 3}, {"prompt": "a\u2028b", "messages": CHAT}]
    text = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    assert read_prompts(file(text)) == ["def main():", CHAT, "a\u2028b"]


@pytest.mark.parametrize("tools", [[{"name": "tide"}], '[{"name": "tide"}]', ['{"name": "tide"}']])
def test_a_chat_may_have_tools_and_come_from_other_forms(file, tools):
    records = [
        {"messages": CHAT, "tools": tools},
        {"conversations": [{"from": "human", "value": "hi"}]},
        {"prompt": CHAT},
    ]
    text = "\n".join(map(json.dumps, records))
    assert read_prompts(file(text)) == [{"messages": CHAT, "tools": [{"name": "tide"}]}, CHAT, CHAT]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_may_be_compressed_or_begin_with_a_mark(tmp_path, encoding):
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress('{"prompt": "é"}\n'.encode(encoding)))
    assert read_prompts(str(tmp_path / "p.jsonl.gz")) == ["é"]


def test_every_broken_line_is_a_fault(file):
    path = file('{"prompt": "a"}\n{"prompt"\n\n{"messages": [{"content": "user"}]}\n"a"\n')
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    assert [fault.split(":")[0] for fault in caught.value.faults] == [f"{path}, line {n}" for n in (2, 4, 5)]


def test_a_file_without_prompts_is_refused(file, tmp_path):
    with pytest.raises(UserError, match="holds no prompts"):
        read_prompts(file("\n"))
    with pytest.raises(UserError, match="No such file"):
        read_prompts(str(tmp_path / "none"))
