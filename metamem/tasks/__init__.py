"""Tasks: what a model is trained on, and what it is streamed. Importing this package registers them by name.

A task is built from the config's `task:` section (`name` picks it, the other keys are its constructor's arguments):

    task = English(train=("web",), stream=("tyn", "wyc"))
    inputs, targets = task.sample(torch.Generator().manual_seed(0), batch=16, length=512)
    for name, text in task.streams().items(): ...

A target of `IGNORE` (−100), or one of numbers with a nan among them, is not asked: losses are means over the positions
that are. A task that can be evaluated has

    task.evaluate(lambda inputs, targets: model(inputs).y, length=512)  # {"accuracy/pairs-8": 0.93, ...}

A task that is several, one after the other along the outer steps, says which one a step trains (steps count from 1,
tasks from 0), and draws from the one that it is told. Where two steps are of different tasks lies a boundary, at which
levels on the clock `task` fire.

    task.task_at(step)                                            # 0, 0, 0, 1, 1, 1, ...
    task.sample(generator, batch, length, task=task.task_at(step))

It is evaluated at each boundary too, and before the first step; and may say what all evaluations come to:

    task.summarise({0: {...}, 200: {...}, 400: {...}})            # {"backward_transfer": -0.4, ...}

A task whose data have an end says in how many outer steps as much is read, for levels on the clock `epoch`:

    task.steps_per_epoch(batch=16, length=512)
"""

from metamem.targets import IGNORE, accuracy
from metamem.tasks.adding import Adding
from metamem.tasks.argmax import Argmax
from metamem.tasks.associative_recall import AssociativeRecall
from metamem.tasks.continual import Continual
from metamem.tasks.copy import Copy
from metamem.tasks.dictionary import Dictionary
from metamem.tasks.drift import Drift
from metamem.tasks.english import English
from metamem.tasks.graph import Graph
from metamem.tasks.repeat_copy import RepeatCopy
from metamem.tasks.sort import Sort
from metamem.tasks.stories import Stories
from metamem.tasks.text import TaskError, load_text, respell, sample_windows, split_text, to_bytes
from metamem.tasks.two_clock import TwoClock

__all__ = [
    "IGNORE",
    "Adding",
    "Argmax",
    "AssociativeRecall",
    "Continual",
    "Copy",
    "Dictionary",
    "Drift",
    "English",
    "Graph",
    "RepeatCopy",
    "Sort",
    "Stories",
    "TaskError",
    "TwoClock",
    "accuracy",
    "load_text",
    "respell",
    "sample_windows",
    "split_text",
    "to_bytes",
]
