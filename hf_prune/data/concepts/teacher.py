"""A trained classifier as a judge of pictures: features at one of its layers, and what its logits make of them."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hf_prune.data.concepts.bottleneck import find_bottleneck, replaced_output
from hf_prune.data.concepts.pictures import as_input
from hf_prune.data.concepts.segments import Picture
from hf_prune.data.transforms import Preprocessing
from hf_prune.tokens.site import logits_of

NUM_PROBES = 2


class Teacher:
    """A classifier of transformers, of timm or of one's own, in evaluation mode while it is asked.

    It runs where its weights are, without changing them.

    Attributes:
        layer: Name of the layer whose output is taken; see `find_bottleneck`.
        num_classes: Number of its logits.
        preprocessing: What its input looks like.

    Raises:
        UnsupportedModelError: If no layer can be found, or the named one cannot serve.
    """

    def __init__(
        self, model: nn.Module, preprocessing: Preprocessing, *, layer: str | None = None, batch_size: int = 64
    ) -> None:
        self._model, self._batch_size = model, batch_size
        self.preprocessing = preprocessing
        size = (NUM_PROBES, *preprocessing.size_px, 3)
        noise = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
        with _evaluating(model), torch.no_grad():
            self._bottleneck = find_bottleneck(model, self._input(noise), layer)
            self.num_classes = logits_of(model(self._input(noise))).shape[1]
        self.layer = self._bottleneck.layer

    @torch.no_grad()
    def features(self, pictures: Iterable[Picture]) -> npt.NDArray[np.float32]:
        """Return the mean output of the layer for pictures of its input size: `(N, C)`. Memory of one batch."""
        return self._collected(pictures, self._batch_features)

    def gradients(self, pictures: Iterable[Picture], label: int) -> npt.NDArray[np.float32]:
        """Return the derivatives `(N, C)` of the logit of a class for steps of the features."""
        return self._collected(pictures, lambda batch: self._batch_gradients(batch, label))

    def digest(self) -> str:
        """Return a fingerprint of the weights."""
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self._model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _collected(self, pictures: Iterable[Picture], of_batch: Callable[[Tensor], Tensor]) -> npt.NDArray[np.float32]:
        pictures, found = iter(pictures), []
        with _evaluating(self._model):
            while batch := list(islice(pictures, self._batch_size)):
                found.append(of_batch(self._input(np.stack(batch))).float().cpu().numpy())
        return np.concatenate(found) if found else np.zeros((0, 0), np.float32)

    def _batch_features(self, images: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def note(output: Tensor) -> Tensor:
            # At once: what follows may write into the same memory.
            seen.append(self._bottleneck.mean(output))
            return output

        with replaced_output(self._model, self.layer, note):
            self._model(images)
        return seen[0]

    @torch.enable_grad()
    def _batch_gradients(self, images: Tensor, label: int) -> Tensor:
        held: list[Tensor] = []

        def hold(output: Tensor) -> Tensor:
            held.append(output.detach().requires_grad_())
            return held[0].clone()

        with replaced_output(self._model, self.layer, hold):
            logits = logits_of(self._model(images))
        (gradient,) = torch.autograd.grad(logits[:, label].sum(), held[0])
        return self._bottleneck.sum(gradient)

    def _input(self, pictures: npt.NDArray[np.uint8]) -> Tensor:
        weight = next(parameter for parameter in self._model.parameters() if parameter.is_floating_point())
        return as_input(pictures, self.preprocessing).to(weight.device, weight.dtype)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
