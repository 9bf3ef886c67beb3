"""The config as dataclasses: what a YAML file may say, its types, ranges and defaults.

A config names a task, a network (a graph of modules), and a hierarchy of losses (what learns, from which loss, how
fast). All dataclasses are frozen, and each knows the file and line that it came from (`where`).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast

from metamem.config.convert import DOTTED, ONE_OR_MORE, ByName, Range, key_of, schema_fields
from metamem.config.errors import Where
from metamem.config.plain import is_mapping

Clock = Literal["token", "inner", "step", "epoch", "task"]
CLOCKS: tuple[Clock, ...] = ("token", "inner", "step", "epoch", "task")  # fast to slow
OUTER_CLOCKS: tuple[Clock, ...] = ("step", "epoch", "task")  # of the levels that own slow weights

Count = Annotated[int, Range(low=1)]
Whole = Annotated[int, Range(low=0)]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(low=0)]
Rate = Annotated[float, Range(low=0, high=1e38)]  # what float32 holds
Fraction = Annotated[float, Range(low=0, below=1)]
Learned = Literal["learned"]
DottedPath = Annotated[str, DOTTED]


@dataclass(frozen=True, kw_only=True)
class Located:
    """A part of a config that knows where it was written."""

    where: Where = field(default_factory=Where, compare=False, repr=False)


@dataclass(frozen=True)
class ConnectionConfig(Located):
    """An edge of a graph: the sources, joined `by` feed, concat, sum, gate or moe, go to a module, `out` or a junction.

    A mixture of experts (`moe`) gates its sources by `input`, a module or junction (null: by the sources themselves),
    all of them or the `k` of the largest gates.
    """

    source: Annotated[list[str], ONE_OR_MORE] = field(metadata={"key": "from"})
    to: str
    by: Literal["feed", "concat", "sum", "gate", "moe"] = "feed"
    input: str | None = None
    k: Count | None = None

    @property
    def needs(self) -> list[str]:
        """What has to be there before it: the sources, and what gates them."""
        return [*self.source, self.input] if self.input else self.source


@dataclass(frozen=True)
class NetworkConfig(Located):
    """A graph of modules. A module is its `kind` and that kind's options (see `metamem.registry.MODULES`)."""

    modules: dict[str, dict[str, Any]]
    connections: list[ConnectionConfig]


@dataclass(frozen=True)
class GroupConfig(Located):
    """Parameters that a level can address: globs over their names, and whose weights they are."""

    match: Annotated[list[str], ONE_OR_MORE]
    scope: Literal["sample", "stream", "meta"] = "meta"


@dataclass(frozen=True)
class RuleConfig(Located):
    """The update rule of a fast level: `S = momentum S - lr (in x signal)`, `D = (1 - forget) D + S`.

    A `signal` of your own is the path of a function. A learned `lr` lies in (0, `lr_max`); learned gates are functions
    of the token, or static numbers. The steps of a linear memory may be implicit or normalized. A step descends on the
    objective of the last `window` tokens. At the boundary of a period above 1 it may be `step` times a `transform` of
    S, be pulled by `retention` (dotted path: weight), and keep the length of each column of W (`weight_norm`).
    """

    signal: Literal["backprop", "predicted_targets", "hebbian"] | DottedPath = "backprop"
    lr: NonNegative | Learned = "learned"
    lr_max: Positive = 1.0
    momentum: Fraction | Learned = 0.0
    forget: Fraction | Learned = 0.0
    forget_to: Literal["init", "zero"] = "init"
    gates: Literal["token", "static"] = "token"
    forget_start: Annotated[float, Range(above=0, below=1)] = 0.01
    reduction: Literal["sum", "mean"] = "sum"
    step_rule: Literal["explicit", "implicit", "normalized"] = "explicit"
    window: Count = 1
    transform: Literal["none", "sign", "clip", "rmsprop", "adam", "muon"] = "none"
    step: Positive = 1.0
    retention: dict[str, float] = field(default_factory=dict[str, float])
    weight_norm: bool = False


@dataclass(frozen=True)
class OptimizerConfig(Located):
    """The optimizer of an `inner` or an outer level. `momentum` is sgd's; `betas` are those of adam and adamw.

    `weight_decay` is towards zero; that of an inner level may be towards the slow weights (`decay_to: init`): what it
    learned fades, and however long a stream, it stays near them.

    The learned rate of an inner level is one per `lr_per`, starts at `lr_initial`, and stays positive or may take any
    sign.
    """

    name: Literal["sgd", "adam", "adamw"]
    lr: Rate | Learned
    momentum: Fraction = 0.0
    weight_decay: NonNegative = 0.0
    decay_to: Literal["zero", "init"] = "zero"
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    lr_per: Literal["level", "group", "tensor", "row", "element"] = "tensor"
    lr_sign: Literal["positive", "any"] = "positive"
    lr_initial: Positive = 0.03


@dataclass(frozen=True)
class LevelConfig(Located):
    """One timescale: which groups learn, from which objectives (dotted path: weight), by which rule, how often.

    The outer gradient is cut after every `unroll`-th inner update (null: never); 0 keeps an inner level out of
    meta-training, for inference only.
    """

    name: str
    clock: Clock
    objective: dict[str, float]
    groups: list[str]
    period: Count = 1
    rule: RuleConfig | None = None
    optimizer: OptimizerConfig | None = None
    unroll: Whole | None = None

    @property
    def speed(self) -> tuple[int, int]:
        """What levels are ordered by, fast to slow: the clock, then the period."""
        return CLOCKS.index(self.clock), self.period

    @property
    def outer(self) -> bool:
        """Whether the level owns slow weights."""
        return self.clock in OUTER_CLOCKS

    @property
    def unseen(self) -> bool:
        """Whether no loss sees what an update's rate did: the cut comes right after it."""
        return self.unroll in (0, 1)


@dataclass(frozen=True)
class RouterConfig(Located):
    """The gates over parameter groups and levels that each write of a fast-weight memory is multiplied by.

    `kind`: a softmax over levels (`dense`), its `k` largest (`topk`), steps (`binary`), a table (`fixed`), or `static`,
    a dense one without an input. `input`: what its logits come from, each `token`, the `chunk` before, or nothing.
    `over`: the groups of the memories that have one (null: all that token levels name). `granularity`: what it tells
    apart, `blocks` of columns in each layer of each head the finest. `hold`: one more choice, to write nothing.
    `table`: level -> gate, or one for each group; levels that it leaves out are closed.
    """

    kind: Literal["dense", "topk", "binary", "static", "fixed"]
    over: Annotated[list[str], ONE_OR_MORE] | None = None
    input: Literal["token", "chunk", "static"] | None = None
    granularity: Literal["layer", "head", "block"] = "layer"
    blocks: Count | None = None
    k: Count | None = None
    hold: bool | None = None
    table: dict[str, NonNegative | list[NonNegative]] | None = None

    @property
    def gating(self) -> str:
        """The function that makes gates of logits: `static` is dense."""
        return "dense" if self.kind == "static" else self.kind

    @property
    def source(self) -> str:
        """What the logits come from."""
        return "static" if self.kind in ("static", "fixed") else self.input or "token"

    @property
    def holds(self) -> bool:
        """Whether to write nothing is a choice of its own."""
        return self.gating in ("dense", "topk") and self.hold is not False


@dataclass(frozen=True)
class HierarchyConfig(Located):
    """The levels, the parameter groups that they address, and a router between the levels of a memory.

    Levels are a list, fast to slow, which replaces that of a file it extends; or a mapping name -> level in any order,
    which merges with it by name, where null takes one out.
    """

    groups: dict[str, GroupConfig]
    levels: Annotated[list[LevelConfig], ByName(operator.attrgetter("speed"))]
    router: RouterConfig | None = None


@dataclass(frozen=True)
class RunTrainingConfig(Located):
    """What every training has: `steps` outer steps over a `batch` each, a schedule of the rates of its outer levels,
    checkpoints (all that going on exactly needs, every `checkpoint_every` steps, of the last `keep_last` of them), and
    `trackers` of its metrics, by name or as a mapping of names to their options.

    It runs on a kind of `device`. Where torchrun starts several processes, each has its share of the batch, on a device
    of its own, and all weights and optimizer states (`ddp`) or its part of them (`fsdp`).
    """

    steps: Count
    batch: Count
    schedule: Literal["constant", "cosine"] = "constant"
    checkpoint_every: Count = 200
    keep_last: Count = 2
    trackers: list[str] | dict[str, Any] = field(default_factory=list[str])
    device: Literal["cpu", "cuda"] = "cpu"
    distributed: Literal["ddp", "fsdp"] = "ddp"
    threads: Count | None = None


@dataclass(frozen=True)
class TrainingConfig(RunTrainingConfig):
    """Meta-training: `steps` outer steps over `batch` sequences of `length` tokens.

    An epoch is `steps_per_epoch` outer steps (null: the task's own, where its data have an end). The outer gradient is
    cut every `unroll` tokens of a sequence (null: never); with `recompute`, what it flows through is computed anew in
    the backward pass instead of kept. The rates of the outer levels rise over `warmup` steps, then stay (`constant`) or
    fall to a twentieth (`cosine`). A task that can be evaluated is, every `evaluate_every` steps and at the end (null:
    never). All that going on exactly needs is kept every `checkpoint_every` steps, of the last `keep_last` of them; and
    of the evaluation with the lowest (`best_mode: min`) or highest (`max`) `best_metric`, whose weights are then the
    run's (null: the last ones are). Metrics go to `trackers` too: names, or names and their options.

    In `bfloat16` precision the network's products are computed in it by autocast; weights, fast ones too, states and
    losses stay in float32. It runs on a kind of `device`; where torchrun starts several processes, each has its share
    of the batch, and all weights and optimizer states (`distributed: ddp`) or its part of them (`fsdp`).
    """

    steps: Count = 2000
    batch: Count = 16
    length: Count = 512
    steps_per_epoch: Count | None = None
    unroll: Count | None = None
    recompute: bool = False
    warmup: Whole = 50
    schedule: Literal["constant", "cosine"] = "cosine"
    gradient_clip: Positive | None = 1.0
    log_every: Count = 20
    evaluate_every: Count | None = None
    best_metric: str | None = None
    best_mode: Literal["min", "max"] = "min"
    compile: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class LowRankConfig(Located):
    """Low-rank deltas on the matrices that the globs `match`: W + scale · B A, of `rank` rows A and columns B.

    B starts at zero, and the model is what it was. A delta's tensors are parameters of their own, which groups name by
    `**.low_rank.*`.
    """

    match: Annotated[list[str], ONE_OR_MORE]
    rank: Count = 4
    scale: Positive = 1.0


@dataclass(frozen=True)
class GuardsConfig(Located):
    """What a session refuses to learn; null switches a guard off. A refused update leaves its level as it was.

    `explosion`: the mean loss of the update's period, over a running estimate of half-life `half_life` updates. `step`
    and `drift`: the length of the update, and the distance from the slow weights after it, over the norm of those that
    move. `seconds`: what an update may take. After `patience` refusals in a row nothing learns for `rest` tokens, at
    the slow weights, and after each such fall for twice as many.
    """

    explosion: Annotated[float, Range(above=1)] | None = 3.0
    half_life: Count = 16
    step: Positive | None = 0.25
    drift: Positive | None = 1.0
    seconds: Positive | None = None
    patience: Count | None = 8
    rest: Count = 8192


@dataclass(frozen=True)
class FallbackConfig(Located):
    """When the model as trained runs beside the one that adapts, and takes over from it.

    It runs in every `probe`-th window, and from where the loss leaves its running estimate by `alarm` standard
    deviations of a window's sum; `wake` nats by which it is ahead in a window make its predictions count, `lead` nats
    in sum put the adapted weights back. Then both predict, each by what it has been worth, and `share` is how far the
    worth of one passes to the other at every token.
    """

    probe: Count = 16
    alarm: Positive = 5.0
    wake: NonNegative = 4.0
    lead: Positive = 100.0
    share: Annotated[float, Range(above=0, below=0.5)] = 1e-3


@dataclass(frozen=True)
class AdaptationConfig(Located):
    """Adaptation at inference: what a session may refuse, what it falls back to, low-rank deltas for it to move.

    Without `guards` a loss that is not finite is an error. `piece`: the most tokens that one gradient goes back.
    """

    guards: GuardsConfig | None = field(default_factory=GuardsConfig)
    fallback: FallbackConfig | None = field(default_factory=FallbackConfig)
    low_rank: LowRankConfig | None = None
    piece: Count = 1024


@dataclass(frozen=True, kw_only=True)
class AdaptConfig(Located):
    """How a model that was not trained here adapts: groups and inner levels over its own parameter names.

    Its context is at most `context` tokens (null: what the model says); where it is full, the next begins with the
    last `overlap` of it.
    """

    name: str
    hierarchy: HierarchyConfig
    adaptation: AdaptationConfig = field(default_factory=AdaptationConfig)
    context: Annotated[int, Range(low=2)] | None = None
    overlap: Whole = 0
    seed: Whole = 0
    vars: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class RunConfig(Located):
    """What every run has. `name` names its folder and defaults to the file's; `task` is a registered name and its
    options."""

    name: str
    task: dict[str, Any]
    hierarchy: HierarchyConfig
    training: RunTrainingConfig
    seed: Whole = 0
    vars: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def shape(self) -> Any:
        """What weights must agree on with the config that they are loaded under, as plain values."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """A network on sequences."""

    network: NetworkConfig
    training: TrainingConfig = field(default_factory=TrainingConfig)
    adaptation: AdaptationConfig = field(default_factory=AdaptationConfig)

    @property
    def shape(self) -> Any:
        """The network."""
        return to_dict(self.network)


def to_dict(node: Any) -> Any:
    """A config, or a part of one, as the plain mappings and lists that its YAML would hold."""
    if dataclasses.is_dataclass(node):
        return {key_of(item): to_dict(getattr(node, item.name)) for item in schema_fields(node)}
    if is_mapping(node):
        return {key: to_dict(value) for key, value in node.items()}
    return [to_dict(value) for value in cast(Sequence[Any], node)] if isinstance(node, list | tuple) else node
