"""Causal language models of `transformers`, from a folder, as models that a session can adapt.

    model, config = load_causal_lm(folder, load_adapt("configs/adapt/causal_lm.yaml"))
    Session(model, config).observe(tokens)

What they carry along a stream is their key-value cache. It holds at most `context` tokens; where it is full it is made
anew from the last `overlap` of them, which are read again, and positions start at zero: the context does not slide, it
jumps, at the same tokens for any split of the stream. Frozen, the logits are the model's own, bit for bit.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from metamem.config import AdaptConfig, GroupConfig, UserError, load_as
from metamem.config.check import check_hierarchy
from metamem.config.overrides import Override
from metamem.low_rank import add_low_rank
from metamem.memory.base import Out
from metamem.out_of_memory import is_out_of_memory
from metamem.state import State, Stateful

PREFIX = "lm"  # where the model is in what a session reads with
LEAST_VOCABULARY = 256  # without a tokenizer, tokens are bytes
UNKNOWN_CONTEXT = 1024
CACHES = "cache", "past_key_values"  # what transformers call it, now and before 5.24


class CausalLM(Stateful):
    """A causal language model that reads at most `context` tokens at a time; the state is its cache and their ids."""

    def __init__(self, lm: nn.Module, context: int, overlap: int = 0) -> None:
        super().__init__()
        if not 0 <= overlap < context:
            raise UserError(f"an overlap of {overlap} tokens leaves none to read in a context of {context}; lower it")
        self.lm, self.context, self.overlap = lm, context, overlap
        self.dim_in = None
        takes = inspect.signature(lm.forward).parameters
        self.cache = next((name for name in CACHES if name in takes), None)
        refused = UserError(f"{type(lm).__name__}: carries no key-value cache, and only those can be a session's state")
        if self.cache is None:
            raise refused
        with torch.no_grad():
            logits, layers = self._run(torch.zeros(1, 1, dtype=torch.long, device=self.device), None)
        if not layers or not all(_is_plain(layer) for layer in layers):
            raise refused
        self.dim_out: int = logits.shape[-1]
        self.layers = [(layer.keys[:, :, :0], layer.values[:, :, :0]) for layer in layers]

    def init_state(self, batch: int) -> State:
        """No token read: every axis of tokens is empty, and grows up to the context."""
        empty = {
            name: {str(i): layer[which].to(self.device).repeat(batch, 1, 1, 1) for i, layer in enumerate(self.layers)}
            for which, name in enumerate(("keys", "values"))
        }
        return {"tokens": torch.zeros(batch, 0, dtype=torch.long, device=self.device), **empty}

    def forward(self, x: Int[Tensor, "batch time"], state: State | None = None) -> Out:
        """The logits [batch, time, vocabulary] of the tokens after each, and the cache."""
        state = self.init_state(x.shape[0]) if state is None else state
        logits, start = [], 0
        while start < x.shape[1]:
            if state["tokens"].shape[1] >= self.context:
                anew = state["tokens"][:, self.context - self.overlap :]
                state = {**self.init_state(x.shape[0]), "tokens": anew}
            part = x[:, start : start + self.context - state["tokens"].shape[1]]
            tokens = torch.cat([state["tokens"], part], 1)
            found, layers = self._run(tokens[:, state["keys"]["0"].shape[2] :], state)
            logits.append(found[:, -part.shape[1] :])
            state = {
                "tokens": tokens,
                "keys": {str(i): layer.keys for i, layer in enumerate(layers)},
                "values": {str(i): layer.values for i, layer in enumerate(layers)},
            }
            start += part.shape[1]
        y = torch.cat(logits, 1) if logits else torch.zeros(*x.shape, self.dim_out, device=self.device)
        return Out(y, state, {})

    def _run(self, tokens: Tensor, state: State | None) -> tuple[Tensor, Sequence[Any]]:
        """Logits, and the layers of the cache, to which the model adds in place."""
        cached = None
        if state is not None and state["keys"]["0"].shape[2]:
            cached = list(zip(state["keys"].values(), state["values"].values(), strict=True))
        cache = _transformers().DynamicCache(cached)
        logits = self.lm(input_ids=tokens, use_cache=True, **{str(self.cache): cache}).logits
        return logits, cache.layers


def _is_plain(layer: Any) -> bool:
    """Whether a layer of a cache, after one token, is keys and values of all tokens, and nothing else."""
    keys = getattr(layer, "keys", None)
    return isinstance(keys, Tensor) and keys.ndim == 4 and keys.shape[2] == 1 and not layer.is_sliding


def load_adapt(path: Path | str, overrides: Sequence[str | Override] = ()) -> AdaptConfig:
    """How a model adapts, from a YAML file (`configs/adapt/`); ConfigError for what is wrong with it."""
    config: AdaptConfig = load_as(AdaptConfig, path, overrides)
    check_hierarchy(config.hierarchy)
    for level in config.hierarchy.levels:
        if level.clock != "inner":
            raise (level.where / "clock").error(f"{level.clock!r} is not for this model: its levels are inner")
    return config


def load_causal_lm(folder: Path, config: AdaptConfig) -> tuple[CausalLM, AdaptConfig]:
    """The model in a folder that `save_pretrained` of transformers wrote, and the config over the names in it. Nothing
    is fetched. Raises UserError where there is none, or transformers is not installed."""
    transformers = _transformers()
    try:
        # Weights in the older format are pickles.
        lm = transformers.AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    except Exception as error:  # whatever transformers makes of a damaged folder
        if is_out_of_memory(error):
            raise
        raise UserError(f"{folder}: no causal language model that transformers can load: {error}") from None
    return causal_lm(lm, config)


def causal_lm(lm: nn.Module, config: AdaptConfig) -> tuple[CausalLM, AdaptConfig]:
    """A model of transformers that is there already, in evaluation mode, with its low-rank deltas; and the config."""
    lm.eval()
    if config.adaptation.low_rank is not None:
        add_low_rank(lm, config.adaptation.low_rank, config.seed)
    context = config.context or getattr(lm.config, "max_position_embeddings", None) or UNKNOWN_CONTEXT
    groups = {name: _prefixed(group) for name, group in config.hierarchy.groups.items()}
    return CausalLM(lm, context, config.overlap), replace(config, hierarchy=replace(config.hierarchy, groups=groups))


def _prefixed(group: GroupConfig) -> GroupConfig:
    return replace(group, match=[f"{PREFIX}.{glob}" for glob in group.match])


def is_causal_lm(folder: Path) -> bool:
    """Whether a folder holds a model of transformers."""
    return "model_type" in _described(folder)


def is_hub_network(folder: Path) -> bool:
    """Whether a folder holds a network that `metamem.hub` saved."""
    return "run" in _described(folder)


def _described(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def load_tokenizer(folder: Path, vocabulary: int) -> Any | None:
    """The tokenizer of a folder; None where it has none, and tokens are bytes. UserError where those are too many."""
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        try:
            return _transformers().AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # whatever transformers makes of a damaged folder
            raise UserError(f"{folder}: no tokenizer that transformers can load: {error}") from None
    if vocabulary < LEAST_VOCABULARY:
        raise UserError(f"{folder}: it has no tokenizer, and a vocabulary of {vocabulary} has no token for every byte")
    return None


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ImportError:
        raise UserError('transformers is not installed: pip install "metamem-torch[hf]"') from None
