"""`python -m mtp_jax.generate`: what it prints, and how it refuses."""

import json
import shutil

import pytest
from kinds import KINDS

import mtp_jax
from mtp_jax.decoding.generator import Completion
from mtp_jax.decoding.plan import plain as plan
from mtp_jax.decoding.plan import quadratic
from mtp_jax.decoding.show import comparison

PROMPTS = ["the cat", "the dog sat by", "on the mat"]


@pytest.fixture
def file(tmp_path):
    """A function that writes lines into a prompts file."""

    def write(*lines):
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


def refused(outcome, *faults):
    """Exit code 2, nothing on stdout, and one line on stderr for each fault, which holds the words given for it."""
    assert outcome.code == 2, outcome
    assert outcome.out == "" and "Traceback" not in outcome.err
    lines = outcome.err.splitlines()
    assert len(lines) == len(faults) and all(line.startswith("error: ") for line in lines), outcome
    for line, words in zip(lines, faults, strict=True):
        assert all(word in line for word in words), line


def test_json_holds_text_tokens_steps_and_seconds(command, file, small_folder):
    path = file(*[json.dumps({"prompt": prompt}) for prompt in PROMPTS], "")
    outcome = command(
        "generate", "--model", small_folder, "--prompts", path, "--max-new-tokens", 6, "--batch-size", 2, "--json"
    )
    assert outcome.code == 0, outcome
    records = [json.loads(line) for line in outcome.out.splitlines()]
    generator = mtp_jax.load(str(small_folder))
    for record, prompt in zip(records, PROMPTS, strict=True):
        assert record.keys() == {"text", "token_ids", "new_tokens", "finish_reason", "steps", "seconds", "accepted"}
        (alone,) = generator([prompt], 6)
        assert record["token_ids"] == alone.token_ids and record["text"] == generator.text(alone)
        assert (record["new_tokens"], record["steps"]) == (len(alone.token_ids), len(alone.token_ids) - 1)
        assert record["seconds"] > 0


def test_prompt_text_and_speed_are_printed(command, small_folder):
    outcome = command("generate", "--model", small_folder, "--prompt", "the [bold]cat[/]", "--max-new-tokens", 4)
    generator = mtp_jax.load(str(small_folder))
    assert outcome.code == 0, outcome
    assert outcome.out.startswith("the [bold]cat[/]" + generator.text(generator(["the [bold]cat[/]"], 4)[0]))
    assert "tokens/s]" in outcome.out


def test_text_continues_the_prompt_where_decoding_strips_a_space(command, file, models, tmp_path):
    tokenizer = KINDS["word_pieces"]()
    models.make("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    def text(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    path = file(*[json.dumps({"prompt": prompt}) for prompt in PROMPTS])
    how = ("--model", tmp_path, "--prompts", path, "--max-new-tokens", 12)
    records = [json.loads(line) for line in command("generate", *how, "--json").out.splitlines()]
    encoded = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    wholes = [text(ids + record["token_ids"]) for ids, record in zip(encoded, records, strict=True)]
    assert wholes == [text(ids) + record["text"] for ids, record in zip(encoded, records, strict=True)]
    assert any(record["text"] != text(record["token_ids"]) for record in records)  # decoded alone: without the space
    for more in ((), ("--stream",), ("--batch-size", 3)):
        out = command("generate", *how, *more).out
        assert all(f"{whole}\n" in out for whole in wholes)


def test_chat_messages_go_through_the_chat_template(command, file, small_folder, small_tokenizer, tmp_path):
    folder = shutil.copytree(small_folder, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}cat:")
    path = file(json.dumps({"messages": [{"role": "user", "content": "where is the mat?"}]}))
    outcome = command("generate", "--model", folder, "--prompts", path, "--max-new-tokens", 5, "--json")
    ids = small_tokenizer("user: where is the mat? cat:", add_special_tokens=False)["input_ids"]
    (alone,) = mtp_jax.load(str(small_folder)).complete([ids], 5, 1)
    assert json.loads(outcome.out)["token_ids"] == alone.token_ids


def test_unusual_line_separators_do_not_break_a_line(command, file, small_folder):
    path = file(json.dumps({"prompt": "the\u2028cat\u0085sat"}, ensure_ascii=False))
    outcome = command("generate", "--model", small_folder, "--prompts", path, "--max-new-tokens", 2, "--json")
    assert outcome.code == 0 and len(outcome.out.splitlines()) == 1, outcome


def test_broken_lines_are_named_by_number(command, file, small_folder):
    path = file('{"prompt": "a"}', "", "{broken", '{"text": "a"}', '{"messages": [{"role": "user"}]}', "7")
    refused(
        command("generate", "--model", small_folder, "--prompts", path),
        [f"{path}, line 3"],
        [f"{path}, line 4", "'prompt'"],
        [f"{path}, line 5", "without content"],
        [f"{path}, line 6"],
    )


def test_prompts_file_that_cannot_be_read_is_refused(command, file, small_folder, tmp_path):
    refused(command("generate", "--model", small_folder, "--prompts", tmp_path / "none"), ["none", "No such file"])
    refused(command("generate", "--model", small_folder, "--prompts", file("")), ["holds no prompts"])
    (tmp_path / "latin").write_bytes(b'{"prompt": "\xe9"}')
    refused(
        command("generate", "--model", small_folder, "--prompts", tmp_path / "latin"), ["latin, line 1", "not UTF-8"]
    )


def test_prompts_that_do_not_fit_are_refused(command, file, small_folder):
    refused(command("generate", "--model", small_folder, "--prompt", ""), ["--prompt", "is empty"])
    refused(command("generate", "--model", small_folder, "--prompt", "q" * 90), ["--prompt", "context of 64"])
    path = file('{"prompt": "a"}', json.dumps({"prompt": "q" * 90}))
    refused(command("generate", "--model", small_folder, "--prompts", path), ["prompt 2", "context of 64"])
    path = file('{"messages": [{"role": "user", "content": "a"}]}')
    refused(command("generate", "--model", small_folder, "--prompts", path), ["prompt 1", "no chat template"])


def test_numbers_below_one_are_refused_together(command, small_folder):
    outcome = command("generate", "--model", small_folder, "--prompt", "a", "--max-new-tokens", 0, "--batch-size", -1)
    refused(outcome, ["--max-new-tokens 0", "at least 1"], ["--batch-size -1", "at least 1"])


def test_models_that_are_none_are_refused(command, small_folder, tmp_path):
    refused(command("generate", "--model", tmp_path / "none", "--prompt", "a"), ["none: no such folder"])
    refused(command("generate", "--model", "bundled:nonsense", "--prompt", "a"), ["bundled:nonsense"])
    refused(command("generate", "--model", small_folder / "config.json", "--prompt", "a"), ["this is a file"])
    folder = shutil.copytree(small_folder, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    refused(command("generate", "--model", folder, "--prompt", "a"), ["no tokenizer"])


def test_process_prints_json_and_ends_with_0(start, finish, small_folder):
    outcome = finish(start("generate", "--model", small_folder, "--prompt", "the", "--max-new-tokens", "3", "--json"))
    assert outcome.code == 0, outcome
    assert json.loads(outcome.out)["new_tokens"] == 3


def test_process_refuses_with_2_and_one_line(start, finish, tmp_path):
    refused(finish(start("generate", "--model", tmp_path / "none", "--prompt", "a")), ["no such folder"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--plan", "cubic:2"], ["cubic:2", "unknown plan"]),
        (["--plan", "blocks:0,2,2"], ["never draft again"]),
        (["--plan", "quadratic:2"], ["takes 2 masks", "no adapter"]),
        (["--plan", "auto"], ["--plan auto", "--adapter"]),
        (["--temperature", "-1"], ["--temperature -1.0", "at least 0"]),
        (["--top-p", "0.5"], ["--temperature too"]),
        (["--temperature", "1", "--top-p", "1.5"], ["top-p 1.5"]),
        (["--stream", "--json"], ["--stream"]),
        (["--shortlist", "-2"], ["--shortlist -2"]),
    ],
)
def test_options_that_do_not_do_are_refused(command, small_folder, arguments, says):
    refused(command("generate", "--model", small_folder, "--prompt", "the", *arguments), says)


def test_sampling_repeats_with_its_seed(command, small_folder):
    arguments = ["generate", "--model", small_folder, "--prompt", "the", "--max-new-tokens", 12, "--json"]
    texts = [
        json.loads(command(*arguments, "--temperature", "1", "--seed", seed).out)["token_ids"] for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_streamed_text_is_the_text(command, small_folder):
    arguments = ["generate", "--model", small_folder, "--prompt", "the cat", "--max-new-tokens", 20]
    plain, streamed = command(*arguments), command(*arguments, "--stream")
    assert streamed.code == 0, streamed
    assert streamed.out.rsplit("[", 1)[0] == plain.out.rsplit("[", 1)[0]


def test_comparison_says_what_was_gained(command, small_folder):
    outcome = command("generate", "--model", small_folder, "--prompt", "the cat", "--max-new-tokens", 9, "--compare")
    assert "output: identical for 1 of 1 prompts" in outcome.out and "passes saved: 0%" in outcome.out, outcome
    assert outcome.out.count("8 passes, 1.00 tokens per pass") == 2 and "Why slower" not in outcome.out


def test_a_comparison_explains_where_drafts_do_not_pay_off():
    plain = [Completion([1] * 9, [], 8, [8], 0.0, 8.0), Completion([2] * 9, [], 8, [8], 0.0, 8.0)]
    drafted = [Completion([1] * 9, [], 4, [0, 4], 0.0, 12.0), Completion([3] * 9, [], 4, [0, 4], 0.0, 12.0)]
    lines = comparison(drafted, plain, 1, quadratic(1), sampled=False)
    assert "16 passes, 1.00 tokens per pass" in lines[0] and "8 passes, 2.00 tokens per pass" in lines[1]
    assert lines[2:5] == [
        "passes saved: 50%",
        "output: identical for 1 of 2 prompts",
        "wall-clock: 0.67x of decoding without drafts",
    ]
    assert "a pass of 4 rows takes 3.0 times as long" in lines[5] and "2.0 times as many passes" in lines[5]
    done = [Completion([7], [0], 0, [0, 0], 0.1, 0.1)]  # by prefill alone
    assert "passes saved: 0%" in comparison(done, done, 1, quadratic(1), sampled=False)
    assert "another draw" in comparison(drafted, plain, 2, quadratic(1), sampled=True)[3]
    assert len(comparison(plain, plain, 1, plan(), sampled=False)) == 5


def test_a_conversation_goes_on_with_what_was_said(command, small_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(small_folder, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}cat:")
    lines = iter(["hi", "so", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    outcome = command("generate", "--model", folder, "--chat", "--max-new-tokens", 3)
    assert outcome.code == 0 and outcome.out.count("[none: 3 tokens") == 2, outcome
    monkeypatch.setattr("builtins.input", lambda prompt="": next(iter([])))
    refused(command("generate", "--model", small_folder, "--chat"), ["no chat template"])
