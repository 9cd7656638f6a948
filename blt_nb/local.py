from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from blt_nb.patching import Patches
from blt_nb.transformer import RMSNorm, Transformer, TransformerConfig, init_linear

def flat_groups(
    groups: Tensor, # (B, T) group of each item, 0..N; N is the bin for filling
    bins: int,      # N + 1
) -> Tensor: # (B · T,) group of each item when the rows of a batch lie one after the other
    "Number the groups of a whole batch."
    return (groups + bins * torch.arange(len(groups), device=groups.device)[:, None]).flatten()

def segment_max(
    x: Tensor,       # (R, c) rows
    segments: Tensor, # (R,) segment of each row
    count: int,      # S segments
) -> Tensor: # (S, c), 0 where a segment is empty
    "Largest value of each column among the rows of a segment."
    index = segments[:, None].expand_as(x)
    return x.new_zeros(count, x.shape[1]).scatter_reduce(0, index, x, "amax", include_self=False)

def segment_softmax(
    scores: Tensor,   # (R, c) float32
    segments: Tensor, # (R,) segment of each row
    count: int,       # S segments
) -> Tensor: # (R, c); the rows of a segment add up to 1 in each column
    "Softmax over the rows of each segment: no row is compared with a row of another segment, so the cost is that of R rows."
    shifted = (scores - segment_max(scores.detach(), segments, count)[segments]).exp()
    total = shifted.new_zeros(count, scores.shape[1]).index_add(0, segments, shifted)
    return shifted / total[segments]

class CrossAttention(nn.Module):
    "What pooling and unpooling share: queries from one width-d stream, keys and values from another, no positions (paper, section 3.2.2)."
    def __init__(self,
        width: int,  # d of both streams
        heads: int,  # attention heads
        eps: float = 1e-5, # of the norms
    ):
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.query_norm, self.key_norm = RMSNorm(width, eps), RMSNorm(width, eps)
        self.query, self.key_value = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        init_linear(self)

    def queries(self,
        x: Tensor, # (..., d)
    ) -> Tensor: # (..., heads, head_width), scaled
        "Normalise and project what asks."
        return self.query(self.query_norm(x)).unflatten(-1, (self.heads, self.head_width)) * self.head_width ** -0.5

    def keys_values(self,
        x: Tensor, # (..., d)
    ) -> Tensor: # (..., 2, heads, head_width)
        "Normalise and project what is looked at."
        return self.key_value(self.key_norm(x)).unflatten(-1, (2, self.heads, self.head_width))

class Pool(nn.Module):
    """One group of items → k vectors of the items' width, side by side: the vector of the group.

    The queries come from the largest value of each number among the group's items, projected k times; they attend to the items of their own
    group only. Every item belongs to one group, so scores are computed item by item with its group's k queries: no (groups × items) matrix."""
    def __init__(self,
        config: TransformerConfig, # of the local encoder: width d, heads, eps
        k: int,                    # vectors a group
    ):
        super().__init__()
        self.k = k
        self.spread = nn.Linear(config.width, k * config.width, bias=False)
        self.cross = CrossAttention(config.width, config.heads, config.eps)
        init_linear(self.spread)

    def forward(self,
        x: Tensor,        # (B, T, d) items
        patches: Patches, # their groups
    ) -> Tensor: # (B, N, k · d)
        B, T, d = x.shape
        bins = int(patches.counts.max()) + 1 # the last takes the filling
        segments, count = flat_groups(patches.groups, bins), B * bins
        seeds = self.spread(segment_max(x.flatten(0, 1), segments, count)).view(count, self.k, d)
        queries = self.cross.queries(seeds)                                              # (S, k, heads, head_width)
        keys, values = self.cross.keys_values(x.flatten(0, 1))[:, :, None].unbind(1)     # (B · T, 1, heads, head_width)
        scores = (queries[segments] * keys).sum(-1).float()                              # (B · T, k, heads)
        weights = segment_softmax(scores.flatten(1), segments, count).view_as(scores).to(values.dtype)
        parts = (weights[..., None] * values).flatten(1)
        pooled = parts.new_zeros(count, parts.shape[1]).index_add(0, segments, parts).view(count, self.k, d)
        return (seeds + self.cross.out(pooled)).view(B, bins, self.k * d)[:, :-1]

class Unpool(nn.Module):
    "Gives each item what its source group knows: it attends to the k vectors of that one group."
    def __init__(self,
        config: TransformerConfig, # of the local decoder: width d, heads, eps
        k: int,                    # vectors a group
    ):
        super().__init__()
        self.k, self.cross = k, CrossAttention(config.width, config.heads, config.eps)

    def forward(self,
        x: Tensor,       # (B, T, d) items
        groups: Tensor,  # (B, N, k, d) vectors of the groups
        sources: Tensor, # (B, T) the group that each item sees
    ) -> Tensor: # (B, T, d), to be added to x
        B, T, d = x.shape
        rows = flat_groups(sources, groups.shape[1])
        keys_values = self.cross.keys_values(groups).flatten(0, 1).flatten(1)[rows] # one gather: (B · T, k · 2 · d)
        keys, values = keys_values.view(B, T, self.k, 2, self.cross.heads, -1).unbind(3)
        scores = (self.cross.queries(x)[:, :, None] * keys).sum(-1).float()          # (B, T, k, heads)
        weights = scores.softmax(2).to(values.dtype)
        return self.cross.out((weights[..., None] * values).sum(2).flatten(2))

class LocalEncoder(nn.Module):
    "Reads items with a windowed transformer, then pools each group into one vector."
    def __init__(self,
        config: TransformerConfig, # of the items' transformer
        group_width: int,          # width of a group's vector, a multiple of the items' width
    ):
        super().__init__()
        if group_width % config.width: raise ValueError(f"the inner width {group_width} is not a multiple of the local width {config.width}; change one of them")
        self.transformer, self.pool = Transformer(config), Pool(config, group_width // config.width)

    def forward(self,
        x: Tensor,        # (B, T, d) items
        patches: Patches, # their groups
    ) -> tuple[Tensor, Tensor]: # items (B, T, d), groups (B, N, k · d)
        x = self.transformer(x)
        return x, self.pool(x, patches)

class LocalDecoder(nn.Module):
    "Turns the groups' outputs back into items: before each block, every item looks at the last group complete before the next item."
    def __init__(self,
        config: TransformerConfig, # of the items' transformer
        group_width: int,          # width of a group's vector, a multiple of the items' width
    ):
        super().__init__()
        self.k = group_width // config.width
        self.spread = nn.Linear(group_width, group_width, bias=False)
        self.transformer = Transformer(config)
        self.unpools = nn.ModuleList(Unpool(config, self.k) for _ in range(config.layers))
        init_linear(self.spread)

    def forward(self,
        x: Tensor,        # (B, T, d) items, as the encoder left them
        groups: Tensor,   # (B, N, k · d) outputs of the inner network
        patches: Patches, # the groups of the items
    ) -> Tensor: # (B, T, d)
        groups = self.spread(groups).unflatten(-1, (self.k, -1))
        rope = self.transformer.rope(x.shape[1], device=x.device)
        for unpool, block in zip(self.unpools, self.transformer.blocks):
            x = x + unpool(x, groups, patches.sources)
            x = block(x, rope)
        return x
