import copy, dataclasses, math
from collections.abc import Sequence
from dataclasses import asdict

import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from blt_nb.data import Loader
from blt_nb.model import BLT, BLTConfig, LevelConfig, PatchedLoader, blt_config, fit_blt, get_blt, save_blt, training_flops
from blt_nb.patching import Patches, ThresholdPatcher, calibrate
from blt_nb.training import fit, load_or_train, load_splits, preset
from blt_nb.transformer import RMSNorm, TransformerConfig, init_linear

class SurprisalHead(nn.Module):
    "A small network that reads a latent state and says how many nats the next patch will cost."
    def __init__(self,
        width: int,  # d of the latent states
        hidden: int, # width inside
    ):
        super().__init__()
        self.norm, self.inside, self.out = RMSNorm(width), nn.Linear(width, hidden, bias=False), nn.Linear(hidden, 1)
        init_linear(self)
        nn.init.zeros_(self.out.bias)
        self.register_buffer("mean", torch.zeros(())) # of what it predicts, nats
        self.register_buffer("std", torch.ones(()))

    def forward(self,
        states: Tensor, # (B, N, d)
    ) -> Tensor: # (B, N) nats, float32
        return self.mean + self.std * self.out(F.silu(self.inside(self.norm(states)))).squeeze(-1).float()

def next_groups(
    patches: Sequence[Patches], # one a level, outermost first
) -> Tensor: # (B, T) number of the innermost patch that the byte after each position belongs to
    "Which innermost patch each prediction is a part of."
    number = patches[0].ids[:, 1:]
    for inner in patches[1:]: number = inner.ids.gather(1, number.clamp(max=inner.ids.shape[1] - 1))
    return number

def next_patch_entropies(
    logits: Tensor,             # (B, T, 260) of the id after each position
    patches: Sequence[Patches], # one a level, outermost first
) -> tuple[Tensor, Tensor]: # (B, N) nats and (B, N) bool: where the next innermost patch is complete, so that the sum is whole
    """For each innermost patch the sum of the model's conditional entropies along the next one, Σ_t H(x_t | x_<t) over its bytes.

    Its mean over what may come next is the entropy of the next patch, U = E[-ln p(next patch)], as is that of the realised surprisal; but it
    varies less, since at each byte the entropy already averages over all that could have come (Rao-Blackwell)."""
    log_p = logits.float().log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    inner, number = patches[-1], next_groups(patches)
    real = patches[0].item_mask
    N = inner.lengths.shape[1]
    sums = entropy.new_zeros(len(entropy), N + 2).scatter_add(1, number.masked_fill(~real, N + 1), entropy.masked_fill(~real, 0.0))
    complete = inner.starts.sum(1)[:, None] - 1 > torch.arange(1, N + 1, device=sums.device) # patch j + 1 ends where patch j + 2 starts
    return sums[:, 1:N + 1], complete

class SurprisalPatcher(ThresholdPatcher):
    """Starts a second-order patch where the latent transformer of a trained BLT is uncertain about the next patch.

    `maker` is that BLT without its decoder, frozen. It may have any number of levels: its innermost patches are the items that are cut."""
    kind = "surprisal"
    def __init__(self,
        maker: BLT,          # reads; see `BLT.reader`
        head: SurprisalHead, # uncertainty from its latent states
        threshold: float | None = None, # nats, see `blt_nb.patching.cut`
        rise: float | None = None,      # nats, see `blt_nb.patching.cut`
        max_length: int | None = None,  # items of the longest patch; None: no limit
    ):
        super().__init__(threshold, rise, max_length)
        self.maker, self.head = maker.requires_grad_(False).eval(), head.requires_grad_(False).eval()

    @torch.no_grad()
    def scores(self, ids, lengths=None, below=()):
        "Uncertainty U about the patch after each item, in nats. `ValueError` unless `below` has the patches of all of the maker's levels."
        if len(below) != len(self.maker.config.levels):
            raise ValueError(f"this SurprisalPatcher reads {len(self.maker.config.levels)} levels of patches and was given {len(below)}; "
                             "pass those that the model it was made from cuts, below=model.segment(ids)")
        return self.head(self.maker.states(ids, below))

    def to_dict(self):
        return super().to_dict() | {"maker": asdict(self.maker.config), "hidden": self.head.inside.out_features}

    @classmethod
    def from_dict(cls, settings):
        maker = BLT(BLTConfig(**settings.pop("maker")))
        return cls(maker, SurprisalHead(maker.config.latent.width, settings.pop("hidden")), **settings)

def train_surprisal_head(
    blt: BLT,          # trained, any number of levels; stays as it is
    loader: PatchedLoader, # batches with the patches of its levels
    hidden: int,       # width inside the head
    steps: int,        # optimiser steps
    lr: float,         # peak learning rate
    seed: int = 0,     # of the weights
) -> tuple[SurprisalHead, pd.DataFrame]: # the head and its history; the loss is in units of the target's variance
    "Regress the sum of conditional entropies along the next patch (see `next_patch_entropies`) on the latent states of a frozen BLT."
    torch.manual_seed(seed)
    head, blt = SurprisalHead(blt.config.latent.width, hidden), blt.eval()
    device = next(blt.parameters()).device
    targets = []
    with torch.no_grad():
        for i in range(4):
            ids, patches = loader.batch(i)
            target, complete = next_patch_entropies(blt(ids.to(device), [p.to(device) for p in patches]), [p.to(device) for p in patches])
            targets.append(target[complete])
    targets = torch.cat(targets)
    head.mean.copy_(targets.mean())
    head.std.copy_(targets.std())
    def loss(head, ids, patches):
        with torch.no_grad():
            target, complete = next_patch_entropies(blt(ids, patches), patches)
            states = blt.states(ids, patches)
        error = (head(states) - target) / head.std
        return error[complete].square().mean() * math.log(2) # `fit` shows losses over ln 2
    history = fit(head, loader, steps, lr, loss=loss, weight_decay=0.01, title="surprisal head")
    return head, history.rename(columns={"loss": "squared error"}).drop(columns="valid")

def surprisal_patcher(
    blt: BLT,                          # trained, any number of levels
    head: SurprisalHead | None = None, # trained on it; None: trained now
    rule: str = "threshold",           # "threshold" (U is high) or "rise" (U has risen)
    seed: int = 0,                     # of the head's weights and of the data order
) -> SurprisalPatcher: # calibrated to the running preset's mean length on training text
    "Everything that cutting the next level needs: a copy of the model that reads, the head, and the threshold."
    data, p, level = preset("data"), preset("head"), preset("stacked")
    loader = PatchedLoader(Loader(load_splits()[0], data.window, data.batch_size, seed + 2), blt.segment)
    if head is None: head, _ = train_surprisal_head(blt, loader, p.hidden, p.steps, p.lr, seed)
    patcher = SurprisalPatcher(blt.reader(), head, max_length=level.max_group)
    batches = [(ids, None, patches) for ids, patches in (loader.batch(p.steps + i) for i in range(32))]
    return calibrate(patcher, batches, level.mean_group, rule)

def stack(
    blt: BLT,                   # trained; stays as it is
    patcher,                    # cuts its innermost patches, for example a `SurprisalPatcher`
    latent: TransformerConfig,  # of the new innermost transformer; its width is a multiple of the old one's
) -> BLT: # one level more; its logits are those of `blt` until it is trained
    """Grow a level: the trained latent transformer becomes the encoder (first half of its blocks) and the decoder (the rest) of a new level.

    What the new level says enters through projections that start at zero, so nothing changes at first. `ValueError` for a latent transformer
    of fewer than two blocks."""
    old = blt.config.latent
    if old.layers < 2: raise ValueError(f"the latent transformer has {old.layers} block; it takes two, one to read and one to write the new level")
    half = old.layers // 2
    config = copy.deepcopy(blt.config)
    config.levels.append(LevelConfig(dataclasses.replace(old, layers=half), dataclasses.replace(old, layers=old.layers - half)))
    config.latent, config.patchers = latent, []
    grown = BLT(config, [*copy.deepcopy(blt.patchers), patcher])
    prefix = "level." + "inner." * len(blt.config.levels)
    weights = grown.state_dict()
    for name, tensor in blt.state_dict().items():
        if name.startswith(prefix + "blocks."):
            number, rest = name.removeprefix(prefix + "blocks.").split(".", 1)
            part, number = ("encoder", int(number)) if int(number) < half else ("decoder", int(number) - half)
            name = f"{prefix}{part}.transformer.blocks.{number}.{rest}"
        weights[name] = tensor
    for name in weights:
        if name.startswith(prefix + "decoder.unpools.") and name.endswith("cross.out.weight"): weights[name] = torch.zeros_like(weights[name])
    grown.load_state_dict(weights)
    return grown

def stacked_config() -> BLTConfig:
    "The two-level BLT of the running preset: the byte level of the one-level model, and one level more."
    p, one = preset("stacked"), blt_config()
    items = dict(width=one.latent.width, heads=one.latent.heads)
    level = LevelConfig(TransformerConfig(layers=p.encoder_layers, **items), TransformerConfig(layers=p.decoder_layers, **items))
    return BLTConfig([*one.levels, level], TransformerConfig(width=p.latent_width, layers=p.latent_layers, heads=p.latent_heads), one.ngrams)

def train_stacked(
    blt: BLT,                  # trained, one level; its patcher becomes the first of the new model
    patcher: SurprisalPatcher, # cuts its patches, see `surprisal_patcher`
    seed: int = 0,             # of weights and data order
) -> tuple[BLT, pd.DataFrame]: # the model and its history, see `blt_nb.training.fit`
    """Train the two-level BLT of the running preset from scratch, score it, and save it as the checkpoint `blt-2`.

    It sees the same text in the same order as the one-level model and spends as many training FLOPs."""
    train, valid = load_splits()
    data, p = preset("data"), preset("stacked")
    torch.manual_seed(seed)
    model = BLT(stacked_config(), [*copy.deepcopy(blt.patchers), patcher])
    each = training_flops(model, [preset("blt").mean_patch, p.mean_group], data.window)
    budget = training_flops(blt, [preset("blt").mean_patch], data.window) * preset("blt").steps
    history = fit_blt(model, train, valid, max(1, round(budget / each)), p.lr, seed, "two-level BLT")
    save_blt("blt-2", model, history, valid, seed)
    return model.eval(), history

def get_stacked() -> BLT:
    "The two-level BLT of the running preset, loaded if there is a fitting checkpoint, else trained."
    def train():
        blt = get_blt()
        train_stacked(blt, surprisal_patcher(blt))
    return load_or_train("blt-2", BLT, train)
