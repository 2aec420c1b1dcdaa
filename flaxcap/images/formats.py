"""Formats of image files: those that are read, their suffixes, and how a file begins."""

import re

from PIL import Image, features

# Formats that Pillow 13 decodes itself. Others are rare, and EPS starts an external program. Pillow's wheels have AVIF.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", *(["AVIF"] if features.check("avif") else []))
# For formats that users have and Pillow cannot read, the remedy.
_UNREADABLE = {
    "HEIC": "HEIC, which Pillow cannot read; convert it to JPEG, for example with the package pillow-heif",
    "AVIF": "AVIF, which this build of Pillow cannot read; install Pillow's wheel (`pip install pillow`)",
}
# The beginnings of files that Pillow reads. Names of formats are Pillow's.
_BEGINNINGS = {
    "JPEG": b"\xff\xd8\xff",
    "PNG": b"\x89PNG\r\n\x1a\n",
    "GIF": b"GIF8[79]a",
    "BMP": b"BM.{4}\0{4}",
    "TIFF": b"II[*+]\0|MM\0[*+]",
    "PPM": b"P[456fy]\\s+[\\d#]",
    "WEBP": b"RIFF.{4}WEBP",
}
BEGINNING = 64  # bytes that `format_of` needs
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}


def format_of(beginning: bytes) -> str:
    """Returns the format of a file by its first `BEGINNING` bytes: Pillow's name, "HEIC", or "" for no image."""
    if beginning[4:8] == b"ftyp":
        major, brands = beginning[8:12], {beginning[n : n + 4] for n in range(8, len(beginning), 4)}
        if major in (b"avif", b"avis") or (major in (b"mif1", b"msf1") and brands & {b"avif", b"avis"}):
            return "AVIF"
        return "HEIC" if major in (b"mif1", b"msf1") or brands & _HEIC else ""
    return next((name for name, pattern in _BEGINNINGS.items() if re.match(pattern, beginning, re.DOTALL)), "")


def suffixes() -> set[str]:
    """Returns the suffixes of image files, in lower case, by the formats that Pillow registers for them."""
    return {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}


def unreadable(beginning: bytes) -> str:
    """Returns the format of an image that Pillow cannot read and a remedy, or "" for other files.

    Args:
      beginning: the first `BEGINNING` bytes.
    """
    found = format_of(beginning[:BEGINNING])
    return "" if found in FORMATS else _UNREADABLE.get(found, "")
