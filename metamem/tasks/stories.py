"""Task `stories`: short stories in words and questions about them, of five of the kinds that Weston et al. 2015 define
(Towards AI-complete question answering, arXiv 1502.05698); the sentences are our own.

    one_fact     (task 1)    ann went to kitchen .  …  where is ann ?                    kitchen
    two_facts    (task 2)    … ben took ball .  ben went to garden .  where is ball ?    garden
    yes_no       (task 6)    ann went to kitchen .  …  is ann in garden ?                no
    counting     (task 7)    ben took ball .  ben dropped ball .  …  how many has ben ?  zero
    path         (task 19)   hall is east of kitchen .  …  from kitchen to garden ?      east north

A token is a word. The answer is asked at the `?`; of a path, which leads over one place, its second step at the `·`
after it. A story goes on after a question with more that is told and asked; where places lie is told before the first.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch

from metamem.config.errors import suggest
from metamem.registry import TASKS
from metamem.targets import IGNORE
from metamem.tasks.episodic import Episodes, Episodic, check_length, shuffler
from metamem.tasks.text import TaskError

ACTORS = ("ann", "ben", "eva", "tom")
PLACES = ("kitchen", "garden", "office", "hall", "bedroom", "cellar")
THINGS = ("ball", "book", "key", "milk")
NUMBERS = ("zero", "one", "two", "three", "four")
DIRECTIONS = {"north": (0, 1), "east": (1, 0), "south": (0, -1), "west": (-1, 0)}
OTHER = ("went", "to", "took", "dropped", "where", "is", "in", "how", "many", "has", "of", "from", "yes", "no")
WORDS = (*ACTORS, *PLACES, *THINGS, *NUMBERS, *DIRECTIONS, *OTHER, ".", "?", "·")
NUMBER = {word: index for index, word in enumerate(WORDS)}

Told = list[tuple[str, str | None]]  # a word, and the answer that is asked where it stands


@TASKS.register("stories")
class Stories(Episodic):
    """Questions about stories.

    Args:
        kinds: of story, one for each episode.
        facts: sentences before each question.
        length: words of an evaluation story.
        examples: stories of the evaluation set, for each kind.
        seed: of the evaluation set, which is the same for all models and at all times.

    Raises `TaskError` for a kind that there is not, and where a sequence is too short for a question.
    """

    vocabulary = len(WORDS)

    def __init__(
        self,
        *,
        kinds: tuple[str, ...] = ("one_fact", "two_facts", "yes_no", "counting", "path"),
        facts: int = 2,
        length: int = 64,
        examples: int = 128,
        seed: int = 0,
    ) -> None:
        for kind in kinds:
            if kind not in KINDS:
                raise TaskError(f"there is no kind of story {kind!r}{suggest(kind, KINDS)}")
        if not kinds or facts < 1:
            raise TaskError(f"name at least one kind, and facts of at least 1, not {list(kinds)} and {facts}")
        super().__init__({kind: kind for kind in kinds}, examples, seed)
        self.facts, self.length = facts, length
        self._check(length)

    def sample(self, generator: torch.Generator, batch: int, length: int) -> Episodes:
        """`batch` stories, each of a kind of its own: words, and targets at the questions."""
        self._check(length)
        numbers = shuffler(generator)
        return self._lay_out(numbers, [numbers.choice(list(self.settings)) for _ in range(batch)], length)

    def episodes(self, generator: torch.Generator, batch: int, setting: str) -> Episodes:
        """`batch` stories of one kind."""
        return self._lay_out(shuffler(generator), [setting] * batch, self.length)

    def _check(self, length: int) -> None:
        # Until the first question: a map of all places, or a few sentences of up to five words.
        path, other = 6 * (len(PLACES) - 1) + 6, 5 * max(2, self.facts) + 5
        needed = max(path if kind == "path" else other for kind in self.settings)
        check_length(needed, length, "a story with a question")

    def _lay_out(self, numbers: random.Random, kinds: Sequence[str], length: int) -> Episodes:
        inputs = torch.full((len(kinds), length), NUMBER["·"])
        targets = torch.full_like(inputs, IGNORE)
        for row, kind in enumerate(kinds):
            told = story(numbers, kind, self.facts, length)
            inputs[row, : len(told)] = torch.tensor([NUMBER[word] for word, _ in told])
            answers = [IGNORE if answer is None else NUMBER[answer] for _, answer in told]
            targets[row, : len(told)] = torch.tensor(answers)
        return inputs, targets

    def describe(self) -> str:
        """What a story holds and what is evaluated; one line each."""
        return (
            f"train: stories of {len(WORDS)} words, {self.facts} sentences before a question; kinds "
            f"{', '.join(self.settings)}\n"
            f"evaluation: {self.examples} stories of {self.length} words of each kind, seed {self.seed}"
        )


def story(numbers: random.Random, kind: str, facts: int, length: int) -> Told:
    """Sentences and questions about them, as many as go into `length` words."""
    told: Told = []
    world = World(numbers)
    if kind == "path":
        told += [plain for sentence in world.map() for plain in _plain(sentence)]
    while True:
        part: Told = []
        if kind != "path":
            act = world.move if kind in ("one_fact", "yes_no") else world.act
            part += [plain for _ in range(facts) for plain in _plain(act())]
        part += KINDS[kind](world)
        if len(told) + len(part) > length:
            return told
        told += part


class World:
    """Who is where and has what, as far as it was told; `numbers` decides what happens next."""

    def __init__(self, numbers: random.Random) -> None:
        self.numbers = numbers
        self.place: dict[str, str] = {}  # of an actor
        self.holder: dict[str, str] = {}  # of a thing that somebody has
        self.left: dict[str, str] = {}  # the place of a thing that was dropped
        self.handled: list[str] = []  # actors who took or dropped something
        self.grid: dict[str, tuple[int, int]] = {}

    def move(self) -> str:
        """Somebody goes somewhere else."""
        actor = self.numbers.choice(ACTORS)
        self.place[actor] = self.numbers.choice([place for place in PLACES if place != self.place.get(actor)])
        return f"{actor} went to {self.place[actor]} ."

    def act(self) -> str:
        """Somebody goes, takes or drops: each as likely, as far as somebody can; the first that can be taken is."""
        here = list(self.place)
        # What nobody has touched is wherever somebody finds it.
        takes = [(a, t) for a in here for t in THINGS if t not in self.holder and self._reaches(a, t)]
        drops = [(actor, thing) for thing, actor in self.holder.items()]
        begun = "go" if self.handled or not takes else "take"
        act = self.numbers.choice([begun, *["take"] * bool(takes), *["drop"] * bool(drops)])
        if act == "go":
            return self.move()
        actor, thing = self.numbers.choice(takes if act == "take" else drops)
        self.handled.append(actor)
        if act == "take":
            self.holder[thing] = actor
            self.left.pop(thing, None)
            return f"{actor} took {thing} ."
        del self.holder[thing]
        self.left[thing] = self.place[actor]
        return f"{actor} dropped {thing} ."

    def map(self) -> list[str]:
        """Places on a grid, each beside one told before, in words."""
        places = self.numbers.sample(PLACES, len(PLACES))
        self.grid, told = {places[0]: (0, 0)}, []
        for place in places[1:]:
            free = [
                (known, name, (x + dx, y + dy))
                for known, (x, y) in self.grid.items()
                for name, (dx, dy) in DIRECTIONS.items()
                if (x + dx, y + dy) not in self.grid.values()
            ]
            known, name, self.grid[place] = self.numbers.choice(free)
            told.append(f"{place} is {name} of {known} .")
        return told

    def _reaches(self, actor: str, thing: str) -> bool:
        return self.left.get(thing, self.place[actor]) == self.place[actor]

    def where(self, thing: str) -> str | None:
        """The place of a thing, once somebody took it."""
        return self.place[self.holder[thing]] if thing in self.holder else self.left.get(thing)


def _where_is_an_actor(world: World) -> Told:
    actor = world.numbers.choice(list(world.place))
    return _asked(f"where is {actor} ?", world.place[actor])


def _where_is_a_thing(world: World) -> Told:
    known = [thing for thing in THINGS if world.where(thing)]
    if not known:
        return []
    thing = world.numbers.choice(known)
    return _asked(f"where is {thing} ?", world.where(thing))


def _is_an_actor_there(world: World) -> Told:
    actor = world.numbers.choice(list(world.place))
    there = world.place[actor]
    place = there if world.numbers.random() < 0.5 else world.numbers.choice([p for p in PLACES if p != there])
    return _asked(f"is {actor} in {place} ?", "yes" if place == there else "no")


def _how_many(world: World) -> Told:
    if not world.handled:
        return []
    actor = world.numbers.choice(sorted(set(world.handled)))
    return _asked(f"how many has {actor} ?", NUMBERS[list(world.holder.values()).count(actor)])


def _how_to_go(world: World) -> Told:
    """Between places two steps apart, by the place between them that is told of."""
    steps = {place: dict[str, str]() for place in world.grid}
    at = {position: place for place, position in world.grid.items()}
    for place, (x, y) in world.grid.items():
        for name, (dx, dy) in DIRECTIONS.items():
            if (x + dx, y + dy) in at:
                steps[place][at[x + dx, y + dy]] = name
    ways: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for start, first in steps.items():
        for middle, one in first.items():
            for end, two in steps[middle].items():
                if end != start:
                    ways.setdefault((start, end), []).append((one, two))
    start, end = world.numbers.choice([ends for ends, found in ways.items() if len(found) == 1])
    one, two = ways[start, end][0]
    return [*_asked(f"from {start} to {end} ?", one), ("·", two)]


KINDS: dict[str, Callable[[World], Told]] = {
    "one_fact": _where_is_an_actor,
    "two_facts": _where_is_a_thing,
    "yes_no": _is_an_actor_there,
    "counting": _how_many,
    "path": _how_to_go,
}


def _plain(sentence: str) -> Told:
    return [(word, None) for word in sentence.split()]


def _asked(sentence: str, answer: str | None) -> Told:
    *before, (mark, _) = _plain(sentence)
    return [*before, (mark, answer)]
