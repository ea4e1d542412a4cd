"""Before and after the layers: the token embedding; the logits, and tokens sampled from them."""

from __future__ import annotations

from redshard.worker.device.arguments import EmbedArguments, SampleArguments
from redshard.worker.device.base import Device
from redshard.worker.model.blocks.block import Site
from redshard.worker.model.sampler import SampleOutputs


class Embedding:
    """The residual stream from the token ids.

    Args:
        site: of the first stage.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._table = site.weights.ends.matrix("token_embd")

    def launch(self, device: Device, rows: int) -> None:
        """Put the operation in order."""
        site = self._site
        arguments = EmbedArguments(
            step=site.inputs.step,
            token_ids=site.inputs.token_ids,
            newest=site.newest,
            table=self._table,
            out=site.hidden,
            width=site.n_embd,
            scale=1.0,
        )
        device.launch("embed", arguments, rows)


class Output:
    """Logits of the output rows, and a token for each of them.

    Args:
        site: of the last stage.

    Attributes:
        logits: address of float32 (max_outputs, n_vocab).
        sampled: address of what `SampleOutputs` lays out.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._norm = site.weights.ends.vector("output_norm")
        self._matrix = site.weights.ends.matrix("output")

        rows = site.limits.max_outputs
        self._outputs = SampleOutputs(rows)
        with site.arena.phase():
            self._normed = site.activation(rows, site.n_embd, [self._matrix])
            self.logits = site.floats(rows, site.weights.config.n_vocab)
            self.sampled = site.arena.take(self._outputs.nbytes(n_top=1))

    def launch(self, device: Device, rows: int) -> None:
        """Put the operations that make logits in order."""
        site = self._site
        site.norm(device, rows, self._norm, self._normed, over_outputs=True)
        products = [(self._matrix, self.logits)]
        site.multiply(device, rows, self._normed, site.n_embd, products, over_outputs=True)

    def launch_sampling(self, device: Device, rows: int, n_top: int) -> None:
        """Put the operation that samples from the logits in order."""
        inputs, out = self._site.inputs, self._outputs.addresses(self.sampled)
        arguments = SampleArguments(
            step=inputs.step,
            logits=self.logits,
            rows=inputs.sampling,
            adjustments=inputs.adjustments,
            newest=self._site.newest,
            tokens=out.tokens,
            logprobs=out.logprobs,
            top_tokens=out.top_tokens,
            top_logprobs=out.top_logprobs,
            n_vocab=self._site.weights.config.n_vocab,
            n_top=n_top,
        )
        device.launch("sample", arguments, rows)
