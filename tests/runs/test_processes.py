"""Several processes train as one: they save, resume, write the result, and end together."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import free_port, read_lines
from safetensors.numpy import load_file

LOST = 75


@pytest.fixture
def start_two(start):
    """A function that starts a train command as two processes of two devices: (config, overrides of each) -> Popens."""

    def popen(config, *overrides, second=()):
        together = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
            "JAX_NUM_PROCESSES": "2",
            "MTP_JAX_HEARTBEAT_SECONDS": "3",
        }
        return [
            start("train", "--config", config, *overrides, *mine, devices=2, **together, JAX_PROCESS_ID=str(i))
            for i, mine in enumerate(((), second))
        ]

    return popen


@pytest.fixture
def endless(tree):
    """A run that does not end by itself, with a checkpoint every third step."""
    tree["train"]["steps"] = 100_000
    tree |= {"evaluation": {}, "mesh": {"data": 2, "fsdp": 2}}
    return tree


def wait_for_step(folder, step, processes):
    """Wait until the metrics have a line of this step."""
    until = time.monotonic() + 100
    while time.monotonic() < until and all(process.poll() is None for process in processes):
        metrics = folder / "metrics.jsonl"
        if metrics.exists() and f'{{"step": {step},' in metrics.read_text():
            return
        time.sleep(0.05)
    raise AssertionError([process.communicate() for process in processes if process.poll() is not None])


def test_two_processes_stop_together_and_resume(tree, write_config, start_two, finish, finished):
    tree |= {"mesh": {"data": 2, "fsdp": 2}, "checkpoints": {"every": 100}}
    config, folder = write_config(tree), Path(tree["output_dir"])
    started = start_two(config)
    wait_for_step(folder, 1, started)
    started[1].send_signal(signal.SIGTERM)
    ended = [finish(process) for process in started]
    if ended[0].code != 0:  # else the run was quicker than the signal
        assert [end.code for end in ended] == [143, 143], ended
        assert "which is saved; rerun the command to continue from there" in ended[0].err
        step = len([line for line in read_lines(folder / "metrics.jsonl") if "loss" in line])
        assert {path.name for path in (folder / "checkpoints" / str(step) / "data").iterdir()} == {"0.json", "2.json"}
    ended = [finish(process) for process in start_two(config)]
    assert [end.code for end in ended] == [0, 0], ended
    assert ended[0].out.endswith(f"model: {folder}/model\n") and "from step" in ended[0].err
    assert "model:" not in ended[1].out and (folder / "logs" / "process-1.log").exists()
    theirs = read_lines(finished / "metrics.jsonl")
    ours = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for name in ("loss", "held_out_loss"):
        np.testing.assert_allclose(
            [line[name] for line in ours if name in line], [line[name] for line in theirs if name in line], rtol=1e-5
        )
    last, reference = (load_file(out / "model" / "model.safetensors") for out in (folder, finished))
    assert all(np.allclose(last[key], reference[key], atol=1e-4) for key in reference)


def test_the_death_of_a_process_ends_the_other_and_is_reported(endless, write_config, start_two, finish, command):
    config, folder = write_config(endless), Path(endless["output_dir"])
    started = start_two(config)
    wait_for_step(folder, 2, started)
    refused = command("train", "--config", write_config(endless | {"mesh": {}}, "second.yaml"))
    assert refused.code == 2 and "is in use by another run" in refused.errors[0]
    started[1].kill()
    begun = time.monotonic()
    ended = finish(started[0], timeout=30)
    assert ended.code == LOST and time.monotonic() - begun < 15, ended
    assert "process 1 of 2 is lost: no heartbeat for 3 s" in ended.errors[0]


@pytest.mark.slow
def test_the_death_of_the_first_process_ends_the_other(endless, write_config, start_two, finish):
    config, folder = write_config(endless), Path(endless["output_dir"])
    started = start_two(config)
    wait_for_step(folder, 2, started)
    started[0].kill()
    ended = finish(started[1], timeout=30)
    assert ended.code == LOST and "the first process" in ended.err and "is lost" in ended.err, ended
    assert "the first process" in (folder / "logs" / "process-1.log").read_text()


@pytest.mark.slow
def test_a_fault_of_one_process_ends_both(endless, write_config, start_two, finish):
    started = start_two(write_config(endless), second=["data.sources.0.path=no/such/place"])
    ended = [finish(process, timeout=60) for process in started]
    assert [end.code for end in ended] == [2, 2], ended
    assert len(ended[0].errors) == 1 and "process 1: data.sources.0.path: no/such/place" in ended[0].errors[0]
    assert ended[1].errors == [] and "Traceback" not in ended[0].err + ended[1].err


@pytest.mark.slow
def test_a_second_group_on_the_same_folder_is_refused(endless, write_config, start_two, finish):
    config, folder = write_config(endless), Path(endless["output_dir"])
    started = start_two(config)
    wait_for_step(folder, 1, started)
    ended = [finish(process, timeout=60) for process in start_two(config)]
    assert [end.code for end in ended] == [2, 2], ended
    assert len(ended[0].errors) == 1 and "is in use by another run" in ended[0].errors[0] and not ended[1].errors
    assert all(process.poll() is None for process in started)


@pytest.mark.slow
def test_a_disturbed_pair_leaves_what_an_undisturbed_one_does(tree, write_config, start_two, finish):
    tree |= {"mesh": {"data": 2, "fsdp": 2}, "checkpoints": {"every": 2}}
    tree["train"]["steps"] = 40
    folders = [Path(tree["output_dir"]) / name for name in ("quiet", "disturbed")]
    configs = [write_config(tree | {"output_dir": str(folder)}, f"{folder.name}.yaml") for folder in folders]
    assert [finish(process).code for process in start_two(configs[0])] == [0, 0]
    for victim, step in ((0, 7), (1, 15), (0, 25)):
        started = start_two(configs[1])
        wait_for_step(folders[1], step, started)
        started[victim].kill()
        assert {finish(process).code for process in started} <= {-9, LOST}
    assert [finish(process).code for process in start_two(configs[1])] == [0, 0]
    quiet, disturbed = ((folder / "metrics.jsonl").read_bytes() for folder in folders)
    assert quiet == disturbed


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(tree, write_config, start_two, start, finish, finished):
    tree |= {"mesh": {"data": 2, "fsdp": 2}, "checkpoints": {"every": 100}}
    config, folder = write_config(tree), Path(tree["output_dir"])
    started = start_two(config)
    wait_for_step(folder, 1, started)
    started[0].send_signal(signal.SIGTERM)
    assert {finish(process).code for process in started} == {143}
    ended = finish(start("train", "--config", config, "mesh.data=1", "mesh.fsdp=1"))
    assert ended.code == 0 and "resuming" in ended.err, ended
    ours, theirs = (
        [line["loss"] for line in read_lines(out / "metrics.jsonl") if "loss" in line] for out in (folder, finished)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


# ---- the environment


CLUSTERS = {
    "slurm": lambda i, number: {
        "SLURM_JOB_ID": str(number),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(i),
        "SLURM_LOCALID": str(i),
    },
    "open mpi": lambda i, number: {
        "OMPI_MCA_orte_hnp_uri": f"{number * 2**12}.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(i),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(i),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_cluster_says_which_processes_there_are(tree, write_config, start, finish, cluster):
    tree["train"]["steps"], number = 3, os.getpid()  # the port of process 0 follows from the number of the job
    config = write_config(tree)
    started = [start("train", "--config", config, **CLUSTERS[cluster](i, number)) for i in range(2)]
    ended = [finish(process) for process in started]
    assert [end.code for end in ended] == [0, 0], ended
    assert (Path(tree["output_dir"]) / "logs" / "process-1.log").exists()


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, ["JAX_COORDINATOR_ADDRESS is missing", "JAX_PROCESS_ID is missing"]),
        ({"JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "a:1"}, ["JAX_NUM_PROCESSES is missing"]),
        (
            {"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "-1", "JAX_COORDINATOR_ADDRESS": "here"},
            ["JAX_NUM_PROCESSES='two'", "JAX_PROCESS_ID='-1'", "JAX_COORDINATOR_ADDRESS='here' should be HOST:PORT"],
        ),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2", "JAX_COORDINATOR_ADDRESS": "a:1"},
            ["JAX_PROCESS_ID=2 should be from 0 to JAX_NUM_PROCESSES - 1 = 1"],
        ),
        ({"MTP_JAX_HEARTBEAT_SECONDS": "soon"}, ["MTP_JAX_HEARTBEAT_SECONDS='soon' should be a number of seconds"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_variables_are_reported(tree, write_config, command, monkeypatch, environment, says):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ended = command("train", "--config", write_config(tree))
    assert ended.code == 2 and len(ended.errors) == len(says), ended
    assert all(part in fault for part, fault in zip(says, ended.errors, strict=True)), ended
    assert not Path(tree["output_dir"]).exists()


def test_a_process_that_waits_for_others_in_vain_says_so(start, finish, tree, write_config):
    impatient = (
        "import runpy, sys; from mtp_jax.runs import processes; processes._JOIN_SECONDS = 2; "
        "sys.argv = sys.argv[1:]; runpy.run_module('mtp_jax.train', run_name='__main__')"
    )
    address = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    ended = finish(start("train", "--config", write_config(tree), script=["-c", impatient], **address))
    assert ended.code == LOST and ended.errors == ["the processes of this run did not all join within 2 s."], ended


def test_one_process_needs_no_address(tree, write_config, command, monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    tree["train"]["steps"] = 3
    assert command("train", "--config", write_config(tree)).code == 0
