"""Fixtures that several test folders share."""

import atexit
import copy
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from jaxtyping import install_import_hook

# Shapes in annotations are checked at every call of a test; before the package is imported.
install_import_hook("mtp_jax", "checked.typechecked")

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Threads of torch wait for each other in a loop: on cores that other tests use too, tiny models take minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Programs are compiled once for all tests and the processes that they start, however soon that was done.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mtp_jax-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Compiling takes most of the time of these tests, and making fast what runs once takes most of that. With
# MTP_JAX_OPTIMISED=1 programs are compiled as users compile them.
if not os.environ.get("MTP_JAX_OPTIMISED"):
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's library is imported: no test reaches the network

# Shells start what they run in the background with Ctrl-C ignored, and whoever inherits that cannot be tested with it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    config.addinivalue_line("markers", "quick: compiles next to nothing; part of `make check`")


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


@pytest.fixture(scope="session")
def llama_config():
    """The config.json of a tiny Llama, as a fresh mapping."""
    return copy.deepcopy(LLAMA)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of 24 small text files."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(60)]
    for i in range(24):
        text = " ".join(rng.choice(words) for _ in range(rng.randint(20, 120)))
        (folder / f"doc{i:02}.txt").write_text(f"{i}: {text}.\n")
    return folder


@pytest.fixture(scope="session")
def compiled():
    """A compilation cache that all runs of this session share."""
    return Path(os.environ["JAX_COMPILATION_CACHE_DIR"])


@pytest.fixture(scope="session")
def make_tree(corpus, compiled, llama_config):
    """A function from an output folder to the config of a tiny run, as a mapping to be changed at will."""
    return lambda out: {
        "objective": "next_token",
        "output_dir": str(out),
        "model": {
            "scratch": {"config": copy.deepcopy(llama_config), "tokenizer": {"vocabulary": 300}},
            "save_dtype": "float32",
        },
        "data": {"sources": [{"kind": "text", "path": str(corpus)}], "held_out": 0.2},
        "train": {
            "steps": 12,
            "batch_size": 4,
            "sequence_length": 32,
            "learning_rate": 2e-3,
            "warmup_steps": 2,
            "loss_chunk": 50,
        },
        "evaluation": {"every": 4},
        "checkpoints": {"every": 3},
        "compilation_cache": str(compiled),
    }


@pytest.fixture
def tree(make_tree, tmp_path):
    """The config of a tiny run in a folder of this test."""
    return make_tree(tmp_path / "run")


@pytest.fixture(scope="session")
def finished(make_tree, tmp_path_factory):
    """The output folder of a tiny run that ended undisturbed; not to be changed."""
    from mtp_jax.config_file import validate
    from mtp_jax.training.run import train

    folder = tmp_path_factory.mktemp("finished") / "run"
    train(validate(make_tree(folder), "tree"))
    return folder


class Outcome:
    """What a command left: exit code, stdout, stderr and its lines that begin with `error: `."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err
        self.errors = [line.removeprefix("error: ") for line in err.splitlines() if line.startswith("error: ")]

    def __repr__(self):
        return f"exit code {self.code}\n{self.out}\n{self.err}"


@pytest.fixture
def write_config(tmp_path):
    """A function that writes a mapping as a YAML file and returns its path."""

    def write(tree, name="config.yaml"):
        path = tmp_path / name
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


@pytest.fixture
def command(monkeypatch, capfd):
    """A function that runs a command of mtp_jax in this process: (module, *arguments) -> Outcome."""
    import importlib

    from mtp_jax.errors import run_command

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
        capfd.readouterr()
        code = 0
        try:
            run_command(importlib.import_module(f"mtp_jax.{module}").main)
        except SystemExit as end:
            code = end.code
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture
def start():
    """A function that starts a command of mtp_jax as a process, by a script of one's own or plainly."""
    started = []

    def popen(module, *arguments, script=None, **of_process):
        process = subprocess.Popen(
            [sys.executable, *([*script, module] if script else ["-m", f"mtp_jax.{module}"]), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**of_process),
        )
        started.append(process)
        return process

    yield popen
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def finish():
    """A function that waits for a process: Popen -> Outcome."""

    def wait(process, timeout=120):
        out, err = process.communicate(timeout=timeout)
        return Outcome(process.returncode, out, err)

    return wait


def read_lines(path):
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def free_port():
    """A port on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def environment(devices=1, **more):
    """Of a process that a test starts: with so many simulated devices, compiling as this one does, without torch."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    path = [str(Path(__file__).with_name("untorched")), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(path), **more}


def listing(folder):
    """Every file below a folder with its content, to compare before and after."""
    folder = Path(folder)
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


# What random models hold unless a test says otherwise: a head width that is not D/N, a theta that bites in 48 rows.
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    "tie_word_embeddings": False,
}


class Models:
    """Random models of every family, made by transformers and loaded by us."""

    @staticmethod
    def make(family, seed=0, **config):
        """A transformers model of O(1) activations and logits, no norm scale 1 and no bias 0; None takes a key away."""
        import numpy as np
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = copy.deepcopy({**TINY, **config})
        config = {key: value for key, value in config.items() if value is not None or key not in TINY}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config), attn_implementation="eager")
        draw = np.random.default_rng(seed)
        with torch.no_grad():
            for name, weight in sorted(model.named_parameters()):
                noise = torch.from_numpy(draw.standard_normal(tuple(weight.shape), np.float32))
                if "norm" in name:
                    weight.copy_((0 if "gemma" in family else 1) + 0.3 * noise)
                elif name.endswith("bias"):
                    weight.copy_(0.3 * noise)
                else:
                    embedding = "embed_tokens" in name and not model.config.tie_word_embeddings
                    weight.copy_(noise if embedding else noise / weight.shape[-1] ** 0.5)
        return model.eval()

    @staticmethod
    def load(folder, **options):
        """Geometry and weights of a folder, as every command loads them."""
        from mtp_jax.model.base import open_base

        base = open_base(str(folder))
        return base.g, base.load(**options)


@pytest.fixture(scope="session")
def models():
    """Makes and loads random models."""
    return Models


@pytest.fixture(scope="session")
def small_tokenizer():
    """A byte-level tokenizer of 300 tokens."""
    from mtp_jax.data.tokenizer import train_tokenizer

    return train_tokenizer(
        ["the cat sat on the mat, and the dog lay by the door of a house; where is the hen? " * 4], 300
    )


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory, small_tokenizer):
    """The folder of a random Llama with tokenizer; its context is 64 tokens, and id 0 ends a text."""
    folder = tmp_path_factory.mktemp("small") / "model"
    Models.make("llama", vocab_size=300, bos_token_id=0, eos_token_id=0, pad_token_id=1).save_pretrained(folder)
    small_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def stories():
    """The folder of stories260k, a real model of 0.26M weights."""
    root = Path(os.environ.get("MTP_JAX_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    folder = root / "models" / "stories260k"
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder} is not there; MTP_JAX_SHARED names the folder that holds models/stories260k")
    return folder


@pytest.fixture
def jsonl(tmp_path, monkeypatch):
    """A function that writes records to a .jsonl file and returns a source of it; its cache goes with the test."""
    import datasets

    from mtp_jax.config import Source

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(rows, name="rows.jsonl", **keys):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return Source(kind="dataset", path=str(tmp_path / name), **keys)

    return write


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """A server with one empty bucket, `b`, which all paths gs:// lead to, also those of processes that are started."""
    pytest.importorskip("gcsfs", reason="gcsfs is not installed: pip install '.[gcs]'")
    from gcs_stand_in import Server

    from mtp_jax import storage

    with Server("b") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(storage, "CACHE", str(tmp_path / "copies"))
        storage.filesystem.cache_clear()
        yield server
    storage.filesystem.cache_clear()


@pytest.fixture
def tpu_compiler(monkeypatch):
    """The compiler for TPUs, which refuses flags of XLA that it does not know."""
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install '.[preflight]'")
    import jax

    from mtp_jax.fitting.chips import without_chip

    without_chip()
    jax.devices()  # reads the flags
    monkeypatch.delenv("XLA_FLAGS", raising=False)


@pytest.fixture(scope="session")
def pushed_repository(tmp_path_factory):
    """A clean, pushed repository with the launch scripts; not to be changed."""
    from fake_cloud import make_repository

    return make_repository(tmp_path_factory.mktemp("pushed"))


@pytest.fixture
def cloud(tmp_path, pushed_repository):
    """Runs launch scripts where gcloud and its like are fakes."""
    from fake_cloud import Cloud

    return Cloud(tmp_path, pushed_repository)
