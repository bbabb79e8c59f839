"""Every family from a checkpoint to text: trained, decoded losslessly, exported, and read again; and on meshes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import families
import jax
import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, environment, read_lines
from exported import noisy_adapter
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import mtp_jax
from mtp_jax.config_file import validate
from mtp_jax.decoding.plan import parse_plan
from mtp_jax.exporting.folder import write_export
from mtp_jax.exporting.source import find_source
from mtp_jax.model.base import open_base
from mtp_jax.mtp.adapter_folder import open_adapter
from mtp_jax.training.run import train

PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13, 14]]
NEW = 24
MESHES = [(2, 2, 2), (1, 4, 2)]
# Between them these have each part that is spread over devices in a way of its own.
QUICK = ("gemma3_text", "olmo2", "qwen3_moe")
EVERY = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in families.USUAL]


@pytest.fixture(scope="module")
def run_of(models, small_tokenizer, make_tree, tmp_path_factory):
    """A function from a family's name to its folder: `base`, the config of a run, and `run`; made once."""
    root, made = tmp_path_factory.mktemp("families"), {}

    def make(name):
        if name not in made:
            folder = made[name] = root / name
            model = models.make(name, vocab_size=300, bos_token_id=0, eos_token_id=0, **families.USUAL[name])
            model.save_pretrained(folder / "base")
            small_tokenizer.save_pretrained(folder / "base")
            tree = make_tree(folder / "run") | {
                "objective": "multi_token",
                "model": {"path": str(folder / "base"), "save_dtype": "float32"},
                "lora": {"rank": 4},
                "mtp": {"masks": 2, "target": "base_soft", "sampler": "residual"},
                "evaluation": {"every": 100},
                "checkpoints": {"every": 100},
            }
            tree["train"] = tree["train"] | {"steps": 3, "batch_size": 8, "anchors": 6, "learning_rate": 2e-2}
            (folder / "config.yaml").write_text(yaml.safe_dump(tree))
            train(validate(tree, name))
        return made[name]

    return make


def greedy(folder, prompt):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", EVERY)
def test_trained_decoded_exported_and_read_again(name, run_of):
    folder = run_of(name)
    losses = [line["loss"] for line in read_lines(folder / "run" / "metrics.jsonl") if "loss" in line]
    assert len(losses) == 3 and losses[-1] < losses[0]

    base, adapter = str(folder / "base"), str(folder / "run" / "adapter")
    want = [greedy(base, prompt) for prompt in PROMPTS]
    for plan in ("none", "linear:2", "quadratic:2"):
        generator = mtp_jax.load(base, adapter=adapter, plan=parse_plan(plan), dtype="float32")
        generator.stops = ()
        assert [done.token_ids for done in generator.complete(PROMPTS, NEW, 2)] == want, plan

    write_export(find_source(None, adapter, base), folder / "out", base="copy")
    first, again = (open_adapter(where, open_base(base)).arrays for where in (adapter, str(folder / "out")))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    model = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32)
    options = {"custom_generate": str(folder / "out"), "trust_remote_code": True, "eos_token_id": None}
    for prompt, text in zip(PROMPTS, want, strict=True):
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, **options)
        assert ids[0, len(prompt) :].tolist() == text


@pytest.fixture(scope="module")
def several_modalities(tmp_path_factory, small_tokenizer):
    """A tiny Gemma 3 that reads images too."""
    folder = tmp_path_factory.mktemp("gemma3") / "base"
    text = {**TINY, **families.GEMMA3, "vocab_size": 300, "num_hidden_layers": 2}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, weight.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    small_tokenizer.save_pretrained(folder)
    return folder


def test_the_text_part_of_several_modalities(several_modalities, tmp_path):
    base = str(several_modalities)
    want = [greedy(base, prompt) for prompt in PROMPTS]
    noisy_adapter(base, tmp_path / "adapter", 2)
    generator = mtp_jax.load(base, adapter=str(tmp_path / "adapter"), plan=parse_plan("quadratic:2"), dtype="float32")
    generator.stops = ()
    assert [done.token_ids for done in generator.complete(PROMPTS, NEW, 2)] == want
    write_export(find_source(None, str(tmp_path / "adapter"), base), tmp_path / "out", base="copy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    options = {"custom_generate": str(tmp_path / "out"), "trust_remote_code": True, "eos_token_id": None}
    ids = model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=NEW, do_sample=False, **options)
    assert ids[0, len(PROMPTS[0]) :].tolist() == want[0]


def test_the_text_part_has_two_spellings(several_modalities, tmp_path):
    shutil.copytree(several_modalities, tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    tensors = load_file(file)
    assert all(key.startswith(("language_model.model.", "vision_tower.", "multi_modal_projector.")) for key in tensors)
    other = {key.replace("language_model.model.", "model.language_model."): x for key, x in tensors.items()}
    save_file(other, file, metadata={"format": "pt"})
    first, second = (open_base(str(folder)).load() for folder in (several_modalities, tmp_path / "other"))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, second))


def on_meshes(folders):
    """What families_on_meshes.py prints of these folders."""
    script, configs = Path(__file__).with_name("families_on_meshes.py"), [folder / "config.yaml" for folder in folders]
    command = [sys.executable, script, json.dumps(MESHES), json.dumps(PROMPTS), *configs]
    ended = subprocess.run(command, env=environment(8), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("names", [QUICK, pytest.param(tuple(families.USUAL), marks=pytest.mark.slow)], ids=str)
def test_meshes_change_no_loss_and_no_token(names, run_of):
    folders = [run_of(name) for name in names]
    found = on_meshes(folders)
    for name, folder in zip(names, folders, strict=True):
        losses = [line["loss"] for line in read_lines(folder / "run" / "metrics.jsonl") if "loss" in line]
        for mesh, theirs in found[name]["losses"].items():
            np.testing.assert_allclose(theirs, losses, rtol=2e-5, err_msg=f"{name} on {mesh}")
        assert [len(text) for text in found[name]["texts"]] == [12, 12]
        want = [greedy(folder / "base", prompt)[:12] for prompt in PROMPTS]
        assert found[name]["texts"] == want, name


IN_ROOM = """
import jax, jax.numpy as jnp, numpy as np
from mtp_jax import sharding
from mtp_jax.config import Mesh
from mtp_jax.model import experts
from mtp_jax.model.geometry import Geometry

g = Geometry.from_config({"model_type": "mixtral", "vocab_size": 9, "hidden_size": 16, "intermediate_size": 12,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "num_local_experts": 8, "num_experts_per_tok": 2})
draw = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(draw.standard_normal(shape) * 0.4, jnp.float32)
weights = {"router": {"kernel": normal(16, 8)}, "experts": {"gate": normal(8, 16, 12), "up": normal(8, 16, 12),
    "down": normal(8, 12, 16)}}

def loss(x, w, even):
    w = w if even else {**w, "router": {"kernel": w["router"]["kernel"].at[:, 2:].add(-9 * jnp.sign(x[0, :1].T))}}
    return jnp.sum(jnp.sin(experts.Mixture(g).apply({"params": w}, x)))

grad = jax.value_and_grad(loss, (0, 1))
experts._FEW = 8
for even in (True, False):
    x = normal(8, 20, 16) if even else jnp.broadcast_to(normal(1, 1, 16), (8, 20, 16))
    want = jax.jit(grad, static_argnums=2)(x, weights, even)
    with sharding.on(sharding.make_mesh(Mesh(data=1, fsdp=4, tensor=2))):
        found = jax.jit(lambda x, w: grad(x, w, even))(x, weights)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert np.abs(a - b).max() < 1e-4 * max(1, np.abs(b).max()), even
print("equal")
"""


def test_room_for_the_rows_of_a_devices_experts_changes_nothing():
    """Rows that choose experts alike, and rows that all choose the same two, for which there is no room."""
    ended = subprocess.run(
        [sys.executable, "-c", IN_ROOM], env=environment(8), capture_output=True, text=True, check=False
    )
    assert ended.stdout.strip() == "equal", ended.stderr[-3000:]
