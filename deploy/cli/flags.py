"""Flags of one system, declared in its file (``System.flags``) and offered by every command that names a system."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import typer
import typer.core

from deploy.errors import EffdeployError

if TYPE_CHECKING:
    from deploy.models.base import Flag


class SystemCommand(typer.core.TyperCommand):
    """A command that takes its system's own flags: ``--name VALUE`` is read as ``--set key=VALUE``.

    Systems are imported only when a flag is not the command's own, or for the help of a named system.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Replace the system's flags, then parse; what is nobody's flag is wrong usage."""
        own = {name for parameter in self.params for name in (*parameter.opts, *parameter.secondary_opts)}
        own |= set(ctx.help_option_names)
        ctx.meta[__name__] = _named_system(args)
        if any(_name(word) not in own for word in args if word.startswith("--") and word != "--"):
            args = list(self._rewritten(ctx, args, own))
        return list(super().parse_args(ctx, args))

    def _rewritten(self, ctx: Any, args: list[str], own: set[str]) -> Iterator[str]:
        system, words = str(ctx.meta[__name__]), iter(args)
        flags = _flags(ctx, system)
        for word in words:
            name, equals, value = word.partition("=")
            if name in flags:
                value = value if equals else next(words, "")
                if not value or (value.startswith("--") and not equals):
                    ctx.fail(f"Option '{name}' requires an argument.")
                yield from ("--set", f"{flags[name].key}={value}")
                continue
            if word.startswith("--") and word != "--" and name not in own:
                near = difflib.get_close_matches(name, [*own, *flags], n=1)
                guess = f" Did you mean {near[0]}?" if near else ""
                ctx.fail(f"No such option: {name}.{guess} {system}'s own: {', '.join(flags) or 'none'}.")
            yield word

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, and the flags of the system that was named."""
        super().format_help(ctx, formatter)
        if system := ctx.meta.get(__name__):
            flags = _flags(ctx, system)
            with formatter.section(f"Options of {system}"):
                formatter.write_dl([(name, flag.help) for name, flag in flags.items()] or [("none", "")])
        else:
            formatter.write("Systems have options of their own: effdeploy export SYSTEM --help\n")


def _name(word: str) -> str:
    return word.partition("=")[0]


def _named_system(args: list[str]) -> str:
    """Find the system, or the recipe file, among what was typed; empty when there is none."""
    from deploy.models import SYSTEMS

    return next((word for word in args if word in SYSTEMS or word.endswith((".yaml", ".yml"))), "")


def _flags(ctx: typer.Context, system: str) -> Mapping[str, Flag]:
    if not system:
        return {}
    from deploy.resolve import flags_of

    try:
        return {f"--{flag.name}": flag for flag in flags_of(system)}
    except EffdeployError as error:
        ctx.fail(f"{error.message}; {error.hint}")
