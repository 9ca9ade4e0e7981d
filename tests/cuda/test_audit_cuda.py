"""The audit of the CUDA binaries: what it reads from machine code, and what it finds wrong."""

from __future__ import annotations

import pytest

from benchmarks import audit_cuda

LOOP = """
        /*0010*/                   LDG.E.U16.CONSTANT R1, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.U16.CONSTANT R3, desc[UR4][R2.64+0x2] ;
        /*0030*/                   LDG.E.U16.CONSTANT R3, desc[UR4][R2.64+0x4] ;
.L_x_0:
        /*0040*/                   {load} R4, desc[UR4][R2.64] ;
        /*0050*/                   STG.E.128 desc[UR4][R6.64], R4 ;
        /*0060*/               @P0 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
"""


def test_what_is_read_from_machine_code():
    row = audit_cuda.read(LOOP.format(load="LDG.E.128.CONSTANT"))
    assert (row["main_load"], row["load"], row["store"], row["spills"]) == (16, 16, 16, 0)
    row = audit_cuda.read(LOOP.format(load="LDG.E.CONSTANT"))
    assert (row["main_load"], row["load"], row["store"]) == (4, 4, 16)
    # a generic address counts as global
    assert audit_cuda.read(LOOP.format(load="LD.E.64"))["main_load"] == 8
    # no loop: the load that brings most bytes
    assert audit_cuda.read("LDG.E.64 R1 ;\nLDG.E R2 ;")["main_load"] == 8
    row = audit_cuda.read("STL [R1], R2 ;\nLDL R2, [R1] ;\nLDGSTS.E.BYPASS.128 [R7] ;\nHMMA.16816.F32 R8 ;")  # fmt: skip
    assert (row["spills"], row["main_load"], row["matrix"]) == (2, 16, "HMMA")
    assert row["asynchronous"]
    assert audit_cuda.read("UTMALDG.4D [UR8] ;\nHGMMA.64x64x16.F32 R24 ;")["tma"]


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({}, []),
        ({"spills": 2}, ["spills"]),
        ({"main_load": 4}, ["most bytes come by loads of 4"]),
        ({"main_load": 0}, []),
        ({"occupancy": 0.0}, ["not even one block fits"]),
    ],
    ids=["fine", "spills", "narrow", "no-load", "too-large"],
)
def test_what_fails(changed, problem):
    row = {"spills": 0, "main_load": 16, "tma": False, "kernel": "f<float>", "occupancy": 0.5}
    assert audit_cuda.problems({**row, **changed}) == problem


def test_occupancy():
    def share(arch, registers=32, shared=0, threads=256, dynamic=0):
        return audit_cuda.occupancy(
            arch, {"registers": registers, "shared": shared}, threads, dynamic
        )

    assert share("90a") == 1.0
    assert share("90a", registers=64) == 0.5
    assert share("90a", dynamic=112 * 1024) == 0.25
    assert share("90a", dynamic=228 * 1024) == 0.0
    assert share("89", threads=1024) == 1024 / 1536


def test_names_are_the_emulators():
    """The same demangled names on both sides: a kernel with template arguments in an unnamed namespace."""
    mangled = "_ZN2dk48_GLOBAL__N__94b0191a_15_feed_forward_cu_9f32b54923feed_forward_bwd_kernelI13__nv_bfloat16Li1ELNS_10ActivationE3EEEvPKT_S6_"
    assert audit_cuda.demangled([mangled]) == ["feed_forward_bwd_kernel<__nv_bfloat16, 1, (Activation)3>"]  # fmt: skip


def test_every_kernel_of_the_benchmarks_is_in_a_binary():
    """Recorded calls of the public ops find their kernels in the committed rows."""
    launched = [call[0] for _, call in audit_cuda.calls("feed_forward")]
    assert any(name.startswith("feed_forward_fwd_kernel<__nv_bfloat16, 8, ") for name in launched)
    assert any(name.startswith("feed_forward_bwd_kernel<__nv_bfloat16, 8, ") for name in launched)
