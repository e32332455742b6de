"""Mamba-2 layers of transformers without its Triton kernels: the same sums, in fewer passes over memory.

transformers' own PyTorch path repeats B and C for every head and writes tables of position x position x head in an
order that matrix products have to copy. Here all products are batched ones over [batch, chunk, group, ...], D and dt
are folded into the table of decays, and the convolution is a sum of shifted products. Used where nothing is trained:
intermediate results are overwritten, which autograd could not follow.

Shape suffixes: B batch, T tokens, K chunks, L tokens of a chunk, G groups, R heads of a group, P channels of a head,
N state, I inner channels.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

TRITON, TORCH = "triton kernels of mamba-ssm", "torch"


def scan_path(device: str) -> str:
    """Which implementation of the scan Mamba-2 layers run on a device: TRITON or TORCH."""
    is_there = all(find_spec(package) is not None for package in ("mamba_ssm", "causal_conv1d"))
    return TRITON if is_there and torch.device(device).type == "cuda" else TORCH


def run_without_kernels(mixer: nn.Module) -> None:
    """Let one of transformers' Mamba-2 mixers compute as this file does, wherever it would not use Triton kernels."""
    assert all(hasattr(mixer, name) for name in ("in_proj", "conv1d", "A_log", "dt_bias", "D", "norm", "out_proj"))
    mixer.forward = MethodType(_forward, mixer)


def _forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    is_plain = not args and all(value is None for value in kwargs.values())  # no cache, no mask, no packed sequences
    if not is_plain or torch.is_grad_enabled() or scan_path(str(hidden_states.device)) == TRITON:
        original: torch.Tensor = type(self).forward(self, hidden_states, *args, **kwargs)
        return original
    gate_BTI, mixed_BT, dt_BT = self.in_proj(hidden_states).split(
        [self.intermediate_size, self.conv_dim, self.num_heads], dim=-1
    )
    mixed_BT = self.act(causal_convolution(mixed_BT, self.conv1d.weight[:, 0], self.conv1d.bias))
    states = self.n_groups * self.ssm_state_size
    x, b, c = mixed_BT.split([self.intermediate_size, states, states], dim=-1)
    precision = torch.promote_types(hidden_states.dtype, torch.float32)
    dt = F.softplus(dt_BT.to(precision) + self.dt_bias.to(precision)).clamp_(*self.time_step_limit)
    scanned = chunked_scan(
        x.unflatten(-1, (self.num_heads, self.head_dim)).to(precision),
        dt,
        -self.A_log.to(precision).exp(),
        b.unflatten(-1, (self.n_groups, self.ssm_state_size)).to(precision),
        c.unflatten(-1, (self.n_groups, self.ssm_state_size)).to(precision),
        self.D.to(precision),
        chunk_size=self.chunk_size,
    )
    result: torch.Tensor = self.out_proj(self.norm(scanned.flatten(-2), gate_BTI).to(hidden_states.dtype))
    return result


def causal_convolution(x_BT: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Each channel convolved with its own kernel over the tokens up to the present one.

    Shapes: ``x_BT`` ``[batch, tokens, channels]``, ``weight`` ``[channels, kernel]``, ``bias`` ``[channels]``.
    """
    newest = weight.shape[-1] - 1
    out_BT = x_BT * weight[:, newest] if bias is None else torch.addcmul(bias, x_BT, weight[:, newest])
    for delay in range(1, min(newest + 1, x_BT.shape[1])):
        out_BT[:, delay:].addcmul_(x_BT[:, :-delay], weight[:, newest - delay])
    return out_BT


def chunked_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    d: torch.Tensor,
    *,
    chunk_size: int,
) -> torch.Tensor:
    """h[t] = exp(dt[t] a) h[t-1] + dt[t] b[t] x[t] and y[t] = c[t] h[t] + d x[t], from a zero state.

    Shapes: ``x`` and the result ``[batch, tokens, heads, channels]``, ``dt`` ``[batch, tokens, heads]``, ``a``
    (negative) and ``d`` ``[heads]``, ``b`` and ``c`` ``[batch, tokens, groups, state]``.
    Source: arXiv 2405.21060, section 6 (the block decomposition).
    """
    num_tokens, (heads, channels), groups = x.shape[1], x.shape[2:], b.shape[2]
    length = min(chunk_size, num_tokens)
    padding = -num_tokens % length
    if padding:  # with dt = 0 these tokens leave the state as it is, and their own outputs are dropped
        x, dt, b, c = (F.pad(tensor, (0, 0) * (tensor.ndim - 2) + (0, padding)) for tensor in (x, dt, b, c))
    per_head = (groups, heads // groups)
    chunks = (-1, length)
    b_BKGLN, c_BKGLN = (tensor.unflatten(1, chunks).transpose(2, 3) for tensor in (b, c))
    x_BKGRLP = x.unflatten(2, per_head).unflatten(1, chunks).permute(0, 1, 3, 4, 2, 5).contiguous()
    # The log of the decay since the chunk began. Differences of such sums would lose digits in float32.
    dt_BKGRL = dt.double().unflatten(2, per_head).unflatten(1, chunks).permute(0, 1, 3, 4, 2).contiguous()
    age_BKGRL = (dt_BKGRL * a.view(*per_head, 1)).cumsum(-1)

    # Inside a chunk: a causal table of weights for each head. dt enters as its logarithm, d on the diagonal.
    later = torch.full((length, length), float("-inf"), dtype=x.dtype, device=x.device).triu_(1)
    table = (age_BKGRL[..., :, None] - (age_BKGRL - dt_BKGRL.log())[..., None, :]).to(x.dtype)
    table.add_(later).exp_().mul_((c_BKGLN @ b_BKGLN.transpose(-1, -2)).unsqueeze(3))
    table.diagonal(dim1=-2, dim2=-1).add_(d.view(*per_head, 1))
    y_BKGRLP = table @ x_BKGRLP

    # Across chunks: what each adds to the state by its end, and what the state before it adds to its outputs.
    if y_BKGRLP.shape[1] > 1:
        weight_BKGRL = (age_BKGRL[..., -1:] - age_BKGRL).exp_().mul_(dt_BKGRL).to(x.dtype)
        ending = (x_BKGRLP * weight_BKGRL[..., None]).transpose(-1, -2).flatten(3, 4)
        decay_BKGR = age_BKGRL[..., -1].exp().to(x.dtype)
        states = _states_before((ending @ b_BKGLN).unflatten(3, (-1, channels)), decay_BKGR)
        carried = (c_BKGLN @ states.flatten(3, 4).transpose(-1, -2)).unflatten(-1, (-1, channels)).transpose(3, 4)
        y_BKGRLP.addcmul_(carried, age_BKGRL.exp_().to(x.dtype)[..., None])
    y: torch.Tensor = y_BKGRLP.permute(0, 1, 4, 2, 3, 5).reshape(x.shape)
    return y[:, :num_tokens]


def _states_before(added_BKGRPN: torch.Tensor, decay_BKGR: torch.Tensor) -> torch.Tensor:
    """The state before each chunk, from what each chunk adds (overwritten) and by how much it lets the state decay."""
    state = torch.zeros_like(added_BKGRPN[:, 0])
    for chunk_idx in range(added_BKGRPN.shape[1]):
        added = added_BKGRPN[:, chunk_idx]
        after = torch.addcmul(added, state, decay_BKGR[:, chunk_idx, ..., None, None])
        added.copy_(state)
        state = after
    return added_BKGRPN
