"""Checks of an AVIF's boxes before Pillow reads the file.

An AVIF declares its size twice: in a box, which Pillow shows, and in the coded frame, which takes the memory. libavif
1.4 decodes a frame of up to 16384x16384 pixels for a box of 100x100. libavif also allocates for each box and for each
entry of a table.
"""

import itertools
import struct
from collections.abc import Iterator

MAX_BOXES = 10_000
MAX_TABLE = 1 << 20  # bytes of a table of items or samples
_CONTAINERS = {  # of other boxes -> bytes before these
    b"meta": 4, b"iprp": 0, b"ipco": 0, b"iinf": 6, b"iref": 4,
    b"moov": 0, b"trak": 0, b"mdia": 0, b"minf": 0, b"stbl": 0,
}  # fmt: skip
_LARGE = {b"mdat", b"idat", b"colr", b"free", b"skip", b"uuid", *_CONTAINERS}  # boxes that may have any size
_SEQUENCE_HEADER = 1  # type of AV1's OBU with the frame's size
_HEADER_BYTES = 64  # of a sequence header that are read


class ImageError(ValueError):
    """Bytes that are not a usable image; the message is the reason."""


def check(data: bytes) -> int:
    """Returns the pixels of the largest coded frame, 0 if no frame is found.

    Args:
      data: the bytes of the file.

    Raises:
      ImageError: the file has too many boxes or OBUs, or a table is too large.
    """
    idat, streams, av1, places = 0, [], set(), []
    try:
        for count, (kind, start, end) in enumerate(_boxes(data, 0, len(data))):
            if count > MAX_BOXES:
                raise ImageError(f"found an AVIF of over {MAX_BOXES} boxes")
            if kind not in _LARGE and end - start > MAX_TABLE:
                raise ImageError(f"found an AVIF with a table of {end - start} bytes, expected at most {MAX_TABLE}")
            if kind == b"idat":
                idat = start
            elif kind == b"infe":
                av1 |= _av1_item(data[start:end])
            elif kind == b"iloc":
                places += _items(data[start:end])
            elif kind in (b"stco", b"co64") and struct.unpack_from(">I", data, start + 4)[0]:
                # The first image of an animation begins the first chunk of its track.
                streams.append(data[struct.unpack_from(">I" if kind == b"stco" else ">Q", data, start + 8)[0] :])
    except (struct.error, IndexError):  # a box ends inside an entry: libavif refuses it
        pass
    for item, inside, extents in places:
        if item in av1 and sum(length for _, length in extents) <= len(data):
            base = idat if inside else 0
            streams.append(b"".join(data[base + at : base + at + (length or len(data))] for at, length in extents))
    sizes = [pixels for stream in streams for pixels in _frames(stream)]
    return max(sizes, default=0)


def _boxes(data: bytes, start: int, end: int, depth: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """Yields the type of each box, and the start and the end of its content; a container before its boxes."""
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        header = 8
        if size == 1 and start + 16 <= end:
            (size,), header = struct.unpack_from(">Q", data, start + 8), 16
        stop = end if size == 0 else min(start + size, end)
        if size and size < header:
            return
        yield kind, start + header, stop
        if kind in _CONTAINERS and depth < 8:
            # A table of items in version 0 counts in 16 bits, in other versions in 32.
            skip = _CONTAINERS[kind] + (
                2 if kind == b"iinf" and data[start + header : start + header + 1] > b"\0" else 0
            )
            yield from _boxes(data, start + header + skip, stop, depth + 1)
        start = stop


def _av1_item(box: bytes) -> set[int]:
    """Returns the id of an item that the box infe describes, if its type is av01."""
    wide = 2 * (box[0] > 2)
    return {int.from_bytes(box[4 : 6 + wide])} if box[8 + wide : 12 + wide] == b"av01" else set()


def _items(box: bytes) -> Iterator[tuple[int, bool, list[tuple[int, int]]]]:
    """Yields of each item of the box iloc: its id, True if it lies in idat, and the offset and length of its parts."""
    version, position = box[0], 6
    offset_bytes, length_bytes, base_bytes = box[4] >> 4, box[4] & 15, box[5] >> 4
    index_bytes = box[5] & 15 if version else 0

    def number(count: int) -> int:
        nonlocal position
        if position + count > len(box):
            raise IndexError
        position += count
        return int.from_bytes(box[position - count : position])

    id_bytes = 4 if version == 2 else 2
    for _ in range(number(id_bytes)):
        item = number(id_bytes)
        inside = bool(version and number(2) & 15 == 1)
        number(2)  # the file that holds the data: this one
        base, extents = number(base_bytes), []
        for _ in range(number(2)):
            number(index_bytes)
            extents.append((base + number(offset_bytes), number(length_bytes)))
        yield item, inside, extents


def _frames(stream: bytes) -> Iterator[int]:
    """Yields the pixels that each sequence header of an AV1 stream declares.

    A stream is a row of OBUs (AV1 specification 1.0, 5.3). The last may lack its size.
    """
    start = 0
    for count in itertools.count():
        if start + 2 > len(stream):
            return
        if count > MAX_BOXES:
            raise ImageError(f"found an AVIF of over {MAX_BOXES} OBUs")
        header = stream[start]
        start += 1 + (header >> 2 & 1)
        size, sized = 0, header >> 1 & 1
        for n in range(8 if sized else 0):
            byte = stream[start] if start < len(stream) else 0
            size, start = size | (byte & 127) << 7 * n, start + 1
            if byte < 128:
                break
        if header >> 3 & 15 == _SEQUENCE_HEADER:
            yield _declared_pixels(stream[start : start + _HEADER_BYTES])
        if not sized:
            return
        start += size


def _declared_pixels(header: bytes) -> int:
    """Returns the largest frame of a sequence header (AV1 specification 1.0, 5.5.1)."""
    bits = _Bits(header)
    bits.read(3)  # seq_profile
    bits.read(1)  # still_picture
    if bits.read(1):  # reduced_still_picture_header
        bits.read(5)
    else:
        delays, model = 0, 0
        if bits.read(1):  # timing_info_present_flag
            bits.read(64)
            if bits.read(1):  # equal_picture_interval
                bits.unsigned()
            if model := bits.read(1):  # decoder_model_info_present_flag
                delays = bits.read(5) + 1
                bits.read(42)
        initial = bits.read(1)  # initial_display_delay_present_flag
        for _ in range(bits.read(5) + 1):  # operating points
            bits.read(12)
            if bits.read(5) > 7:  # seq_level_idx
                bits.read(1)
            if model and bits.read(1):
                bits.read(2 * delays + 1)
            if initial and bits.read(1):
                bits.read(4)
    width_bits, height_bits = bits.read(4) + 1, bits.read(4) + 1
    width, height = bits.read(width_bits) + 1, bits.read(height_bits) + 1
    # A frame may declare another size in as many bits; encoders take as few as they need.
    if max(1, (width - 1).bit_length()) < width_bits:
        width = 1 << width_bits
    if max(1, (height - 1).bit_length()) < height_bits:
        height = 1 << height_bits
    return width * height


class _Bits:
    """Reads bits, the highest first; zeros after the end."""

    def __init__(self, data: bytes):
        self._value, self._left = int.from_bytes(data), 8 * len(data)

    def read(self, count: int) -> int:
        self._left -= count
        shifted = self._value >> self._left if self._left >= 0 else self._value << -self._left
        return shifted & ((1 << count) - 1)

    def unsigned(self) -> int:
        """Reads a number of AV1's variable-length code uvlc."""
        zeros = 0
        while self._left > 0 and not self.read(1):
            zeros += 1
        return self.read(zeros) + (1 << zeros) - 1 if zeros < 32 else 0
