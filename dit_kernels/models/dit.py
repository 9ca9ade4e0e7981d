"""The Diffusion Transformer, for images (one frame) and video.

    video [B, Cin, F, Y, X] -> patches -> tokens [B, N, C] -> blocks, modulated by time, class and prompt -> video

Parameters carry the original DiT's names (facebookresearch/DiT), so its weights load as they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.utils.checkpoint import checkpoint

from dit_kernels import backends, ops
from dit_kernels.models.checks import check_config, check_inputs, check_packed_inputs
from dit_kernels.nn import (
    AttentionPool,
    DiTBlock,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed3D,
    TimestepEmbedder,
)
from dit_kernels.nn.embedding import prefix_lengths, real_first
from dit_kernels.ops.arguments import triple

Grid = tuple[int, int, int]


def _with_frames(size: int | Sequence[int]) -> Sequence[int]:
    """An image's one or two sizes, as the original DiT takes them, with one frame before."""
    if isinstance(size, int):
        return (1, size, size)
    return (1, *size) if isinstance(size, Sequence) and len(size) == 2 else size


class DiT(nn.Module):
    """Predicts the noise (or velocity, or clean video) of a noisy image or video.

    Args:
        input_size: (F, Y, X) that the model is made for; other sizes are accepted in forward. Of an image
            also (Y, X), or one int for both.
        patch_size: (pt, ph, pw); of an image also (ph, pw), or one int for both.
        in_channels: Cin.
        hidden_size, depth, num_heads, mlp_ratio: of the transformer.
        num_classes: class conditioning; None for none.
        learn_sigma: twice the output channels, for a learned variance.
        pos_embed: "sincos" (added once) or "rope" (rotates queries and keys in every block).
        qk_norm: None, "rms" or "layer".
        norm: "layer" or "rms".
        text_dim: width of the prompt's tokens; None for no text.
        text_mode: "pooled" adds one vector of the prompt to the conditioning; "cross" attends to its
            tokens in every block; "joint" runs them in the sequence, seen by and seeing every patch.
        window_size, stride: local attention in patches (t, h, w), see `ops.attention3d`; clipped to
            the grid of smaller inputs.
        window_every: 1 gives every block the window, k every k-th (blocks k - 1, 2k - 1, ...).
        rope_dims: channels of a head for (t, h, w); the Wan split by default.
        rope_theta: base of the rotation.
        class_dropout_prob: how often a class label is dropped in training.
        frequency_shift, norm2_eps: 0 and 1e-6 as the original DiT; 1 and 1e-5 in diffusers' class.
        activation_checkpointing: recompute each block in backward, instead of keeping its activations.

    Source: "Scalable Diffusion Models with Transformers" (Peebles & Xie 2023).
    """

    def __init__(
        self,
        input_size: int | Sequence[int] = (1, 32, 32),
        patch_size: int | Sequence[int] = (1, 2, 2),
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int | None = None,
        learn_sigma: bool = True,
        pos_embed: str = "sincos",
        qk_norm: str | None = None,
        norm: str = "layer",
        text_dim: int | None = None,
        text_mode: str = "pooled",
        window_size: Sequence[int] | None = None,
        window_every: int = 1,
        *,
        stride: Sequence[int] | None = None,
        rope_dims: Sequence[int] | None = None,
        rope_theta: float = 10000.0,
        class_dropout_prob: float = 0.1,
        frequency_shift: float = 0.0,
        norm2_eps: float = 1e-6,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        input_size = triple("DiT", "input_size", _with_frames(input_size))
        patch_size = triple("DiT", "patch_size", _with_frames(patch_size))
        if window_size is not None:
            window_size = triple("DiT", "window_size", window_size)
        if stride is not None:
            stride = triple("DiT", "stride", stride)
        self.config: dict[str, Any] = {
            "input_size": input_size, "patch_size": patch_size, "in_channels": in_channels,
            "hidden_size": hidden_size, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio,
            "num_classes": num_classes, "learn_sigma": learn_sigma, "pos_embed": pos_embed,
            "qk_norm": qk_norm, "norm": norm, "text_dim": text_dim, "text_mode": text_mode,
            "window_size": window_size, "window_every": window_every, "stride": stride,
            "rope_dims": None if rope_dims is None else tuple(rope_dims), "rope_theta": rope_theta,
            "class_dropout_prob": class_dropout_prob, "frequency_shift": frequency_shift,
            "norm2_eps": norm2_eps, "activation_checkpointing": activation_checkpointing,
        }  # fmt: skip
        check_config(self.config)
        self.patch_size: Grid = patch_size
        self.in_channels, self.hidden_size = in_channels, hidden_size
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.text_mode = None if text_dim is None else text_mode
        self.window_size, self.window_every, self.stride = window_size, window_every, stride
        self.activation_checkpointing = activation_checkpointing
        grid = self.grid(input_size)

        self.x_embedder = PatchEmbed3D(self.patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, frequency_shift=frequency_shift)
        self.y_embedder = None
        if num_classes is not None:
            self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        if self.text_mode == "pooled":
            self.text_pool = AttentionPool(text_dim or 0, hidden_size, num_heads)
        elif self.text_mode == "joint":
            self.text_embedder = nn.Linear(text_dim or 0, hidden_size)
        if pos_embed == "sincos":
            self.is_image = grid[0] == 1
            self.register_buffer("pos_embed", sincos_3d(hidden_size, grid, self.is_image)[None])
        else:
            self.pos_embed = None
            self.rope_dims = tuple(rope_dims or rope_split(hidden_size // num_heads))
            self.rope_theta = rope_theta
        self.input_grid = grid
        self.blocks = nn.ModuleList(
            DiTBlock(
                hidden_size, num_heads, mlp_ratio, qk_norm=qk_norm, norm=norm, norm2_eps=norm2_eps,
                context_dim=text_dim if self.text_mode == "cross" else None,
                text_stream=self.text_mode == "joint",
            )
            for _ in range(depth)
        )  # fmt: skip
        self.final_layer = FinalLayer(hidden_size, self.patch_size, self.out_channels, norm)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Xavier-uniform Linears; what makes a block or the output begin as the identity is zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.hidden_size, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)  # type: ignore[arg-type]
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        t_mlp: Any = self.t_embedder.mlp
        for layer in (t_mlp[0], t_mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        zero: list[Any] = [self.final_layer.linear, self.final_layer.adaLN_modulation[1]]
        block: Any
        for block in self.blocks:
            zero.append(block.adaLN_modulation[1])
            if block.has_text_stream:
                zero.append(block.adaLN_modulation_text[1])
            if block.has_context:
                zero.append(block.cross_attn.proj)
        for layer in zero:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """Denoise one step.

        Args:
            x: [B, Cin, F, Y, X], or [B, Cin, Y, X] for images. Any size that the patch divides.
            t: time [B], or [B, Gt] for a time a frame of patches (given frames have time 0).
            y: class labels int64 [B].
            text: prompt tokens [B, L, text_dim].
            text_mask: bool [B, L], True for real tokens.

        Returns:
            x's shape, with 2 * Cin channels if learn_sigma.

        Raises:
            ValueError: an input is missing, not wanted, elsewhere than the weights, or does not fit.
            TypeError: an input is no tensor, or of another dtype than the weights.
        """
        check_inputs(self, x, t, y, text, text_mask)
        image = x.dim() == 4
        if image:
            x = x.unsqueeze(2)
        grid = self.grid(x.shape[2:])
        samples, patches = x.shape[0], math.prod(grid)
        text_lens = None
        if text is not None and self.text_mode != "pooled":
            text, text_mask = real_first(text, text_mask)
            text_lens = prefix_lengths(text_mask)
        c = self._condition(t, y, text, text_mask)  # [B, C] or [B, Gt, C]
        tokens = self.x_embedder(x, self._positions(grid, x.device))
        options: dict[str, Any] = self._rotation(grid, x.device)
        block_c = c
        if self.text_mode == "joint" and text is not None:
            words = text.shape[1]
            tokens = torch.cat((tokens, self.text_embedder(text).to(tokens.dtype)), dim=1)
            frames = c[:, None] if c.dim() == 2 else c  # [B, G, C]
            block_c = frames.flatten(0, 1)
            options |= {
                "c_text": frames.mean(1),
                "row_index": _joint_rows(samples, frames.shape[1], patches, words, x.device),
                "text_tokens": words,
                "text_lens": text_lens,
            }
        elif self.text_mode == "cross":
            options |= {"context": text, "context_lens": text_lens}
        for i, block in enumerate(self.blocks):
            tokens = self._run(
                block, tokens, block_c, grid=grid, **options, **self._window(i, grid)
            )
        video = self.final_layer(tokens[:, :patches], c, grid)
        return video.squeeze(2) if image else video

    def forward_packed(
        self,
        xs: Sequence[Tensor],
        t: Tensor | Sequence[Tensor],
        y: Tensor | None = None,
        text: Tensor | Sequence[Tensor] | None = None,
        text_mask: Tensor | None = None,
    ) -> list[Tensor]:
        """Denoise videos of mixed sizes and lengths in one batch, without padding.

        Equal to calling forward on each alone.

        Args:
            xs: S videos [Cin, F, Y, X] (or images [Cin, Y, X]), each of its own size.
            t: time [S], or S times, each [] or [Gt_i], a time a frame of patches.
            y: class labels int64 [S].
            text: S prompts [L_i, text_dim], or [S, L, text_dim] with text_mask.
            text_mask: bool [S, L], True for real tokens.

        Returns:
            S videos in the shapes of xs, with 2 * Cin channels if learn_sigma.

        Raises:
            ValueError, TypeError: as forward.
        """
        check_packed_inputs(self, xs, t, y, text, text_mask)
        if not xs:
            return []
        images = [x.dim() == 3 for x in xs]
        videos = [x.unsqueeze(1) if image else x for x, image in zip(xs, images, strict=True)]
        device = videos[0].device
        grids = [self.grid(video.shape[1:]) for video in videos]
        tokens = [
            self.x_embedder(video[None], self._positions(grid, device))[0]
            for video, grid in zip(videos, grids, strict=True)
        ]
        if text is not None and text_mask is not None:
            ordered, _ = real_first(torch.stack(tuple(text)), text_mask)
            text = [p[:n] for p, n in zip(ordered, text_mask.sum(-1).tolist(), strict=True)]
        padded, text_mask = _pad_prompts(text)
        times = [time.reshape(-1) for time in t]
        frames = [len(time) for time in times]
        c = self._condition(torch.cat(times), y, padded, text_mask, frames)  # [R, C]
        words = [0] * len(grids)
        options: dict[str, Any] = {}
        if self.text_mode == "joint" and text is not None:
            words = [len(prompt) for prompt in text]
            prompts = [self.text_embedder(prompt).to(tokens[0].dtype) for prompt in text]
            tokens = [torch.cat(pair) for pair in zip(tokens, prompts, strict=True)]
            options["c_text"] = torch.stack([rows.mean(0) for rows in c.split(frames)])
        lengths = [len(part) for part in tokens]
        if self.text_mode == "cross":
            options |= {
                "context": padded, "context_lens": prefix_lengths(text_mask), "lengths": lengths
            }  # fmt: skip
        if self.pos_embed is None:
            options |= self._packed_rotation(grids, words, device)
        rows, video_rows = _packed_rows(grids, frames, words, device)
        packed = torch.cat(tokens)[None]
        for i, block in enumerate(self.blocks):
            attention = self._packed_attention(i, grids, words, lengths, device)
            packed = self._run(block, packed, c, row_index=rows, **options, **attention)
        if any(words):
            parts = packed[0].split(lengths)
            packed = torch.cat(
                [part[: math.prod(grid)] for part, grid in zip(parts, grids, strict=True)]
            )[None]
        out = self.final_layer.forward_packed(packed, c, video_rows, grids)
        return [video[:, 0] if image else video for video, image in zip(out, images, strict=True)]

    def grid(self, size: Sequence[int]) -> Grid:
        """(F, Y, X) in patches.

        Raises:
            ValueError: the patch does not divide it.
        """
        if any(length % patch for length, patch in zip(size, self.patch_size, strict=True)):
            raise ValueError(
                f"DiT: the patch {self.patch_size} must divide the video (F, Y, X); got {tuple(size)}"
            )
        gt, gh, gw = (length // p for length, p in zip(size, self.patch_size, strict=True))
        return gt, gh, gw

    def _condition(
        self,
        t: Tensor,
        y: Tensor | None,
        text: Tensor | None,
        text_mask: Tensor | None,
        frames: list[int] | None = None,
    ) -> Tensor:
        """[B, C], [B, Gt, C] where t is a time a frame; packed [R, C], `frames` rows a sample"""
        c = self.t_embedder(t)
        extra = []
        if self.y_embedder is not None:
            extra.append(self.y_embedder(y))
        if self.text_mode == "pooled" and text is not None:
            extra.append(self.text_pool(text, text_mask))
        for vector in extra:
            if frames is not None:
                vector = torch.cat(
                    [row.expand(n, -1) for row, n in zip(vector, frames, strict=True)]
                )
            c = c + (vector if c.dim() == 2 else vector[:, None])
        return c

    def _positions(self, grid: Grid, device: torch.device) -> Tensor | None:
        if self.pos_embed is None:
            return None
        if grid == self.input_grid:
            return self.pos_embed
        return _table(_sincos, self.hidden_size, grid, self.is_image and grid[0] == 1, device)[0]

    def _rotation(self, grid: Grid, device: torch.device) -> dict[str, Any]:
        if self.pos_embed is not None:
            return {}
        cos, sin = _table(_rope, grid, self.rope_dims, self.rope_theta, device)
        return {"cos": cos, "sin": sin, "rope_len": cos.shape[0]}

    def _packed_rotation(
        self, grids: list[Grid], words: list[int], device: torch.device
    ) -> dict[str, Any]:
        """The tables of all sequences in a row; text tokens turn by no angle."""
        cos, sin = [], []
        for grid, count in zip(grids, words, strict=True):
            table = self._rotation(grid, device)
            still = (count, table["cos"].shape[1])
            cos += [table["cos"], torch.ones(still, device=device)]
            sin += [table["sin"], torch.zeros(still, device=device)]
        return {"cos": torch.cat(cos), "sin": torch.cat(sin)}

    def _window(self, block: int, grid: Grid) -> dict[str, Any]:
        """Window arguments of a block, clipped to the grid; none where it would see everything."""
        if self.window_size is None or (block + 1) % self.window_every:
            return {}
        window = tuple(min(w, length) for w, length in zip(self.window_size, grid, strict=True))
        if window == grid:
            return {}
        stride = tuple(min(s, w) for s, w in zip(self.stride or (1, 1, 1), window, strict=True))
        return {"window_size": window, "stride": stride}

    def _packed_attention(
        self,
        block: int,
        grids: list[Grid],
        words: list[int],
        lengths: list[int],
        device: torch.device,
    ) -> dict[str, Any]:
        """One packed call where the sequences differ in length only, else a call a sequence."""
        windows = [self._window(block, grid) for grid in grids]
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        if not any(windows):
            cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)
            return {"cu_seqlens": cu_seqlens, "max_seqlen": max(lengths)}
        return {
            "segments": [
                (slice(start, stop), {"grid": grid, "text_tokens": count, **window})
                for start, stop, grid, count, window in zip(
                    starts[:-1], starts[1:], grids, words, windows, strict=True
                )
            ]
        }

    def _run(self, block: nn.Module, tokens: Tensor, c: Tensor, **options: Any) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            run: Callable[..., Tensor] = block
            if not torch.compiler.is_compiling():
                # the block runs again in backward, maybe in another thread, which no `use_backend` reaches
                run = functools.partial(_run_as, block, backends.requested("DiT", None))
            return checkpoint(run, tokens, c, use_reentrant=False, **options)
        return block(tokens, c, **options)


def _run_as(block: nn.Module, backend: str, *args: Any, **options: Any) -> Tensor:
    with backends.as_requested(backend):
        return block(*args, **options)


def sincos_3d(channels: int, grid: Sequence[int], image: bool) -> Tensor:
    """Fixed position table, float32 [N, C].

    An image's is the original DiT's: half of the channels for each of (w, h). A video's gives a quarter
    to time and the rest to space, as CogVideoX does.

    Raises:
        ValueError: the channels don't split evenly.
    """
    parts = 4 if image else 16
    if channels % parts:
        raise ValueError(
            f"sincos_3d: channels must be a multiple of {parts}"
            f" for {'an image' if image else 'a video'}; got {channels}"
        )
    space = channels if image else 3 * channels // 4
    t, h, w = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    tables = [_sincos_1d(space // 2, w.flatten()), _sincos_1d(space // 2, h.flatten())]
    if not image:
        tables.insert(0, _sincos_1d(channels // 4, t.flatten()))
    return torch.cat(tables, dim=1).float()


def _sincos_1d(channels: int, position: Tensor) -> Tensor:
    frequency = 10000.0 ** (-torch.arange(channels // 2, dtype=torch.float64) / (channels / 2))
    angle = torch.outer(position.double(), frequency)
    return torch.cat((angle.sin(), angle.cos()), dim=1)


def rope_split(head_dim: int) -> tuple[int, int, int]:
    """Channels for (t, h, w): a third each, what is left over to time: 128 -> (44, 42, 42), as Wan."""
    space = 2 * (head_dim // 6)
    return head_dim - 2 * space, space, space


# Position tables are kept from call to call, up to this many bytes: one of a long video takes 100 MB
_KEPT_BYTES = 1 << 28
_kept: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}


def _table(make: Callable[..., tuple[Tensor, ...]], *key: Any) -> tuple[Tensor, ...]:
    """make(*key), kept in eager mode; the least recently used goes first."""
    if torch.compiler.is_compiling() or detect_fake_mode() is not None:
        return make(*key)
    name = (make, *key)
    found = _kept.pop(name, None)
    if found is None:
        # one made under inference_mode could not be saved for backward later
        with torch.inference_mode(False):
            found = make(*key)
        # one made in a CUDA graph holds nothing before the graph is replayed
        if found[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return found
        size = sum(t.nbytes for tables in (*_kept.values(), found) for t in tables)
        while size > _KEPT_BYTES and _kept:
            size -= sum(t.nbytes for t in _kept.pop(next(iter(_kept))))
    _kept[name] = found
    return found


def _rope(
    grid: Grid, dims: tuple[int, ...], theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    return ops.rope_3d(grid, dims, theta, device=device)


def _sincos(channels: int, grid: Grid, image: bool, device: torch.device) -> tuple[Tensor]:
    return (sincos_3d(channels, grid, image).to(device),)


def _joint_rows(
    samples: int, frames: int, patches: int, words: int, device: torch.device
) -> Tensor:
    """Rows of [B * frames video rows, then B text rows] that [B, patches + words] tokens read."""
    sample = torch.arange(samples, device=device, dtype=torch.int32)[:, None]
    frame = torch.arange(patches, device=device, dtype=torch.int32) // max(1, patches // frames)
    video = sample * frames + frame
    return torch.cat((video, (samples * frames + sample).expand(-1, words)), dim=1)


def _packed_rows(
    grids: list[Grid], frames: list[int], words: list[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """int32 [N_total] with the text tokens (their rows follow the videos'), and without them."""
    everything, video = [], []
    first, videos = 0, sum(frames)
    for i, (grid, count, text) in enumerate(zip(grids, frames, words, strict=True)):
        patch = torch.arange(math.prod(grid), dtype=torch.int32, device=device)
        video.append(first + patch // (math.prod(grid) // count))
        everything += [video[-1], patch.new_full((text,), videos + i)]
        first += count
    return torch.cat(everything), torch.cat(video)


def _pad_prompts(text: Tensor | Sequence[Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    """Prompts [L_i, D] -> ([S, L, D], bool [S, L])"""
    if text is None:
        return None, None
    lengths = torch.tensor([len(prompt) for prompt in text], device=text[0].device)
    padded = nn.utils.rnn.pad_sequence(list(text), batch_first=True)
    return padded, torch.arange(padded.shape[1], device=lengths.device) < lengths[:, None]


_SIZES = {  # hidden size, depth, heads
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}


def _image(size: str, patch: int, **options: Any) -> DiT:
    hidden, depth, heads = _SIZES[size]
    defaults = {
        "input_size": (1, 32, 32), "patch_size": (1, patch, patch), "in_channels": 4,
        "hidden_size": hidden, "depth": depth, "num_heads": heads, "num_classes": 1000,
    }  # fmt: skip
    return DiT(**{**defaults, **options})


def _video(size: str, **options: Any) -> DiT:
    hidden, depth, heads = _SIZES[size]
    if options.get("text_dim", 1) is None:  # a video model without text
        options = {"text_mode": "pooled", **options}
    defaults = {
        "input_size": (16, 32, 32), "patch_size": (1, 2, 2), "in_channels": 16,
        "hidden_size": hidden, "depth": depth, "num_heads": heads, "learn_sigma": False,
        "pos_embed": "rope", "qk_norm": "rms", "text_dim": 1024, "text_mode": "cross",
    }  # fmt: skip
    return DiT(**{**defaults, **options})


class _Named(dict[str, Callable[..., DiT]]):
    def __missing__(self, name: str) -> Any:
        raise KeyError(f"DiT_models has no {name!r}; it has {', '.join(self)}")


# name -> constructor; any argument of DiT can be given in place of the named configuration's
DiT_models: dict[str, Callable[..., DiT]] = _Named(
    {
        f"DiT-{size}/{patch}": functools.partial(_image, size, patch)
        for size in _SIZES
        for patch in (2, 4, 8)
    }
    | {f"video-{size}": functools.partial(_video, size) for size in _SIZES}
)
