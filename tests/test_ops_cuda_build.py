"""What nvcc made of kernels/*.cu, read off the machine code: no GPU needed.

scripts/cuda_archs.sh reads it off every architecture, in a module of its own.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

_C = pytest.importorskip("zsq_ext._C")

pytestmark = pytest.mark.skipif(not _C.cuda_archs, reason="the native module was built without CUDA")


@pytest.fixture(scope="module")
def cuobjdump():
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.submodule_search_locations:
        shipped = Path(spec.submodule_search_locations[0], "backends/nvidia/bin/cuobjdump")
        found = str(shipped) if shipped.exists() else None
    if found is None:
        pytest.skip("cuobjdump is neither on PATH nor in a triton wheel")

    def run(*args):
        return subprocess.run([found, *args, _C.__file__], check=True, capture_output=True, text=True).stdout

    return run


@pytest.fixture(scope="module")
def kernels(cuobjdump):
    """(architecture, kernel) -> its instructions' names."""
    found = {}
    arch = ""
    for line in cuobjdump("-sass").splitlines():
        if match := re.search(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\w+)", line):
            found[arch, match[1]] = names = []
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            names.append(match[1])
    assert found
    return found


def family(kernels, name):
    chosen = {key: names for key, names in kernels.items() if name in key[1]}
    assert chosen, f"no {name} in {[key[1] for key in kernels]}"
    return chosen


def test_the_module_holds_what_it_says(cuobjdump):
    binaries = set(re.findall(r"\.(sm_\w+)\.cubin", cuobjdump("--list-elf")))
    wanted = {f"sm_{arch.removesuffix('-real')}" for arch in _C.cuda_archs.split(",") if "virtual" not in arch}
    assert binaries == wanted
    if any("virtual" in arch for arch in _C.cuda_archs.split(",")):
        assert "sm_80.ptx" in cuobjdump("--list-ptx")


@pytest.mark.skipif(
    "ZSQ_NATIVE_MODULE" in os.environ or torch.cuda.is_available(), reason="compiled for other architectures"
)
def test_without_a_gpu_each_generation_is_there():
    assert _C.cuda_archs == "80-real,90a-real,80-virtual"


def test_nothing_spills(kernels):
    for key, names in kernels.items():
        assert not [name for name in names if name.startswith(("LDL", "STL"))], key


def elements_per_thread(kernel):
    return 4 if "kernelIf" in kernel else 8  # 16 bytes of float, or of a 16-bit type


def test_fake_quant_divides_exactly(kernels):
    # An IEEE division checks its operands by FCHK before it trusts the refined reciprocal; an approximate one, and
    # a product with the reciprocal, do not.
    for key, names in family(kernels, "fake_quant_kernel").items():
        assert names.count("FCHK") == elements_per_thread(key[1]), key


def test_fake_quant_rounds_once_per_operation(kernels):
    # The forward's last product stands alone, where a contraction would have made an FFMA of it.
    for key, names in family(kernels, "fake_quant_kernel").items():
        forward = "ELb0EE" in key[1]
        elements = elements_per_thread(key[1])
        grids = 1 if "ChannelsE0E" in key[1] else elements  # each with a zero-point that may have to be rounded
        assert names.count("FMUL") == (elements if forward else 0), key
        assert names.count("FRND") == grids + (elements if forward else 0), key


def test_fake_quant_moves_16_bytes_at_a_time(kernels):
    for key, names in family(kernels, "fake_quant_kernel").items():
        assert any(name.startswith("LDG.E.128") for name in names), key
        assert any(name.startswith("STG.E.128") for name in names), key


@pytest.mark.parametrize("name", ["bn_act_rows_kernel", "bn_act_columns_kernel"])
def test_bn_act_moves_16_bytes_at_a_time(kernels, name):
    found = family(kernels, name)
    assert len({key for _, key in found}) == 3 * 2 * 3, "three dtypes, with quantizer or not, backward, forward, ends"
    for key, names in found.items():
        assert any(name.startswith("LDG.E.128") for name in names), key
        assert any(name.startswith("STG.E.128") for name in names), key


@pytest.mark.parametrize("name", ["bn_act_rows_kernel", "bn_act_columns_kernel"])
def test_bn_act_quantizes_by_exact_division(kernels, name):
    # One per neighbour beyond those of the plain kernel; in the backward one for every activation that it may follow.
    found = family(kernels, name)
    for key, names in found.items():
        if match := re.search(r"Lb1E(Lb[01]EEEv)", key[1]):  # the last but one of the template's arguments
            plain = found[key[0], key[1].replace(match[0], f"Lb0E{match[1]}")]
            assert names.count("FCHK") >= plain.count("FCHK") + 8, key


def test_bn_act_takes_its_ends_by_comparisons_that_let_nan_in(kernels):
    # A minimum of the hardware's drops NaN: asking for ends adds none to those of the exponential.
    count = 0
    for name in ("bn_act_rows_kernel", "bn_act_columns_kernel"):
        found = family(kernels, name)
        for (arch, key), names in found.items():
            if "Lb1EEEv" in key:
                plain = found[arch, key.replace("Lb1EEEv", "Lb0EEEv")]
                assert names.count("FMNMX") == plain.count("FMNMX"), key
                count += 1
    assert count % (2 * 3 * 2) == 0
    assert count, "rows and columns, three dtypes, with quantizer or not"
    for key, names in family(kernels, "bn_act_unite_kernel").items():
        assert "FMNMX" not in names, key


def test_bn_act_adds_without_atomics(kernels):
    for key, names in family(kernels, "bn_act").items():
        assert not [name for name in names if name.startswith(("ATOM", "RED"))], key


def lsq_kernels(kernels):
    """((architecture, kernel), elements per pack, instructions) of what passes over the elements."""
    for key, names in family(kernels, "fake_quant_lsq_").items():
        if match := re.search(r"Li(\d+)E", key[1]):
            yield key, int(match[1]), names


def test_lsq_divides_exactly(kernels):
    # Loops over packs may be unrolled, so there can be several packs' worth.
    for key, elements, names in lsq_kernels(kernels):
        assert names.count("FCHK") >= elements, key
        assert names.count("FCHK") % elements == 0, key


def test_lsq_moves_16_bytes_at_a_time_where_rows_allow_it(kernels):
    for key, elements, names in lsq_kernels(kernels):
        if elements > 1:
            assert any(name.startswith("LDG.E.128") for name in names), key
            # nvcc takes the stores of the columns apart
            assert "columns" in key[1] or any(name.startswith("STG.E.128") for name in names), key


def test_lsq_adds_in_double_and_without_atomics(kernels):
    for key, names in family(kernels, "fake_quant_lsq_").items():
        assert "DADD" in names, key
        assert not [name for name in names if name.startswith(("ATOM", "RED"))], key


def variants(kernels, name):
    """((architecture, kernel), elements per access, instructions), the elements being its last template argument."""
    for key, names in family(kernels, name).items():
        yield key, int(re.findall(r"Li(\d+)E", key[1])[-1]), names


def test_heads_are_compiled_for_every_dtype_and_form(kernels):
    archs = {arch for arch, _ in kernels}
    for name, count in (
        ("distill_head_kernel", 3 * 3 * 2),  # dtypes, forms of distillation, warp or block
        ("distill_backward_kernel", 3 * 3 * 2),  # packs or not
        ("distill_finish_kernel", 1),
        ("cam_map_tiles_kernel", 3 * 2),
        ("cam_map_channels_kernel", 3 * 2),
        ("cam_map_backward_kernel", 3),
        ("count_rows_kernel", 3 * 2),
        ("count_columns_kernel", 3 * 2),
    ):
        assert len(family(kernels, name)) == count * len(archs), name


@pytest.mark.parametrize(
    "name", ["distill_backward", "cam_map_tiles", "cam_map_channels", "count_rows", "count_columns"]
)
def test_heads_move_16_bytes_at_a_time_where_rows_allow_it(kernels, name):
    for key, elements, names in variants(kernels, f"{name}_kernel"):
        if elements > 1:
            assert any(n.startswith("LDG.E.128") for n in names), key
            assert name != "distill_backward" or any(n.startswith("STG.E.128") for n in names), key


@pytest.mark.parametrize("name", ["distill_head_kernel", "cam_map_backward_kernel"])
def test_what_chooses_at_run_time_moves_16_bytes_too(kernels, name):
    access = "LDG.E.128" if name.startswith("distill") else "STG.E.128"
    for key, names in family(kernels, name).items():
        assert any(n.startswith(access) for n in names), key


def test_distill_head_divides_exactly(kernels):
    # By the temperature: two quotients an element in KL, one in entropy, none in mse. See fake_quant for FCHK.
    for key, elements, names in variants(kernels, "distill_backward_kernel"):
        form = int(re.search(r"KdE(\d)", key[1])[1])
        assert names.count("FCHK") >= elements * (2, 0, 1)[form], key


def test_heads_add_without_atomics(kernels):
    for name in ("distill_", "cam_map_", "count_"):
        for key, names in family(kernels, name).items():
            assert not [n for n in names if n.startswith(("ATOM", "RED."))], key


def test_adaround_and_qdrop_move_16_bytes_at_a_time(kernels):
    found = {**family(kernels, "adaround_kernel"), **family(kernels, "qdrop_flat_kernel")}
    for key, names in found.items():
        assert any(name.startswith("LDG.E.128") for name in names), key
        assert any(name.startswith("STG.E.128") for name in names), key


def test_adaround_divides_exactly_and_rounds_once_per_operation(kernels):
    # One division per element, whole packs and single elements; nothing is contracted but within a division.
    for key, names in family(kernels, "adaround_kernel").items():
        elements = elements_per_thread(key[1]) + 1
        assert names.count("FCHK") == elements, key
        assert "MUFU.EX2" not in names, key
        assert "MUFU.LG2" not in names, key


def test_adaround_adds_without_atomics(kernels):
    for key, names in family(kernels, "adaround").items():
        assert not [name for name in names if name.startswith(("ATOM", "RED"))], key


def test_qdrop_multiplies_wide_and_shares_draws(kernels):
    # Two products of 64 bits in each of ten rounds: one draw for four elements, two for eight.
    for key, names in family(kernels, "qdrop_flat_kernel").items():
        draws = 1 if "kernelIj" in key[1] else 2
        # UIMAD where all lanes multiply the same
        products = [name for name in names if re.match(r"U?IMAD\.(WIDE|HI)\.U32", name)]
        assert len(products) >= 20 * draws, (key, names)
        assert len(products) < 20 * draws + 20, key


IMAGE = ("view_images_kernel", "resize_crops_kernel", "resize_crops_backward_kernel")


@pytest.mark.parametrize("name", IMAGE)
def test_image_ops_gather_and_round_once_per_operation(kernels, name):
    found = family(kernels, name)
    assert len({key for _, key in found}) == 3, "three dtypes"
    for key, names in found.items():
        assert not [n for n in names if n.startswith(("ATOM", "RED"))], key
        # The last sum is of products that stand alone: contracted, it would be an FFMA and FMULs would be few. A
        # division has FFMAs of its own.
        assert "FMUL" in names, key
        assert "FADD" in names, key
        if "view" in name:
            assert "FFMA" not in names, key
        else:
            assert "FCHK" in names, key


def test_codes_divide_exactly_and_move_16_bytes_of_values(kernels):
    found = family(kernels, "fake_quant_codes_kernel")
    assert len({key for _, key in found}) == 3 * 2 * 2, "three dtypes, one grid per pack or several, to codes and back"
    for key, names in found.items():
        back = "ELb1EEEv" in key[1]
        assert names.count("FCHK") == (0 if back else elements_per_thread(key[1])), key
        moves = "STG.E.128" if back else "LDG.E.128"
        assert any(name.startswith(moves) for name in names), key
        assert not back or "FFMA" not in names, key


def test_minmax_divides_exactly_moves_16_bytes_and_takes_its_table_by_value(kernels):
    found = family(kernels, "fake_quant_minmax_kernel")
    assert len({key for _, key in found}) == 3
    for key, names in found.items():
        # two for the grid and one per element, for a warp's channel and for a block's; loops may be unrolled
        assert names.count("FCHK") >= 2 * (2 + elements_per_thread(key[1])), key
        assert any(name.startswith("LDG.E.128") for name in names), key
        assert any(name.startswith("STG.E.128") for name in names), key
        assert not [name for name in names if name.startswith(("ATOM", "RED."))], key


def test_many_divide_exactly_move_16_bytes_and_add_without_atomics(kernels):
    # One pack per way that a pack meets the channels; three loops of whole packs, and three of single elements.
    for name, ways in (("fake_quant_many_forward_kernel", 3), ("fake_quant_many_backward_kernel", 3)):
        found = family(kernels, name)
        assert len({key for _, key in found}) == 3, "three dtypes"
        for key, names in found.items():
            assert names.count("FCHK") >= ways * elements_per_thread(key[1]), key
            assert any(name.startswith("LDG.E.128") for name in names), key
            assert any(name.startswith("STG.E.128") for name in names), key
            assert not [name for name in names if name.startswith(("ATOM", "RED."))], key


def test_lp_error_divides_exactly_rounds_once_and_has_no_library_power(kernels):
    found = family(kernels, "lp_error_kernel")
    assert len({key for _, key in found}) == 3 * 2, "three dtypes, squares and powers"
    for key, names in found.items():
        assert "FCHK" in names, key
        assert not {"MUFU.EX2", "MUFU.LG2"} & set(names), key
        assert not [name for name in names if name.startswith(("ATOM", "RED."))], key


def test_channel_range_moves_16_bytes_where_rows_allow_it(kernels):
    for key, names in family(kernels, "channel_range_").items():
        assert not [name for name in names if name.startswith(("ATOM", "RED."))], key
        match = re.search(r"Li(\d+)E", key[1])
        if match and int(match[1]) > 1:
            assert any(name.startswith("LDG.E.128") for name in names), key
