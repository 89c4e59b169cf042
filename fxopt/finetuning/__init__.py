"""Train a model a little more: after pruning, or wherever accuracy has to be recovered."""

from fxopt.finetuning.batch_norms import reestimate_batch_norms
from fxopt.finetuning.finetuning import finetune
from fxopt.finetuning.history import Epoch, FineTuned

__all__ = ["Epoch", "FineTuned", "finetune", "reestimate_batch_norms"]
