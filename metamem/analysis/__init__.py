"""Analysis: what a study shares (rows, tables, verdicts) and its figures."""

from metamem.analysis.plots import accuracy_figure, stream_figure
from metamem.analysis.study import Claim, Row, Study, open_study

__all__ = ["Claim", "Row", "Study", "accuracy_figure", "open_study", "stream_figure"]
