"""What a folder holds that a session can adapt: a run, a network saved for the hub, a model of transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from metamem.adaptation.hugging_face import is_causal_lm, is_hub_network, load_adapt, load_causal_lm, load_tokenizer
from metamem.adaptation.stream import Bytes, Words
from metamem.config import AdaptConfig, Config, UserError, load_config
from metamem.low_rank import add_low_rank
from metamem.network import Network
from metamem.state import Stateful
from metamem.training.loop import load_run
from metamem.training.run_folder import CONFIG

Opened = tuple[Stateful, Config | AdaptConfig, Callable[..., Int[Tensor, "1 tokens"]]]
DEFAULT = "metamem:adapt/causal_lm.yaml"


def open_model(folder: Path, config: Path | None, overrides: Sequence[str]) -> Opened:
    """The model of a folder, the config that it adapts by, and what makes tokens of bytes."""
    if is_causal_lm(folder):
        adapted = load_adapt(DEFAULT if config is None else config, overrides)
        model, resolved = load_causal_lm(folder, adapted)
        tokenizer = load_tokenizer(folder, model.dim_out)
        return model, resolved, Bytes() if tokenizer is None else Words(tokenizer)
    if config is not None:
        raise UserError(f"--config {config}: is for a model of transformers; a run has its own: override its keys")
    network, run = _network(folder, overrides)
    if (settings := run.adaptation.low_rank) is not None:
        add_low_rank(network, settings, run.seed)  # those that it was trained with stay as they are
    return network, run, Bytes()


def _network(folder: Path, overrides: Sequence[str]) -> tuple[Network, Config]:
    if not (folder / CONFIG).is_file() and is_hub_network(folder):
        from metamem.hub import HubNetwork  # needs an extra

        if overrides:
            raise UserError(f"{overrides[0]}: {folder} holds its config as it is; override the keys of a run's folder")
        try:
            found = HubNetwork.from_pretrained(str(folder))
        except UserError:
            raise
        except Exception as error:  # whatever huggingface_hub makes of a damaged folder
            raise UserError(f"{folder}: no network that can be loaded: {error}") from None
        return found.network, found.config
    network, config = load_run(folder)
    return network, load_config(folder / CONFIG, overrides) if overrides else config
