"""Meta-training: `train(config)`, its run folders and checkpoints."""

from metamem.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from metamem.training.divergence import Diverged
from metamem.training.lock import RunHeld
from metamem.training.loop import Progress, Trained, build_task, load_run, resume, train
from metamem.training.run_folder import create_run, run_config

__all__ = [
    "train",
    "resume",
    "load_run",
    "build_task",
    "Trained",
    "Progress",
    "Diverged",
    "RunHeld",
    "save_checkpoint",
    "load_checkpoint",
    "CheckpointError",
    "create_run",
    "run_config",
]
