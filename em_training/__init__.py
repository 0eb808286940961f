"""What every training loop shares, and no loop: checkpoints, EMA, seeding, run log, strict configuration."""

from em_training.allocation import keep_freed_memory
from em_training.best_weights import BestWeights, read_best, save_best
from em_training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from em_training.compilation import Compilation
from em_training.config import (
    changed_fields,
    config_from_dict,
    config_from_json,
    config_to_json,
    load_config,
    refuse_other_data,
    refuse_other_run,
    save_config,
    write_text_atomically,
)
from em_training.ema import EMA
from em_training.memory import MicroBatching, is_out_of_memory, run_in_parts
from em_training.posthoc_ema import PosthocEMA
from em_training.precision import (
    create_accelerator,
    create_process_state,
    default_precision,
    leave_processes,
    scaler_state,
    step_optimizer,
    use_cpu,
)
from em_training.prefetch import Prefetcher
from em_training.run import (
    NonFiniteLossError,
    TrainingInterrupted,
    TrainingRun,
    lock_folder,
    read_stats,
)
from em_training.seeding import make_generator, seed_for

__all__ = [
    "EMA",
    "BestWeights",
    "Compilation",
    "MicroBatching",
    "NonFiniteLossError",
    "PosthocEMA",
    "Prefetcher",
    "TrainingInterrupted",
    "TrainingRun",
    "changed_fields",
    "config_from_dict",
    "config_from_json",
    "config_to_json",
    "create_accelerator",
    "create_process_state",
    "default_precision",
    "is_out_of_memory",
    "keep_freed_memory",
    "leave_processes",
    "list_checkpoints",
    "load_checkpoint",
    "load_config",
    "lock_folder",
    "make_generator",
    "read_best",
    "read_stats",
    "refuse_other_data",
    "refuse_other_run",
    "run_in_parts",
    "save_best",
    "save_checkpoint",
    "save_config",
    "scaler_state",
    "seed_for",
    "step_optimizer",
    "use_cpu",
    "write_text_atomically",
]
