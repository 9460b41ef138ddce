"""The compiler's report: tiles as they are listed, names, and what counts as a fault."""

import pytest

import sparsekit as sk
from bench.cuda_report import Code, Tile, cores_table, faults, kernel_name, table, tiles


def test_tiles_are_those_of_the_registry() -> None:
    names = {
        f"{kernel.op}_{kernel.format} {kernel.variant}"
        for kernel in sk.kernels()
        if kernel.format in ("nm_mma_sp", "bsr_mma")
    }
    if not names:
        pytest.skip("this build has no CUDA kernels")
    assert set(tiles()) == names


def test_shared_memory_and_occupancy() -> None:
    tile = tiles()["matmul_nm_mma_sp 128x128"]
    assert tile.shared == 3 * (8 * 1152 + 128 * 128)
    assert tile.threads == 128
    assert tile.blocks_of_sm("80", 254) == 2  # registers and shared memory allow no more
    assert tile.blocks_of_sm("120", 254) == 1  # 100 KiB of shared memory
    assert tile.blocks_of_sm("90a", 128) == 3  # shared memory alone
    assert Tile("matmul_bsr_mma", 64, 256, 4, 4, 1).shared == 4 * (64 * 128 + 256 * 128)
    # A convolution keeps a window for each pixel.
    assert tiles()["conv2d_nm_mma_sp 128x128"].shared == tile.shared + 128 * 16


def test_names() -> None:
    mangled = (
        "_ZN2sk4cuda10matmul_mmaINS0_4TileINS_3ptx{}ELi64ELi16ELi4ELi1ELi8ELi4EEENS0_{}ENS0_{}EEEv"
        "NS0_12MatmulParamsENT1_IT_E6ParamsE"
    )
    for kind, format in (("9NmWeights", "nm_mma_sp"), ("10BsrWeights", "bsr_mma")):
        matmul = mangled.format("3F16", kind, "9RowCopier")
        assert kernel_name(matmul) == f"matmul_{format} f16 64x16"
        conv2d = mangled.format("4BF16", kind, "11PixelCopier")
        assert kernel_name(conv2d) == f"conv2d_{format} bf16 64x16"
    assert kernel_name("_ZN2sk14sp_pack_kernel") == "_ZN2sk14sp_pack_kernel"
    tile = "_ZN2sk4cuda5coresINS0_9CoresTileI{}Li64ELi32ELi4ELi4EEENS0_{}IS4_EENS0_{}IS3_EEEEv"
    assert (
        kernel_name(tile.format("NS0_3F32E", "7NmCores", "7MatrixX")) == "matmul_nm_cores f32 64x32"
    )
    assert (
        kernel_name(tile.format("NS_3ptx4BF16E", "8BsrCores", "6PixelX"))
        == "conv2d_bsr_cores bf16 64x32"
    )
    few = "_ZN2sk4cuda9nm_decodeINS_3ptx3F16ELi8ELi4ELb{}EEEvNS0_8NmParamsE"
    assert kernel_name(few.format(0)) == "matmul_nm_decode f16 8"
    assert kernel_name(few.format(1)) == "matmul_nm_decode f16 8v"
    bsr = "_ZN2sk4cuda10bsr_decodeINS0_3F32ELi4EEEvNS0_9BsrParamsE"
    assert kernel_name(bsr) == "matmul_bsr_decode f32 4"


def good(mma: str) -> Code:
    return Code(80, 0, 0, {mma: 4, "LDGSTS.E.BYPASS.128": 2, "LDS.128": 3})


def test_faults() -> None:
    assert faults("matmul_nm_mma_sp f16 64x8", "80", good("HMMA.SP.16832.F32")) == []
    assert faults("conv2d_bsr_mma f16 64x16", "80", good("HMMA.16816.F32")) == []
    assert faults("_ZN2sk14sp_pack_kernel", "80", Code(40)) == []
    dense = faults("matmul_nm_mma_sp f16 64x8", "80", good("HMMA.16816.F32"))
    assert dense == ["matmul_nm_mma_sp f16 64x8 for sm_80: no HMMA.SP.16832"]
    bad = Code(255, 16, 8, {"HMMA.16816.F32": 1, "LDL": 2, "STL.64": 1, "LDS.64": 1})
    text = "\n".join(faults("conv2d_bsr_mma f16 64x16", "90a", bad))
    for fault in ("16 bytes of stack and 8 of", "3 loads and stores of local", "no asynchronous"):
        assert fault in text
    assert "no loads of 16 bytes" in text


def test_kernels_on_cuda_cores() -> None:
    good = Code(100, 0, 0, {"FFMA": 64, "LDS.128": 4})
    assert faults("matmul_nm_cores f32 64x32", "80", good) == []
    assert faults("matmul_nm_decode f32 8", "80", Code(100, 0, 0, {"FFMA": 1})) == []
    (fault,) = faults("matmul_nm_decode f32 8", "80", Code(100, 0, 0, {"HFMA2": 1}))
    assert fault.endswith("no FFMA")
    (fault,) = faults("conv2d_bsr_cores f32 64x128", "80", Code(100, 0, 0, {"FFMA": 1}))
    assert fault.endswith("no loads of 16 bytes from shared memory")
    (fault,) = faults("matmul_bsr_decode f32 8", "120", Code(128, 8, 0, {"FFMA": 1}))
    assert "8 bytes of stack" in fault
    found = {
        ("matmul_nm_cores f32 64x32", "80"): good,
        ("matmul_nm_cores f16 64x32", "80"): Code(90),
    }
    assert "| matmul_nm_cores | 64x32 | 100 |" in cores_table(found, ["80"])


def test_the_table_has_a_line_for_each_tile() -> None:
    found = {
        (f"{family} {dtype} {size}", "80"): good("HMMA")
        for family, size in (name.split() for name in tiles())
        for dtype in ("f16", "bf16")
    }
    page = table(found, tiles())
    for name in tiles():
        assert f"| {name.split()[1]} |" in page
    assert "| sm_80 |" in page
