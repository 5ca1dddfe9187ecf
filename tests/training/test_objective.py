"""Training sees what the generator serves: the same logits, whatever kinds of layers and heads it has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from training_runs import make_config
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from pic_rag.config import PicConfig
from pic_rag.encoder import PicEncoder
from pic_rag.training import objective as objective_module
from pic_rag.training.batch import StepDataset, build_rows
from pic_rag.training.chat import Dialogue
from pic_rag.training.loop import Trainer
from pic_rag.training.objective import Objective

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "gemma2": {"sliding_window": 16},
    "gemma3_text": {"sliding_window": 16},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.25},
}


def make_objective(family, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SIZES, **options), attn_implementation="eager")
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    pic = PicConfig(segment_tokens=64, encoder_layers=1, lora_rank=0)
    return model.eval(), Objective(PicEncoder(model, pic, model.get_input_embeddings()), model, 0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_packed_rows_are_those_that_the_model_serves(family):
    model, objective = make_objective(family, **FAMILIES[family])
    texts = [torch.randint(3, 300, (length,)) for length in (40, 12, 60)]
    rows = build_rows([Dialogue(ids.numpy(), np.arange(len(ids)) == len(ids) - 1) for ids in texts], row_places=80)
    with torch.inference_mode():
        trained = objective._logits(objective._read(rows, None))
        served = torch.cat([model(ids[None]).logits[:, -2] for ids in texts])
    assert rows.ids.shape[0] < len(texts), "some share a row"
    assert torch.allclose(trained, served, atol=1e-4)


def test_a_model_whose_layers_attend_otherwise_is_refused():
    model, objective = make_objective("llama")
    model.config.layer_types = ["full_attention", "chunked_attention"] * 3
    with pytest.raises(ValueError, match="must have layers of full_attention or sliding_attention, got chunked_attent"):
        Objective(objective.encoder, model, 0.0)


def test_the_loss_is_the_cross_entropy_and_what_the_teacher_would_rather_have_said(data, tmp_path, monkeypatch):
    monkeypatch.setattr(objective_module, "TARGETS_AT_ONCE", 3)
    fields = {"reader_rank": 2, "distillation": 0.3, "tasks": {"questions": 1}, "examples_per_step": 4}
    trainer = Trainer(make_config(data, tmp_path, **fields), Accelerator())
    objective, batch = trainer.model, StepDataset(trainer.config, trainer.factory)[0]
    targets = batch.reads.target_ids
    assert len(targets) % 3, "the last part is shorter"
    loss, accuracy = objective(batch)
    loss.backward()
    gradients = [parameter.grad for parameter in trainer.trained]

    said = objective._logits(objective._read(batch.reads, objective.encoder(batch.layout)))
    with torch.no_grad():
        wanted = objective._logits(objective._read(batch.teacher, None)).softmax(-1)
    cross_entropy = torch.nn.functional.cross_entropy(said, targets)
    divergence = (wanted * (wanted.log() - said.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(loss, cross_entropy + 0.3 * divergence)
    assert accuracy == (said.argmax(-1) == targets).float().mean()
    expected = torch.autograd.grad(cross_entropy + 0.3 * divergence, trainer.trained)
    for got, wanted_gradient in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, wanted_gradient, rtol=1e-3, atol=1e-6)
