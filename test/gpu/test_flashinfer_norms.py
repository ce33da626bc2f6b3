"""FlashInfer's norms and gated activation are those of torch."""

import pytest
import torch

from nibble.kernels.torch import activation, norm

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("flashinfer")]


@pytest.mark.parametrize("rows", [0, 1, 300])
def test_flashinfers_norms_and_activation_are_those_of_torch(rows):
    from nibble.kernels.flashinfer import norm as flashinfer

    generator = torch.Generator().manual_seed(rows)
    x, residual = torch.randn(2, rows, 256, generator=generator).bfloat16().cuda()
    weight = (torch.rand(256, generator=generator) + 0.5).bfloat16().cuda()
    close = {"rtol": 2.0**-7, "atol": 1e-5}
    torch.testing.assert_close(flashinfer.rms_norm(x, weight, 1e-6), norm.rms_norm(x, weight, 1e-6), **close)
    wide = torch.randn(rows, 600, generator=generator).bfloat16().cuda()
    part = wide[:, 64:320]  # as of a projection that gives more than what is normalized
    torch.testing.assert_close(flashinfer.rms_norm(part, weight, 1e-6), norm.rms_norm(part, weight, 1e-6), **close)
    torch.testing.assert_close(flashinfer.silu_and_mul(x), activation.silu_and_mul(x), **close)
    expected = norm.add_rms_norm(x, residual, weight, 1e-6)
    found = flashinfer.add_rms_norm(x.clone(), residual.clone(), weight, 1e-6)
    for result, reference in zip(found, expected, strict=True):
        # The sum is normalized before or after it is rounded.
        torch.testing.assert_close(result, reference, rtol=2.0**-6, atol=1e-2)
