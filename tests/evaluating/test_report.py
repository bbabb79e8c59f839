"""What an evaluation writes, held against a made-up results tree: figures, escaping, no outside reference, plots."""

import copy
import itertools
import json
import re
import statistics
import sys
from html.parser import HTMLParser

import made_up
import pytest

from mtp_jax.errors import UserError
from mtp_jax.evaluating import paper, plots
from mtp_jax.evaluating.html import Drawing, page
from mtp_jax.evaluating.markdown import markdown
from mtp_jax.evaluating.report import write_report
from mtp_jax.evaluating.tables import main_figures, sentence

pytestmark = pytest.mark.quick

VOID = {"meta", "br", "img", "link", "input", "hr"}
HOSTILE = "</td><script>alert(1)</script>|`*_[x](http://evil) \"'&lt;"


@pytest.fixture
def tree():
    return made_up.results()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation") / "new" / "out"
    write_report(made_up.results(), folder)
    return folder


def tables_of(text):
    """Every table of a Markdown document, as the line above it and its rows of cells, the rule left out."""
    found, lines = [], text.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("|") and not lines[i - 1].startswith("|"):
            rows = []
            while i < len(lines) and lines[i].startswith("|"):
                rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", lines[i])[1:-1]])
                i += 1
            above = next(line for line in reversed(lines[: lines.index(line, i - len(rows))]) if line)
            found.append((above.strip("*# "), rows[:1] + rows[2:]))
    return found


class Page(HTMLParser):
    """Tags that must close in order, their attributes, and the text of some elements."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes = [], [], []
        self.texts, self.passes, self.visible = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs)
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append((tag, attributes))
        if attributes.get("class") == "text":
            self.texts.append("")
            self.passes.append([])
        elif "data-step" in attributes:
            self.passes[-1].append([attributes["class"], attributes["data-step"], ""])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        if self.open and self.open[-1][0] != "style":
            self.visible += data
        if any(attributes.get("class") == "text" for _, attributes in self.open):
            self.texts[-1] += data
            if "data-step" in self.open[-1][1]:
                self.passes[-1][-1][2] += data


# ---- the paper


def test_the_papers_average_is_that_of_its_rows():
    printed = (1.67, 2.14, 2.48, 2.69, 2.88, 2.99, 3.10, 3.17)
    columns = zip(*(row.tokens_per_step for row in paper.TABLE_1.values()), strict=True)
    assert len(paper.TABLE_1) == 13
    for column, average in zip(columns, printed, strict=True):
        assert statistics.fmean(column) == pytest.approx(average, abs=0.02)  # the paper rounds as it likes


def test_a_suite_of_ours_alone_is_compared_with_its_domain():
    assert paper.nearest("ifeval", "chat") == "ifeval"
    assert paper.nearest("mt_bench", "chat") == "alpaca_eval"
    assert paper.nearest("stories", "stories") is None


# ---- Markdown


def test_table_1_holds_our_figures_and_the_papers(tree):
    (rows,) = (rows for title, rows in tables_of(markdown(tree)) if title == "Tokens per step by number of masks")
    assert rows[0] == ["skill", "suite", *"12345678"]
    ours = {row["suite"]: {} for row in tree["rows"]}
    for row in tree["rows"]:
        if row["decoder"].startswith("quadratic") and row["batch_size"] == 1:
            ours[row["suite"]][row["masks"]] = row["tokens_per_step"]["mean"]
    expected = []
    for name, (title, *_) in made_up.SUITES.items():
        expected.append([title, *(f"{ours[name][M]:.2f}" if M in ours[name] else "" for M in range(1, 9))])
        if name != "mt_bench":
            expected.append(["paper, 8B", *(f"{value:.2f}" for value in paper.TABLE_1[name].tokens_per_step)])
    assert [row[1:] for row in rows[1 : len(expected) + 1]] == expected
    assert [row[0] for row in rows[1:]] == [
        "math",
        "",
        "code",
        "",
        "chat",
        "",
        "",
        "knowledge",
        "",
        "",
        "",
        "mean",
        "",
        "",
    ]
    every, shared, theirs = rows[len(expected) + 1 :]
    of_paper = [name for name in made_up.SUITES if name != "mt_bench"]
    assert every[5] == f"{statistics.fmean(ours[name][4] for name in made_up.SUITES):.2f}"
    assert shared[1] == "the 5 of the paper"
    assert shared[5] == f"{statistics.fmean(ours[name][4] for name in of_paper):.2f}"
    assert theirs[5] == f"{statistics.fmean(paper.TABLE_1[name].tokens_per_step[3] for name in of_paper):.2f}"
    assert every[4] == shared[4] == "" != theirs[4]  # three masks were not measured


def test_a_mean_is_over_every_suite_or_left_out(tree):
    tree["rows"] = [row for row in tree["rows"] if (row["suite"], row["decoder"]) != ("mmlu", "quadratic:8")]
    (rows,) = (rows for title, rows in tables_of(markdown(tree)) if title == "Tokens per step by number of masks")
    (mean,) = (row for row in rows if row[0] == "mean")
    assert mean[5] and not mean[9]


def test_more_masks_than_the_papers_have_a_column(tree):
    tree["rows"] = [row for row in tree["rows"] if row["decoder"] in ("none", "quadratic:8")]
    for row in tree["rows"]:
        if row["decoder"] == "quadratic:8":
            row |= {"decoder": "quadratic:12", "masks": 12}
    (rows,) = (rows for title, rows in tables_of(markdown(tree)) if title == "Tokens per step by number of masks")
    assert rows[0][2:] == [*"12345678", "12"] and rows[1][-1] and not rows[2][-1]


def test_every_decoder_has_its_figures_on_every_suite(tree):
    found = dict(tables_of(markdown(tree)))
    for name, (title, _, metric, _) in made_up.SUITES.items():
        for batch_size in made_up.BATCH_SIZES:
            heads, *lines = found[f"{title}, batch {batch_size}"]
            assert ("score" in heads, metric in heads) == (False, metric is not None)
            rows = [row for row in tree["rows"] if (row["suite"], row["batch_size"]) == (name, batch_size)]
            assert len(rows) == len(lines) == len(made_up.DECODERS)
            for row, line in zip(rows, lines, strict=True):
                cells = dict(zip(heads, line, strict=True))
                assert cells["decoder"].split(" (")[0] == row["decoder"]
                numbers = {head: [float(n) for n in re.findall(r"\d+\.?\d*", cell)] for head, cell in cells.items()}
                steps, speed, same = row["tokens_per_step"], row["speedup"], row["identical"]
                assert numbers["tokens per step"] == pytest.approx([*steps.values()] if steps else [], abs=0.005)
                assert numbers["tokens/s"] == pytest.approx([*row["tokens_per_second"].values()], abs=0.5)
                assert numbers["speed-up"] == pytest.approx([*speed.values()], abs=0.005)
                assert numbers["identical"][:2] == ([same["same"], same["of"]] if same else [])
                assert numbers["estimate"] == pytest.approx([row["estimate"]] if row["estimate"] else [], abs=0.005)
                if metric:
                    assert numbers[metric] == [row["score"]]
    (auto,) = (line for line in found["GSM8K, batch 1"] if line[0].startswith("auto"))
    assert auto[0] == "auto (took quadratic:1)"
    for row in tree["rows"]:
        row["calibrated_apart"] = False if row["decoder"] == "auto" else None
    assert "| auto (took quadratic:1, calibrated on the questions measured) |" in markdown(tree)


def test_every_difference_is_listed_with_its_place(tree):
    text = markdown(tree)
    assert text.index("## Faults") < text.index("- PopQA") < text.index("## Ties") < text.index("- GSM8K")
    assert "- GSM8K, quadratic:8, batch 1: prompt 3, new token 17: gap 2e-06\n" in text
    assert r"- PopQA, transformers lookup, batch 1: prompt 7: \`\<a\|b\>\`" in text
    for row in tree["rows"]:
        if row["identical"]:
            row["identical"] |= {"ties": [], "faults": []}
    assert "Ties" not in markdown(tree) and "Faults" not in markdown(tree)


def test_head_names_what_was_measured(tree):
    head = dict(row for row in next(iter(tables_of(markdown(tree))))[1][1:])
    assert head["model"] == tree["model"] and head["device"] == "cpu, 2 cores" and head["dtype"] == "float32"
    assert "jax 0.10.0" in head["versions"] and "batch sizes 1, 8" in head["settings"]
    assert f"    {tree['command']}\n" in markdown(tree)


# ---- the figures at the top


def test_main_figures_are_means_over_suites(tree):
    found = {figure.label: (figure.value, figure.note) for figure in main_figures(tree)}

    def of(decoder):
        return [row for row in tree["rows"] if (row["decoder"], row["batch_size"]) == (decoder, 1)]

    steps = statistics.fmean(row["tokens_per_step"]["mean"] for row in of("quadratic:8"))
    speed = statistics.geometric_mean(row["speedup"]["median"] for row in of("linear:4"))
    other = statistics.geometric_mean(row["speedup"]["median"] for row in of("draft:4"))
    assert found["tokens per step"] == (f"{steps:.2f}", "quadratic:8, mean of 6 suites")
    assert found["speed-up"] == (f"{speed:.2f}x", "linear:4, batch 1, geometric mean of 6 suites")
    assert found["speed-up without an adapter"][0] == f"{other:.2f}x"
    # 10 decoders that draft here, 6 suites, 2 batch sizes, 40 prompts; transformers is none of them
    assert found["identical outputs"] == ("4799/4800", "1 tie")
    assert f"{steps:.2f} tokens per step (quadratic:8) and runs {speed:.2f} times as fast" in sentence(tree)


def test_a_decoder_that_lacks_a_suite_is_no_main_figure(tree):
    tree["rows"] = [row for row in tree["rows"] if (row["suite"], row["decoder"]) != ("popqa", "quadratic:8")]
    assert "(quadratic:4)" in sentence(tree)


def test_what_gains_nothing_is_said_to(tree):
    for row in tree["rows"]:
        if row["decoder"] != "none":
            row["speedup"] = {"median": 0.8, "low": 0.7, "high": 0.9}
    assert "no plan is faster than plain decoding" in sentence(tree) and "0.80x" in sentence(tree)


# ---- the page


def test_page_is_whole_by_itself(written):
    text = (written / "report.html").read_text(encoding="utf-8")
    found = Page(text)
    assert {"svg", "table", "details", "figure"} <= set(found.tags)
    assert not {"script", "img", "link", "iframe", "object", "base", "form"} & set(found.tags)
    for name, value in found.attributes:
        assert not name.startswith("on") and name not in ("src", "srcset", "action")
        assert name != "href" or value.startswith("#")
        assert "://" not in (value or "")
    assert not re.search(r"@import|url\((?!#)|@font-face|://", text)
    ids = [value for name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    referred = {value[1:] for name, value in found.attributes if name == "href"} | set(
        re.findall(r"url\(#([^)]+)\)", text)
    )
    assert referred <= set(ids)
    assert ("name", "viewport") in found.attributes and "prefers-color-scheme: dark" in text


def test_samples_are_told_as_they_were_written(tree, written):
    found = Page((written / "report.html").read_text(encoding="utf-8"))
    assert len(found.texts) == 2 * len(tree["samples"])
    for i, sample in enumerate(tree["samples"]):
        assert found.texts[2 * i] == sample["prompt"]
        assert found.texts[2 * i + 1] == "".join(text for text, _ in sample["pieces"])
        by_step = {}
        for text, step in sample["pieces"]:
            by_step[f"step {step}" if step else "prefill"] = (
                by_step.get(f"step {step}" if step else "prefill", "") + text
            )
        passes = found.passes[2 * i + 1]
        assert [(step, text) for _, step, text in passes] == list(by_step.items())
        assert all(a[0] != b[0] for a, b in itertools.pairwise(passes))
        assert {colour for colour, _, _ in passes} == {f"pass-{c}" for c in range(4)}


def test_a_pass_without_text_leaves_no_piece(tree):
    tree["samples"] = tree["samples"][:1]
    tree["samples"][0]["pieces"] = [["a", 0], ["", 1], ["é", 2]]
    assert [step for _, step, _ in Page(page(tree)).passes[1]] == ["prefill", "step 2"]


def test_page_and_markdown_hold_the_same_figures(tree):
    shown = Page(page(tree)).visible
    for _, rows in tables_of(markdown(tree)):
        for cell in (cell for row in rows for cell in row):
            for figure in re.findall(r"\d+\.\d+x?|\d+/\d+", cell):
                assert figure in shown


def test_nothing_of_the_tree_becomes_a_tag(tree):
    plain = Page(page(tree, [Drawing("t", "c", "<svg></svg>")])).tags
    hostile = copy.deepcopy(tree)
    for name in ("model", "weights", "adapter", "draft_model", "device", "dtype", "command"):
        hostile[name] = HOSTILE
    hostile["versions"] = {name: HOSTILE for name in tree["versions"]}
    for suite in hostile["suites"]:
        suite |= {
            "title": HOSTILE,
            "source": HOSTILE,
            "domain": suite["domain"] + HOSTILE,
            "metric": suite["metric"] and HOSTILE,
        }
    for row in hostile["rows"]:
        row["plan"] = row["plan"] and HOSTILE
        if row["identical"]:
            row["identical"] |= {name: [HOSTILE] * len(row["identical"][name]) for name in ("ties", "faults")}
    for sample in hostile["samples"]:
        sample["prompt"] = HOSTILE
        sample["pieces"] = [[HOSTILE, step] for _, step in sample["pieces"]]
    found = Page(page(hostile, [Drawing(HOSTILE, HOSTILE, "<svg></svg>")]))
    assert found.tags == plain
    assert found.texts[0] == HOSTILE
    for line in markdown(hostile).splitlines():
        assert line.startswith("    ") or not re.search(r"(?<!\\)([<`*]|&lt;)", line.replace("**", ""))


# ---- plots


def test_lines_are_the_trees_figures(tree):
    with plots.style():
        (axes,) = plots.tokens_per_step(tree).axes
        found = {tuple(line.get_ydata().tolist()): line for line in axes.lines if len(line.get_xydata())}
        time = {line.get_label(): line.get_xydata().tolist() for line in plots.time(tree).axes[0].lines}
        by_suite, by_decoder = plots.acceptance(tree).axes
    for name in made_up.SUITES:
        rows = [row for row in tree["rows"] if (row["suite"], row["batch_size"]) == (name, 1)]
        ours = found[tuple(row["tokens_per_step"]["mean"] for row in rows if row["decoder"].startswith("quadratic"))]
        if name != "mt_bench":
            theirs = found[paper.TABLE_1[name].tokens_per_step]
            assert (theirs.get_color(), theirs.get_linestyle()) == (ours.get_color(), "--")
        (longest,) = (row["acceptance"] for row in rows if row["decoder"] == "quadratic:8")
        (line,) = (line for line in by_suite.lines if line.get_label() == made_up.SUITES[name][0])
        assert line.get_ydata().tolist() == longest
    assert len(found) == len(made_up.SUITES) + 5  # AlpacaEval is there itself: MT-Bench needs no curve beside it
    assert [line.get_label() for line in by_decoder.lines] == [
        "linear:4",
        "quadratic:8",
        "lookup:8",
        "jacobi:4",
        "draft:4",
    ]
    cost = {(row["suite"], row["decoder"]): row["step_seconds"] for row in tree["rows"] if row["batch_size"] == 8}
    ratios = [cost[name, "quadratic:8"] / cost[name, "none"] for name in made_up.SUITES]
    assert time["time, batch 8"][0] == [1, pytest.approx(1)]
    assert time["time, batch 8"][-1] == [81, pytest.approx(statistics.geometric_mean(ratios))]
    gains = [row["tokens_per_step"]["mean"] for row in tree["rows"] if row["decoder"] == "quadratic:4"]
    assert time["tokens, quadratic"][2] == [25, pytest.approx(statistics.fmean(gains))]


def test_dollars_in_a_title_are_no_mathematics(tree):
    tree["suites"][0]["title"] = r"cheap $\frac$"
    with plots.style():
        for plot in plots.PLOTS:
            plots.png(plot.draw(tree))


def test_a_drawing_has_the_pages_colours_alone(tree):
    with plots.style():
        drawn = plots.svg(plots.tokens_per_step(tree), "here")
    assert not re.search(r"#[0-9a-f]{6}\b|\brgb", drawn)
    template = page(tree)
    for variable in re.findall(r"var\((--[\w-]+)\)", drawn):
        assert template.count(f"{variable}: #") == 2  # in light and in dark


# ---- files


def test_every_file_is_written(tree, written):
    names = {"results.json", "results.md", "report.html", "tokens_per_step.png", "acceptance.png", "time.png"}
    assert {path.name for path in written.iterdir()} == names
    assert json.loads((written / "results.json").read_text()) == tree
    for plot in plots.PLOTS:
        data = (written / f"{plot.name}.png").read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(data[16:20], "big") == 840
        assert f"![{plot.title}]({plot.name}.png)" in (written / "results.md").read_text()


def test_without_matplotlib_the_rest_is_written(tree, tmp_path, monkeypatch, capsys):
    (tmp_path / "time.png").write_bytes(b"of earlier results")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_report(tree, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md", "report.html"}
    assert capsys.readouterr().err.splitlines() == [
        "warning: matplotlib is not installed, so the report has no plots; pip install 'mtp_jax[plot]' brings it."
    ]
    assert "svg" not in Page((tmp_path / "report.html").read_text()).tags
    assert "![" not in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize("adapter", [None, "runs/mine"])
def test_plain_decoding_alone_is_a_report_too(adapter, tmp_path):
    tree = made_up.results(suites=("gsm8k",), decoders=("none",), batch_sizes=(1,))
    tree |= {"adapter": adapter, "draft_model": None, "masks": None, "samples": []}
    write_report(tree, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md", "report.html"}
    text = (tmp_path / "results.md").read_text()
    assert f"{'without an' if adapter is None else 'with its'} adapter, on 1 suite." in text
    assert "paper" not in text and "| draft model |" not in text


def test_figures_that_were_not_taken_are_left_out(tmp_path):
    tree = made_up.results(suites=("gsm8k", "mmlu"), decoders=("none", "quadratic:2"), batch_sizes=(1,))
    for row in tree["rows"]:
        row |= dict.fromkeys(
            ("tokens_per_second", "speedup", "step_seconds", "identical", "score", "estimate", "acceptance")
        )
    write_report(tree, tmp_path)
    assert dict(tables_of((tmp_path / "results.md").read_text()))["GSM8K, batch 1"][0] == ["decoder", "tokens per step"]
    assert {path.name for path in tmp_path.glob("*.png")} == {"tokens_per_step.png"}
    assert [figure.label for figure in main_figures(tree)] == ["tokens per step"]


def test_figures_of_one_suite_are_no_means():
    tree = made_up.results(suites=("gsm8k",))
    assert {figure.note for figure in main_figures(tree)[:2]} == {"quadratic:8, GSM8K", "linear:4, batch 1, GSM8K"}
    assert "on GSM8K." in sentence(tree) and "mean" not in sentence(tree)


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(tree, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # for speed
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / 'file'}: cannot be written")):
        write_report(tree, tmp_path / "file")
