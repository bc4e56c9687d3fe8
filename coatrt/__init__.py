"""coatrt: one language model on many unlike NVIDIA GPUs, each with its own precision map and a LoRA fitted to it.

Everything the command line does is a name here. Each is imported when it is first asked for: `import coatrt` itself
costs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PLACES = {
    "adapter.adapter": ("Adapter",),
    "adapter.description": ("AdapterDescription",),
    "adapter.evaluator": ("Evaluator",),
    "bundle": ("Bundle",),
    "cli.progress": ("drawn_progress",),
    "configs.config": ("QuantConfig",),
    "data.registry": ("load_task",),
    "data.task_data": ("TaskData",),
    "devices.environment": ("environment",),
    "devices.probe": ("probe",),
    "devices.profiles": ("DeviceProfile", "device_profile", "device_profiles"),
    "engines.builders.engine_cache": ("EngineCache",),
    "engines.bundles.adapt": ("adapt",),
    "engines.bundles.build": ("build",),
    "engines.bundles.execute": ("execute",),
    "engines.bundles.options": ("BundleOptions",),
    "engines.bundles.prepare": ("prepare",),
    "engines.bundles.targets": ("BundleResult", "Target"),
    "engines.bundles.verify": ("verify",),
    "engines.measure.bench": ("bench",),
    "engines.measure.cpu_timings": ("time_cpu",),
    "engines.runtime.emitter": ("load_lora",),
    "engines.runtime.generate": ("Sampling", "encode_prompt", "generate"),
    "engines.runtime.load": ("load_decoder",),
    "engines.runtime.options": ("RuntimeOptions",),
    "engines.runtime.switch": ("SwitchingDecoder",),
    "errors": ("CoatError",),
    "models.checkpoint": ("Checkpoint", "load_tokenizer"),
    "planning.plan": ("Plan", "PlanRequest"),
    "planning.planner": ("plan", "plan_fleet"),
    "quantization.weight_format": ("WeightFormat",),
    "reporting.write": ("report",),
    "searching.run": ("search",),
    "training.options": ("TrainOptions",),
    "training.run": ("train",),
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}

__all__ = ["__version__", *_MODULES]

if TYPE_CHECKING:  # the same names, for type checkers
    from coatrt.adapter.adapter import Adapter as Adapter
    from coatrt.adapter.description import AdapterDescription as AdapterDescription
    from coatrt.adapter.evaluator import Evaluator as Evaluator
    from coatrt.bundle import Bundle as Bundle
    from coatrt.cli.progress import drawn_progress as drawn_progress
    from coatrt.configs.config import QuantConfig as QuantConfig
    from coatrt.data.registry import load_task as load_task
    from coatrt.data.task_data import TaskData as TaskData
    from coatrt.devices.environment import environment as environment
    from coatrt.devices.probe import probe as probe
    from coatrt.devices.profiles import DeviceProfile as DeviceProfile
    from coatrt.devices.profiles import device_profile as device_profile
    from coatrt.devices.profiles import device_profiles as device_profiles
    from coatrt.engines.builders.engine_cache import EngineCache as EngineCache
    from coatrt.engines.bundles.adapt import adapt as adapt
    from coatrt.engines.bundles.build import build as build
    from coatrt.engines.bundles.execute import execute as execute
    from coatrt.engines.bundles.options import BundleOptions as BundleOptions
    from coatrt.engines.bundles.prepare import prepare as prepare
    from coatrt.engines.bundles.targets import BundleResult as BundleResult
    from coatrt.engines.bundles.targets import Target as Target
    from coatrt.engines.bundles.verify import verify as verify
    from coatrt.engines.measure.bench import bench as bench
    from coatrt.engines.measure.cpu_timings import time_cpu as time_cpu
    from coatrt.engines.runtime.emitter import load_lora as load_lora
    from coatrt.engines.runtime.generate import Sampling as Sampling
    from coatrt.engines.runtime.generate import encode_prompt as encode_prompt
    from coatrt.engines.runtime.generate import generate as generate
    from coatrt.engines.runtime.load import load_decoder as load_decoder
    from coatrt.engines.runtime.options import RuntimeOptions as RuntimeOptions
    from coatrt.engines.runtime.switch import SwitchingDecoder as SwitchingDecoder
    from coatrt.errors import CoatError as CoatError
    from coatrt.models.checkpoint import Checkpoint as Checkpoint
    from coatrt.models.checkpoint import load_tokenizer as load_tokenizer
    from coatrt.planning.plan import Plan as Plan
    from coatrt.planning.plan import PlanRequest as PlanRequest
    from coatrt.planning.planner import plan as plan
    from coatrt.planning.planner import plan_fleet as plan_fleet
    from coatrt.quantization.weight_format import WeightFormat as WeightFormat
    from coatrt.reporting.write import report as report
    from coatrt.searching.run import search as search
    from coatrt.training.options import TrainOptions as TrainOptions
    from coatrt.training.run import train as train


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'coatrt' has no attribute {name!r}")
    return getattr(import_module(f"coatrt.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
