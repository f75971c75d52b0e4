"""The vLLM half: `vllm serve DIR` of a checkpoint with quant_method "wexpand".

vLLM calls `register` in every process it starts, for every model it serves, so it does little and
never raises. The rest is imported when a checkpoint of ours is loaded:

    config.py            which linears of the model are ours, what is refused, WEXPAND_VERIFY=1
    linear.py            one layer: its parameters, its tensors put together, its forward
    params.py            the tensors of a layer as they arrive from the files, checked
    tensor_parallel.py   the neurons and columns that a tensor-parallel rank holds
    ops.py               the one custom op that a forward calls
"""

import logging

__all__ = ["register"]

_registered = False


def register() -> None:
    """Make vLLM know quant_method "wexpand"; entry point of group `vllm.general_plugins`.

    Safe to call any number of times. A vLLM whose API is not the one we know is logged, not
    raised: an exception here would stop vLLM from serving any model on the machine.
    """
    global _registered
    if _registered:
        return
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from .config import QUANT_METHOD, WexpandConfig

        register_quantization_config(QUANT_METHOD)(WexpandConfig)
        _registered = True
    except Exception:
        # below "vllm", whose handlers vLLM sets up: a logger of any other name prints nothing there
        logging.getLogger("vllm.wexpand_plugin").warning(
            "wexpand-plugin does not work with this vLLM and was not registered; checkpoints with "
            "quant_method 'wexpand' cannot be served, others are not affected",
            exc_info=True,
        )
