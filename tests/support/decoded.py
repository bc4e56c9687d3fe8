"""The weights of a bundle as a transformers model: decoded, with the LoRA merged."""

from pathlib import Path

__all__ = ["save_decoded"]


def save_decoded(bundle: Path, source: Path, directory: Path, *, lora: bool) -> Path:
    """Save the model `source` with a bundle's weights, in float32, and the bundle's tokenizer.

    Args:
        bundle: directory of the bundle.
        source: the transformers model that it was built from.
        directory: where to save.
        lora: whether to merge the bundle's LoRA.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from coatrt.bundle import Bundle
    from coatrt.engines.bundles.stored_weights import stored_weights

    opened = Bundle.open(bundle)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tensors = load_file(bundle / "lora.safetensors")
    pairs = {tensor.matrix: tensor for tensor in opened.contract.tensors} if lora else {}
    with torch.no_grad():
        for name, values in stored_weights(opened.decoder("cpu")[0], opened.model_matrices):
            weight = torch.from_numpy(values.copy())
            if name in pairs:
                weight += (tensors[pairs[name].A].float() @ tensors[pairs[name].B].float()).T
            model.get_submodule(name).weight.copy_(weight)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(bundle / "tokenizer").save_pretrained(directory)
    return directory
