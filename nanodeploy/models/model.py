"""What the runtime asks of a model, whatever its family. Axes: T tokens, N of them whose logits are wanted."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from nanodeploy.models.batch import Batch, CacheNeeds
from nanodeploy.ops.layouts import Cache


class LanguageModel(nn.Module, ABC):
    """A family's file defines `Shape` (with `from_hf`) and `Model(shape)`, one of these."""

    vocab_size: int  # V
    max_model_len: int  # tokens, the positions it has
    ignored_tensors: tuple[str, ...] = ()  # names, `*` for anything, that a checkpoint may carry to no effect

    @abstractmethod
    def cache_needs(self) -> list[CacheNeeds]:
        """What each layer keeps."""

    @abstractmethod
    def forward(self, batch: Batch, caches: list[Cache]) -> Tensor:
        """One step. caches: one per layer, laid out as `cache_needs` says; what the step's tokens leave is written.

        Returns the hidden states after the last norm of the rows batch.logit_rows, [N, D].
        """

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, D] -> [N, V], both in the model's dtype."""

    @abstractmethod
    def compile_layers(self, backend: str | Callable = "inductor") -> None:
        """Compile the layers, on their first use, as one piece of code that all of them share.

        Steps must then always run in the same mode (inference_mode or not), or they compile again.
        """
