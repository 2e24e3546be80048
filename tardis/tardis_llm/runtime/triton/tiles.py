"""Device functions that the kernels share: products of a tile of rows, and the mathematics of neurons.

A program has a tile of `R` rows of a matrix and `T` tokens. `T` is 1, which multiplies element by element in fp32, or
16 and more, which multiplies on tensor cores, tokens beyond the last one being zeros. Weights are read once and marked
to leave the caches first; inputs stay in them.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def dot(a, b, total):
    """The sum with the product of two tiles; Triton's interpreter takes bf16 for integers."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def inputs(x, token, tokens, column, ENDS: tl.constexpr, COLUMNS: tl.constexpr, T: tl.constexpr):
    """[T, columns] of inputs x [tokens, COLUMNS], zeros beyond the last token, and the last column where there it ENDS."""
    inside = (token < tokens)[:, None]
    if ENDS:
        inside = inside & (column < COLUMNS)[None, :]
    return tl.load(x + token[:, None] * COLUMNS + column[None, :], mask=inside, other=0.0)


@triton.jit
def product(
    x,
    token,
    tokens,
    data,
    scale,
    row,
    ok,
    FORMAT: tl.constexpr,
    COLUMNS: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    STEP: tl.constexpr,
):
    """[T, R] fp32, inputs x times rows of a matrix [rows, COLUMNS]: of a dense one, or in few bits as FORMAT says."""
    if FORMAT[0] == 0:
        return dense_product(x, token, tokens, data, row, ok, COLUMNS, T, R, STEP)
    else:
        return low_bit_product(x, token, tokens, data, scale, row, ok, FORMAT, COLUMNS, T, R, STEP)


@triton.jit
def dense_product(
    x, token, tokens, weight, row, ok, COLUMNS: tl.constexpr, T: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr
):
    """[T, R] fp32, inputs x times rows of a weight [rows, COLUMNS] in their dtype."""
    if T == 1:
        total = tl.zeros([R, STEP], tl.float32)
    else:
        total = tl.zeros([T, R], tl.float32)
    for start in range(0, COLUMNS, STEP):
        column = start + tl.arange(0, STEP)
        some = inputs(x, token, tokens, column, COLUMNS % STEP, COLUMNS, T)
        inside = ok[:, None]
        if COLUMNS % STEP:
            inside = inside & (column < COLUMNS)[None, :]
        place = weight + row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
        numbers = tl.load(place, mask=inside, other=0.0, eviction_policy="evict_first")
        if T == 1:
            total += numbers.to(tl.float32) * some.to(tl.float32)
        else:
            total = dot(some, tl.trans(numbers), total)
    if T == 1:
        return tl.sum(total, 1)[None, :]
    else:
        return total


@triton.jit
def low_bit_product(
    x,
    token,
    tokens,
    data,
    scale,
    row,
    ok,
    FORMAT: tl.constexpr,
    COLUMNS: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    STEP: tl.constexpr,
):
    """[T, R] fp32, inputs x times rows of a matrix in few bits, as `Codes` has it: the sum of its parts' products."""
    BITS: tl.constexpr = FORMAT[0]
    of8: tl.constexpr = BITS // 8 % 2 * 16 * ((COLUMNS * 8 + 511) // 512)
    of4: tl.constexpr = BITS // 4 % 2 * 16 * ((COLUMNS * 4 + 511) // 512)
    of2: tl.constexpr = BITS // 2 % 2 * 16 * ((COLUMNS * 2 + 511) // 512)
    if T == 1:
        total = tl.zeros([R, STEP], tl.float32)
    else:
        total = tl.zeros([T, R], tl.float32)
    at = data + row.to(tl.int64) * FORMAT[3]
    scales = scale + row.to(tl.int64) * ((COLUMNS + FORMAT[1] - 1) // FORMAT[1])
    if BITS & 8:
        total = _part(total, x, token, tokens, at, scales, ok, FORMAT, COLUMNS, T, STEP, 8)
    if BITS & 4:
        total = _part(total, x, token, tokens, at + of8, scales, ok, FORMAT, COLUMNS, T, STEP, 4)
    if BITS & 2:
        total = _part(total, x, token, tokens, at + (of8 + of4), scales, ok, FORMAT, COLUMNS, T, STEP, 2)
    if BITS & 1:
        total = _part(total, x, token, tokens, at + (of8 + of4 + of2), scales, ok, FORMAT, COLUMNS, T, STEP, 1)
    if T == 1:
        return tl.sum(total, 1)[None, :]
    else:
        return total


@triton.jit
def _part(
    total,
    x,
    token,
    tokens,
    at,
    scales,
    ok,
    FORMAT: tl.constexpr,
    COLUMNS: tl.constexpr,
    T: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The sum with the product of a part of `WIDTH` bits: steps of which every column is there, and the last one."""
    WORDS: tl.constexpr = (COLUMNS * WIDTH + 511) // 512 * 16
    WHOLE: tl.constexpr = COLUMNS * WIDTH // 512 * 16 // STEP * STEP
    for start in range(0, WHOLE, STEP):
        total = _words(total, x, token, tokens, at, scales, ok, start, FORMAT, COLUMNS, T, STEP, WIDTH, 0)
    if WHOLE < WORDS:
        total = _words(total, x, token, tokens, at, scales, ok, WHOLE, FORMAT, COLUMNS, T, STEP, WIDTH, WORDS)
    return total


@triton.jit
def _words(
    total,
    x,
    token,
    tokens,
    at,
    scales,
    ok,
    start,
    FORMAT: tl.constexpr,
    COLUMNS: tl.constexpr,
    T: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    END: tl.constexpr,
):
    """The sum with the product of STEP words of a part, up to the word END if that is not 0.

    The fields of a word that have one scale are added up before they are scaled, where one token is multiplied.
    """
    GROUP: tl.constexpr = FORMAT[1]
    SPAN: tl.constexpr = 512 // WIDTH
    SHARED: tl.constexpr = (GROUP % 16 == 0) and ((SPAN % GROUP == 0) or (GROUP % SPAN == 0))
    EVERY: tl.constexpr = (GROUP if GROUP < SPAN else SPAN) // 16 if SHARED else 1
    word = start + tl.arange(0, STEP)
    there = ok[:, None]
    if END:
        there = there & (word < END)[None, :]
    some = tl.load(at[:, None] + word[None, :], mask=there, other=0, eviction_policy="evict_first")
    first = word // 16 * SPAN + word % 16
    for field in tl.static_range(32 // WIDTH):
        column = first + field * 16
        numbers = inputs(x, token, tokens, column, END, COLUMNS, T)
        level = _level(some, field, FORMAT, WIDTH)
        if field % EVERY == 0:
            steps = steps_of(scales, there, column, END, COLUMNS, GROUP)
        if T == 1:
            if field % EVERY == 0:
                part = level * numbers.to(tl.float32)
            else:
                part += level * numbers.to(tl.float32)
            if (field + 1) % EVERY == 0:
                total += part * steps
        else:
            total = dot(numbers, tl.trans((level * steps).to(x.dtype.element_ty)), total)
    return total


@triton.jit
def _level(words, FIELD: tl.constexpr, FORMAT: tl.constexpr, WIDTH: tl.constexpr):
    """fp32 levels of a field of words, times what a code of this part counts.

    Each part is symmetric around 0, but for the lowest one, which has what is left of the middle of all. The field
    becomes the end of the mantissa of 2^23 + code 2^AT, from which one fused step makes the level. AT is not 0, where
    half a level would be lost.
    """
    UNIT: tl.constexpr = 2.0 ** (FORMAT[0] & (WIDTH - 1))
    LOWEST: tl.constexpr = (FORMAT[0] & (WIDTH - 1)) == 0
    MIDDLE: tl.constexpr = UNIT * (2**WIDTH - 1) / 2 + LOWEST * (FORMAT[2] - (2 ** FORMAT[0] - 1) / 2)
    AT: tl.constexpr = FIELD * WIDTH % 16 + 1
    if FIELD * WIDTH < 16:
        moved = words << 1
    else:
        moved = words >> 15
    number = ((moved & ((2**WIDTH - 1) << AT)) | 0x4B000000).to(tl.float32, bitcast=True)
    return number * (UNIT / 2.0**AT) - (8388608.0 * UNIT / 2.0**AT + MIDDLE)


@triton.jit
def steps_of(scales, there, column, END: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """[R, columns] fp32 scales of some columns."""
    if END:
        there = there & (column < COLUMNS)[None, :]
    return tl.load(scales[:, None] + (column // GROUP)[None, :], mask=there, other=0.0).to(tl.float32)


@triton.jit
def levels_of_line(at, ok, FORMAT: tl.constexpr, R: tl.constexpr):
    """[R, 512 / bits] fp32 levels of one line, of codes with 1, 2, 4 or 8 bits."""
    BITS: tl.constexpr = FORMAT[0]
    words = tl.load(at[:, None] + tl.arange(0, 16)[None, :], mask=ok[:, None], other=0, eviction_policy="evict_first")
    shift = tl.arange(0, 32 // BITS) * BITS
    code = (words[:, None, :] >> shift[None, :, None]) & (2**BITS - 1)
    return tl.reshape((code | 0x4B000000).to(tl.float32, bitcast=True), [R, 512 // BITS]) - 8388608.0 - FORMAT[2]


@triton.jit
def codes_of(at, there, column, FORMAT: tl.constexpr, COLUMNS: tl.constexpr):
    """[R, columns] fp32 codes of some columns, their parts put together."""
    BITS: tl.constexpr = FORMAT[0]
    of8: tl.constexpr = BITS // 8 % 2 * 16 * ((COLUMNS * 8 + 511) // 512)
    of4: tl.constexpr = BITS // 4 % 2 * 16 * ((COLUMNS * 4 + 511) // 512)
    of2: tl.constexpr = BITS // 2 % 2 * 16 * ((COLUMNS * 2 + 511) // 512)
    code = _codes_of_part(at, there, column, BITS, 8)
    code += _codes_of_part(at + of8, there, column, BITS, 4)
    code += _codes_of_part(at + (of8 + of4), there, column, BITS, 2)
    code += _codes_of_part(at + (of8 + of4 + of2), there, column, BITS, 1)
    return code.to(tl.float32)


@triton.jit
def _codes_of_part(at, there, column, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """[R, columns] int32 what a part adds to codes; 0 of a part that they do not have."""
    if BITS & WIDTH:
        word = column // (512 // WIDTH) * 16 + column % 16
        words = tl.load(at[:, None] + word[None, :], mask=there, other=0)
        shift = column % (512 // WIDTH) // 16 * WIDTH
        return ((words >> shift[None, :]) & (2**WIDTH - 1)) << (BITS & (WIDTH - 1))
    else:
        return tl.zeros([at.shape[0], column.shape[0]], tl.int32)


@triton.jit
def activated(z, KIND: tl.constexpr, p0, p1, p2, p3):
    """The activation of a kind, with its parameters where it has some, of fp32 numbers; NaN stays NaN."""
    if KIND == "gelu":
        return 0.5 * z * (1 + tl.math.erf(z * 0.7071067811865476))
    elif KIND == "gelu_tanh":  # (1 + tanh(u)) / 2 is sigmoid(2 u)
        return z / (1 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    elif KIND == "quick_gelu":
        return z / (1 + tl.exp(-1.702 * z))
    elif KIND == "silu":
        return z / (1 + tl.exp(-z))
    elif KIND == "relu":
        return tl.where(z < 0, 0.0, z)
    elif KIND == "relu2":
        return tl.where(z < 0, 0.0, z * z)
    else:
        tl.static_assert(KIND == "xielu")
        least = tl.where(z > p3, p3, z)
        below = p1 * (tl.exp(least) - 1 - z)
        return tl.where(z > 0, p0 * z * z, below) + p2 * z


@triton.jit
def left_by_lines(v, up, slope, offset, neuron, ok, count, KIND: tl.constexpr, K: tl.constexpr, p0, p1, p2, p3):
    """[T, R] what the lines of neurons leave of their values, by pre-activations v, of gated ones by gates v and ups."""
    line = tl.load(slope + neuron, mask=ok, other=0.0).to(tl.float32)[None, :] * v
    value = activated(v, KIND, p0, p1, p2, p3)
    if K == 2:
        line += tl.load(slope + count + neuron, mask=ok, other=0.0).to(tl.float32)[None, :] * up
        value = value * up
    return value - line - tl.load(offset + neuron, mask=ok, other=0.0).to(tl.float32)[None, :]
