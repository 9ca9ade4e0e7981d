"""Captions to tokens: a word tokenizer and a small transformer, trained together with the DiT."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

PADDING, START = 0, 1  # the first two ids; words follow


class WordTokenizer:
    """One id a word. Every caption begins with a start token, so the empty caption is not empty:
    it is what classifier-free guidance calls unconditional.

    Args:
        words: the known words, in the order of their ids.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self._ids = {word: START + 1 + i for i, word in enumerate(self.words)}

    @property
    def vocabulary_size(self) -> int:
        """How many ids there are, padding and start included."""
        return START + 1 + len(self.words)

    def __call__(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [B, L] int64 and mask [B, L] bool, True at tokens, False at padding.

        Raises:
            ValueError: a caption has a word that is not in the vocabulary.
        """
        rows = [[START, *map(self._id, caption.lower().split())] for caption in captions]
        ids = torch.full((len(rows), max(map(len, rows), default=1)), PADDING)
        for row, row_ids in enumerate(rows):
            ids[row, : len(row_ids)] = torch.tensor(row_ids)
        return ids, ids != PADDING

    def _id(self, word: str) -> int:
        if word not in self._ids:
            raise ValueError(f'unknown word "{word}"; the known words are: {" ".join(self.words)}')
        return self._ids[word]


class TextEncoder(nn.Module):
    """A pre-norm transformer over the words of a caption.

    Args:
        vocabulary_size: how many token ids there are.
        dim: width of the tokens, D.
        depth: transformer layers.
        num_heads: attention heads a layer.
        max_length: the longest caption, start token included.
    """

    def __init__(
        self,
        vocabulary_size: int,
        dim: int = 128,
        depth: int = 2,
        num_heads: int = 4,
        max_length: int = 32,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, dim)
        self.position = nn.Parameter(torch.empty(max_length, dim))
        layer = nn.TransformerEncoderLayer(
            dim, num_heads, 4 * dim, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        # Nested tensors would cut the padding off the output, whose shape callers rely on.
        self.layers = nn.TransformerEncoder(
            layer, depth, norm=nn.LayerNorm(dim), enable_nested_tensor=False
        )
        nn.init.normal_(self.embedding.weight)
        nn.init.normal_(self.position, std=0.1)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Tokens [B, L, D] for ids [B, L]; mask [B, L] is True at tokens, False at padding.

        Raises:
            ValueError: a caption longer than max_length.
        """
        length, longest = ids.shape[1], self.position.shape[0]
        if length > longest:
            raise ValueError(f"a caption may have at most {longest - 1} words; got {length - 1}")
        x = self.embedding(ids) + self.position[:length]
        return self.layers(x, src_key_padding_mask=~mask)
