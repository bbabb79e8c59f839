"""What text files are divided into, and how documents are named and read."""

import sys
import sysconfig
import tracemalloc
from pathlib import Path

import pytest

from mtp_jax.config import Data, Source
from mtp_jax.data.documents import python_stdlib
from mtp_jax.data.sources import check_supervision, read_sources, source_documents
from mtp_jax.errors import UserError

pytestmark = pytest.mark.quick


def text(path, separator=None, **more):
    return Source(kind="text", path=str(path), separator=separator, **more)


def names(path, separator=None):
    return [d.name for d in source_documents(text(path, separator))]


def texts(path, separator=None):
    return [d.text() for d in source_documents(text(path, separator))]


@pytest.fixture
def folder(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/deep/a.txt", "notes.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    return tmp_path


def test_a_folder_is_its_text_files_at_any_depth(folder):
    assert names(folder) == ["a.txt", "b.txt", "sub/c.txt", "sub/deep/a.txt"]
    assert texts(folder)[2] == "text of sub/c.txt"


def test_a_file_is_itself_whatever_its_ending(folder):
    assert names(folder / "notes.md") == ["notes.md"]


def test_a_glob_names_files_by_their_path_below_it(folder):
    assert names(folder / "*.md") == ["notes.md"]
    assert names(folder / "**" / "a.txt") == ["a.txt", "sub/deep/a.txt"]
    assert names(folder / "s*" / "*.txt") == ["sub/c.txt"]


def test_names_do_not_depend_on_where_the_folder_lies(folder, tmp_path_factory):
    moved = tmp_path_factory.mktemp("elsewhere") / "x"
    before = names(folder)
    folder.rename(moved)
    assert names(moved) == before
    moved.rename(folder)


def test_a_file_that_vanishes_is_named(folder):
    (document,) = source_documents(text(folder / "a.txt"))
    (folder / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.txt: cannot be read"):
        document.text()


@pytest.mark.parametrize("separator", ["<|end|>", "\n--\n", "§"])
def test_a_separator_parts_a_file(tmp_path, separator):
    pieces = ["first é", "second\nline", "  \n", "", "日本 third"]
    (tmp_path / "a.txt").write_text(separator.join(pieces), encoding="utf-8")
    assert texts(tmp_path / "a.txt", separator) == ["first é", "second\nline", "日本 third"]
    assert names(tmp_path / "a.txt", separator) == ["a.txt#0", "a.txt#1", "a.txt#2"]


def test_pieces_of_several_files_are_numbered_in_each(tmp_path):
    for name, text in [("a", "1|2"), ("b", " |"), ("c", "3"), ("d", "4||5")]:
        (tmp_path / f"{name}.txt").write_text(text)
    assert names(tmp_path, "|") == ["a.txt#0", "a.txt#1", "c.txt#0", "d.txt#0", "d.txt#1"]
    assert texts(tmp_path, "|") == list("12345")


def test_a_piece_is_read_without_the_rest_of_its_file(tmp_path):
    (tmp_path / "a.txt").write_text("one|" + "x" * 5_000_000 + "|two")
    first, _, last = source_documents(text(tmp_path / "a.txt", "|"))
    tracemalloc.start()
    assert (first.text(), last.text()) == ("one", "two")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_separator_at_both_ends_leaves_no_empty_document(tmp_path):
    (tmp_path / "a.txt").write_text("|a|b|")
    assert texts(tmp_path / "a.txt", "|") == ["a", "b"]


ENCODED = {"utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"}
MARKS = {name: "" if name in ("utf-8-sig", "utf-16") else "\ufeff" for name in ENCODED}


@pytest.mark.parametrize("encoding", sorted(ENCODED))
def test_a_byte_order_mark_states_the_encoding(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes((MARKS[encoding] + "café 日本|two").encode(encoding))
    assert texts(tmp_path / "a.txt") == ["café 日本|two"]
    if encoding == "utf-8-sig":
        assert texts(tmp_path / "a.txt", "|") == ["café 日本", "two"]
        return
    with pytest.raises(UserError, match=r"a\.txt: is UTF-(16|32), and a separator parts files in UTF-8 alone"):
        texts(tmp_path / "a.txt", "|")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("café".encode("latin-1"), r"\(unexpected end of data at byte 3\)"),
        ("日本".encode("shift-jis"), r"\(invalid start byte at byte 0\)"),
        ("plain".encode("utf-16-le"), r"\(it holds zero bytes\)"),
        (b"\xff\xfea", r"\(truncated data at byte 2\)"),
    ],
    ids=["latin-1", "shift-jis", "utf-16 without mark", "torn"],
)
def test_bytes_that_are_no_text_are_named_at_the_start(tmp_path, data, says):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text("text")
    (tmp_path / "21.txt").write_bytes(data)
    (training,), _ = read_sources(Data(sources=[text(tmp_path)], held_out=0.0))
    with pytest.raises(UserError, match=r"^data\.sources\.0: .*21\.txt: is neither UTF-8 nor .*" + says):
        check_supervision([training], None)


def test_a_piece_that_is_no_text_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one|caf\xe9|two")
    good, bad, last = source_documents(text(tmp_path / "a.txt", "|"))
    assert (good.text(), last.text()) == ("one", "two")
    with pytest.raises(UserError, match=r"a\.txt \(a\.txt#1\): is neither"):
        bad.text()


def test_python_files_are_read_in_their_own_encoding(tmp_path):
    source = "# -*- coding: latin-1 -*-\nname = 'é'\n"
    (tmp_path / "a.py").write_bytes(source.encode("latin-1"))
    assert texts(tmp_path / "a.py") == [source]
    assert texts(tmp_path / "a.py") != [(tmp_path / "a.py").read_text(errors="replace")]
    (tmp_path / "b.py").write_bytes(b"# coding: no-such-thing\n'\xff'\n")
    with pytest.raises(UserError, match=r"b\.py: is neither UTF-8"):
        texts(tmp_path / "b.py")


def test_the_stdlib_is_without_tests_and_installed_packages():
    found = {d.name for d in python_stdlib()}
    parts = {part for name in found for part in Path(name).parts[:-1]}
    assert {"json/decoder.py", "asyncio/tasks.py", "ast.py"} <= found
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    root = Path(sysconfig.get_paths()["stdlib"])
    assert all((root / name).stat().st_size for name in found)
    ours = {m for m in sys.stdlib_module_names if (root / f"{m}.py").is_file() and (root / f"{m}.py").stat().st_size}
    assert ours <= {name.removesuffix(".py") for name in found}
