"""The kernels of a folded FFN, in the order in which they run, and of a linear layer.

    predict     which neurons each token fixes, and, where fixing needs them, the predicted pre-activations
    gather      numbers of the neurons that some token fixes, one after the other, and how many they are
    residuals   what the lines of these leave of their values, by their rows of W1
    correct     the residuals times their rows of W2, in some parts that are still to be added up
    multiply    the fold's product, the bias, and the sum of these parts: the output; or a linear layer
    write_out   a matrix in few bits as numbers

Grids, loops of constant bounds and memory depend on shapes only. What depends on data is a number that programs load,
and the loops that it bounds: nothing waits for the host. Sums are in an order that does not depend on timing.

A matrix is its data and its scales, with FORMAT (bits, group size, middle, words of a row), or (0, 0, 0, 0) of a dense
one without scales.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import codes_of, dot, left_by_lines, levels_of_line, product, steps_of


@triton.jit
def predict(x, data, scale, bias, low, high, slope, offset, fixed, some, predicted, tokens, count, p0, p1, p2, p3,
            FORMAT: tl.constexpr, COLUMNS: tl.constexpr, T: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr,
            KIND: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """Of R neurons and T tokens: fixed [tokens, count], some [count], predicted [tokens, K count] if it is there."""
    neuron = tl.program_id(0) * R + tl.arange(0, R)
    ok = neuron < count
    token = tl.program_id(1) * T + tl.arange(0, T)
    v = product(x, token, tokens, data, scale, neuron, ok, FORMAT, COLUMNS, T, R, STEP)
    if bias is not None:
        v += tl.load(bias + neuron, mask=ok, other=0.0).to(tl.float32)[None, :]
    tested = v
    both = ok[None, :] & (token < tokens)[:, None]
    if predicted is not None:
        tl.store(predicted + token[:, None] * K * count + neuron[None, :], v, mask=both)
    if K == 2:
        up = product(x, token, tokens, data, scale, neuron + count, ok, FORMAT, COLUMNS, T, R, STEP)
        if bias is not None:
            up += tl.load(bias + count + neuron, mask=ok, other=0.0).to(tl.float32)[None, :]
        if predicted is not None:
            tl.store(predicted + token[:, None] * K * count + (count + neuron)[None, :], up, mask=both)
        tested = left_by_lines(v, up, slope, offset, neuron, ok, count, KIND, K, p0, p1, p2, p3)
    least = tl.load(low + neuron, mask=ok, other=0.0).to(tl.float32)[None, :]
    most = tl.load(high + neuron, mask=ok, other=0.0).to(tl.float32)[None, :]
    outside = tl.where((tested >= least) & (tested <= most), 0, 1)  # NaN is outside
    tl.store(fixed + token[:, None] * count + neuron[None, :], outside.to(tl.int8), mask=both)
    if some is not None:
        tl.store(some + neuron, tl.max(tl.where(both, outside, 0), 0).to(tl.int8), mask=ok)


@triton.jit
def gather(some, neurons, found, count, SIZE: tl.constexpr):
    """Of SIZE neurons: those with a mark, behind those of the programs before; the last one writes how many."""
    program = tl.program_id(0)
    place = tl.arange(0, SIZE)
    before = tl.zeros([SIZE], tl.int32)
    for earlier in range(program):
        before += tl.load(some + earlier * SIZE + place).to(tl.int32)
    neuron = program * SIZE + place
    marked = tl.load(some + neuron, mask=neuron < count, other=0).to(tl.int32)
    end = tl.sum(before, 0) + tl.cumsum(marked, 0)
    tl.store(neurons + end - 1, neuron, mask=marked != 0)
    if program == tl.num_programs(0) - 1:
        tl.store(found, tl.max(end, 0))


@triton.jit
def residuals(x, data, scale, bias, slope, offset, fixed, predicted, neurons, found, left, tokens, count, p0, p1, p2, p3,
              FORMAT: tl.constexpr, COLUMNS: tl.constexpr, T: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr,
              KIND: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """left [tokens, count] fp32 of the neurons that were found, R at a time; zero for tokens that do not fix them.

    Pre-activations are those predicted, which have the bias, and what data and scale add; or all of these, and the bias.
    """
    token = tl.arange(0, T)
    amount = tl.load(found)
    for start in range(tl.program_id(0) * R, amount, tl.num_programs(0) * R):
        slot = start + tl.arange(0, R)
        ok = slot < amount
        neuron = tl.load(neurons + slot, mask=ok, other=0)
        both = ok[None, :] & (token < tokens)[:, None]
        v = pre_activations(x, token, tokens, data, scale, bias, predicted, neuron, ok, both, K * count, FORMAT, COLUMNS, T, R, STEP)  # fmt: skip
        up = v
        if K == 2:
            row = neuron + count
            up = pre_activations(x, token, tokens, data, scale, bias, predicted, row, ok, both, K * count, FORMAT, COLUMNS, T, R, STEP)  # fmt: skip
        residual = left_by_lines(v, up, slope, offset, neuron, ok, count, KIND, K, p0, p1, p2, p3)
        own = tl.load(fixed + token[:, None] * count + neuron[None, :], mask=both, other=0)
        tl.store(left + token[:, None] * count + slot[None, :], tl.where(own != 0, residual, 0.0), mask=both)


@triton.jit
def pre_activations(x, token, tokens, data, scale, bias, predicted, row, ok, both, rows, FORMAT: tl.constexpr,
                    COLUMNS: tl.constexpr, T: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr):  # fmt: skip
    """[T, R] fp32 of some rows of W1, beyond what was predicted of them."""
    if predicted is not None:
        v = tl.load(predicted + token[:, None] * rows + row[None, :], mask=both, other=0.0)
    else:
        v = tl.zeros([T, R], tl.float32)
        if bias is not None:
            v += tl.load(bias + row, mask=ok, other=0.0).to(tl.float32)[None, :]
    if data is not None:
        v += product(x, token, tokens, data, scale, row, ok, FORMAT, COLUMNS, T, R, STEP)
    return v


@triton.jit
def correct(data, scale, left, neurons, found, parts, tokens, count, FORMAT: tl.constexpr, COLUMNS: tl.constexpr,
            T: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """parts [programs of axis 1, tokens, COLUMNS] fp32: residuals times rows of W2, R at a time, of STEP columns.

    In few bits, these are the columns of one line.
    """
    token = tl.arange(0, T)
    column = tl.program_id(0) * STEP + tl.arange(0, STEP)
    amount = tl.load(found)
    if T == 1:
        total = tl.zeros([R, STEP], tl.float32)
    else:
        total = tl.zeros([T, STEP], tl.float32)
    for start in range(tl.program_id(1) * R, amount, tl.num_programs(1) * R):
        slot = start + tl.arange(0, R)
        ok = slot < amount
        neuron = tl.load(neurons + slot, mask=ok, other=0).to(tl.int64)
        mine = ok[None, :] & (token < tokens)[:, None]
        size = tl.load(left + token[:, None] * count + slot[None, :], mask=mine, other=0.0)
        inside = ok[:, None] & (column < COLUMNS)[None, :]
        if FORMAT[0] == 0:
            place = data + neuron[:, None] * COLUMNS + column[None, :]
            numbers = tl.load(place, mask=inside, other=0.0, eviction_policy="evict_first")
        else:
            line = data + neuron * FORMAT[3] + tl.program_id(0) * 16
            scales = scale + neuron * ((COLUMNS + FORMAT[1] - 1) // FORMAT[1])
            numbers = levels_of_line(line, ok, FORMAT, R) * steps_of(
                scales, ok[:, None], column, True, COLUMNS, FORMAT[1]
            )
        if T == 1:
            total += numbers.to(tl.float32) * tl.trans(size)
        else:
            total = dot(size.to(DTYPE), numbers.to(DTYPE), total)
    if T == 1:
        total = tl.sum(total, 0)[None, :]
    place = parts + (tl.program_id(1) * tokens + token[:, None]) * COLUMNS + column[None, :]
    tl.store(place, total, mask=(token < tokens)[:, None] & (column < COLUMNS)[None, :])


@triton.jit
def multiply(x, data, scale, bias, parts, y, tokens, rows, FORMAT: tl.constexpr, COLUMNS: tl.constexpr, T: tl.constexpr,
             R: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """y [tokens, rows]: x times a matrix [rows, COLUMNS], a bias, and the sum of parts [PARTS, tokens, rows]; each may
    be missing."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    ok = row < rows
    token = tl.program_id(1) * T + tl.arange(0, T)
    both = ok[None, :] & (token < tokens)[:, None]
    total = tl.zeros([T, R], tl.float32)
    if data is not None:
        total += product(x, token, tokens, data, scale, row, ok, FORMAT, COLUMNS, T, R, STEP)
    if bias is not None:
        total += tl.load(bias + row, mask=ok, other=0.0).to(tl.float32)[None, :]
    if parts is not None:
        for part in range(PARTS):
            total += tl.load(parts + (part * tokens + token[:, None]) * rows + row[None, :], mask=both, other=0.0)
    tl.store(y + token[:, None] * rows + row[None, :], total.to(y.dtype.element_ty), mask=both)


@triton.jit
def write_out(
    data, scale, numbers, rows, FORMAT: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr
):
    """numbers [rows, COLUMNS] of a matrix in few bits; a program has R rows of STEP columns."""
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    column = tl.program_id(1) * STEP + tl.arange(0, STEP)
    ok = (row < rows)[:, None]
    there = ok & (column < COLUMNS)[None, :]
    code = codes_of(data + row * FORMAT[3], there, column, FORMAT, COLUMNS)
    scales = scale + row * ((COLUMNS + FORMAT[1] - 1) // FORMAT[1])
    number = (code - FORMAT[2]) * steps_of(scales, ok, column, True, COLUMNS, FORMAT[1])
    place = numbers + row[:, None] * COLUMNS + column[None, :]
    tl.store(place, number.to(numbers.dtype.element_ty), mask=there)
