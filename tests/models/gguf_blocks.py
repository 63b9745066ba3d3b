"""The block formats of GGUF, one value at a time, as ggml's block structs lay them out: slow, and obviously right or wrong."""

import struct


def half(content: bytes, at: int) -> float:
    return struct.unpack_from("<e", content, at)[0]


def nibble(content: bytes, at: int, i: int) -> int:
    """Value i of 32: the low halves of 16 bytes, then their high halves."""
    return content[at + i % 16] >> (4 * (i // 16)) & 15


def bit(content: bytes, at: int, i: int) -> int:
    return content[at + i // 8] >> (i % 8) & 1


def q8_0(b: bytes) -> list[float]:
    return [half(b, 0) * struct.unpack_from("<b", b, 2 + i)[0] for i in range(32)]


def q4_0(b: bytes) -> list[float]:
    return [half(b, 0) * (nibble(b, 2, i) - 8) for i in range(32)]


def q4_1(b: bytes) -> list[float]:
    return [half(b, 0) * nibble(b, 4, i) + half(b, 2) for i in range(32)]


def q5_0(b: bytes) -> list[float]:
    return [half(b, 0) * (nibble(b, 6, i) + 16 * bit(b, 2, i) - 16) for i in range(32)]


def q5_1(b: bytes) -> list[float]:
    return [half(b, 0) * (nibble(b, 8, i) + 16 * bit(b, 4, i)) + half(b, 2) for i in range(32)]


def scale_and_minimum(s: bytes, part: int) -> tuple[int, int]:
    """Of 8 parts, six bits each in 12 bytes: the first four plainly, the upper two bits of the others above those."""
    if part < 4:
        return s[part] & 63, s[part + 4] & 63
    low = s[part + 4]
    return (low & 15) | (s[part - 4] >> 6) << 4, (low >> 4) | (s[part] >> 6) << 4


def k_value(b: bytes, i: int, quant: int) -> float:
    """d · scale · quant − dmin · minimum, of value i of 256 in 8 parts of 32."""
    scale, minimum = scale_and_minimum(b[4:16], i // 32)
    return half(b, 0) * scale * quant - half(b, 2) * minimum


def k_nibble(content: bytes, at: int, i: int) -> int:
    """Value i of 256: each 64 share 32 bytes, the low halves first."""
    return content[at + i // 64 * 32 + i % 32] >> (4 * (i // 32 % 2)) & 15


def q4_k(b: bytes) -> list[float]:
    return [k_value(b, i, k_nibble(b, 16, i)) for i in range(256)]


def q5_k(b: bytes) -> list[float]:
    return [k_value(b, i, k_nibble(b, 48, i) + 16 * (b[16 + i % 32] >> i // 32 & 1)) for i in range(256)]


def q6_k(b: bytes) -> list[float]:
    """Halves of 128: 64 bytes of lower four bits, 32 bytes of upper two, eight signed scales; d is at the end."""
    values = []
    for i in range(256):
        side, place = divmod(i, 128)
        row, column = divmod(place, 32)  # four rows of 32 share the bytes of upper bits
        low = b[64 * side + 32 * (row % 2) + column] >> (4 * (row // 2)) & 15
        high = b[128 + 32 * side + column] >> (2 * row) & 3
        scale = struct.unpack_from("<b", b, 192 + i // 16)[0]
        values.append(half(b, 208) * scale * ((low | high << 4) - 32))
    return values
