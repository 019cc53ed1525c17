"""Training by the loops of others, where they are installed: it learns, and goes on from a checkpoint as if it had not stopped."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import gpuxbar as gx

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

SPEC = {
    "tile": {"rows": 16, "cols": 16}, "mapping": {"scheme": "subtracted"}, "dac": {"bits": 8}, "adc": {"bits": 8},
    "read_noise": {"sigma": 1e-8},
}  # fmt: skip
MODES = {
    "hardware-aware": SPEC,
    "in situ": {**SPEC, "update": {"law": "soft_bounds"}},
    "pulses": {**SPEC, "update": {"law": "soft_bounds"}, "pulses": {}},
}


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


def optimiser_of(mode, parameters):
    return (torch.optim.SGD if mode == "hardware-aware" else gx.optim.InSituSGD)(parameters, lr=0.1)


def samples(count=128):
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x[:, :3].argmax(1))


def on_crossbars(mode):
    """A small network, its optimiser and its data, calibrated."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(inplace=True), nn.Linear(32, 3))
    model, _ = gx.convert(model, gx.CrossbarSpec.model_validate(MODES[mode]))
    optimiser = optimiser_of(mode, model.parameters())
    gx.calibrate(model, [samples().tensors], loss=functional.cross_entropy)
    return model, optimiser


def alike(one, two):
    return all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


def test_lightning(mode, tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.optimiser = on_crossbars(mode)
            self.losses = []

        def training_step(self, batch, _):
            loss = functional.cross_entropy(self.net(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimiser, 8)
            return {"optimizer": self.optimiser, "lr_scheduler": schedule}

    def fit(epochs, **more):
        module = Module()
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", gradient_clip_val=1.0, accumulate_grad_batches=2, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, DataLoader(samples(), 16), **more)
        return trainer, module

    trainer, module = fit(2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    assert module.losses[-1] < module.losses[0]
    _, resumed = fit(4, ckpt_path=tmp_path / "two.ckpt")
    _, whole = fit(4)
    assert alike(resumed.net, whole.net)


def test_accelerate(mode, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimiser = on_crossbars(mode)
    model, optimiser, loader = accelerator.prepare(model, optimiser, DataLoader(samples(), 16))

    def epoch():
        for x, y in loader:
            loss = functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
        return loss.item()

    first = epoch()
    accelerator.save_state(tmp_path)
    last = epoch()
    assert last < first
    whole = copy.deepcopy(model)
    accelerator.load_state(tmp_path)
    assert epoch() == last
    assert alike(model, whole)


def test_the_trainer_of_transformers(mode, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    tokens = torch.randint(60, (16, 12))
    data = [{"input_ids": row, "labels": row} for row in tokens]

    def trainer(folder, **more):
        torch.manual_seed(0)
        config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        model = transformers.GPT2LMHeadModel(config)
        model, _ = gx.convert(model, gx.CrossbarSpec.model_validate(MODES[mode]), rules={"lm_head": None})
        optimiser = optimiser_of(mode, model.parameters())
        gx.calibrate(model, [tokens[:4]], step=lambda ids: model(input_ids=ids, labels=ids).loss)
        arguments = transformers.TrainingArguments(
            str(folder), max_steps=4, per_device_train_batch_size=4, use_cpu=True, report_to=[], save_steps=2, disable_tqdm=True,
        )  # fmt: skip
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda _: 1.0)
        made = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimiser, schedule))
        made.train(**more)
        return model

    whole = trainer(tmp_path / "whole")
    resumed = trainer(tmp_path / "again", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert alike(resumed, whole)
    prompt = tokens[:2, :3]
    assert whole.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (2, 7)
