"""An independent Nemotron-H forward pass, written from the formulas, to which everything else can be held.

Float64 throughout, the Mamba-2 recurrence step by step in time, nothing but plain torch operations; neither
transformers nor minipuzzle is imported, so that agreement with them means something.

Source: Mamba-2 (arXiv 2405.21060, section 7), Nemotron-H (arXiv 2504.03624, section 2): one mixer a block, pre-norm,
no position embeddings in attention, squared ReLU in the feed-forward layers.

Shape suffixes: B batch, T tokens, H hidden, V vocabulary, I ssm inner channels, N ssm heads, P channels a head,
G ssm groups, S ssm state, Q query heads, K key-value heads, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import silu, softplus

Tensor = torch.Tensor
Weights = Mapping[str, Tensor]


def reference_forward(config: Mapping[str, Any], tensors: Weights, token_ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and LM-head input of a model given by config.json and tensors under their names on disk.

    Returns: ``(logits_BTV, head_input_BTH)``, both float64.
    """
    weights = {name: tensor.to(torch.float64) for name, tensor in tensors.items()}
    epsilon = config["layer_norm_epsilon"]
    mixers = {"M": _mamba, "*": _attention, "-": _mlp}
    hidden_BTH = weights["backbone.embeddings.weight"][token_ids_BT]
    for layer_idx, symbol in enumerate(config["hybrid_override_pattern"]):
        prefix = f"backbone.layers.{layer_idx}."
        layer = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
        mixer = {name.removeprefix("mixer."): t for name, t in layer.items() if name.startswith("mixer.")}
        normed_BTH = _rms_norm(hidden_BTH, layer["norm.weight"], epsilon)
        hidden_BTH = hidden_BTH + mixers[symbol](config, mixer, normed_BTH)
    head_input_BTH = _rms_norm(hidden_BTH, weights["backbone.norm_f.weight"], epsilon)
    head_VH = weights.get("lm_head.weight", weights["backbone.embeddings.weight"])
    return head_input_BTH @ head_VH.T, head_input_BTH


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def _linear(mixer: Weights, name: str, x: Tensor) -> Tensor:
    y = x @ mixer[f"{name}.weight"].T
    return y + mixer[f"{name}.bias"] if f"{name}.bias" in mixer else y


def _mlp(_config: Mapping[str, Any], mixer: Weights, x_BTH: Tensor) -> Tensor:
    return _linear(mixer, "down_proj", _linear(mixer, "up_proj", x_BTH).clamp(min=0).square())


def _attention(config: Mapping[str, Any], mixer: Weights, x_BTH: Tensor) -> Tensor:
    num_queries, num_keys, head_dim = (
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["head_dim"],
    )
    batch, tokens, _ = x_BTH.shape
    q_BTQD = _linear(mixer, "q_proj", x_BTH).reshape(batch, tokens, num_queries, head_dim)
    k_BTKD = _linear(mixer, "k_proj", x_BTH).reshape(batch, tokens, num_keys, head_dim)
    v_BTKD = _linear(mixer, "v_proj", x_BTH).reshape(batch, tokens, num_keys, head_dim)
    future_TT = torch.ones(tokens, tokens, dtype=torch.bool).triu(diagonal=1)
    outputs = []
    for query in range(num_queries):
        key = query * num_keys // num_queries
        scores_BTT = q_BTQD[:, :, query] @ k_BTKD[:, :, key].transpose(1, 2) / math.sqrt(head_dim)
        weights_BTT = scores_BTT.masked_fill(future_TT, -math.inf).softmax(-1)
        outputs.append(weights_BTT @ v_BTKD[:, :, key])
    return _linear(mixer, "o_proj", torch.cat(outputs, dim=-1))


def _mamba(config: Mapping[str, Any], mixer: Weights, x_BTH: Tensor) -> Tensor:
    num_heads, head_dim = config["mamba_num_heads"], config["mamba_head_dim"]
    num_groups, state_size = config["n_groups"], config["ssm_state_size"]
    inner, groups_by_state = num_heads * head_dim, num_groups * state_size
    batch, tokens, _ = x_BTH.shape
    projected = _linear(mixer, "in_proj", x_BTH)
    gate_BTI, convolved, dt_BTN = projected.split([inner, inner + 2 * groups_by_state, num_heads], dim=-1)
    convolved = silu(_causal_convolution(mixer, convolved))
    u_BTI, b, c = convolved.split([inner, groups_by_state, groups_by_state], dim=-1)
    group_of_head = torch.arange(num_heads) * num_groups // num_heads
    y_BTNP = _recurrence(
        u_BTNP=u_BTI.reshape(batch, tokens, num_heads, head_dim),
        dt_BTN=softplus(dt_BTN + mixer["dt_bias"]),
        decay_rate_N=-torch.exp(mixer["A_log"]),
        b_BTNS=b.reshape(batch, tokens, num_groups, state_size)[:, :, group_of_head],
        c_BTNS=c.reshape(batch, tokens, num_groups, state_size)[:, :, group_of_head],
        skip_N=mixer["D"],
    )
    gated_BTI = y_BTNP.reshape(batch, tokens, inner) * silu(gate_BTI)
    grouped = gated_BTI.reshape(batch, tokens, num_groups, inner // num_groups)
    grouped = grouped / torch.sqrt(grouped.square().mean(-1, keepdim=True) + config["layer_norm_epsilon"])
    return _linear(mixer, "out_proj", grouped.reshape(batch, tokens, inner) * mixer["norm.weight"])


def _causal_convolution(mixer: Weights, x_BTC: Tensor) -> Tensor:
    """Each channel's own filter over the current and the earlier tokens; the last tap meets the current token."""
    taps_CW = mixer["conv1d.weight"][:, 0]
    width = taps_CW.shape[1]
    padded = torch.cat([x_BTC.new_zeros(x_BTC.shape[0], width - 1, x_BTC.shape[2]), x_BTC], dim=1)
    y_BTC = sum(padded[:, tap : tap + x_BTC.shape[1]] * taps_CW[:, tap] for tap in range(width))
    assert isinstance(y_BTC, Tensor)
    return y_BTC + mixer["conv1d.bias"] if "conv1d.bias" in mixer else y_BTC


def _recurrence(
    *, u_BTNP: Tensor, dt_BTN: Tensor, decay_rate_N: Tensor, b_BTNS: Tensor, c_BTNS: Tensor, skip_N: Tensor
) -> Tensor:
    """state = exp(dt A) state + dt u b;  y = state c + D u, one token after the other."""
    batch, tokens, num_heads, head_dim = u_BTNP.shape
    state_BNPS = u_BTNP.new_zeros(batch, num_heads, head_dim, b_BTNS.shape[-1])
    outputs = []
    for t in range(tokens):
        decay = torch.exp(dt_BTN[:, t] * decay_rate_N)[..., None, None]
        inflow = (dt_BTN[:, t, :, None] * u_BTNP[:, t])[..., None] * b_BTNS[:, t, :, None, :]
        state_BNPS = decay * state_BNPS + inflow
        outputs.append((state_BNPS * c_BTNS[:, t, :, None, :]).sum(-1) + skip_N[:, None] * u_BTNP[:, t])
    return torch.stack(outputs, dim=1)
