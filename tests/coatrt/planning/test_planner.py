"""What a planner promises: monotone budgets, legal formats, pins, plans that come back from JSON, clear refusals."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from coatrt.adapter.description import AdapterDescription
from coatrt.configs.space import ConfigSpace
from coatrt.devices.profiles import device_profile, device_profiles
from coatrt.errors import ConfigError, FormatError
from coatrt.planning import planner
from coatrt.planning.candidates import candidates, least_cost_by_size
from coatrt.planning.engine_size import engine_overhead, overhead_of_choices
from coatrt.planning.knapsack import cost_matrix
from coatrt.planning.latency import BANDWIDTH_SHARE, FLOPS_SHARE, KERNEL_SECONDS, DatasheetLatency, group_seconds
from coatrt.planning.measured_latency import MeasuredLatency, Product, Rest, find_timings, shape_of, timings_path
from coatrt.planning.memory import Workload, memory_of, scale_bytes
from coatrt.planning.pins import matched, pinned_costs
from coatrt.planning.plan import Plan, PlanRequest, read_choice
from coatrt.planning.plans_text import fleet_table
from coatrt.quantization.weight_format import WeightFormat
from coatrt.system.json_data import write_json
from support.knapsack import least_price

GPUS = [profile for profile in device_profiles() if profile.sm]
NAMES = st.sampled_from([profile.id for profile in GPUS])


@pytest.fixture(scope="module")
def adapter(tiny_adapter: Path) -> AdapterDescription:
    return AdapterDescription.load(tiny_adapter)


def workload(adapter: AdapterDescription, element: int = 2) -> Workload:
    return Workload.of(adapter, 64, 1, 16, element)


@settings(max_examples=60, deadline=None)
@given(name=NAMES, budgets=st.tuples(st.floats(0, 1), st.floats(0, 1)), speed=st.none() | st.floats(0, 1))
@example(name="dgx-spark", budgets=(0.0, 1.0), speed=1.0)  # the fastest takes more bytes than the best
def test_more_memory_never_gives_a_worse_loss_and_less_never_more_bytes(
    adapter: AdapterDescription, name: str, budgets: tuple[float, float], speed: float | None
) -> None:
    rich = planner.plan(adapter, device_profile(name))
    poor = planner.plan(adapter, device_profile(name), objective="latency", max_loss=1e9)
    least = min(point[0] for point in rich.front)
    assert rich.tokens_per_second is not None
    assert poor.tokens_per_second is not None
    floor = None
    if speed is not None:
        floor = 0.999 * (rich.tokens_per_second + speed * (poor.tokens_per_second - rich.tokens_per_second))
        least = max(least, poor.total_bytes)
    most = max(least, rich.total_bytes)
    low, high = (
        planner.plan(
            adapter,
            device_profile(name),
            memory=least + int(share * (most - least) + 1),
            min_tokens_per_second=floor,
        )
        for share in sorted(budgets)
    )
    assert low.predicted_loss_increase >= high.predicted_loss_increase
    assert low.total_bytes <= high.total_bytes
    for plan in (low, high):
        assert plan.limit_bytes is not None
        assert plan.total_bytes <= plan.limit_bytes
        assert all(device_profile(name).supports(fmt) for fmt in plan.config.formats.values())
        if floor is not None:
            assert plan.tokens_per_second is not None
            assert plan.tokens_per_second >= floor * (1 - 1e-9)


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from([profile.id for profile in device_profiles()]),
    objective=st.sampled_from(["quality", "balanced"]),
    bits=st.floats(4.6, 9),
    context=st.integers(1, 4096),
    batch=st.integers(1, 8),
)
def test_every_plan_comes_back_from_its_json(
    adapter: AdapterDescription,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    objective: Any,
    bits: float,
    context: int,
    batch: int,
) -> None:
    request = PlanRequest(objective, bits=bits, context=context, batch=batch, keep=(("down_proj", "int8"),))
    plan = planner.plan(adapter, device_profile(name), request)
    written = json.loads(json.dumps(plan.to_json()))
    again = Plan.from_json(written, adapter.model)
    assert again == plan
    assert again.text() == plan.text()
    replanned = planner.plan(adapter, device_profile(again.device), again.request)
    assert replanned.config.hash == written["configuration_hash"] == plan.config.hash
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    path.write_text(json.dumps(written))
    assert read_choice(path, adapter.model)[0] == plan.config
    path.write_text(json.dumps(written["configuration"]))
    assert read_choice(path, adapter.model)[0] == plan.config


def test_an_altered_plan_is_refused(adapter: AdapterDescription) -> None:
    written = planner.plan(adapter, device_profile("rtx-4090"), bits=5).to_json()
    name = next(iter(written["configuration"]["matrices"]))
    other = {**written["configuration"]["matrices"], name: "fp8"}
    with pytest.raises(ConfigError, match="has the hash"):
        Plan.from_json({**written, "configuration": {"matrices": other}}, adapter.model)
    with pytest.raises(ConfigError, match="garbled"):
        Plan.from_json({**written, "memory_bytes": 5}, adapter.model)
    with pytest.raises(ConfigError, match="garbled"):
        Plan.from_json({**written, "request": {"objective": "quality"}}, adapter.model)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.integers(2, 4))
def test_choices_by_size_are_the_best_of_their_size(seed: int, groups: int, formats: int) -> None:
    rng = np.random.default_rng(seed)
    sizes, cost = rng.integers(1, 50, (groups, formats)), rng.random((groups, formats))
    choices = least_cost_by_size(cost, sizes, bins=10_000)  # a step is a byte: exact
    rows = np.arange(groups)
    every = np.array(np.meshgrid(*[range(formats)] * groups)).reshape(groups, -1).T
    best: dict[int, float] = {}
    for row in every:
        size, loss = int(sizes[rows, row].sum()), float(cost[rows, row].sum())
        best[size] = min(best.get(size, np.inf), loss)
    found = {int(sizes[rows, row].sum()): float(cost[rows, row].sum()) for row in choices}
    assert found == pytest.approx(best)


def test_candidates_are_within_half_a_hundredth_of_the_optimum(adapter: AdapterDescription) -> None:
    cost = cost_matrix(adapter.space, adapter.sensitivity.costs)
    choices, rows = candidates(adapter.space, cost), np.arange(len(cost))
    sizes, loss = adapter.space.sizes[rows, choices].sum(1), cost[rows, choices].sum(1)
    for bits in (4.2, 5.0, 6.5):
        budget = bits * adapter.model.parameters / 8
        exact = least_price(cost, adapter.space.sizes.astype(float), budget)
        assert loss[sizes <= budget].min() <= exact * 1.005


def test_memory_lines_and_overheads_agree(adapter: AdapterDescription) -> None:
    rng, model = np.random.default_rng(0), adapter.model
    for name in ("t4", "rtx-5090", "cpu"):
        profile = device_profile(name)
        space = adapter.space.restrict([fmt for fmt in adapter.formats if profile.supports(fmt)])
        choices = rng.integers(len(space.formats), size=(20, len(space.groups))).astype(np.int16)
        many = overhead_of_choices(space, choices, profile.sm)
        for row, overhead in zip(choices, many, strict=True):
            config = space.config(row.astype(np.int64))
            assert engine_overhead(config, model, profile.sm) == overhead
            lines = memory_of(config, model, profile, workload(adapter))
            assert lines["weights"] + lines["scales"] == config.nbytes(model)
            assert lines["engine"] == overhead
    # int8 stores one fp16 scale per output channel
    assert scale_bytes(adapter.space.uniform("int8"), model) == 2 * sum(matrix.N for matrix in model.matrices)


def test_datasheet_seconds_are_bytes_or_flops_and_launches(adapter: AdapterDescription) -> None:
    profile = device_profile("rtx-3060")
    latency, fmt = DatasheetLatency(profile), WeightFormat.parse("int8")
    assert latency.matrix_seconds(4096, 4096, fmt, 1) == pytest.approx(
        (4096 * 4096 + 2 * 4096) / (360e9 * BANDWIDTH_SHARE) + KERNEL_SECONDS
    )
    assert latency.matrix_seconds(4096, 4096, fmt, 512) == pytest.approx(
        2 * 512 * 4096 * 4096 / (25.5e12 * FLOPS_SHARE) + KERNEL_SECONDS
    )
    nf = latency.matrix_seconds(4096, 4096, WeightFormat.parse("nf4-g64"), 1)
    assert nf > latency.matrix_seconds(4096, 4096, WeightFormat.parse("fp16"), 1)
    assert "assumed" in latency.source
    head = next(i for i, group in enumerate(adapter.space.groups) if group[0] == adapter.model.names[0])
    (table,) = (matrix for matrix in adapter.model.matrices if matrix.is_table)
    for rows in (1, 4096):  # the head has a row for each token decoded, as the others have
        of_head = group_seconds(adapter.space, latency, rows)[head]
        for seconds_of, fmt in zip(of_head, adapter.space.formats, strict=True):
            assert seconds_of == latency.matrix_seconds(table.N, table.K, fmt, rows)
    seconds = group_seconds(adapter.space, latency, 1)
    plan = planner.plan(adapter, profile, bits=5)
    columns = {fmt: i for i, fmt in enumerate(adapter.space.formats)}
    matrices = sum(seconds[i, columns[plan.config[group[0]]]] for i, group in enumerate(adapter.space.groups))
    rest = latency.rest_seconds(adapter.model, replace(Workload.of(adapter, 2048, 1, 512), lora_parameters=0), 1, 2048)
    assert plan.decode_seconds is not None
    assert plan.decode_seconds > matrices + rest  # and the LoRA
    quick, slow = (planner.plan(adapter, profile, bits=5, context=context).decode_seconds for context in (64, 4096))
    assert quick < slow  # type: ignore[operator]


def test_pins(adapter: AdapterDescription) -> None:
    plan = planner.plan(
        adapter, device_profile("rtx-4090"), bits=5, keep=(("lm_head", "fp8"), ("*layers.0.*v_proj", "int8"))
    )
    assert str(plan.config["model.embed_tokens"]) == "fp8"  # the head is tied to it
    assert {str(plan.config[f"model.layers.0.self_attn.{k}_proj"]) for k in "qkv"} == {"int8"}  # one kernel
    assert matched(adapter.model, "down_proj") == tuple(f"model.layers.{i}.mlp.down_proj" for i in range(2))
    for keep, error, said in (
        ((("nothing", "int8"),), ConfigError, "matches none"),
        ((("(q|k)_proj", "int8"),), ConfigError, "patterns are globs, not regular expressions"),
        ((("lm_head", "fp16"),), ConfigError, "the format must be one of"),
        ((("lm_head", "nvfp4"),), ConfigError, "for rtx-4090 and this adapter"),
        ((("lm_head", "int5"),), FormatError, "no weight format"),
        ((("q_proj", "int8"), ("k_proj", "fp8")), ConfigError, "give it one format"),
    ):
        with pytest.raises(error, match=said):
            planner.plan(adapter, device_profile("rtx-4090"), keep=keep)
    cost = cost_matrix(adapter.space, adapter.sensitivity.costs)
    assert pinned_costs(adapter.space, cost, (), device_profile("cpu")) is cost


def test_limits_say_what_would_do(adapter: AdapterDescription) -> None:
    profile = device_profile("rtx-4090")
    plan = planner.plan(adapter, profile)
    for asked, said in (
        ({"min_tokens_per_second": 1e9}, r"the most predicted is \d+\.\d; try --min-tokens-per-second"),
        ({"max_loss": 0.0}, "try --max-loss"),
        (
            {"memory": plan.total_bytes - 30_000, "max_loss": plan.predicted_loss_increase * 1.0001},
            r"keeps all limits \(memory, predicted loss .*\); change one: --memory \d+MiB or --max-loss",
        ),
        ({"bits": 1.0}, r"--bits must be at least 3\.5 on rtx-4090, got 1"),
        ({"memory": 513 << 20, "context": 8192}, "a lower --context"),
    ):
        with pytest.raises(ConfigError, match=said):
            planner.plan(adapter, profile, **asked)
    for wrong in ({"objective": "speed"}, {"bits": -1}, {"max_loss": -1.0}, {"min_tokens_per_second": 0.0}):
        with pytest.raises(ConfigError, match="must be"):
            planner.plan(adapter, profile, **wrong)
    with pytest.raises(ConfigError, match="coatrt devices calibrate"):
        planner.plan(adapter, device_profile("cpu"), min_tokens_per_second=1)
    tight = planner.plan(adapter, profile, memory=plan.total_bytes - 20_000)
    assert tight.binds == "memory"
    (step,) = tight.next_steps
    assert step.startswith("--memory")
    assert "predicted loss by -" in step
    balanced = planner.plan(adapter, profile, objective="balanced")
    fast = planner.plan(adapter, profile, objective="latency", max_loss=1e9)
    assert fast.decode_seconds <= balanced.decode_seconds <= plan.decode_seconds  # type: ignore[operator]
    assert plan.predicted_loss_increase <= balanced.predicted_loss_increase <= fast.predicted_loss_increase


def test_a_fleet_is_planned_as_its_devices_are(adapter: AdapterDescription) -> None:
    profiles = [device_profile(name) for name in ("t4", "rtx-3060", "rtx-5090", "cpu")]
    plans = planner.plan_fleet(adapter, profiles, PlanRequest(bits=6))
    assert plans == [planner.plan(adapter, profile, bits=6) for profile in profiles]
    lines = fleet_table(plans).splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [[plan.device, plan.config.hash] for plan in plans]


def test_fronts_have_no_dominated_points(adapter: AdapterDescription) -> None:
    front = planner.plan(adapter, device_profile("rtx-3060")).front
    assert len(front) > 5
    for size, seconds, loss in front:
        for other in front:
            assert seconds is not None
            assert other[1] is not None
            beats = other[0] < size and other[1] < seconds and other[2] < loss
            assert not beats


def test_timings_are_preferred_and_interpolate(adapter: AdapterDescription, tmp_path: Path) -> None:
    work, space = workload(adapter, 4), adapter.space
    shapes = {(m.K, m.N, str(fmt.effective(m.K))) for m in space.model.matrices for fmt in space.formats}
    products = tuple(
        Product(K, N, text, tokens, K * N * (1 + 0.1 * tokens) * (1e-9 if "int8" in text else 2e-9))
        for K, N, text in shapes
        for tokens in (1, 16)
    )
    rests = (Rest(shape_of(work), 1, 64, 1e-3), Rest(shape_of(work), 1, 128, 2e-3), Rest(shape_of(work), 16, 64, 4e-3))
    made = MeasuredLatency("cpu", "onnxruntime 1", {"threads": 2}, products, rests)
    assert find_timings(device_profile("cpu"), space, work) is None
    write_json(timings_path("cpu"), made, sealed=True)
    try:
        found = find_timings(device_profile("cpu"), space, work)
        assert found == made
        int8 = WeightFormat.parse("int8")
        assert made.matrix_seconds(64, 64, int8, 1) == pytest.approx(64 * 64 * 1.1e-9)
        assert made.matrix_seconds(64, 64, int8, 6) == pytest.approx(64 * 64 * 1.6e-9)
        assert made.matrix_seconds(64, 64, int8, 100) == pytest.approx(64 * 64 * 11e-9)
        assert made.rest_seconds(space.model, work, 1, 96) == pytest.approx(1.5e-3)
        plan = planner.plan(adapter, device_profile("cpu"), objective="latency", max_loss=1e9, context=64, prefill=16)
        assert plan.config.counts == {"int8": 15}  # the fastest here, though the largest
        assert plan.decode_seconds == pytest.approx(sum(m.N * m.K for m in space.model.matrices) * 1.1e-9 + 1e-3)
        assert "timings of cpu" in plan.text()
        assert not made.covers(ConfigSpace(space.model, (WeightFormat.parse("fp16"),)), work)
        with pytest.raises(ConfigError, match="no timings of a product"):
            made.matrix_seconds(5, 5, int8, 1)
        timings_path("cpu").write_text(timings_path("cpu").read_text().replace('"tokens": 16', '"tokens": 17', 1))
        with pytest.raises(ConfigError, match="altered or is damaged; measure again"):
            find_timings(device_profile("cpu"), space, work)
    finally:
        timings_path("cpu").unlink()
