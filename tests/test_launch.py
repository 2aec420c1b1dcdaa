"""launch.sh against stand-ins for gcloud and Python, which note what they are asked."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Describes the VM and its program by the next line of a script, where there is one. Where $STUB/bucket is,
# the directory $STUB/machine is the VM: create, ssh, scp and delete work on it.
GCLOUD = r"""#!/usr/bin/env bash
printf '%s\n' "gcloud $*" >>"$STUB/log"
next() { line=$(sed -n 1p "$STUB/$1" 2>/dev/null) && sed -i 1d "$STUB/$1" && [[ -n $line ]]; }
machine=$STUB/machine
for word; do if [[ $word == --command=* ]]; then command=${word#--command=}; fi; done
case "$*" in
  "storage ls"*) next steps && printf '%s\n' "${3%\**}checkpoints/$line/params" ;;
  *" describe "*)
    if [[ -e $machine/preempted ]]; then line=PREEMPTED
    elif ! next vm; then if [[ ! -d $STUB/bucket || -d $machine ]]; then line=READY; else line=MISSING; fi; fi
    case $line in
      MISSING) echo "ERROR: (gcloud.describe) NOT_FOUND: Resource 'pod' was not found" >&2; exit 1 ;;
      OFFLINE) echo "ERROR: (gcloud.describe) the network could not be reached" >&2; exit 1 ;;
      *) echo "$line"; echo "Updates are available for some components." >&2 ;;
    esac ;;
  *" ssh "*)
    if [[ -d $machine ]]; then cd "$machine" && HOME=$machine exec bash -c "$command"; fi
    [[ $command == *"worker state"* ]] || exit 0
    next program || line='exited 0'
    [[ $line != unreachable ]] || exit 255
    tr , '\n' <<<"$line" | sed 's/^/state=/' ;;
  *" scp "*) if [[ -d $machine ]]; then cp "$5" "$machine/flaxcap.tar.gz"; fi ;;
  *" create "*)
    if next create; then exit 1; fi
    if [[ -d $STUB/bucket ]]; then mkdir "$machine"; fi ;;
  *" delete "*)
    if [[ -e $machine/flaxcap.pid ]]; then kill -KILL -- "-$(<"$machine/flaxcap.pid")"; fi
    rm -rf "$machine" ;;
esac
"""

PYTHON = r"""#!/usr/bin/env bash
case "$*" in
  -c*)
    if [[ -z ${VERSION_INFO:-} ]]; then exit; fi
    exec "$REAL_PYTHON" -c "import sys; sys.version_info = ($VERSION_INFO); $2" ;;
  -V) echo "Python 3.10.12"; exit ;;
  *"pip --version") exit ;;
  *"-m venv"*)
    mkdir -p .venv/bin
    cp "$0" .venv/bin/python
    printf '%s\n' '#!/bin/sh' 'echo "flaxcap $*" >>"$STUB/log"' >.venv/bin/flaxcap
    chmod +x .venv/bin/flaxcap ;;
esac
echo "python $*" >>"$STUB/log"
"""


def write_program(path: pathlib.Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


class Launch:
    """A repository that holds launch.sh, and a PATH on which stand-ins come first."""

    def __init__(self, tmp: pathlib.Path, repo: pathlib.Path):
        self.stub, self.bin = tmp / "stub", tmp / "bin"
        self.stub.mkdir()
        self.bin.mkdir()
        self.repo = shutil.copytree(repo, tmp / "repo")
        for name in ("python3", "python3.11", "python3.12", "python3.13"):
            write_program(self.bin / name, PYTHON)
        write_program(self.bin / "gcloud", GCLOUD)
        write_program(self.bin / "nvidia-smi", "#!/bin/sh\nexit 9\n")
        write_program(self.bin / "getconf", "#!/bin/sh\necho 2\n")
        self.env = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(tmp),
            "STUB": str(self.stub),
            "REAL_PYTHON": sys.executable,
            "WATCH_INTERVAL": "0",
        }

    def script(self, name: str, *lines: str) -> None:
        (self.stub / name).write_text("".join(f"{line}\n" for line in lines))

    def __call__(self, *args: str, status: int | None = 0, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(self.repo / "launch.sh"), *args],
            env=self.env | env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
        )
        if status is None:
            assert done.returncode != 0
        else:
            assert done.returncode == status, done.stdout + done.stderr
        return done

    def log(self) -> list[str]:
        path = self.stub / "log"
        return path.read_text().splitlines() if path.exists() else []

    def steps(self) -> list[str]:
        """What gcloud was asked for, one word each, without the looks at the state."""
        words = []
        for line in [line for line in self.log() if line.startswith("gcloud")]:
            verb = re.sub(r"gcloud (compute tpus tpu-vm )?", "", line).split()[0]
            if verb == "ssh":
                action = re.search(r"worker (install|state|start|stop)|tail", line)
                assert action, line
                verb = action[1] or action[0]
            if verb not in ("describe", "state", "storage"):
                words.append(verb)
        return words


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    repo = tmp_path_factory.mktemp("committed")
    for name in ("launch.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, repo)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], cwd=repo, check=True)
    return repo


@pytest.fixture
def launch(tmp_path: pathlib.Path, committed: pathlib.Path) -> Launch:
    return Launch(tmp_path, committed)


@pytest.fixture
def pod(launch: Launch) -> Launch:
    launch.env |= {"TPU_NAME": "pod", "ZONE": "z1", "TYPE": "v6e-8"}
    launch.env |= {"WORKDIR": "gs://b/run", "DATA_DIR": "gs://b/data"}
    return launch


@pytest.fixture
def vm(pod: Launch) -> Iterator[Launch]:
    """gcloud's stand-in makes a VM out of a directory and runs the real worker commands in it."""
    if not (shutil.which("flock") and shutil.which("setsid")):
        pytest.skip("flock and setsid, which every TPU VM has, are not here")
    (pod.stub / "bucket").mkdir()
    yield pod
    if (pod.stub / "machine").exists():  # a test that failed may have left its program running
        pod("worker", "stop", HOME=str(pod.stub / "machine"), STOP_TIMEOUT="0.1")


# ---- this machine


@pytest.mark.parametrize("word", ["help", "-h", "--help"])
def test_help_names_every_command(launch: Launch, word: str):
    text = launch(word).stdout
    for command in ("install", "test", "create", "setup", "run", "watch", "logs", "stop", "delete"):
        assert re.search(rf"\b{command}\b", text)
    assert launch.log() == []


def test_unknown_command_is_named(launch: Launch):
    assert "no such command: trian" in launch("trian", status=1).stderr


def test_main_job_and_that_a_second_one_does_not_install(launch: Launch):
    data = "--config=experiments/shapes.py --data_dir=data"
    job = [
        f"flaxcap prepare {data}",
        f"flaxcap train {data} --workdir=runs/shapes",
        f"flaxcap evaluate {data} --workdir=runs/shapes --split=test",
        "flaxcap caption --workdir=runs/shapes --data_dir=data --split=test --num_images=4 --plot"
        " --out_dir=runs/shapes/captions",
    ]
    launch()
    assert launch.log() == ["python -m venv --clear .venv", "python -m pip install --quiet -e .", *job]
    launch()
    assert launch.log()[6:] == job
    with (launch.repo / "pyproject.toml").open("a") as f:
        f.write("# changed\n")
    launch()
    assert launch.log()[10:] == ["python -m pip install --quiet -e .", *job]


def test_preset_and_places_are_taken_from_the_environment(launch: Launch):
    launch(PRESET="experiments/coco.py", DATA_DIR="/d")
    assert "flaxcap train --config=experiments/coco.py --data_dir=/d --workdir=runs/coco" in launch.log()


def test_a_failing_step_ends_the_job_with_its_status(launch: Launch):
    launch("install")
    flaxcap = '#!/bin/sh\necho "$1" >>"$STUB/ran"\n[ "$1" != train ] || exit 75\n'
    write_program(launch.repo / ".venv/bin/flaxcap", flaxcap)
    launch(status=75)
    assert (launch.stub / "ran").read_text().split() == ["prepare", "train"]


def test_an_interrupted_installation_is_done_again(launch: Launch):
    failing = PYTHON.replace('echo "python', '[[ $* != *install* ]] || exit 3; echo "python')
    write_program(launch.bin / "python3", failing)
    launch("install", status=3)
    write_program(launch.repo / ".venv/bin/python", PYTHON)
    launch("install")
    assert launch.log()[-1] == "python -m pip install --quiet -e ."


def test_commands_run_the_suite_and_end_with_pytest(launch: Launch):
    launch("test", "-k", "two words")
    assert launch.log()[1:] == [
        "python -m pip install --quiet -e .[test]",
        "python -m ruff check .",
        "python -m ruff format --check .",
        "python -m pyright --pythonpath .venv/bin/python",
        "python -m pytest -n 2 --dist=loadfile -k two words",
    ]
    assert launch("test").stdout == ""  # nothing of ours stands after pytest's closing line
    write_program(launch.bin / "getconf", "#!/bin/sh\necho 1\n")
    launch("test")
    assert launch.log()[-1] == "python -m pytest"


def test_ci_runs_the_test_command(launch: Launch):
    (launch.repo / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", launch.repo / ".ci")
    subprocess.run(["bash", ".ci/run"], cwd=launch.repo, env=launch.env, check=True, capture_output=True)
    assert launch.log()[-1].startswith("python -m pytest")


@pytest.mark.parametrize(
    ("driver", "extra"), [("580.65.06", "[cuda13]"), ("550.54.15", "[cuda12]"), ("No devices were found", "")]
)
def test_extra_follows_the_nvidia_driver(launch: Launch, driver: str, extra: str):
    write_program(launch.bin / "nvidia-smi", f"#!/bin/sh\necho '{driver}'\n")
    done = launch("install")
    assert launch.log()[-1] == f"python -m pip install --quiet -e .{extra}"
    assert ("EXTRA=" in done.stderr) == bool(extra)
    launch("install", EXTRA="tpu")
    assert launch.log()[-1] == "python -m pip install --quiet -e .[tpu]"
    launch("install", EXTRA="")
    assert launch.log()[-1].endswith("-e ." if extra else "[tpu]")  # without a GPU the first one was the same


def test_too_old_a_python_is_told_and_nothing_made(launch: Launch):
    error = launch(status=1, VERSION_INFO="3, 10, 12").stderr
    assert "needs Python 3.11 or newer, but python3 is Python 3.10.12, python3.13 is Python 3.10.12" in error
    assert "PYTHON=" in error
    assert launch.log() == []
    assert not (launch.repo / ".venv").exists()
    assert "but there is no python9" in launch(status=1, PYTHON="python9").stderr


def test_python_may_be_named(launch: Launch):
    write_program(launch.bin / "mine", PYTHON)
    assert "making .venv with mine" in launch("install", PYTHON="mine", VERSION_INFO="3, 11, 0").stderr


def test_dry_run_prints_and_runs_nothing(pod: Launch):
    local = pod(DRY_RUN="1", TPU_NAME="", PRESET="a b/it's.py", WORKDIR="w").stdout.splitlines()
    assert local[0] == "python3 -m venv --clear .venv"
    assert local[3] == r".venv/bin/flaxcap train '--config=a b/it'\''s.py' --data_dir=gs://b/data --workdir=w"
    assert len(local) == 6
    assert not (pod.repo / ".venv").exists()
    lines = pod("watch", DRY_RUN="1").stdout.splitlines()
    verbs = [re.sub(r"gcloud compute tpus tpu-vm (\S+).*", r"\1", line) for line in lines]
    assert verbs[:3] == ["describe", "delete", "create"]
    assert verbs[3].startswith("mkdir")
    assert re.fullmatch(r"git archive .* [0-9a-f]{40}", verbs[4])  # not HEAD: a VM made later gets the same
    assert verbs[5:] == ["scp", "ssh", "ssh", "ssh"]
    for command in ("create", "setup", "run", "stop", "logs", "delete"):
        assert pod(command, DRY_RUN="1").stdout.startswith(("gcloud", "mkdir"))
    assert pod.log() == []
    assert not (pod.repo / "build").exists()


# ---- TPU VMs, from here


@pytest.mark.parametrize("name", ["TPU_NAME", "ZONE", "TYPE"])
@pytest.mark.parametrize("command", ["create", "watch"])
def test_missing_variables_are_named(pod: Launch, command: str, name: str):
    del pod.env[name]
    assert re.search(rf"{name}: set it to the \w+ of the TPU", pod(command, status=None).stderr)
    assert pod.log() == []


@pytest.mark.parametrize("name", ["WORKDIR", "DATA_DIR"])
def test_run_refuses_a_path_that_goes_with_the_vm(pod: Launch, name: str):
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


def test_create_wants_an_image_for_an_unknown_type(pod: Launch):
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


def test_no_gcloud_is_told(pod: Launch):
    (pod.bin / "gcloud").unlink()
    tools = pod.bin.parent / "tools"
    tools.mkdir()
    for name in ("bash", "env", "dirname", "basename"):
        (tools / name).symlink_to(shutil.which(name) or name)
    assert "no gcloud on the PATH" in pod("delete", status=1, PATH=f"{pod.bin}:{tools}").stderr


# ---- watch


def test_watch_makes_a_preempted_vm_again_and_resumes(pod: Launch):
    pod.script("vm", "READY", "PREEMPTED", "MISSING", "CREATING", "READY", "READY", "READY", "READY")
    pod.script("program", "running", "bare", "absent", "absent", "running", "exited 0")
    done = pod("watch", SPOT="1")
    assert "pod is PREEMPTED" in done.stderr
    assert pod.steps() == ["delete", "create", "scp", "install", "stop", "start"]
    assert "--spot" in next(line for line in pod.log() if " create " in line)


@pytest.mark.parametrize("state", ["TERMINATED", "PREEMPTED"])
def test_watch_deletes_what_will_not_come_back(pod: Launch, state: str):
    pod.script("vm", state)
    pod("watch")
    assert pod.steps() == ["delete"]


def test_watch_ends_when_the_program_has(pod: Launch):
    pod.script("program", "running", "exited 0,running")  # a worker that is still at it is waited for
    assert "ended well" in pod("watch").stderr
    assert pod.steps() == []
    assert sum("describe" in line for line in pod.log()) == 3


@pytest.mark.parametrize("states", ["exited 75", "exited 1,running", "died", "died,exited 0"])
def test_watch_starts_again_what_has_stopped(pod: Launch, states: str):
    pod.script("program", "running", states)
    pod("watch", "--", "my", "program")
    assert pod.steps() == ["stop", "start"]
    assert "worker start my program --zone" in next(line for line in pod.log() if "start" in line)


def test_watch_waits_out_silence_and_trouble(pod: Launch):
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
    # run asks for the state too: each round uses two lines of the script
    assert pod.steps() == ["stop", "start"] * 3 + ["tail"]


def test_watch_goes_on_while_checkpoints_advance(pod: Launch):
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
    assert pod.steps()[6:] == ["tail"]  # what went wrong can still be looked at


# ---- the whole way, on a VM that is a directory


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
    assert not (vm.stub / "machine/flaxcap/later").exists()  # it goes on with the code that it began with


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
    vm("stop")  # nothing to stop is no error

    vm("run", "--", "bash", "-c", "trap '' TERM; echo deaf; for i in {1..500}; do sleep 0.02; done")
    wait_for(machine / "flaxcap.log", "deaf")
    vm("stop", STOP_TIMEOUT="0.1")
    assert vm("worker", "state", HOME=str(machine)).stdout == "state=died\n"

    vm("run", "--", "bash", "-c", "setsid sleep 5 & exit 3")
    wait_for(machine / "flaxcap.status", "exited 3")
    # what a program leaves behind does not pass for the program
    subprocess.run(["flock", "-w", "2", machine / "flaxcap.lock", "true"], check=True)


def test_an_interrupted_setup_is_not_taken_for_a_whole_one(vm: Launch):
    vm("create")
    vm("setup", status=1, VERSION_INFO="3, 10, 12")  # no Python that will do, nor after uv has been asked for one
    assert "is not set up" in vm("run", status=1).stderr
    log = "\n".join(vm.log())
    assert "python -m pip install --quiet --user uv" in log
    assert "python -m uv python install --quiet 3.12" in log
    vm("setup")
    vm("setup")  # keeps the environment that is there
    assert vm.log().count("python -m venv --clear .venv") == 1
    assert vm.log().count("python -m pip install --quiet -e .[tpu]") == 1
    vm("run", "--", "true")
    assert vm.steps()[-1] == "start"
