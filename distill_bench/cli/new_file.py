"""Write the first version of a plugin's file from a template."""

import argparse
import keyword
import re
import sys
from pathlib import Path
from string import Template

from distill_bench.registry import plugin_names

NAME = re.compile(r"[a-z][a-z0-9_]*")


def write_from(command: str, template: str, next_step: str, argv: list[str] | None) -> int:
    """Write NAME.py as a command asks; returns the exit code.

    Args:
        command: name of the command.
        template: text of the file, with $name, $title (the class) and $place (FILE:CLASS).
        next_step: text of the line that says how to use the plugin, with the same names.
    """
    parser = argparse.ArgumentParser(
        prog=f"distill-bench {command}",
        description="Write NAME.py, a complete and commented plugin that passes "
        "`distill-bench check`.",
    )
    parser.add_argument("name", help="lower case, e.g. my_method")
    parser.add_argument("--folder", type=Path, default=Path(), help="default: the current folder")
    options = parser.parse_args(argv)
    path = options.folder / f"{options.name}.py"
    title = "".join(part.capitalize() for part in options.name.split("_"))
    names = {"name": options.name, "title": title, "place": f"{path}:{title}"}
    try:
        _refuse(options.name)
        with path.open("x", encoding="utf-8") as file:
            file.write(Template(template).substitute(names))
    except FileExistsError:
        parser.exit(2, f"{parser.prog}: {path} exists; remove it, or choose another name\n")
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(f"wrote {path}")
    print(f"check it:  distill-bench check {names['place']}")
    print(f"use it:    {Template(next_step).substitute(names)}")
    return 0


def _refuse(name: str) -> None:
    """Raise ValueError for a name that no plugin may have."""
    if not NAME.fullmatch(name) or keyword.iskeyword(name):
        raise ValueError(
            f"{name!r} is no name of a plugin; use lower-case letters, digits and underscores, "
            "a letter first, and no keyword of Python"
        )
    if name in plugin_names() or name in sys.stdlib_module_names:
        raise ValueError(f"{name!r} is taken, by a plugin or a module of Python; choose another")
