"""Notice the beginning of each save of a checkpoint, and where it goes.

The functions by which scripts and frameworks save are wrapped: `torch.save`, those of
`torch.distributed.checkpoint`, and those of safetensors. The latter two are wrapped once they are
imported, never imported for it; before a script binds their names, so when torch itself is imported.
What is saved is not touched.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import FrameType, ModuleType

# A script that serializes something in every step must not fill the spool.
MAX_NAMED = 50_000
MAX_NAMELESS = 10_000
_MAX_IN_STEP = 4096

_TORCH = ("save",)
_DCP = ("save", "async_save", "save_state_dict")
_SAFETENSORS = ("save_file", "save_model")


class Saves:
    """Which saves are worth a record: each path once a step, those without a path once a step."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._step: int | None = None
        self._paths: set[str] = set()
        self._named = self._nameless = 0

    def is_new(self, path: str, step: int) -> bool:
        """Whether this save has not been told; it then counts as told. Never so in a forked child.

        Args:
            path: absolute; "" for a buffer.
            step: of the update attempt under way.
        """
        if os.getpid() != self._pid:
            return False
        if step != self._step:
            self._step = step
            self._paths.clear()
        if path in self._paths:
            return False
        if len(self._paths) >= _MAX_IN_STEP or (
            self._named >= MAX_NAMED if path else self._nameless >= MAX_NAMELESS
        ):
            return False
        self._paths.add(path)
        self._named += bool(path)
        self._nameless += not path
        return True


def patch_saves(begins: Callable[[Callable[[], str]], Any]) -> None:
    """Have every save of this process tell where it goes, before its first byte is written.

    Args:
        begins: called with what gives the absolute path, or "" for a target without a name. Must not
            raise, whatever that raises.
    """

    def tell(target: Callable[..., Any], args: Any, kwargs: Any, caller: FrameType) -> None:
        # torch saves parts of what it was told to save, and pickles storages in this way.
        name = str(caller.f_globals.get("__name__", ""))
        if name != "torch" and not name.startswith("torch."):
            begins(lambda: absolute(target(*args, **kwargs)))

    _wrap([torch, torch.serialization], _TORCH, _target_of_save, tell)

    def wrap_dcp(module: ModuleType) -> None:
        saver = getattr(module, "state_dict_saver", None)
        _wrap([module] if saver is None else [module, saver], _DCP, _target_of_dcp, tell)

    def wrap_safetensors(module: ModuleType) -> None:
        _wrap([module], _SAFETENSORS, _target_of_safetensors, tell)

    when_imported({"torch.distributed.checkpoint": wrap_dcp, "safetensors.torch": wrap_safetensors})


def absolute(target: Any) -> str:
    """The absolute path that a save is given, "" when it has none: a path, or a file with a name.

    An address such as `s3://bucket/key` stays as it is.
    """
    if not isinstance(target, (str, bytes, os.PathLike)):
        target = getattr(target, "name", "")
    if not isinstance(target, (str, bytes, os.PathLike)):
        return ""
    path = os.fsdecode(target)
    return path if not path or "://" in path else os.path.abspath(path)  # noqa: PTH100 - symlinks are kept


def when_imported(wanted: dict[str, Callable[[ModuleType], None]]) -> None:
    """Call each function with its module: now if it is imported already, else right after its import."""
    later = {}
    for name, call in wanted.items():
        module = sys.modules.get(name)
        # One that is still being executed lacks what comes further down in it.
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            call(module)
        else:
            later[name] = call
    sys.meta_path.insert(0, _OnImport(later))


class _OnImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it adds a call to the end of an import that others perform."""

    def __init__(self, wanted: dict[str, Callable[[ModuleType], None]]) -> None:
        self._wanted = wanted
        self._looking: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname not in self._wanted or fullname in self._looking:
            return None
        self._looking.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
            if spec is not None and spec.loader is not None:
                self._extend(fullname, spec.loader)
        except (ImportError, AttributeError, ValueError):
            return None
        finally:
            self._looking.discard(fullname)
        return spec

    def _extend(self, name: str, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            # Another one of us, around this one, may have taken it off already.
            vars(loader).pop("exec_module", None)
            execute(module)
            call = self._wanted.pop(name, None)
            if call is not None:
                call(module)

        loader.exec_module = exec_module


def _wrap(
    owners: Sequence[Any],
    names: Sequence[str],
    target: Callable[..., Any],
    tell: Callable[[Callable[..., Any], Any, Any, FrameType], None],
) -> None:
    """Replace functions where they are known by their names, the same by the same."""
    for name in names:
        original = getattr(owners[0], name, None)
        if original is None:
            continue
        wrapped = _telling(original, target, tell)
        for owner in owners:
            if getattr(owner, name, None) is original:
                setattr(owner, name, wrapped)


def _telling(
    original: Callable[..., Any],
    target: Callable[..., Any],
    tell: Callable[[Callable[..., Any], Any, Any, FrameType], None],
) -> Callable[..., Any]:
    @functools.wraps(original)
    def save(*args: Any, **kwargs: Any) -> Any:
        tell(target, args, kwargs, sys._getframe(1))
        return original(*args, **kwargs)

    return save


def _target_of_save(*args: Any, f: Any = None, **_kwargs: Any) -> Any:
    return args[1] if len(args) > 1 else f


def _target_of_safetensors(*args: Any, filename: Any = None, **_kwargs: Any) -> Any:
    return args[1] if len(args) > 1 else filename


def _target_of_dcp(*args: Any, checkpoint_id: Any = None, storage_writer: Any = None, **_kwargs: Any) -> Any:
    if checkpoint_id is not None:
        return checkpoint_id
    for writer in (storage_writer, *args[1:]):
        for name in ("checkpoint_id", "path"):
            place = getattr(writer, name, None)
            if place:
                return place
    return None
