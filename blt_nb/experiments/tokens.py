"""The rivals that read tokens: byte pair encoding, a transformer over tokens, and a patcher that follows a vocabulary"""

# %% imports
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from ..data import EOS_ID, OFFSET, ByteStream, documents, eval_batches
from ..entropy import NgramConfig, NgramEmbedding
from ..patching import Patcher, level_items
from ..training import autocast
from ..transformer import RMSNorm, Transformer, TransformerConfig, init_linear, transformer_flops

# %% bpe
def byte_alphabet() -> dict[str, int]: # character -> byte
    "The characters that stand for bytes in a byte-level BPE vocabulary: a printable byte for itself, the others from U+0100 on."
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}

def train_bpe(
    texts: Iterable, # a corpus, what `blt_nb.data.documents` takes
    vocab_size: int, # tokens, the 256 bytes included
) -> Tokenizer: # a byte-level BPE tokenizer, its `to_str()` is what `BPEPatcher` takes
    "Learn byte pair encoding. `ValueError` if there is no room for the 256 bytes, or no text."
    if vocab_size < 256: raise ValueError(f"vocab_size is {vocab_size}; the bytes alone need 256")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(byte_alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    texts = [document.decode("utf-8", "replace") for document in documents(texts)]
    if not any(texts): raise ValueError("there is no text to learn a vocabulary from: 0 bytes")
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer

class BPEPatcher(Patcher):
    """Follows the vocabulary of a byte-level BPE tokenizer as far as one can without looking ahead: a patch is over as
    soon as no token continues it. Bytes only. `ValueError` if the tokenizer is not a byte-level BPE one."""
    kind, bytes_only = "bpe", True
    def __init__(self,
        tokenizer_json: str, # `Tokenizer.to_str()` of the `tokenizers` library, or the text of a tokenizer.json
        max_length: int | None = None, # see `Patcher`
    ):
        super().__init__(max_length)
        tokenizer, alphabet = json.loads(tokenizer_json), byte_alphabet()
        if tokenizer["model"]["type"] != "BPE":
            raise ValueError(f"the tokenizer is of type {tokenizer['model']['type']}; a byte-level BPE one is needed")
        special = {token["content"] for token in tokenizer["added_tokens"]}
        self.tokenizer_json, self.trie = tokenizer_json, {} # id -> the trie below it
        for token in tokenizer["model"]["vocab"]:
            if token in special: continue
            if not set(token) <= set(alphabet):
                raise ValueError(f"token {token!r} has characters that stand for no byte; take a byte-level BPE tokenizer")
            node = self.trie
            for character in token: node = node.setdefault(alphabet[character] + OFFSET, {})

    def walk(self,
        node: dict, # of the trie: the patch so far
        i: int,     # the next id
    ) -> tuple[dict, float]: # the patch then, and 1 if it is over
        "One step: it is over where no token begins like this, or none goes on."
        node = node.get(i)
        return (node, 0.0) if node else (self.trie, 1.0)

    def scores(self, ids, lengths=None, below=(), state=None):
        scores, nodes = [], []
        for row, length in zip(ids.tolist(), level_items(ids, lengths)[1].tolist()):
            node, over = self.trie, []
            for i in row[:length]:
                node, score = self.walk(node, i)
                over.append(score)
            nodes.append(node)
            scores.append(over + [0.0] * (len(row) - length))
        if state is not None: state.memory = nodes
        return torch.tensor(scores, device=ids.device).view(ids.shape)

    def next_score(self, ids, ends, state):
        steps = [self.walk(node, i) for node, i in zip(state.memory or [self.trie] * len(ids), ids[:, -1].tolist())]
        state.memory = [node for node, _ in steps]
        return torch.tensor([score for _, score in steps], device=ids.device)

    def rule(self, now, before): return now > 0
    def to_dict(self): return super().to_dict() | {"tokenizer_json": self.tokenizer_json}


# %% stream
class TokenStream(ByteStream):
    "All documents as one array of token ids, each followed by EOS. Token i has id i + 4; ids are 32 bits wide."
    def __init__(self,
        data,                 # a corpus: what `blt_nb.data.documents` takes
        tokenizer: Tokenizer, # from `train_bpe`
    ):
        texts = [document.decode("utf-8", "replace") for document in documents(data)]
        parts = [encoded.ids for begin in range(0, len(texts), 1000)
                 for encoded in tokenizer.encode_batch(texts[begin:begin + 1000])]
        self.names = [f"document {i}" for i in range(len(parts))]
        self.bytes = sum(len(text.encode()) for text in texts)
        self.ends = np.cumsum([len(part) + 1 for part in parts], dtype=np.int64)
        self.ids = np.full(self.ends[-1] if parts else 0, EOS_ID, dtype=np.int32)
        for part, end in zip(parts, self.ends): self.ids[end - 1 - len(part):end - 1] = np.asarray(part) + OFFSET

# %% model
@dataclass
class TokenConfig:
    "Sizes of a transformer over tokens."
    vocabulary: int # ids, BOE, BOS, EOS and PAD included
    transformer: TransformerConfig
    ngrams: NgramConfig | None = None # of tokens; None: tokens only

class TokenModel(nn.Module):
    "A transformer over tokens, with hash n-grams of tokens if asked for."
    def __init__(self,
        config: TokenConfig,
    ):
        super().__init__()
        self.config, width = config, config.transformer.width
        self.embed = nn.Embedding(config.vocabulary, width)
        nn.init.normal_(self.embed.weight, std=width ** -0.5)
        self.ngrams = NgramEmbedding(config.ngrams, width) if config.ngrams else None
        self.transformer = Transformer(config.transformer)
        self.norm = RMSNorm(width, config.transformer.eps)
        self.head = nn.Linear(width, config.vocabulary, bias=False)
        init_linear(self.head)

    def forward(self,
        ids: Tensor, # (B, T)
    ) -> Tensor: # (B, T, vocabulary) logits of the id after each
        x = self.embed(ids) if self.ngrams is None else self.embed(ids) + self.ngrams(ids)
        return self.head(self.norm(self.transformer(x)))

    def flops(self,
        window: int, # tokens read together
    ) -> float: # FLOPs of a forward pass for one token
        "As `EntropyModel.flops`."
        ngrams = 2.0 * self.ngrams.project.weight.numel() if self.ngrams else 0.0
        return ngrams + transformer_flops(self.config.transformer, window) + 2.0 * self.head.weight.numel()

# %% score
@torch.no_grad()
def token_bits_per_byte(
    model: TokenModel,
    data,                 # a corpus: what `blt_nb.data.documents` takes
    tokenizer: Tokenizer, # that the model reads
    window: int,          # most tokens that are read together
    batch_size: int = 16,
) -> float: # bits that all tokens and document ends cost, over the number of bytes
    "`blt_nb.training.bits_per_byte` for a model of tokens."
    stream, nats = TokenStream(data, tokenizer), 0.0
    device, was_training = model.head.weight.device, model.training
    model.eval()
    for ids, _, score in eval_batches(stream, window, batch_size):
        ids = ids.to(device)
        with autocast(device): logits = model(ids)
        loss = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
        nats += loss[score.to(device)].double().sum().item()
    model.train(was_training)
    return nats / stream.bytes / math.log(2)
