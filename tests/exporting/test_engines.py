"""Folders for inference engines: what their loaders ask for, what an engine would compute with them, and refusals."""

import json
import os
from pathlib import Path

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from engine_rules import broken
from exported import export, noisy_adapter
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from two_pass import Engine

from mtp_jax.decoding.forward import XlaForward
from mtp_jax.errors import UserError
from mtp_jax.exporting.engines import check_engine
from mtp_jax.exporting.source import find_source
from mtp_jax.locate import find_folder
from mtp_jax.model.attention import empty_cache
from mtp_jax.model.base import open_base
from mtp_jax.model.decoder import Decoder
from mtp_jax.model.step_rows import MaskRows
from mtp_jax.model.weights import PROJECTIONS, unstack_layers
from mtp_jax.mtp.adapter_folder import open_adapter
from mtp_jax.mtp.blocks import Noise
from mtp_jax.mtp.sampler import corrected_latent

M, V = 3, 96
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
}
ENGINES = ("sglang", "vllm")


@pytest.fixture(scope="module")
def bases(models, tmp_path_factory):
    """A function: the folder of a random base of a family."""
    made = {}

    def base(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            kind, changes = ("mistral", {"sliding_window": 5}) if family == "windowed" else (family, FAMILIES[family])
            models.make(kind, num_hidden_layers=2, vocab_size=V, **changes).save_pretrained(made[family])
        return made[family]

    return base


def engine_folder(base, where, engine="sglang", model=None, **adapter):
    """An adapter of noise rows for a base, exported."""
    noisy_adapter(base, where / "adapter", M, sampler="none", rows=Noise(0, open_base(str(base)).g.V), **adapter)
    check_engine(find_source(None, str(where / "adapter"), model), engine)
    return export(where / "adapter", where / engine, model, engine=engine)


# ---- what loaders ask for


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_breaks_no_rule_and_is_read_back_bit_for_bit(bases, tmp_path, family, engine):
    base = bases(family)
    folder = engine_folder(base, tmp_path, engine)
    assert broken(folder, base, engine) == []
    opened = open_base(str(base))
    before, after = (open_adapter(str(tmp_path / name), opened) for name in ("adapter", engine))
    assert before.shape == after.shape and before.dtype == after.dtype
    assert jax.tree.structure(before.arrays) == jax.tree.structure(after.arrays)
    assert all(map(np.array_equal, jax.tree.leaves(before.arrays), jax.tree.leaves(after.arrays)))
    assert export(folder, tmp_path / "again", str(base), engine=engine).is_dir()
    for file in ("adapter_model.safetensors", "adapter_config.json", "uno.json"):
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def change_config(**values):
    def change(folder):
        file = folder / "adapter_config.json"
        config = json.loads(file.read_text()) | values
        file.write_text(json.dumps({key: value for key, value in config.items() if value != "gone"}))

    return change


def change_tensors(change):
    def changed(folder):
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return changed


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BREAKS = {
    "no rank": (change_config(r="gone"), "r is missing", ENGINES),
    "another kind": (change_config(peft_type="LOHA"), "peft_type", ENGINES),
    "a pattern": (change_config(rank_pattern={"q_proj": 2}), "one rank for all modules", ENGINES),
    "dora": (change_config(use_dora=True), "use_dora", ENGINES),
    "rslora": (change_config(use_rslora=True), "use_rslora", ("sglang",)),
    "saved modules": (change_config(modules_to_save=["lm_head"]), "modules_to_save", ("vllm",)),
    "biases": (change_config(bias="all"), "bias", ("vllm",)),
    "a prefix": (change_tensors(lambda t: t.update({"x." + FIRST: t.pop(FIRST)})), "matches no module: x.", ENGINES),
    "a tensor more": (change_tensors(lambda t: t.update({"mtp.masks": t[FIRST]})), "matches no module: mtp.", ENGINES),
    "half a pair": (change_tensors(lambda t: t.pop(FIRST)), "half a pair", ENGINES),
    "a shape": (change_tensors(lambda t: t.update({FIRST: t[FIRST].T.copy()})), "shape of", ENGINES),
    "infinity": (change_tensors(lambda t: t.update({FIRST: t[FIRST] + np.inf})), "numbers of", ENGINES),
    "other weights": (lambda folder: (folder / "more.bin").write_bytes(b""), "weight files", ENGINES),
    "tokens": (lambda folder: (folder / "added_tokens.json").write_text('{"<m>": 96}'), "added tokens", ENGINES),
    "q without v": (change_config(target_modules=["q_proj", "o_proj"]), "q_proj needs v_proj", ("sglang",)),
    "up without gate": (change_config(target_modules=["up_proj"]), "up_proj needs gate_proj", ("sglang",)),
}


@pytest.mark.parametrize("what", BREAKS)
def test_each_rule_is_seen_to_be_broken(bases, tmp_path, what):
    change, says, engines = BREAKS[what]
    for engine in engines:
        folder = engine_folder(bases("llama"), tmp_path / engine, engine)
        change(folder)
        assert any(fault.startswith(says) for fault in broken(folder, bases("llama"), engine))


def test_windows_and_ranks_of_vllm(bases, tmp_path):
    folder = engine_folder(bases("mistral"), tmp_path, "vllm")
    change_config(r=513)(folder)
    assert "rank above --max-lora-rank" in broken(folder, bases("mistral"), "vllm")
    folder = engine_folder(bases("windowed"), tmp_path / "windowed", "sglang")
    assert broken(folder, bases("windowed"), "sglang") == []
    assert broken(folder, bases("windowed"), "vllm") == ["sliding windows"]


REFUSED = [
    ("sglang", {"rows": None, "sampler": "residual"}, ["learned embeddings", "a sampler head (residual)"]),
    ("vllm", {"rows": None, "sampler": "none"}, ["learned embeddings"]),
    ("sglang", {"targets": ("q", "o")}, ["needs LoRA on q and v"]),
    ("sglang", {"targets": ("v", "k")}, ["needs LoRA on q and v"]),
    ("sglang", {"targets": ("up", "down")}, ["needs LoRA on gate"]),
    ("sglang", {"rows": Noise(1, 2)}, [f"draws noise from all {V} tokens"]),
    ("vllm", {"rows": Noise(2, V)}, ["begins at token 1"]),
    ("peft-mtp", {}, ["and this adapter's noise", "sampler head is the residual one"]),
    ("peft-mtp", {"rows": None, "sampler": "paper"}, ["the residual one, not paper"]),
    ("peft-mtp", {"rows": None, "sampler": "residual", "vocabulary": range(9)}, ["from a draft vocabulary"]),
    ("peft-mtp", {"rows": None, "sampler": "residual", "gated": False}, ["without its gate"]),
]


@pytest.mark.parametrize(("engine", "adapter", "says"), REFUSED)
def test_what_an_engine_cannot_serve_is_refused_by_name(small_folder, bases, tmp_path, engine, adapter, says):
    base = small_folder if engine == "peft-mtp" else bases("llama")
    noisy_adapter(base, tmp_path / "adapter", M, **{"sampler": "none", "rows": Noise(0, V)} | adapter)
    with pytest.raises(UserError) as caught:
        check_engine(find_source(None, str(tmp_path / "adapter"), None), engine)
    assert len(caught.value.faults) == len(says)
    for fault, part in zip(caught.value.faults, says, strict=True):
        assert fault.startswith(f"--engine {engine}: ") and part in fault and ";" in fault


def test_windows_are_refused_for_vllm(bases, tmp_path):
    noisy_adapter(bases("windowed"), tmp_path / "adapter", M, sampler="none", rows=Noise(0, V))
    with pytest.raises(UserError, match="sliding windows are refused there; serve it with --engine sglang"):
        check_engine(find_source(None, str(tmp_path / "adapter"), None), "vllm")


def test_other_families_are_served_by_transformers(models, command, small_tokenizer, tmp_path):
    models.make("phi3", vocab_size=V, **families.PHI3).save_pretrained(tmp_path / "base")
    small_tokenizer.save_pretrained(tmp_path / "base")
    noisy_adapter(tmp_path / "base", tmp_path / "adapter", M, sampler="none", rows=Noise(0, V))
    for engine in ENGINES:
        with pytest.raises(UserError, match=r"those of this model \(phi3\) differ; serve it with transformers"):
            check_engine(find_source(None, str(tmp_path / "adapter"), None), engine)
    done = command("export", "--adapter", tmp_path / "adapter", "--peft", "--out", tmp_path / "out")
    assert done.code == 2 and len(done.errors) == 1 and "phi3 stores q, k and v as one matrix" in done.errors[0]


def test_the_command_says_how_to_serve_and_mixes_with_no_other_form(command, small_folder, tmp_path):
    vocabulary = open_base(str(small_folder)).g.V
    noisy_adapter(small_folder, tmp_path / "adapter", M, sampler="none", rows=Noise(0, vocabulary))
    for engine in ENGINES:
        out = tmp_path / engine
        done = command("export", "--adapter", tmp_path / "adapter", "--engine", engine, "--out", out)
        assert done.code == 0 and f"exported: {out}" in done.out, done
        card = (out / "README.md").read_text()
        assert ("sglang.launch_server" in card) == (engine == "sglang") and "Do not merge it" in card
        tokens = "--speculative-num-draft-tokens 4" if engine == "sglang" else '"num_speculative_tokens":4'
        assert tokens in card and (engine == "sglang" or f'"uno_mask_token_id":{vocabulary}' in card)
        ended = command(
            "generate", "--model", small_folder, "--adapter", out, "--plan", "quadratic:2", "--prompt", "the cat"
        )
        assert ended.code == 0, ended
    for option in (["--peft"], ["--base", "copy"], ["--prompts", "x.jsonl"]):
        wrong = ["--adapter", tmp_path / "adapter", "--engine", "vllm", "--out", tmp_path / "other", *option]
        done = command("export", *wrong)
        assert done.code == 2 and len(done.errors) == 1 and "--engine writes the LoRA alone" in done.errors[0]
    assert not (tmp_path / "other").exists()


def test_a_damaged_folder_is_told(small_folder, tmp_path):
    folder, opened = engine_folder(small_folder, tmp_path), open_base(str(small_folder))
    change_tensors(lambda t: t.pop(FIRST))(folder)
    with pytest.raises(UserError, match=f"{FIRST} is missing"):
        open_adapter(str(folder), opened)
    change_tensors(lambda t: t.update({FIRST: np.zeros((2, 2), np.float32)}))(folder)
    with pytest.raises(UserError, match=r"lora\.layers\.q\.a differs in shape between layers"):
        open_adapter(str(folder), opened)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing"):
        open_adapter(str(folder), opened)


# ---- what an engine computes


def noise_at(V, seed=0):
    """Ids of noise rows behind a position, the same whoever asks."""
    return lambda position: np.random.default_rng([seed, position]).integers(0, V, M).tolist()


def our_drafts(base, folder, text, cycles):
    """What our forward pass drafts behind every seed of a text, all blocks at once, on the same noise."""
    opened = open_base(str(base))
    adapter = open_adapter(str(folder), opened)
    forward = XlaForward(Decoder(opened.g, scanned=False), adapter.shape)
    with jax.default_matmul_precision("highest"):
        variables = forward.prepare(
            unstack_layers(opened.load(jnp.dtype("float32"))), jax.tree.map(jnp.asarray, adapter.arrays)
        )
        ids = jnp.asarray([cycle.noise for cycle in cycles]).reshape(1, -1)
        offsets = np.tile(np.arange(1, M + 1), len(cycles))
        anchors = jnp.asarray(np.repeat([cycle.position for cycle in cycles], M))[None]
        rows = MaskRows(forward.embedded(variables, ids), anchors, offsets, np.repeat(np.arange(len(cycles)), M))
        cache = empty_cache(opened.g, 1, len(text), jnp.float32, stacked=False)
        _, latents, _ = forward.rows(variables, jnp.asarray([text]), jnp.zeros(1, jnp.int32), cache, rows, True)
        scores = np.asarray(forward.logits(variables, latents))[0]
    return scores.reshape(len(cycles), M, -1)


def check(base, folder, prompts, new):
    """Text of two-pass decoding is the base's own, and its drafts are ours; returns cycles and drafts that agree."""
    engine, plain = Engine(base, folder), AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    noise, accepted = noise_at(open_base(str(base)).g.V), []
    for prompt in prompts:
        text, cycles = engine.decode(prompt, new, M + 1, noise)
        with torch.no_grad():
            greedy = plain.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
                max_new_tokens=new, eos_token_id=None, pad_token_id=0,
            )[0, len(prompt) :].tolist()  # fmt: skip
        assert text == greedy
        whole = prompt + text
        inside = [cycle for cycle in cycles if cycle.position + 1 < len(whole)]
        scores = our_drafts(base, folder, whole, inside)
        for cycle, of in zip(inside, scores, strict=True):
            for draft, row in zip(cycle.drafts, of, strict=True):
                assert row[draft] > row.max() - 1e-4  # the same choice, or a tie
            accepted.append(len(cycle.emitted) - 2)
    return accepted


@pytest.mark.parametrize("F", [1, 2, M + 1])
def test_two_passes_write_the_bases_own_text_with_any_number_of_rows(small_folder, tmp_path, F):
    folder = engine_folder(small_folder, tmp_path)
    engine = Engine(small_folder, folder)
    prompt = list(range(5, 17))
    plain, _ = engine.decode(prompt, 24, 1, noise_at(300))
    text, cycles = engine.decode(prompt, 24, F, noise_at(300))
    assert text == plain and all(len(cycle.drafts) == F - 1 for cycle in cycles)
    assert all(2 <= len(cycle.emitted) <= F + 1 for cycle in cycles)


@pytest.mark.parametrize("family", ["bundled:stdlib-5m", *FAMILIES])
def test_drafts_of_the_exported_folder_are_ours_and_text_is_the_bases(bases, tmp_path, family):
    base = find_folder(family) if family.startswith("bundled") else bases(family)
    folder = engine_folder(base, tmp_path, model=str(base))
    prompts = [np.random.default_rng(i).integers(3, V, 7 + i).tolist() for i in range(2)]
    assert len(check(base, folder, prompts, 20)) > 4


def test_a_seeds_keys_and_values_do_not_depend_on_the_lora(small_folder, tmp_path):
    prompt, kept = list(range(5, 17)), []
    for scale in (1.0, 3.0):
        folder = engine_folder(small_folder, tmp_path / str(scale))
        change_tensors(lambda t, scale=scale: t.update({k: scale * v for k, v in t.items()}))(folder)
        _, cycles = Engine(small_folder, folder).decode(prompt, 6, M + 1, noise_at(300))
        kept.append(cycles[0])
    assert kept[0].drafts != kept[1].drafts  # the noise rows do meet it
    for one, other in zip(kept[0].kept, kept[1].kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count", "new"), [("trio-17m", 20, 48), ("smollm2-135m", 5, 32)])
def test_real_models(name, count, new, tmp_path):
    shared = Path(os.environ.get("MTP_JAX_SHARED") or Path(__file__).resolve().parents[3] / "shared") / "models" / name
    base = Path(os.environ.get("MTP_JAX_SMOLLM2", "")) if name == "smollm2-135m" else shared
    if not (base / "config.json").is_file():
        hint = "MTP_JAX_SMOLLM2 names what benchmarks/smollm2.py made" if name == "smollm2-135m" else str(shared)
        pytest.skip(f"{name} is not there: {hint}")
    folder = engine_folder(base, tmp_path)
    # Near the identity, so that some drafts are accepted.
    change_tensors(lambda t: t.update({k: 0.1 * v for k, v in t.items() if ".lora_B." in k}))(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [f"Question {i}: what is {i} plus {3 * i}?" for i in range(count)]
    accepted = check(base, folder, [tokenizer(text)["input_ids"] for text in texts], new)
    assert len(accepted) > 2 * count and sum(accepted)


# ---- PEFT's proposal


def test_the_proposals_folder_holds_masks_sampler_and_tokenizer(command, small_folder, tmp_path):
    shape, arrays = noisy_adapter(small_folder, tmp_path / "adapter", M)
    out = tmp_path / "out"
    done = command("export", "--adapter", tmp_path / "adapter", "--engine", "peft-mtp", "--out", out)
    assert done.code == 0, done
    assert "not merged and may change" in (out / "README.md").read_text()
    config, tensors = (
        json.loads((out / "adapter_config.json").read_text()),
        load_file(out / "adapter_model.safetensors"),
    )
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer.convert_tokens_to_ids(["<mask_1>", "<mask_2>", "<mask_3>"])
    assert config["alora_invocation_tokens"] == config["trainable_token_indices"] == ids
    assert ids == list(range(len(tokenizer) - M, len(tokenizer))) and config["use_rslora"] is False
    assert tokenizer("<mask_1><mask_2><mask_3>", add_special_tokens=False)["input_ids"] == ids
    delta = tensors.pop("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta")
    assert np.array_equal(delta, arrays["mtp"]["masks"])
    assert len(tensors) == 2 * len(PROJECTIONS) * open_base(str(small_folder)).g.L

    # As the proposal's module computes it: a sequence, and what went in added.
    held = {name: torch.from_numpy(value) for name, value in load_file(out / "sampler_model.safetensors").items()}
    D = delta.shape[1]
    mlp = torch.nn.Sequential(
        torch.nn.Linear(2 * D, D), torch.nn.SiLU(), torch.nn.LayerNorm(D),
        torch.nn.Linear(D, D), torch.nn.SiLU(), torch.nn.LayerNorm(D),
    )  # fmt: skip
    mlp.load_state_dict({name.removeprefix("sampler.mlp."): value for name, value in held.items()})
    previous, z = np.random.default_rng(0).normal(size=(2, 5, D)).astype(np.float32)
    with torch.no_grad():
        theirs = z + mlp(torch.from_numpy(np.concatenate([previous, z], axis=-1))).numpy()
    with jax.default_matmul_precision("highest"):
        sampler = jax.tree.map(jnp.asarray, arrays["mtp"]["sampler"])
        ours = corrected_latent(sampler, shape.sampler, jnp.asarray(previous), jnp.asarray(z))
    assert np.allclose(ours, theirs, atol=1e-4)
