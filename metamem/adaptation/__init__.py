"""Test-time adaptation: a session reads a stream and goes on learning from it, for as long as it is left running.

    session = Session(model, config)
    observed = session.observe(tokens)        # the loss of every token given all before it; then it may learn

- `session`       `Session`: observe, predict, save, load, reset, fork; `Observed`, `Report`
- `guards`        which updates are refused, and when nothing learns any more
- `fallback`      the model as trained beside the one that adapts: when it runs, when it takes over
- `hugging_face`  causal language models of `transformers`
- `stream`        bytes of files, folders and pipes, as they arrive
- `opening`       what a folder holds that a session can adapt; `saved`: a session as a file
- `live`          what a person sees of a session on a stream
"""

from metamem.adaptation.guards import Refusal
from metamem.adaptation.session import Observed, Report, Session

__all__ = ["Session", "Observed", "Report", "Refusal"]
