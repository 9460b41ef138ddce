"""The callback of `transformers.Trainer`, on a tiny BERT with random weights."""

import importlib
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from sparsekit.patterns import NM
from sparsekit.prune import hold_masks, prune, train_sparse
from sparsekit.prune.training import trainer as module
from sparsekit.prune.training.trainer import FILE, SparseTrainerCallback

STEPS = 8


def bert(seed=0):
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=30,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=8,
        )
    )


def samples():
    make = torch.Generator().manual_seed(0)
    tokens = torch.randint(30, (32, 8), generator=make)
    return [{"input_ids": row, "labels": int(row[0] > 15)} for row in tokens]


def trainer(model, folder, callback, **arguments):
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    args = TrainingArguments(output_dir=str(folder), **(defaults | arguments))
    return Trainer(
        model=model,
        args=args,
        train_dataset=samples(),
        eval_dataset=samples(),
        callbacks=[callback],
    )


def rigl(model, optimizer, steps):
    options = {"targets": "*encoder*", "every": 2, "drop": 0.5}
    return train_sparse(model, "2:4", "rigl", optimizer, steps=steps, **options)


def sr_ste(model, optimizer, steps):
    return train_sparse(model, "bsr4x4@0.5", "sr_ste", optimizer, steps=steps, targets="*encoder*")


def test_masks_hold_and_come_back_with_a_checkpoint(tmp_path):
    model = bert()
    masks = prune(model, "2:4", targets="*encoder*", progress=False).masks
    before = model.bert.encoder.layer[0].output.dense.weight.detach().clone()
    trainer(model, tmp_path, SparseTrainerCallback(masks=masks)).train()
    after = model.bert.encoder.layer[0].output.dense.weight.detach()
    assert not torch.equal(before, after)
    other = bert(seed=1)
    wrong = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    resumed = trainer(other, tmp_path, SparseTrainerCallback(masks=wrong))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for net in (model, other):
        for name, mask in masks.items():
            assert torch.equal(net.get_submodule(name).weight != 0, mask)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert not model.bert.encoder.layer[0].output.dense.weight._backward_hooks


@pytest.mark.parametrize("make", [rigl, sr_ste])
def test_a_run_is_resumed_bit_by_bit(make, tmp_path):
    model, other = bert(), bert(seed=1)
    callback = SparseTrainerCallback(run=make)
    trainer(model, tmp_path / "a", callback).train()
    assert callback.report.sparsity == 0.5
    assert (tmp_path / "a" / "checkpoint-3" / FILE).exists()
    folder = tmp_path / "a" / "checkpoint-3"
    again = SparseTrainerCallback(run=make, resume_from=folder)
    trainer(other, tmp_path / "b", again).train(resume_from_checkpoint=str(folder))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    for name, mask in callback.report.masks.items():
        assert torch.equal(mask, again.report.masks[name])
        assert NM(2, 4).fits(mask) or make is sr_ste
        assert not bool(model.get_submodule(name).weight[~mask].any())


def test_a_training_that_is_stopped_early_ends_in_the_pattern(tmp_path):
    class Stop(SparseTrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    callback = Stop(run=sr_ste)
    model = bert()
    trainer(model, tmp_path, callback).train()
    assert callback.report.sparsity == 0.5
    for name, mask in callback.report.masks.items():
        assert torch.equal(model.get_submodule(name).weight != 0, mask)


def test_what_it_refuses(tmp_path):
    for arguments in ({}, {"masks": {}, "run": rigl}):
        with pytest.raises(ValueError, match="pass either masks= or run="):
            SparseTrainerCallback(**arguments)
    model = bert()
    trainer(model, tmp_path, SparseTrainerCallback(run=rigl)).train()
    (tmp_path / "checkpoint-6" / FILE).unlink()
    again = trainer(bert(), tmp_path, SparseTrainerCallback(run=rigl))
    with pytest.raises(ValueError, match=r"resumes at step 6, but .*checkpoint-6.* does not exist"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3}
    best |= {"metric_for_best_model": "loss"}
    choosing = trainer(bert(), tmp_path, SparseTrainerCallback(run=rigl), **best)
    with pytest.raises(ValueError, match="load_best_model_at_end would put the weights of one"):
        choosing.train()


def test_hooks_of_a_training_that_failed_are_taken_off(tmp_path):
    class Fail(SparseTrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if self.report is None and state.global_step == 2:
                raise KeyError

    model, callback = bert(), Fail(run=rigl)
    failing = trainer(model, tmp_path, callback)
    with pytest.raises(KeyError):
        failing.train()
    callback.on_step_end = lambda *_, **__: None
    failing.train()
    assert callback.report.sparsity == 0.5
    assert not any(p._backward_hooks for p in model.parameters())


def test_an_optimizer_that_accelerate_wraps():
    model = bert().bert.encoder
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    wrapped = Accelerator(cpu=True).prepare(optimizer)
    assert wrapped is not optimizer

    def step():
        wrapped.zero_grad()
        sum((p * p.detach().sin()).sum() for p in model.parameters()).backward()
        wrapped.step()

    step()
    with train_sparse(model, "2:4", "gradual", wrapped, steps=4, every=1) as run:
        for _ in range(4):
            step()
        assert run.step == 4
    with hold_masks(model, run.report.masks, wrapped):
        step()
    for name, mask in run.report.masks.items():
        assert torch.equal(model.get_submodule(name).weight != 0, mask)
    step()
    assert not torch.equal(model.get_submodule(name).weight != 0, mask)


def test_transformers_is_imported_by_those_who_use_it_alone(monkeypatch):
    code = "import sys, sparsekit.prune.training; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="needs transformers: pip install"):
        importlib.reload(module)
