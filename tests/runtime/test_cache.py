"""The cache directory."""

import pathlib
import subprocess
import sys

from flaxcap.runtime.cache import cache_dir


def test_the_cache_follows_the_xdg_convention(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_dir() == pathlib.Path("/elsewhere/flaxcap")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_dir() == tmp_path / ".cache" / "flaxcap"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == tmp_path / ".cache" / "flaxcap"


def test_the_cache_imports_no_jax():
    program = "import sys; import flaxcap.runtime.cache; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
