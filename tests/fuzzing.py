"""Damaged and random configs, command lines, records, adapters and model folders: every command ends in good order.

    python tests/fuzzing.py --cases 500 [--seed N] [--kind records]

A case runs a command in this process. Right are exit code 0, or 2 with one line on stderr for each fault; a traceback,
another exit code or more than a minute is a failure, and the smallest case that shows it is printed.
"""

import argparse
import collections
import contextlib
import copy
import importlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

SECONDS = 60
COMMANDS = {"data": "data.__main__"}  # where a module is not the command
BUNDLED = "bundled:stdlib-5m"

# ---- what cases are made of

# Any text that a terminal or a file can hold, half characters included, and some that programs trip over.
ODD = ["", " ", "\x00", "\ud800", "\udcff", "\ufeff", "é", "日本", "🙂", "-1", "0", "1e999", "nan", "null", "~nobody/x"]
ODD += ["[", "a/[b].jsonl", "{}", "{{", "%s", "/dev/null/x", "con\nfig", "x" * 5000, "bundled:"]
WORDS = st.sampled_from(ODD)
TEXTS = WORDS | st.text(st.characters(codec=None), max_size=12)
NUMBERS = st.sampled_from([0, 1, -1, 2**31, 2**63, 2**200, -(2**70), 0.0, 1e-38, 1e308, float("nan"), float("inf")])
SCALARS = st.none() | st.booleans() | NUMBERS | st.integers(-3, 300) | st.floats() | TEXTS
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXTS, v, max_size=3), max_leaves=6)


def places(tree, at=()):
    """The path of every value below a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from places(value, (*at, key))


@st.composite
def damaged(draw, tree, values=VALUES):
    """A tree of JSON with some values replaced, removed, or beside others that nobody knows."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(tree))
        if not found:
            break
        path = draw(st.sampled_from(found))
        node = tree
        for key in path[:-1]:
            node = node[key]
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                node[path[-1]] = draw(values)
            case "remove":
                del node[path[-1]]
            case "add" if isinstance(node, dict):
                node[draw(TEXTS)] = draw(values)
    return tree


@st.composite
def broken_bytes(draw, data):
    """A file cut off, or with some bytes changed."""
    data = bytearray(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)
    for _ in range(draw(st.integers(0, 3))):
        if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "", None, 3])
CONTENTS = TEXTS | st.just([{"type": "text", "text": "part"}]) | VALUES
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES, "content": CONTENTS}, optional={"tool_calls": VALUES}), max_size=4
)
TURNS = st.lists(st.fixed_dictionaries({"from": ROLES, "value": CONTENTS}), max_size=4)
RECORDS = st.one_of(
    st.fixed_dictionaries({"messages": MESSAGES | VALUES}, optional={"tools": VALUES, "id": VALUES}),
    st.fixed_dictionaries({"conversations": TURNS | VALUES}),
    st.fixed_dictionaries({"prompt": TEXTS | MESSAGES | VALUES, "completion": TEXTS | MESSAGES | VALUES}),
    st.fixed_dictionaries({"text": TEXTS | VALUES}, optional={"date": st.just("2020-01-01"), "n": NUMBERS}),
    VALUES,
)
SOUND = {"messages": [{"role": "user", "content": "Say something."}, {"role": "assistant", "content": "Gladly. " * 9}]}


def dumped(records):
    """JSON lines, half characters as escapes."""
    return "".join(json.dumps(record) + "\n" for record in records).encode()


# ---- the cases


class Ground:
    """A folder with a tiny model, its adapter and some data, and the commands on copies of them."""

    def __init__(self, root):
        import jax
        import numpy as np

        from mtp_jax.encoding import load_tokenizer
        from mtp_jax.locate import find_folder
        from mtp_jax.model.base import open_base
        from mtp_jax.model.folder_writer import write_folder
        from mtp_jax.model.geometry import Geometry
        from mtp_jax.model.weights import init_params
        from mtp_jax.mtp.adapter import AdapterShape, init_adapter
        from mtp_jax.mtp.adapter_folder import write_adapter

        self.root = Path(root)
        config = json.loads((find_folder(BUNDLED) / "config.json").read_text())
        config |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        config |= {"num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 128}
        g = Geometry.from_config(config)
        tokenizer = load_tokenizer(find_folder(BUNDLED), g.V)
        tokenizer.chat_template = (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        )
        params = init_params(g, jax.random.key(0))
        self.model, self.adapter = self.root / "model", self.root / "adapter"
        write_folder(self.model, params, g, config, tokenizer, np.float32)
        shape = AdapterShape(2, 2, 4.0, ("q", "v"), "residual")
        adapter = init_adapter(g, shape, params["embed"]["embedding"], jax.random.key(1))
        pointer = {"name": str(self.model), "fingerprint": open_base(str(self.model)).fingerprint}
        write_adapter(self.adapter, g, shape, adapter, pointer, {})
        self.data = self.root / "data.jsonl"
        self.data.write_bytes(dumped([SOUND] * 12))
        self.count = 0
        (self.root / "here" / "below").mkdir(parents=True)
        os.chdir(self.root / "here" / "below")  # where relative names lead

    def copy(self, folder):
        """A folder's copy for one case."""
        self.count += 1
        return Path(shutil.copytree(folder, self.root / f"case{self.count}" / folder.name))

    def config(self, **data):
        """A sound config."""
        source = {"kind": "dataset", "path": str(self.data), "weight": 1.0, "streaming": False}
        return {
            "objective": "multi_token",
            "output_dir": str(self.root / "run"),
            "model": {"path": str(self.model), "compute_dtype": "float32"},
            "data": {"sources": [source], "held_out": 0.1, "too_long": "split", **data},
            "lora": {"rank": 2, "targets": ["q", "v"]},
            "mtp": {"masks": 2, "target": "base_soft", "weights": {"base": 1.0}},
            "train": {"steps": 1, "batch_size": 2, "sequence_length": 16, "learning_rate": 1e-3, "anchors": 4},
        }


def of_configs(ground, data):
    """A config with damaged values, or damaged as a file."""
    tree = data.draw(damaged(ground.config()) | st.just(ground.config()))
    file = ground.root / "config.yaml"
    # yaml cannot write half characters; JSON, which YAML contains, can.
    text = json.dumps(tree).encode()
    file.write_bytes(data.draw(st.just(text) | broken_bytes(yaml.safe_dump(ground.config()).encode())))
    return "data", "--config", file, "--examples", 1


def of_command_lines(ground, data):
    """Options of every command with values from anywhere."""
    module = data.draw(st.sampled_from(["generate", "generate", "data", "evaluate", "export", "regenerate", "train"]))
    sound = {
        "generate": ["--model", str(ground.model), "--prompt", "Say", "--max-new-tokens", "2"],
        "evaluate": ["--model", str(ground.model), "--data", str(ground.data)],
        "export": ["--adapter", str(ground.adapter), "--out", "out"],  # nothing that is there is ever replaced
    }.get(module, ["--config", str(ground.root / "config.yaml")])
    options = ["--prompt", "--prompts", "--plan", "--max-new-tokens", "--temperature", "--top-k", "--top-p", "--seed"]
    options += ["--dtype", "--batch-size", "--shortlist", "--stream", "--json", "--compare", "--adapter", "--model"]
    options += ["--generation-config", "--config", "--examples", "--base", "--batches", "--sequence-length"]
    (ground.root / "config.yaml").write_text(json.dumps(ground.config()))
    numbers = st.integers(-2, 300).map(str) | NUMBERS.map(str)
    some = st.lists(st.sampled_from(options) | numbers | TEXTS.filter(lambda t: "\x00" not in t), max_size=4)
    cut = data.draw(st.integers(0, len(sound)))
    # Without this limit a sound line could ask for thousands of tokens, and take as long.
    least = ["--max-new-tokens", "2"] if module == "generate" else []
    least += ["train.steps=1"] if module == "train" else []
    return module, *sound[:cut], *data.draw(some), *(sound[cut:] if data.draw(st.booleans()) else []), *least


def of_records(ground, data):
    """Records of every form, as JSON lines that may be damaged."""
    records = data.draw(st.lists(RECORDS, min_size=1, max_size=4))
    records = [SOUND] * data.draw(st.integers(0, 2)) + records + [SOUND] * data.draw(st.integers(0, 2))
    lines = data.draw(st.just(dumped(records)) | broken_bytes(dumped(records)))
    file = ground.root / data.draw(st.sampled_from(["records.jsonl", "records.json", "[1] record.jsonl", "r.txt"]))
    file.write_bytes(lines)
    if data.draw(st.integers(0, 3)) == 0:
        return "generate", "--model", ground.model, "--prompts", file, "--max-new-tokens", 1, "--json"
    kind = {"kind": "text"} if file.suffix == ".txt" else {"kind": "dataset"}
    (ground.root / "config.yaml").write_text(json.dumps(ground.config(sources=[{**kind, "path": str(file)}])))
    return "data", "--config", ground.root / "config.yaml", "--examples", 1


def damage_a_file(folder, data):
    """Change one file of a folder: values where it is JSON, bytes otherwise."""
    file = data.draw(st.sampled_from(sorted(path for path in folder.iterdir() if path.is_file())))
    if file.suffix == ".json" and data.draw(st.integers(0, 3)):
        tree = json.loads(file.read_text(encoding="utf-8"))
        if file.name == "tokenizer.json":  # of its thousands of values, those that a vocabulary does not hide
            tree["model"] = data.draw(damaged({**tree["model"], "vocab": {}})) | {"vocab": tree["model"]["vocab"]}
            file.write_text(json.dumps(tree))
        else:
            file.write_text(json.dumps(data.draw(damaged(tree))))
    else:
        file.write_bytes(data.draw(broken_bytes(file.read_bytes())))


def of_adapters(ground, data):
    """An adapter folder with a damaged file."""
    folder = ground.copy(ground.adapter)
    damage_a_file(folder, data)
    line = ["--model", ground.model, "--prompt", "Say", "--max-new-tokens", 2, "--plan", "linear:1"]
    return "generate", *line, "--adapter", folder


def of_models(ground, data):
    """A model folder with a damaged file."""
    folder = ground.copy(ground.model)
    damage_a_file(folder, data)
    return "generate", "--model", folder, "--prompt", "Say", "--max-new-tokens", 2, "--json"


KINDS = {
    "configs": of_configs,
    "command lines": of_command_lines,
    "records": of_records,
    "adapters": of_adapters,
    "models": of_models,
}


# ---- running them


def outcome(module, *arguments):
    """Exit code and stderr of a command in this process; raises AssertionError where it does not end in good order."""
    from mtp_jax.errors import run_command

    def too_long(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    code, out, err, fault = 0, io.StringIO(), io.StringIO(), None
    before, hook = sys.argv, sys.unraisablehook
    alarm = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        sys.argv = [module, *map(str, arguments)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_command(importlib.import_module(f"mtp_jax.{COMMANDS.get(module, module)}").main)
    except SystemExit as end:
        code = end.code
    except BaseException:
        fault = traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, alarm)
        sys.argv, sys.unraisablehook = before, hook
    told = err.getvalue()
    assert fault is None, fault
    assert code in (0, 2), f"exit code {code}: {told}"
    assert "Traceback" not in told, told
    faults = [line for line in told.splitlines() if line.startswith("error: ") or ": error: " in line]
    assert bool(faults) == (code == 2), f"exit code {code} with {len(faults)} faults: {told[-2000:]}"
    return code, told


def fuzz(kind, cases, number, ground, shrink=False):
    """Run cases of a kind; returns how many ended with each exit code. Raises for the first that fails."""
    counts = collections.Counter()
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]

    @seed(number)
    @settings(max_examples=cases, database=None, deadline=None, phases=phases, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data):
        command = KINDS[kind](ground, data)
        try:
            counts[outcome(*command)[0]] += 1
        except AssertionError as error:
            raise AssertionError(f"{kind}, seed {number}: {[str(part) for part in command]}\n{error}") from None

    run()
    return counts


def main():
    """Parse, fuzz, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=500, help="over all kinds (500)")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--kind", choices=KINDS, nargs="*", default=list(KINDS))
    a = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["HF_HUB_OFFLINE"] = "1"
    failed = 0
    print(f"seed {a.seed}")
    with tempfile.TemporaryDirectory() as root, contextlib.chdir("."):
        ground = Ground(root)
        for kind in a.kind:
            begin = time.perf_counter()
            try:
                counts = fuzz(kind, a.cases // len(a.kind), a.seed, ground, shrink=True)
            except AssertionError as error:
                failed += 1
                print(f"{kind}: FAILED\n{error}")
                continue
            took = time.perf_counter() - begin
            print(f"{kind}: {sum(counts.values())} cases, {counts[0]} exit 0, {counts[2]} exit 2, {took:.0f} s")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
