"""How tokens and modulation rows of adaLN are addressed and cut, whatever the backend."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# a modulation row must serve at least this many tokens for a forward program to keep it in registers
_SHARED = 16


def chunk_tokens(tokens: int, segment: int, resident: int, most: int) -> int:
    """Tokens of one program, at most about `most`, so that whole waves of `resident` programs do equal work."""
    segments = tokens // segment
    waves = -(-tokens // (resident * most))
    pieces = max(1, min(waves * resident // segments, segment // 4))
    return -(-segment // pieces)


class Modulation(NamedTuple):
    """How a token finds its row: element strides of sample, group and channel, tokens a group."""

    form: str
    stride_b: int
    stride_g: int
    stride_c: int
    length: int


ABSENT = Modulation("none", 0, 0, 0, 1)


class Tokens(NamedTuple):
    """The token axes after folding what can be folded: B, N, then the tokens of a segment."""

    samples: int
    length: int
    segment: int
    folded: (
        str  # "": as they came; "samples": [B, 1] became [1, B]; "all": [B, N] became [1, B * N]
    )

    def strides(self, tensor: Tensor | None) -> tuple[int, int, int]:
        """Element strides of (sample, token, channel)."""
        if tensor is None:
            return (0, 0, 0)
        sample, token, channel = tensor.stride()
        if self.folded == "samples":
            return (0, sample, channel)
        if self.folded == "all":
            return (0, token, channel)
        return (sample if self.samples > 1 else 0, token if self.length > 1 else 0, channel)


def arrange(
    tokens: Sequence[Tensor | None],
    modulations: Sequence[Tensor | None],
    row_index: Tensor | None,
    shared: int = _SHARED,
) -> tuple[Tokens, list[Modulation]]:
    """The token axes of [B, N, C] tensors, and each modulation's form over them."""
    first = next(t for t in tokens if t is not None)
    samples, length, _ = first.shape
    folded = ""
    if row_index is None and samples > 1:
        if length == 1:
            samples, length, folded = 1, samples, "samples"
        elif all(m is None for m in modulations) and all(
            t is None or t.stride(0) == length * t.stride(1) for t in tokens
        ):
            samples, length, folded = 1, samples * length, "all"
    found = [_modulation(m, samples, length, row_index, folded, shared) for m in modulations]
    segment = length
    for m in found:
        if m.form == "group" and m.length < length:
            segment = math.gcd(segment, m.length)
    return Tokens(samples, length, segment, folded), found


def _modulation(
    m: Tensor | None, samples: int, length: int, row_index: Tensor | None, folded: str, shared: int
) -> Modulation:
    if m is None:
        return ABSENT
    strides = m.stride()
    if row_index is not None:
        return Modulation("index", strides[0], 0, strides[-1], 1)
    if folded == "samples":
        return Modulation("token", 0, strides[0], strides[-1], 1)
    sample = strides[0] if samples > 1 else 0
    if len(strides) == 2:
        return Modulation("group", sample, 0, strides[-1], length)
    groups = m.shape[1]
    per_group = length // groups
    form = "group" if groups == 1 or per_group >= shared else "token"
    return Modulation(form, sample, strides[1] if groups > 1 else 0, strides[-1], per_group)


def vector(strides: Sequence[tuple[int, int, int]]) -> tuple[int, bool]:
    """(the power of two, at most 8, that divides all row strides; whether all channel strides are 1)."""
    bits = 8
    for outer, inner, channel in strides:
        if channel != 1:
            return 1, False
        bits |= outer | inner
    return bits & -bits, True


class Cut(NamedTuple):
    """How the programs of a backward share the tokens."""

    chunk: int  # tokens of one
    chunks: int  # of a segment
    programs: int
    rows: int  # that row_index may name where it orders the tokens (see `segments`), else 0


def cut_backward(
    tokens: Tokens,
    modulations: Iterable[Tensor | None],
    row_index: Tensor | None,
    resident: int,
) -> Cut:
    """Each program has tokens of one segment; with row_index tokens of one row, of as many as a modulation has."""
    total = tokens.samples * tokens.length
    rows = 0
    if row_index is not None:
        rows = max((m.shape[0] for m in modulations if m is not None), default=0)
    chunk = chunk_tokens(total, total if rows else tokens.segment, resident, 128)
    chunks = -(-tokens.segment // chunk)
    programs = total // chunk + rows if rows else total // tokens.segment * chunks
    return Cut(chunk, chunks, programs, rows)


def segments(row_index: Tensor, rows: int, chunk: int) -> tuple[Tensor, ...]:
    """The tokens sorted by row, cut into chunks of one row, without waiting for the device.

    Returns (order [B * N], row, begin, end [programs], first [rows + 1]): the row of each program and its
    range in the order, the first program of each row. There are at least as many programs as chunks; those
    past the last have an empty range.
    """
    values, order = torch.sort(row_index.flatten(), stable=True)
    ids = torch.arange(rows + 1, dtype=torch.int32, device=row_index.device)
    starts = torch.searchsorted(values, ids)
    pieces = (starts.diff() + (chunk - 1)) // chunk
    first = torch.nn.functional.pad(pieces.cumsum(0), (1, 0))
    program = torch.arange(row_index.numel() // chunk + rows, device=row_index.device)
    row = torch.searchsorted(first[1:], program, right=True).clamp_(max=rows - 1)
    begin = starts[row] + (program - first[row]) * chunk
    end = torch.minimum(begin + chunk, starts[row + 1])
    return order, row.int(), begin.int(), end.int(), first
