"""Meta-learning around any `nn.Module`: an inner loop on a task's support set, an outer loop over tasks.

    level = EpisodeLevel({mse: 2.0}, steps=5, rates=0.01)               # what moves, from which loss, how often
    adapted = adapt(module, support, level)                             # fast parameters, [tasks, *shape]
    predictions = predict(module, adapted, query.inputs, level)         # the outer gradient flows through

- `level`       what an inner loop is given and gives back
- `unroll`      the inner loop itself
- `executors`   how the gradients of many tasks are computed: `batched` by hand, `vmapped`, `looped`
- `transforms`  inner optimizers as pairs `init / update`
- `rates`       rates: a number, or learned at any granularity; `gates`: masks and routers over them
- `engines`     who runs it: `functional`, `loop`, `torchopt`, `torchopt_meta`, `higher`, `implicit`
- `schema`      a config of all this and of the outer loop; `registry`: the tasks and modules that it can name
- `learner`     the module and rates of a config; `training`: the outer loop; `evaluation`: figures on new tasks
"""

from metamem.episodes.engines import ENGINES, adapt, predict
from metamem.episodes.gates import RateRouter
from metamem.episodes.level import Adapted, Batch, EngineError, Episode, EpisodeLevel, InnerOptimizer
from metamem.episodes.rates import Rates

__all__ = [
    "ENGINES",
    "Adapted",
    "Batch",
    "EngineError",
    "Episode",
    "EpisodeLevel",
    "InnerOptimizer",
    "RateRouter",
    "Rates",
    "adapt",
    "predict",
]
