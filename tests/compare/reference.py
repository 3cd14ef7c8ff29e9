"""What transformers and torch compute. Imported only where they are installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.models.cases import as_version_4

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # models this small only wait for other threads


def random_model(case: dict[str, Any], seed: int) -> Any:
    """A model of a case with weights large enough for every part of it to show in the logits."""
    # A head_dim of None is left out: some configurations have no such key.
    values = {k: v for k, v in case["config"].items() if k != "head_dim" or v is not None}
    config = transformers.AutoConfig.for_model(case["model_type"], **values)
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Small embeddings: a token should be predicted from its context, not from itself.
            size = 0.7 if "embed" in name or "wte" in name else 1.5
            spread = 0.3 if parameter.ndim == 1 else size / np.sqrt(min(parameter.shape))
            centre = parameter.mean().item() if "norm" in name or "ln_" in name else 0.0
            noise = rng.normal(size=tuple(parameter.shape)) * spread + round(centre)
            parameter.copy_(torch.from_numpy(noise))
    return model


def save(model: Any, directory: Path, case: dict[str, Any]) -> None:
    """As transformers saves it; the configuration in the manner of its version 4 where asked."""
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    if case["old"]:
        path = directory / "config.json"
        values = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps(as_version_4(values), indent=2) + "\n", encoding="utf-8")


def load(directory: Path) -> Any:
    """A saved model in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()


def load_tokenizer(directory: Path) -> Any:
    """Its tokenizer."""
    return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)


def random_prompts(model: Any, rows: int, length: int, seed: int) -> np.ndarray:
    """Ids [rows, length]."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, model.config.vocab_size, size=(rows, length))


def logits(model: Any, prompts: np.ndarray) -> np.ndarray:
    """Logits [rows, length, V] of whole prompts."""
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(prompts))).logits.float().numpy()


def greedy(model: Any, prompts: np.ndarray, new: int) -> np.ndarray:
    """The `new` most likely tokens after each prompt, one after the other, ends not heeded."""
    ids = torch.from_numpy(np.asarray(prompts))
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=None,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
        use_cache=True,
    )
    return out[:, ids.shape[1] :].numpy()
