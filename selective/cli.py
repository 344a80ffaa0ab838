"""The command `selective` with its subcommands compare, bench, explain and doctor, which are imported when they run.

Exit codes: 0 done; 1 a run failed, or the doctor found something to mend; 2 the request can't be met (the message says
why); 130 interrupted, with the finished results kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["bench"]:  # it has a parser of its own, help included
        from selective.bench.__main__ import main as bench

        return bench(arguments[1:]) or 0
    options = _parser().parse_args(arguments)
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="selective", description="Selective updates for PyTorch optimizers.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(required=True, metavar="compare | bench | explain | doctor")
    compare = commands.add_parser(
        "compare",
        help="train a model under several optimizers and say whether selection helped",
        description="Train the same model (a small GPT, or a task of yours) from the same start on the same batches "
        "under several optimizers, and say whether selection helped. Command-line options override the configuration "
        "file.",
        epilog='Examples: selective compare --policy MGUP --policy \'{"kind": "Cautious"}\' --lr 1e-3 3e-3 --seeds 3; '
        "selective compare --task my_task.py:MyTask --policy Cautious --lr 1e-3,3e-3 --seeds 5",
    )
    _compare_options(compare)
    commands.add_parser("bench", help="measure what a selective step costs (selective bench --help)")
    explain = commands.add_parser(
        "explain",
        help="say how a base's update is obtained, and what a policy does with it",
        description="Build a base over a small GPT and print what SelectiveUpdate found out about it.",
    )
    explain.add_argument("--base", default="AdamW", help="class of the base, as in compare (default: AdamW)")
    explain.add_argument("--base-options", type=_json, default={}, metavar="JSON", help="keyword arguments of the base")
    explain.add_argument("--policy", type=_policy, default="MGUP", help="name or JSON (default: MGUP)")
    explain.add_argument("--preconditioner", type=_policy, help="name or JSON, as in compare (default: none)")
    explain.set_defaults(run=_explain)
    doctor = commands.add_parser(
        "doctor",
        help="look at your optimizer before it trains, and take three steps",
        description="Make your optimizer, say what it will do and what it costs, take three steps on random gradients, "
        "and say what should be mended. Exit code: 0 nothing to mend, 1 something to mend, 2 it can't be made.",
        epilog="Examples: selective doctor train.py:make_optimizer --model train.py:make_model; "
        "selective doctor torch.optim:AdamW --model train.py:make_model",
    )
    _doctor_options(doctor)
    return parser


def _doctor_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "factory",
        help="a function that makes the optimizer, module:name or path/to/file.py:name; it takes nothing, the model, "
        "or the model's parameters",
    )
    add("--model", metavar="NAME", help="the model, or a function that makes it, named in the same way")
    add("--lr", type=float, default=1e-3, help="learning rate for a factory that needs one (default: 1e-3)")
    add("--device", help='where the model is moved first, such as "cuda" (default: where it is)')
    add("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=_doctor)


def _compare_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", metavar="FILE", help="configuration, YAML or JSON; examples/demo.yaml shows every setting")
    add(
        "--import",
        action="append",
        dest="imports",
        metavar="MODULE",
        help="module to import first, which defines your own policies; repeatable",
    )
    add(
        "--task",
        metavar="NAME",
        help="what is trained: module:name or path/to/file.py:name of a task of yours (default: a small GPT on bytes)",
    )
    add("--policy", action="append", type=_policy, metavar="POLICY", help='name or JSON ({"kind": "MGUP"}); repeatable')
    add(
        "--preconditioner",
        action="append",
        type=_policy,
        metavar="NAME",
        help="adadiag, adadiag++, soap, a kind's name or JSON; also runs the base and each policy in its space; "
        "repeatable",
    )
    add(
        "--optimizer",
        action="append",
        metavar="NAME",
        help="a function (params, lr) or (model, lr) that makes an optimizer, module:name or path/to/file.py:name; "
        "the name of a class, as in --base; or recipe:NAME, such as recipe:soap-cautious; repeatable",
    )
    add("--base", help="class of torch.optim or an installed package, in any case, or module:Class (default: AdamW)")
    add("--base-options", type=_json, metavar="JSON", help="keyword arguments of the base")
    add(
        "--lr",
        nargs="+",
        type=_rates,
        metavar="LR",
        help="learning rates that every contender is trained at, with spaces or commas (default: 1e-3 3e-3)",
    )
    add(
        "--rest-lr",
        nargs="+",
        type=_rates,
        metavar="LR",
        help="second learning rates, of embeddings, head and vectors; every pair is tried",
    )
    add("--seeds", type=_seeds, metavar="N|A,B,C", help="number of seeds, or a list with commas (default: 3)")
    add("--first-seed", type=int, metavar="N", help="first seed where --seeds is a number (default: 0)")
    add("--steps", type=int, help="steps of each run (default: 400)")
    add("--data", metavar="FILE", help="any text file (default: the Python standard library's own source)")
    add(
        "--controls",
        action=argparse.BooleanOptionalAction,
        help="also train each policy's matched random control (default: yes)",
    )
    add(
        "--set",
        action="append",
        type=_setting,
        default=[],
        metavar="KEY=VALUE",
        help="any other setting, such as model.width=192",
    )
    add("--device", help='such as "cuda"; with several GPUs each worker has one (default: cpu)')
    add("--threads", type=int, help="threads of torch in each run (default: 1)")
    add(
        "--workers",
        type=int,
        help="runs at the same time (default: as many as there are GPUs, or as the cores allow)",
    )
    add("--out", metavar="DIR", help="folder of the results (default: results/compare-DATE)")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="go on with the comparison in --out")
    either.add_argument("--overwrite", action="store_true", help="delete the comparison in --out")
    parser.set_defaults(run=_compare)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options of the command line as configuration data; those that were not given are left out."""
    data: dict[str, Any] = {}
    plural = {"policy": "policies", "preconditioner": "preconditioners", "optimizer": "optimizers"}
    names = ("imports", "task", "policy", "preconditioner", "optimizer", "base", "base_options", "seeds", "steps")
    for name in (*names, "controls", "device", "threads", "workers"):
        value = getattr(options, name)
        if value is not None:
            data[plural.get(name, name)] = value
    for name in ("lr", "rest_lr"):
        if getattr(options, name) is not None:
            data[name] = [rate for rates in getattr(options, name) for rate in rates]
    if options.data is not None:
        data["data"] = {"file": options.data}
    for path, value in options.set:
        nested: Any = data
        *above, last = path.split(".")
        for part in above:
            nested = nested.setdefault(part, {})
        nested[last] = value
    return data


def _compare(options: argparse.Namespace) -> int:
    from selective.compare.command import compare

    return compare(options, settings(options))


def _explain(options: argparse.Namespace) -> int:
    from selective.compare.command import explain

    return explain(options.base, options.base_options, options.policy, options.preconditioner)


def _doctor(options: argparse.Namespace) -> int:
    from selective.doctor.command import run

    return run(options.factory, options.model, options.lr, options.device, options.json)


class _Version(argparse.Action):
    """Prints the version, which is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from selective import __version__

        print(f"selective {__version__}")
        parser.exit()


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from error


def _policy(text: str) -> Any:
    return _json(text) if text.lstrip().startswith("{") else text


def _rates(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: learning rates are needed, with spaces or commas between: 1e-3 3e-3"
        ) from error


def _seeds(text: str) -> Any:
    try:
        return [int(part) for part in text.split(",") if part.strip()] if "," in text else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: a count (3) or a list with commas (0,1,7) is needed") from error


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: KEY=VALUE is needed, as in model.width=192")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value  # a bare word is a string


if __name__ == "__main__":
    sys.exit(main())
