"""The front door: quantize, synthesize, evaluate, save and load."""

from zsq_ext.api.arguments import Batches
from zsq_ext.api.calls import quantize, synthesize
from zsq_ext.api.result import Result, evaluate, load
from zsq_ext.core.spec import InputSpec

__all__ = ["Batches", "InputSpec", "Result", "evaluate", "load", "quantize", "synthesize"]
