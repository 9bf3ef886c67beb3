"""Episodic tasks. Importing this package registers them by name.

- `sinusoid`       a sine of unknown amplitude and phase, with frequency or without; its Bayes optimum
- `digits`         few-shot classification of scikit-learn's digits (extra `few-shot`)
- `glyphs`         the same of GNU Unifont's characters, where it is installed
- `temperatures`   the hours of a week in a city, from those before (extra `few-shot`)
"""

from metamem.episodes.tasks.digits import Digits
from metamem.episodes.tasks.glyphs import Glyphs
from metamem.episodes.tasks.sinusoid import Sinusoid
from metamem.episodes.tasks.temperatures import Temperatures

__all__ = ["Digits", "Glyphs", "Sinusoid", "Temperatures"]
