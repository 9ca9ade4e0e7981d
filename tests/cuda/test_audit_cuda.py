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
        ({"store": 4}, ["no store is wider than 4"]),
        ({"store": 0}, []),
        ({"store": 4, "kernel": "final_layer_bwd_weight_kernel<__half, 8>"}, []),
        ({"occupancy": 0.0}, ["not even one block fits"]),
        ({"matrix": ""}, ["a 16-bit product without tensor cores"]),
        ({"matrix": "", "kernel": "patch_embed_fwd_kernel<float>"}, []),
        ({"matrix": "", "kernel": "final_layer_bwd_rows_kernel<__half, 8, true>"}, ["a 16-bit product without tensor cores"]),
        ({"kernel": "adaln_bwd_kernel<float, 3, true, false>"}, ["no asynchronous copies"]),
        ({"kernel": "adaln_bwd_kernel<float, 3, true, false>", "asynchronous": True}, []),
        ({"dynamic": 227 * 1024}, ["not even one block fits"]),
        ({"dynamic": 48 * 1024}, []),
        ({"dynamic": 32 * 1024, "shared": 16 * 1024}, []),
        ({"dynamic": 32 * 1024, "shared": 17 * 1024},
         ["50176 bytes of shared memory, for which the launcher does not ask"]),
    ],
    ids=["fine", "spills", "narrow", "no-load", "narrow-store", "no-store", "accumulators", "too-large", "slow-product", "float32-product", "slow-product-fp16",
         "synchronous", "asynchronous", "too-much-with-its-own", "asked-for", "least", "unasked"],
)  # fmt: skip
def test_what_fails(changed, problem):
    row = {
        "spills": 0, "main_load": 16, "store": 16, "tma": False, "kernel": "patch_embed_fwd_kernel<__nv_bfloat16>",
        "occupancy": 0.5, "matrix": "HMMA", "asynchronous": False, "arch": "90a", "shared": 1024, "dynamic": 0,
    }  # fmt: skip
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


def test_the_kernels_of_products_are_in_the_sources():
    """A renamed kernel would otherwise be held to nothing."""
    text = "".join(path.read_text() for path in (audit_cuda.ROOT / "csrc").glob("*.cu"))
    for name in (*audit_cuda.PRODUCTS, *audit_cuda.PREFETCHED, *audit_cuda.NARROW_STORES):
        assert f" {name}(" in text, name


def test_calls_of_the_benchmarks():
    launched = [call[0] for _, call in audit_cuda.calls("feed_forward")]
    assert any(name.startswith("feed_forward_fwd_kernel<__nv_bfloat16, 8, ") for name in launched)
    assert any(name.startswith("feed_forward_bwd_kernel<__nv_bfloat16, 8, ") for name in launched)
    assert any(name.startswith("feed_forward_bwd_kernel<float, 4, ") for name in launched)


def test_one_line_a_kernel_and_targets_side_by_side():
    row = {
        "op": "f", "call": "f wan", "kernel": "g<float>", "threads": 64, "dynamic": 0, "spills": 0, "shared": 0,
        "main_load": 16, "load": 16, "store": 16, "tma": False, "asynchronous": True, "matrix": "",
    }  # fmt: skip
    rows = [{**row, "arch": "80", "registers": 40, "occupancy": 0.5}]
    rows += [{**row, "arch": "90a", "registers": 38, "occupancy": 0.5}]
    text = audit_cuda.render(rows, "V13", ["80", "90a"])
    assert "| f wan | `g<float>` | 64 | 40 38 | 0 | 0 | 50% | 16 | 16 | 16 | LDGSTS | - |" in text
    assert "for sm_80, sm_90a: in this order" in text
