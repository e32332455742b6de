"""Mamba-2 layers of transformers without its Triton kernels: the same sums, in fewer passes over memory.

transformers' own PyTorch path repeats B and C for every head and writes a table of position x position for each. The
weight of one position in a later one, exp(a - b), is a product exp(a - m) exp(m - b), with m the middle of a chunk: so
inputs are scaled before, and outputs after, one table of C B' that all heads of a group share. Decays are summed in
float64, and chunks are short enough for the factors to stay in range (else the products are float64 too). The
convolution is a sum of shifted products. Trains as well; what autograd does not need is overwritten.

Shape suffixes: B batch, T tokens, K chunks, L tokens of a chunk, G groups, R heads of a group, H heads, P channels of a
head, N state, I inner channels.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from minipuzzle.devices import Device

TRITON, TORCH = "triton kernels of mamba-ssm", "torch"
MIN_CHUNK_TOKENS = 32  # in float32: where chunks would be shorter, products in float64 are cheaper than more states
GOOD_CHUNK_TOKENS_CPU = 64  # whatever config.json says: its chunks suit a GPU, or are so short that states dominate
# Between the first and the last token of a chunk; half of it on either side of the middle leaves room for the values.
MAX_SPAN_NATS = {torch.float32: 100.0, torch.float64: 1200.0}
NOTHING_LEFT_NATS = {torch.float32: 110.0, torch.float64: 750.0}  # a decay after which the precision sees nothing


def scan_path(device: str | torch.device) -> str:
    """Which implementation of the scan Mamba-2 layers run on a device: TRITON or TORCH."""
    return TRITON if Device(str(device)).speaks_cuda and _has_kernels() else TORCH


@cache
def _has_kernels() -> bool:
    """Asked once: looking for a package takes longer than a small layer."""
    return all(find_spec(package) is not None for package in ("mamba_ssm", "causal_conv1d"))


class FastMamba2(nn.Module):
    """One of transformers' Mamba-2 mixers that computes as this file does wherever it would not use Triton kernels.

    Made by ``fast_mamba2`` as a subclass of the mixer's own class, under whose names weights stay.
    """

    def __init__(self, mixer: nn.Module, *, time_step_limit: tuple[float, float] | None = None) -> None:
        """Take over the sizes and weights of a mixer that is used no more.

        ``time_step_limit``: what dt is clamped to; None: as the mixer does.
        """
        nn.Module.__init__(self)  # not the mixer's own: it would make new weights, from a config that it may not know
        vars(self).update(vars(mixer))
        if time_step_limit is not None:
            self.time_step_limit = time_step_limit

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the mixer adds, ``[batch, tokens, hidden]``; by transformers' code with a cache, mask or compiler."""
        is_plain = not args and all(value is None for value in kwargs.values())  # no cache, mask, packed sequences
        is_traced = torch.compiler.is_compiling()  # how long chunks are depends on the data
        if not is_plain or is_traced or scan_path(hidden_states.device) == TRITON:
            original: torch.Tensor = super().forward(hidden_states, *args, **kwargs)
            return original
        return _mixed(self, hidden_states)


def fast_mamba2(mixer: nn.Module, *, time_step_limit: tuple[float, float] | None = None) -> FastMamba2:
    """What to put in the place of one of transformers' Mamba-2 mixers; see FastMamba2."""
    assert all(hasattr(mixer, name) for name in ("in_proj", "conv1d", "A_log", "dt_bias", "D", "norm", "out_proj"))
    original: Any = type(mixer)  # mypy takes its __hash__ for that of its instances
    return _fast_class(original)(mixer, time_step_limit=time_step_limit)


@cache
def _fast_class(original: type[Any]) -> type[FastMamba2]:
    return type(f"Fast{original.__name__}", (FastMamba2, original), {})


def _mixed(mixer: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    gate_BTI, mixed_BT, dt_BTH = mixer.in_proj(hidden_states).split(
        [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1
    )
    mixed_BT = causal_convolution(mixed_BT, mixer.conv1d.weight[:, 0], mixer.conv1d.bias)
    is_silu = mixer.activation == "silu"
    mixed_BT = F.silu(mixed_BT, inplace=not mixed_BT.requires_grad) if is_silu else mixer.act(mixed_BT)
    states = mixer.n_groups * mixer.ssm_state_size
    x, b, c = mixed_BT.split([mixer.intermediate_size, states, states], dim=-1)
    precision = torch.promote_types(hidden_states.dtype, torch.float32)
    dt = F.softplus(dt_BTH.to(precision) + mixer.dt_bias.to(precision)).clamp(*mixer.time_step_limit)
    with torch.autocast(x.device.type, enabled=False):  # which would round states that were made precise
        scanned = chunked_scan(
            x.unflatten(-1, (mixer.num_heads, mixer.head_dim)).to(precision),
            dt,
            -mixer.A_log.to(precision).exp(),
            b.unflatten(-1, (mixer.n_groups, mixer.ssm_state_size)).to(precision),
            c.unflatten(-1, (mixer.n_groups, mixer.ssm_state_size)).to(precision),
            mixer.D.to(precision),
            longest_chunk=GOOD_CHUNK_TOKENS_CPU if x.is_cpu else mixer.chunk_size,
        )
    result: torch.Tensor = mixer.out_proj(mixer.norm(scanned.flatten(-2), gate_BTI).to(hidden_states.dtype))
    return result


def causal_convolution(x_BT: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Each channel convolved with its own kernel over the tokens up to the present one.

    Shapes: ``x_BT`` ``[batch, tokens, channels]``, ``weight`` ``[channels, kernel]``, ``bias`` ``[channels]``.
    """
    *earlier, newest = weight.T.contiguous()  # rows side by side: products with a strided one are several times slower
    out_BT = x_BT * newest if bias is None else torch.addcmul(bias, x_BT, newest)
    for delay, row in enumerate(reversed(earlier[-x_BT.shape[1] + 1 :] if x_BT.shape[1] > 1 else []), start=1):
        out_BT[:, delay:].addcmul_(x_BT[:, :-delay], row)
    return out_BT


def chunked_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    *,
    longest_chunk: int,
) -> torch.Tensor:
    """h[t] = exp(dt[t] a) h[t-1] + dt[t] b[t] x[t] and y[t] = c[t] h[t] + d x[t], from a zero state.

    Shapes: ``x`` and the result ``[batch, tokens, heads, channels]``, ``dt`` ``[batch, tokens, heads]``, ``a``
    (negative) and ``d`` ``[heads]``, ``b`` and ``c`` ``[batch, tokens, groups, state]``. ``longest_chunk``: in tokens.
    Source: arXiv 2405.21060, section 6 (the block decomposition).
    """
    (batch, num_tokens, heads, channels), groups, state = x.shape, b.shape[2], b.shape[3]
    decay_BTH = (dt.double() * -a.double()).clamp(max=NOTHING_LEFT_NATS[x.dtype])
    length, precision = chunks_in_range(decay_BTH.detach(), min(longest_chunk, num_tokens), x.dtype)
    whole_x, result_dtype = x, x.dtype
    padding = -num_tokens % length
    if padding:  # with dt = 0 these tokens leave the state as it is, and their own outputs are dropped
        x, dt, b, c, decay_BTH = (
            F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, padding)) for tensor in (x, dt, b, c, decay_BTH)
        )
    num_chunks, per_head = x.shape[1] // length, (groups, heads // groups)

    def by_chunk(tensor: torch.Tensor) -> torch.Tensor:
        """``[batch, tokens, groups, ...]`` as ``[batch, chunks, groups, tokens of a chunk, ...]``."""
        return tensor.reshape(batch, num_chunks, length, *tensor.shape[2:]).transpose(2, 3)

    # How much has decayed since a chunk began, and half-way between its first token and its last.
    age_BKLH = decay_BTH.unflatten(1, (num_chunks, length)).cumsum(2)
    middle_BK1H = (age_BKLH[:, :, :1] + age_BKLH[:, :, -1:]) / 2
    before_BTH = ((age_BKLH - middle_BK1H).exp().flatten(1, 2) * dt).to(precision)
    after_BTH = (middle_BK1H - age_BKLH).exp().flatten(1, 2).to(precision)
    x_BKGLRP = _product(by_chunk(x.unflatten(2, per_head)), by_chunk(before_BTH.unflatten(-1, per_head)).unsqueeze(-1))
    x_ELI = x_BKGLRP.view(-1, length, x_BKGLRP.shape[4] * channels)
    b_ELN, c_ELN = (by_chunk(tensor).to(precision).reshape(-1, length, state) for tensor in (b, c))
    y_ELI: torch.Tensor = (c_ELN @ b_ELN.transpose(1, 2)).tril_() @ x_ELI
    if num_chunks > 1:
        added = (b_ELN.transpose(1, 2) @ x_ELI).view(batch, num_chunks, groups, state, -1, channels)
        entering, leaving = (
            factor.to(precision).view(batch, num_chunks, groups, 1, -1, 1)
            for factor in ((-middle_BK1H).exp(), (middle_BK1H - age_BKLH[:, :, -1:]).exp())
        )
        y_ELI.baddbmm_(c_ELN, _states_at_middles(added, entering, leaving).view(-1, state, x_ELI.shape[-1]))
    y_BKGLRP = y_ELI.view(x_BKGLRP.shape)
    y = _product(y_BKGLRP.transpose(2, 3), by_chunk(after_BTH.unflatten(-1, per_head)).transpose(2, 3).unsqueeze(-1))
    y = y.view(batch, -1, heads, channels)[:, :num_tokens].to(result_dtype)
    return torch.addcmul(y, whole_x, d[:, None]) if y.requires_grad else y.addcmul_(whole_x, d[:, None])


def chunks_in_range(decay_BTH: torch.Tensor, longest: int, dtype: torch.dtype) -> tuple[int, torch.dtype]:
    """Tokens a chunk, and the precision of its products: what lets no factor leave the range of the precision.

    ``decay_BTH``: nats, in float64. ``longest``: in tokens. ``dtype``: of the inputs.
    """

    def fits(length: int, precision: torch.dtype) -> bool:
        """Whether what decays from the first to the last token of any chunk is within the range of a precision."""
        padded_BTH = F.pad(decay_BTH, (0, 0, 0, -decay_BTH.shape[1] % length))
        span_BKH = padded_BTH.unflatten(1, (-1, length))[:, :, 1:].sum(2)
        return not bool((span_BKH > MAX_SPAN_NATS[precision]).any())  # NaN passes, to be found in the result

    length = longest
    while length >= min(MIN_CHUNK_TOKENS, longest):
        if fits(length, torch.float32):
            return length, dtype
        length //= 2
    length = longest
    while not fits(length, torch.float64):
        length //= 2
    return length, torch.float64


def _product(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """A product that is laid out in the order of its dimensions."""
    if first.requires_grad or second.requires_grad:
        return (first * second).contiguous()
    shape = torch.broadcast_shapes(first.shape, second.shape)
    dtype = torch.promote_types(first.dtype, second.dtype)
    return torch.mul(first, second, out=torch.empty(shape, dtype=dtype, device=first.device))


def _states_at_middles(
    added_BKGNRP: torch.Tensor, entering_BKG1R1: torch.Tensor, leaving_BKG1R1: torch.Tensor
) -> torch.Tensor:
    """What is left of the state before each chunk by the middle of the chunk.

    ``added_BKGNRP``: what each chunk adds, as of its middle. The factors: decays from a chunk's beginning to its
    middle, and from there to its end.
    """
    state = torch.zeros_like(added_BKGNRP[:, 0])
    states = []
    for added, entering, leaving in zip(
        *(tensor.unbind(1) for tensor in (added_BKGNRP, entering_BKG1R1, leaving_BKG1R1)), strict=True
    ):
        states.append(state * entering)
        state = (states[-1] + added) * leaving
    return torch.stack(states, dim=1)
