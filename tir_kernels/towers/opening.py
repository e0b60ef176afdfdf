"""Modules that adapters are put on: the same object and parameters, with another forward.

While anything is on a module, its class is one that knows of adapters. So its parameters, hooks and
names stay, copies of it are independent, it can be pickled, and compiled code takes notice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from tir_kernels.towers.protocol import AttentionCall, Modifier

_SET_ASIDE = "forward_set_aside"  # attribute that keeps another tool's forward


class Changes(NamedTuple):
    """What the adapters of a block change in its attention, in the pass under way."""

    modifiers: tuple[Modifier, ...] = ()
    hidden: Tensor | None = None  # (B, L, D), what entered the block

    def of(self, call: AttentionCall) -> AttentionCall:
        """The call as the modifiers leave it."""
        for modifier in self.modifiers:
            assert self.hidden is not None
            call = modifier(call, self.hidden)
        return call


NO_CHANGES = Changes()


class Opened:
    """Mixed into the class of a module for as long as adapters are on it.

    Attributes:
        plain: The class that it stands in for.
        tir_adapters: The adapters on the module, in the order in which they act.
    """

    plain: ClassVar[type[nn.Module]]
    tir_adapters: tuple[Any, ...]

    def enter(self, hidden: Tensor) -> tuple[Tensor, Changes]:
        """(B, L, D) as the adapters of this block change them, and what they change further on."""
        entered, modifiers = hidden, []
        for adapter in self.tir_adapters:
            hidden, modifier = adapter.enter(hidden)
            if modifier is not None:
                modifiers.append(modifier)
        return hidden, Changes(tuple(modifiers), entered)

    def plain_forward(self, *arguments: Any, **options: Any) -> Any:
        """The forward of the module without adapters, another tool's if one has put its own."""
        set_aside = getattr(self, _SET_ASIDE, None)
        if set_aside is not None:
            return set_aside(*arguments, **options)
        return self.plain.forward(self, *arguments, **options)


def require_own_forward(module: nn.Module) -> None:
    """Refuse a module whose forward another tool has replaced: ours would pass it by.

    Raises:
        TypeError: It was replaced.
    """
    if not has_own_forward(module):
        raise TypeError(
            f"another tool has replaced the forward of a {type(module).__name__} of the model; "
            "put the adapter on first, or take the other tool's change back"
        )


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The library's class of a module, opened or not."""
    return module.plain if isinstance(module, Opened) else type(module)


def has_own_forward(module: nn.Module) -> bool:
    """Whether no other tool has put its forward on a module."""
    return "forward" not in vars(module) and _SET_ASIDE not in vars(module)


def is_untouched(module: nn.Module) -> bool:
    """Whether a module runs by its class alone: without hooks, and without another tool's forward.

    Global hooks are not looked at.
    """
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    is_hooked = any(getattr(module, kind) for kind in kinds)
    return has_own_forward(module) and not is_hooked


def put_on(module: Any, adapter: Any, opened: Mapping[type, type[Opened]]) -> None:
    """Put an adapter on a module, whose class must be a key of ``opened`` or one of its values."""
    if not isinstance(module, Opened):
        if "forward" in vars(module):
            setattr(module, _SET_ASIDE, vars(module).pop("forward"))
        stand_in = opened[type(module)]
        module.tir_adapters = ()
        module.__class__ = stand_in
    module.tir_adapters += (adapter,)


def take_off(module: Any, adapter: Any) -> None:
    """Take an adapter off again; the last one leaves the module as it was."""
    if not isinstance(module, Opened):
        return
    left = tuple(each for each in module.tir_adapters if each is not adapter)
    if left:
        module.tir_adapters = left
        return
    del module.tir_adapters
    if _SET_ASIDE in vars(module):
        vars(module)["forward"] = vars(module).pop(_SET_ASIDE)
    module.__class__ = module.plain  # type: ignore[assignment]


def adapters_on(model: nn.Module) -> Iterator[Any]:
    """Every adapter on some module of a model, once."""
    seen: set[int] = set()
    for module in model.modules():
        for adapter in getattr(module, "tir_adapters", ()):
            if id(adapter) not in seen:
                seen.add(id(adapter))
                yield adapter
