"""Combinations: which settings of a fast-weight memory exclude each other, and the nearest that do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from metamem.config.schema import RouterConfig
from metamem.memory import delta_rule, step_rule
from metamem.memory.activations import ACTIVATIONS
from metamem.memory.level import SignalAt, TokenLevel
from metamem.memory.networks import NETWORKS
from metamem.memory.signals import name_of


def check(
    network: str,
    dims: Sequence[int],
    activation: str,
    residual_norm: bool,
    bias: bool,
    levels: Sequence[TokenLevel],
    chunk: int,
    signal_at: SignalAt,
    writes: str,
    widths: str = "hidden",
) -> None:
    """Raises ValueError, with the nearest valid setting, where settings exclude each other. `widths`: the setting that
    gives the widths between the first and the last of `dims`."""
    if not levels:
        raise ValueError("a fast-weight memory needs at least one level with clock 'token' that names its group")
    if network not in NETWORKS and "." not in network:
        raise ValueError(
            f"there is no memory network {network!r} ({', '.join(NETWORKS)}, or the dotted path of an nn.Module)"
        )
    if min(chunk, *dims) < 1:
        raise ValueError(f"chunk and all widths must be at least 1, not {chunk} and {list(dims)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"there is no activation {activation!r} ({', '.join(ACTIVATIONS)})")
    if network == "swiglu" and len(dims) != 3:
        width = dims[1] if len(dims) > 2 else 2 * dims[0]
        raise ValueError(
            f"swiglu has one hidden width, not {len(dims) - 2}; "
            f"set {widths} to [{width if widths == 'hidden' else width / dims[0]:g}], or network to mlp"
        )
    if residual_norm and dims[0] != dims[-1]:
        raise ValueError(
            f"residual_norm adds the key to what is recalled, and d_key {dims[0]} and d_value {dims[-1]} differ; "
            f"set d_value to {dims[0]}, or residual_norm to false"
        )
    names = [level.name for level in levels]
    if len(set(names)) < len(names):
        raise ValueError(f"levels need different names: {names}")
    if network not in NETWORKS:
        _check_module(network, {widths: len(dims) > 2, "residual_norm": residual_norm, "bias": bias}, levels)
    to_linear = _to_be_linear(network, dims, residual_norm, widths)
    for level in levels:
        _check_period(level, chunk)
        _check_window(level, chunk, signal_at)
        step_rule.check(level, to_linear)
        if level.signal == "hebbian" and to_linear:
            raise ValueError(
                f"level {level.name!r}: a hebbian signal, the value itself, has no place in a hidden layer or before a "
                f"norm; set signal to 'predicted_targets', or {to_linear}"
            )
    if signal_at != "chunk":
        _check_token_signals(to_linear, levels, chunk, signal_at)
    if writes == "in_turn":
        _check_in_turn(to_linear, levels, signal_at)


def check_router(router: RouterConfig, network: str) -> None:
    """Raises ConfigError for columns of a network whose matrices are not known."""
    if router.granularity == "block" and network not in NETWORKS:
        raise (router.where / "granularity").error(
            f"blocks are of the columns of {' and '.join(NETWORKS)}, and {network} is a module of your own; "
            f"set granularity to 'layer' and blocks to null"
        )


def _to_be_linear(network: str, dims: Sequence[int], residual_norm: bool, widths: str) -> str:
    """What to set so that a memory is linear; nothing where it is."""
    needed = {"network": ("mlp", network != "mlp"), widths: ("[]", len(dims) > 2)}
    needed["residual_norm"] = ("false", residual_norm)
    return " and ".join(f"{key} to {value}" for key, (value, given) in needed.items() if given)


def _check_module(network: str, settings: Mapping[str, bool], levels: Sequence[TokenLevel]) -> None:
    for setting, given in settings.items():
        if given:
            none = "[]" if setting in ("hidden", "expansion") else "false"
            raise ValueError(
                f"{setting} is for {' and '.join(NETWORKS)}, and {network} is what it is; set {setting} to {none}"
            )
    for level in levels:
        if level.signal != "backprop":
            raise ValueError(
                f"level {level.name!r}: {name_of(level.signal)} needs the layers of a network, and {network} is a "
                f"module of your own; set signal to 'backprop', or network to mlp"
            )


def _check_period(level: TokenLevel, chunk: int) -> None:
    if level.period > 1 and level.period % chunk and chunk % level.period:
        raise ValueError(
            f"level {level.name!r}: period {level.period} and chunk {chunk} do not divide one another; "
            f"set period to {_nearest_period(level.period, chunk)}"
        )


def _nearest_period(period: int, chunk: int) -> int:
    parts = [part for part in range(2, chunk) if chunk % part == 0]
    multiples = [chunk * max(1, period // chunk), chunk * (period // chunk + 1)]
    return min([*parts, *multiples], key=lambda valid: (abs(valid - period), -valid))


def _check_window(level: TokenLevel, chunk: int, signal_at: SignalAt) -> None:
    if level.window == 1:
        return
    if signal_at != "chunk":
        raise ValueError(
            f"level {level.name!r}: a window of {level.window} tokens has the signals of all of them at one set of "
            f"weights; set signal_at to 'chunk', or window to 1"
        )
    if level.period not in (1, chunk):
        raise ValueError(
            f"level {level.name!r}: a window of {level.window} goes with a period of 1 or of the chunk, {chunk}, "
            f"not {level.period}; set period to {chunk}, or window to 1"
        )
    if level.window < level.period:
        raise ValueError(
            f"level {level.name!r}: a window of {level.window} tokens would leave out some of each period of "
            f"{level.period}; set window to {level.period}, or window to 1"
        )


def _check_token_signals(to_linear: str, levels: Sequence[TokenLevel], chunk: int, signal_at: SignalAt) -> None:
    if to_linear:
        if signal_at == "decayed":
            raise ValueError(
                f"signal_at 'decayed' is solved for linear memories; "
                f"set signal_at to 'token' and chunk to 1, or {to_linear}"
            )
        if chunk > 1:
            raise ValueError(
                f"signal_at 'token' with a network that is not linear cannot run in parallel; "
                f"set chunk to 1, or signal_at to 'chunk', or {to_linear}"
            )
        return
    delta_rule.check(levels)


def _check_in_turn(to_linear: str, levels: Sequence[TokenLevel], signal_at: SignalAt) -> None:
    if to_linear:
        raise ValueError(f"writes 'in_turn' are solved for linear memories; set writes to 'together', or {to_linear}")
    if signal_at == "chunk":
        exact = "decayed" if any(level.period == 1 and level.forgets for level in levels) else "token"
        raise ValueError(
            f"writes 'in_turn' see one another, and signals of a chunk see none; "
            f"set signal_at to '{exact}', or writes to 'together'"
        )
    for level in levels:
        if level.period > 1:  # moves between tokens, never between the writes of one
            continue
        if level.has_momentum:
            raise ValueError(
                f"level {level.name!r}: writes 'in_turn' and momentum exclude each other; set momentum to 0, "
                f"or writes to 'together'"
            )
        if level.forgets and signal_at != "decayed":
            raise ValueError(
                f"level {level.name!r}: of writes 'in_turn' all but the first come after the token's decay; "
                f"set signal_at to 'decayed', or writes to 'together'"
            )
