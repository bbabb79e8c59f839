"""Every experiment of configs/ is a right config and says what it is."""

from pathlib import Path

import pytest

from mtp_jax.config_file import load_config

pytestmark = pytest.mark.quick

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: file.name)
def test_a_config_loads_and_begins_with_what_it_is(file):
    assert load_config(str(file), []).output_dir == f"runs/{file.stem}"
    assert file.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("name", ["paper_tulu3_8b", "tulu3_8b"])
def test_the_runs_of_8b_have_the_papers_shape(name):
    c = load_config(str(CONFIGS / f"{name}.yaml"), [])
    assert (c.lora.rank, c.lora.alpha, c.lora.gated, len(c.lora.targets), c.mtp.masks) == (128, 256, True, 7, 8)
    t = c.train
    assert (t.steps, t.batch_size, t.learning_rate, t.warmup_steps, t.schedule) == (50_000, 8, 2e-4, 5_000, "flat")
    paper = name.startswith("paper")
    losses = (c.mtp.target, c.mtp.sampler, c.mtp.sampler_on_real, c.mtp.weights.lcm, c.train.anchors)
    assert losses == (("data", "paper", True, 1, "all") if paper else ("base_soft", "residual", False, 1, 256))
