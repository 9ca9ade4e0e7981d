"""Tuned tiles: where calls find them, what is ignored, and the tuner with a clock of its own."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import offline, tune
from benchmarks.cases import cases_for
from benchmarks.shapes import SHAPES
from dit_kernels import ops
from dit_kernels.ops import triton_launch, triton_tuning
from dit_kernels.ops.attention3d import triton as attention

pytestmark = pytest.mark.skipif(
    triton_launch.INTERPRETED, reason="under TRITON_INTERPRET=1 launches are made, not recorded"
)

VERSION = {"format": 2, "gpu": "some", "triton": "3.6", "sources": {"a": "0", "b": "1"}}


class Tiles(NamedTuple):
    parts: tuple[int, ...]
    warps: int


def test_what_is_saved_is_chosen(tmp_path, monkeypatch):
    path = tmp_path / "new" / "tuned.json"
    triton_tuning.save(path, VERSION, {"a.forward": {"1152 norm": [[1024, 128], 8]}})
    monkeypatch.setattr(triton_tuning, "tuned", lambda: triton_tuning.load(path, VERSION))
    default = Tiles((2048,), 4)
    assert triton_tuning.choose("a.forward", (1152, "norm"), default) == Tiles((1024, 128), 8)
    assert triton_tuning.choose("a.forward", (1153, "norm"), default) is default
    assert triton_tuning.choose("b.forward", (1152, "norm"), default) is default


@pytest.mark.parametrize("field", ["format", "gpu", "triton"])
def test_another_gpu_or_triton_is_ignored(tmp_path, field, recwarn):
    path = tmp_path / "tuned.json"
    triton_tuning.save(path, VERSION | {field: "other"}, {"a.forward": {"1": [1]}})
    assert triton_tuning.load(path, VERSION) == {}
    assert not recwarn


def test_tiles_of_an_op_that_was_changed_since_are_ignored(tmp_path, recwarn):
    path = tmp_path / "tuned.json"
    older = VERSION | {"sources": {"a": "0", "b": "older"}}
    tiles = {"a.forward": {"1": [1]}, "b.forward": {"1": [2]}, "gone.forward": {"1": [3]}}
    triton_tuning.save(path, older, tiles)
    assert triton_tuning.load(path, VERSION) == {"a.forward": {"1": [1]}}
    assert not recwarn


def test_every_kernel_with_candidates_has_a_source():
    assert {kernel.partition(".")[0] for kernel in triton_tuning.CANDIDATES} <= set(
        triton_tuning.sources()
    )
    assert len(set(triton_tuning.sources().values())) == len(triton_tuning.sources())


def test_a_missing_file_is_nothing(tmp_path, recwarn):
    assert triton_tuning.load(tmp_path / "none.json", VERSION) == {}
    assert not recwarn


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '{"tiles": {}}', json.dumps({"version": VERSION}),
        json.dumps({"version": VERSION, "tiles": []}),
        json.dumps({"version": VERSION, "tiles": {"a.b": {"1": "x"}}}),
        json.dumps({"version": VERSION, "tiles": {"a.b": {"1": 3}}}),
    ],
)  # fmt: skip
def test_a_corrupt_file_is_ignored_with_a_warning(tmp_path, text):
    path = tmp_path / "tuned.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match=r"tuned\.json is no file of tuned tiles"):
        assert triton_tuning.load(path, VERSION) == {}


def test_where_the_file_is(tmp_path, monkeypatch):
    monkeypatch.setenv("DIT_KERNELS_TUNED", str(tmp_path / "here.json"))
    assert triton_tuning.file() == tmp_path / "here.json"
    monkeypatch.delenv("DIT_KERNELS_TUNED")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert triton_tuning.file() == tmp_path / "dit_kernels" / "NVIDIA-H200.json"


def test_the_users_own_tiles_come_before_those_that_ship(tmp_path, monkeypatch):
    """Both of this GPU, source and Triton; those that ship serve where the user has none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(triton_tuning, "SHIPPED", tmp_path / "tuned")
    monkeypatch.setenv("DIT_KERNELS_TUNED", str(tmp_path / "own.json"))
    made_with = triton_tuning.version()
    assert made_with["triton"].count(".") == 1  # a patch release keeps them
    there = tmp_path / "tuned" / "NVIDIA-H200.json"
    triton_tuning.save(there, made_with, {"adaln.k": {"1": [1], "2": [2]}, "adaln.l": {"1": [7]}})
    triton_tuning.save(tmp_path / "own.json", made_with, {"adaln.k": {"2": [3]}})
    triton_tuning.tuned.cache_clear()
    try:
        assert triton_tuning.tuned() == {"adaln.k": {"1": [1], "2": [3]}, "adaln.l": {"1": [7]}}
        triton_tuning.save(there, {**made_with, "sources": {}}, {"adaln.k": {"1": [1]}})
        triton_tuning.tuned.cache_clear()
        assert triton_tuning.tuned() == {"adaln.k": {"2": [3]}}
    finally:
        triton_tuning.tuned.cache_clear()


def attend(frames: int) -> object:
    q, k, v = torch.empty(1, frames * 32, 3, 4, 72, dtype=torch.bfloat16).unbind(2)
    kwargs = dict(grid=(frames, 4, 8), window_size=(1, 3, 5), backend="triton")
    return ops.attention3d(q, k, v, **kwargs)


def test_a_class_is_no_length(monkeypatch):
    asked: dict = {}
    monkeypatch.setattr(triton_tuning, "asked", asked)
    with offline.recorded():
        for frames in (1, 3, 17):
            triton_launch.Plans.clear()
            attend(frames)
    assert list(asked) == [("attention3d.fwd", "72 torch.bfloat16 cubes")]


def test_calls_take_what_is_tuned(monkeypatch):
    tiles = {"attention3d.fwd": {"72 torch.bfloat16 cubes": [64, 32, 4, 1]}}
    with offline.recorded() as launches:
        monkeypatch.setattr(triton_tuning, "tuned", lambda: tiles)
        attend(3)
    assert launches[0].tile == "64x32"
    assert launches[0].options["num_warps"] == 4


def test_the_tuner_keeps_the_fastest():
    """Times that depend on the tiles alone: 128 keys are fast, 16 faster still, all else slow."""
    times = {(128, 128): 2.0, (128, 16): 1.0}
    with offline.recorded() as launches:

        def measure(call) -> float:
            launches.clear()
            call()
            if launches[0].options["num_stages"] == 3:
                raise RuntimeError("out of resource: shared memory")
            return times.get(tuple(map(int, launches[0].tile.split("x"))), 3.0)

        rows = tune.tune_call(lambda: attend(3), measure, set())
    (row,) = rows
    assert row["kernel"] == "attention3d.fwd"
    assert row["default"] == list(attention.configuration("fwd", 72, torch.bfloat16, "sm_90", True))
    assert (row["best"][:2], row["best_ms"]) == ([128, 16], 1e3)
    assert tune.worth(rows) == {row["kernel"]: {row["key"]: row["best"]}}
    assert tune.worth([row | {"best_ms": 0.99 * row["default_ms"]}]) == {}
    assert not triton_tuning.trying


@pytest.mark.parametrize(
    "case", list(cases_for(SHAPES["wan-1.3b-480p"])), ids=lambda case: case.name
)
def test_every_candidate_changes_the_launch(case):
    kwargs = case.make(SHAPES["wan-1.3b-480p"], lambda *s: torch.empty(s, dtype=torch.bfloat16))
    seen = []
    with offline.recorded() as launches:

        def call() -> None:
            getattr(ops, case.function)(**kwargs, backend="triton")

        def measure(call) -> float:
            launches.clear()
            call()
            seen.append(launches[0].key("sm_90"))
            return 1.0

        rows = tune.tune_call(call, measure, set())
    assert len(set(seen)) == len(seen) == sum(row["tried"] for row in rows)


def test_without_a_gpu_there_is_nothing_to_measure(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert tune.main([]) == 1
    assert "there is no GPU" in capsys.readouterr().err
