"""Muon: steps of equal size in all directions of a weight matrix."""

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Muon for matrices and convolutions, Adam for vectors (biases, norms, rows of tables).

    Muon replaces the averaged gradient of a matrix by the nearest orthogonal matrix (Jordan et al.
    2024, https://kellerjordan.github.io/posts/muon): directions that the gradient hardly ever
    points to are learnt as fast as the others. A convolution is the matrix [out, in height width].
    `torch.optim.Muon` does not take convolutions, and its iteration over whole matrices costs a CPU
    as much as the network's own step; this one works on their small Gram matrices.

    Args:
        parameters: Tensors.
        lr: Learning rate of Adam.
        betas: Of Adam.
        matrix_rate_scale: Learning rate of matrices and tables relative to lr.
        tables: Those of `parameters` that are tables of vectors, such as class embeddings. Adam
            moves each element: an orthogonal step of a table with few rows would hardly move them.
    """

    def __init__(
        self,
        parameters,
        lr: float,
        betas=(0.9, 0.999),
        matrix_rate_scale: float = 5.0,
        tables=(),
    ):
        parameters = list(parameters)
        self._tables = {id(each) for each in tables}
        matrices = [each for each in parameters if self._is_matrix(each)]
        vectors = [each for each in parameters if each.ndim <= 1]
        others = [each for each in parameters if id(each) in self._tables]
        groups = [
            {"params": each, "rate_scale": scale}
            for each, scale in (
                (matrices, matrix_rate_scale),
                (vectors, 1.0),
                (others, matrix_rate_scale),
            )
            if each
        ]
        super().__init__(groups, {"lr": lr, "betas": betas})

    def _is_matrix(self, parameter):
        return parameter.ndim > 1 and id(parameter) not in self._tables

    @torch.no_grad()
    def step(self, closure=None):
        """Move all parameters that have a gradient."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    step = _step_matrix if self._is_matrix(parameter) else _step_vector
                    step(parameter, self.state[parameter], group["lr"], group["betas"])
        return loss


def create_muon(model, config) -> Muon:
    """Create `Muon` for a model, with the learning rate and betas of a `DenoiserConfig`."""
    tables = [each.weight for each in model.modules() if isinstance(each, torch.nn.Embedding)]
    return Muon(model.parameters(), config.learning_rate, config.adam_betas, tables=tables)


def _step_matrix(parameter, state, rate, betas):
    gradient = parameter.grad
    if not state:
        state["average"] = torch.zeros_like(parameter)
    state["average"].lerp_(gradient, 1 - MOMENTUM)
    direction = orthogonalise(gradient.lerp(state["average"], MOMENTUM).flatten(1))
    rows, columns = direction.shape
    rate = rate * max(1.0, rows / columns) ** 0.5
    parameter.add_(direction.view(parameter.shape), alpha=-rate)


def _step_vector(parameter, state, rate, betas):
    if not state:
        state["step"] = torch.zeros(())
        state["average"] = torch.zeros_like(parameter)
        state["square"] = torch.zeros_like(parameter)
    state["step"] += 1
    corrections = [1 - beta ** float(state["step"]) for beta in betas]
    state["average"].lerp_(parameter.grad, 1 - betas[0])
    state["square"].lerp_(parameter.grad.square(), 1 - betas[1])
    deviation = (state["square"] / corrections[1]).sqrt_().add_(1e-8)
    parameter.addcdiv_(state["average"], deviation, value=-rate / corrections[0])


def orthogonalise(matrix):
    """Bring the singular values of a matrix [rows, columns] near 1: to between 0.6 and 1.2.

    Newton-Schulz iteration x <- (a + b x x^T + c (x x^T)^2) x. All its steps are polynomials in the
    Gram matrix x x^T of the start, so that only the last product has the size of the matrix.
    """
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x.float() / (x.norm() + 1e-7)
    a, b, c = COEFFICIENTS
    identity = torch.eye(len(x), device=x.device)
    gram, product = x @ x.mT, identity
    for _ in range(NUM_ITERATIONS):
        factor = a * identity + b * gram + c * (gram @ gram)
        gram, product = factor @ gram @ factor, factor @ product
    x = (product @ x).to(matrix.dtype)
    return x.mT if matrix.shape[0] > matrix.shape[1] else x
