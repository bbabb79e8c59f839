"""Nothing is cited that is not there: paths, modules, sections and links in documents, docstrings and comments.

What counts as a citation:

- a path whose first part is a file or folder of the repository (`runs/first`, `~/mtp_jax`, `gs://...` are none);
- a path that ends in .py, .sh or .cc, from the root, or the end of a path as in `decoding/plan.py`;
- in Markdown, a bare name such as `plan.py` or `log.md`, which some file of the repository has to bear;
- a dotted name below `mtp_jax`;
- "docs/how-it-works.md, section N", or "section N" on that page itself, and a Markdown link.
"""

import ast
import fnmatch
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[1]
METHOD = "docs/how-it-works.md"  # the page whose sections are cited by number
SOURCES = ("mtp_jax", "benchmarks", "tests", "configs", "launch", "docs", ".github", ".ci")

PATH = re.compile(r"(?<![\w./~:$\\{}-])\.?[A-Za-z][\w.-]*(?:/[\w.*-]+)+/?|(?<![\w./~:$\\{}-])[A-Za-z]\w*/(?![\w/])")
BARE = re.compile(r"(?<![\w./~:$*{}-])[A-Za-z_][\w-]*\.(?:py|sh|cc|md|sbatch)\b(?![\w/*])")
DOTTED = re.compile(r"(?<![\w./-])mtp_jax(?:\.[A-Za-z_]\w*)+(?![\w/-])")
NUMBER = r"\d+(?:\.\d+)?"
SECTIONS = rf"{NUMBER}(?:(?:,|[\s#]+and|,[\s#]+and)[\s#]+{NUMBER})*"
CITED_SECTION = re.compile(rf"{re.escape(METHOD)},[\s#]+(?:sections?[\s#]+)?({SECTIONS})")
OWN_SECTION = re.compile(rf"\bsections?\s+({SECTIONS})")
HEADING = re.compile(r"^#{1,6} +(.*?) *$", re.MULTILINE)
CODE = re.compile(r"^```.*?^```|^(?: {4}|\t).*?$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)|\b(?:src|href)=\"([^\"]+)\"")


class Passage(NamedTuple):
    """Words that a reader reads: a whole document, a docstring or a comment."""

    file: str
    start: int  # offset in the file
    text: str


class Tree:
    """The files of a repository, what .gitignore names apart."""

    def __init__(self, root: Path):
        self.root = root
        ignored = (root / ".gitignore").read_text(encoding="utf-8").split() if (root / ".gitignore").is_file() else []
        self.ignored = [pattern.rstrip("/") for pattern in (*ignored, "/.git")]
        self.files = sorted(self._walk(root))
        self.names = {Path(file).name for file in self.files}
        self.top = {file.split("/")[0] for file in self.files}
        self.texts: dict[str, str] = {}

    def _walk(self, folder: Path) -> Iterator[str]:
        for path in folder.iterdir():
            name = path.relative_to(self.root).as_posix()
            if any(fnmatch.fnmatch(f"/{name}" if "/" in pattern else path.name, pattern) for pattern in self.ignored):
                continue
            if path.is_dir():
                yield from self._walk(path)
            else:
                yield name

    def text(self, file: str) -> str:
        """The text of a file, read once."""
        if file not in self.texts:
            self.texts[file] = (self.root / file).read_text(encoding="utf-8")
        return self.texts[file]

    def has(self, path: str) -> bool:
        """Whether there is such a file or folder, or one that such a pattern names."""
        path = path.rstrip("/")
        if "*" in path:
            return bool(fnmatch.filter(self.files, path))
        return path in self.files or any(file.startswith(f"{path}/") for file in self.files)

    def passages(self) -> Iterator[Passage]:
        """All that is checked."""
        for file in self.files:
            if file.endswith(".md"):
                if "/" not in file or file.startswith(("docs/", "launch/")):  # not a model's card, which is generated
                    yield Passage(file, 0, self.text(file))
            elif file.split("/")[0] in SOURCES or file == "Makefile":
                if file.endswith(".py"):
                    yield from python_words(file, self.text(file))
                elif file.endswith((".cc", ".h")):
                    yield from comments(file, self.text(file), "//")
                elif file.endswith((".sh", ".sbatch", ".yaml", ".yml", "Makefile", "Dockerfile", "/run")):
                    yield from comments(file, self.text(file), "#")


def python_words(file: str, source: str) -> Iterator[Passage]:
    """Docstrings, and comments, of which those on neighbouring lines are one."""
    starts = [0, *(match.end() for match in re.finditer("\n", source))]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            words = node.body[0]
            start, end = starts[words.lineno - 1], starts[words.end_lineno] if words.end_lineno else None
            yield Passage(file, start, source[start:end])
    found: list[tuple[int, int]] = []  # line and offset
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found.append((token.start[0], starts[token.start[0] - 1] + token.start[1]))
    yield from joined(file, source, found)


def comments(file: str, source: str, mark: str) -> Iterator[Passage]:
    """Comments of a file in another language; a mark inside a string is taken for one."""
    found = [(source.count("\n", 0, m.start()) + 1, m.start()) for m in re.finditer(rf"(?<!\S){mark}", source)]
    first: dict[int, int] = {}
    for line, offset in found:
        first.setdefault(line, offset)
    yield from joined(file, source, list(first.items()))


def joined(file: str, source: str, found: list[tuple[int, int]]) -> Iterator[Passage]:
    """Comments that begin at these lines and offsets, neighbouring lines together."""
    while found:
        count = 1
        while count < len(found) and found[count][0] == found[0][0] + count:
            count += 1
        end = source.find("\n", found[count - 1][1])
        yield Passage(file, found[0][1], source[found[0][1] : end if end >= 0 else None])
        found = found[count:]


def slugs(text: str) -> set[str]:
    """Anchors of a Markdown document's headings, as GitHub makes them."""
    seen: dict[str, int] = {}
    for heading in HEADING.findall(re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        seen[slug] = seen.get(slug, -1) + 1
    return {slug if not i else f"{slug}-{i}" for slug, times in seen.items() for i in range(times + 1)}


def section_numbers(text: str) -> list[str]:
    """Numbers of numbered headings, in their order: "6", "6.1"."""
    numbered = (re.match(rf"({NUMBER})\.? ", heading) for heading in HEADING.findall(text))
    return [match[1] for match in numbered if match]


def path_faults(tree: Tree, passage: Passage) -> Iterator[tuple[int, str]]:
    for match in PATH.finditer(passage.text):
        path = match[0].rstrip(".-")
        first = path.split("/")[0]
        if first in tree.top:
            if not tree.has(path):
                yield match.start(), f"there is no {path}"
        elif path.endswith((".py", ".sh", ".cc")) and not any(
            fnmatch.fnmatch(file, path) or fnmatch.fnmatch(file, f"*/{path}") for file in tree.files
        ):
            yield match.start(), f"no path of the repository ends in {path}"
    if passage.file.endswith(".md"):
        for match in BARE.finditer(passage.text):
            if match[0] not in tree.names:
                yield match.start(), f"no file is named {match[0]}"


def module_faults(tree: Tree, passage: Passage) -> Iterator[tuple[int, str]]:
    for match in DOTTED.finditer(passage.text):
        place = "mtp_jax"
        for name in match[0].split(".")[1:]:
            if tree.has(f"{place}/{name}"):
                place += f"/{name}"
            elif f"{place}/{name}.py" in tree.files:
                place += f"/{name}.py"
            else:
                file = place if place.endswith(".py") else f"{place}/__init__.py"
                if file not in tree.files or not re.search(rf"\b{name}\b", tree.text(file)):
                    yield match.start(), f"{match[0]}: there is no {name} in {place}"
                break


def section_faults(tree: Tree, passage: Passage) -> Iterator[tuple[int, str]]:
    there = section_numbers(tree.text(METHOD))
    pattern = OWN_SECTION if passage.file == METHOD else CITED_SECTION
    for match in pattern.finditer(passage.text):
        for number in re.findall(NUMBER, match[1]):
            if number not in there:
                yield match.start(), f"{METHOD} has no section {number}"


def link_faults(tree: Tree, passage: Passage) -> Iterator[tuple[int, str]]:
    if not passage.file.endswith(".md"):
        return
    prose = CODE.sub(lambda code: " " * len(code[0]), passage.text)
    for match in LINK.finditer(prose):
        target, _, anchor = (match[1] or match[2]).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = passage.file
        if target:
            file = (tree.root / passage.file).parent.joinpath(target).resolve().relative_to(tree.root).as_posix()
        if not tree.has(file):
            yield match.start(), f"the link to {target} leads nowhere"
        elif anchor and anchor not in slugs(tree.text(file)):
            yield match.start(), f"{file} has no heading #{anchor}"


def notes_faults(tree: Tree, passage: Passage) -> Iterator[tuple[int, str]]:
    for match in re.finditer(r"\bmethod\.md\b", passage.text):
        yield match.start(), f"method.md is not part of the repository; cite {METHOD}, section N"


CHECKS = (path_faults, module_faults, section_faults, link_faults, notes_faults)


def faults(root: Path) -> list[str]:
    """Every citation of something that is not there, as file:line: what is wrong."""
    tree = Tree(root.resolve())
    found = []
    for passage in tree.passages():
        if passage.file == "tests/test_docs.py":
            continue  # its examples are no citations
        for check in CHECKS:
            for offset, what in check(tree, passage):
                line = tree.text(passage.file).count("\n", 0, passage.start + offset) + 1
                found.append(f"{passage.file}:{line}: {what}")
    return sorted(set(found), key=lambda fault: (fault.split(":")[0], int(fault.split(":")[1]), fault))


def test_all_that_is_cited_is_there():
    found = faults(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_the_method_is_numbered_in_order():
    numbers = section_numbers((ROOT / METHOD).read_text(encoding="utf-8"))
    chapters = [number for number in numbers if "." not in number]
    assert chapters == [str(i) for i in range(1, len(chapters) + 1)]
    for chapter in chapters:
        inner = [number for number in numbers if number.startswith(f"{chapter}.")]
        assert inner == [f"{chapter}.{i}" for i in range(1, len(inner) + 1)]
        at = numbers.index(chapter)
        assert numbers[at + 1 : at + 1 + len(inner)] == inner


# ---- the checks themselves


@pytest.fixture
def repository(tmp_path):
    """A small repository without a fault, and a function that writes a file into it and gives the faults."""
    files = {
        ".gitignore": "/runs/\n",
        "README.md": "# Name\n\n[method](docs/how-it-works.md#6-losses), [here](#name), `python -m mtp_jax.train`.\n"
        "See `mtp_jax/mtp/losses.py`, mtp/losses.py, `losses.py`, docs/*.md, runs/mine, ~/mtp_jax/none.py.\n",
        "docs/how-it-works.md": "# How\n\n## 6. Losses\n\n### 6.1 Targets\n\nAs section 6.1 says.\n",
        "mtp_jax/__init__.py": "",
        "mtp_jax/train.py": '"""Train (docs/how-it-works.md, section 6.1)."""\n\nX = 1  # docs/how-it-works.md\n',
        "mtp_jax/mtp/losses.py": "# See mtp_jax.train.X and docs/how-it-works.md,\n# sections 6 and 6.1.\n",
        "runs/mine/README.md": "`mtp_jax/none.py`\n",
    }

    def write(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return faults(tmp_path)

    write(METHOD, files[METHOD])  # which the others are compared with
    found = [write(name, text) for name, text in files.items()]
    assert found[-1] == []
    return write


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("README.md", "\nSee `mtp_jax/mtp/loss.py`.\n", "README.md:2: there is no mtp_jax/mtp/loss.py"),
        ("README.md", "In `mtp/loss.py`.", "README.md:1: no path of the repository ends in mtp/loss.py"),
        ("README.md", "In `loss.py`.", "README.md:1: no file is named loss.py"),
        ("README.md", "All of docs/*.rst.", "README.md:1: there is no docs/*.rst"),
        ("README.md", "`python -m mtp_jax.trian`", "README.md:1: mtp_jax.trian: there is no trian in mtp_jax"),
        ("README.md", "[x](docs/none.md)", "README.md:1: the link to docs/none.md leads nowhere"),
        ("README.md", "[x](docs/how-it-works.md#lost)", "README.md:1: docs/how-it-works.md has no heading #lost"),
        ("README.md", "[x](#lost)", "README.md:1: README.md has no heading #lost"),
        ("mtp_jax/a.py", "def f():\n    '''See docs/gone.md.'''\n", "mtp_jax/a.py:2: there is no docs/gone.md"),
        ("mtp_jax/a.py", "x = 1\ny = 2  # configs: docs/gone.md\n", "mtp_jax/a.py:2: there is no docs/gone.md"),
        ("mtp_jax/a.cc", "int x;  // docs/gone.md\n", "mtp_jax/a.cc:1: there is no docs/gone.md"),
        ("configs/a.yaml", "# see\n# docs/gone.md\n", "configs/a.yaml:2: there is no docs/gone.md"),
        (
            "mtp_jax/a.py",
            '"""One.\n\nTwo (docs/how-it-works.md, section 6.2).\n"""\n',
            "mtp_jax/a.py:3: docs/how-it-works.md has no section 6.2",
        ),
        (
            "mtp_jax/a.py",
            "# As docs/how-it-works.md, sections 6\n# and 7 say.\n",
            "mtp_jax/a.py:1: docs/how-it-works.md has no section 7",
        ),
        (
            "docs/how-it-works.md",
            "## 6. Losses\n### 6.1 Targets\nsection 6.3\n",
            "docs/how-it-works.md:3: docs/how-it-works.md has no section 6.3",
        ),
        (
            "mtp_jax/a.py",
            '"""Losses (method.md, section 4)."""\n',
            "mtp_jax/a.py:1: method.md is not part of the repository; cite docs/how-it-works.md, section N",
        ),
    ],
)
def test_a_fault_is_found_with_its_place(repository, name, text, fault):
    assert fault in repository(name, text)


def test_strings_of_the_code_are_no_citations(repository):
    assert repository("mtp_jax/a.py", 'NAME = "docs/gone.md"\n') == []
