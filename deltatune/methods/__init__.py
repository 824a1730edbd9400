"""WHAT is attached: one file, one paper, one frozen dataclass, found here by its name."""

from deltatune.methods.addition.adapter import Adapter as Adapter
from deltatune.methods.addition.compacter import Compacter as Compacter
from deltatune.methods.addition.compacter_plus_plus import CompacterPlusPlus as CompacterPlusPlus
from deltatune.methods.addition.embedding_prefix_tuning import EmbeddingPrefixTuning as EmbeddingPrefixTuning
from deltatune.methods.addition.ia3 import IA3 as IA3
from deltatune.methods.addition.low_rank_adapter import LowRankAdapter as LowRankAdapter
from deltatune.methods.addition.mam import MAM as MAM
from deltatune.methods.addition.multi_head_parallel_adapter import MultiHeadParallelAdapter as MultiHeadParallelAdapter
from deltatune.methods.addition.p_tuning import PTuning as PTuning
from deltatune.methods.addition.parallel_adapter import ParallelAdapter as ParallelAdapter
from deltatune.methods.addition.pfeiffer_adapter import PfeifferAdapter as PfeifferAdapter
from deltatune.methods.addition.phm_adapter import PHMAdapter as PHMAdapter
from deltatune.methods.addition.prefix_tuning import PrefixTuning as PrefixTuning
from deltatune.methods.addition.prompt_tuning import PromptTuning as PromptTuning
from deltatune.methods.addition.scaled_parallel_adapter import ScaledParallelAdapter as ScaledParallelAdapter
from deltatune.methods.addition.unipelt import UniPELT as UniPELT
from deltatune.methods.kinds import Method as Method
from deltatune.methods.kinds import methods as methods
from deltatune.methods.reparameterization.lora import LoRA as LoRA
from deltatune.methods.specification.bitfit import BitFit as BitFit
from deltatune.methods.specification.diff_pruning import DiffPruning as DiffPruning
from deltatune.methods.specification.full import FullFineTuning as FullFineTuning
from deltatune.methods.specification.linear_probe import LinearProbe as LinearProbe
from deltatune.methods.specification.trainable_tokens import TrainableTokens as TrainableTokens
