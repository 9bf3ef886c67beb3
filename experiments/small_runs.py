"""Runs of a second, for what is done to many of them: a language model with a memory and two outer levels; MAML."""

from __future__ import annotations

from pathlib import Path

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
TEXT = "text.txt"
SENTENCE = "In the beginning was the word, and the word was with memory. "
SEQUENCES = """
name: sequences
task: {name: english, path: PATH}
network:
  modules:
    embed: {kind: embedding, size: 256, dim: 8}
    memory: {kind: fast_weights, dim: 8, heads: 2, chunk: 4}
    head: {kind: linear, dim_in: 8, dim_out: 256}
  connections: [{from: in, to: embed}, {from: embed, to: memory}, {from: memory, to: head}, {from: head, to: out}]
hierarchy:
  groups:
    memory: {match: "memory.init.**", scope: sample}
    head: {match: "head.**"}
    all: {match: "**"}
  levels:
    - {name: surprise, clock: token, objective: {losses.recall.mse: 1.0}, rule: {lr_max: 0.5}, groups: [memory]}
    - {name: task, clock: step, objective: {losses.outer.next_token: 1.0}, optimizer: {name: adamw, lr: 0.003},
       groups: [all]}
    - {name: slow, clock: step, period: 4, objective: {losses.outer.next_token: 1.0},
       optimizer: {name: sgd, lr: 0.1, momentum: 0.9}, groups: [head]}
training: {steps: 20, batch: 2, length: 16, warmup: 4, log_every: 1, checkpoint_every: 1}
"""
SMALL_EPISODES = (
    str(CONFIGS / "episodes/maml.yaml"),
    "training.steps=20",
    "training.batch=2",
    "training.evaluated_tasks=4",
    "training.evaluated_steps=[0, 1]",
    "training.evaluate_every=3",
    "training.log_every=1",
    "training.checkpoint_every=1",
)


def write_inputs(folder: Path) -> Path:
    """Writes a text and the config of a language model that reads it; gives the config's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TEXT).write_text(SENTENCE * 12)
    (folder / "sequences.yaml").write_text(SEQUENCES.replace("PATH", str(folder.resolve() / TEXT)))
    return folder / "sequences.yaml"
