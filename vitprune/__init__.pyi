from .budget.calibration import calibrate as calibrate
from .budget.calibration import scale_to_budget as scale_to_budget
from .budget.latency import budget_latency as budget_latency
from .budget.latency_measurement import measure_latency as measure_latency
from .budget.points import find_points as find_points
from .data.images import Images as Images
from .data.images import load_images as load_images
from .finetuning.finetune import finetune as finetune
from .finetuning.trainer import TrainerCallback as TrainerCallback
from .measure.compare import compare as compare
from .measure.throughput import describe_environment as describe_environment
from .measure.timing import Runner as Runner
from .measure.timing import time_in_turn as time_in_turn
from .models.checkpoint import load as load
from .models.checkpoint import load_processor as load_processor
from .models.checkpoint import save as save
from .models.families import Family as Family
from .models.families import register_family as register_family
from .models.module import pruning_of as pruning_of
from .models.points import points_of as points_of
from .models.points import set_budget as set_budget
from .models.prune import prune_ as prune_
from .models.prune import restore_ as restore_
from .models.trace import Trace as Trace
from .models.trace import trace as trace
from .recipe.schema import DataSpec as DataSpec
from .recipe.schema import EvaluateSpec as EvaluateSpec
from .recipe.schema import FinetuneSpec as FinetuneSpec
from .recipe.schema import PruningSpec as PruningSpec
from .recipe.schema import Recipe as Recipe
from .recipe.schema import SplitSpec as SplitSpec
from .recipe.schema import load_recipe as load_recipe
from .runs.apply import apply as apply
from .runs.plan import plan as plan
from .runs.show import show as show

__all__: list[str]
__version__: str
