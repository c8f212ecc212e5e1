"""ResT (Reshaped Token-level policy gradients) for tool-use language models at Megatron scale.

Importing this package pulls in nothing: pick what you need from :mod:`megatron_rest.ops`, :mod:`megatron_rest.regions`,
:mod:`megatron_rest.weighting`, :mod:`megatron_rest.algorithms` (torch only) or :mod:`megatron_rest.mcore`
(Megatron-Core).
"""

__version__ = "0.1.0"
