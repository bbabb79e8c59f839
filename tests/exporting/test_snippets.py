"""The Python that the README and a model card show runs as it stands."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from exported import export, noisy_adapter
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[2]
# Each snippet with names of its own, all in one process: importing torch and JAX takes longer than they do.
EACH = """
import contextlib, io, json, sys
outputs = []
for code in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, code, "exec"), {"__name__": "__main__"})
    outputs.append(out.getvalue())
print(json.dumps(outputs))
"""


def snippets(text):
    return re.findall(r"```python\n(.*?)```", text, re.S)


def run(parts, folder):
    """What each of the snippets prints, in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HOME": str(folder / ".home")}
    done = subprocess.run(
        [sys.executable, "-c", EACH],
        cwd=folder,
        env=environment,
        input=json.dumps(parts),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export("bundled:stdlib-5m", tmp_path_factory.mktemp("card") / "exported")


def test_a_cards_snippets(folder):
    parts = snippets((folder / "README.md").read_text())
    assert len(parts) == 2 and "custom_generate" in parts[1]
    ids = AutoTokenizer.from_pretrained(folder)("def main():").input_ids
    outputs = set(run(parts, folder))
    assert len(outputs) == 1 and outputs.pop().count("\n") > 3 and ids


def test_a_referring_cards_snippet(small_folder, tmp_path):
    base = shutil.copytree(small_folder, tmp_path / "base")
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}{{ ' so: ' if add_generation_prompt }}"
    )
    (base / "chat_template.jinja").write_text(template)
    noisy_adapter(base, tmp_path / "adapter")
    out = export(tmp_path / "adapter", tmp_path / "out", base="reference")
    (part,) = snippets((out / "README.md").read_text())
    assert f'from_pretrained("{base}")' in part
    assert "user: What is a tide? so: " in run([part], out)[0]
    assert "--chat" in (out / "README.md").read_text() and "def main():" not in (out / "README.md").read_text()


def test_the_readmes_snippets(folder):
    parts = snippets((ROOT / "README.md").read_text()) + snippets((ROOT / "docs" / "decoding.md").read_text())
    assert any("trust_remote_code" in part for part in parts) and sum("mtp_jax.load" in part for part in parts) == 3
    run(parts, folder.parent)
