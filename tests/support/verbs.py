"""Functions of the verbs by name: `from tests.support.verbs import distill`, then distill.run(config)."""

from importlib import import_module
from pkgutil import resolve_name

from permafrost.config.verbs import VERBS


class VerbModule:
    """A verb's function as `run`, and the other names of the module of that function."""

    def __init__(self, function):
        self.run = resolve_name(function)
        self.module = import_module(function.partition(":")[0])

    def __getattr__(self, name):
        return getattr(self.module, name)

    def __setattr__(self, name, value):
        if name not in ("run", "module"):
            raise AttributeError(f"set {name} of the module that uses it")
        super().__setattr__(name, value)


def __getattr__(name):
    if name not in VERBS:
        raise AttributeError(name)
    return VerbModule(VERBS[name].function)
