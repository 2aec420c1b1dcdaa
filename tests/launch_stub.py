"""Fake gcloud and Python programs that log their arguments, for the tests of launch.sh."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"  # the repository of a test reads $STUB/huge_pages instead

# The next lines of the files in $STUB, written by `Launch.script`, set the states of the VM and of its program.
# If $STUB/bucket exists, the directory $STUB/machine is the VM, and create, ssh, scp and delete work on it.
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
    """A repository with launch.sh, and a PATH on which the fake programs come first."""

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
        """Returns the actions that gcloud was called for, one word each, without queries of the state."""
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


def commit(repo: pathlib.Path) -> pathlib.Path:
    """Creates a git repository with launch.sh and the files that it reads. Returns its path."""
    shutil.copy(ROOT / "pyproject.toml", repo)
    script = (ROOT / "launch.sh").read_text()
    assert script.count(f"={HUGE_PAGES}\n") == 1
    (repo / "launch.sh").write_text(script.replace(HUGE_PAGES, "$STUB/huge_pages"))
    (repo / "launch.sh").chmod(0o755)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], cwd=repo, check=True)
    return repo
