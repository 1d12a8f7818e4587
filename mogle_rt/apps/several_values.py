"""Options that several values may follow, as a shell writes them for ``-m masks/*.png`` without quotes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand


class SeveralMasks(TyperCommand):
    """A command with one argument, whose option ``--mask`` may be followed by several values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See click. The option is repeated before each of its values, which is the form that click reads."""
        takes_value = {
            name
            for option in self.params
            if option.param_type_name == "option" and not getattr(option, "is_flag", False)
            for name in (*option.opts, *option.secondary_opts)
        }
        return super().parse_args(ctx, repeated(args, ("-m", "--mask"), takes_value))


def repeated(args: Sequence[str], option: tuple[str, ...], takes_value: set[str]) -> list[str]:
    """Arguments in which an option stands before each of its values.

    Where the command's own argument is missing otherwise, the last of these values is it, as in ``-m mask.png demo``.

    Args:
        args: as they were typed.
        option: the names of the option.
        takes_value: the names of all options that a value follows.
    """
    result: list[str] = []
    own = 0  # arguments that belong to no option
    last = -1  # where the last further value stands in the result, behind its repeated option
    i = 0
    while i < len(args):
        word = args[i]
        if word == "--":
            own += len(args) - i - 1
            result += args[i:]
            break
        if word in option:
            result += args[i : i + 2]
            i += 2
            while i < len(args) and not (args[i].startswith("-") and len(args[i]) > 1):
                last = len(result)
                result += [option[0], args[i]]
                i += 1
            continue
        if word in takes_value:
            result += args[i : i + 2]
            i += 2
            continue
        own += not (word.startswith("-") and len(word) > 1)
        result.append(word)
        i += 1
    if not own and last >= 0:
        del result[last]
    return result
