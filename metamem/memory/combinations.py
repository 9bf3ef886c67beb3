"""Combinations: which settings of a fast-weight memory exclude each other, and the nearest that do not."""

from __future__ import annotations

from collections.abc import Sequence

from metamem.memory import delta_rule
from metamem.memory.level import SignalAt, TokenLevel
from metamem.memory.networks import ACTIVATIONS, NETWORKS


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
) -> None:
    """Raises ValueError, with the nearest valid setting, where settings exclude each other."""
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
        raise ValueError(f"swiglu has one hidden width, not {len(dims) - 2}; set hidden, or expansion, to one number")
    if residual_norm and dims[0] != dims[-1]:
        raise ValueError(
            f"residual_norm adds the key to what is recalled: d_key {dims[0]} and d_value {dims[-1]} differ"
        )
    names = [level.name for level in levels]
    if len(set(names)) < len(names):
        raise ValueError(f"levels need different names: {names}")
    linear = network in NETWORKS and len(dims) == 2 and not residual_norm
    if network not in NETWORKS:
        _check_module(network, dims, residual_norm, bias, levels)
    for level in levels:
        _check_period(level, chunk)
        _check_window(level, chunk, signal_at)
        if level.signal == "hebbian" and not linear:
            raise ValueError(
                f"level {level.name!r}: a hebbian signal, the value itself, has no place in a hidden layer or before a "
                f"norm; use predicted_targets, or set hidden to [] and residual_norm to false"
            )
    if signal_at != "chunk":
        _check_token_signals(linear, levels, chunk, signal_at)
    if writes == "in_turn":
        _check_in_turn(levels, signal_at)


def _check_module(
    network: str, dims: Sequence[int], residual_norm: bool, bias: bool, levels: Sequence[TokenLevel]
) -> None:
    for setting, given in (("hidden", len(dims) > 2), ("residual_norm", residual_norm), ("bias", bias)):
        if given:
            raise ValueError(f"{setting} is for {' and '.join(NETWORKS)}: {network} is what it is; leave {setting} out")
    for level in levels:
        if level.signal != "backprop":
            raise ValueError(
                f"level {level.name!r}: {level.signal} needs the layers of a network, and {network} is a module of "
                f"your own; set signal to 'backprop', or network to {' or '.join(NETWORKS)}"
            )


def _check_period(level: TokenLevel, chunk: int) -> None:
    if level.period > 1 and level.period % chunk and chunk % level.period:
        raise ValueError(
            f"level {level.name!r}: period {level.period} and chunk {chunk} do not divide one another; "
            f"the nearest period that does is {max(1, round(level.period / chunk)) * chunk}"
        )


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
            f"level {level.name!r}: with a window of {level.window}, the period must be 1 or the chunk, {chunk}, "
            f"not {level.period}"
        )


def _check_token_signals(linear: bool, levels: Sequence[TokenLevel], chunk: int, signal_at: SignalAt) -> None:
    if not linear:
        if signal_at == "decayed":
            raise ValueError(
                "signal_at 'decayed' is solved for linear memories; set it to 'token' with chunk 1, or hidden to []"
            )
        if chunk > 1:
            raise ValueError(
                "signal_at 'token' with a network that is not linear cannot run in parallel; "
                "set chunk to 1, signal_at to 'chunk', or hidden to [] and residual_norm to false"
            )
        return
    delta_rule.check(levels)


def _check_in_turn(levels: Sequence[TokenLevel], signal_at: SignalAt) -> None:
    if signal_at == "chunk":
        raise ValueError("writes 'in_turn' see one another, and signals of a chunk see none; set signal_at to 'token'")
    for level in levels:
        if level.has_momentum:
            raise ValueError(
                f"level {level.name!r}: writes 'in_turn' and momentum exclude each other; set momentum to 0"
            )
        if level.forgets and signal_at != "decayed":
            raise ValueError(
                f"level {level.name!r}: of writes 'in_turn' all but the first come after the token's decay; "
                f"set signal_at to 'decayed', so that all do"
            )
