"""Image files with a content of every kind, as bytes."""

import io
import struct

import numpy as np


def encoded(image, kind="PNG", **options):
    """An image as a file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(values, *, bits=None, width=None, photometric=1, kind=1, extra=None, byte_order="<"):
    """An uncompressed TIFF file, also of kinds that Pillow does not write.

    Args:
        values: (H, W, bands), as stored.
        bits: Of a sample; ``None``: those of the values' type.
        width: Of the image; ``None``: that of the values.
        photometric: 0: white is zero, 1: black is zero, 2: RGB.
        kind: 1: unsigned, 2: signed, 3: floating-point.
        extra: What the bands beside the colours are; 0: not stated, 2: alpha.
        byte_order: As for ``struct``.
    """
    values = np.asarray(values)
    height, stored_width, bands = values.shape
    data = values.astype(values.dtype.newbyteorder(byte_order)).tobytes()
    bits = bits or 8 * values.itemsize
    tags = {
        256: [width or stored_width],
        257: [height],
        258: [bits] * bands,
        259: [1],
        262: [photometric],
    }
    tags |= {273: [8], 277: [bands], 278: [height], 279: [len(data)]}
    tags |= {284: [1], 339: [kind] * bands}
    if extra is not None:
        tags[338] = extra
    first = 8 + len(data) + len(data) % 2
    after = first + 2 + 12 * len(tags) + 4
    entries, tail = b"", b""
    for tag, numbers in sorted(tags.items()):
        content = struct.pack(f"{byte_order}{len(numbers)}H", *numbers)
        if len(content) > 4:
            offset = after + len(tail)
            tail += content + bytes(len(content) % 4)
            content = struct.pack(f"{byte_order}I", offset)
        entries += struct.pack(f"{byte_order}HHI", tag, 3, len(numbers)) + content.ljust(4, b"\0")
    header = (b"II*\0" if byte_order == "<" else b"MM\0*") + struct.pack(f"{byte_order}I", first)
    count = struct.pack(f"{byte_order}H", len(tags))
    return header + data.ljust(first - 8, b"\0") + count + entries + bytes(4) + tail
