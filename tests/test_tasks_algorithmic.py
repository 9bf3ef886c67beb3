"""The algorithmic tasks: every answer is that of a solver written here, which sees the inputs alone; what is measured
is right; an episode's settings are those asked for.

Longer than most files: eight tasks, each with a solver of its own, behind the same few laws.
"""

from itertools import pairwise, permutations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from losses.outer import bits
from metamem.tasks import IGNORE, Adding, Argmax, Copy, Graph, RepeatCopy, Sort, Stories, TaskError, metro
from metamem.tasks.episodic import measure
from metamem.tasks.stories import ACTORS, NUMBERS, PLACES, THINGS, WORDS

SEEDS = st.integers(0, 999)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def ranges(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high)).map(sorted).map(tuple)


# Copy


def copied(row, width):
    """The vectors between start and recall, as often as the recall channel says, one for each place after it."""
    assert row[0, width] == 1 and row[1:, width].eq(0).all()
    (recall,) = row[:, width + 1].nonzero().flatten().tolist()
    return recall, row[1:recall, :width]


@settings(max_examples=30)
@given(ranges(1, 6), st.integers(1, 5), st.integers(0, 3), SEEDS)
def test_copy_asks_for_what_was_shown_and_for_nothing_else(lengths, width, spare, seed):
    task = Copy(lengths=lengths, width=width)
    length = 2 * lengths[1] + 2 + spare
    inputs, targets = task.sample(generator(seed), 5, length)
    assert inputs.shape == (5, length, width + 2) and targets.shape == (5, length, width)
    for row, wanted in zip(inputs, targets, strict=True):
        recall, vectors = copied(row, width)
        assert lengths[0] <= len(vectors) <= lengths[1]
        asked = slice(recall + 1, recall + 1 + len(vectors))
        assert torch.equal(wanted[asked], vectors) and row[asked].eq(0).all()
        assert wanted[: asked.start].isnan().all() and wanted[asked.stop :].isnan().all()
        assert ((vectors == 0) | (vectors == 1)).all()


def test_a_curriculum_grows_by_one_vector_at_a_time_and_without_one_all_lengths_come_at_once():
    task = Copy(lengths=(2, 5), curriculum=10)
    assert [task.task_at(step) for step in (1, 10, 11, 20, 21, 30, 31, 1000)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert Copy(lengths=(2, 5)).task_at(1) == 3

    def lengths(**stage):
        inputs, _ = task.sample(generator(), 200, 12, **stage)
        return {len(copied(row, 8)[1]) for row in inputs}

    assert [lengths(task=stage) for stage in range(4)] == [{2}, {2, 3}, {2, 3, 4}, {2, 3, 4, 5}]
    assert lengths() == {2, 3, 4, 5}


def test_copy_is_evaluated_at_the_most_of_training_and_beyond():
    task = Copy(lengths=(1, 4), tested=(8, 4, 16), examples=3)
    assert list(task.settings) == ["length-4", "length-8", "length-16"]
    inputs, targets = task.evaluation("length-16")
    assert inputs.shape == (3, 34, 10) and (~targets.isnan()).sum() == 3 * 16 * 8


@settings(max_examples=30)
@given(ranges(1, 4), ranges(1, 3), st.integers(1, 4), SEEDS)
def test_repeat_copy_asks_for_all_repeats_and_then_the_end(lengths, repeats, width, seed):
    task = RepeatCopy(lengths=lengths, repeats=repeats, width=width)
    length = (repeats[1] + 1) * lengths[1] + 4
    inputs, targets = task.sample(generator(seed), 5, length)
    for row, wanted in zip(inputs, targets, strict=True):
        recall, vectors = copied(row, width)
        times = round(float(row[recall, width + 1]) * repeats[1])
        assert lengths[0] <= len(vectors) <= lengths[1] and repeats[0] <= times <= repeats[1]
        answer = [[*vector, 0.0] for _ in range(times) for vector in vectors.tolist()] + [[0.0] * width + [1.0]]
        asked = slice(recall + 1, recall + 1 + len(answer))
        assert wanted[asked].tolist() == answer
        assert wanted[: asked.start].isnan().all() and wanted[asked.stop :].isnan().all()
    assert list(task.settings) == [
        f"length-{lengths[1]}-repeats-{repeats[1]}",
        "length-10-repeats-4",
        "length-5-repeats-8",
    ]


def test_a_number_of_repeats_that_was_never_trained_is_one_further_on():
    inputs, targets = RepeatCopy(repeats=(1, 4)).episodes(generator(), 2, (3, 8))
    assert inputs[:, 4, 9].tolist() == [2.0, 2.0] and inputs.shape[1] == 9 * 3 + 3
    assert (~targets[..., 0].isnan()).sum() == 2 * (3 * 8 + 1)


# Numbers and tokens


@settings(max_examples=30)
@given(ranges(1, 8), st.integers(2, 9), st.integers(0, 3), SEEDS)
def test_sort_asks_for_the_numbers_in_order(lengths, symbols, spare, seed):
    task = Sort(lengths=lengths, symbols=symbols)
    inputs, targets = task.sample(generator(seed), 5, 2 * lengths[1] + spare)
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        count = row.index(symbols)
        assert lengths[0] <= count <= lengths[1] and set(row[count + 1 :]) <= {symbols + 1}
        answer = sorted(row[:count])
        assert wanted == [IGNORE] * count + answer + [IGNORE] * (len(row) - 2 * count)


@settings(max_examples=30)
@given(ranges(1, 8), st.integers(0, 3), SEEDS)
def test_argmax_asks_for_the_key_of_the_largest_number(lengths, spare, seed):
    task = Argmax(lengths=lengths, symbols=9, tested=())
    inputs, targets = task.sample(generator(seed), 5, 2 * lengths[1] + 1 + spare)
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        end = row.index(18)
        pairs = dict(zip(row[1:end:2], row[:end:2], strict=True))  # number -> key
        assert lengths[0] <= len(pairs) == end // 2 <= lengths[1] and len(set(pairs.values())) == len(pairs)
        assert max(pairs.values()) < 9 <= min(pairs) and wanted[end] == pairs[max(pairs)]
        assert set(wanted[:end] + wanted[end + 1 :]) <= {IGNORE}


def test_argmax_takes_every_place():
    inputs, targets = Argmax(lengths=(4, 4)).sample(generator(), 400, 9)
    answers = targets[targets != IGNORE]
    places = (inputs[:, :8:2] == answers[:, None]).int().argmax(1)
    assert places.bincount().min() > 60


@settings(max_examples=30)
@given(ranges(2, 12), st.integers(0, 3), SEEDS)
def test_adding_asks_for_the_sum_of_the_marked_numbers(lengths, spare, seed):
    task = Adding(lengths=lengths)
    inputs, targets = task.sample(generator(seed), 5, lengths[1] + spare)
    for row, wanted in zip(inputs, targets[..., 0], strict=True):
        (place,) = (~wanted.isnan()).nonzero().flatten().tolist()
        numbers, marks = row[: place + 1].unbind(-1)
        first, second = marks.nonzero().flatten().tolist()
        half = len(numbers) // 2
        assert lengths[0] <= len(numbers) <= lengths[1] and first < half <= second and marks.sum() == 2
        assert float(wanted[place]) == pytest.approx(float(numbers[first] + numbers[second]))
        assert row[place + 1 :].eq(0).all() and ((numbers >= 0) & (numbers < 1)).all()


def test_adding_counts_a_sum_that_is_near_as_right():
    task = Adding(lengths=(5, 5), tested=(), examples=100)
    found = task.evaluate(lambda inputs, targets: targets.nan_to_num() + 0.03)
    assert found == {"accuracy/length-5": 1.0, "squared_error/length-5": pytest.approx(9e-4, rel=1e-3)}
    assert task.evaluate(lambda inputs, targets: targets.nan_to_num() + 0.05)["accuracy/length-5"] == 0.0


# Graphs


def all_paths(graph, start, end):
    """Every path without a loop, by trying every order of every choice of nodes between."""
    between = sorted(set(graph) - {start, end})
    for count in range(len(between) + 1):
        for middle in permutations(between, count):
            path = (start, *middle, end)
            if all(other in graph[one] for one, other in pairwise(path)):
                yield path


def read_graph(row, labels):
    """The edges, the ends that are asked, and the place of the answer."""
    mark = row.index(labels)
    graph = {}
    for one, other in zip(row[:mark:2], row[1:mark:2], strict=True):
        graph.setdefault(one, set()).add(other)
        graph.setdefault(other, set()).add(one)
    assert mark == sum(map(len, graph.values())), "an edge is told twice"
    return graph, row[mark + 1], row[mark + 2], mark + 2


def check_walks(inputs, targets, labels, nodes):
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        graph, start, end, place = read_graph(row, labels)
        assert len(graph) in nodes
        paths = sorted(all_paths(graph, start, end), key=len)
        assert len(paths) == 1 or len(paths[0]) < len(paths[1]), "two paths are as short"
        answer = list(paths[0][1:])
        assert wanted == [IGNORE] * place + answer + [IGNORE] * (len(row) - place - len(answer))
        assert set(row[place + 1 :]) <= {labels + 1}


@settings(max_examples=15)
@given(ranges(2, 6), st.integers(0, 3), SEEDS)
def test_graph_asks_for_the_one_shortest_path(nodes, extra, seed):
    task = Graph(nodes=nodes, extra=extra, labels=9, tested=(), stations=())
    inputs, targets = task.sample(generator(seed), 4, 2 * (nodes[1] + extra) + nodes[1] + 1)
    check_walks(inputs, targets, 9, range(nodes[0], nodes[1] + 1))


def test_pieces_of_the_map_are_walked_as_random_graphs_are():
    task = Graph(nodes=(3, 4), labels=12, tested=(6,), stations=(5, 7), examples=12)
    assert list(task.settings) == ["nodes-4", "nodes-6", "metro-5", "metro-7"]
    for name in ("metro-5", "metro-7"):
        check_walks(*task.evaluation(name), 12, [int(name[-1])])


def test_walks_of_all_lengths_are_asked():
    _, targets = Graph(nodes=(7, 7)).sample(generator(), 300, 27)
    steps = (targets != IGNORE).sum(1).bincount()
    assert steps[0] == 0 and (steps[1:4] > 50).all()


def distances(neighbours):
    """Stops between all stations, by Floyd and Warshall."""
    size = len(neighbours)
    stops = torch.full((size, size), 10_000)
    stops.fill_diagonal_(0)
    for one, near in enumerate(neighbours):
        stops[one, near] = 1
    for middle in range(size):
        stops = torch.minimum(stops, stops[:, middle, None] + stops[None, middle])
    return stops


def test_the_map_is_one_network_in_which_known_journeys_take_their_number_of_stops():
    neighbours, number = metro.neighbours(), {name: place for place, name in enumerate(metro.STATIONS)}
    assert len(number) == len(metro.STATIONS) == 59
    assert all(one in neighbours[other] for one, near in enumerate(neighbours) for other in near)
    stops = distances(neighbours)
    assert stops.max() < 20, "a station is out of reach"
    known = [
        ("Oxford Circus", "Green Park", 1),
        ("Paddington", "Baker Street", 2),
        ("Waterloo", "Bank", 1),
        ("Victoria", "King's Cross St Pancras", 5),
        ("Covent Garden", "Bank", 4),
        ("South Kensington", "Liverpool Street", 7),
    ]
    assert [int(stops[number[one], number[other]]) for one, other, _ in known] == [count for *_, count in known]
    interchange = {name: len(neighbours[number[name]]) for name in ("King's Cross St Pancras", "Aldgate", "Bank")}
    assert interchange == {"King's Cross St Pancras": 5, "Aldgate": 2, "Bank": 7}


# Stories


def solve(words):
    """The answers of one who reads, by the place of each question mark (and of the second step of a path)."""
    place, holder, left, at, answers = {}, {}, {}, {}, {}
    sentence = []
    for index, word in enumerate(words):
        sentence.append(word)
        if word == ".":
            tell(sentence[:-1], place, holder, left, at)
            sentence = []
        elif word == "?":
            match sentence[:-1]:
                case ["where", "is", what] if what in ACTORS:
                    answers[index] = place[what]
                case ["where", "is", what]:
                    answers[index] = place[holder[what]] if what in holder else left[what]
                case ["is", who, "in", where]:
                    answers[index] = "yes" if place[who] == where else "no"
                case ["how", "many", "has", who]:
                    answers[index] = NUMBERS[sum(one == who for one in holder.values())]
                case ["from", start, "to", end]:
                    answers[index], answers[index + 1] = way(at, start, end)
            sentence = []
        elif word == "·":
            sentence = []
    return answers


def tell(sentence, place, holder, left, at):
    match sentence:
        case [who, "went", "to", where]:
            assert place.get(who) != where, "somebody went where they are"
            place[who] = where
        case [who, "took", what]:
            assert what not in holder and left.get(what, place[who]) == place[who], "out of reach"
            holder[what] = who
        case [who, "dropped", what]:
            assert holder.pop(what) == who
            left[what] = place[who]
        case [where, "is", direction, "of", known]:
            x, y = at.setdefault(known, (0, 0))
            moved = {"north": (x, y + 1), "south": (x, y - 1), "east": (x + 1, y), "west": (x - 1, y)}[direction]
            assert moved not in at.values(), "two places at one"
            at[where] = moved
        case _:
            raise AssertionError(sentence)


def way(at, start, end):
    """The one way over a place between: two straight steps, or a corner of which only one side is a place."""
    names = {(0, 1): "north", (0, -1): "south", (1, 0): "east", (-1, 0): "west"}
    (x, y), (u, v) = at[start], at[end]
    found = [
        (names[px - x, py - y], names[u - px, v - py])
        for px, py in at.values()
        if (px - x, py - y) in names and (u - px, v - py) in names
    ]
    assert len(found) == 1, "more than one way"
    return found[0]


@pytest.mark.parametrize("kind", ["one_fact", "two_facts", "yes_no", "counting", "path"])
@pytest.mark.parametrize("facts", [1, 2, 4])
def test_stories_ask_what_a_reader_can_answer(kind, facts):
    task = Stories(kinds=(kind,), facts=facts)
    inputs, targets = task.sample(generator(facts), 60, 48)
    for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        answers = solve([WORDS[token] for token in row])
        assert answers, "nothing is asked"
        assert {place: WORDS[token] for place, token in enumerate(wanted) if token != IGNORE} == answers


@pytest.mark.parametrize(
    ("kind", "answers"),
    [
        ("one_fact", set(PLACES)),
        ("two_facts", set(PLACES)),
        ("yes_no", {"yes", "no"}),
        ("counting", set(NUMBERS)),
        ("path", {"north", "east", "south", "west"}),
    ],
)
def test_no_answer_is_given_away_by_how_often_it_comes(kind, answers):
    _, targets = Stories(kinds=(kind,)).sample(generator(), 400, 64)
    asked = targets[targets != IGNORE]
    share = {word: float((asked == WORDS.index(word)).double().mean()) for word in answers}
    assert sum(share.values()) == pytest.approx(1) and min(share.values()) > 0.005
    assert max(share.values()) < {"yes_no": 0.6, "counting": 0.7}.get(kind, 0.35)


def test_a_story_is_of_one_kind_and_all_kinds_come():
    task = Stories()
    inputs, _ = task.sample(generator(), 100, 64)
    first = {"where", "is", "how", "from"}
    kinds = [{WORDS[one] for one in row.tolist()} & first for row in inputs]
    assert {word for found in kinds for word in found} == first
    assert len(WORDS) == len(set(WORDS)) == task.vocabulary and set(THINGS) < set(WORDS)


# What is measured


def test_measure_of_tokens_counts_answers_episodes_and_bits():
    targets = torch.tensor([[IGNORE, 2, 1], [IGNORE, 0, 0]])
    right = 50.0 * torch.nn.functional.one_hot(targets.clamp(min=0), 4).float()
    assert measure(right, targets) == {"accuracy": 1.0, "exact": 1.0, "bits": pytest.approx(0.0, abs=1e-6)}
    assert measure(torch.zeros(2, 3, 4), targets)["bits"] == pytest.approx(4.0)  # two answers of four tokens
    right[1, 2] = torch.tensor([0.0, 50.0, 0.0, 0.0])
    found = measure(right, targets)
    assert (found["accuracy"], found["exact"]) == (0.75, 0.5)
    assert found["bits"] == pytest.approx(50 / 2 / 0.6931472, rel=1e-4)


def test_measure_of_bits_counts_them_one_by_one_and_episodes_whole():
    targets = torch.tensor([[[torch.nan] * 3, [1.0, 0.0, 1.0]], [[torch.nan] * 3, [0.0, 0.0, 1.0]]])
    assert measure(torch.zeros(2, 2, 3), targets)["bits"] == pytest.approx(3.0)
    logits = 60 * (targets.nan_to_num(1.0) - 0.5)
    assert measure(logits, targets) == {"accuracy": 1.0, "exact": 1.0, "bits": pytest.approx(0.0, abs=1e-6)}
    logits[1, 1, 0] *= -1
    found = measure(logits, targets)
    assert (found["accuracy"], found["exact"]) == (pytest.approx(5 / 6), 0.5)


def test_bits_are_the_cross_entropy_of_each_bit_summed(float64):
    logits, target = torch.randn(5, 3, requires_grad=True), torch.randint(2, (5, 3)).double()
    p = logits.sigmoid()
    expected = -(target * p.log() + (1 - target) * (1 - p).log()).sum(-1)
    torch.testing.assert_close(bits(logits, target), expected)


TASKS = [
    lambda: Copy(lengths=(1, 3), tested=(5,), examples=70),
    lambda: RepeatCopy(lengths=(1, 2), repeats=(1, 2), tested=((3, 3),), examples=70),
    lambda: Sort(lengths=(2, 4), tested=(5,), examples=70),
    lambda: Argmax(lengths=(2, 4), tested=(5,), examples=70),
    lambda: Graph(nodes=(3, 4), tested=(5,), stations=(4,), examples=70),
    lambda: Stories(length=40, examples=70),
]


@pytest.mark.parametrize("make", TASKS)
def test_who_knows_the_answers_is_right_and_the_evaluation_is_the_same_for_all(make):
    task = make()

    def knows(inputs, targets):
        if targets.is_floating_point():
            return 60 * (targets.nan_to_num() - 0.5)
        return 60 * torch.nn.functional.one_hot(targets.clamp(min=0), task.vocabulary).float()

    found = task.evaluate(knows)
    assert list(found) == [f"{key}/{name}" for name in task.settings for key in ("accuracy", "exact", "bits")]
    assert all(value == pytest.approx(0 if key.startswith("bits") else 1, abs=1e-6) for key, value in found.items())
    name = next(iter(task.settings))
    for one, other in zip(task.evaluation(name), make().evaluation(name), strict=True):
        assert one.shape[0] == 70
        torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.parametrize("make", [*TASKS, lambda: Adding(lengths=(3, 5))])
def test_the_generator_decides_all(make):
    one, same, other = (make().sample(generator(seed), 4, 48) for seed in (3, 3, 4))
    for mine, theirs in zip(one, same, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)
    assert not torch.equal(one[0], other[0])
    assert one[0].shape[:2] == one[1].shape[:2] == (4, 48)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda: Copy(lengths=(3, 2)),
            r"lengths must be two numbers, the fewest, at least 1, and the most, not \[3, 2\]",
        ),
        (lambda: Copy(width=0), "width must be at least 1 and curriculum 0, not 0 and 0"),
        (lambda: Copy(curriculum=-1), "curriculum 0"),
        (lambda: Copy(tested=(4, 0)), r"tested must be at least 1, not \[4, 0\]"),
        (lambda: Copy(examples=0), "examples must be at least 1, not 0"),
        (lambda: Copy(lengths=(1, 4)).sample(generator(), 2, 9), "copying 4 vectors needs a sequence of 10 positions"),
        (lambda: RepeatCopy(repeats=(0, 2)), r"repeats must be two numbers, the fewest, at least 1"),
        (lambda: RepeatCopy(tested=((3, 0),)), r"not 8 and \[\[3, 0\]\]"),
        (lambda: RepeatCopy(lengths=(1, 2), repeats=(1, 3)).sample(generator(), 2, 10), "needs a sequence of 11 pos"),
        (lambda: Sort(symbols=1), "symbols must be at least 2"),
        (lambda: Sort().sample(generator(), 2, 15), "sorting 8 numbers needs a sequence of 16 positions, and has 15"),
        (lambda: Argmax(symbols=8, tested=(9,)), "the most pairs of an episode, 9"),
        (lambda: Argmax().sample(generator(), 2, 16), "needs a sequence of 17 positions"),
        (lambda: Adding(lengths=(1, 4)), "the fewest, at least 2"),
        (lambda: Adding(tested=(1,)), "tested must be at least 2"),
        (lambda: Adding().sample(generator(), 2, 49), "needs a sequence of 50 positions"),
        (lambda: Graph(labels=6), "as many as there are labels"),
        (lambda: Graph(labels=99, stations=(70,)), "the map has 59 stations, not 70"),
        (lambda: Graph().sample(generator(), 2, 23), "needs a sequence of 24 positions, and has 23"),
        (lambda: Stories(kinds=("onefact",)), "there is no kind of story 'onefact'; did you mean 'one_fact'"),
        (lambda: Stories(kinds=()), "name at least one kind"),
        (lambda: Stories().sample(generator(), 2, 35), "a story with a question needs a sequence of 36 positions"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, told):
    with pytest.raises(TaskError, match=told):
        make()


@pytest.mark.parametrize("make", [*TASKS, Adding])
def test_it_says_what_an_episode_holds_in_two_lines(make):
    train, evaluation = make().describe().splitlines()
    assert train.startswith("train: ") and evaluation.startswith("evaluation: ")
    assert str(make().examples) in evaluation
