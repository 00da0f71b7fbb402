"""The commands that list models, layers and data sets, and plan a job without running it."""

from collections.abc import Iterable, Sequence
from typing import Any

import click
from pydantic import BaseModel

from ablation.cli.display import print_json, print_table, say_bytes, say_number, say_seconds
from ablation.cli.options import home_option, json_option, located, run_options, spec_options
from ablation.inputs.catalog import NOTHING, Registered, dataset_facts, dataset_names, model_facts, model_names
from ablation.inputs.registered import GROUPS, registered_names
from ablation.machine import measure_machine
from ablation.plan import Plan, PlanOptions, plan_spec
from ablation.spec import JobSpec
from ablation.views import layer_view, model_view, plan_view
from worker.settings import Settings


@click.command()
@json_option
def models(as_json: bool) -> None:
    """List the models that a job may name."""
    registered = own_registered()
    views = [model_view(model_facts(name, registered)) for name in model_names(registered)]
    rows = (
        {
            "name": model.name,
            "layers": model.n_layers,
            "classes": model.n_classes,
            "input": list(model.input_shape),
            "gflops": round(model.flops / 1e9, 3),
            "weights": list(model.weights),
        }
        for model in views
    )
    _print(views, rows, as_json)


@click.command()
@click.argument("model")
@json_option
def layers(model: str, as_json: bool) -> None:
    """List the layers of MODEL: kind, shape, number of weights, and how sampled weights and whole layers are computed.

    \b
    direct     one number per example reaches the classes: thousands of sampled weights a second
    response   one function per unit and example for all of its weights: millions of weights a second
    finite     finite differences carried forward: one run of the rest of the model for hundreds of weights
    rerun      the rest of the model runs once for each weight, since torch doesn't see all that the layer changes
    """  # \b is click's sign for: don't rewrap
    views = [layer_view(layer) for layer in model_facts(model, own_registered()).layers]
    rows = (
        {
            "name": layer.name,
            "kind": layer.kind,
            "shape": list(layer.shape),
            "weights": layer.n_weights,
            "path": layer.path,
            "whole layer": layer.whole_layer_path,
        }
        for layer in views
    )
    _print(views, rows, as_json)


@click.command()
@json_option
def datasets(as_json: bool) -> None:
    """List the data sets that a job may name; a number that is missing is counted when a job uses the data."""
    registered = own_registered()
    facts = [dataset_facts(name, registered) for name in dataset_names(registered)]
    rows = (
        {
            "name": data.name,
            "needs_root": data.needs_root,
            "classes": data.n_classes,
            "train": data.n_examples.get("train"),
            "test": data.n_examples.get("test"),
        }
        for data in facts
    )
    _print(facts, rows, as_json)


@click.command()
@spec_options
@run_options
@home_option("data/ and checkpoints/")
@json_option
def plan(spec: JobSpec, settings: Settings, engine: str, batch_size: int | None, as_json: bool) -> None:
    """Show how a job would be computed and what it would cost; nothing is computed."""
    options = PlanOptions(
        settings.threads,
        settings.shard_s,
        engine,
        batch_size,
        is_shared=False,
        is_kept=True,
        machine=measure_machine(settings.memory_bytes),
    )
    with located(spec, settings.folders) as (spec, folders):
        made = plan_spec(spec, folders, options, own_registered())
        if made is None:  # registered data, which must be opened first
            from ablation.job import plan_here

            made = plan_here(spec, folders, options)
    if as_json:
        print_json(plan_view(made).model_dump(mode="json"))
    else:
        _print_plan(spec, made)


def own_registered() -> Registered:
    """Find what is registered in this Python environment; torch is loaded only if there is something."""
    if not any(registered_names(group) for group in GROUPS):
        return NOTHING
    from ablation.layers import registered_here

    return registered_here()


def _print_plan(spec: JobSpec, made: Plan) -> None:
    cost = made.estimate
    examples = ", ".join(f"{split.n_examples:,} {split.name}" for split in made.splits)
    rows = {
        "weights": f"{made.n_sites:,} of {made.parameter} {tuple(made.shape)} of {spec.model.name}",
        **_say_inputs(made),
        "path": made.path,
        "examples": f"{cost.n_examples:,} ({examples})",
        "cost": f"{say_number(cost.passes)} evaluation passes",
        "time": f"about {say_seconds(cost.seconds)} on {made.threads} thread{'s' * (made.threads > 1)}, one worker",
        "memory": f"about {say_bytes(cost.memory_bytes)} in batches of {made.batch_size}",
        "shards": f"{len(made.shards):,}, {say_bytes(cost.redis_bytes)} in Redis as a job of the service",
        "proof": f"{made.proof.n_sites} weights against the reference",
    }
    width = max(map(len, rows))
    for name, text in rows.items():
        click.echo(f"{name:{width}} {text}")
    for note in made.inputs.notes if made.inputs else ():
        click.echo(f"{'note':{width}} {note}")


def _say_inputs(made: Plan) -> dict[str, str]:
    """Rows on what the job is of: whose weights, how pictures become inputs, how classes were matched."""
    if made.inputs is None:
        return {}
    of_splits = {
        text: [split for split, each in made.inputs.classes.items() if each == text]
        for text in made.inputs.classes.values()
    }
    classes = "; ".join(f"{text} ({', '.join(splits)})" for text, splits in of_splits.items())
    return {"network": made.inputs.weights, "pictures": made.inputs.preprocessing or "", "classes": classes}


def _print(told: Sequence[BaseModel], rows: Iterable[dict[str, Any]], as_json: bool) -> None:
    """Print the API's objects as JSON, or rows of a table for people."""
    if as_json:
        print_json([one.model_dump(mode="json") for one in told])
    else:
        print_table([*rows])
