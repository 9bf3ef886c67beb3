"""Analysis: ablations, and what a study shares (rows, tables, verdicts, figures)."""

from metamem.analysis.ablation import AblationProgress, run_ablation
from metamem.analysis.plan import Cell, Plan, plan_ablation
from metamem.analysis.plots import accuracy_figure, stream_figure
from metamem.analysis.report import write_report
from metamem.analysis.results import DiskFull, Result, read_results
from metamem.analysis.study import Claim, Row, Study, open_study

__all__ = [
    "AblationProgress",
    "Cell",
    "Claim",
    "DiskFull",
    "Plan",
    "Result",
    "Row",
    "Study",
    "accuracy_figure",
    "open_study",
    "plan_ablation",
    "read_results",
    "run_ablation",
    "stream_figure",
    "write_report",
]
