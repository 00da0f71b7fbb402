"""Models and layers as callers give them: what is taken as it is, what is unwrapped, and what is refused in one line.

In: whatever a caller calls a model, and a layer's name. Out: the module that is measured, the name that the module has
for the layer, and `ModelError` or `SpecError` for anything else. What PyTorch itself says while a model runs is wrapped
here too (`failures_told`), so that a caller is told which layer failed on which examples, and what to do.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ablation.errors import AblationError, ModelError, SpecError, say_cause
from ablation.precision import as_found, run
from ablation.sharing import converted

_COMPILED = torch._dynamo.eval_frame.OptimizedModule
_WRAPPERS: dict[type[nn.Module], str] = {  # modules that only call another, by the attribute that holds it
    _COMPILED: "_orig_mod",
    DataParallel: "module",
    DistributedDataParallel: "module",
    AveragedModel: "module",
}
_WIDE = {torch.float64, torch.complex128}
_QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")


# --- models ----------------------------------------------------------------------------------------------------------


def take_model(model: Any) -> nn.Module:
    """The module that is measured where a caller gives `model`.

    `torch.compile`, DataParallel and the like are unwrapped: what they wrap has the same numbers and is run as it is
    written. A model made in inference mode is copied, since what its numbers are used for can't be followed.

    Raises:
        ModelError: it is no module, or one that can't be measured; the message says what to give instead.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model is {_describe_other(model)}")
    module = unwrap(model)
    check_module(module)
    if any(tensor.is_inference() for tensor in _tensors(module).values()):
        with torch.inference_mode(False), copying_told():
            return converted(module, lambda twin: twin, is_copied=True)
    return module


def _describe_other(model: Any) -> str:
    """What a thing is that is no module, what is allowed, and how to come by it."""
    if isinstance(model, torch.export.ExportedProgram):
        return "an ExportedProgram; allowed: a torch.nn.Module. Give the module that was exported."
    if isinstance(model, type) and issubclass(model, nn.Module):
        return f"the class {model.__name__}; allowed: a torch.nn.Module. Give an instance of it: {model.__name__}(...)."
    if isinstance(model, dict) and any(isinstance(value, Tensor) for value in model.values()):
        return "a state dict; allowed: a torch.nn.Module. Load it into its model: model.load_state_dict(...)."
    return f"a {type(model).__name__}; allowed: a torch.nn.Module."


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside of wrappers that only call it; a wrapper with hooks of its own stays."""
    while (attribute := _WRAPPERS.get(type(model))) and not (model._forward_hooks or model._forward_pre_hooks):
        model = getattr(model, attribute)
    return model


@contextmanager
def copying_told() -> Iterator[None]:
    """Context in which an error of copying a model becomes one line.

    Raises:
        ModelError: there was one.
    """
    try:
        yield
    except Exception as error:
        raise ModelError(
            f"the model can't be copied ({say_cause(error)}); allowed: models that copy.deepcopy takes. Give it on the "
            "device to compute on, and made outside of torch.inference_mode."
        ) from error


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def check_module(module: nn.Module) -> None:
    """Refuse a module whose numbers can't be replaced one at a time.

    Raises:
        ModelError: a part of it is compiled to TorchScript, exported, quantized or not yet initialised; or a parameter
            is sparse, distributed, without numbers, or on another device than others.
    """
    for name, part in module.named_modules():
        if reason := _why_not_part(part):
            raise ModelError(f"{f'the part {name!r} of the model' if name else 'the model'} {reason}")
    tensors = _tensors(module)
    for name, tensor in tensors.items():
        if reason := _why_not_tensor(tensor):
            raise ModelError(f"{name} {reason}")
    parameters = dict(module.named_parameters())
    if not parameters:
        raise ModelError(
            "the model has no parameters, so there is no weight to ablate. (A frozen or quantized model keeps its "
            "weights packed; give the model that it was made of.)"
        )
    kinds = {parameter.dtype: name for name, parameter in reversed(parameters.items())}
    if not any(kind.is_floating_point for kind in kinds):
        raise ModelError(f"the model's parameters are {_some(kinds)}; allowed: some of them floating-point numbers.")
    real = {kind: name for kind, name in kinds.items() if kind.is_floating_point or kind.is_complex}
    if 0 < len(real.keys() & _WIDE) < len(real):
        raise ModelError(
            f"the model's parameters are of {len(real)} types ({_some(real)}); allowed: float64 for all of them or "
            "for none, since what is exact depends on it. Convert it: model.float() or model.double()."
        )
    places = {parameter.device: name for name, parameter in reversed(parameters.items())}
    if len(places) > 1:
        raise ModelError(
            f"the model's parameters are on {len(places)} devices ({_some(places)}); allowed: one. "
            "Move it as a whole: model.to(device)."
        )


def _some(kinds: dict[Any, str]) -> str:
    """Types or devices, each with the name of a parameter that has it."""
    return ", ".join(f"{str(kind).removeprefix('torch.')}: {name}" for kind, name in [*kinds.items()][::-1][:4])


def _why_not_part(part: nn.Module) -> str:
    """Why a module can't be a part of a measured model, and what to do; empty if it can."""
    if isinstance(part, torch.jit.ScriptModule | torch.jit.ScriptFunction | torch.jit.TopLevelTracedModule):
        return (
            "is a torch.jit module, whose code can't be run with a weight replaced; allowed: modules in Python. Give "
            "the module that it was scripted or traced from, with model.load_state_dict(scripted.state_dict())."
        )
    if isinstance(part, torch.fx.GraphModule) and {"eval", "train"} & vars(part).keys():
        return (
            "is a graph made by torch.export, which is fixed to a batch size or a mode; allowed: modules in Python. "
            "Give the module that was exported."
        )
    if type(part).__module__.startswith(_QUANTIZED):
        return (
            f"is quantized ({type(part).__name__}): its weights are packed whole numbers; allowed: floating-point "
            "numbers. Give the model before it was quantized."
        )
    if isinstance(part, nn.modules.lazy.LazyModuleMixin) and part.has_uninitialized_params():
        return (
            f"is a {type(part).__name__} that has no numbers yet; allowed: initialised modules. Run the model once on "
            "a batch: model(inputs)."
        )
    return ""


def _why_not_tensor(tensor: Tensor) -> str:
    """Why a parameter or buffer can't be a part of a measured model, and what to do; empty if it can."""
    if tensor.layout is not torch.strided:
        return (
            f"is sparse ({_layout(tensor)}); allowed: dense tensors, since a weight that is not stored can't be "
            "replaced. Make it dense: torch.nn.Parameter(weight.to_dense())."
        )
    if tensor.is_meta:
        return (
            "has no numbers (device meta); allowed: a model with its weights. Load them first: "
            "model.to_empty(device='cpu'), then model.load_state_dict(...)."
        )
    if tensor.is_quantized or is_traceable_wrapper_subclass(tensor):
        kind = "quantized" if tensor.is_quantized else f"a {type(tensor).__name__}"
        return f"is {kind}; allowed: plain tensors of floating-point numbers. Give the model with such weights."
    return ""


def _layout(tensor: Tensor) -> str:
    return str(tensor.layout).removeprefix("torch.")


# --- layers ----------------------------------------------------------------------------------------------------------


def find_name(model: nn.Module, module: nn.Module, layer: Any) -> Any:
    """The name that `module` has for a layer of `model`, whose wrappers have been taken off.

    Names may be with or without what wrappers put into them (`_orig_mod.`, `module.`). What is no name of a layer is
    returned as it is, for `find_layer` to refuse.

    Raises:
        SpecError: a module or a parameter is given and not its name, the name is empty, or the layer's weight is
            computed from other parameters.
    """
    if isinstance(layer, nn.Module | Tensor):
        raise _own_name(module, layer)
    if not isinstance(layer, str):
        return layer
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    if layer == "":
        raise SpecError("layer", layer, f"the name of a layer ({', '.join(names[:8])}{', ...' * (len(names) > 8)})")
    found = _find_plain(model, module, layer, names)
    _check_not_computed(module, found)
    return found


def _own_name(module: nn.Module, layer: nn.Module | Tensor) -> SpecError:
    """The error for a layer that is given as an object: its name is what is wanted."""
    named = [*module.named_modules(remove_duplicate=False), *module.named_parameters(remove_duplicate=False)]
    name = next((name for name, one in named if one is layer and name), None)
    next_step = f"Its name is {name!r}." if name else "Names are those of model.named_modules()."
    return SpecError("layer", f"a {type(layer).__name__}", "the name of a layer, as text", next_step)


def _find_plain(model: nn.Module, module: nn.Module, layer: str, names: list[str]) -> str:
    """The one name of a parameter or of its module that is `layer` but for what wrappers put into it."""
    modules = [name for name, one in module.named_modules(remove_duplicate=False) if type(one) not in _WRAPPERS]
    if layer in names or layer in modules:
        return layer
    prefixes, within = [""], model
    while within is not module:
        attribute = _WRAPPERS[type(within)]
        prefixes = [f"{attribute}.{prefix}" for prefix in prefixes] + [""]
        within = getattr(within, attribute)
    plain = {_without(module, name): name for name in [*modules, *names]}
    for prefix in prefixes:
        rest = layer.removeprefix(prefix)
        for wanted in (rest, rest.replace("_orig_mod.", "")):
            if wanted in plain and wanted:
                return plain[wanted]
    return layer


def _without(module: nn.Module, name: str) -> str:
    """A name without the parts that stand for wrapped modules."""
    parts: list[str] = []
    owner: Any = module
    for part in name.split("."):
        if _WRAPPERS.get(type(owner)) != part:
            parts.append(part)
        owner = getattr(owner, part, None)
    return ".".join(parts)


def _check_not_computed(module: nn.Module, layer: str) -> None:
    """Refuse a layer whose weight is no parameter: pruned, weight-normed, spectral-normed or otherwise parametrized."""
    for name in (layer, layer.removesuffix(".weight"), layer.removesuffix(".bias")):
        owner = dict(module.named_modules(remove_duplicate=False)).get(name)
        tensor = "bias" if layer == f"{name}.bias" else "weight"
        if owner is None or tensor in owner._parameters or not isinstance(getattr(owner, tensor, None), Tensor):
            continue
        of = [
            own for own, _ in owner.named_parameters() if own.startswith((f"{tensor}_", f"parametrizations.{tensor}."))
        ]
        if of:
            full = ", ".join(f"{name}.{own}" if name else own for own in of)
            raise SpecError(
                "layer",
                layer,
                f"the parameters that its {tensor} is computed from ({full})",
                f"It is pruned, normed or parametrized. torch's `remove` (of torch.nn.utils.prune, or "
                f"parametrize.remove_parametrizations) makes its {tensor} a parameter again.",
            )


# --- running them ----------------------------------------------------------------------------------------------------


@contextmanager
def run_plainly() -> Iterator[None]:
    """Context in which `torch.compile` compiles nothing: what it wraps runs as it is written, weight by weight."""
    with ExitStack() as stack:
        if hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def look_at(model: nn.Module, inputs: Tensor) -> Any:
    """What the model returns for its first examples, run in eval mode as its owner would run it.

    Raises:
        ModelError: it fails on them.
    """
    with failures_told(model, lambda: f"the first {len(inputs)} examples", inputs, everything=True), as_found(model):
        return run(model, inputs)


@contextmanager
def failures_told(
    model: nn.Module, what: Callable[[], str], inputs: Tensor | None = None, *, everything: bool = False
) -> Iterator[None]:
    """Context in which an error of the model becomes one line: which layer failed on what, and what to do.

    Args:
        model: whose errors are meant: those that pass through one of its modules.
        what: names the examples, once there is an error.
        inputs: these examples, where they are at hand.
        everything: whether all errors are the model's.

    Raises:
        ModelError: the model failed. Errors of this package and of the system, and lack of memory, pass unchanged.
    """
    try:
        yield
    except (AblationError, MemoryError, OSError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        where = _find_failed(error, model)
        if "can't allocate memory" in str(error) or (where is None and not everything):
            raise
        raise ModelError(_say_failure(error, where or "", what(), inputs)) from error


def _find_failed(error: BaseException, model: nn.Module) -> str | None:
    """Describe the innermost module that an error came through; None where it came through none."""
    names = {id(module): (name, type(module).__name__) for name, module in model.named_modules()}
    found, frames = None, error.__traceback__
    while frames is not None:
        here = frames.tb_frame.f_locals.get("self")
        if isinstance(here, nn.Module) and id(here) in names:
            name, kind = names[id(here)]
            found = f"in {name} ({kind})" if name else f"in {kind}"
        frames = frames.tb_next
    return found


def _say_failure(error: BaseException, where: str, what: str, inputs: Tensor | None) -> str:
    given = "" if inputs is None else f", {say_tensor(inputs)}"
    cause = f"{where}: {say_cause(error)}" if where else say_cause(error)
    if isinstance(error, TypeError) and "argument" in str(error):
        advice = "Wrap it in a module whose forward takes one tensor and fills in the rest."
    elif inputs is not None and not inputs.is_floating_point() and not inputs.is_complex():
        advice = (
            "Whole numbers reach the model as they are: where it takes real ones, convert them as in training, such as "
            "pictures of uint8 to float32 between 0 and 1."
        )
    else:
        advice = "Give them the shape, type and scale that the model was trained on, and try model(inputs) by itself."
    return f"the model fails on {what}{given} ({cause}); allowed: examples that model(inputs) takes. {advice}"


def say_tensor(tensor: Tensor) -> str:
    """Describe a tensor by its type and shape."""
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


@contextmanager
def unexpected_told() -> Iterator[None]:
    """Context in which an error that nobody foresaw becomes one of this package: what may do, and to report it.

    Raises:
        ModelError: there was one. Errors of this package and of the system, and lack of memory, pass unchanged.
    """
    try:
        yield
    except (AblationError, MemoryError, OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelError(
            f"this model or data can't be measured ({say_cause(error)}); allowed: what model(inputs) takes, batch by "
            "batch. Try engine='rerun' or 'reference' and precision='float64', and please report this."
        ) from error
