"""Every example in a docstring of the lower floors, and on the page of the ops, runs and prints what it says."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch

from zsq_ext import ops

PACKAGE = Path(__file__).parents[1] / "zsq_ext"
ROOMS = ("core", "ops", "quant", "synth", "tune", "zoo")
MODULES = sorted(
    ".".join(["zsq_ext", *path.relative_to(PACKAGE).with_suffix("").parts])
    for room in ROOMS
    for path in (PACKAGE / room).rglob("*.py")
    if ">>> " in path.read_text()
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0


def test_the_page_of_the_ops():
    page = PACKAGE / "ops" / "README.md"
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted > 20
    assert result.failed == 0
    missing = [name for name in ops.__all__ if f"`{name}`" not in page.read_text()]
    assert not missing, "every op stands in the table"


def test_there_are_examples():
    assert MODULES
