"""Chunked Mamba-2 scan in plain torch operations, arranged for batched matrix products.

Against the reference path of transformers, B and C stay one per group (they are not repeated for every head),
and every contraction is a batched matrix product on [batch, group, ...] tensors, with no permuted
[batch, chunk, position, position, head] intermediate.  `sequential_scan` is the float64 recurrence to check
it against; run this file to do so.
"""

from __future__ import annotations

import torch
from torch import Tensor


def chunked_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, *, chunk_size: int) -> Tensor:
    """Run h[t] = exp(dt[t] a) h[t-1] + dt[t] b[t] x[t], y[t] = c[t] h[t] from a zero state.

    Shapes: `x` [batch, time, heads, head_dim], `dt` (after softplus) [batch, time, heads], `a` (negative)
    [heads], `b` and `c` [batch, time, groups, state]; the result has the shape of `x`.  `time` must be a
    multiple of `chunk_size`.  The skip term D x is left to the caller.
    """
    batch, time, heads, head_dim = x.shape
    groups, state = b.shape[2], b.shape[3]
    per_group = heads // groups
    chunks = time // chunk_size
    chunk_shape = (batch, chunks, chunk_size, groups)

    # [batch, chunk, group, position, state]
    b_chunks = b.reshape(*chunk_shape, state).transpose(2, 3)
    c_chunks = c.reshape(*chunk_shape, state).transpose(2, 3)
    # [batch, chunk, group, head, position, head_dim] and [batch, chunk, group, head, position]
    weighted = (x * dt[..., None]).reshape(*chunk_shape, per_group, head_dim).permute(0, 1, 3, 4, 2, 5)
    log_decay = (dt * a).reshape(*chunk_shape, per_group).permute(0, 1, 3, 4, 2)
    cumulative = log_decay.cumsum(-1)

    # Inside a chunk: a causal, decayed attention whose scores are shared by the heads of a group.
    scores = c_chunks @ b_chunks.transpose(-1, -2)
    later = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).triu(1)
    difference = cumulative[..., :, None] - cumulative[..., None, :]
    # Masked before exp: the upper triangle holds positive sums whose exp could overflow and poison gradients.
    decay = difference.masked_fill(later, float("-inf")).exp()
    inside = (scores[:, :, :, None] * decay) @ weighted

    # State that each chunk adds by its end: one product per group for all its heads.
    to_end = (cumulative[..., -1:] - cumulative).exp()
    ending = (weighted * to_end[..., None]).transpose(-1, -2)
    added = ending.reshape(batch, chunks, groups, per_group * head_dim, chunk_size) @ b_chunks
    start_states = _chunk_start_states(
        added.reshape(batch, chunks, heads, head_dim * state),
        cumulative[..., -1].reshape(batch, chunks, heads),
    )
    start_states = start_states.reshape(batch, chunks, groups, per_group * head_dim, state)

    # What the state at the chunk's start contributes to each position.
    carried = (start_states @ c_chunks.transpose(-1, -2)).reshape(
        batch, chunks, groups, per_group, head_dim, chunk_size
    )
    output = inside + carried.transpose(-1, -2) * cumulative.exp()[..., None]
    return output.permute(0, 1, 4, 2, 3, 5).reshape(batch, time, heads, head_dim)


def _chunk_start_states(added: Tensor, chunk_log_decay: Tensor) -> Tensor:
    """Return the state at the start of each chunk.

    `added` [batch, chunk, head, values] is what each chunk adds, `chunk_log_decay` [batch, chunk, head] the
    log of its total decay.  The recurrence over chunks is one product with a [chunk, chunk] matrix per head.
    """
    chunks = added.shape[1]
    totals = chunk_log_decay.transpose(1, 2).cumsum(-1)
    before = totals - chunk_log_decay.transpose(1, 2)
    difference = before[..., :, None] - totals[..., None, :]
    not_before = torch.ones(chunks, chunks, dtype=torch.bool, device=added.device).triu(0)
    decay = difference.masked_fill(not_before, float("-inf")).exp()
    return (decay @ added.transpose(1, 2)).transpose(1, 2)


def sequential_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Run the recurrence of `chunked_scan` one position at a time in float64, as an independent reference."""
    x, dt, a, b, c = (tensor.double() for tensor in (x, dt, a, b, c))
    batch, time, heads, head_dim = x.shape
    repeats = heads // b.shape[2]
    state = x.new_zeros(batch, heads, head_dim, b.shape[3])
    outputs = []
    for position in range(time):
        b_heads = b[:, position].repeat_interleave(repeats, dim=1)
        c_heads = c[:, position].repeat_interleave(repeats, dim=1)
        decay = (dt[:, position] * a).exp()[..., None, None]
        added = (dt[:, position, :, None] * x[:, position])[..., None] * b_heads[:, :, None, :]
        state = decay * state + added
        outputs.append((state * c_heads[:, :, None, :]).sum(-1))
    return torch.stack(outputs, dim=1)


def largest_relative_error(*, time: int, chunk_size: int, seed: int = 0) -> float:
    """Compare `chunked_scan` in float32 with `sequential_scan` on random input of `time` positions."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, time, 8, 32, generator=generator)
    dt = torch.nn.functional.softplus(torch.randn(2, time, 8, generator=generator) - 2)
    a = -torch.arange(1.0, 9.0)
    b, c = (torch.randn(2, time, 2, 32, generator=generator) for _ in range(2))
    expected = sequential_scan(x, dt, a, b, c)
    actual = chunked_scan(x, dt, a, b, c, chunk_size=chunk_size)
    return float((actual - expected).abs().max() / expected.abs().max())


if __name__ == "__main__":
    for chunk_size in (32, 64, 128):
        error = largest_relative_error(time=512, chunk_size=chunk_size)
        print(f"chunk {chunk_size}, 512 positions: largest relative error {error:.1e}")
