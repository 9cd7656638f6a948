import json, math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
import torch.nn as nn
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from blt_nb.data import OFFSET, check_ids, documents
from blt_nb.entropy import EntropyConfig, EntropyModel

@dataclass(eq=False, repr=False)
class Patches:
    """A segmentation of a batch of rows of items: of bytes into patches, of patches into second-order patches, and so on.

    A row of n items has n + 1 positions, because its items decide whether the next, unseen one starts a patch. `ValueError` if the
    tensors contradict each other or a row doesn't begin with a patch of its first item alone (BOS)."""
    starts: Tensor # (B, P) bool, P = T + 1: does a patch start at this position?
    mask: Tensor   # (B, P) bool: real positions, n + 1 for a row of n items; the filling is on the right, and what starts there is ignored

    def __post_init__(self):
        starts, mask = self.starts, self.mask
        for name, tensor in (("starts", starts), ("mask", mask)):
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool:
                raise ValueError(f"{name} is a {getattr(tensor, 'dtype', type(tensor).__name__)}; pass a tensor of bool")
            if tensor.ndim != 2 or tensor.shape[1] < 1:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it needs (rows, items + 1)")
        if starts.shape != mask.shape: raise ValueError(f"starts have shape {tuple(starts.shape)}, mask {tuple(mask.shape)}; they must be the same")
        wrong = torch.stack([~mask[:, 0], (mask[:, 1:] & ~mask[:, :-1]).any(1), ~starts[:, 0], (mask & ~starts)[:, 1:2].any(1)])
        if wrong.any(): # one look for all four, since a look makes a GPU wait
            kind, row = wrong.nonzero()[0].tolist()
            raise ValueError(f"row {row}: " + ("position 0 is masked; every row has it, even one without items",
                "the mask has a gap; real positions come first, the filling after them",
                "position 0 starts no patch; the first one always starts there",
                "position 1 starts no patch; the first item (BOS) is a patch of its own, so the next starts at 1")[kind])
        self.starts = starts & mask

    def __repr__(self): return f"Patches({len(self.mask)} rows, {int(self.counts.sum())} patches, mean length {self.mean_length:.2f})"

    @cached_property
    def items(self) -> Tensor: # (B,)
        "Items of each row."
        return self.mask.sum(1) - 1

    @cached_property
    def ids(self) -> Tensor: # (B, P)
        "The number of each position's patch, also of the position after the last item."
        return self.starts.cumsum(1) - 1

    @cached_property
    def counts(self) -> Tensor: # (B,)
        "Patches of each row that hold an item: one that starts after the last item is not counted."
        return (self.starts & self.mask).sum(1) - self.starts.gather(1, self.items[:, None])[:, 0].long()

    @cached_property
    def lengths(self) -> Tensor: # (B, N), N = counts.max()
        "Items of each patch, 0 where a row has fewer than N patches."
        number = int(self.counts.max()) if len(self.counts) else 0
        groups = self.ids[:, :-1].masked_fill(~self.item_mask, number)
        zeros = torch.zeros(len(groups), number + 1, dtype=torch.long, device=groups.device)
        return zeros.scatter_add(1, groups, torch.ones_like(groups))[:, :number]

    @cached_property
    def item_mask(self) -> Tensor: # (B, T) bool
        "Real items."
        return self.mask[:, 1:]

    @cached_property
    def groups(self) -> Tensor: # (B, T)
        "The number of each item's patch. The filling gets N, the number of a bin that pooling throws away."
        return self.ids[:, :-1].masked_fill(~self.item_mask, self.lengths.shape[1])

    @cached_property
    def sources(self) -> Tensor: # (B, T) in 0..N - 1
        "The patch whose output an item sees when it predicts the next one: the last patch that is complete before that next item."
        return (self.ids[:, 1:] - 1).clamp(0, max(self.lengths.shape[1] - 1, 0))

    @cached_property
    def ends(self) -> Tensor: # (B,)
        "Patches of each row that are known to be over, without BOS."
        return self.starts[:, 2:].sum(1)

    @property
    def mean_length(self) -> float: # items per patch
        "See the function `mean_length`, which also takes several batches."
        return mean_length([self])

    def spans(self,
        row: int, # number of the row
    ) -> list[tuple[int, int]]: # (begin, end) in items, for each patch
        "Where the patches of a row lie."
        begins = self.starts[row, :self.items[row]].nonzero()[:, 0].tolist()
        return list(zip(begins, begins[1:] + [int(self.items[row])]))

    @classmethod
    def from_lengths(cls,
        rows: Sequence[Sequence[int]], # lengths of the patches of each row, the first of them 1 (BOS)
    ) -> "Patches": # with all patches over
        "The segmentation with these lengths. `ValueError` for a length below 1, and as for `Patches`."
        width = max((sum(lengths) for lengths in rows), default=0) + 1
        starts, mask = torch.zeros(2, len(rows), width, dtype=torch.bool)
        for row, lengths in enumerate(rows):
            if any(length < 1 for length in lengths): raise ValueError(f"row {row} has lengths {list(lengths)}; each must be at least 1")
            where = torch.tensor([0, *lengths]).cumsum(0)
            starts[row, where], mask[row, :where[-1] + 1] = True, True
        return cls(starts, mask)

    def to(self,
        device: torch.device | str,
    ) -> "Patches":
        "The same on another device."
        return Patches(self.starts.to(device), self.mask.to(device))

def mean_length(
    batches: Iterable[Patches], # segmentations, for example of all batches of a data set
) -> float: # items per patch; infinite if no patch ends, NaN if there is no item
    """Mean length of the patches without the BOS ones: items after BOS, divided by the patches that are over by the end of their row.

    The items of a patch that is still open count above the line. Left out, they would take with them the long patches, which are the likelier
    to be open at the end of a window; and the mean would not always grow when a start is taken away, which `calibrate` relies on."""
    items, ends = 0, 0
    for patches in batches:
        items += int((patches.items - 1).clamp(min=0).sum())
        ends += int(patches.ends.sum())
    return items / ends if ends else math.inf if items else math.nan

def level_items(
    ids: Tensor,                    # (B, T) ids
    lengths: Tensor | None = None,  # (B,) real ids of each row; None: all
    below: Sequence[Patches] = (),  # of the levels below, the innermost last
) -> tuple[int, Tensor]: # T, items of the longest row, and (B,) real items of each row
    "What there is to cut at a level: bytes at the first, the patches of `below[-1]` at the others. `ValueError` for impossible lengths."
    if below: return below[-1].lengths.shape[1], below[-1].counts
    check_ids(ids)
    B, T = ids.shape
    if lengths is None: return T, torch.full((B,), T, device=ids.device)
    lengths = torch.as_tensor(lengths, device=ids.device)
    if lengths.shape != (B,): raise ValueError(f"lengths have shape {tuple(lengths.shape)}; {B} rows need ({B},)")
    if ((lengths < 0) | (lengths > T)).any(): raise ValueError(f"lengths are {lengths.tolist()}; rows of {T} ids need them in 0..{T}")
    return T, lengths

def make_patches(
    wanted: Tensor,    # (B, P) bool: where a rule wants a patch to start; position t may depend on items before t only
    items: Tensor,     # (B,) real items of each row
    max_length: int | None = None, # items of the longest patch that is allowed; None: no limit
) -> Patches:
    "Adds to a rule's starts the two that are always there, and one wherever a patch would get longer than `max_length`."
    positions = torch.arange(wanted.shape[1], device=wanted.device)
    starts = wanted | (positions < 2)
    if max_length is not None:
        last = torch.where(starts, positions, 0).cummax(1).values # the rule's last start, up to here
        starts = starts | ((positions - last) % max_length == 0)
    return Patches(starts, positions <= items[:, None])

class Patcher(nn.Module):
    """Decides where patches start. Called as `patcher(ids, lengths, below)`, it gives `Patches`.

    A subclass says where it wants a start in `wanted`, sets `kind`, and adds its settings to `to_dict`. The constructor takes these by name."""
    kind: str | None = None            # names the class in `to_dict`
    kinds: dict[str, type["Patcher"]] = {}  # all classes that have a name

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("kind"): Patcher.kinds[cls.kind] = cls

    def __init__(self,
        max_length: int | None = None, # items of the longest patch; None: no limit
    ):
        "`ValueError` for a maximum below 1."
        super().__init__()
        if max_length is not None and max_length < 1: raise ValueError(f"max_length is {max_length}; it must be at least 1, or None for no limit")
        self.max_length = max_length

    def wanted(self,
        ids: Tensor,                    # (B, T) ids
        lengths: Tensor | None = None,  # (B,) real ids of each row; None: all
        below: Sequence[Patches] = (),  # of the levels below, the innermost last
    ) -> Tensor: # (B, P) bool: where a patch should start, maximum length aside
        "The rule. Whether it wants a start at t depends on items before t only."
        raise NotImplementedError(f"{type(self).__name__} does not say where patches start; give it a method `wanted`")

    def forward(self,
        ids: Tensor,                    # (B, T) ids
        lengths: Tensor | None = None,  # (B,) real ids of each row; None: all
        below: Sequence[Patches] = (),  # of the levels below, the innermost last; empty at the level of bytes
    ) -> Patches: # of the bytes, or of the patches of `below[-1]`
        "Cut. Errors as in `check_ids` and `level_items`."
        items = level_items(ids, lengths, below)[1]
        return make_patches(self.wanted(ids, lengths, below), items, self.max_length)

    def to_dict(self) -> dict: # of what JSON can hold
        "The settings, without weights: those are in the `state_dict`."
        return {"kind": self.kind, "max_length": self.max_length}

    @classmethod
    def from_dict(cls,
        settings: dict, # from `to_dict`, without "kind"
    ) -> "Patcher":
        "The patcher with these settings; weights, if it has any, are random."
        return cls(**settings)

    def extra_repr(self): return ", ".join(f"{k}={v!r}" for k, v in self.to_dict().items() if k != "kind" and isinstance(v, (int, float)))

def patcher_from_dict(
    settings: dict, # from `Patcher.to_dict`
) -> Patcher: # with random weights, if it has any: load its `state_dict` into it
    "The patcher that wrote `settings`. `ValueError` for a kind that no class has."
    settings = dict(settings)
    kind = settings.pop("kind", None)
    if kind not in Patcher.kinds:
        raise ValueError(f"patcher kind {kind!r} is unknown; known are {', '.join(sorted(Patcher.kinds))}. Import the module that defines it first")
    return Patcher.kinds[kind].from_dict(settings)

class StaticPatcher(Patcher):
    "A patch every `stride` items, after BOS. Works at any level. `ValueError` for a stride below 1."
    kind = "static"
    def __init__(self,
        stride: int, # items a patch
        max_length: int | None = None, # see `Patcher`
    ):
        super().__init__(max_length)
        if stride < 1: raise ValueError(f"stride is {stride}; it must be at least 1")
        self.stride = stride

    def wanted(self, ids, lengths=None, below=()):
        T, items = level_items(ids, lengths, below)
        starts = (torch.arange(T + 1, device=ids.device) - 1) % self.stride == 0
        return starts.expand(len(items), -1)

    def to_dict(self): return super().to_dict() | {"stride": self.stride}

def check_bytes_only(
    patcher: Patcher,
    below: Sequence[Patches], # must be empty
) -> None:
    "`ValueError` if `patcher`, which looks at bytes, is to cut patches."
    if below:
        raise ValueError(f"{type(patcher).__name__} cuts bytes and was asked to cut patches, at level {len(below) + 1}; "
                         "take StaticPatcher there, or one that scores patches")

def is_spacelike(
    ids: Tensor, # ids, any shape
) -> Tensor: # bool, same shape
    "Neither a letter, nor a digit, nor the continuation byte of a longer character (SpaceByte, arXiv:2404.14408). Special ids count as space."
    b = ids - OFFSET
    word = torch.zeros_like(ids, dtype=torch.bool)
    for first, last in ((0x30, 0x39), (0x41, 0x5A), (0x61, 0x7A), (0x80, 0xBF)): word |= (b >= first) & (b <= last)
    return ~word

class SpacePatcher(Patcher):
    "A patch starts after the first byte of every run of spacelike ones, and after a special id (SpaceByte, arXiv:2404.14408). Bytes only."
    kind = "space"
    def wanted(self, ids, lengths=None, below=()):
        check_bytes_only(self, below)
        space = is_spacelike(ids)
        first = space & ~F.pad(space, (1, 0), value=True)[:, :-1]
        return F.pad(first | (ids < OFFSET), (1, 0), value=True)

def cut(
    scores: Tensor,                 # (B, T) nats
    lengths: Tensor | None = None,  # (B,) real items of each row; None: all
    threshold: float | None = None, # nats: a patch starts after an item whose score is above it; None: no such rule
    rise: float | None = None,      # nats: a patch starts after an item whose score is above the previous one's by more; None: no such rule
    max_length: int | None = None,  # items of the longest patch; None: no limit
) -> Patches:
    """Cut where the scores say so; given both rules, where both do (paper, section 2.3, equations 2 and 3).

    A higher threshold, or rise, never makes more patches. `ValueError` without any rule, for one that is NaN, or for scores that are not (B, T)."""
    if threshold is None and rise is None: raise ValueError("neither threshold nor rise is set; give one of them, or find one with calibrate(...)")
    for name, value in (("threshold", threshold), ("rise", rise)):
        if value is not None and math.isnan(value): raise ValueError(f"{name} is NaN; give a number of nats, or find one with calibrate(...)")
    if scores.ndim != 2: raise ValueError(f"scores have shape {tuple(scores.shape)}; they must be (rows, items)")
    after = torch.ones_like(scores, dtype=torch.bool)
    if threshold is not None: after &= scores > threshold
    if rise is not None: after[:, 1:] &= scores.diff(dim=1) > rise
    B, T = scores.shape
    items = torch.full((B,), T, device=scores.device) if lengths is None else lengths.to(scores.device)
    return make_patches(F.pad(after, (1, 0), value=True), items, max_length)

class ThresholdPatcher(Patcher):
    "Scores the items and cuts where the score is high, or has risen. `ValueError` for a rule that is NaN."
    def __init__(self,
        threshold: float | None = None, # nats, the global rule, see `cut`
        rise: float | None = None,      # nats, the monotonic rule, see `cut`
        max_length: int | None = None,  # see `Patcher`
    ):
        super().__init__(max_length)
        for name, value in (("threshold", threshold), ("rise", rise)):
            if value is not None and math.isnan(value): raise ValueError(f"{name} is NaN; give a number of nats, or None and calibrate")
        self.threshold, self.rise = threshold, rise

    def scores(self,
        ids: Tensor,                    # (B, T) ids
        lengths: Tensor | None = None,  # (B,) real ids of each row; None: all
        below: Sequence[Patches] = (),  # of the levels below, the innermost last
    ) -> Tensor: # (B, T) nats, one for each item of this level
        "How uncertain what comes after each item is. The score of item t depends on items up to t only."
        raise NotImplementedError(f"{type(self).__name__} has no scores; give it a method `scores`")

    def cut(self,
        scores: Tensor,                 # (B, T) nats, from `scores`
        lengths: Tensor | None = None,  # (B,) real items of each row; None: all
    ) -> Patches:
        "Cut by scores that are there already. Errors as in the function `cut`."
        return cut(scores, lengths, self.threshold, self.rise, self.max_length)

    def forward(self, ids, lengths=None, below=()):
        return self.cut(self.scores(ids, lengths, below), level_items(ids, lengths, below)[1])

    def to_dict(self): return super().to_dict() | {"threshold": self.threshold, "rise": self.rise}

class EntropyPatcher(ThresholdPatcher):
    "A patch starts before a byte that is hard to predict (paper, section 2.3). Freezes the model that it is given. Bytes only."
    kind = "entropy"
    def __init__(self,
        model: EntropyModel,            # scores a byte by the entropy of the next one
        threshold: float | None = None, # nats, see `cut`
        rise: float | None = None,      # nats, see `cut`
        max_length: int | None = None,  # see `Patcher`
        reset_at_newline: bool = False, # let the model forget everything before the last newline
    ):
        super().__init__(threshold, rise, max_length)
        self.model, self.reset_at_newline = model.requires_grad_(False).eval(), reset_at_newline

    @torch.no_grad()
    def scores(self, ids, lengths=None, below=()):
        check_bytes_only(self, below)
        check_ids(ids)
        rows = max(1, 2**16 // max(ids.shape[1], 1)) # at a time: logits of 65,536 positions are 68 MB
        parts = [self.model.entropies(part, reset_at_newline=self.reset_at_newline) for part in ids.split(rows)]
        return torch.cat(parts)

    def to_dict(self): return super().to_dict() | {"reset_at_newline": self.reset_at_newline, "model": asdict(self.model.config)}

    @classmethod
    def from_dict(cls, settings): return cls(**settings | {"model": EntropyModel(EntropyConfig(**settings["model"]))})

def byte_alphabet() -> dict[str, int]: # character -> byte
    "The characters that stand for bytes in a byte-level BPE vocabulary: a printable byte for itself, the others from U+0100 on."
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}

def train_bpe(
    texts: Dataset | IterableDataset | Iterable[str | bytes], # a corpus
    vocab_size: int, # tokens, the 256 bytes included
) -> Tokenizer: # a byte-level BPE tokenizer, its `to_str()` is what `BPEPatcher` takes
    "Learn byte pair encoding. `ValueError` if there is no room for the 256 bytes, or no text."
    if vocab_size < 256: raise ValueError(f"vocab_size is {vocab_size}; the bytes alone need 256")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=sorted(byte_alphabet()), show_progress=False)
    texts = [document.decode("utf-8", "replace") for document in documents(texts)]
    if not any(texts): raise ValueError("there is no text to learn a vocabulary from: 0 bytes")
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer

class BPEPatcher(Patcher):
    """Follows the vocabulary of a byte-level BPE tokenizer as far as one can without looking ahead. Bytes only.

    A patch is over as soon as no token continues it. `ValueError` if the tokenizer is not a byte-level BPE one."""
    kind = "bpe"
    def __init__(self,
        tokenizer_json: str, # `Tokenizer.to_str()` of the `tokenizers` library, or the text of a tokenizer.json
        max_length: int | None = None, # see `Patcher`
    ):
        super().__init__(max_length)
        tokenizer, alphabet = json.loads(tokenizer_json), byte_alphabet()
        if tokenizer["model"]["type"] != "BPE": raise ValueError(f"the tokenizer is of type {tokenizer['model']['type']}; a BPE one is needed")
        special = {token["content"] for token in tokenizer["added_tokens"]}
        self.tokenizer_json, self.trie = tokenizer_json, {} # id -> the trie below it
        for token in tokenizer["model"]["vocab"]:
            if token in special: continue
            node = self.trie
            for character in token:
                if character not in alphabet:
                    raise ValueError(f"token {token!r} holds {character!r}, which stands for no byte; take a byte-level BPE tokenizer")
                node = node.setdefault(alphabet[character] + OFFSET, {})

    def wanted(self, ids, lengths=None, below=()):
        check_bytes_only(self, below)
        rows = []
        for row in ids.tolist():
            node, starts = self.trie, [True]
            for i in row:
                node = node.get(i)   # None: no token begins like this
                starts.append(not node) # {}: one does, and none goes on
                if not node: node = self.trie
            rows.append(starts)
        wanted = torch.tensor(rows, dtype=torch.bool, device=ids.device).view(len(ids), ids.shape[1] + 1)
        wanted[:, 1:2] = True
        return wanted

    def to_dict(self): return super().to_dict() | {"tokenizer_json": self.tokenizer_json}

RULES = ("threshold", "rise")

def find_threshold(
    scored: Sequence[tuple[Tensor, Tensor | None]], # scores (B, T) in nats, and (B,) real items of each row, batch by batch
    target: float,           # wanted mean length, items a patch
    rule: str = "threshold", # which rule to find: "threshold" or "rise"
    other: float | None = None,    # nats, the other rule, if both are to hold
    max_length: int | None = None, # items of the longest patch
) -> tuple[float, float]: # nats, and the mean length that it gives
    """The threshold that comes nearest to a mean length, by bisection over the scores that occur.

    `ValueError` for a target below 1 or out of reach (naming what can be reached), an unknown rule, or no scores."""
    if rule not in RULES: raise ValueError(f"rule is {rule!r}; take one of {', '.join(map(repr, RULES))}")
    if not target >= 1 or math.isinf(target): raise ValueError(f"target is {target}; a mean length is a number from 1 on")
    fixed = {RULES[1 - RULES.index(rule)]: other, "max_length": max_length}
    values = []
    for scores, lengths in scored:
        decided = scores[:, 1:] if rule == "threshold" else scores.diff(dim=1) # what follows BOS starts a patch in any case
        real = torch.arange(1, scores.shape[1], device=scores.device) < (scores.shape[1] if lengths is None else lengths[:, None])
        values.append(decided[real.expand_as(decided)].flatten())
    values = torch.cat(values).unique() if values else torch.zeros(0)
    if not len(values): raise ValueError("there is nothing to calibrate on: no row has an item after BOS; pass batches of text")
    values = torch.cat([values[:1] - 1, (values[1:] + values[:-1]) / 2, values[-1:] + 1]).tolist() # between neighbours, and beyond both ends
    def mean(i): return mean_length(cut(scores, lengths, **{rule: values[i]}, **fixed) for scores, lengths in scored)
    low, high = 0, len(values) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if mean(middle) <= target: low = middle
        else: high = middle
    shortest, below, above = mean(0), mean(low), mean(high)
    longest = below if math.isinf(above) else above # where `above` is infinite, no patch ends, and `below` is next to it
    if not shortest <= target <= longest:
        if target < shortest: remedy = "take a larger target" + ("" if other is None else f", or a smaller {RULES[1 - RULES.index(rule)]} than {other:.4g}")
        else: remedy = "take a smaller target or more text" + ("" if max_length is None else f", or a larger max_length than {max_length}")
        raise ValueError(f"no {rule} gives a mean length of {target:.4g}: on these {len(values) - 1:,} different scores it goes from "
                         f"{shortest:.4g} to {longest:.4g}; {remedy}")
    best = low if target - below <= above - target else high
    return values[best], mean(best)

def calibrate(
    patcher: ThresholdPatcher, # gets the threshold
    batches: Iterable,         # of text: ids (B, T), or (ids, lengths), or (ids, lengths, below)
    target: float,             # wanted mean length, items a patch
    rule: str = "threshold",   # which rule to set: "threshold" or "rise"; the other one, if set, stays and must hold too
) -> ThresholdPatcher: # the same patcher
    """Set the threshold such that patches of this data have the target's mean length, and print what was reached.

    Every batch is scored once. `TypeError` for a patcher without threshold or batches of something else; other errors as in `find_threshold`."""
    if not isinstance(patcher, ThresholdPatcher): raise TypeError(f"a {type(patcher).__name__} has no threshold to calibrate; take one that has scores")
    if rule not in RULES: raise ValueError(f"rule is {rule!r}; take one of {', '.join(map(repr, RULES))}")
    scored = []
    for batch in batches:
        batch = (batch,) if isinstance(batch, Tensor) else tuple(batch)
        if len(batch) > 2 and not all(isinstance(patches, Patches) for patches in batch[2]):
            raise TypeError("the third part of a batch is not a list of Patches; pass (ids, lengths) or (ids, lengths, below)")
        scored.append((patcher.scores(*batch), level_items(*batch)[1]))
    other = getattr(patcher, RULES[1 - RULES.index(rule)])
    value, mean = find_threshold(scored, target, rule, other, patcher.max_length)
    setattr(patcher, rule, value)
    print(f"{rule} {value:.4f} nats: mean length {mean:.3f} (target {target:g}) on {sum(int(n.sum()) for _, n in scored):,} items")
    return patcher
