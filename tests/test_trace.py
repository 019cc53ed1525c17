"""Spans on a profiler's timeline: around work on a GPU, nowhere else."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import gpuxbar as gx
from gpuxbar.launch import trace


@pytest.fixture
def spans(monkeypatch):
    """Names of the spans opened, in order."""
    opened = []

    def annotate(name, domain):
        assert domain == "gpuxbar"
        opened.append(name)
        return nullcontext()

    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(annotate=annotate))
    trace._nvtx.cache_clear()
    yield opened
    trace._nvtx.cache_clear()


def step(device):
    torch.manual_seed(0)
    noisy = gx.CrossbarSpec(adc={"bits": 8, "range": "worst_case"}, read_noise={"sigma": 1e-9})
    model = gx.convert(torch.nn.Sequential(torch.nn.Linear(6, 4)), noisy)[0].to(device)
    model(torch.randn(5, 6, device=device, requires_grad=True)).square().sum().backward()


def test_a_span_has_its_name_and_domain(spans):
    with trace.span("read"):
        assert spans == ["read"]


def test_without_nvtx_a_span_does_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)  # import fails
    trace._nvtx.cache_clear()
    try:
        assert isinstance(trace.span("read"), nullcontext)
    finally:
        trace._nvtx.cache_clear()


def test_work_on_the_cpu_opens_none(spans):
    step("cpu")
    assert spans == []


@pytest.mark.gpu
def test_layers_and_kernels_have_spans(spans, cuda_device):
    step("cuda")
    assert {"program", "0", "0 backward", "adc_accumulate"} <= set(spans)
