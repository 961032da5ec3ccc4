"""The same as `logprobs_torch`, as Triton kernels for NVIDIA GPUs: one read forward, one read and one write backward.

The columns of a row must lie side by side. Nothing here makes the host wait: the kernels skip rows without a target.

Forward, one program works on one row. Each of its lanes keeps partials of every LANES-th group of WIDTH columns (one
wide load). It takes in GROUPS of them at a time and rescales once for them, so that an element costs little more than
its own exponential; lanes meet once, at the end. What does not fill all lanes GROUPS times is loaded with a mask.

What bounds the forward besides memory is the number of instructions, hence its form:
- Exponentials are of base 2, the hardware's. Of x they are taken as 2^(x scale - c), scale = log2(e) / tau, one fused
  multiply-add. c is the rounded product of the lane's maximum and scale, the same number for all that the lane sums up,
  so that its rounding costs nothing: where lanes meet each is moved from its c to the row's maximum, by one more.
- What is less than -2^24, as -inf and other masks are, becomes -2^24 as it is loaded: no product is one of infinity and
  0, and no c is so large that its rounding overflows an exponential. It counts as -inf.
- Sums are chains of fused multiply-adds, begun anew for every GROUPS so that what is small is not lost beside what the
  lane has; sums over an axis would be trees, of additions after products.

Sizes were measured on an H100, GROUPS and LANES on an H200 (docs/gpu.md). Rows too few to fill the GPU are not split
over several programs: merging what those know takes longer than a program takes for a row of 151,936 columns.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton import knobs

from stare_megatron.trainer import partials as algebra
from stare_megatron.trainer.partials import Merged, VocabShard

GROUPS = 4
LANES = 256
LOAD_BYTES = 16  # the widest load
BACKWARD_BLOCK = 4096  # columns a program of the backward works on
FORWARD_WARPS = 8
BACKWARD_WARPS = 8

_PER_ROW = ["target", "m", "log_s", "entropy", "grad_logprob", "grad_entropy"]
_NO_TARGET = tl.constexpr(algebra.NO_TARGET)
_FLOOR = tl.constexpr(algebra.FLOOR)
_LOG2_E = tl.constexpr(math.log2(math.e))
_LN_2 = tl.constexpr(math.log(2.0))
_INF = tl.constexpr(math.inf)
_LOWEST = tl.constexpr(-(2.0**24))  # a power of two, as its product with a scale is exact; also in `_widened`'s code
_INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def _taken_in(x, m, s, u, q, r, w, scale, SENSITIVITY: tl.constexpr, RAW: tl.constexpr):
    """Partials of the lanes, fp32 [LANES], with the columns x fp32 [LANES, N] added to them."""
    top = tl.maximum(m, tl.max(x, axis=1))
    c = _rounded_product(top, scale)
    c_raw = _rounded_product(top, _LOG2_E)
    none = tl.full(m.shape, -0.0, tl.float32)  # what can be added at no cost
    new_s, new_u, new_q, new_r, new_w = _chained(x, c, c_raw, none, none, none, none, none, scale, SENSITIVITY, RAW)
    offset = _rounded_product(m, scale) - c
    a = tl.exp2(offset)
    u = tl.fma(a, tl.fma(offset, s, u), new_u)
    s = tl.fma(a, s, new_s)
    if SENSITIVITY:
        r = tl.fma(a * a, tl.fma(offset, q, r), new_r)
        q = tl.fma(a * a, q, new_q)
    if RAW:
        w = tl.fma(tl.exp2(_rounded_product(m, _LOG2_E) - c_raw), w, new_w)
    return top, s, u, q, r, w


@triton.jit
def _chained(x, c, c_raw, s, u, q, r, w, scale, SENSITIVITY: tl.constexpr, RAW: tl.constexpr):
    """The sums with x [LANES, N] added to them, one element of each lane after the other."""
    lanes: tl.constexpr = x.shape[0]
    each: tl.constexpr = x.shape[1]
    if each > 1:
        one, other = tl.split(tl.reshape(x, [lanes, each // 2, 2]))
        s, u, q, r, w = _chained(one, c, c_raw, s, u, q, r, w, scale, SENSITIVITY, RAW)
        s, u, q, r, w = _chained(other, c, c_raw, s, u, q, r, w, scale, SENSITIVITY, RAW)
    else:
        x = tl.reshape(x, [lanes])
        d = _exponent(x, scale, c)
        e = tl.exp2(d)
        s += e
        u = tl.fma(d, e, u)
        if SENSITIVITY:
            q = tl.fma(e, e, q)
            r = tl.fma(d * e, e, r)
        if RAW:
            w += tl.exp2(_exponent(x, _LOG2_E, c_raw))
    return s, u, q, r, w


@triton.jit
def _rounded_product(x, y):
    return tl.fma(x, y, 0.0)  # a product would be fused with what is subtracted from it


@triton.jit
def _exponent(x, scale, c):
    """x scale - c, rounded once."""
    if _INTERPRETED:  # whose fma rounds twice before Triton 3.9
        return (x.to(tl.float64) * tl.cast(scale, tl.float64) - c.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(x, scale, -c)


@triton.jit
def _loaded(at, GROUPS: tl.constexpr):
    """fp32 [LANES, GROUPS * WIDTH] of the logits at `at` [LANES, WIDTH] and of the groups that follow."""
    lanes: tl.constexpr = at.shape[0]
    width: tl.constexpr = at.shape[1]
    if GROUPS > 1:
        half: tl.constexpr = GROUPS // 2
        pair = tl.join(_loaded(at, half), _loaded(at + half * lanes * width, half))
        return tl.reshape(pair, [lanes, GROUPS * width])
    else:
        return _widened(tl.load(at))


@triton.jit
def _widened(x):
    """As fp32, no less than _LOWEST; NaN stays NaN."""
    if _INTERPRETED or x.dtype != tl.bfloat16:
        return tl.maximum(x.to(tl.float32), _LOWEST, propagate_nan=tl.PropagateNan.ALL)
    else:  # two at a time by three instructions; Triton's own takes five
        bits = tl.inline_asm_elementwise(
            """{
            .reg .b32 lowest, two;
            mov.b32 lowest, 0xcb80cb80;
            max.NaN.bf16x2 two, $2, lowest;
            shl.b32 $0, two, 16;
            and.b32 $1, two, 0xffff0000;
            }""",
            "=r,=r,r",
            [x],
            dtype=tl.int32,
            is_pure=True,
            pack=2,
        )
        return bits.to(tl.float32, bitcast=True)


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

    columns = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    m = tl.full([LANES], _LOWEST, tl.float32)
    s = tl.full([LANES], 0.0, tl.float32)
    u = tl.full([LANES], 0.0, tl.float32)
    q = tl.full([LANES], 0.0, tl.float32)
    r = tl.full([LANES], 0.0, tl.float32)
    w = tl.full([LANES], 0.0, tl.float32)
    whole = end // (GROUPS * LANES * WIDTH) * (GROUPS * LANES * WIDTH)
    for first in range(0, whole, GROUPS * LANES * WIDTH):
        x = _loaded(of_row + first + columns, GROUPS)
        m, s, u, q, r, w = _taken_in(x, m, s, u, q, r, w, scale, SENSITIVITY, RAW)
    for first in range(whole, end, LANES * WIDTH):
        place = first + columns
        x = _widened(tl.load(of_row + place, mask=place < end, other=-_INF))
        m, s, u, q, r, w = _taken_in(x, m, s, u, q, r, w, scale, SENSITIVITY, RAW)

    top = tl.max(m, axis=0)
    some = top > _LOWEST
    offset = -_exponent(top, scale, _rounded_product(m, scale))
    a = tl.where(some, tl.exp2(offset), 0.0)
    local = wanted - start
    z = tl.load(of_row + local, mask=(local >= 0) & (local < end), other=-_INF).to(tl.float32)
    result = out + row
    tl.store(result, tl.where(some, top, -_INF))
    tl.store(result + num_rows, tl.sum(a * s, axis=0))
    tl.store(result + 2 * num_rows, tl.sum(a * tl.fma(offset, s, u), axis=0) * _LN_2)
    tl.store(result + 3 * num_rows, z)
    if SENSITIVITY:
        tl.store(result + 4 * num_rows, tl.sum(a * a * q, axis=0))
        tl.store(result + 5 * num_rows, tl.sum(a * a * tl.fma(offset, q, r), axis=0) * _LN_2)
    if RAW:
        b = tl.where(some, tl.exp2(-_exponent(top, _LOG2_E, _rounded_product(m, _LOG2_E))), 0.0)
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
