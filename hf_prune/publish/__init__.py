"""Models and evidence out: manifest, safetensors, model card, Hub."""
