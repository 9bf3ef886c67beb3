"""Controllers: networks that memories serve, or are measured against; `forward(x, state) -> (h, state)`."""

from metamem.controllers.base import Controller
from metamem.controllers.feed_forward import FeedForward
from metamem.controllers.grid_lstm import GridLSTM
from metamem.controllers.gru import GRU
from metamem.controllers.lstm import LSTM
from metamem.controllers.transformer import Transformer

__all__ = ["GRU", "LSTM", "Controller", "FeedForward", "GridLSTM", "Transformer"]
