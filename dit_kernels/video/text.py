"""Captions to tokens.

Either a word tokenizer and a small transformer, trained together with the DiT, or any text encoder
of Hugging Face's transformers from a local folder, which is used as it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_kernels.video.codecs import Frozen

PADDING, START = 0, 1  # the first two ids; words follow
NAMED_WORDS = 60  # an error names at most so many of the known words


def words_of(caption: str) -> list[str]:
    """The words of a caption, in lower case, without punctuation."""
    return re.findall(r"[^\W_]+(?:['-][^\W_]+)*", caption.lower())


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
        rows = [[START, *map(self._id, words_of(caption))] for caption in captions]
        ids = torch.full((len(rows), max(map(len, rows), default=1)), PADDING)
        for row, row_ids in enumerate(rows):
            ids[row, : len(row_ids)] = torch.tensor(row_ids)
        return ids, ids != PADDING

    def _id(self, word: str) -> int:
        if word not in self._ids:
            known = " ".join(self.words[:NAMED_WORDS])
            more = f" and {len(self.words) - NAMED_WORDS} more" * (len(self.words) > NAMED_WORDS)
            raise ValueError(f'unknown word "{word}"; the known words are: {known}{more}')
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


class PretrainedText(Frozen):
    """A text encoder of Hugging Face's transformers: T5, CLIP, or any with a last hidden state.

    Args:
        path: a folder with the encoder and its tokenizer, as `save_pretrained` writes them.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the folder holds no text encoder.
    """

    def __init__(self, path: str | Path) -> None:
        import transformers

        if not (Path(path) / "config.json").is_file():
            raise FileNotFoundError(
                f"no text encoder at {path}: a folder with config.json is needed"
            )
        try:
            config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
            kind: Any = getattr(
                transformers,
                {
                    "t5": "T5EncoderModel",
                    "mt5": "MT5EncoderModel",
                    "umt5": "UMT5EncoderModel",
                    "clip": "CLIPTextModel",
                    "clip_text_model": "CLIPTextModel",
                }.get(config.model_type, "AutoModel"),
            )
            self.module = kind.from_pretrained(path, local_files_only=True)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path} holds no text encoder that can be read: {error}") from error
        self.module.eval().requires_grad_(False)
        self.tokenizer.padding_side = "right"  # a DiT wants the real tokens first
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        text = getattr(config, "text_config", None) or config
        self.dim: int = getattr(text, "d_model", None) or text.hidden_size
        longest = [getattr(text, "max_position_embeddings", None), self.tokenizer.model_max_length]
        self.max_length = min([512, *(length for length in longest if length)])

    @torch.no_grad()
    def __call__(
        self, captions: Sequence[str], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, L, D] float32 and mask [B, L] bool, True at tokens, which come first."""
        batch = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=self.max_length,
            return_tensors="pt",
        ).to(device)  # fmt: skip
        mask = batch["attention_mask"].bool()
        if mask.shape[1] == 0:  # only empty captions, and a tokenizer without an end token
            return torch.zeros(len(captions), 1, self.dim, device=device), mask.new_zeros(
                len(captions), 1
            )
        tokens = self.on(device)(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state
        return tokens.float(), mask
