"""The statistic `gradient`: at every site the sum over examples of dl_n/dw, by one forward and one backward pass.

In: batches of inputs and labels. Out: float64 sums, one a site. The parameter enters every pass as a tensor of its own,
under all its names, so every use of it counts. As in all paths, the network before it runs in the model's precision and
all that depends on it in float64 (in `float32`: all of it in float32). The derivative of plain cross-entropy by the
logits is formed without cancellation, which would hit confident examples; that of any other loss, by autograd.

Not here: finite changes of the loss, which is what every path computes; what is made of the sums (`criteria.py`).
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from ablation.engine.interface import Setup
from ablation.engine.loss import make_intact
from ablation.errors import ModelError
from ablation.loss import CROSS_ENTROPY, Loss, is_plain, loss_values
from ablation.precision import FromTargetOn, Lifts, as_found, run_with
from ablation.sites import EveryWeight


class Gradients:
    """Sums the gradient of the loss by the weights at some sites of one parameter."""

    def __init__(self, setup: Setup, examples_at_once: int) -> None:
        self.model = setup.model
        self.parameter = setup.parameter
        self.sites = setup.sites
        self.dtype = setup.base_dtype
        self.loss = setup.loss
        self.examples_at_once = examples_at_once
        self.lifts = Lifts()
        self.is_connected = False  # whether autograd has found a way from the logits of any batch to the parameter

    def add(self, sums: Float64[Tensor, " sites"], inputs: Tensor, labels: Int64[Tensor, " examples"]) -> None:
        """Add sum_n dl_n/dw over the examples of one batch to `sums`, a few examples at a time.

        Raises:
            ModelError: autograd can't go back through the model.
        """
        for part, wanted in zip(inputs.split(self.examples_at_once), labels.split(self.examples_at_once), strict=True):
            gradient = self._run(part, wanted)
            if gradient is not None:
                self.is_connected = True
                sums += self._at_sites(gradient.reshape(-1)).to(sums)

    def check(self, any_touched: bool) -> None:
        """Refuse a model whose logits move with the weights although autograd sees no way from one to the other.

        Raises:
            ModelError: its forward pass runs without gradients.
        """
        if any_touched and not self.is_connected:
            raise ModelError(
                f"the logits depend on {self.parameter}, but autograd finds no way back to it: the model's forward "
                "pass runs under torch.no_grad or detaches a tensor. Leave out the criteria that need gradients."
            )

    def _run(self, inputs: Tensor, labels: Int64[Tensor, " examples"]) -> Tensor | None:
        """The summed gradient, in the parameter's shape; None where the logits don't depend on the parameter."""
        own = self.model.get_parameter(self.parameter).detach()
        with as_found(self.model), torch.inference_mode(False), torch.enable_grad(), _nothing_else_asked(self.model):
            weights = own.to(self.dtype, copy=True, memory_format=torch.contiguous_format).requires_grad_()
            try:
                logits = run_with(self.model, self.parameter, weights, inputs, mode=FromTargetOn(weights, self.lifts))
                if not logits.requires_grad:
                    return None
                by_logits = loss_gradient(logits.detach(), labels, self.loss)
                return torch.autograd.grad(logits, weights, grad_outputs=by_logits, allow_unused=True)[0]
            except RuntimeError as error:
                raise ModelError(
                    f"the gradient of the loss by {self.parameter} can't be computed ({type(error).__name__}: "
                    f"{error}). Leave out the criteria that need gradients, or choose another layer."
                ) from error

    def _at_sites(self, flat: Float[Tensor, " weights"]) -> Float[Tensor, " sites"]:
        if isinstance(self.sites, EveryWeight):
            return flat[self.sites.first : self.sites.last]
        return flat[self.sites.indices]


def loss_gradient(
    logits: Float[Tensor, "examples classes"], labels: Int64[Tensor, " examples"], loss: Loss = CROSS_ENTROPY
) -> Float[Tensor, "examples classes"]:
    """Each example's dl/dz, in the precision of the logits.

    For plain cross-entropy that is the softmax p, and at the label y minus the sum of the others' p (p_y - 1 would
    cancel). Call with gradients enabled, which other losses need.
    """
    if not is_plain(loss):
        wide = logits.double().requires_grad_()
        return torch.autograd.grad(loss_values(loss, wide, labels).sum(), wide)[0].to(logits.dtype)
    rest = make_intact(logits, labels, logits.dtype).rest
    return rest.scatter(1, labels[:, None], -rest.sum(dim=1, keepdim=True))


@contextmanager
def _nothing_else_asked(model: torch.nn.Module) -> Iterator[None]:
    """Context in which no parameter of the model requires a gradient and no backward hook of its modules runs."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooked = {
        module: (module._backward_hooks, module._backward_pre_hooks)
        for module in model.modules()
        if module._backward_hooks or module._backward_pre_hooks
    }
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
        for module in hooked:
            module._backward_hooks, module._backward_pre_hooks = OrderedDict(), OrderedDict()
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
        for module, (hooks, pre_hooks) in hooked.items():
            module._backward_hooks, module._backward_pre_hooks = hooks, pre_hooks
