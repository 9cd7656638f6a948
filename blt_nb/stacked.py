"""If uncertainty about the next byte cuts text into patches, can what is expected of the next patch cut patches into phrases?"""

# %% imports
import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import asdict

import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .data import OFFSET, Loader
from .entropy import entropy_of, hash_powers, ngram_hashes
from .generation import State
from .model import BLT, BLTConfig, LevelConfig, PatchedLoader, blt_config, get_blt, train_blt_stage, training_flops
from .patching import EntropyPatcher, Patcher, Patches, ThresholdPatcher, calibrate, complete_items
from .training import config_from_json, fit, load_or_train, load_splits, preset
from .transformer import RMSNorm, TransformerConfig, init_linear

# %% where
def last_bytes(
    patches: Sequence[Patches], # one per level, outermost first
) -> Tensor: # (B, N) position of the last byte of each innermost patch
    "Where the model has read a patch to its end and says what comes next."
    last = patches[-1].last_items
    for outer in reversed(patches[:-1]): last = outer.last_items.gather(1, last.clamp(max=outer.most - 1))
    return last

def at_patch_ends(
    x: Tensor,                  # (B, T, ...) something about each byte
    patches: Sequence[Patches], # one per level, outermost first
) -> Tensor: # (B, N, ...)
    "What it is at the last byte of each innermost patch."
    return x[torch.arange(len(x), device=x.device)[:, None], last_bytes(patches)]

# %% sums
def next_patch_entropies(
    logits: Tensor,             # (B, T, 260) of the id after each position
    patches: Sequence[Patches], # one per level, outermost first
) -> tuple[Tensor, Tensor]: # (B, N) nats; (B, N) bool: is the next patch complete, so that its sum is whole?
    """For each innermost patch the sum of the model's conditional entropies along the next one, Σ_t H(x_t | x_<t).

    Its mean over what may come next is the entropy of the next patch, U = E[-ln p(next patch)] (chain rule). So is that of
    the realised surprisal, which varies more: an entropy already averages over the byte to come (Rao-Blackwell)."""
    entropy, N = entropy_of(logits), patches[-1].most
    number = patches[0].ids[:, 1:] # of the patch that the byte after each position belongs to
    for inner in patches[1:]: number = inner.ids.gather(1, number.clamp(max=inner.ids.shape[1] - 1))
    real = patches[0].item_mask
    sums = entropy.new_zeros(len(entropy), N + 2)
    sums = sums.scatter_add(1, number.masked_fill(~real, N + 1), entropy.masked_fill(~real, 0.0))
    unseen = number.gather(1, (patches[0].items[:, None] - 1).clamp(min=0)) # patches before this one are over
    return sums[:, 1:N + 1], unseen > torch.arange(1, N + 1, device=sums.device)

@torch.no_grad()
def sample_next_patch_entropy(
    blt: BLT,
    texts: Sequence[Sequence[int]], # ids of each, BOS first, up to the end of an innermost patch
    samples: int = 16,              # next patches that the model writes for each
    longest: int = 64,              # bytes of a patch
    seed: int = 0,
) -> Tensor: # (texts,) nats
    "U by Monte Carlo: let the model write the next patch, sum its entropies on the way, and take the mean."
    state, random = State(blt, [text for text in texts for _ in range(samples)]), torch.Generator().manual_seed(seed)
    sums = torch.zeros(len(state.logits))
    live = torch.ones(len(sums), dtype=torch.bool)
    for _ in range(longest):
        logits = state.logits.float().cpu()
        sums += entropy_of(logits) * live
        state.push(torch.multinomial(logits.softmax(-1), 1, generator=random)[:, 0])
        live &= ~state.ends[-1].cpu()
        if not live.any(): break
    return sums.view(-1, samples).mean(1)

# %% head
class NextPatchEntropyHead(nn.Module):
    "Sees what a BLT knows at the last byte of a patch, and says how many nats the next patch will cost."
    def __init__(self,
        width: int,  # d of a byte in the BLT's decoder
        hidden: int, # width inside
    ):
        super().__init__()
        self.norm, self.inside, self.out = RMSNorm(width), nn.Linear(width + 1, hidden), nn.Linear(hidden, 1)
        init_linear(self)
        for layer in (self.inside, self.out): nn.init.zeros_(layer.bias)
        self.register_buffer("mean", torch.zeros(2)) # of what it predicts, and of the entropy of the first byte; nats
        self.register_buffer("std", torch.ones(2))

    def forward(self,
        x: Tensor,      # (..., d) what the decoder knows at the last byte of a patch
        logits: Tensor, # (..., 260) of the byte after it
    ) -> Tensor: # (...) nats, float32
        first = (entropy_of(logits) - self.mean[1]) / self.std[1]
        inside = F.silu(self.inside(torch.cat([self.norm(x), first[..., None].to(x.dtype)], -1)))
        return self.mean[0] + self.std[0] * self.out(inside).squeeze(-1).float()

class NextPatchEntropyModel(nn.Module):
    "A frozen BLT, and a head that says from what it knows how many nats the next patch will cost."
    def __init__(self,
        backbone: BLT, # any number of levels, see `BLT.without_patchers`
        head: NextPatchEntropyHead,
    ):
        super().__init__()
        self.backbone, self.head = backbone.requires_grad_(False).eval(), head

    def forward(self,
        ids: Tensor,                # (B, T)
        patches: Sequence[Patches], # one per level of the backbone, outermost first
        state=None,                 # of the backbone's levels, to be filled
    ) -> tuple[Tensor, Tensor]: # U about the patch after each innermost one, (B, N) nats; the backbone's logits (B, T, 260)
        with torch.no_grad():
            x = self.backbone.level(self.backbone.embed(ids), patches, state)
            logits = self.backbone.logits(x)
        return self.head(at_patch_ends(x, patches), at_patch_ends(logits, patches)), logits

def train_next_patch_entropy_model(
    blt: BLT,              # trained, any number of levels; stays as it is
    loader: PatchedLoader, # batches with the patches of its levels
    hidden: int,           # width inside the head
    steps: int,            # optimiser steps
    lr: float,             # peak learning rate
    seed: int = 0,         # of the head's weights
) -> tuple[NextPatchEntropyModel, pd.DataFrame]: # and its history, where the loss is in units of the target's variance
    "Teach a head on a frozen BLT to say the sum of the BLT's own conditional entropies along the next patch."
    torch.manual_seed(seed)
    model = NextPatchEntropyModel(blt.without_patchers(), NextPatchEntropyHead(blt.config.levels[0].encoder.width, hidden))
    seen, device = [], blt.head.weight.device
    model.to(device)
    for i in range(8): # their mean and spread set the scale
        ids, patches = loader.batch(i)
        patches = [p.to(device) for p in patches]
        _, logits = model(ids.to(device), patches)
        target, complete = next_patch_entropies(logits, patches)
        seen.append(torch.stack([target[complete], entropy_of(at_patch_ends(logits, patches))[complete]]))
    seen = torch.cat(seen, 1)
    model.head.mean.copy_(seen.mean(1))
    model.head.std.copy_(seen.std(1))
    def loss(model, ids, patches):
        said, logits = model(ids, patches)
        target, complete = next_patch_entropies(logits, patches)
        return ((said - target) / seen[0].std())[complete].square().mean()
    history = fit(model, loader, steps, lr, loss=loss, weight_decay=0.01, title="next-patch entropy")
    history["loss"] *= math.log(2) # `fit` gives bits
    return model.eval(), history

# %% backbone patcher
class BackbonePatcher(ThresholdPatcher):
    """Cuts by what a frozen trained BLT makes of the text. Its innermost patches are the items that are cut, so one of
    n levels cuts at level n + 1. `ValueError` in `scores` unless `below` has the patches of all of its levels."""
    def __init__(self,
        backbone: BLT, # see `BLT.without_patchers`
        threshold: float | None = None, # see `ThresholdPatcher`
        rise: float | None = None,      # see `ThresholdPatcher`
        max_length: int | None = None,  # see `Patcher`
    ):
        super().__init__(threshold, rise, max_length)
        self.backbone = backbone.requires_grad_(False).eval()

    def prepare(self, ids, lengths, below, state): # checks, and sets the lengths of the texts in the state to be filled
        if len(below) != len(self.backbone.config.levels):
            raise ValueError(f"this {type(self).__name__} reads {len(self.backbone.config.levels)} levels of patches and was "
                             f"given {len(below)}; pass those that its backbone cuts, below=model.segment(ids)")
        if state is None: return None
        state.memory["level"].lengths = torch.full_like(state.items, ids.shape[1]) if lengths is None else lengths
        return state.memory["level"]

    def start(self, rows, device=None):
        state = super().start(rows, device)
        state.memory = {"level": self.backbone.level.start(rows)}
        return state

    def to_dict(self): return super().to_dict() | {"backbone": asdict(self.backbone.config)}

    @classmethod
    def from_dict(cls, settings):
        return cls(**settings | {"backbone": BLT(config_from_json(BLTConfig, settings["backbone"], f"{cls.kind} patcher"))})

# %% U patcher
class NextPatchEntropyPatcher(BackbonePatcher):
    "Starts a second-order patch where a trained BLT is uncertain about the next patch: U is high, or has risen."
    kind = "next-patch entropy"
    def __init__(self,
        backbone: BLT,
        head: NextPatchEntropyHead, # trained on it, see `train_next_patch_entropy_model`
        threshold: float | None = None, # nats
        rise: float | None = None,      # nats
        max_length: int | None = None,
    ):
        super().__init__(backbone, threshold, rise, max_length)
        self.head = head.requires_grad_(False).eval()

    def scores(self, ids, lengths=None, below=(), state=None):
        state = self.prepare(ids, lengths, below, state)
        return NextPatchEntropyModel(self.backbone, self.head)(ids, below, state)[0]

    def next_score(self, ids, ends, state):
        x = self.backbone.level.step(self.backbone.embed.last(ids), ends, state.memory["level"])
        return self.head(x, self.backbone.logits(x))[:, 0]

    def flops(self, mean_lengths, window): return sum(self.backbone.flops(mean_lengths, window).values())
    def to_dict(self): return super().to_dict() | {"hidden": self.head.inside.out_features}

    @classmethod
    def from_dict(cls, settings):
        backbone = BLT(config_from_json(BLTConfig, settings["backbone"], f"{cls.kind} patcher"))
        head = NextPatchEntropyHead(backbone.config.levels[0].encoder.width, settings["hidden"])
        settings = {name: value for name, value in settings.items() if name != "hidden"}
        return cls(**settings | {"backbone": backbone, "head": head})

# %% novelty
def novelty(
    states: Tensor, # (..., d) latent states h_n
    before: Tensor, # (..., d) the states h_{n-1} before them
) -> Tensor: # (...) in 0..2
    "How far the last patch has moved what the model expects: 1 - cos(h_n, h_{n-1})."
    return 1 - F.cosine_similarity(states.float(), before.float(), dim=-1)

class NoveltyPatcher(BackbonePatcher):
    "A second-order patch ends after a patch that has moved the latent state of a trained BLT far: see `novelty`. Nothing to train."
    kind = "novelty"
    def scores(self, ids, lengths=None, below=(), state=None):
        level = self.prepare(ids, lengths, below, state)
        states = self.backbone.level.states(self.backbone.embed(ids), below, level)
        if state is not None:
            last = (complete_items(level.lengths, below) - 1).clamp(min=0)
            state.memory["before"] = states[torch.arange(len(states), device=states.device), last]
        return novelty(states, F.pad(states, (0, 0, 1, 0))[:, :-1])

    def next_score(self, ids, ends, state):
        states = self.backbone.level.states_step(self.backbone.embed.last(ids), ends, state.memory["level"])
        if states is None: return torch.zeros_like(state.before)
        before = state.memory.get("before", torch.zeros_like(states[:, 0]))
        state.memory["before"] = torch.where(ends[-1][:, None], states[:, 0], before)
        return novelty(states[:, 0], before)

    def flops(self, mean_lengths, window):
        parts = self.backbone.flops(mean_lengths, window)
        return sum(parts[part] for part in parts if part.split()[0] in ("n-grams", "encoder", "pooling", "latent"))

# %% controls
def hash_noise(
    ids: Tensor, # (B, T)
) -> Tensor: # (B, T) in 0..1
    "A number that the last eight bytes decide: like a random one, but the same whenever it is asked for."
    hashes = ngram_hashes(ids.long(), hash_powers([8]).to(ids.device), 2**20)[..., 0]
    return (hashes * 2654435761 % 2**20).float() / 2**20

def punctuation(
    ids: Tensor, # (B, T)
) -> Tensor: # (B, T) 4 at the end of a line, 3 of a sentence, 2 at other marks, 1 at a space, else 0; and up to a half of noise
    "How much of a break a byte is to a reader."
    score = torch.zeros(ids.shape, device=ids.device)
    for value, marks in enumerate((b" ", b",;:()[]{}\"'`=-", b".!?", b"\n"), start=1):
        for mark in marks: score = score.masked_fill(ids == mark + OFFSET, float(value))
    return score + 0.5 * hash_noise(ids)

CONTROLS = {"random": hash_noise, "punctuation": punctuation}

class ControlPatcher(ThresholdPatcher):
    "Starts a patch of patches after one whose last byte scores high, whatever a model makes of it. `ValueError` for an unknown score."
    kind, reach = "control", 8 # ids that a score looks back on
    def __init__(self,
        score: str,                      # one of `CONTROLS`
        threshold: float | None = None,  # of the score
        max_length: int | None = None,   # see `Patcher`
    ):
        super().__init__(threshold, None, max_length)
        if score not in CONTROLS: raise ValueError(f"score is {score!r}; take one of {', '.join(map(repr, CONTROLS))}")
        self.score = score

    def scores(self, ids, lengths=None, below=(), state=None):
        scores = CONTROLS[self.score](ids)
        return at_patch_ends(scores, below) if below else scores

    def next_score(self, ids, ends, state): return CONTROLS[self.score](ids)[:, -1]
    def to_dict(self): return {"kind": self.kind, "max_length": self.max_length, "threshold": self.threshold, "score": self.score}

class LastByteEntropyPatcher(EntropyPatcher):
    "Starts a patch of patches where the byte that follows is hard to predict: the rule of the first level, one level higher."
    kind, bytes_only = "last-byte entropy", False
    def scores(self, ids, lengths=None, below=(), state=None):
        return at_patch_ends(super().scores(ids, lengths, (), state), below)

class LengthPatcher(ThresholdPatcher):
    "Starts a patch of patches after one that is long, in bytes."
    kind = "length"
    def scores(self, ids, lengths=None, below=(), state=None):
        last = last_bytes(below)
        if state is not None: # bytes of what is not over yet
            items = torch.full_like(state.items, ids.shape[1]) if lengths is None else lengths
            over = complete_items(items, below)
            state.memory = items - 1 - F.pad(last, (1, 0), value=-1).gather(1, over[:, None])[:, 0]
        return last.diff(dim=1, prepend=last.new_full((len(last), 1), -1)).float()

    def next_score(self, ids, ends, state):
        length = (0 if state.memory is None else state.memory) + torch.ones_like(state.items)
        state.memory = torch.where(ends[-1], 0, length)
        return length.float()

# %% stack
def stack(
    blt: BLT,                   # trained; stays as it is
    patcher: Patcher,           # cuts its innermost patches, for example a `NoveltyPatcher`
    latent: TransformerConfig,  # of the new innermost transformer; its width is a multiple of the old one's
) -> BLT: # one level more; its logits are those of `blt` until it is trained
    """Grow a level: the trained latent transformer becomes the encoder (first half of its blocks) and the decoder (the rest) of a new level.

    What the new level says enters through projections that start at zero, so nothing changes at first. `ValueError` for a latent transformer
    of fewer than two blocks."""
    old = blt.config.latent
    if old.layers < 2:
        raise ValueError(f"the latent transformer has {old.layers} block; it takes two, one to read and one to write the new level")
    half = old.layers // 2
    encoder, decoder = dataclasses.replace(old, layers=half), dataclasses.replace(old, layers=old.layers - half)
    levels = [*blt.config.levels, LevelConfig(encoder, decoder, norm=False)] # a norm would change what it says
    grown = BLT(dataclasses.replace(blt.config, levels=levels, latent=latent), [*copy.deepcopy(blt.patchers), patcher])
    prefix = "level." + "inner." * len(blt.config.levels)
    weights = grown.state_dict()
    for name, tensor in blt.state_dict().items():
        if name.startswith(prefix + "blocks."):
            number, rest = name.removeprefix(prefix + "blocks.").split(".", 1)
            part, number = ("encoder", int(number)) if int(number) < half else ("decoder", int(number) - half)
            name = f"{prefix}{part}.transformer.blocks.{number}.{rest}"
        weights[name] = tensor
    for name in weights:
        if name.startswith(prefix + "decoder.unpools.") and name.endswith("cross.out.weight"):
            weights[name] = torch.zeros_like(weights[name])
    grown.load_state_dict(weights)
    return grown

# %% config of preset
def stacked_config() -> BLTConfig:
    "The two-level BLT of the running preset: the byte level of the one-level model, and one level more."
    p, one = preset("stacked"), blt_config()
    items = dict(width=one.latent.width, heads=one.latent.heads)
    level = LevelConfig(TransformerConfig(layers=p.encoder_layers, **items), TransformerConfig(layers=p.decoder_layers, **items))
    latent = TransformerConfig(width=p.latent_width, layers=p.latent_layers, heads=p.latent_heads)
    return BLTConfig([*one.levels, level], latent, one.ngrams)

# %% train
def second_level_patcher(
    blt: BLT,      # trained, any number of levels, with its patchers
    seed: int = 2, # of the text
) -> NoveltyPatcher: # calibrated to the running preset's mean length on training text
    "What cuts the patches of a trained BLT: its own novelty."
    data, p = preset("data"), preset("stacked")
    loader = PatchedLoader(Loader(load_splits()[0], data.window, data.batch_size, seed), blt.segment)
    batches = ((ids, None, patches) for ids, patches in map(loader.batch, range(32)))
    return calibrate(NoveltyPatcher(blt.without_patchers(), max_length=p.max_group), batches, p.mean_group)

def train_stacked(
    seed: int = 0, # of weights and data order
) -> tuple[BLT, pd.DataFrame]: # the model and its history, see `blt_nb.training.fit`
    """Train the two-level BLT of the running preset from scratch, score it, and save it as the stage `blt-2`.

    It sees the text of the one-level model in the same order, and spends as many training FLOPs, cutting included."""
    blt, data, p = get_blt(), preset("data"), preset("stacked")
    patcher = second_level_patcher(blt)
    torch.manual_seed(seed)
    model = BLT(stacked_config(), [*copy.deepcopy(blt.patchers), patcher])
    lengths = [preset("blt").mean_patch, p.mean_group]
    steps = preset("blt").steps * training_flops(blt, lengths[:1], data.window) / training_flops(model, lengths, data.window)
    return model, train_blt_stage("blt-2", model, max(1, round(steps)), p.lr, seed)

def get_stacked() -> BLT:
    "The two-level BLT of the running preset, loaded if there is a fitting checkpoint, else trained."
    return load_or_train("blt-2", BLT, train_stacked)
