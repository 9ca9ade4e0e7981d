"""What the launchers take from Python: tensors with or without torch's table of DLPack, numbers, plans, keys."""

from __future__ import annotations

import sys

import pytest
import torch

from dit_kernels import ops
from dit_kernels.ops import cuda_extension
from dit_kernels.ops.cuda_extension import where

KERNELS = cuda_extension.kernels()


class Named:
    """What a tensor tells by name, and no more: another torch may export no table."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.shape, self.dtype, self.device = (
            tensor,
            tensor.shape,
            tensor.dtype,
            tensor.device,
        )

    def __getattr__(self, name):
        assert name in ("data_ptr", "stride", "element_size"), name
        return getattr(self.tensor, name)


VIEWS = {
    "fp32": torch.zeros(2, 3, 8),
    "bf16": torch.zeros(2, 3, 8, dtype=torch.bfloat16),
    "fp16": torch.zeros(4, dtype=torch.float16),
    "fp64": torch.zeros(2, dtype=torch.float64),
    "int64": torch.zeros(2, 3, dtype=torch.int64),
    "int32": torch.zeros(2, 3, dtype=torch.int32),
    "one-axis-of-one": torch.zeros(2, 7)[:, 3:4],
    "transposed": torch.zeros(3, 5).t(),
    "unaligned": torch.zeros(9)[1:],
    "expanded": torch.zeros(1, 8).expand(4, 8),
    "empty": torch.zeros(0, 8),
    "scalar": torch.zeros(()),
    "with-a-gradient": torch.zeros(2, 8, requires_grad=True),
    "parameter": torch.nn.Parameter(torch.zeros(2, 8)),
}
every_view = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)


@every_view
def test_a_tensor_is_read_the_same_either_way(view):
    assert KERNELS.key(view) == KERNELS.key(Named(view))
    assert KERNELS.takes(view) == KERNELS.takes(Named(view))


def test_torch_exports_its_table():
    assert hasattr(torch.Tensor, "__dlpack_c_exchange_api__")


def test_kernels_run_on_what_is_read_by_name():
    x = torch.randn(5, 24)
    got, expected = torch.empty(5, 24), torch.empty(5, 24)
    KERNELS.feed_forward_fwd(*where(x), x, None, expected, 5, 5, 24, 0, 24, 1, 0)
    KERNELS.feed_forward_fwd(*where(x), Named(x), None, Named(got), 5, 5, 24, 0, 24, 1, 0)
    assert torch.equal(got, expected)


def test_a_key_tells_layouts_apart():
    base = torch.zeros(64)
    views = [
        base[:16].view(2, 8), base[:16].view(8, 2), base[:16].view(2, 8).t(), base[:16].view(1, 2, 8),
        base[1:17].view(2, 8), base[:8].expand(2, 8), base[:16].view(2, 8).bfloat16(),
        base[:16].view(2, 8).half(), base[:16].view(2, 8).int(),
    ]  # fmt: skip
    keys = [KERNELS.key(view) for view in views]
    keys += [KERNELS.key(), KERNELS.key(None), KERNELS.key(None, None)]
    keys += [KERNELS.key(views[0], None), KERNELS.key(None, views[0])]
    assert len(set(keys)) == len(keys)
    # the address itself does not count, but for its alignment
    assert KERNELS.key(base[:16]) == KERNELS.key(base[16:32])
    many = [torch.zeros(2, 3, 4, 5, 6)] * 60
    assert KERNELS.key(*many) == KERNELS.key(*many) != KERNELS.key(*many[1:])


def test_what_kernels_take():
    x = torch.zeros(2)
    assert KERNELS.takes()
    assert KERNELS.takes(x, None, x.half(), x.bfloat16(), x.int(), x.long(), x.bool())
    for other in (x.double(), x.to(torch.complex64), x.to(torch.float8_e4m3fn), x.to("meta")):
        assert not KERNELS.takes(x, other)


def test_wrong_arguments_are_exceptions_that_name_the_launcher():
    x, y = torch.randn(3, 8), torch.empty(3, 8)
    sizes = (3, 3, 8, 0, 8, 1, 0)
    launch = KERNELS.feed_forward_fwd
    with pytest.raises(TypeError, match="feed_forward_fwd takes 12 arguments; got 2"):
        launch(*where(x))
    with pytest.raises(
        TypeError,
        match="feed_forward_fwd: argument 2: expected a tensor or None; got <class 'str'>",
    ):
        launch(*where(x), "x", None, y, *sizes)
    with pytest.raises(TypeError, match=r"feed_forward_fwd: argument 5: .*integer"):
        launch(*where(x), x, None, y, "3", *sizes[1:])
    with pytest.raises(RuntimeError, match=r"argument 11: 4294967296 is more than 32 bits hold"):
        launch(*where(x), x, None, y, *sizes[:-1], 2**32)
    with pytest.raises(OverflowError, match="argument 5"):
        launch(*where(x), x, None, y, 2**64, *sizes[1:])
    with pytest.raises(TypeError, match=r"unpatchify: argument 5: expected 3 values; got 2"):
        KERNELS.unpatchify(*where(x), x, y, False, (1, 1), (1, 2, 2), 1, (4, 2, 1, 1), (1, 1))
    with pytest.raises(RuntimeError, match=r"tokens has 3 axes; got torch.float32 \[3, 8\]"):
        KERNELS.unpatchify(*where(x), x, y, False, (1, 1, 1), (1, 2, 2), 1, (4, 2, 1, 1), (1, 1))
    with pytest.raises(TypeError, match=r"qk_norm_rope_fwd: argument 2: expected the plan"):
        KERNELS.qk_norm_rope_fwd(*where(x), x, x, *[None] * 7, y, *[None] * 5)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((-1, 1, 8, 0, 8, 1, 0), "there are no -1 rows of 8 columns"),
        ((3, 0, 8, 0, 8, 1, 0), "3 rows of 8 columns, 0 to a step"),
        ((3, 3, 8, 0, 8, 1, 9), "no such activation: 9"),
    ],
)
def test_sizes_that_make_no_sense_are_exceptions(sizes, message):
    x, y = torch.randn(3, 8), torch.empty(3, 8)
    with pytest.raises(RuntimeError, match=rf"feed_forward_fwd: .*{message}.*\[3, 8\]"):
        KERNELS.feed_forward_fwd(*where(x), x, None, y, *sizes)


def test_pieces_of_nothing_are_exceptions():
    video, weight = torch.zeros(1, 1, 1, 2, 2), torch.zeros(8, 1, 1, 2, 2)
    tokens, sums = torch.zeros(1, 1, 8), torch.zeros(1, 32)
    with pytest.raises(RuntimeError, match="patch_embed_bwd_weight: 1 in pieces of 0"):
        KERNELS.patch_embed_bwd_weight(*where(video), video, weight, tokens, 0, sums, None)
    none = torch.zeros(8, 1, 1, 0, 2)
    with pytest.raises(
        RuntimeError, match=r"weight is of no pixels: torch.float32 \[8, 1, 1, 0, 2\]"
    ):
        KERNELS.patch_embed_bwd_weight(*where(video), video, none, tokens, 64, sums, None)


def test_a_plan_is_of_one_call():
    """The plan of a forward is none of a backward."""
    side = [0] * 18
    plan = KERNELS.QkNormRope([0] * 5, 1e-6, [8, 1, 0, 4, 32], [0] * 7, [side, side])
    with pytest.raises(
        TypeError, match=r"adaln_forward: argument 2: expected the plan of this call"
    ):
        KERNELS.adaln_forward(0, 0, plan, *[None] * 20)


def test_a_failed_call_leaves_no_reference():
    x = torch.zeros(2, 3)
    before = sys.getrefcount(x)
    for _ in range(5):
        with pytest.raises(RuntimeError):
            KERNELS.feed_forward_fwd(0, 0, x, None, x, 2**31, 2**31, 8, 0, 8, 1, 0)
        KERNELS.key(x)
        KERNELS.takes(x)
    assert sys.getrefcount(x) == before


def huge(*size):
    """Of one element, however large."""
    return torch.zeros(1).expand(*size)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.adaln(huge(1, 2**31, 8), backend="cuda"),
         r"less than 2\^31 tokens .*\[1, 2147483648, 8\]"),
        (lambda: ops.qk_norm_rope(huge(1, 2**30, 1, 8), backend="cuda"),
         r"less than 2\^30 tokens .*\[1, 1073741824, 1, 8\]"),
        (lambda: ops.qk_norm_rope(torch.zeros(1, 2, 2, 8), huge(1, 2, 2**27, 8), backend="cuda"),
         r"sample of k .*\[1, 2, 134217728, 8\]"),
        (lambda: ops.patch_embed(huge(1, 1, 1, 1, 2**31), torch.zeros(4, 1, 1, 1, 1), backend="cuda"),
         r"axis of the video is shorter than 2\^31; got \[1, 1, 1, 1, 2147483648\]"),
        (lambda: ops.patch_embed(torch.zeros(1, 1, 1, 1, 1), huge(2**24, 1, 1, 1, 1), backend="cuda"),
         r"at most 2\^23 channels .*\[16777216, 1, 1, 1, 1\]"),
        (lambda: ops.final_layer(huge(1, 2**31, 8), None, None, torch.zeros(4, 8), None, (1, 1, 2**31),
                                 (1, 2, 2), 1, backend="cuda"),
         r"less than 2\^31 tokens; got \[1, 2147483648, 8\]"),
    ],
    ids=["adaln", "q", "k", "video", "weight", "final_layer"],
)  # fmt: skip
def test_sizes_beyond_a_kernels_range_are_exceptions_with_the_shape(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
