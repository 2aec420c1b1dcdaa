"""launch.sh on TPU VMs."""

import pathlib
import re
import shutil
import subprocess
import time

import pytest
from launch_stub import Launch, write_program


@pytest.mark.parametrize("name", ["TPU_NAME", "ZONE", "TYPE"])
@pytest.mark.parametrize("command", ["create", "watch"])
def test_missing_variables_are_named(pod: Launch, command: str, name: str):
    del pod.env[name]
    assert re.search(rf"{name}: set it to the \w+ of the TPU", pod(command, status=None).stderr)
    assert pod.log() == []


@pytest.mark.parametrize("name", ["WORKDIR", "DATA_DIR"])
def test_run_refuses_a_path_on_the_vms_disk(pod: Launch, name: str):
    pod.env[name] = "/home/me"
    assert f"{name}=/home/me: must be a gs:// path" in pod("run", status=1).stderr
    assert pod.log() == []


@pytest.mark.parametrize(
    ("kind", "image"),
    [
        ("v3-8", "tpu-ubuntu2204-base"),
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_create_chooses_the_image_by_type(pod: Launch, kind: str, image: str):
    pod("create", TYPE=kind)
    start = f"gcloud compute tpus tpu-vm create pod --accelerator-type={kind}"
    assert pod.log() == [f"{start} --version={image} --zone=z1 --quiet"]
    pod("create", TYPE=kind, VERSION="own", SPOT="1", CREATE_FLAGS="--network=n --labels=a=b")
    assert pod.log()[1] == f"{start} --version=own --spot --network=n --labels=a=b --zone=z1 --quiet"


def test_create_needs_an_image_for_an_unknown_type(pod: Launch):
    assert "set VERSION to the runtime image for TYPE=v9-8" in pod("create", status=None, TYPE="v9-8").stderr
    pod("create", TYPE="v9-8", VERSION="new")
    assert pod.steps() == ["create"]


def test_setup_copies_the_commit_to_all_workers_and_installs(pod: Launch):
    (pod.repo / "launch.sh").write_text((pod.repo / "launch.sh").read_text() + "# not committed\n")
    assert "not committed" in pod("setup", WORKER="0").stderr
    scp, install = pod.log()
    assert scp == ("gcloud compute tpus tpu-vm scp build/pod.tar.gz pod:flaxcap.tar.gz --worker=all --zone=z1 --quiet")
    assert install.startswith("gcloud compute tpus tpu-vm ssh pod --worker=all --command=")
    assert install.endswith("flaxcap/launch.sh worker install --zone=z1 --quiet")
    names = subprocess.run(
        ["tar", "-tzf", pod.repo / "build/pod.tar.gz"], capture_output=True, text=True, check=True
    ).stdout
    assert names.split() == ["launch.sh", "pyproject.toml"]


def test_run_starts_training_on_all_workers(pod: Launch):
    pod.script("program", "absent")
    pod("run")
    assert pod.log()[-1] == (
        "gcloud compute tpus tpu-vm ssh pod --worker=all --command=flaxcap/launch.sh worker start flaxcap"
        " train --config=experiments/shapes.py --workdir=gs://b/run --data_dir=gs://b/data --distributed=auto"
        " --zone=z1 --quiet"
    )
    pod("run", "--", "echo", "two words", WORKER="0", WORKDIR="local")
    assert r"--worker=0 --command=flaxcap/launch.sh worker start echo two\ words" in pod.log()[-1]


@pytest.mark.parametrize(
    ("states", "error"),
    [
        ("running", "already running on pod"),
        ("exited 1,running", "already running"),
        ("bare", "is not set up"),
        ("unreachable", "does not answer"),
    ],
)
def test_run_starts_nothing_unless_all_workers_are_free(pod: Launch, states: str, error: str):
    pod.script("program", states)
    assert error in pod("run", status=1).stderr
    assert pod.steps() == []


def test_logs_stop_and_delete(pod: Launch):
    pod("logs")
    pod("logs", WORKER="3")
    pod("stop")
    pod("delete")
    ssh, where = "gcloud compute tpus tpu-vm ssh pod", "--zone=z1 --quiet"
    assert pod.log() == [
        f"{ssh} --worker=0 --command=tail -n 100 -F flaxcap.log {where}",
        f"{ssh} --worker=3 --command=tail -n 100 -F flaxcap.log {where}",
        f"{ssh} --worker=all --command=flaxcap/launch.sh worker stop {where}",
        f"gcloud compute tpus tpu-vm delete pod {where}",
    ]


def test_a_missing_gcloud_is_named(pod: Launch):
    (pod.bin / "gcloud").unlink()
    tools = pod.bin.parent / "tools"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "basename"):
        (tools / name).symlink_to(shutil.which(name) or name)
    assert "no gcloud on the PATH" in pod("delete", status=1, PATH=f"{pod.bin}:{tools}").stderr


# ---- watch


def test_watch_creates_a_preempted_vm_again_and_resumes(pod: Launch):
    pod.script("vm", "READY", "PREEMPTED", "MISSING", "CREATING", "READY", "READY", "READY", "READY")
    pod.script("program", "running", "bare", "absent", "absent", "running", "exited 0")
    done = pod("watch", SPOT="1")
    assert "pod is PREEMPTED" in done.stderr
    assert pod.steps() == ["delete", "create", "scp", "install", "stop", "start"]
    assert "--spot" in next(line for line in pod.log() if " create " in line)


@pytest.mark.parametrize("state", ["TERMINATED", "PREEMPTED"])
def test_watch_deletes_a_vm_that_cannot_restart(pod: Launch, state: str):
    pod.script("vm", state)
    pod("watch")
    assert pod.steps() == ["delete"]


def test_watch_ends_when_the_program_has(pod: Launch):
    pod.script("program", "running", "exited 0,running")  # watch waits for a worker that still runs
    assert "the program ended with status 0" in pod("watch").stderr
    assert pod.steps() == []
    assert sum("describe" in line for line in pod.log()) == 3


@pytest.mark.parametrize("states", ["exited 75", "exited 1,running", "died", "died,exited 0"])
def test_watch_restarts_a_stopped_program(pod: Launch, states: str):
    pod.script("program", "running", states)
    pod("watch", "--", "my", "program")
    assert pod.steps() == ["stop", "start"]
    assert "worker start my program --zone" in next(line for line in pod.log() if "start" in line)


def test_watch_retries_after_failures(pod: Launch):
    pod.script("vm", "OFFLINE", "RESTARTING", "MISSING", "MISSING", "READY", "READY")
    pod.script("create", "no capacity")
    pod.script("program", "unreachable")
    error = pod("watch").stderr
    for words in ("could not be reached", "is RESTARTING", "create failed; trying again", "does not answer"):
        assert words in error
    assert pod.steps() == ["create", "create"]


def test_watch_gives_up_without_progress(pod: Launch):
    pod.script("program", *["exited 1"] * 40)
    error = pod("watch", status=1, MAX_RESTARTS="3").stderr
    assert "3 restarts in a row brought no newer checkpoint" in error
    # run reads the state too: each restart uses two lines of the script
    assert pod.steps() == ["stop", "start"] * 3 + ["tail"]


def test_watch_continues_while_checkpoints_advance(pod: Launch):
    pod.script("program", *["exited 75"] * 40)
    pod.script("steps", "100", "200", "200", "300", *["300"] * 9)
    error = pod("watch", status=1, MAX_RESTARTS="2").stderr
    assert "newest checkpoint: 200" in error
    assert pod.steps() == ["stop", "start"] * 5 + ["tail"]


def test_without_a_command_a_named_vm_is_watched_then_deleted(pod: Launch):
    pod.script("vm", "MISSING")
    pod.script("program", "bare", "absent", "absent", "running", "exited 0")
    pod()
    assert pod.steps() == ["create", "scp", "install", "stop", "start", "delete"]
    pod.script("program", "exited 1")
    pod(status=1, MAX_RESTARTS="0")
    assert pod.steps()[6:] == ["tail"]  # the VM remains for inspection


# ---- complete runs, on a VM that is a directory


def wait_for(path: pathlib.Path, text: str = "") -> None:
    end = time.monotonic() + 10
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < end, f"{path} never held {text!r}"
        time.sleep(0.01)


def test_watch_brings_a_program_through_an_exit_75_and_a_preemption(vm: Launch):
    program = vm.bin / "program"
    write_program(
        program,
        """#!/bin/sh
echo "$1" >>"$STUB/bucket/starts"
case $(wc -l <"$STUB/bucket/starts") in
  1) exit 75 ;;
  2) cd "$STUB/../repo" && touch later && git add later && git -c user.name=t -c user.email=t@t commit -qm x
     touch "$HOME/preempted"; sleep 20 ;;
esac
""",
    )
    vm("watch", "--", "program", "it's one word", WATCH_INTERVAL="0.1")
    assert (vm.stub / "bucket/starts").read_text() == "it's one word\n" * 3
    fresh = ["create", "scp", "install", "stop", "start"]
    assert vm.steps() == [*fresh, "stop", "start", "delete", *fresh]
    assert (vm.stub / "log").read_text().count("pip install --quiet -e .[tpu]") == 2
    assert (vm.repo / "later").exists()
    assert not (vm.stub / "machine/flaxcap/later").exists()  # the new VM has the code that the run began with


def test_worker_runs_one_program_and_stops_it_gently(vm: Launch):
    vm("create")
    vm("setup")
    machine = vm.stub / "machine"
    trap = "trap 'echo saved; exit 75' TERM; echo at it; for i in {1..500}; do sleep 0.02; done"
    vm("run", "--", "bash", "-c", trap)
    wait_for(machine / "flaxcap.log", "at it")
    assert "already running" in vm("run", "--", "true", status=1).stderr
    assert "already running" in vm("worker", "start", "true", status=1, HOME=str(machine)).stderr
    assert vm("worker", "state", HOME=str(machine)).stdout == "state=running\n"
    vm("stop")
    assert vm("worker", "state", HOME=str(machine)).stdout == "state=exited 75\n"
    assert "saved" in (machine / "flaxcap.log").read_text()
    vm("stop")  # stopping nothing is no error

    vm("run", "--", "bash", "-c", "trap '' TERM; echo deaf; for i in {1..500}; do sleep 0.02; done")
    wait_for(machine / "flaxcap.log", "deaf")
    vm("stop", STOP_TIMEOUT="0.1")
    assert vm("worker", "state", HOME=str(machine)).stdout == "state=died\n"

    vm.script("huge_pages", "always [madvise] never")
    vm("run", "--", "bash", "-c", "echo $GLIBC_TUNABLES; setsid sleep 5 & exit 3")
    wait_for(machine / "flaxcap.status", "exited 3")
    assert "\nglibc.malloc.hugetlb=1\n" in (machine / "flaxcap.log").read_text()
    # a process that the program left behind does not hold the lock
    subprocess.run(["flock", "-w", "2", machine / "flaxcap.lock", "true"], check=True)


def test_an_interrupted_setup_is_repeated(vm: Launch):
    vm("create")
    vm("setup", status=1, VERSION_INFO="3, 10, 12")  # no suitable Python, even after uv has installed one
    assert "is not set up" in vm("run", status=1).stderr
    log = "\n".join(vm.log())
    assert "python -m pip install --quiet --user uv" in log
    assert "python -m uv python install --quiet 3.12" in log
    vm("setup")
    vm("setup")  # keeps the existing environment
    assert vm.log().count("python -m venv --clear .venv") == 1
    assert vm.log().count("python -m pip install --quiet -e .[tpu]") == 1
    vm("run", "--", "true")
    assert vm.steps()[-1] == "start"
