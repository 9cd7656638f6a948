from dataclasses import dataclass
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

@dataclass
class TransformerConfig:
    "Sizes of a stack of blocks. `ValueError` for sizes that don't fit together."
    width: int = 128             # d, numbers that describe a position
    layers: int = 2              # blocks, one after the other
    heads: int = 2               # attention heads; each is width / heads wide
    kv_heads: int | None = None  # heads of keys and values; fewer than `heads` are shared (grouped-query attention). None: as many
    window: int | None = None    # positions that attention sees, its own included; None: all before it
    hidden: int | None = None    # width inside SwiGLU; None: about 8/3 of `width`, rounded to a multiple of 32
    theta: float = 500_000.0     # base of the rotary angles
    eps: float = 1e-5            # added to the mean square in RMSNorm

    def __post_init__(self):
        self.kv_heads = self.kv_heads or self.heads
        self.hidden = self.hidden or max(32, 32 * round(8 * self.width / 3 / 32))
        for name in ("width", "layers", "heads", "kv_heads", "hidden"):
            if getattr(self, name) < (0 if name == "layers" else 1): raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.width % (2 * self.heads): raise ValueError(f"width {self.width} does not split into {self.heads} heads of an even width; change one of them")
        if self.heads % self.kv_heads: raise ValueError(f"{self.heads} heads can't share {self.kv_heads} heads of keys and values; take a divisor of {self.heads}")
        if self.window is not None and self.window < 1: raise ValueError(f"window is {self.window}; it must be at least 1, or None for no limit")

class RMSNorm(nn.Module):
    "Divides each vector by its root mean square, then scales each of its numbers by a learned weight (arXiv:1910.07467)."
    def __init__(self,
        width: int,         # d
        eps: float = 1e-5,  # added to the mean square, so that zeros stay zeros
    ):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self,
        x: Tensor, # (..., d)
    ) -> Tensor: # (..., d), same dtype
        # the weight takes the dtype of x: mixed dtypes would leave the fused kernel for a slow path
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)

def rope_table(
    positions: Tensor, # (T,) positions in the text
    head_width: int,   # width of one head, even
    theta: float,      # base of the angles
) -> tuple[Tensor, Tensor]: # cosines and sines, (T, head_width / 2) float32
    "Angles of rotary position embedding: pair i of a head turns by positions · theta^(-2i / head_width) (arXiv:2104.09864)."
    rates = theta ** (-torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width)
    angles = positions[:, None].float() * rates
    return angles.cos(), angles.sin()

def rotate(
    x: Tensor,                     # (B, T, h, head_width) queries or keys
    rope: tuple[Tensor, Tensor],   # from `rope_table`
) -> Tensor: # (B, T, h, head_width)
    "Turn each pair (x[i], x[i + head_width / 2]) by its position's angle."
    cos, sin = (t[:, None].to(x.dtype) for t in rope)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

def band_mask(
    queries: int,        # Q: the last Q of the positions ask
    keys: int,           # K: positions that may be seen
    window: int | None,  # positions that each sees, its own included
    device: torch.device | None = None,
) -> Tensor: # (Q, K) bool, true where the query sees the key
    "Causal and at most `window` back."
    q, k = torch.arange(keys - queries, keys, device=device)[:, None], torch.arange(keys, device=device)
    return (k <= q) & (k > q - (window or keys))

def windowed_attention(
    q: Tensor, # (B, h, T, head_width)
    k: Tensor, # (B, h_kv, T, head_width)
    v: Tensor, # (B, h_kv, T, head_width)
    window: int | None, # positions that each sees, its own included; None: all before it
) -> Tensor: # (B, h, T, head_width)
    """Causal attention in which a position sees the last `window` positions.

    Queries are cut into blocks; a block of `c` needs only its own keys and the `window - 1` before them, so the cost is O(T · window)."""
    B, h, T, width = q.shape
    if window is None or T <= window: return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != h)
    c = max(32, window // 2)                     # block of queries
    back = -(-(window - 1) // c) * c             # keys before the block, whole blocks
    blocks, span = -(-T // c), back + c
    pad = blocks * c - T
    mask = band_mask(c, span, window, q.device).repeat(blocks, 1, 1)      # (blocks, c, span)
    for i in range(back // c): mask[i, :, :back - i * c] = False           # nothing lies before the text
    q = F.pad(q, (0, 0, 0, pad)).view(B, h, blocks, c, width)
    k, v = (F.pad(t, (0, 0, back, pad)).unfold(2, span, c).transpose(-1, -2) for t in (k, v))
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))         # (B · blocks, heads, positions, width)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(B, 1, 1)[:, None], enable_gqa=k.shape[1] != h)
    return y.view(B, blocks, h, c, width).transpose(1, 2).reshape(B, h, blocks * c, width)[:, :, :T]

class KVCache:
    "Keys and values that one attention layer has computed, as far back as a later position can see."
    def __init__(self,
        window: int | None = None, # positions that attention sees, its own included; None: all
    ):
        self.window, self.length, self.k, self.v = window, 0, None, None # length: positions seen, dropped ones included

    def extend(self,
        k: Tensor, # (B, h_kv, T, head_width) of the new positions
        v: Tensor, # (B, h_kv, T, head_width)
    ) -> tuple[Tensor, Tensor]: # kept and new ones together
        "Add new positions, then forget those that no later one sees."
        if self.k is not None: k, v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        self.length += k.shape[2] - (0 if self.k is None else self.k.shape[2])
        keep = k.shape[2] if self.window is None else min(k.shape[2], self.window - 1)
        self.k, self.v = k[:, :, k.shape[2] - keep:], v[:, :, v.shape[2] - keep:]
        return k, v

class Attention(nn.Module):
    "Causal self-attention with rotary positions, a window, and shared heads of keys and values."
    def __init__(self,
        config: TransformerConfig,
    ):
        super().__init__()
        self.heads, self.kv_heads, self.window = config.heads, config.kv_heads, config.window
        self.head_width = config.width // config.heads
        self.qkv = nn.Linear(config.width, (self.heads + 2 * self.kv_heads) * self.head_width, bias=False)
        self.out = nn.Linear(self.heads * self.head_width, config.width, bias=False)

    def forward(self,
        x: Tensor,                    # (B, T, d)
        rope: tuple[Tensor, Tensor],  # angles of these T positions
        cache: KVCache | None = None, # keys and values of earlier positions; the new ones are added
    ) -> Tensor: # (B, T, d)
        B, T, _ = x.shape
        q, k, v = self.qkv(x).view(B, T, -1, self.head_width).split([self.heads, self.kv_heads, self.kv_heads], 2)
        q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is None or cache.length == 0:
            if cache is not None: cache.extend(k, v)
            y = windowed_attention(q, k, v, self.window)
        else:
            k, v = cache.extend(k, v)
            mask = band_mask(T, k.shape[2], self.window, x.device)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.heads != self.kv_heads)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))

class SwiGLU(nn.Module):
    "The feed-forward half of a block: down(silu(gate(x)) · up(x)) (arXiv:2002.05202)."
    def __init__(self,
        width: int,  # d
        hidden: int, # width inside
    ):
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self,
        x: Tensor, # (..., d)
    ) -> Tensor: # (..., d)
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)

class Block(nn.Module):
    "Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."
    def __init__(self,
        config: TransformerConfig,
    ):
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(config.width, config.eps), Attention(config)
        self.mlp_norm, self.mlp = RMSNorm(config.width, config.eps), SwiGLU(config.width, config.hidden)

    def forward(self,
        x: Tensor,                    # (B, T, d)
        rope: tuple[Tensor, Tensor],  # from `rope_table`
        cache: KVCache | None = None, # of this block's attention
    ) -> Tensor: # (B, T, d)
        x = x + self.attention(self.attention_norm(x), rope, cache)
        return x + self.mlp(self.mlp_norm(x))

def init_linear(
    module: nn.Module, # initialised in place, submodules included
    depth: int = 1,    # residual branches that add up in the same stream
) -> None:
    "Normal weights, truncated at 3σ with σ = 1/√inputs; those that end a residual branch (`out`, `down`) smaller by √depth."
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            std = layer.in_features ** -0.5 / (depth ** 0.5 if name.endswith(("out", "down")) else 1)
            nn.init.trunc_normal_(layer.weight, std=std, a=-3 * std, b=3 * std)

class Transformer(nn.Module):
    "Blocks in a row. No embedding before and no norm after: whoever uses it adds those."
    def __init__(self,
        config: TransformerConfig,
    ):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        init_linear(self, depth=2 * max(1, config.layers))

    def caches(self) -> list[KVCache]: # one a block
        "Empty caches, to give to `forward` piece after piece of one text."
        return [KVCache(self.config.window) for _ in self.blocks]

    def rope(self,
        length: int,    # T
        start: int = 0, # position of the first
        device: torch.device | None = None,
    ) -> tuple[Tensor, Tensor]: # angles of T positions
        "The rotary angles that all blocks share."
        return rope_table(torch.arange(start, start + length, device=device), self.config.width // self.config.heads, self.config.theta)

    def forward(self,
        x: Tensor,                                # (B, T, d)
        caches: Sequence[KVCache] | None = None,  # from `caches`, if x goes on where they end
    ) -> Tensor: # (B, T, d)
        rope = self.rope(x.shape[1], caches[0].length if caches else 0, x.device)
        for i, block in enumerate(self.blocks): x = block(x, rope, caches[i] if caches else None)
        return x
