"""The commands that compute nothing: which models and layers there are, and what a job would cost."""

import json
import sys
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ablation.catalog import find_checkpoint, model_facts, model_names, split_counts
from ablation.cli.display import say_bytes, say_number, say_seconds
from ablation.cli.options import home_option, locate, run_options, spec_options
from ablation.plan import Plan, make_plan
from ablation.spec import JobSpec
from worker.settings import Settings

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@json_option
def models(as_json: bool) -> None:
    """List the models that may be asked for by name."""
    facts = [model_facts(name) for name in model_names()]
    rows = [
        {
            "name": model.name,
            "layers": len(model.layers),
            "classes": model.n_classes,
            "input": list(model.input_shape),
            "gflops": round(model.flops / 1e9, 3),
            "weights": list(model.weights),
        }
        for model in facts
    ]
    _print(rows, as_json)


@click.command()
@click.argument("model")
@json_option
def layers(model: str, as_json: bool) -> None:
    """List the layers of MODEL: kind, shape, number of weights, and the path that each takes.

    \b
    direct   part of the classifier head: thousands of weights a second
    rerun    the rest of the model runs once per weight
    """  # \b is click's sign for: don't rewrap
    rows = [
        {
            "name": layer.name,
            "kind": layer.kind,
            "shape": list(layer.shape),
            "weights": layer.n_weights,
            "path": layer.path,
        }
        for layer in model_facts(model).layers
    ]
    _print(rows, as_json)


@click.command()
@spec_options
@run_options
@home_option
@json_option
def plan(spec: JobSpec, settings: Settings, engine: str, batch_size: int | None, as_json: bool) -> None:
    """Say how a job would be computed and what it would cost; computes nothing."""
    spec, folders = locate(spec, settings.folders)
    find_checkpoint(spec.model, folders)
    made = make_plan(
        spec,
        model_facts(spec.model.name),
        split_counts(spec.data, folders),
        threads=settings.threads,
        shard_s=settings.shard_s,
        engine=engine,
        batch_size=batch_size,
    )
    if as_json:
        click.echo(made.model_dump_json(indent=2))
    else:
        _print_plan(spec, made)


def _print_plan(spec: JobSpec, made: Plan) -> None:
    cost = made.estimate
    examples = ", ".join(f"{split.n_examples:,} {split.name}" for split in made.splits)
    rows = {
        "weights": f"{made.n_sites:,} of {made.parameter} {tuple(made.shape)} of {spec.model.name}",
        "path": made.path,
        "examples": f"{cost.n_examples:,} ({examples})",
        "cost": f"{say_number(cost.passes)} evaluation passes",
        "time": f"about {say_seconds(cost.seconds)} on {made.threads} thread{'s' * (made.threads > 1)}, one worker",
        "memory": f"about {say_bytes(cost.memory_bytes)} in batches of {made.batch_size}",
        "shards": f"{len(made.shards):,}, {say_bytes(cost.redis_bytes)} in Redis as a job of the service",
        "proof": f"{made.proof.n_sites} weights against the reference",
    }
    for name, text in rows.items():
        click.echo(f"{name:9} {text}")


def _print(rows: list[dict[str, Any]], as_json: bool) -> None:
    """A table for people, or JSON with the same fields."""
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    console = Console(width=None if sys.stdout.isatty() else 200)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name, value in rows[0].items():
        table.add_column(name, justify="right" if isinstance(value, int | float) else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ("x" if value and isinstance(value[0], int) else " ").join(str(part) for part in value)
    return f"{value:,}" if isinstance(value, int) else str(value)
