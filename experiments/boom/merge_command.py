"""``python -m experiments.boom merge``: folders of models or of adapters into one.

Nothing heavy is imported before the arguments are read: help answers at once.
"""

import os
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_core.cli import Parser
from lit_core.errors import InputError
from lit_core.files import atomic_path, write_json

if TYPE_CHECKING:
    from lit_core.merging import Drift

METHODS = """methods and their options:
  linear           --normalize true|false
  slerp            --t .5  --space weight|delta  --on_zero linear|error
  multislerp       --tangent projection|log|karcher  --space weight|delta  --on_zero linear|error
  karcher          --iterations 10  --tolerance 1e-5  --space weight|delta  --on_zero linear|error
  task_arithmetic  --lam 1  --normalize true|false            needs a base
  ties             --density .2  --lam 1  --normalize true|false  --consensus weighted|count    needs a base
  dare_linear      --density .5  --rescale density|l1|none  --lam 1  --normalize true|false  --seed 0    needs a base
  dare_ties        as dare_linear                             needs a base
  sce              --select_topk 1                            needs a base
  model_stock      --on_zero linear|error                     needs a base"""
ONLY_MODELS, ONLY_ADAPTERS = ("dtype", "shard_bytes", "chunk_bytes"), ("rank",)


def run(args: Sequence[str]) -> None:
    """Merge, and print where the result is.

    Args:
        args: What follows the verb.

    Raises:
        InputError: A mistake in flags or folders.
    """
    given, rest = _parser().parse_known_args(args)
    options = method_options(rest)
    output = Path(os.path.abspath(given.output))
    adapters = _are_adapters(given.models)
    try:
        measured = _drift(given, adapters, output, options)
        told = _merge(given, adapters, output, options)
        if measured is not None:
            _write_drift(measured, output.with_name(f"{output.name}.drift"))
    except OSError as error:
        raise InputError(f"cannot be read or written ({error.strerror})", error.filename) from None
    count = _count(len(given.models), "adapter" if adapters else "model")
    notes = f"; it has notes on {_count(len(told['notes']), 'tensor')}" if told["notes"] else ""
    print(f"merged {count} by {given.method}: {given.output} ({given.output / 'merge.json'} says how{notes})")


def method_options(rest: Sequence[str]) -> dict[str, Any]:
    """Options of a method from what other flags have left: ``--density .2`` or ``--density=.2``.

    Raises:
        InputError: Something that is no flag with a value.
    """
    found: dict[str, Any] = {}
    left = list(rest)
    while left:
        flag, equals, value = left.pop(0).partition("=")
        name = flag.removeprefix("--")
        if name == flag or not name:
            raise InputError(f"'{flag}' is no flag; merge takes --models, --method, --output and others, see --help")
        if not equals:
            if not left or left[0].startswith("--"):
                raise InputError(f"{flag} needs a value")
            value = left.pop(0)
        found[name] = _value(value)
    return found


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _value(text: str) -> Any:
    """A number or truth value where it is one."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _parser() -> Parser:
    parser = Parser(
        "python -m experiments.boom merge", allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter,
        description="Merge folders of models (transformers, sentence-transformers) or of LoRA adapters into one.",
        epilog=METHODS,
    )  # fmt: skip
    parser.add_argument("--models", nargs="+", type=Path, required=True, metavar="DIR", help="folders to merge")
    parser.add_argument("--method", required=True, help="how, see below")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--weights", nargs="+", type=float, help="one a model (default 1 each)")
    parser.add_argument("--base", metavar="DIR", help="folder that they were trained from; of adapters its name")
    parser.add_argument("--dtype", help="floating type of the result, such as bfloat16 (default theirs)")
    parser.add_argument("--shard_bytes", type=int, metavar="N", help="most bytes of a file (default 5000000000)")
    parser.add_argument("--chunk_bytes", type=int, metavar="N", help="most memory for chunks")
    parser.add_argument("--rank", type=int, help="of adapters: rank of the result (default the sum of ranks, exact)")
    drift = "print how far each went from the base, and write it to OUTPUT.drift, with a picture"
    parser.add_argument("--drift", action="store_true", help=drift)
    return parser


def _are_adapters(folders: Sequence[Path]) -> bool:
    """Whether the folders hold adapters, which only all of them may."""
    for folder in folders:
        if not folder.is_dir():
            raise InputError("there is no such folder", folder)
    found = [folder for folder in folders if (folder / "adapter_config.json").is_file()]
    if found and len(found) < len(folders):
        whole = next(folder for folder in folders if folder not in found)
        raise InputError(f"is an adapter, but {whole} is a whole model; export all with --form merged, or all with "
                         "--form adapter", found[0])  # fmt: skip
    return bool(found)


def _merge(given: Namespace, adapters: bool, output: Path, options: dict[str, Any]) -> dict[str, Any]:
    from lit_core.merging import merge_adapters, merge_folders

    for name in ONLY_MODELS if adapters else ONLY_ADAPTERS:
        if getattr(given, name) is not None:
            raise InputError(f"is for {'whole models' if adapters else 'adapters'} only; leave it away", field=name)
    if adapters:
        return merge_adapters(given.models, output, given.method, given.weights, given.rank, given.base, **options)
    more = {name: value for name in ONLY_MODELS if (value := getattr(given, name)) is not None}
    return merge_folders(given.models, output, given.method, given.weights, given.base, **more, **options)


def _drift(given: Namespace, adapters: bool, output: Path, options: dict[str, Any]) -> "Drift | None":
    """Distances from the base, before anything is written: once there is an output, a second start is refused."""
    if not given.drift:
        return None
    if adapters or given.base is None:
        raise InputError("compares whole models with their base; name it with --base", field="drift")
    from lit_core.export import check_free
    from lit_core.merging import drift
    from lit_core.merging.methods import method_of

    check_free(output)
    method_of(given.method, options).check(len(given.models), given.weights, True)
    return drift(given.models, given.base)


def _write_drift(report: "Drift", folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from lit_core.merging import drift_figure

    rows = report.rows("layer")
    write_json(folder / "drift.json", {"model": report.rows("model"), "layers": rows})
    with atomic_path(folder / "drift.png") as temporary:
        drift_figure(report).savefig(temporary, format="png")
    table = Table(title="norm of the difference from the base / norm of the base", title_justify="left")
    for heading in ("layer", *report.models, "mean cosine"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for row in [*rows, *report.rows("model")]:
        cosines = [cosine for cosine in row["cosines"].values() if cosine is not None]
        mean = f"{sum(cosines) / len(cosines):.3f}" if cosines else "-"
        table.add_row(row["name"], *("-" if r is None else f"{r:.3g}" for r in row["ratios"].values()), mean)
    Console().print(table)
    print(f"drift of each: {folder / 'drift.json'}, {folder / 'drift.png'}")
