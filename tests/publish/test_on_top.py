"""What people do with models of transformers works on pruned ones: Trainer, adapters, quantisation."""

import pytest
import torch
import transformers
from pruned_models import IMAGES, answer, cut, hf_vit
from torch.utils.data import Dataset

KIND = transformers.AutoModelForImageClassification


class Images(Dataset):
    """A few images with labels."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": index % 5}


@pytest.fixture
def saved(tmp_path):
    cut(hf_vit()).save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


def train(model, folder, resume=None):
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=4, save_steps=2, learning_rate=1e-2, report_to=[],
        seed=0, use_cpu=True, disable_tqdm=True, gradient_checkpointing=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Images())
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model


def test_trainer_trains_saves_and_resumes(saved, tmp_path):
    whole = train(KIND.from_pretrained(saved), tmp_path / "run")
    half = str(tmp_path / "run" / "checkpoint-2")
    # From the checkpoint: the Trainer of transformers 5.23 does not find the renamed weights of a ViT, dense or not.
    resumed = train(KIND.from_pretrained(half), tmp_path / "run", resume=half)
    again = KIND.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert torch.equal(answer(resumed), answer(whole))
    assert torch.equal(answer(again), answer(whole))
    assert not torch.equal(answer(whole), answer(KIND.from_pretrained(saved)))


def test_adapters_on_a_pruned_model(saved, tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(KIND.from_pretrained(saved), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(KIND.from_pretrained(saved), tmp_path / "adapter")
    assert torch.equal(answer(loaded), answer(adapted))
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(answer(KIND.from_pretrained(tmp_path / "merged")), answer(merged))
    assert not torch.equal(answer(merged), answer(KIND.from_pretrained(saved)))


def test_int8_on_a_pruned_model(saved):
    quantization = pytest.importorskip("torchao.quantization")
    settings = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model, small = KIND.from_pretrained(saved), KIND.from_pretrained(saved, quantization_config=settings)
    kinds = {type(parameter).__name__ for parameter in small.parameters()}
    assert any("Int8" in kind or "Affine" in kind for kind in kinds)
    difference = (answer(small) - answer(model)).norm() / answer(model).norm()
    assert 0 < difference < 0.05


def test_bitsandbytes_on_a_pruned_model(saved):
    pytest.importorskip("bitsandbytes")
    model = KIND.from_pretrained(saved)
    small = KIND.from_pretrained(saved, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True))
    assert any(type(module).__name__ == "Linear8bitLt" for module in small.modules())
    difference = (answer(small).float() - answer(model)).norm() / answer(model).norm()
    assert 0 < difference < 0.1


def test_compile_and_copies(saved):
    import copy
    import pickle

    model = KIND.from_pretrained(saved).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IMAGES).logits, answer(model))
    assert torch.equal(answer(copy.deepcopy(model)), answer(model))
    assert torch.equal(answer(pickle.loads(pickle.dumps(model))), answer(model))
