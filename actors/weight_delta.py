"""What changed between two versions of the weights, exactly and small: for slow links.

Per bucket: the XOR with the base, its bytes sorted by significance (all first bytes, all second
bytes, ...), compressed. Where a small step leaves most numbers, or their upper bytes, as they were,
that is mostly zeros. Whoever applies it checks the digests of the whole image afterwards.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from actors.weight_update import ITEM_BYTES, WeightLayout, WeightsRejected

CODEC, LEVEL = "zstd", 1  # higher levels take several times as long for a few percent


def encode(layout: WeightLayout, base: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, ...]:
    """Two images, uint8 [total_bytes] -> one compressed array (uint8) a bucket."""
    codec, item = pa.Codec(CODEC, LEVEL), _item_bytes(layout)
    pieces = []
    for start, end in layout.buckets:
        changed = np.bitwise_xor(base[start:end], new[start:end])
        planes = np.ascontiguousarray(changed.reshape(-1, item).T)
        pieces.append(np.frombuffer(codec.compress(pa.py_buffer(planes)), np.uint8))
    return tuple(pieces)


def apply(layout: WeightLayout, pieces: tuple[np.ndarray, ...], image: np.ndarray) -> None:
    """Turn `image` (uint8 [total_bytes]), the base, into the new version, in place. Raises
    WeightsRejected if the pieces are none of this layout; then `image` is neither version."""
    codec, item = pa.Codec(CODEC, LEVEL), _item_bytes(layout)
    if len(pieces) != len(layout.buckets):
        raise WeightsRejected(f"{len(pieces)} pieces of a delta for {len(layout.buckets)} buckets")
    for piece, (start, end) in zip(pieces, layout.buckets, strict=True):
        try:
            planes = codec.decompress(pa.py_buffer(np.ascontiguousarray(piece)), end - start)
        except (OSError, ValueError) as error:
            raise WeightsRejected(f"a piece of a delta cannot be unpacked: {error}") from None
        changed = np.frombuffer(planes, np.uint8).reshape(item, -1).T
        image[start:end].reshape(-1, item)[...] ^= changed


def _item_bytes(layout: WeightLayout) -> int:
    return ITEM_BYTES[layout.tensors[0].dtype] if layout.tensors else 1
