"""launch.sh on this machine."""

import re
import shutil
import subprocess

import pytest
from launch_stub import PYTHON, ROOT, Launch, write_program


@pytest.mark.parametrize("word", ["help", "-h", "--help"])
def test_help_names_every_command(launch: Launch, word: str):
    text = launch(word).stdout
    for command in ("install", "test", "create", "setup", "run", "watch", "logs", "stop", "delete"):
        assert re.search(rf"\b{command}\b", text)
    assert launch.log() == []


def test_unknown_command_is_named(launch: Launch):
    assert "no such command: trian" in launch("trian", status=1).stderr


def test_the_main_job_installs_once(launch: Launch):
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


def test_preset_and_directories_come_from_the_environment(launch: Launch):
    launch(PRESET="experiments/coco.py", DATA_DIR="/d")
    assert "flaxcap train --config=experiments/coco.py --data_dir=/d --workdir=runs/coco" in launch.log()


MADVISE = "always [madvise] never"


@pytest.mark.parametrize(
    ("setting", "before", "expected"),
    [
        (MADVISE, None, "glibc.malloc.hugetlb=1"),
        (MADVISE, "", "glibc.malloc.hugetlb=1"),
        (MADVISE, "glibc.malloc.arena_max=4", "glibc.malloc.arena_max=4:glibc.malloc.hugetlb=1"),
        (MADVISE, "glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
        ("[always] madvise never", None, "unset"),
        ("always madvise [never]", "glibc.malloc.arena_max=4", "glibc.malloc.arena_max=4"),
        (None, None, "unset"),
    ],
)
def test_programs_get_huge_pages_where_the_kernel_offers_them(launch: Launch, setting, before, expected):
    if setting:
        launch.script("huge_pages", setting)
    launch("install")
    write_program(launch.repo / ".venv/bin/flaxcap", '#!/bin/sh\necho "${GLIBC_TUNABLES-unset}" >>"$STUB/tunables"\n')
    launch(**({} if before is None else {"GLIBC_TUNABLES": before}))
    assert (launch.stub / "tunables").read_text().splitlines() == [expected] * 4


def test_a_failing_step_ends_the_job_with_its_status(launch: Launch):
    launch("install")
    flaxcap = '#!/bin/sh\necho "$1" >>"$STUB/ran"\n[ "$1" != train ] || exit 75\n'
    write_program(launch.repo / ".venv/bin/flaxcap", flaxcap)
    launch(status=75)
    assert (launch.stub / "ran").read_text().split() == ["prepare", "train"]


def test_an_interrupted_installation_is_repeated(launch: Launch):
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
        "python -m pytest -n 2 --dist=loadfile --no-loadscope-reorder -k two words",
    ]
    assert launch("test").stdout == ""  # nothing follows pytest's summary
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
    assert launch.log()[-1].endswith("-e ." if extra else "[tpu]")  # without a GPU, the first installation was the same


def test_too_old_a_python_is_named_and_nothing_is_created(launch: Launch):
    error = launch(status=1, VERSION_INFO="3, 10, 12").stderr
    assert "needs Python 3.11 or newer, but python3 is Python 3.10.12, python3.13 is Python 3.10.12" in error
    assert "PYTHON=" in error
    assert launch.log() == []
    assert not (launch.repo / ".venv").exists()
    assert "but there is no python9" in launch(status=1, PYTHON="python9").stderr


def test_python_may_be_named(launch: Launch):
    write_program(launch.bin / "mine", PYTHON)
    assert "creating .venv with mine" in launch("install", PYTHON="mine", VERSION_INFO="3, 11, 0").stderr


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
    assert re.fullmatch(r"git archive .* [0-9a-f]{40}", verbs[4])  # not HEAD: a later VM gets the same commit
    assert verbs[5:] == ["scp", "ssh", "ssh", "ssh"]
    for command in ("create", "setup", "run", "stop", "logs", "delete"):
        assert pod(command, DRY_RUN="1").stdout.startswith(("gcloud", "mkdir"))
    assert pod.log() == []
    assert not (pod.repo / "build").exists()
    pod.script("huge_pages", MADVISE)
    assert "export GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in pod(DRY_RUN="1", TPU_NAME="").stdout.splitlines()
