"""Damages every file that metamem reads: one line says what is wrong with it, and nothing in it is ever run.

    python experiments/fuzz_files.py --cases 2000 --seeds 1

A reader is a way in which files come into metamem, with a folder of right files. Each case damages one file: nothing
left in it, cut off, bits flipped, bytes put in, another file in its place, a folder in its place, gone, not readable.
Survived is a case that was read or refused in one line, and left as it was what it would have been read into. Where a
file carries checksums, no damage is read. Then every file is replaced by pickles that would leave a mark, and Python's
own audit must see no unpickling at all.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent))

from experiments.file_damage import BYTES, DAMAGES, PLACES, WHOLE, put_right
from experiments.fuzz_configs import TEXT, limited, where_raised
from experiments.pickle_files import MARK, pickles, watched
from metamem import Session, UserError, load_config, load_run, load_state, save_state, train
from metamem.adaptation.opening import open_model
from metamem.adaptation.saved import carried
from metamem.analysis import Claim, open_study, plan_ablation, read_results, run_ablation, write_report
from metamem.analysis.ablation import PLAN
from metamem.analysis.results import RESULTS, Result
from metamem.episodes.schema import load_episodes
from metamem.episodes.tasks.glyphs import load as load_glyphs
from metamem.episodes.training import load_episodes_run, train_episodes
from metamem.out_of_memory import told_in_a_line
from metamem.state import flatten
from metamem.tasks import load_text
from metamem.training import load_checkpoint, resume
from metamem.training.run_folder import CHECKPOINT, CONFIG, METRICS

LINE = 1000  # characters that a line has at most

TOKENS = """
name: tokens
task: {name: english, path: text.txt}
network:
  modules:
    embed: {kind: embedding, size: 256, dim: 6}
    memory: {kind: fast_weights, dim: 6, heads: 2, chunk: 2}
    head: {kind: linear, dim_in: 6, dim_out: 256}
  connections: [{from: in, to: embed}, {from: embed, to: memory}, {from: memory, to: head}, {from: head, to: out}]
hierarchy:
  groups:
    memory: {match: "memory.init.**", scope: sample}
    head: {match: "head.**", scope: stream}
    all: {match: "**"}
  levels:
    - {name: surprise, clock: token, objective: {losses.recall.mse: 1.0}, rule: {}, groups: [memory]}
    - {name: stream, clock: inner, period: 2, unroll: 0, objective: {losses.outer.next_token: 1.0},
       optimizer: {name: adam, lr: 0.01}, groups: [head]}
    - {name: task, clock: step, objective: {losses.outer.next_token: 1.0}, optimizer: {name: adam, lr: 0.01},
       groups: [all]}
training: {steps: 1, batch: 2, length: 6, warmup: 0}
"""
EPISODES = """
name: episodes
task: {name: sinusoid, shots: 3, query: 3}
module: {kind: perceptron, widths: [1, 4, 1]}
hierarchy:
  groups: {all: {match: "**"}}
  levels:
    - {name: adapt, clock: inner, steps: 1, objective: {losses.recall.mse: 1.0}, groups: [all],
       optimizer: {name: sgd, lr: 0.01}}
    - {name: meta, clock: step, objective: {losses.recall.mse: 1.0}, groups: [all], optimizer: {name: adam, lr: 0.01}}
training: {steps: 2, batch: 2, evaluated_tasks: 2, evaluated_steps: [1], log_every: 1}
"""
ABLATION = "base: tokens.yaml\nseeds: [0]\ncells: {rates: {grid: {training.batch: [1, 2]}}}\n"


MODEL_FILES = ("lm/config.json", "lm/model.safetensors", "lm/tokenizer_config.json", "lm/pytorch_model.bin")


@dataclass(frozen=True)
class Reader:
    """A way in which files come in: `read`, of a folder, reads `files`, relative to it; `into`: what they would be read
    into, which a refusal must leave as it is; `writes`: the folder that reading them goes on to write, likewise."""

    name: str
    files: tuple[str, ...]
    read: Callable[[Path], Any]
    into: Callable[[], Mapping[str, Tensor]] = dict
    writes: str | None = None


def readers(folder: Path) -> list[Reader]:
    """All of them, with the files that they read in the folder, right ones."""
    make(folder)
    model, config = load_run(folder / "tokens")
    session = Session(model, config)
    session.observe(torch.randint(256, (1, 9), generator=torch.Generator().manual_seed(0)))

    def numbers() -> dict[str, Any]:
        held = {key: value for key, value in flatten(carried(session)).items() if value is not None}
        return {**model.state_dict(), **held, "position": torch.tensor(session.position)}

    def run(name: str) -> tuple[str, ...]:
        return f"{name}/{CONFIG}", f"{name}/{CHECKPOINT}"

    sweep, hub = f"sweep/{RESULTS}", tuple(f"hub/{name}" for name in ("config.json", "model.safetensors"))
    of_hub = [
        Reader("network of the hub", hub, lambda at: open_model(at / "hub", None, ())),
        Reader("model of transformers", MODEL_FILES, lambda at: open_model(at / "lm", None, ())),
    ]
    return [
        *(of_hub if has_hub() else ()),
        Reader("config", ("tokens.yaml",), lambda at: load_config(at / "tokens.yaml")),
        Reader("extended config", ("tokens.yaml",), lambda at: load_config(at / "more.yaml")),
        Reader("episodes' config", ("episodes.yaml",), lambda at: load_episodes(at / "episodes.yaml")),
        Reader("ablation", ("ablation.yaml", "tokens.yaml"), lambda at: plan_ablation(at / "ablation.yaml")),
        Reader("run", run("tokens"), lambda at: load_run(at / "tokens")),
        Reader("episodes' run", run("episodes"), lambda at: load_episodes_run(at / "episodes")),
        Reader(
            "weights",
            (f"tokens/{CHECKPOINT}",),
            lambda at: load_checkpoint(model, config, at / "tokens" / CHECKPOINT),
            numbers,
        ),
        Reader(
            "run gone on with",
            (*run("tokens"), f"tokens/{METRICS}", "tokens/checkpoints/step-1.safetensors"),
            lambda at: resume(at / "tokens", ["training.steps=2"]),
            writes="tokens",
        ),
        Reader("state", ("state",), lambda at: load_state(at / "state")),
        Reader("session", ("session",), lambda at: session.load(at / "session"), numbers),
        Reader("text", ("text.txt",), lambda at: load_text(at / "text.txt")),
        Reader("folder of texts", ("texts/a.txt", "texts/b.txt"), lambda at: load_text(at / "texts")),
        Reader("glyphs", ("glyphs.hex",), lambda at: load_glyphs(at / "glyphs.hex")),
        Reader("results", (sweep,), lambda at: read_results(at / "sweep")),
        Reader(
            "ablation gone on with",
            (sweep,),
            go_on,
        ),
        Reader("report of an ablation", (sweep, f"sweep/{PLAN}"), lambda at: write_report([at / "sweep"])),
        Reader("report of a run", (f"tokens/{CONFIG}", f"tokens/{METRICS}"), lambda at: write_report([at / "tokens"])),
    ]


def go_on(folder: Path) -> list[Result]:
    """Goes on with the ablation."""
    return run_ablation(plan_ablation(folder / "ablation.yaml"), folder / "sweep", launcher=Nowhere())


class Nowhere:
    """A launcher that runs no cell."""

    def run(self, cells: Iterator[Any], sweep: Any) -> Generator[Any]:
        """Says that each is done."""
        for cell in cells:
            done = Result(cell.name, cell.family, cell.factors, cell.overrides, cell.seed, cell.fingerprint, "done")
            yield [(cell, done)]


def make(folder: Path) -> None:
    """The right files."""
    folder.mkdir()
    texts = {
        "tokens.yaml": TOKENS.replace("text.txt", str(folder.absolute() / "text.txt")),
        "more.yaml": "extends: tokens.yaml\nseed: 3\n",
        "episodes.yaml": EPISODES,
        "ablation.yaml": ABLATION,
        "text.txt": TEXT * 40,
        "texts/a.txt": TEXT,
        "texts/b.txt": TEXT,
        "glyphs.hex": "".join(f"{code:04X}:{code * 7919 % 2**60 + 2**60:032X}\n" for code in range(40)),
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    train(load_config(folder / "tokens.yaml"), folder)
    train_episodes(load_episodes(folder / "episodes.yaml"), folder)
    model, config = load_run(folder / "tokens")
    session = Session(model, config)
    session.observe(torch.arange(9)[None])
    session.save(folder / "session")
    save_state({"a": torch.arange(5.0), "b": {"c": torch.ones(2, 3), "d": {}}}, folder / "state", {"kind": "small"})
    go_on(folder)
    if has_hub():
        from transformers import GPT2Config, GPT2LMHeadModel

        from metamem.hub import HubNetwork

        HubNetwork.of(model, config).save_pretrained(folder / "hub")
        sizes = GPT2Config(
            vocab_size=256, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        GPT2LMHeadModel(sizes).save_pretrained(folder / "lm")
        (folder / "lm/tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
        (folder / "lm/pytorch_model.bin").write_bytes(b"the older format, which is never read")


def has_hub() -> bool:
    """Whether the extra `hf` is installed."""
    return importlib.util.find_spec("transformers") is not None


@dataclass(frozen=True)
class Found:
    """What came of a case; `trouble`: why it did not survive."""

    reader: str
    damage: str
    read: bool
    trouble: str = ""


def run_case(reader: Reader, folder: Path, random: Random) -> Found:
    """Damages one of a reader's files, reads, and puts it right again."""
    damage, path = random.choice(DAMAGES), folder / random.choice(reader.files)
    right, before = path.read_bytes(), {name: value.clone() for name, value in reader.into().items()}
    damaged = BYTES[damage](right, random) if damage in BYTES else None
    with restored(reader, folder, path) as files:
        if damaged is not None:
            path.write_bytes(damaged)
        else:
            PLACES[damage](path)
        read, trouble = attempt(reader, folder)
        left = files()
    after = reader.into()
    changed = [name for name in before if name not in after or not torch.equal(before[name], after[name])]
    if not read and (changed or left):
        trouble = trouble or f"refused, and changed {', '.join([*changed, *left])}"
    if (
        read
        and damage in WHOLE
        and damaged != right
        and path.suffix not in UNCHECKED
        and not needs_no_checksum(reader, path)
    ):
        trouble = "was read, though it has a checksum"
    return Found(reader.name, damage, read, trouble and f"{reader.name}, {path.name}, {damage}: {trouble}")


def needs_no_checksum(reader: Reader, path: Path) -> bool:
    """Whether it is the weights of a run that is gone on with, which its checkpoints have too; or those that others
    wrote, who have no checksum."""
    return (reader.writes is not None and path.name == CHECKPOINT) or path.name == "model.safetensors"


@contextmanager
def restored(reader: Reader, folder: Path, damaged: Path) -> Iterator[Callable[[], list[str]]]:
    """What is damaged within is put right after; gives what else of the folder that it writes has changed."""
    right = damaged.read_bytes()
    whole = None if reader.writes is None else folder / reader.writes
    there = {} if whole is None else {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}

    def changed() -> list[str]:
        others = (path for path in there if path != damaged)
        return [path.name for path in others if not path.is_file() or path.read_bytes() != there[path]]

    try:
        yield changed
    finally:
        put_right(damaged, right)
        for path in [] if whole is None else list(whole.rglob("*")):
            if path.is_file() and path not in there:
                path.unlink()
        for path, content in there.items():
            path.write_bytes(content)


UNCHECKED = (".yaml", ".jsonl", ".json", ".txt", ".hex", ".bin")  # what people write and read; or never read


def attempt(reader: Reader, folder: Path) -> tuple[bool, str]:
    """Whether it was read; and what is wrong with how it was refused."""
    try:
        with limited(), warnings.catch_warnings(), told_in_a_line():
            warnings.simplefilter("ignore")
            reader.read(folder)
    except UserError as error:
        told = str(error)
        fits = len(told.splitlines()) == 1 and len(told) <= LINE
        return False, "" if fits else f"not a line: {told[:LINE]!r}"
    except BaseException as error:
        return False, f"{type(error).__name__}: {error}: {where_raised(error)}"
    return True, ""


# Pickles


def run_pickle(reader: Reader, folder: Path, file: str, payload: bytes) -> str:
    """Why a pickle in a file's place is not survived: it was run, or read, or not refused in a line."""
    path = folder / file
    with restored(reader, folder, path), watched() as unpickled:
        path.write_bytes(payload)
        read, trouble = attempt(reader, folder)
    ran = [place for place in (Path(MARK), folder / MARK) if place.exists()]
    for place in ran:
        place.rmdir()
    if ran or unpickled:
        return f"{reader.name}, {file}: was run ({', '.join(unpickled) or 'the mark is there'})"
    anything = path.suffix in (".txt", ".bin") or path.name == "tokenizer_config.json"  # of which any JSON will do
    if read and not anything and not (reader.writes and path.name == CHECKPOINT):
        return f"{reader.name}, {file}: was read"
    return trouble and f"{reader.name}, {file}: {trouble}"


@contextmanager
def made() -> Iterator[tuple[list[Reader], Path]]:
    """All readers, in a temporary folder that is the current one."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        try:
            yield readers(Path("f")), Path("f")
        finally:
            os.chdir(before)


def campaign(count: int, seed: int) -> list[Found]:
    """`count` cases, the same number for each reader; what does not survive is printed at once."""
    with made() as (every, folder):
        found = []
        for number in range(count):
            reader = every[number % len(every)]
            found.append(run_case(reader, folder, Random(f"{seed} {number}")))
            if found[-1].trouble:
                print(found[-1].trouble, flush=True)
    return found


def pickle_campaign() -> tuple[int, list[str]]:
    """Every pickle in the place of every file of every reader: how many, and what was not survived."""
    with made() as (every, folder):
        tried = [
            run_pickle(reader, folder, file, payload)
            for reader in every
            for file in reader.files
            for payload in pickles().values()
        ]
    return len(tried), [trouble for trouble in tried if trouble]


def damaged(count: int, folder: Path, seed: int) -> tuple[int, int]:
    """A fault of experiments/reliability.py: how many damaged files were tried, and how many survived."""
    found = campaign(count, seed)
    return len(found), sum(not one.trouble for one in found)


def pickled(count: int, folder: Path, seed: int) -> tuple[int, int]:
    """The same of pickles in the places of files: all of them, whatever the count."""
    tried, run = pickle_campaign()
    print(*run, sep="\n", end="\n" if run else "")
    return tried, tried - len(run)


def summary(found: Sequence[Found]) -> str:
    """The counts of a campaign, in a line."""
    read, lost = sum(one.read for one in found), sum(bool(one.trouble) for one in found)
    return f"{len(found)} damaged files: {len(found) - read} refused, {read} read, {lost} not survived"


def main() -> int:
    def options(parser: ArgumentParser) -> None:
        parser.add_argument("--cases", type=int, default=2000, metavar="N", help="damaged files of a seed")

    study = open_study("fuzz_files", str(__doc__).partition("\n")[0], options=options)
    torch.set_num_threads(1)
    count = 160 if study.smoke else study.options.cases
    found = [one for seed in study.seeds for one in campaign(count, seed)]
    tried, run = pickle_campaign()
    rows = []
    for name in dict.fromkeys(one.reader for one in found):
        of = [one for one in found if one.reader == name]
        lost, read = sum(bool(one.trouble) for one in of), sum(one.read for one in of)
        rows.append([name, str(len(of)), str(len(of) - read), str(read), str(lost)])
        study.add(f"not survived: {name}", lost, "cases")
    study.table("damaged files", ["what reads them", "cases", "refused", "read", "not survived"], rows)
    print(*run, sep="\n")
    print(f"{summary(found)}; {tried} pickles in the place of files, {len(run)} not survived")
    study.add("damaged files", len(found), "cases")
    study.add("pickles", tried, "cases")
    lost = sum(bool(one.trouble) for one in found) + len(run)
    return study.verdict(
        [
            Claim("damaged files", len(found), count),
            Claim("pickles", tried, 100),
            Claim("not survived", lost, 0, at_most=True),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
