"""A run survives what happens to spot slices, and babysitting ends by itself, whatever happens."""

import pytest

WORDS = (
    *("--name", "n", "--accelerator-type", "v5litepod-16", "--zone", "us-central1-a", "--project", "p", "--run", "r"),
    *("--store", "gs://b/f", "--config", "configs/quickstart.yaml", "--poll", "0"),
)


def made_of(outcome, *words):
    """The calls that hold all words."""
    return [call for call in outcome.calls if all(any(word in part for part in call) for word in words)]


def trained(outcome):
    """The commands by which training was started."""
    return [part for call in made_of(outcome, "worker.sh train ") for part in call if part.startswith("--command=")]


@pytest.mark.parametrize("queued", [False, True])
def test_five_preemptions_and_a_failed_creation_are_survived_with_one_run_id(cloud, queued):
    cloud.says("create", "", "capacity", "quota")
    cloud.says("status", *(["absent", "running", "preempted"] * 5), "absent", "running", "done")
    outcome = cloud.run("tpu_babysit.sh", *WORDS, "--spot", *(["--queued"] if queued else []))
    assert outcome.code == 0, outcome
    creations = made_of(outcome, "compute", "tpus", "create")
    assert len(creations) == 8 and all("--labels=mtp_jax_babysit=r" in call and "--spot" in call for call in creations)
    assert len(trained(outcome)) == 6 and len(set(trained(outcome))) == 1
    assert "output_dir=gs://b/f/r" in trained(outcome)[0]
    assert len(made_of(outcome, "tpus", "delete")) == 6 and cloud.slice is None
    assert "run r is done" in outcome.err


def test_a_slice_of_somebody_else_is_used_and_never_deleted(cloud):
    cloud.has("READY", owner="")
    cloud.says("status", "absent", "done")
    outcome = cloud.run("tpu_babysit.sh", *WORDS)
    assert outcome.code == 0 and cloud.slice.startswith("READY")
    assert not made_of(outcome, "tpus", "delete") and not made_of(outcome, "tpus", "create")
    assert "is left alone" in outcome.err


def test_a_preempted_slice_of_somebody_else_ends_it(cloud):
    cloud.has("PREEMPTED", owner="another-run")
    outcome = cloud.run("tpu_babysit.sh", *WORDS)
    assert outcome.code == 1 and "was not created by this script" in outcome.err
    assert not made_of(outcome, "tpus", "delete") and cloud.slice.startswith("PREEMPTED")
    assert "gcloud compute tpus tpu-vm delete n" in outcome.err


def test_an_own_slice_of_an_earlier_call_is_taken_up_without_a_new_start(cloud):
    cloud.has("READY", owner="r")
    cloud.says("status", "running", "done")
    outcome = cloud.run("tpu_babysit.sh", *WORDS)
    assert outcome.code == 0 and not trained(outcome) and cloud.slice is None


@pytest.mark.parametrize(
    ("kind", "words", "options", "says"),
    [
        ("create", ["capacity"] * 20, ["--failures", "3"], "3 creations in a row failed"),
        ("create", ["permission"], [], "no permission in project p"),
        ("status", ["preempted"] * 20, ["--recreations", "2"], "created 2 times"),
        ("status", ["absent", *(["code:1"] * 20)], ["--crashes", "2"], "failed 2 times"),
        ("status", ["absent", "code:2"], [], "wrong input"),
        ("status", ["unreachable"] * 20, ["--unreachable", "2", "--recreations", "2"], "created 2 times"),
        ("describe", ["", *(["fail"] * 20)], ["--unreachable", "3"], "3 checks in a row failed"),
        ("status", ["running"] * 5000, ["--deadline", "1"], "not done after 1 seconds"),
        ("create", ["hang-made", "hang-made"], ["--create-timeout", "1", "--failures", "1"], "no answer within"),
    ],
)
def test_nothing_makes_it_go_on_for_ever(cloud, kind, words, options, says):
    cloud.says(kind, *words)
    outcome = cloud.run("tpu_babysit.sh", *WORDS, *options)
    assert outcome.code == 1 and says in outcome.err, outcome
    if cloud.slice is not None:  # what it leaves, it names
        assert "gcloud compute tpus tpu-vm delete n --zone=us-central1-a --project=p --quiet" in outcome.err


def test_training_that_was_asked_to_end_is_resumed_without_a_new_slice(cloud):
    cloud.says("status", "absent", "code:143", "running", "done")
    outcome = cloud.run("tpu_babysit.sh", *WORDS, "--crashes", "1")
    assert outcome.code == 0 and len(trained(outcome)) == 2 and len(made_of(outcome, "tpus", "create")) == 1


def test_a_worker_that_ended_alone_restarts_all(cloud):
    one = "text:mtp_jax-status host=h0 run=r state=running code=-"
    cloud.says("status", "absent", one, "running", "done")
    outcome = cloud.run("tpu_babysit.sh", *WORDS)
    assert outcome.code == 0 and "no connection to the workers (1 of at most 5)" in outcome.err
