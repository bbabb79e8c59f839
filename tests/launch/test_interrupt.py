"""Ctrl-C at any point: what may exist is named, with the command that deletes it."""

import shlex

import pytest

PLACE = "--zone us-central1-a --project p"
RUN = "--run r --store gs://b/f --config configs/quickstart.yaml"
SLICE = "tpu_vm.sh {} --name n " + PLACE
BABYSIT = f"tpu_babysit.sh --name n --accelerator-type v5litepod-16 {PLACE} {RUN}"
GCE = f"gce_tpu.sh create --name n --accelerator-type v5p-32 {PLACE}"
DELETE = "gcloud compute tpus tpu-vm delete n --zone=us-central1-a --project=p --quiet"
QUEUED = "gcloud compute tpus queued-resources delete n --zone=us-central1-a --project=p --force --quiet"
TEMPLATE = "gcloud compute instance-templates delete n --project=p --quiet"
POLICY = "gcloud compute resource-policies delete n --region=us-central1 --project=p --quiet"
GROUP = "gcloud compute instance-groups managed delete n --zone=us-central1-a --project=p --quiet"


@pytest.mark.parametrize(
    ("line", "kind", "after", "named"),
    [
        (SLICE.format("create") + " --accelerator-type v5litepod-16", "create", "create", [DELETE]),
        (SLICE.format("create") + " --accelerator-type v5litepod-16 --queued", "create", "create", [QUEUED]),
        (SLICE.format("setup"), "setup", "install", [DELETE]),
        (SLICE.format("train") + " " + RUN, "train", "worker.sh train", [DELETE]),
        (SLICE.format("delete"), "delete", "delete", [DELETE]),
        (BABYSIT, "create", "create", [DELETE]),
        (BABYSIT, "status", "worker.sh status", [DELETE]),
        (BABYSIT + " --queued", "setup", "install", [QUEUED]),
        (GCE, "template", "instance-templates", [TEMPLATE]),
        (GCE, "policy", "resource-policies", [TEMPLATE, POLICY]),
        (GCE, "group", "managed create", [TEMPLATE, POLICY, GROUP]),
        (f"gce_tpu.sh train --name n --accelerator-type v5p-16 {PLACE} {RUN}", "train", "worker.sh train", [GROUP]),
        (
            f"xpk.sh train --cluster c --tpu-type v5litepod-16 --image i {PLACE} {RUN}",
            "xpk",
            "workload create",
            ["xpk workload delete --workload=r --cluster=c --zone=us-central1-a --project=p --force"],
        ),
        (f"gpu.sh train --hosts a,b {RUN}", "train", "worker.sh train", ["gpu.sh stop --hosts a,b --run r"]),
    ],
)
def test_ctrl_c_names_what_may_exist_and_how_to_delete_it(cloud, line, kind, after, named):
    if "create" not in line and line.startswith("tpu_vm"):
        cloud.has("READY")
    cloud.says(kind, "absent" if kind == "setup" and "babysit" in line else "hang", "hang")
    if "babysit" in line and kind == "setup":
        cloud.says("setup", "hang")
        cloud.says("status", "absent")
    outcome = cloud.interrupt(*shlex.split(line), after=after)
    assert outcome.code == 130 and "interrupted." in outcome.err, outcome
    for command in named:
        assert command in outcome.err
    assert outcome.err.count("costs money until it is deleted") == len(named)


def test_ctrl_c_before_anything_was_created_names_nothing(cloud):
    cloud.says("describe", "hang")
    outcome = cloud.interrupt(
        *shlex.split(SLICE.format("create") + " --accelerator-type v5litepod-16"), after="describe"
    )
    assert outcome.code == 130 and "deleted with" not in outcome.err


def test_a_creation_that_fails_half_way_names_the_halves(cloud):
    cloud.says("policy", "quota")
    outcome = cloud.run(*shlex.split(GCE))
    assert outcome.code == 1 and TEMPLATE in outcome.err and POLICY in outcome.err and GROUP not in outcome.err
