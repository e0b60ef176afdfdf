"""Modules whose input is changed by hooks of PyTorch's, to compare adapters with."""

from contextlib import ExitStack, contextmanager
from functools import partial


def changed(place, length_first, module, inputs, given):
    """A hook in front of a module that changes the tokens (B, L, D) it gets."""
    name = next(iter(given)) if not inputs else None
    tokens = given[name] if name else inputs[0]
    tokens = place(tokens.transpose(0, 1)).transpose(0, 1) if length_first else place(tokens)
    return (inputs, {**given, name: tokens}) if name else ((tokens, *inputs[1:]), given)


@contextmanager
def hooked(places, length_first=False):
    """Modules with another input each, by pairs of a module and a function."""
    with ExitStack() as stack:
        for module, place, is_block in places:
            hook = partial(changed, place, length_first and is_block)
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield
