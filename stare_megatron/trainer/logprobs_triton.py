"""The same as `logprobs_torch`, as Triton kernels for NVIDIA GPUs: one read forward, one read and one write backward.

The columns of a row must lie side by side. Nothing here makes the host wait: the kernels skip rows without a target.

Forward, one program works on one row. Each of its lanes keeps partials of every LANES-th group of WIDTH columns (one
wide load). It takes in GROUPS of them at a time and rescales once for them, so that an element costs little more than
its own exponential; lanes meet once, at the end. What does not fill all lanes GROUPS times is loaded with a mask.
Exponentials are of base 2, the hardware's; the scale log2(e) / tau is applied after the maximum is subtracted.

Sizes were measured on an H100, but for GROUPS, which was chosen by the number of instructions (docs/gpu.md). Rows too
few to fill the GPU are not split over several programs: merging what those know takes longer than a program takes for a
row of 151,936 columns.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from stare_megatron.trainer import partials as algebra
from stare_megatron.trainer.partials import Merged, VocabShard

GROUPS = 2
LANES = 256
LOAD_BYTES = 16  # the widest load
BACKWARD_BLOCK = 4096  # columns a program of the backward works on
FORWARD_WARPS = 8
BACKWARD_WARPS = 8

_PER_ROW = ["target", "m", "log_s", "entropy", "grad_logprob", "grad_entropy"]
_NO_TARGET = tl.constexpr(algebra.NO_TARGET)
_FLOOR = tl.constexpr(algebra.FLOOR)
_FLOOR_2 = tl.constexpr(algebra.FLOOR * math.log2(math.e))
_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2.0))
_INF = tl.constexpr(math.inf)


@triton.jit
def _taken_in(x, m, s, u, q, r, w, scale, SENSITIVITY: tl.constexpr, RAW: tl.constexpr):
    """Partials of the lanes, fp32 [LANES], with the columns x [GROUPS, LANES, WIDTH] added to them."""
    top = tl.maximum(m, tl.max(tl.max(x, axis=2), axis=0))
    shift = tl.where(top == -_INF, 0.0, top)
    offset = tl.maximum((m - shift) * scale, _FLOOR_2)
    a = tl.exp2(offset)
    x -= shift[None, :, None]
    d = tl.maximum(x * scale, _FLOOR_2, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp2(d)
    u = tl.fma(a, tl.fma(offset, s, u), _by_lane(d * e))
    s = tl.fma(a, s, _by_lane(e))
    if SENSITIVITY:
        e2 = e * e
        r = tl.fma(a * a, tl.fma(offset, q, r), _by_lane(d * e2))
        q = tl.fma(a * a, q, _by_lane(e2))
    if RAW:
        b = tl.exp2(tl.maximum((m - shift) * _LOG2_E, _FLOOR_2))
        e1 = tl.exp2(tl.maximum(x * _LOG2_E, _FLOOR_2, propagate_nan=tl.PropagateNan.ALL))
        w = tl.fma(b, w, _by_lane(e1))
    return top, s, u, q, r, w


@triton.jit
def _by_lane(x):
    return tl.sum(tl.sum(x, axis=2), axis=0)


# Compiled once, whatever the number of rows and where the slices of a chunked head begin.
@triton.jit(do_not_specialize=["num_rows", "start"], do_not_specialize_on_alignment=["target", "out"])
def partials_kernel(
    logits,  # [T, V_local]
    target,  # int64 [T]
    out,  # fp32 [K, T]
    row_stride,
    num_rows,
    start,
    valid,
    scale,  # log2(e) / tau
    K: tl.constexpr,  # rows of `out`
    SENSITIVITY: tl.constexpr,
    RAW: tl.constexpr,
    GROUPS: tl.constexpr,  # a power of two, as LANES and WIDTH
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(target + row)
    end = tl.where(wanted == _NO_TARGET, 0, valid)
    of_row = logits + row * row_stride

    columns = tl.arange(0, LANES)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    some = tl.arange(0, GROUPS)[:, None, None] * (LANES * WIDTH) + columns
    m = tl.full([LANES], -_INF, tl.float32)
    s = tl.full([LANES], 0.0, tl.float32)
    u = tl.full([LANES], 0.0, tl.float32)
    q = tl.full([LANES], 0.0, tl.float32)
    r = tl.full([LANES], 0.0, tl.float32)
    w = tl.full([LANES], 0.0, tl.float32)
    whole = end // (GROUPS * LANES * WIDTH) * (GROUPS * LANES * WIDTH)
    for first in range(0, whole, GROUPS * LANES * WIDTH):
        x = tl.load(of_row + first + some).to(tl.float32)
        m, s, u, q, r, w = _taken_in(x, m, s, u, q, r, w, scale, SENSITIVITY, RAW)
    for first in range(whole, end, LANES * WIDTH):
        place = first + columns
        x = tl.load(of_row + place, mask=place < end, other=-_INF).to(tl.float32)
        m, s, u, q, r, w = _taken_in(x, m, s, u, q, r, w, scale, SENSITIVITY, RAW)

    top = tl.max(m, axis=0)
    shift = tl.where(top == -_INF, 0.0, top)
    offset = tl.maximum((m - shift) * scale, _FLOOR_2)
    a = tl.exp2(offset)
    local = wanted - start
    z = tl.load(of_row + local, mask=(local >= 0) & (local < end), other=-_INF).to(tl.float32)
    result = out + row
    tl.store(result, top)
    tl.store(result + num_rows, tl.sum(a * s, axis=0))
    tl.store(result + 2 * num_rows, tl.sum(a * tl.fma(offset, s, u), axis=0) * _LN_2)
    tl.store(result + 3 * num_rows, z)
    if SENSITIVITY:
        tl.store(result + 4 * num_rows, tl.sum(a * a * q, axis=0))
        tl.store(result + 5 * num_rows, tl.sum(a * a * tl.fma(offset, q, r), axis=0) * _LN_2)
    if RAW:
        b = tl.exp2(tl.maximum((m - shift) * _LOG2_E, _FLOOR_2))
        tl.store(result + (K - 1) * num_rows, tl.sum(b * w, axis=0))


@triton.jit(do_not_specialize=["start"], do_not_specialize_on_alignment=_PER_ROW)
def backward_kernel(
    logits,  # [T, V_local], overwritten
    target,  # int64 [T]
    m,  # float64 [T], as log_s and entropy
    log_s,
    entropy,
    grad_logprob,  # fp32 [T], as grad_entropy
    grad_entropy,
    row_stride,
    blocks,
    columns,
    start,
    valid,
    inverse_tau,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    x_at = logits + row * row_stride + place
    inside = place < columns
    wanted = tl.load(target + row)
    if wanted == _NO_TARGET:
        tl.store(x_at, tl.full([BLOCK], 0.0, logits.dtype.element_ty), mask=inside)
    else:
        real = place < valid
        x = tl.load(x_at, mask=real, other=-_INF).to(tl.float32)
        d = (x - tl.load(m + row).to(tl.float32)) * inverse_tau
        log_p = tl.maximum(d - tl.load(log_s + row).to(tl.float32), _FLOOR, propagate_nan=tl.PropagateNan.ALL)
        g = tl.load(grad_logprob + row) * inverse_tau
        slope = g
        if ENTROPY:
            g_entropy = tl.load(grad_entropy + row) * inverse_tau
            slope = tl.fma(g_entropy, log_p + tl.load(entropy + row).to(tl.float32), g)
        grad = tl.where(place == wanted - start, g, 0.0) - tl.exp(log_p) * slope
        tl.store(x_at, tl.where(real, grad, 0.0).to(logits.dtype.element_ty), mask=inside)


def partials(
    logits_TV: torch.Tensor, target_T: torch.Tensor, shard: VocabShard, tau: float, *, sensitivity: bool, raw: bool
) -> torch.Tensor:
    """As `logprobs_torch.partials`."""
    rows = len(target_T)
    kinds = algebra.components(sensitivity=sensitivity, raw=raw)
    partial_KT = torch.empty((kinds, rows), dtype=torch.float32, device=logits_TV.device)
    if rows:
        partials_kernel[(rows,)](
            logits_TV,
            target_T,
            partial_KT,
            logits_TV.stride(0),
            rows,
            shard.start,
            shard.valid,
            math.log2(math.e) / tau,
            K=kinds,
            SENSITIVITY=sensitivity,
            RAW=raw,
            GROUPS=GROUPS,
            LANES=LANES,
            WIDTH=LOAD_BYTES // logits_TV.element_size(),
            num_warps=FORWARD_WARPS,  # pyright: ignore[reportCallIssue]
            enable_fp_fusion=True,  # pyright: ignore[reportCallIssue]
        )
    return partial_KT


def backward_in_place(
    logits_TV: torch.Tensor,
    grad_logprob_T: torch.Tensor,
    grad_entropy_T: torch.Tensor | None,
    target_T: torch.Tensor,
    row: Merged,
    shard: VocabShard,
    tau: float,
) -> None:
    """As `logprobs_torch.backward_in_place`."""
    rows, columns = logits_TV.shape
    if not rows or not columns:
        return
    blocks = triton.cdiv(columns, BACKWARD_BLOCK)
    grad_logprob_T = grad_logprob_T.float().contiguous()
    backward_kernel[(rows * blocks,)](
        logits_TV,
        target_T,
        row.m_T.contiguous(),
        row.log_s_T.contiguous(),
        row.entropy(),
        grad_logprob_T,
        grad_logprob_T if grad_entropy_T is None else grad_entropy_T.float().contiguous(),  # not read if None
        logits_TV.stride(0),
        blocks,
        columns,
        shard.start,
        shard.valid,
        1.0 / tau,
        ENTROPY=grad_entropy_T is not None,
        BLOCK=BACKWARD_BLOCK,
        num_warps=BACKWARD_WARPS,  # pyright: ignore[reportCallIssue]
        enable_fp_fusion=True,  # pyright: ignore[reportCallIssue]
    )
