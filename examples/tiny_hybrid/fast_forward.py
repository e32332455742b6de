"""Training forward of a transformers `NemotronHForCausalLM`, written as one pure function per kind of layer.

The functions take the model's own parameters, so transformers still owns initialisation, names and files.
Being pure, each is compiled once by `torch.compile` and reused by all layers of its kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from chunked_scan import chunked_scan
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class MambaSizes:
    """Sizes that a Mamba layer cannot read off its weights."""

    groups: int
    state: int
    chunk_size: int
    epsilon: float


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Normalise the last axis of `x` to unit mean square and scale it by `weight`."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise causal convolution of `x` [batch, time, channels] with `weight` [channels, 1, kernel].

    A sum of shifted products, which the compiler fuses; the library's kernel would need two transposes.
    """
    kernel = weight.shape[-1]
    time = x.shape[1]
    padded = F.pad(x, (0, 0, kernel - 1, 0))
    result = bias
    for tap in range(kernel):
        result = result + padded[:, tap : tap + time] * weight[:, 0, tap]
    return result


def mamba_layer(
    hidden: Tensor,
    norm: Tensor,
    in_proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    a_log: Tensor,
    d: Tensor,
    gate_norm: Tensor,
    out_proj: Tensor,
    sizes: MambaSizes,
) -> Tensor:
    """Apply one Mamba-2 layer with its residual to `hidden` [batch, time, hidden]; dt is not clamped."""
    batch, time, _ = hidden.shape
    heads = a_log.shape[0]
    inner = out_proj.shape[1]
    group_state = sizes.groups * sizes.state
    projected = F.linear(rms_norm(hidden, norm, sizes.epsilon), in_proj)
    gate, mixed, dt = torch.split(projected, [inner, inner + 2 * group_state, heads], dim=-1)
    mixed = F.silu(causal_convolution(mixed, conv_weight, conv_bias))
    x, b, c = torch.split(mixed, [inner, group_state, group_state], dim=-1)
    x = x.reshape(batch, time, heads, inner // heads)
    b = b.reshape(batch, time, sizes.groups, sizes.state)
    c = c.reshape(batch, time, sizes.groups, sizes.state)
    y = chunked_scan(x, F.softplus(dt + dt_bias), -a_log.exp(), b, c, chunk_size=sizes.chunk_size)
    y = (y + d[:, None] * x).reshape(batch, time, inner) * F.silu(gate)
    grouped = y.reshape(batch, time, sizes.groups, inner // sizes.groups)
    grouped = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + sizes.epsilon)
    return hidden + F.linear(grouped.reshape(batch, time, inner) * gate_norm, out_proj)


def mlp_layer(hidden: Tensor, norm: Tensor, up: Tensor, down: Tensor, epsilon: float) -> Tensor:
    """Apply one squared-ReLU MLP layer with its residual to `hidden` [batch, time, hidden]."""
    return hidden + F.linear(F.relu(F.linear(rms_norm(hidden, norm, epsilon), up)).square(), down)


def attention_layer(
    hidden: Tensor, norm: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, head_dim: int, epsilon: float
) -> Tensor:
    """Apply one causal grouped-query attention layer with its residual to `hidden` [batch, time, hidden]."""
    batch, time, _ = hidden.shape
    normed = rms_norm(hidden, norm, epsilon)
    query, key, value = (
        F.linear(normed, weight).view(batch, time, -1, head_dim).transpose(1, 2) for weight in (q, k, v)
    )
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return hidden + F.linear(mixed.transpose(1, 2).reshape(batch, time, -1), o)


def head_loss(hidden: Tensor, norm: Tensor, head: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    """Return the summed loss in nats; `targets` [batch, time] are already shifted, -100 is skipped."""
    logits = F.linear(rms_norm(hidden, norm, epsilon), head)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


class FastForward:
    """Callable training forward over the parameters of `model` (kept by reference)."""

    def __init__(self, model: nn.Module, *, chunk_size: int, compiled: bool) -> None:
        self._model: Any = model
        config: Any = model.config
        self._epsilon = float(config.layer_norm_epsilon)
        self._head_dim = int(config.head_dim)
        self._sizes = MambaSizes(
            groups=config.n_groups,
            state=config.ssm_state_size,
            chunk_size=chunk_size,
            epsilon=self._epsilon,
        )

        def build(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return torch.compile(function, dynamic=False) if compiled else function

        self._mamba = build(mamba_layer)
        self._mlp = build(mlp_layer)
        self._attention = build(attention_layer)
        self._head = build(head_loss)

    def hidden_states(self, tokens: Tensor) -> Tensor:
        """Return the residual stream [batch, time, hidden] after the last layer, before the final norm."""
        hidden: Tensor = F.embedding(tokens, self._model.model.embeddings.weight)
        for layer in self._model.model.layers:
            hidden = self._apply(layer, hidden)
        return hidden

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the summed loss in nats of `targets` given `tokens` (both [batch, time])."""
        hidden = self.hidden_states(tokens)
        return self._head(hidden, self._model.model.norm_f.weight, self._model.lm_head.weight, targets, self._epsilon)

    def _apply(self, layer: Any, hidden: Tensor) -> Tensor:
        norm, mixer = layer.norm.weight, layer.mixer
        if layer.block_type == "linear_attention":
            return self._mamba(
                hidden,
                norm,
                mixer.in_proj.weight,
                mixer.conv1d.weight,
                mixer.conv1d.bias,
                mixer.dt_bias,
                mixer.A_log,
                mixer.D,
                mixer.norm.weight,
                mixer.out_proj.weight,
                self._sizes,
            )
        if layer.block_type == "mlp":
            return self._mlp(hidden, norm, mixer.up_proj.weight, mixer.down_proj.weight, self._epsilon)
        projections = (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj)
        weights = [projection.weight for projection in projections]
        return self._attention(hidden, norm, *weights, self._head_dim, self._epsilon)
