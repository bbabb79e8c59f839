"""What a config's sources give: which part is held out, which sources are faulty, and what is checked before a run."""

import hashlib
from pathlib import Path

import pytest
from chats import MARKED, PLAIN, TALK, THINKS, letters, turns, with_template

from mtp_jax.config import Data, Source
from mtp_jax.config_file import validate
from mtp_jax.data.documents import FileDocument
from mtp_jax.data.sources import check_supervision, read_sources, source_documents, split
from mtp_jax.errors import UserError
from mtp_jax.training.run import train

pytestmark = pytest.mark.quick


def text(path, separator=None, **more):
    return Source(kind="text", path=str(path), separator=separator, **more)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("missing", "no such file or folder"),
        ("*.nothing", "no such file or folder"),
        ("hollow", "holds no .txt file"),
        ("empty.txt", "every file is empty"),
    ],
)
def test_a_source_without_text_is_named(tmp_path, path, says):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(UserError) as caught:
        read_sources(Data(sources=[text(tmp_path / "a.txt"), text(tmp_path / path)], held_out=0.0))
    (fault,) = caught.value.faults
    assert fault.startswith("data.sources.1.path: ") and says in fault


def test_all_sources_without_text_are_named(tmp_path):
    with pytest.raises(UserError) as caught:
        read_sources(Data(sources=[text(tmp_path / "no"), text(tmp_path / "nor")], held_out=0.0))
    assert len(caught.value.faults) == 2


# ---- held out


def test_the_split_depends_on_the_name_alone(tmp_path):
    found = [FileDocument(f"d{i}", tmp_path) for i in range(500)]
    train, held = split(found, 0.1)
    assert not {d.name for d in train} & {d.name for d in held} and len(train) + len(held) == 500
    assert 25 <= len(held) <= 80
    others = [FileDocument(d.name, Path("elsewhere"), 3, 9) for d in reversed(found[:250])]
    assert {d.name for d in split(others, 0.1)[1]} == {d.name for d in held} & {d.name for d in found[:250]}
    assert {d.name for d in held} <= {d.name for d in split(found, 0.3)[1]}


def test_the_split_is_the_same_on_every_machine():
    held = [name for name in map(str, range(40)) if FileDocument(name, Path()).draw < 0.1]
    share = [int(hashlib.sha256(str(i).encode()).hexdigest()[:16], 16) / 16**16 for i in range(40)]
    assert held == [str(i) for i in range(40) if share[i] < 0.1] and held


def test_shares_0_and_1(tmp_path):
    found = [FileDocument(f"d{i}", tmp_path) for i in range(20)]
    assert [list(part) for part in split(found, 0.0)] == [found, []]
    assert [list(part) for part in split(found, 1.0)] == [[], found]


def test_a_source_all_of_which_is_held_out_is_a_fault(tmp_path):
    name = next(f"{i}.txt" for i in range(1000) if FileDocument(f"{i}.txt", tmp_path).draw < 0.05)
    (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=r"all 1 documents are held out"):
        read_sources(Data(sources=[text(tmp_path)], held_out=0.05))


# ---- what is checked before a run starts


@pytest.mark.parametrize(
    ("template", "how"), [(MARKED, "where the chat template marks {% generation %}"), (PLAIN, "by prefix difference")]
)
def test_which_way_is_used_is_reported(jsonl, template, how):
    found = source_documents(jsonl([{"messages": TALK}] * 100))
    (line,) = check_supervision([found], with_template(letters(), template))
    assert line.startswith("data.sources.0: 100 conversations, supervised ") and how in line


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "data.sources.0: the tokenizer has no chat template"),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
            "data.sources.0: none of the 5 records checked",
        ),
        (
            "{{ raise_exception('no') }}",
            "data.sources.0: rows.jsonl#0: the chat template refuses the conversation (no)",
        ),
        ("{{ messages[0].content }}{% if %}", "data.sources.0: rows.jsonl#0: the chat template refuses"),
        ({"one": PLAIN, "two": PLAIN}, "data.sources.0: the tokenizer's chat template cannot be chosen"),
        (
            "{{ messages[0].content }}{% generation %}{% endgeneration %}",
            "data.sources.0: none of the 5 records checked",
        ),
    ],
)
def test_an_unfit_template_is_one_fault(jsonl, template, says):
    found = source_documents(jsonl([{"messages": TALK}] * 5))
    with pytest.raises(UserError) as caught:
        check_supervision([found], with_template(letters(), template))
    (fault,) = caught.value.faults
    assert fault.startswith(says)


def test_a_run_that_lacks_a_template_leaves_no_trace(jsonl, tree, small_folder, tmp_path):
    source = jsonl([{"messages": TALK}] * 30).model_dump()
    for model in ({"path": str(small_folder)}, tree["model"]):  # the second trains its tokenizer
        with pytest.raises(UserError, match="no chat template"):
            train(validate({**tree, "model": model, "data": {"sources": [source], "held_out": 0.2}}, "tree"))
    assert not Path(tree["output_dir"]).exists()


def test_records_that_are_too_long_are_reported_before_a_run_starts(jsonl):
    tokenizer = with_template(letters(), PLAIN)
    found = source_documents(jsonl([{"messages": turns("hi", "yes" * i)} for i in (1, 1, 20)]))
    (line,) = check_supervision([found], tokenizer, 32, "cut")
    assert line.endswith("; 1 of 3 checked are longer than a sequence of 32 and are cut")
    (line,) = check_supervision([found], tokenizer, 128, "cut")
    assert "longer" not in line
    with pytest.raises(UserError, match=r"all of the 3 records checked are longer than train\.sequence_length=4"):
        check_supervision([found], tokenizer, 4, "drop")


def test_turns_that_the_template_rewrites_are_counted(jsonl):
    (line,) = check_supervision([source_documents(jsonl([{"messages": TALK}] * 3))], with_template(letters(), THINKS))
    assert line == (
        "data.sources.0: 3 conversations, supervised in assistant turns by prefix difference of the chat template; in "
        "the 3 checked, 3 earlier turns that the template rewrites are not"
    )


def test_a_stream_is_checked_before_a_run_starts(jsonl, small_tokenizer):
    source = jsonl([{"text": f"the cat {i} sat on the mat"} for i in range(60)], streaming=True)
    (training,), _ = read_sources(Data(sources=[source], held_out=0.2))
    assert check_supervision([training], small_tokenizer) == ["data.sources.0: streamed texts, supervised throughout"]
