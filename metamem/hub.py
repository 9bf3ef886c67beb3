"""Metamem's own models in the folders of `huggingface_hub`: weights as safetensors, the run's config beside them.

    HubNetwork.of(model, config).save_pretrained(folder)
    network = HubNetwork.from_pretrained(folder).network

Needs the extra `hf`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from metamem.config import Config, UserError, load_config, to_yaml
from metamem.memory.base import Out
from metamem.network import Network, build
from metamem.state import State, Stateful

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError:
    raise UserError('huggingface_hub is not installed: pip install "metamem-torch[hf]"') from None


class HubNetwork(Stateful, PyTorchModelHubMixin):
    """A network and the config that built it, as the YAML of a run."""

    def __init__(self, run: str) -> None:
        super().__init__()
        self.config = _config(run)
        self.network: Network = build(self.config)

    @classmethod
    def of(cls, model: Network, config: Config) -> HubNetwork:
        """A trained model, to be saved: the weights are shared."""
        made = cls(run=to_yaml(config))
        made.network = model
        return made

    def init_state(self, batch: int) -> State:
        """The network's state before a stream's first token."""
        return self.network.init_state(batch)

    def forward(self, x: Any, state: State | None = None) -> Out:
        """The network's output for x [batch, time] or [batch, time, dim], and its state after."""
        return self.network(x, state)


def _config(run: str) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(run)
        return load_config(path)
