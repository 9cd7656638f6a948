import copy, math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import pandas as pd
import torch
import torch.nn as nn
from torch import Tensor

from blt_nb.data import VOCAB_SIZE, Loader, check_ids, eval_batches
from blt_nb.entropy import EntropyConfig, EntropyModel, NgramConfig, NgramEmbedding, get_entropy_model
from blt_nb.local import LocalDecoder, LocalEncoder
from blt_nb.patching import EntropyPatcher, Patcher, Patches, calibrate, mean_length, patcher_from_dict
from blt_nb.training import Pretrained, bits_per_byte, fast_precision, fit, load_or_train, load_splits, preset, round_bf16, save_stage
from blt_nb.transformer import RMSNorm, Transformer, TransformerConfig, init_linear

@dataclass
class LevelConfig:
    "The networks around one cut: they read and write items (bytes, or the patches of the level below)."
    encoder: TransformerConfig
    decoder: TransformerConfig | None = None # None: a level that only reads

    def __post_init__(self):
        if isinstance(self.encoder, dict): self.encoder = TransformerConfig(**self.encoder)
        if isinstance(self.decoder, dict): self.decoder = TransformerConfig(**self.decoder)
        if self.decoder is not None and self.decoder.width != self.encoder.width:
            raise ValueError(f"the decoder is {self.decoder.width} wide, the encoder {self.encoder.width}; items have one width, so make them equal")

@dataclass
class BLTConfig:
    "A BLT of any depth. One level is the paper's model, two levels are stacked."
    levels: list[LevelConfig]  # outermost first: bytes → patches, patches → second-order patches, ...
    latent: TransformerConfig  # the transformer in the middle
    ngrams: NgramConfig | None = field(default_factory=NgramConfig) # hash n-gram embeddings of the bytes
    patchers: list[dict] = field(default_factory=list) # one a level, from `Patcher.to_dict`

    def __post_init__(self):
        self.levels = [LevelConfig(**level) if isinstance(level, dict) else level for level in self.levels]
        if isinstance(self.latent, dict): self.latent = TransformerConfig(**self.latent)
        if isinstance(self.ngrams, dict): self.ngrams = NgramConfig(**self.ngrams)
        if not self.levels: raise ValueError("levels is empty; a BLT needs at least one LevelConfig")

class Level(nn.Module):
    "Items → groups → inner network → items. The inner network is a Transformer, or another Level: that is the whole recursion."
    def __init__(self,
        levels: Sequence[LevelConfig], # this level's, then those inside
        latent: TransformerConfig,     # the innermost transformer
    ):
        super().__init__()
        config, *rest = levels
        self.inner = Level(rest, latent) if rest else Transformer(latent)
        group_width = rest[0].encoder.width if rest else latent.width
        self.encoder = LocalEncoder(config.encoder, group_width)
        self.decoder = LocalDecoder(config.decoder, group_width) if config.decoder else None

    def forward(self,
        x: Tensor,                  # (B, T, d) items
        patches: Sequence[Patches], # this level's, then those inside
    ) -> Tensor: # (B, T, d): at each item what is known for predicting the next
        x, groups = self.encoder(x, patches[0])
        groups = self.inner(groups, patches[1:]) if isinstance(self.inner, Level) else self.inner(groups)
        return self.decoder(x, groups, patches[0])

    def states(self,
        x: Tensor,                  # (B, T, d) items
        patches: Sequence[Patches], # this level's, then those inside
    ) -> Tensor: # (B, N, d_latent) output of the innermost transformer
        "What the innermost transformer makes of its groups, without decoding."
        _, groups = self.encoder(x, patches[0])
        return self.inner.states(groups, patches[1:]) if isinstance(self.inner, Level) else self.inner(groups)

class BLT(nn.Module, Pretrained):
    "Byte Latent Transformer: embeddings → Level → logits of the next byte. It carries its frozen patchers along."
    def __init__(self,
        config: BLTConfig,
        patchers: Sequence[Patcher] | None = None, # one a level, outermost first; None: built from the configuration, their weights to be loaded
    ):
        super().__init__()
        if patchers is None: patchers = [patcher_from_dict(d) for d in config.patchers]
        self.config = config
        config.patchers = [patcher.to_dict() for patcher in patchers]
        self.patchers = nn.ModuleList(patchers).requires_grad_(False)
        width = config.levels[0].encoder.width
        self.embed = nn.Embedding(VOCAB_SIZE, width)
        nn.init.normal_(self.embed.weight, std=width ** -0.5)
        self.ngrams = NgramEmbedding(config.ngrams, width) if config.ngrams else None
        self.level = Level(config.levels, config.latent)
        if config.levels[0].decoder is not None:
            self.norm, self.head = RMSNorm(width, config.levels[0].decoder.eps), nn.Linear(width, VOCAB_SIZE, bias=False)
            init_linear(self.head)

    @torch.no_grad()
    def segment(self,
        ids: Tensor,                    # (B, T)
        lengths: Tensor | None = None,  # (B,) real ids of each row; None: all
    ) -> list[Patches]: # one a level, outermost first
        "Cut bytes into patches, patches into second-order patches, and so on. Errors as in `check_ids`."
        check_ids(ids)
        if len(self.patchers) != len(self.config.levels):
            raise ValueError(f"this model has {len(self.config.levels)} levels and {len(self.patchers)} patchers; build it with one a level, BLT(config, patchers=[...])")
        patches = []
        for patcher in self.patchers: patches.append(patcher(ids, lengths, patches))
        return patches

    def embeddings(self,
        ids: Tensor, # (B, T)
    ) -> Tensor: # (B, T, d)
        "A vector for each byte: its own, and those of the n-grams that end there."
        check_ids(ids)
        x = self.embed(ids)
        return x if self.ngrams is None else x + self.ngrams(ids)

    def forward(self,
        ids: Tensor,                              # (B, T)
        patches: Sequence[Patches] | None = None, # one a level; None: `segment(ids)`
    ) -> Tensor: # (B, T, 260) logits of the id after each
        "Errors as in `check_ids`."
        if patches is None: patches = self.segment(ids)
        return self.head(self.norm(self.level(self.embeddings(ids), patches)))

    def states(self,
        ids: Tensor,                              # (B, T)
        patches: Sequence[Patches] | None = None, # one a level; None: `segment(ids)`
    ) -> Tensor: # (B, N, d_latent)
        "Output of the innermost latent transformer: what the model knows after each innermost patch."
        if patches is None: patches = self.segment(ids)
        return self.level.states(self.embeddings(ids), patches)

    def reader(self) -> "BLT": # frozen; has `states` and `segment`, no logits
        "A copy of the part that reads, without decoders and patchers: enough to know how uncertain the latent transformer is."
        config = copy.deepcopy(self.config)
        config.patchers, config.levels = [], [LevelConfig(level.encoder) for level in config.levels]
        reader = BLT(config)
        mine = self.state_dict()
        reader.load_state_dict({name: mine[name] for name in reader.state_dict()})
        return reader.requires_grad_(False).eval()

def select(
    patches: Sequence[Patches], # one a level
    rows: Tensor,               # (b,) rows of the batch
) -> list[Patches]:
    "Some rows of a segmentation, without the columns that only the others needed."
    picked, width = [], None
    for p in patches:
        width = p.starts.shape[1] if width is None else width
        picked.append(Patches(p.starts[rows, :width], p.mask[rows, :width]))
        width = int(picked[-1].counts.max()) + 1
    return picked

class PatchedLoader:
    """Batches with their patches, sorted so that the rows of a batch have about as many patches.

    Rows have equally many bytes but not equally many patches, and the latent transformer runs over the longest. So a pool of batches is cut at
    once, its rows sorted by their number of patches, and batches are made of neighbours; the batches of a pool come in a shuffled order."""
    def __init__(self,
        loader: Loader, # batches of ids
        segment,        # ids (B, T) -> list[Patches], for example `blt.segment`
        pool: int = 16, # batches cut and sorted together
    ):
        self.loader, self.segment, self.pool, self.number, self.batches = loader, segment, pool, None, []

    def batch(self,
        step: int, # from 0
    ) -> tuple[Tensor, list[Patches]]: # ids (B, T) and their patches
        "The batch of a step, the same whatever was asked for before."
        number, i = divmod(step, self.pool)
        if number != self.number:
            ids = torch.cat([self.loader.batch(number * self.pool + j) for j in range(self.pool)])
            with torch.no_grad(), torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, enabled=fast_precision() == "bf16"):
                patches = self.segment(ids)
            order = patches[-1].counts * (ids.shape[1] + 1) + patches[0].counts
            order = order.argsort(stable=True).view(self.pool, -1)[torch.from_numpy(np.random.default_rng([self.loader.seed, number]).permutation(self.pool))]
            self.number, self.batches = number, [(ids[rows], select(patches, rows)) for rows in order]
        return self.batches[i]

def transformer_flops(
    config: TransformerConfig,
    length: float, # positions read together
) -> float: # FLOPs of a forward pass for one position
    "Matrix products of the blocks, two FLOPs a multiply-add; attention as `windowed_attention` computes it."
    c, head = config, config.width // config.heads
    linear = c.width * (c.heads + 2 * c.kv_heads) * head + c.width * c.width + 3 * c.width * c.hidden
    if c.window is None or length <= c.window: keys = length
    else:
        block = max(32, c.window // 2)
        keys = (-(-(c.window - 1) // block) * block + block) * math.ceil(length / block) * block / length
    return c.layers * (2 * linear + 4 * keys * c.width)

def flops_per_byte(
    config: BLTConfig,
    mean_lengths: Sequence[float], # mean items a group at each level, outermost first: bytes a patch, patches a second-order patch
    window: int = 512,             # bytes read together
) -> dict[str, float]: # FLOPs of a forward pass for one byte, by part; patchers not counted
    "Forward FLOPs by part. A training step costs three times as much."
    if len(mean_lengths) != len(config.levels): raise ValueError(f"mean_lengths has {len(mean_lengths)} entries; the model has {len(config.levels)} levels")
    parts, share, length = {}, 1.0, float(window) # share: items of this level a byte
    if config.ngrams and config.ngrams.width:
        parts["n-grams"] = 2.0 * len(config.ngrams.sizes) * config.ngrams.functions * config.ngrams.width * config.levels[0].encoder.width
    for i, (level, mean) in enumerate(zip(config.levels, mean_lengths)):
        inner = config.levels[i + 1].encoder.width if i + 1 < len(config.levels) else config.latent.width
        d, name = level.encoder.width, f"level {i + 1}"
        k = inner // d
        # a group: spread d → k·d, and k queries and outputs; an item: keys and values
        parts[f"{name} encoder"] = share * transformer_flops(level.encoder, length)
        parts[f"{name} pooling"] = share * 4 * d * d + share / mean * (2 * d * k * d + k * 4 * d * d)
        if level.decoder is not None:
            parts[f"{name} unpooling"] = share / mean * 2 * inner * inner + level.decoder.layers * (share * 4 * d * d + share / mean * k * 4 * d * d)
            parts[f"{name} decoder"] = share * transformer_flops(level.decoder, length)
        share, length = share / mean, length / mean
    parts["latent"] = share * transformer_flops(config.latent, length)
    if config.levels[0].decoder is not None: parts["head"] = 2.0 * config.levels[0].encoder.width * VOCAB_SIZE
    return parts

def lm_flops_per_byte(
    config: EntropyConfig, # of an entropy model, or of any byte-level transformer
    window: int = 512,     # bytes read together
) -> float: # FLOPs of a forward pass for one byte
    "The same for a byte-level language model."
    c, n = config.transformer, config.ngrams
    ngrams = 2.0 * len(n.sizes) * n.functions * n.width * c.width if n and n.width else 0.0
    return ngrams + transformer_flops(c, window) + 2.0 * c.width * VOCAB_SIZE

@torch.no_grad()
def mean_lengths(
    blt: BLT,
    data,                # a corpus: what `blt_nb.data.documents` takes
    window: int = 512,   # ids cut together
    batch_size: int = 16,
    limit: int = 40,     # batches looked at
) -> list[float]: # at each level, outermost first: bytes a patch, patches a second-order patch, ...
    "Mean lengths on some text, without the BOS patches (see `blt_nb.patching.mean_length`)."
    batches = [blt.segment(ids, lengths) for ids, lengths, _ in islice(eval_batches(data, window, batch_size, window - 1), limit)]
    return [mean_length(level) for level in zip(*batches)]

def blt_config() -> BLTConfig:
    "The one-level BLT of the running preset."
    p = preset("blt")
    local = dict(width=p.width, heads=p.heads, window=p.attention)
    return BLTConfig([LevelConfig(TransformerConfig(layers=p.encoder_layers, **local), TransformerConfig(layers=p.decoder_layers, **local))],
                     TransformerConfig(width=p.latent_width, layers=p.latent_layers, heads=p.latent_heads),
                     NgramConfig(sizes=p.ngram_sizes, rows=p.ngram_rows, width=p.ngram_width))

def entropy_patcher() -> EntropyPatcher:
    "The running preset's entropy model, with the threshold that gives its mean patch length on training text."
    train, _ = load_splits()
    p, data = preset("blt"), preset("data")
    loader = Loader(train, data.window, data.batch_size, seed=1)
    return calibrate(EntropyPatcher(get_entropy_model(), max_length=p.max_patch), [loader.batch(i) for i in range(32)], p.mean_patch)

def training_flops(
    blt: BLT,
    mean_lengths: Sequence[float], # see `flops_per_byte`
    window: int, # bytes read together
) -> float: # FLOPs for each byte of training text: three forward passes of what is trained
    "A backward pass costs two forward passes. Cutting the text is not counted: it can be done once for all models."
    return 3 * sum(flops_per_byte(blt.config, mean_lengths, window).values())

def train_blt(
    seed: int = 0, # of weights and data order
) -> tuple[BLT, pd.DataFrame]: # the model and its history, see `blt_nb.training.fit`
    "Train the one-level BLT of the running preset on `docs`, score it on validation, and save it as the checkpoint `blt-1`."
    train, valid = load_splits()
    data, p, patcher = preset("data"), preset("blt"), entropy_patcher()
    torch.manual_seed(seed)
    blt = BLT(blt_config(), [patcher])
    history = fit_blt(blt, train, valid, p.steps, p.lr, seed, "one-level BLT")
    save_blt("blt-1", blt, history, valid, seed)
    return blt.eval(), history

def fit_blt(
    blt: BLT,       # trained in place
    train, valid,   # corpora
    steps: int,
    lr: float,
    seed: int,      # of the data order
    title: str,     # beside the progress bar
) -> pd.DataFrame: # see `blt_nb.training.fit`
    "Train on patched batches, watching a few of validation."
    data = preset("data")
    watched = PatchedLoader(Loader(valid, data.window, data.batch_size), blt.segment, pool=1)
    return fit(blt, PatchedLoader(Loader(train, data.window, data.batch_size, seed), blt.segment), steps, lr, title=title,
               valid=[watched.batch(i) for i in range(min(8, watched.loader.steps_per_epoch))])

def save_blt(
    stage: str,            # name of the checkpoint
    blt: BLT,              # its weights are rounded to bfloat16
    history: pd.DataFrame, # from `fit`
    valid,                 # corpus to score on
    seed: int,             # noted with the result
    earlier_flops: float = 0.0, # training FLOPs that went into it before
) -> dict: # the row of results
    "Score a trained BLT and save it as a stage's checkpoint."
    window = preset("data").window
    bpb, lengths = bits_per_byte(round_bf16(blt), valid, window), mean_lengths(blt, valid, window)
    flops = flops_per_byte(blt.config, lengths, window)
    return save_stage(stage, blt, history, seed=seed, bpb=bpb, flops_per_byte=sum(flops.values()),
                      training_flops=earlier_flops + training_flops(blt, lengths, window) * history.bytes.iloc[-1],
                      mean_patch=lengths[0], mean_group=lengths[1] if len(lengths) > 1 else math.nan)

def get_blt() -> BLT:
    "The one-level BLT of the running preset, loaded if there is a fitting checkpoint, else trained."
    return load_or_train("blt-1", BLT, train_blt)

def train_byte_model(
    flops: float,  # training FLOPs to spend
    seed: int = 0, # of weights and data order
) -> tuple[EntropyModel, pd.DataFrame]: # the model and its history
    "Train the byte-level transformer of the running preset for a number of FLOPs, score it, and save it as the checkpoint `byte`."
    train, valid = load_splits()
    data, p = preset("data"), preset("byte")
    torch.manual_seed(seed)
    model = EntropyModel(EntropyConfig(TransformerConfig(width=p.width, layers=p.layers, heads=p.heads), ngrams=None))
    each = lm_flops_per_byte(model.config, data.window)
    steps = max(1, round(flops / (3 * each * data.batch_size * (data.window - 1))))
    watched = Loader(valid, data.window, data.batch_size)
    history = fit(model, Loader(train, data.window, data.batch_size, seed), steps, p.lr, title="byte-level transformer",
                  valid=[watched.batch(i) for i in range(min(8, watched.steps_per_epoch))])
    bpb = bits_per_byte(round_bf16(model), valid, data.window)
    save_stage("byte", model, history, seed=seed, bpb=bpb, flops_per_byte=each, training_flops=3 * each * history.bytes.iloc[-1])
    return model.eval(), history
