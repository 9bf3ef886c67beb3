"""Controllers: recurrent networks that a memory serves, or is measured against; `forward(x, state) -> (h, state)`."""

from metamem.controllers.lstm import LSTM

__all__ = ["LSTM"]
