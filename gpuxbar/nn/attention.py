"""`nn.MultiheadAttention` with each projection a layer of its own, so that it can run on crossbars."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpuxbar.nn.dense import require_dense
from gpuxbar.nn.linear import linear_of
from gpuxbar.nn.unfused import Called, require_shape

__all__ = ["UnfusedAttention"]


class UnfusedAttention(nn.Module):
    """An `nn.MultiheadAttention` as four layers, `q_proj`, `k_proj`, `v_proj` and `out_proj`, and the attention between them.

    It computes the same, and loads its state dicts. Products of queries, keys and values with each other stay digital:
    both factors change with every input.

    Args:
        attention: The module to take parameters and options from; fused ones are split into copies.
    """

    in_proj_bias = None  # tells nn.TransformerEncoderLayer that it cannot fuse this attention

    def __init__(self, attention: nn.MultiheadAttention):
        super().__init__()
        width = attention.embed_dim
        self.embed_dim, self.kdim, self.vdim = width, attention.kdim, attention.vdim
        self.num_heads, self.batch_first = attention.num_heads, attention.batch_first
        self.dropout, self.add_zero_attn = attention.dropout, attention.add_zero_attn
        parameters = dict(attention.named_parameters())
        fused = (parameters.get(f"in_proj_{kind}") for kind in ("weight", "bias"))
        weights, biases = ([None] * 3 if f is None else _thirds(f) for f in fused)
        q, k, v = (
            linear_of(parameters[f"{name}_proj_weight"] if weight is None else weight, bias)
            for name, weight, bias in zip("qkv", weights, biases, strict=True)
        )
        self.q_proj, self.k_proj, self.v_proj = q, k, v
        self.out_proj = linear_of(parameters["out_proj.weight"], parameters.get("out_proj.bias"))
        self.bias_k, self.bias_v = attention.bias_k, attention.bias_v
        self.train(attention.training)

    def fused(self) -> nn.MultiheadAttention | None:
        """The module of torch with these parameters; None where it would hold as one what is frozen, or there, in part."""
        layers = self.q_proj, self.k_proj, self.v_proj
        weights, biases = (
            [layer.get_parameter("weight") for layer in layers],
            [layer.bias for layer in layers],
        )
        apart = (self.kdim, self.vdim) != (self.embed_dim, self.embed_dim)
        if not _alike(biases) or not (apart or _alike(weights)):
            return None
        attention = nn.MultiheadAttention(
            self.embed_dim, self.num_heads, self.dropout, biases[0] is not None, False, self.add_zero_attn, self.kdim, self.vdim,
            self.batch_first, device="meta",
        )  # fmt: skip
        if apart:
            attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight = weights
        else:
            attention.in_proj_weight = _joined(weights)
        if biases[0] is not None:
            attention.in_proj_bias = _joined(biases)
        attention.out_proj.weight = self.out_proj.weight
        attention.out_proj.register_parameter("bias", self.out_proj.bias)
        attention.bias_k, attention.bias_v = self.bias_k, self.bias_v
        return attention.train(self.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`'s; `is_causal` is its hint that `attn_mask` is causal, and changes nothing."""
        name = Called(self, "MultiheadAttention")
        axes = [("T",), ("N", "T") if self.batch_first else ("T", "N")]
        for argument, x, size in (
            ("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim),
        ):  # fmt: skip
            require_dense(name, argument, x)
            require_shape(name, argument, x, *((*before, size) for before in axes))
            axes = [before for before in axes if len(before) == x.dim() - 1]  # of the queries'
        if is_causal and attn_mask is None:
            raise ValueError(
                f"{name}: `attn_mask` must be given with `is_causal`, got None; pass the causal mask too"
            )
        batched = query.dim() == 3
        inputs = query, key, value
        if not batched:
            inputs = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            inputs = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        self._check(name, *inputs, attn_mask, key_padding_mask)
        q, k, v = self.q_proj(inputs[0]), self.k_proj(inputs[1]), self.v_proj(inputs[2])
        batch = len(q)
        if self.bias_k is not None:
            assert self.bias_v is not None
            k = torch.cat([k, self.bias_k.expand(batch, -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(batch, -1, -1)], 1)
        if self.add_zero_attn:
            k, v = functional.pad(k, (0, 0, 0, 1)), functional.pad(v, (0, 0, 0, 1))
        extra = k.shape[1] - inputs[1].shape[1]
        mask = self._mask(attn_mask, key_padding_mask, extra, q)
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        shares = None
        if need_weights:
            scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
            shares = functional.dropout((scores if mask is None else scores + mask).softmax(3), dropout)
            y = shares @ v
            shares = shares.mean(1) if average_attn_weights else shares
        else:
            y = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if not batched:
            return y[0], None if shares is None else shares[0]
        return y if self.batch_first else y.transpose(0, 1), shares

    def _check(
        self,
        name: Called,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
    ) -> None:
        """Refuse what would be broadcast, or added to scores where it was meant to hide some."""
        batch, length = len(query), key.shape[1]
        for argument, x in (("key", key), ("value", value)):
            if x.shape[:2] != (batch, length):
                raise ValueError(
                    f"{name}: `{argument}` must have {length} vectors for each of the {batch} samples of `query`, got "
                    f"{x.shape[1]} for {len(x)}; expand it"
                )
        pairs = (query.shape[1], length), (batch * self.num_heads, query.shape[1], length)
        for argument, mask, shapes in (
            ("attn_mask", attn_mask, pairs), ("key_padding_mask", key_padding_mask, ((batch, length),)),
        ):  # fmt: skip
            if mask is None:
                continue
            if mask.dtype != torch.bool and not mask.is_floating_point():
                raise TypeError(
                    f"{name}: `{argument}` must be bool, where True hides, or floats, which are added, got {mask.dtype}; call .bool()"
                )
            if tuple(mask.shape) not in shapes:
                raise ValueError(
                    f"{name}: `{argument}` must have shape {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}; expand it"
                )

    def _mask(self, pairs: Tensor | None, keys: Tensor | None, extra: int, q: Tensor) -> Tensor | None:
        """What is added to the scores [N, heads, L, S + extra], from masks [L, S] or [N * heads, L, S], and [N, S]."""
        mask = None
        if pairs is not None:
            mask = _added(pairs, q.dtype)
            mask = mask if mask.dim() == 2 else mask.unflatten(0, (len(q), -1))
        if keys is not None:
            hidden = _added(keys, q.dtype)[:, None, None]
            mask = hidden if mask is None else mask + hidden
        return mask if mask is None or not extra else functional.pad(mask, (0, extra))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        for kind in ("weight", "bias"):
            fused = state_dict.pop(f"{prefix}in_proj_{kind}", None)
            parts = [None] * 3 if fused is None else fused.chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                part = state_dict.pop(f"{prefix}{name}_proj_weight", None) if part is None else part
                if part is not None:
                    state_dict[f"{prefix}{name}_proj.{kind}"] = part
        super()._load_from_state_dict(state_dict, prefix, *more)


def _thirds(fused: nn.Parameter) -> list[nn.Parameter]:
    return [nn.Parameter(part.clone(), fused.requires_grad) for part in fused.detach().chunk(3)]


def _joined(parts: list[nn.Parameter]) -> nn.Parameter:
    return nn.Parameter(torch.cat([part.detach() for part in parts]), parts[0].requires_grad)


def _alike(parts: list[Any]) -> bool:
    """Whether parameters can be one: all frozen or none, or all None."""
    return len({None if part is None else part.requires_grad for part in parts}) == 1


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as it is added to scores: True hides."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)
