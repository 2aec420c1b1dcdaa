"""Help texts of the command line."""

import importlib.metadata
import re
import shlex

import pytest

from flaxcap.commands.main import main
from flaxcap.config import Config
from flaxcap.fields import flatten

# Every flag of every command, as listed by its help.
FLAGS = {
    "prepare": "config data_dir verbosity compilation_cache_dir distributed manual_dir npy_dir encoder_weights"
    " num_workers max_bad_fraction",
    "train": "config data_dir verbosity compilation_cache_dir distributed workdir [no]resume init_from profile_dir"
    " max_bad_steps",
    "evaluate": "config data_dir verbosity compilation_cache_dir workdir model seed manual_dir predictions"
    " [no]subset split out_dir",
    "caption": "config data_dir verbosity compilation_cache_dir workdir model seed split num_images [no]plot out_dir"
    " npy_dir [no]recursive [no]allow_private_urls",
    "export": "config data_dir verbosity workdir out",
    "verify": "config data_dir verbosity workdir",
    "bench": "config verbosity images steps warmup repeats workers against out",
}


@pytest.mark.parametrize("args", [[], ["help"], ["--help"], ["-h"]])
def test_the_overview_names_every_command(args, capsys):
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for command in FLAGS:
        assert re.search(rf"^  {command} +\w", out, re.MULTILINE)
        assert re.search(rf"^  flaxcap {command} \S", out, re.MULTILINE)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flaxcap {importlib.metadata.version('flaxcap')}\n"


@pytest.mark.parametrize("command", FLAGS)
def test_help_lists_every_flag_and_field(command, capsys):
    assert main([command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert sorted(re.findall(r"^  --(\S+): \S", out, re.MULTILINE)) == sorted(FLAGS[command].split())
    assert sorted(re.findall(r"^  (\S+) = .+?: \w", out, re.MULTILINE)) == sorted(flatten(Config()))
    blocks = dict(re.findall(r"^(\S+): \w.*\n((?:  .+\n?)+)", out, re.MULTILINE))
    assert set(blocks) >= {"data", "data.shapes", "encoder", "model", "train", "train.dropout", "decode"}
    for group, lines in blocks.items():
        assert all(re.match(rf"  {group}\.\w+ = ", line) for line in lines.splitlines())
    assert re.search(rf"^  flaxcap {command} \S", out, re.MULTILINE)
    assert main(["help", command]) == 0
    assert capsys.readouterr().out == out


@pytest.mark.parametrize("command", FLAGS)
def test_the_example_in_the_help_is_a_command_line(command, capsys, tmp_path, monkeypatch):
    main([command, "--help"])
    example = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  flaxcap "))
    monkeypatch.chdir(tmp_path)  # an empty directory: the command fails at the first file it needs
    assert main(shlex.split(example)[1:]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"flaxcap {command}: .*(no such file|no config\.json).*\n", err)


def test_help_lists_choices_and_bounds(capsys):
    main(["evaluate", "--help"])
    out = capsys.readouterr().out
    assert "--split: <train|val|test>" in out
    assert re.search(r"model\.cell = 'gru': .* <gru\|lstm>$", out, re.MULTILINE)
    assert re.search(r"train\.dropout\.image = 0\.0: .* \[0 to 0\.99\]$", out, re.MULTILINE)
    assert re.search(r"decode\.beam_width = 5: hyp.* \[1 to 1000\] \(needs decode\.method=beam\)$", out, re.MULTILINE)
    assert re.search(r"train\.cider_temperature = .* \(needs train\.cider_epochs\)$", out, re.MULTILINE)
    assert re.search(r"^data\.shapes: .* \(needs dataset=shapes\)$", out, re.MULTILINE)
