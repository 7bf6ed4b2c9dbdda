"""Recipes for tests: a field is changed in whichever half of the recipe has it."""

from dataclasses import fields, replace


def changed(recipe, **values):
    """The recipe with other hyperparameters, such as ``changed(recipe, images=8, ranges="images")``."""
    halves = {}
    for name, half in vars(recipe).items():
        own = {field.name for field in fields(half)} & values.keys()
        halves[name] = replace(half, **{key: values.pop(key) for key in own})
    assert not values, f"no half has {values}"
    return replace(recipe, **halves)
