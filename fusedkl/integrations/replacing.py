"""Functions of other packages, replaced by ours: checked first, counted, and put back.

What an adapter replaces is a table of `Part`s for each version that it knows. Nothing is replaced
unless the installed version is one of them and every function has the signature written there.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

from ..rebinding import names_of

__all__ = ["Adapter", "Part", "Replaced"]


@dataclass(frozen=True)
class Part:
    """A function or class of a package, and what stands in for it."""

    module: str
    name: str  # "function", "Class", or "Class.method" of a staticmethod
    signature: str  # parameters and defaults; a class's are those of its forward, less ctx
    ours: Any
    # Only the attribute: names in other modules that hold the same object keep it.
    here_only: bool = False
    # Its module may need packages that are not installed; then it is left out.
    optional: bool = False

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class _Held:
    """An attribute that was replaced: what it held before, what it was given."""

    part: Part
    holder: Any
    attribute: str
    before: Any  # as in vars(): a staticmethod is still one
    given: Any


class Adapter:
    """The functions of one package that are replaced, by version; see the module's docstring."""

    def __init__(
        self, package: str, versions: Mapping[str, tuple[Part, ...]], source: str | None = None
    ) -> None:
        self.package = package
        self.versions = versions  # "1.16" -> parts; the newest last
        self.source = source or package  # what has __version__
        self._lock = threading.RLock()
        self._active = 0
        self._held: list[_Held] = []
        self._names: list[tuple[ModuleType, str]] = []  # in other modules, rebound
        self._own: set[tuple[int, str]] = set()
        self._left_out: list[str] = []

    def patch(self) -> Replaced:
        """Let the package's trainers in this process compute by fusedkl.

            patch()                     with patch():
            trainer.train()                 trainer.train()

        Holds until as many `unpatch()` as `patch()`; trainers that exist already are reached too,
        and so are names that other modules imported. A function that torch.compile was given
        before is not. docs/integrations.md lists what is replaced, and what differs.

        Returns a handle: a context manager, `.active`, and a repr that lists what is replaced.

        Raises:
            ImportError: the package is not installed.
            RuntimeError: its version is not known, or a function has another signature than known;
                the message names the versions that are, and what differs. Nothing is replaced.
        """
        with self._lock:
            if self._active == 0:
                self._replace(self._checked())
            self._active += 1
        return Replaced(self)

    def unpatch(self) -> bool:
        """Take back one `patch()`; all is the package's again after the last. False: none is left.

        What another party replaced meanwhile stays, with a RuntimeWarning.
        """
        with self._lock:
            if self._active == 0:
                return False
            self._active -= 1
            if self._active == 0:
                self._restore()
        return True

    def described(self) -> list[str]:
        """What is replaced now, a line each."""
        with self._lock:
            lines = [f"{held.part.path} = {_named(held.part.ours)}" for held in self._held]
            lines += sorted(f"{m.__name__}.{name} rebound" for m, name in self._names)
            return lines + self._left_out

    def _checked(self) -> list[_Held]:
        """The parts of the installed version, found and with the signatures they should have."""
        version = _version(self.source, self.package)
        known = ".".join(version.split(".")[:2])
        newest = list(self.versions)[-1]
        parts = self.versions.get(known, self.versions[newest])
        held, differences, self._left_out = [], [], []
        for part in parts:
            try:
                found = self._find(part)
            except ImportError as error:
                if part.optional:
                    self._left_out.append(f"{part.path} left out: {error}")
                else:
                    differences.append(f"{part.module} cannot be imported ({error})")
            except AttributeError:
                differences.append(f"{part.path} does not exist")
            else:
                signature = _signature(found.before)
                if signature != part.signature:
                    differences.append(f"{part.path} takes ({signature}), not ({part.signature})")
                held.append(found)
        if known in self.versions and not differences:
            return held
        raise RuntimeError(
            f"fusedkl.integrations.{self.package} knows {self.package} "
            f"{', '.join(self.versions)}; got {version}. What differs from "
            f"{known if known in self.versions else newest}: "
            + ("; ".join(differences) or "no signature, but what lies behind them is not known")
            + ". Nothing was replaced"
        )

    def _find(self, part: Part) -> _Held:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of packages about their own experimental modules
            holder: Any = importlib.import_module(part.module)
        *outer, attribute = part.name.split(".")
        for name in outer:
            holder = getattr(holder, name)
        if attribute not in vars(holder):
            raise AttributeError(attribute)
        before = vars(holder)[attribute]
        given = staticmethod(part.ours) if isinstance(before, staticmethod) else part.ours
        return _Held(part, holder, attribute, before, given)

    def _replace(self, held: list[_Held]) -> None:
        for one in held:
            setattr(one.holder, one.attribute, one.given)
        self._held = held
        # Whoever imported ours by itself keeps it.
        self._own = {(id(m), n) for m, n, _ in names_of({id(one.given) for one in held}, set())}
        self._own -= {(id(one.holder), one.attribute) for one in held}
        wide = {id(one.before): one for one in held if not one.part.here_only}
        for module, name, value in names_of(set(wide), set()):
            setattr(module, name, wide[id(value)].given)
            self._names.append((module, name))

    def _restore(self) -> None:
        for one in reversed(self._held):
            now = vars(one.holder).get(one.attribute)
            if now is one.given:
                setattr(one.holder, one.attribute, one.before)
            else:
                warnings.warn(
                    f"{one.part.path} was replaced by {_named(now)} while "
                    f"fusedkl.integrations.{self.package} was active; it is left as it is",
                    RuntimeWarning,
                    stacklevel=4,
                )
        # Also of modules that imported a name from the package meanwhile.
        ours = {id(one.given): one.before for one in self._held if not one.part.here_only}
        for module, name, value in names_of(set(ours), set()):
            if (id(module), name) not in self._own:
                setattr(module, name, ours[id(value)])
        self._held, self._names, self._own = [], [], set()


class Replaced:
    """What an adapter's `patch()` returns: a context manager; its repr says what is replaced."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._mine = 1  # calls of the adapter's patch() to take back
        self._unentered = True  # `with patch():` adopts the one that the call made

    @property
    def active(self) -> bool:
        """Whether this call of `patch()`, or a `with` of this handle, is still counted."""
        return self._mine > 0 and self._adapter._active > 0

    def __enter__(self) -> Replaced:
        if not (self._unentered and self.active):
            self._adapter.patch()
            self._mine += 1
        self._unentered = False
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.active:
            self._mine -= 1
            self._adapter.unpatch()

    def __repr__(self) -> str:
        lines = self._adapter.described()
        what = "\n  ".join(lines) if lines else "nothing is replaced"
        return f"<fusedkl.integrations.{self._adapter.package}:\n  {what}>"


def _version(source: str, package: str) -> str:
    """The version of a package, or an ImportError that names it."""
    try:
        module = importlib.import_module(source)
    except ImportError as error:
        raise ImportError(
            f"fusedkl.integrations.{package} replaces functions of {package}, which cannot be "
            f"imported: {error}"
        ) from error
    version = getattr(module, "__version__", None)
    return version if isinstance(version, str) else importlib.metadata.version(package)


def _signature(value: Any) -> str:
    """Names and defaults, as a `def` has them, without annotations."""
    function = value.__func__ if isinstance(value, staticmethod) else value
    first = 0
    if isinstance(function, type):
        function, first = getattr(function, "forward", function), 1
    signature = inspect.signature(function)
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()][first:]
    return str(signature.replace(parameters=plain, return_annotation=signature.empty))[1:-1]


def _named(value: Any) -> str:
    function = value.__func__ if isinstance(value, staticmethod) else value
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', function)}"
