"""The names of the front door; `coatrt/__init__.py` reads this file, and imports each when it is first asked for."""

from .adapter.adapter import Adapter as Adapter
from .adapter.adapter import Evaluator as Evaluator
from .adapter.description import AdapterDescription as AdapterDescription
from .bundle import Bundle as Bundle
from .cli.progress import drawn_progress as drawn_progress
from .configs.config import QuantConfig as QuantConfig
from .data.registry import load_task as load_task
from .data.task_data import TaskData as TaskData
from .devices.environment import environment as environment
from .devices.probe import probe as probe
from .devices.profiles import DeviceProfile as DeviceProfile
from .devices.profiles import device_profile as device_profile
from .devices.profiles import device_profiles as device_profiles
from .engines.builders.engine_cache import EngineCache as EngineCache
from .engines.bundles.adapt import adapt as adapt
from .engines.bundles.build import build as build
from .engines.bundles.execute import execute as execute
from .engines.bundles.options import BundleOptions as BundleOptions
from .engines.bundles.prepare import prepare as prepare
from .engines.bundles.targets import BundleResult as BundleResult
from .engines.bundles.targets import Target as Target
from .engines.bundles.verify import verify as verify
from .engines.measure.bench import bench as bench
from .engines.measure.cpu_timings import time_cpu as time_cpu
from .engines.runtime.generate import Sampling as Sampling
from .engines.runtime.generate import encode_prompt as encode_prompt
from .engines.runtime.generate import generate as generate
from .engines.runtime.load import load_decoder as load_decoder
from .engines.runtime.lora_file import load_lora as load_lora
from .engines.runtime.options import RuntimeOptions as RuntimeOptions
from .engines.runtime.switch import SwitchingDecoder as SwitchingDecoder
from .errors import CoatError as CoatError
from .models.checkpoint import Checkpoint as Checkpoint
from .models.tokenizer import load_tokenizer as load_tokenizer
from .planning.plan import Plan as Plan
from .planning.plan import PlanRequest as PlanRequest
from .planning.planner import plan as plan
from .planning.planner import plan_fleet as plan_fleet
from .quantization.weight_format import WeightFormat as WeightFormat
from .reporting.write import report as report
from .searching.run import search as search
from .training.options import TrainOptions as TrainOptions
from .training.run import train as train

__version__: str
