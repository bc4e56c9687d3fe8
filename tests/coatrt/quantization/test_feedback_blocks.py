"""Error feedback in blocks of columns, as a GPU does it: codes are the CPU's but for near ties, which are counted."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import coatrt.quantization.feedback_blocks as blocks
from coatrt.quantization.codec import decode_scales, encode
from coatrt.quantization.feedback_blocks import torch_step
from coatrt.quantization.float32 import full_float32
from coatrt.quantization.gptq import InverseFactors, feedback_codes
from coatrt.quantization.grid import Grid
from support.feedback_check import output_error, ties_of
from support.programs import run_program

FORMATS = ("int4-g32", "int8", "int8-g32", "fp8", "nvfp4", "nf2-g32", "nf3-g32", "nf4-g64", "nf8-g64",
           "nf3-g32-dq4-bf16-64")  # fmt: skip


def case(N, K, seed=0):
    """Return a weight and the moment of inputs that are correlated and of very unlike energy."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2000, K, generator=generator) @ (torch.randn(K, K, generator=generator) / K**0.5 + torch.eye(K))
    x *= torch.randn(K, generator=generator).exp()
    return torch.randn(N, K, generator=generator) * 0.02, x.t() @ x / 2000


def bits(codes):
    return codes.contiguous().view(torch.uint8)


def recoded(weight, matrix, order, factor, step):
    fmt, K = matrix.format, matrix.K
    return feedback_codes(weight, decode_scales(matrix), fmt.block or K, matrix.grid, order, factor, step)


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize(("N", "K"), [(24, 100), (70, 192), (5, 64), (150, 321)])
def test_codes_are_those_of_the_loop_in_numpy(text, N, K):
    weight, H = case(N, K)
    factors = InverseFactors()
    matrix = encode(weight, text, "feedback", H, 500, factors)
    found = recoded(weight, matrix, *factors.get(H, 500), torch_step)
    assert found.dtype == matrix.codes.dtype and found.is_contiguous()
    assert int((bits(found) != bits(matrix.codes[:, :K])).sum()) == 0  # of these: no near tie is among them


def test_pieces_of_rows_are_coded_alike(monkeypatch):
    weight, H = case(70, 192)
    factors = InverseFactors()
    matrix = encode(weight, "nf3-g32", "feedback", H, factors=factors)
    monkeypatch.setattr(blocks, "_CPU_ROWS", 32)
    found = recoded(weight, matrix, *factors.get(H, None), torch_step)
    assert (found == matrix.codes).float().mean() > 0.999


@pytest.mark.parametrize("text", FORMATS)
def test_other_sums_change_near_ties_only(text):
    """A factor rounded otherwise, as a GPU's is: every code is right by that factor, and the output error the same."""
    weight, H = case(128, 512, seed=3)
    factors = InverseFactors()
    matrix = encode(weight, text, "feedback", H, 2048, factors)
    order, factor = factors.get(H, 2048)
    noise = torch.randn(factor.shape, generator=torch.Generator().manual_seed(0)).triu()
    other = factor * (1 + 2.0**-22 * noise)
    again = encode(weight, text, "feedback", H, 2048, factors)
    again.codes[:, :512] = recoded(weight, matrix, order, other, torch_step)
    for codes, used in ((matrix, factor), (again, other)):
        ties = ties_of(weight, codes, order, used)
        assert ties.count < 1e-3 * codes.codes.numel()
        assert ties.worst < 0.01
    assert output_error(weight, again, H) == pytest.approx(output_error(weight, matrix, H), rel=1e-3)


def test_a_wrong_code_is_no_tie():
    weight, H = case(16, 128)
    factors = InverseFactors()
    matrix = encode(weight, "int4-g32", "feedback", H, factors=factors)
    order, factor = factors.get(H, None)
    assert ties_of(weight, matrix, order, factor).worst < 1e-3
    matrix.codes[3, order[-1]] += 1 if matrix.codes[3, order[-1]] < 7 else -1  # the last: nothing makes up for it
    found = ties_of(weight, matrix, order, factor)
    assert found.count == 1 and 0.05 < found.worst <= 0.5


OWN = Grid("nf3", (-1.0, -0.5625, -0.25, -0.03125, 0.125, 0.3125, 0.625, 0.875))


def columns_of(grid, count, rows):
    """Return the arguments of a `Step`: columns of two scale blocks, of which one row has the scale zero."""
    generator = torch.Generator().manual_seed(count)
    scales = torch.rand(2, rows, generator=generator) * 0.02 + 0.01
    if grid.levels is not None and grid.kind != "nvfp4":
        scales *= torch.randn(2, rows, generator=generator).sign()
    scales[1, 3] = 0
    columns = torch.randn(count, rows, generator=generator) * 0.02 * min(grid.reach, 7)
    places = (torch.arange(count) % 3 == 0).int()
    before = (torch.randn(count, count, generator=generator) * 0.2).tril(-1)
    return columns, torch.empty_like(columns), before, places, scales, grid


GRIDS = (*map(Grid, ("int4", "int8", "fp8", "nvfp4", "nf2", "nf3", "nf4", "nf8")), OWN)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_columns_that_carry_values_are_those_of_a_loop(grid):
    """As coordinate descent codes them: no column's pivot is read, it is zero."""
    columns, carried, before, places, scales, _ = columns_of(grid, 48, 30)
    levels = np.float64(torch.arange(-128 if grid.kind == "int8" else -8, 128 if grid.kind == "int8" else 8))
    if grid.kind == "fp8":
        levels = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    elif grid.levels is not None:
        levels = grid.levels.double().numpy()
    levels, want = np.unique(levels[np.isfinite(levels)]), np.zeros((48, 30))
    for j, place in enumerate(places.tolist()):
        best = columns[j].double().numpy() - before[j, :j].double().numpy() @ want[:j]
        offers = levels[:, None] * scales[place].double().numpy()
        want[j] = offers[np.abs(offers - best).argmin(0), np.arange(30)]
    for step in (torch_step, blocks._numpy_step):
        found, values = columns.clone(), carried.clone()
        step(found, values, before, places, scales, grid, values=True)
        np.testing.assert_allclose(values.numpy(), want, rtol=1e-6, atol=1e-9)
        spread = scales[places.long()]
        assert torch.equal(found * spread, values)
        assert torch.equal(grid.snap(found), found)


_INTERPRETED = """
import json, sys
import torch
from coatrt.quantization.feedback_blocks import torch_step
from coatrt.quantization.feedback_kernel import step
from coatrt.quantization.gptq import InverseFactors
from coatrt.quantization.codec import encode
from test_feedback_blocks import FORMATS, GRIDS, bits, case, columns_of, recoded

torch.set_num_threads(1)
differ = {}
for grid in GRIDS:
    both = []
    for one in (step, torch_step):
        columns, carried, *rest = columns_of(grid, 21, 40)
        one(columns, carried, *rest, values=True)
        both.append(torch.stack([columns, carried]))
    differ[f"values {grid}"] = int((both[0] != both[1]).sum())
for text in FORMATS:
    for N, K in ((40, 100), (7, 65)):  # tiles and blocks that are not full
        weight, H = case(N, K)
        factors = InverseFactors()
        matrix = encode(weight, text, "feedback", H, 500, factors)
        found = recoded(weight, matrix, *factors.get(H, 500), step)
        differ[f"{text} {N}x{K}"] = int((bits(found) != bits(matrix.codes[:, :K])).sum())
print(json.dumps(differ))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_interpreted_gives_the_same_codes(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    more = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(more))
    done = run_program(_INTERPRETED)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 2 * len(FORMATS) + len(GRIDS) and not any(found.values()), found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("slow", [False, True])
def test_a_gpu_gives_the_codes_but_for_near_ties(text, slow, monkeypatch):
    weight, H = case(1024, 1024)
    if slow:
        monkeypatch.setattr("coatrt.quantization.gptq.step_for", lambda device: torch_step)
    else:
        assert blocks.step_for(torch.device("cuda")) is not torch_step
    factors = InverseFactors()
    near, there = weight.cuda(), H.cuda()
    found = encode(near, text, "feedback", there, 4096, factors)
    assert found.codes.is_cuda
    ties = ties_of(near, found, *factors.get(there, 4096))
    assert ties.count < 1e-3 * found.codes.numel() and ties.worst < 0.01
    expected = output_error(weight, encode(weight, text, "feedback", H, 4096), H)
    assert output_error(near, found, there) == pytest.approx(expected, rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("text", ["int4-g64", "nvfp4", "nf2-g64", "nf3-g64", "nf4-g64", "nf3-g32-dq4-bf16-64"])
def test_a_gpu_refines_to_the_same_error(text):
    weight, H = case(512, 512)
    found = encode(weight.cuda(), text, "refined", H.cuda(), 4096)
    assert all(tensor.is_cuda == (name != "levels") for name, tensor in found.tensors.items())
    expected = encode(weight, text, "refined", H, 4096)
    assert output_error(weight, found.to(torch.device("cpu")), H) == pytest.approx(
        output_error(weight, expected, H), rel=0.01
    )


def test_a_step_that_cannot_be_built_is_said_and_replaced(monkeypatch, capsys):
    monkeypatch.setattr(blocks, "warn_once", print)
    blocks._kernel_step.cache_clear()
    if torch.cuda.is_available():
        monkeypatch.setattr(blocks, "Grid", None)
    assert blocks._kernel_step() is torch_step
    assert "error feedback runs without Triton" in capsys.readouterr().out
    blocks._kernel_step.cache_clear()


def test_products_keep_all_bits():
    switch = torch.backends.cuda.matmul
    with full_float32():
        assert torch.get_float32_matmul_precision() == "highest"
    torch.set_float32_matmul_precision("high")
    try:
        with full_float32():
            assert torch.get_float32_matmul_precision() == "highest" and not switch.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    if hasattr(switch, "fp32_precision"):
        before, switch.fp32_precision = switch.fp32_precision, "tf32"
        try:
            with full_float32():
                assert switch.fp32_precision == "ieee"
            assert switch.fp32_precision == "tf32"
        finally:
            switch.fp32_precision = before


_BESIDE = """
import json
import torch
from coatrt.quantization.codec import encode
from coatrt.quantization.gptq import InverseFactors
from support import pretend_device
from support.feedback_check import output_error, ties_of
from test_feedback_blocks import FORMATS, bits, case

torch.set_num_threads(1)
weight, H = case(20, 100)
near, there = weight.to(pretend_device.NAME), H.to(pretend_device.NAME)
factors, differ = InverseFactors(), {}
for text in FORMATS:
    for quantizer in ("absmax", "mse", "weighted", "refined", "feedback"):
        found = encode(near, text, quantizer, there, 500, factors)
        back, expected = found.to(torch.device("cpu")), encode(weight, text, quantizer, H, 500)
        differ[f"{text} {quantizer}"] = sum(
            int((bits(back.tensors[name]) != bits(tensor)).sum()) for name, tensor in expected.tensors.items()
        )
        moved = [tensor for name, tensor in found.tensors.items() if name != "levels"]
        assert all(isinstance(tensor, pretend_device.Pretend) for tensor in moved)
    assert ties_of(near, found, *factors.get(there, 500)).worst < 0.01
    output_error(near, found, there)
print(json.dumps(differ))
"""


def test_a_device_beside_the_cpu_encodes_alike(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    done = run_program(_BESIDE)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found) == 5 * len(FORMATS) and not any(found.values()), found
