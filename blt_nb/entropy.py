from dataclasses import dataclass, field

import pandas as pd
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from blt_nb.data import OFFSET, VOCAB_SIZE, ByteStream, Loader, check_ids
from blt_nb.training import Pretrained, bits_per_byte, fit, load_or_train, load_splits, preset, round_bf16, save_stage
from blt_nb.transformer import KVCache, RMSNorm, Transformer, TransformerConfig, init_linear

PRIMES = (1_000_000_007, 5_915_587_277, 1_500_450_271, 3_267_000_013) # bases of the hash functions, those of the published models

@dataclass
class NgramConfig:
    "Hash tables for n-grams of bytes. `ValueError` for impossible sizes."
    sizes: tuple[int, ...] = (3, 4, 5, 6)  # n of the n-grams
    rows: int = 16384                      # rows of each table; n-grams that hash alike share one
    width: int | None = 32                 # width of a row, projected to the model's width; None: the model's width, not projected
    functions: int = 1                     # hash functions, each with a table for every n

    def __post_init__(self):
        self.sizes = tuple(self.sizes)
        if any(n < 1 for n in self.sizes): raise ValueError(f"n-gram sizes are {self.sizes}; each must be at least 1")
        if self.rows < 1: raise ValueError(f"rows is {self.rows}; a table needs at least one")
        if not 1 <= self.functions <= len(PRIMES): raise ValueError(f"functions is {self.functions}; it must be in 1..{len(PRIMES)}")

def ngram_hashes(
    ids: Tensor, # (B, T) ids
    n: int,      # length of the n-grams
    rows: int,   # hashes are in 0..rows - 1
    prime: int = PRIMES[0], # base of the polynomial
) -> Tensor: # (B, T) hash of the n ids that end at each position; before the text lie zeros
    "Rolling polynomial hash Σ_j ids[t - n + 1 + j] · prime^j in 64-bit arithmetic, modulo the rows of the table (paper, section 3.2.1)."
    T, padded = ids.shape[1], F.pad(ids, (n - 1, 0))
    power, total = 1, torch.zeros_like(ids)
    for j in range(n):
        total = total + padded[:, j:j + T] * power
        power = (power * prime + 2**63) % 2**64 - 2**63 # wraps around like the tensors do
    return total % rows

class NgramEmbedding(nn.Module):
    "A vector for the n-grams that end at each byte, looked up by hash and added up over n and hash functions."
    def __init__(self,
        config: NgramConfig,
        width: int, # d, width of the vector
    ):
        super().__init__()
        self.config, tables = config, len(config.sizes) * config.functions
        row = config.width or width
        self.table = nn.Embedding(tables * config.rows, row)  # one table after the other
        nn.init.normal_(self.table.weight, std=row ** -0.5)
        self.project = nn.Linear(tables * row, width, bias=False) if config.width else None
        init_linear(self)

    def forward(self,
        ids: Tensor, # (B, T)
    ) -> Tensor: # (B, T, d)
        hashes = [ngram_hashes(ids, n, self.config.rows, prime) for prime in PRIMES[:self.config.functions] for n in self.config.sizes]
        offsets = self.config.rows * torch.arange(len(hashes), device=ids.device)
        rows = self.table(torch.stack(hashes, -1) + offsets) # (B, T, tables, row)
        return rows.sum(2) if self.project is None else self.project(rows.flatten(2))

@dataclass
class EntropyConfig:
    "Sizes of the entropy model."
    transformer: TransformerConfig = field(default_factory=lambda: TransformerConfig(width=128, layers=2, heads=2, window=128))
    ngrams: NgramConfig | None = field(default_factory=lambda: NgramConfig(sizes=(2, 3, 4, 5, 6))) # None: bytes only, as in the paper

    def __post_init__(self):
        if isinstance(self.transformer, dict): self.transformer = TransformerConfig(**self.transformer)
        if isinstance(self.ngrams, dict): self.ngrams = NgramConfig(**self.ngrams)

class EntropyModel(nn.Module, Pretrained):
    "A small byte language model. What it doesn't know about the next byte decides where patches start."
    def __init__(self,
        config: EntropyConfig,
    ):
        super().__init__()
        width = config.transformer.width
        self.config = config
        self.embed = nn.Embedding(VOCAB_SIZE, width)
        nn.init.normal_(self.embed.weight, std=width ** -0.5)
        self.ngrams = NgramEmbedding(config.ngrams, width) if config.ngrams else None
        self.transformer = Transformer(config.transformer)
        self.norm, self.head = RMSNorm(width, config.transformer.eps), nn.Linear(width, VOCAB_SIZE, bias=False)
        init_linear(self.head)

    def forward(self,
        ids: Tensor, # (B, T)
        caches: list[KVCache] | None = None, # of the transformer, if ids go on where they end
        context: Tensor | None = None,       # (B, C) the ids just before, for the n-grams that reach back
    ) -> Tensor: # (B, T, 260) logits of the id after each
        "Errors as in `check_ids`."
        check_ids(ids)
        x = self.embed(ids)
        if self.ngrams is not None:
            whole = ids if context is None else torch.cat([context, ids], 1)
            x = x + self.ngrams(whole)[:, -ids.shape[1]:]
        return self.head(self.norm(self.transformer(x, caches)))

    @torch.no_grad()
    def entropies(self,
        ids: Tensor, # (B, T)
        reset_at_newline: bool = False, # forget everything before the last newline
    ) -> Tensor: # (B, T) nats, float32: the entropy of the id after each
        "How uncertain the next id is, H = -Σ p ln p. Errors as in `check_ids`."
        if reset_at_newline: return self.entropies_by_line(ids)
        log_p = self(ids).float().log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    def entropies_by_line(self,
        ids: Tensor, # (B, T)
    ) -> Tensor: # (B, T) nats
        "Entropies with a context that begins at the last newline, which is the first id of its line."
        check_ids(ids)
        begins = ids == OFFSET + ord("\n")
        begins[:, 0] = True
        row, col = begins.nonzero(as_tuple=True)
        T = ids.shape[1]
        flat = row * T + col
        length = torch.diff(flat, append=flat.new_tensor([ids.numel()]))
        order = length.argsort() # lines of a like length together, so that little is computed for nothing
        result = torch.zeros(ids.numel(), device=ids.device)
        for lines in order.split(64):
            span = torch.arange(int(length[lines].max()), device=ids.device)
            where = flat[lines, None] + span
            real = span < length[lines, None]
            result[where[real]] = self.entropies(ids.flatten()[where.clamp(max=ids.numel() - 1)])[real]
        return result.view_as(ids)

def entropy_config() -> EntropyConfig:
    "The entropy model of the running preset."
    p = preset("entropy")
    return EntropyConfig(TransformerConfig(width=p.width, layers=p.layers, heads=p.heads, window=p.attention),
                         NgramConfig(sizes=p.ngram_sizes, rows=p.ngram_rows, width=p.ngram_width))

def train_entropy_model(
    seed: int = 0, # of weights and data order
) -> tuple[EntropyModel, pd.DataFrame]: # the model and its history, see `blt_nb.training.fit`
    "Train the entropy model of the running preset on `docs`, score it on validation, and save it as the checkpoint `entropy`."
    train, valid = load_splits()
    data, p = preset("data"), preset("entropy")
    torch.manual_seed(seed)
    model = EntropyModel(entropy_config())
    watched = Loader(valid, data.window, data.batch_size)
    history = fit(model, Loader(train, data.window, data.batch_size, seed), p.steps, p.lr, title="entropy model",
                  valid=[watched.batch(i) for i in range(min(8, watched.steps_per_epoch))])
    bpb = bits_per_byte(round_bf16(model), valid, data.window)
    save_stage("entropy", model, history, seed=seed, bpb=bpb)
    return model.eval(), history

def get_entropy_model() -> EntropyModel:
    "The entropy model of the running preset, loaded if there is a fitting checkpoint, else trained."
    return load_or_train("entropy", EntropyModel, train_entropy_model)
