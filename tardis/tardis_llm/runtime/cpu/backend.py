"""The CPU backend: folded FFNs and linear layers by compiled kernels, for bf16, fp16 and fp32.

Sums are in fp32 throughout. Where inputs meet a low-bit matrix they are rounded to 8 bits, with one scale per token and
group of columns, 512 at most; so what a predictor finds differs from the reference for few neurons that are next to a
bound. Residuals that meet a low-bit W2 may be rounded to 16 bits, with one scale for up to eight of them. What a token
gets does not depend on the others in its batch; in its last bits it may depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...ffn.packed import PackedMatrix
from ...ffn.weights import FoldedWeights, Layout
from ...ffn.weights import Matrix as AnyMatrix
from .code_rows import CodeRows
from .library import ISAS, available, can_be_code_rows, can_be_in_panels, kernels, loaded
from .operators import ACTIVATION_BITS, DTYPES, batches, check_inputs, multiplies, readable
from .panels import Panels
from .structures import FFN, Activation, Batch, Head, Matrix, Vector

_SAMPLED = 16  # tokens of a prompt on which fixed neurons are counted


def _pays_to_compute_all(d: int) -> float:
    """Share of fixed neurons from which the fold of a prompt takes longer than all neurons in fp32, with AVX2.

    Measured for the shapes of Qwen2.5-0.5B, Llama-3-8B and Falcon-7B: 0.3 at d = 896, between 0.4 and 0.5 at d = 4096
    and 0.5 at d = 4544. What a fixed neuron costs beside the reading of its rows counts for more where these are short.
    """
    return 0.54 * d / (d + 750)


class CpuFFN:
    """A folded FFN by the kernels, its arguments put together once.

    Args:
        weights: whose tensors must neither move nor change.
        activation_bits: of inputs where they meet a low-bit matrix, 8 or 16. A predictor that only selects, beside
            dense weights, never gets more than 8.

    Raises:
        TardisError: the kernels cannot read the weights.
    """

    def __init__(self, weights: FoldedWeights, activation_bits: int = ACTIVATION_BITS) -> None:
        self._kernels = loaded()
        self._weights = weights  # keeps alive what the kernels read
        neurons, predictor = weights.neurons, weights.predictor
        assert isinstance(predictor, PackedMatrix | Panels), "the predictor is in few bits"
        self._d, self._h = predictor.columns, neurons.count
        predicted = (None, None, None) if weights.static else (predictor, weights.up, weights.down)
        kept = weights.kept_up, weights.kept_down
        matrices = [Matrix.of(matrix) for matrix in (weights.fold, *predicted, *kept)]
        h, k = self._h, weights.k
        vectors = weights.bias, weights.b1, *neurons.tensors, weights.kept_bias
        sizes = self._d, k * h, h, h, k * h, h, k * weights.kept
        sized = [Vector.of(vector, size) for vector, size in zip(vectors, sizes, strict=True)]
        self._ffn = FFN(*matrices, *sized, Activation.of(neurons.activation), k, activation_bits)
        self._has_exact = weights.stacked and not weights.kept and self._kernels.has_exact_ffn(self._ffn)

    @property
    def arguments(self) -> FFN:
        """What the kernels get, for as long as this object lives."""
        return self._ffn

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs [tokens, d] for inputs x [tokens, d], contiguous."""
        return self._run(x, self._kernels.folded_ffn, torch.empty_like(x))

    def quick_exact(self, x: Tensor) -> bool:
        """Whether `exact` takes no longer than the fold for inputs x [tokens, d]: by tiles, or where many are fixed."""
        return self._has_kernel(x) and (self._kernels.has_low_bit_gemm or self._fixes_often(x))

    def exact(self, x: Tensor, b2: Tensor | None) -> Tensor:
        """Outputs [tokens, d] with every neuron computed, for inputs x [tokens, d], contiguous."""
        if not self._has_kernel(x):
            return self._weights.exact(x, b2)
        check_inputs(x, self._d)
        y = torch.empty_like(x)
        if len(x):
            self._kernels.exact_ffn(self._ffn, Vector.of(b2, self._d), Batch.of(x, y, ACTIVATION_BITS))
        return y

    def fixed(self, x: Tensor) -> Tensor:
        """[tokens, h] bool: the neurons that are fixed for inputs x [tokens, d], contiguous."""
        return self._run(x, self._kernels.fixed, torch.empty(len(x), self._h, dtype=torch.bool))

    def _has_kernel(self, x: Tensor) -> bool:
        return self._has_exact and x.dtype == torch.bfloat16

    def _fixes_often(self, x: Tensor) -> bool:
        """Whether so many neurons are fixed that computing all in fp32 takes no longer, by some of the tokens."""
        some = x[:: max(1, len(x) // _SAMPLED)].contiguous()
        return float(self.fixed(some).float().mean()) > _pays_to_compute_all(self._d)

    def _run(self, x: Tensor, kernel: Callable[[FFN, Batch], None], y: Tensor) -> Tensor:
        check_inputs(x, self._d)
        for batch in batches(x, y, ACTIVATION_BITS):
            kernel(self._ffn, batch)
        return y


class CpuBackend:
    """The kernels, where they are built and the processor has what they need."""

    name = "cpu"
    reads_stored = True
    dtypes: tuple[torch.dtype, ...] = DTYPES
    instruction_sets: tuple[str, ...] = ISAS

    def use(self, instruction_set: str) -> None:
        """Use an instruction set from now on, in every thread.

        Raises:
            InvalidInputError: processor or build lack it.
        """
        found = kernels()
        if found is not None:
            found.use(instruction_set)

    def accepts(self, x: Tensor) -> bool:
        """Whether the kernels are there and take inputs like x: some numbers in bf16, fp16 or fp32 in main memory."""
        return x.is_cpu and x.dtype in DTYPES and x.numel() > 0 and available()

    def lay_out(self, matrix: Tensor | PackedMatrix, dtype: torch.dtype, by_rows: bool = False) -> Layout | None:
        """A copy of the matrix in panels, or as code rows if its rows are added up, where it can be so."""
        device = (matrix if isinstance(matrix, Tensor) else matrix.planes).device
        if device.type != "cpu" or dtype not in DTYPES:
            return None
        if isinstance(matrix, PackedMatrix) and matrix.has_zero:  # fixing adds up its rows, nothing multiplies with it
            return CodeRows.of(matrix) if can_be_code_rows(matrix) else None
        return Panels.of(matrix) if not by_rows and can_be_in_panels(matrix) else None

    def prepare(self, weights: FoldedWeights, dtype: torch.dtype) -> CpuFFN | None:
        """A folded FFN for the kernels, if each matrix is contiguous in main memory and dense ones have this dtype."""
        predicted = weights.predictor, weights.up, weights.down
        matrices = weights.fold, *predicted, weights.kept_up, weights.kept_down
        return CpuFFN(weights) if all(readable(matrix, dtype) for matrix in matrices) else None

    def linear(self, x: Tensor, matrix: AnyMatrix, bias: Tensor | None) -> Tensor | None:
        """x W^T + bias; None for matrices of another dtype than x, and for others that no kernel multiplies."""
        rows, run = x.reshape(-1, x.shape[-1]).contiguous(), torch.ops.tardis.linear
        if isinstance(matrix, PackedMatrix):
            if matrix.has_zero:  # as above
                return None
            y = run(rows, matrix.planes, bias, matrix.scale, matrix.group_size)
        elif isinstance(matrix, Panels):
            if not readable(matrix, x.dtype):
                return None
            shape = {"outputs": matrix.rows, "bits": matrix.bits}
            y = run(rows, matrix.data, bias, matrix.scale, matrix.group_size, **shape)
        else:
            assert isinstance(matrix, Tensor), "there is no other order of memory on a CPU"
            if not multiplies(x, matrix):
                return None
            transposed = not matrix.is_contiguous()
            y = run(rows, matrix.T if transposed else matrix, bias, transposed=transposed)
        return y.view(*x.shape[:-1], y.shape[-1])

    def head(
        self, x: Tensor, predictor: AnyMatrix, remainder: AnyMatrix, bias: Tensor | None, top: int
    ) -> Tensor | None:
        """Logits [..., out] as `predicted_head` of the backends has them; None for matrices that lie otherwise."""
        if not isinstance(predictor, PackedMatrix | Panels) or not isinstance(remainder, PackedMatrix):
            return None
        if not (readable(predictor, x.dtype) and readable(remainder, x.dtype)):
            return None
        rows, head = x.reshape(-1, x.shape[-1]).contiguous(), Head.of(predictor, remainder, bias, top)
        check_inputs(rows, predictor.columns)
        y = rows.new_empty(len(rows), len(remainder.planes))
        for batch in batches(rows, y, ACTIVATION_BITS):
            loaded().head(head, batch)
        return y.view(*x.shape[:-1], y.shape[-1])
