"""Fine-tuning: an experiment whose base is a finished model and whose corpus is conversations.

Every verb works on it. What is a verb of its own is training without scores, as a reference is trained.
"""

from functools import partial
from pathlib import Path

from pipeline.tokens import tokenised
from pipeline.train import TOKENS, run_training, train_live
from schemas.config import Config
from schemas.errors import UserError
from schemas.models import local_model, open_tokenizer
from trainer.ranks import die_with_parent
from trainer.selection import OBJECTIVES
from trainer.stream import CHANCE


def finetune(config: Config) -> Path:
    """Train `base` on the conversations of `corpus`, on what the assistant says alone. Returns the final model's folder.

    An objective that reads scores, as `slm` does, trains on those of `tokensift score`; any other on the tokens alone.
    Raises UserError if the corpus holds no conversations.
    """
    if not config.corpus.messages:
        raise UserError(
            "field `corpus.messages`: missing, so this is no corpus of conversations",
            "name the column of their messages; to train on texts, `tokensift score` and `tokensift train`",
        )
    if set(OBJECTIVES[config.train.objective].columns) - {CHANCE}:
        return train_live(config)
    die_with_parent()
    base, settings = local_model(config.base), config.train.model_copy(update={"output": config.train.folder})
    tokenizer = open_tokenizer(base, "base")
    source = partial(tokenised, config.corpus, tokenizer, config.context, config.train.output / TOKENS)
    return run_training(f"fine-tune {settings.output.name}", config, settings, base, source, tokenizer)
