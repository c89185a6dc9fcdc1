"""The method that methods/README.md shows has the gradient it states."""

import re
from pathlib import Path

import torch

from distill_bench.registry import find_method
from distill_bench.testing.gradient import student_gradient

README = Path(__file__).parents[2] / "methods" / "README.md"


def test_the_method_of_the_readme_has_the_gradient_of_its_docstring(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (tmp_path / "my_method.py").write_text(example)
    method = find_method(f"{tmp_path}/my_method.py:MyMethod")(scale=3.0)
    draw = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 2, 3, 1, 2, 2, dtype=torch.float64, generator=draw)
    sigma = torch.tensor([0.3, 0.7], dtype=torch.float64)
    gradient = student_gradient(method, x0, noise, sigma, lambda x, *_: 0.5 * x, lambda x, *_: -x)
    s = sigma.reshape(2, 1, 1, 1, 1)
    x_t = (1 - s) * x0 + s * noise
    torch.testing.assert_close(gradient, 3.0 * 1.5 * x_t / x0.numel())
