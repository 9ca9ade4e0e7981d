"""Video to tokens: 3D patch embedding with bias and position in one pass."""

from __future__ import annotations

from torch import Tensor

from dit_kernels.ops.arguments import check_float, check_given, check_shape
from dit_kernels.ops.patch_embed import reference
from dit_kernels.ops.registration import FusedOp

NAME = "patch_embed"


def patch_embed(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos_embed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cut a video into patches and project each to a token.

        tokens[b, n] = weight @ patch(b, n) + bias + pos_embed[n]

    Equal to a Conv3d (Conv2d) whose stride is its kernel size, flattened with w fastest.

    Args:
        video: [B, Cin, F, Y, X], any strides; or [B, Cin, Y, X] with a 4-D weight.
        weight: [C, Cin, pt, ph, pw], as Conv3d's; [C, Cin, ph, pw] for an image.
        bias: [C].
        pos_embed: [N, C] or [1, N, C].
        backend: "auto", "reference", "triton" or "cuda"; None leaves it to `use_backend`.

    Returns:
        tokens [B, N, C] in video's dtype, N = (F / pt) * (Y / ph) * (X / pw).

    Raises:
        ValueError: a shape that does not fit, a video that the patch does not divide; TypeError: a dtype;
        RuntimeError: the backend asked for is not there.

    Source: ViT (Dosovitskiy et al. 2020), equation 1; tubelets of ViViT (Arnab et al. 2021). Accumulated
    in float32, rounded once.
    """
    check_given(NAME, video=video, weight=weight)
    check_float(NAME, video=video, weight=weight, bias=bias, pos_embed=pos_embed)
    if video.dim() not in (4, 5) or weight.dim() != video.dim():
        raise ValueError(
            f"{NAME}: video must be [B, Cin, F, Y, X] with weight [C, Cin, pt, ph, pw], or both without time;"
            f" got {list(video.shape)} and {list(weight.shape)}"
        )
    if video.dim() == 4:
        video, weight = video.unsqueeze(2), weight.unsqueeze(2)
    if video.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{NAME}: video has {video.shape[1]} channels; weight {list(weight.shape)} takes {weight.shape[1]}"
        )
    size, patch = video.shape[2:], weight.shape[2:]
    if any(p < 1 or length % p for length, p in zip(size, patch, strict=True)):
        raise ValueError(
            f"{NAME}: the patch {list(patch)} must divide the video (F, Y, X); got {list(size)}"
        )
    tokens = (size[0] // patch[0]) * (size[1] // patch[1]) * (size[2] // patch[2])
    check_shape(NAME, "bias", bias, weight.shape[:1], "[C]")
    if pos_embed is not None:
        if pos_embed.dim() == 3 and pos_embed.shape[0] == 1:
            pos_embed = pos_embed[0]
        check_shape(NAME, "pos_embed", pos_embed, (tokens, weight.shape[0]), "[N, C]")
    return _op((video, weight, bias, pos_embed), (), backend)[0]


def _fake(
    video: Tensor, weight: Tensor, bias: object, pos_embed: object, stats: bool
) -> list[Tensor]:
    tokens = 1
    for length, patch in zip(video.shape[2:], weight.shape[2:], strict=True):
        tokens = tokens * (length // patch)
    return [video.new_empty((video.shape[0], tokens, weight.shape[0]))]


_op = FusedOp(
    NAME, "Tensor video, Tensor weight, Tensor? bias, Tensor? pos_embed", "", reference, _fake
)
