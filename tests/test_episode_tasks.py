"""Episodic tasks: what they draw, that nothing evaluated was trained on, and the Bayes optimum of sinusoids."""

import math

import pytest
import torch

from metamem.episodes.tasks import Digits, Glyphs, Sinusoid, Temperatures
from metamem.episodes.tasks.glyphs import INSTALLED, load
from metamem.tasks.text import TaskError

FINN, LI = {"frequency": (1.0, 1.0)}, {"frequency": (0.8, 1.2)}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("setting", [FINN, LI], ids=["Finn", "Li"])
def test_sinusoids_fill_their_ranges(setting):
    task = Sinusoid(shots=7, query=9, **setting)
    waves = task.waves(generator(), 4000)
    bounds = ((0.1, 5.0), setting["frequency"], (0.0, math.pi))
    for values, (low, high) in zip(waves, bounds, strict=True):
        assert values.min() >= low and values.max() <= high
        assert float(values.mean()) == pytest.approx((low + high) / 2, abs=0.06)
    episode = task.sample(generator(), 3)
    assert [tuple(x.shape) for batch in episode for x in batch] == [(3, 7, 1), (3, 7, 1), (3, 9, 1), (3, 9, 1)]
    assert episode.support.inputs.abs().max() <= 5 and task.evaluation(2).query.inputs.shape == (2, 100, 1)
    amplitude, frequency, phase = (v[:, None, None] for v in task.waves(generator(), 3))
    torch.testing.assert_close(episode.support.targets, amplitude * (frequency * episode.support.inputs + phase).sin())


def brute_force(task, x, y, asked, count=60):
    """The posterior mean by a sum over a grid of all three unknowns."""

    def grid(low, high, points):
        return low + (high - low) * (torch.arange(points, dtype=torch.float64) + 0.5) / points if low < high else [low]

    axes = (
        torch.as_tensor(grid(*bounds, count * factor), dtype=torch.float64)
        for bounds, factor in ((task.amplitude, 8), (task.frequency, 1), ((0.0, math.pi), 4))
    )
    amplitude, frequency, phase = (axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))
    log = torch.zeros_like(amplitude)
    for point, value in zip(x.double().flatten(), y.double().flatten(), strict=True):
        log -= 0.5 * ((value - amplitude * torch.sin(frequency * point + phase)) / task.noise) ** 2
    weight = torch.softmax(log, 0)
    return torch.stack(
        [(weight * amplitude * torch.sin(frequency * point + phase)).sum() for point in asked.double().flatten()]
    )


@pytest.mark.parametrize("shots", [1, 4])
@pytest.mark.parametrize("setting", [FINN, LI], ids=["Finn", "Li"])
def test_the_bayes_optimum_is_the_posterior_mean(setting, shots):
    task = Sinusoid(shots=shots, query=4, noise=0.7, **setting)
    episode = task.sample(generator(3), 2)
    found = task.bayes(episode, phases=240, frequencies=60)
    for index in range(2):
        wanted = brute_force(
            task, episode.support.inputs[index], episode.support.targets[index], episode.query.inputs[index]
        )
        torch.testing.assert_close(found[index, :, 0], wanted, rtol=0, atol=2e-3)


def test_the_bayes_optimum_is_settled_at_its_grid_and_falls_with_the_noise():
    errors = []
    for noise in (1.0, 0.3, 0.1):
        task = Sinusoid(shots=5, query=20, noise=noise)
        episode = task.sample(generator(1), 20)
        once, twice = task.bayes(episode), task.bayes(episode, 1024, 129)
        torch.testing.assert_close(once, twice, rtol=0, atol=0.02 * noise)
        errors.append(float(task.measure(once, episode.query.targets)["mse"].mean()))
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0


def test_nothing_predicts_better_than_the_posterior_mean():
    """In the mean over the prior it is at least as good as the posterior of a wrong noise."""
    task, other = (Sinusoid(shots=3, query=10, noise=noise) for noise in (0.8, 0.3))
    episode = task.sample(generator(5), 300)
    ours, theirs = (
        float(task.measure(of.bayes(episode, 128, 17), episode.query.targets)["mse"].mean()) for of in (task, other)
    )
    assert ours < theirs


def test_without_noise_the_data_determine_the_sine():
    for shots, setting, known in ((2, FINN, True), (3, LI, True), (1, FINN, False), (2, LI, False)):
        task = Sinusoid(shots=shots, query=5, **setting)
        episode = task.sample(generator(), 4)
        if known:
            assert task.measure(task.bayes(episode), episode.query.targets)["mse"].max() == 0
        else:
            with pytest.raises(TaskError, match="which no grid integrates"):
                task.bayes(episode)


def test_digits_of_the_evaluation_are_not_trained_on():
    task = Digits(ways=3, shots=2, query=4)
    seen = {"sample": set(), "evaluation": set()}
    for name, episode in (("sample", task.sample(generator(), 50)), ("evaluation", task.evaluation(50))):
        (support, labels), (query, asked) = episode
        assert support.shape == (50, 6, 1, 8, 8) and query.shape == (50, 12, 1, 8, 8)
        assert all(sorted(row) == [0, 0, 1, 1, 2, 2] for row in labels.tolist())
        assert all(row.count(way) == 4 for row in asked.tolist() for way in range(3))
        for images, marks in ((support, labels), (query, asked)):
            for task_images, row in zip(images, marks, strict=True):
                digits = [
                    next(d for d in range(10) if (task.images[d] == image).flatten(1).all(1).any())
                    for image in task_images
                ]
                assert len({(way, digit) for way, digit in zip(row.tolist(), digits, strict=True)}) == 3
                seen[name] |= set(digits)
    assert seen == {"sample": {0, 2, 4, 6, 8}, "evaluation": {1, 3, 5, 7, 9}}


def test_no_digit_is_both_shown_and_asked():
    episode = Digits(ways=2, shots=5, query=5).sample(generator(), 20)
    for shown, asked in zip(episode.support.inputs, episode.query.inputs, strict=True):
        assert not (shown[:, None] == asked[None]).flatten(2).all(2).any()


@pytest.fixture
def font(tmp_path):
    """A hex file of forty narrow and forty wide characters, one of them twice, one empty."""
    path, seeded = tmp_path / "font.hex", torch.Generator().manual_seed(1)
    lines = []
    for code in range(80):
        length = 32 if code < 40 else 64
        digits = "".join(f"{d:X}" for d in torch.randint(16, (length,), generator=seeded).tolist())
        lines.append(f"{code:04X}:{digits}")
    path.write_text("\n".join([*lines, f"0100:{lines[0].partition(':')[2]}", "0020:" + "0" * 32]) + "\n")
    return path


def test_glyphs_are_read_from_a_hex_file(font):
    bitmaps = load(font)
    assert bitmaps.shape == (80, 16, 16)
    digits = font.read_text().splitlines()[0].partition(":")[2]
    rows = [[int(bit) for bit in f"{int(digits[2 * row : 2 * row + 2], 16):08b}"] for row in range(16)]
    assert bitmaps[0].int().tolist() == [[0] * 4 + row + [0] * 4 for row in rows]


def test_glyphs_are_distorted_and_apart(font):
    task = Glyphs(ways=4, shots=3, query=2, path=str(font), flip=0.0)
    episode = task.sample(generator(), 5)
    assert episode.support.inputs.shape == (5, 12, 1, 16, 16) and episode.query.targets.shape == (5, 8)
    assert not set(task.trained.tolist()) & set(task.evaluated.tolist()) and len(task.evaluated) == 16
    first = episode.support.inputs[0, :3, 0]
    assert not first[0].equal(first[1]) and first.min() >= 0 and first.max() <= 1
    still = Glyphs(ways=4, shots=2, query=1, path=str(font), turn=0, shift=0, scale=0, flip=0).sample(generator(), 1)
    torch.testing.assert_close(still.support.inputs[0, 0], still.support.inputs[0, 1])


def test_the_installed_font_is_read():
    if not INSTALLED.is_file():
        pytest.skip(f"needs the system's package of Unifont ({INSTALLED})")
    assert len(load(INSTALLED)) > 10_000
    assert Glyphs().evaluation(2).support.inputs.shape == (2, 5, 1, 16, 16)


def test_temperatures_are_hours_in_a_row():
    pytest.importorskip("vega_datasets", reason="needs the extra few-shot")
    task = Temperatures(shots=30, query=6)
    episode = task.sample(generator(), 4)
    (inputs, targets), (asked, wanted) = episode
    assert inputs.shape == (4, 30, 6) and wanted.shape == (4, 6, 1)
    hours = torch.cat([targets, wanted], 1)[..., 0]
    features = torch.cat([inputs, asked], 1)
    torch.testing.assert_close(features[:, 1:, 0], hours[:, :-1])
    torch.testing.assert_close(features[:, 24:, 3], hours[:, :-24])
    assert features[..., 4:].square().sum(-1).sub(1).abs().max() < 1e-5
    one_degree = torch.full((1, 3, 1), 1 / float(task.deviation))
    assert float(task.measure(one_degree, torch.zeros(1, 3, 1))["degrees"]) == pytest.approx(1.0)
    assert task.evaluation(3).support.targets.mean() != task.sample(generator(), 3).support.targets.mean()


@pytest.mark.parametrize("make", [Sinusoid, Digits, Temperatures])
def test_an_evaluation_is_the_same_at_all_times_and_another_for_another_seed(make):
    task = make()
    one, again, other = task.evaluation(3), task.evaluation(3), task.evaluation(3, seed=1)
    assert one.support.inputs.equal(again.support.inputs) and one.query.targets.equal(again.query.targets)
    assert not one.support.inputs.equal(other.support.inputs)
    assert task.describe()


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: Sinusoid(shots=0), "shots and query must be at least 1, not 0 and 10"),
        (lambda: Sinusoid(frequency=(1.2, 0.8)), r"frequency must be a range above 0, low to high, not \[1.2, 0.8\]"),
        (lambda: Sinusoid(noise=-1.0), "noise must be at least 0, not -1"),
        (lambda: Digits(ways=6), "ways is 6, and there are 5 classes"),
        (lambda: Digits(ways=1), "ways must be at least 2"),
        (lambda: Digits(evaluated=(1, 12)), r"evaluated must be digits of 0 to 9, not \[1, 12\]"),
        (lambda: Digits(shots=200), "shots and query are 210 examples of a digit, and there are 174"),
        (lambda: Temperatures(shots=9000), "shots and query are 9024 hours, and a year has 8735"),
        (lambda: Glyphs(path="nowhere.hex"), "nowhere.hex: there is no Unifont; install your system's package"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, reason):
    with pytest.raises(TaskError, match=reason):
        make()


@pytest.mark.parametrize("line", ["0041", "0041:00FF", "0041:" + "G" * 32])
def test_a_file_that_is_no_font_is_refused(line, tmp_path):
    (tmp_path / "font.hex").write_text(line + "\n")
    with pytest.raises(TaskError, match="Unifont hex file"):
        load(tmp_path / "font.hex")


def test_what_a_task_needs_and_is_not_installed_is_named(monkeypatch):
    import builtins
    from importlib import resources

    real = builtins.__import__

    def missing(name, *rest):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *rest)

    def nowhere(package):
        raise ModuleNotFoundError(package)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(TaskError, match=r"'digits' needs scikit-learn: install the extra metamem-torch\[few-shot\]"):
        Digits()
    monkeypatch.setattr(resources, "files", nowhere)
    with pytest.raises(TaskError, match=r"'temperatures' needs vega-datasets: install metamem-torch\[few-shot\]"):
        Temperatures()
